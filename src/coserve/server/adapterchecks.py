"""Which adapters from outside may be loaded under which names: the checks of /v1/load_lora_adapter and its opposite.

Owns: names, places and room. Does not own: whether the files are an adapter for this base (peft/gate.py), rows (models.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coserve.core import InvalidRequest, NotFound
from coserve.peft.remarks import REMARK_FILES
from coserve.peft.tensors import ADAPTER_FILES
from coserve.server.errors import Forbidden, TooLarge
from coserve.server.records import AdapterRecord
from coserve.server.settings import ServerConfig

MAX_NAME = 256


def no_such_model(name: str) -> NotFound:
    """The error for a name that stands for nothing."""
    shown = name[:64] if name.isprintable() else "of this name"
    return NotFound(f"there is no model {shown}; GET /v1/models lists those there are", param="model")


def check_adapter_name(name: str, base_names: Sequence[str]) -> None:
    """Whether an adapter from outside may have this name. Raises InvalidRequest."""
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise InvalidRequest(f"lora_name: 1 to {MAX_NAME} printable characters are expected", param="lora_name")
    if name in base_names:
        raise InvalidRequest(f"lora_name: {name} is the base model's name; choose another one", param="lora_name")


def check_replaceable(existing: AdapterRecord | None, tenant: str, name: str, replace: bool) -> None:
    """Whether an adapter from outside may take a name that `existing` has. Raises InvalidRequest."""
    if existing is not None and (existing.tenant != tenant or existing.job is not None):
        raise InvalidRequest(
            f"lora_name: {name} is a model of a finetuning job or of --lora-modules; choose another name", param="lora_name"
        )
    if existing is not None and not replace:
        raise InvalidRequest(
            f"lora_name: {name} has already been loaded; unload it first, or set load_inplace", param="lora_name"
        )


def check_unloadable(record: AdapterRecord, tenant: str, name: str) -> None:
    """Whether /v1/unload_lora_adapter may take an adapter away. Raises Forbidden."""
    if record.tenant != tenant:
        raise Forbidden(f"lora_name: {name} was given by --lora-modules", param="lora_name")
    if record.job is not None:
        raise Forbidden(
            f"lora_name: {name} is the model of a finetuning job; DELETE /v1/models/{name} deletes it", param="lora_name"
        )


def check_adapter_room(config: ServerConfig, size: int, held: int, num_others: int) -> None:
    """Raises TooLarge if an adapter of `size` bytes would exceed its tenant's limits. held: the tenant's bytes without what the
    adapter replaces. num_others: its other adapters from outside."""
    most = config.max_tenant_file_bytes
    if held + size > most:
        raise TooLarge(
            f"lora_path: a copy of the adapter takes {size} bytes, and beside the {held} of your files, jobs' outputs and "
            f"other adapters that is more than the {most} that they may have together; unload adapters or delete files or "
            "models that you no longer need", param="lora_path",
        )
    if num_others >= config.max_tenant_files:
        raise TooLarge(
            f"lora_path: you have {config.max_tenant_files} adapters loaded, the most that there may be; unload some",
            param="lora_path",
        )


def adapter_below(adapter_root: str | None, path: str) -> Path:
    """The directory of an adapter to load, with all links followed. A relative path counts from the root. Raises Forbidden,
    InvalidRequest."""
    if adapter_root is None:
        raise Forbidden(
            "this server loads no adapters at run time; start it with --adapter-root DIRECTORY", param="lora_path"
        )
    if not path or not path.isprintable():
        raise InvalidRequest("lora_path: the path of a directory is expected", param="lora_path")
    root = Path(adapter_root).resolve()
    try:
        directory = (root / path).resolve()
        places = [directory, *((directory / name).resolve() for name in (*ADAPTER_FILES, *REMARK_FILES))]
        inside = all(place.is_relative_to(root) for place in places)
        there = inside and directory.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, a circle of links
        raise InvalidRequest("lora_path: the path can't be followed", param="lora_path") from error
    if not inside:
        raise Forbidden("lora_path: only directories below --adapter-root can be loaded", param="lora_path")
    if not there:
        raise InvalidRequest("lora_path: there is no such directory below --adapter-root", param="lora_path")
    return directory
