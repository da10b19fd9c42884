"""Weights of a Hugging Face directory, streamed one tensor at a time from safetensors.

Owns: finding the files, checking names, shapes and dtypes before the first byte of a tensor is read. Does not own:
how weights are laid out on a device. Pickled weights are never opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coserve.core import InvalidRequest, NotFound, one_line
from coserve.model.architecture import Architecture, read_architecture, read_json
from coserve.model.decoder import MODULE_PATHS, biased_sites, linear_shapes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

FLOAT_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes per element of the stored dtypes that are plain weights, by safetensors' names."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def expected_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder reads, by Hugging Face parameter name, with its shape (linears are [out, in])."""
    hidden, biased = arch.hidden_size, biased_sites(arch)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (arch.vocab_size, hidden)}
    for layer in range(arch.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for site, (num_out, num_in) in linear_shapes(arch).items():
            shapes[f"{prefix}{MODULE_PATHS[site]}.weight"] = (num_out, num_in)
            if site in biased:
                shapes[f"{prefix}{MODULE_PATHS[site]}.bias"] = (num_out,)
        if arch.qk_norm:
            shapes[prefix + "self_attn.q_norm.weight"] = (arch.head_dim,)
            shapes[prefix + "self_attn.k_norm.weight"] = (arch.head_dim,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not arch.tie_word_embeddings:
        shapes[HEAD] = (arch.vocab_size, hidden)
    return shapes


def parameter_name(stored: str) -> str:
    """The name in a causal language model of a tensor that was stored from it or from its bare decoder: transformers takes
    names with and without `model.` in front for the same."""
    if stored.startswith(("model.model.", "model.lm_head.")):
        return stored.removeprefix("model.")
    return stored if stored.startswith(("model.", "lm_head.")) else f"model.{stored}"


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor lies, under which name, and what its header says."""

    path: Path
    stored: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * FLOAT_BYTES[self.dtype]


class Checkpoint:
    """A checked directory of safetensors, single or sharded. Tensors have the names of a causal language model, whatever
    prefix they are stored under.

    Files are opened for one read at a time, so an instance holds no handles and may cross threads and forks.
    """

    def __init__(self, directory: Path) -> None:
        """Read config.json and the headers, and check every tensor.

        Raises NotFound without the directory or config.json, ConfigError for an architecture that is not supported,
        InvalidRequest for pickled, quantised, truncated, missing or misshapen weights. Warns of tensors that are left over,
        and where a head of its own unties the embeddings, as transformers does then.
        """
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise NotFound(f"model directory {self.directory} does not exist")
        _refuse_quantised(read_json(self.directory / "config.json"), self.directory)
        self.architecture = read_architecture(self.directory)
        self._entries = _by_parameter(_read_headers(self.directory))
        self._settle_head()
        self._shapes = expected_shapes(self.architecture)
        self._verify()

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that the decoder reads, as stored."""
        return sum(self._entries[name].num_bytes for name in self._shapes)

    def has(self, name: str) -> bool:
        """Whether the files hold this tensor; lm_head.weight is usually absent when embeddings are tied."""
        return name in self._entries

    def read(
        self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu", part: tuple[slice, ...] = ()
    ) -> Tensor:
        """One tensor, or a part of it, copied out of its file, contiguous, in `dtype` on `device`.

        Raises NotFound for a name the files do not hold, InvalidRequest where the file has become unreadable.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise NotFound(f"{self.directory} has no tensor {name!r}")
        try:
            with safe_open(entry.path, framework="pt", device="cpu") as file:
                # A copy: what safetensors returns is a map of the file, possibly unaligned.
                found = file.get_slice(entry.stored)[part] if part else file.get_tensor(entry.stored)
                return found.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format).to(device)
        except (OSError, SafetensorError) as error:
            raise _unreadable(entry.path, error) from error

    def row_magnitudes(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """None: `read` gives whole rows."""
        return None

    def _verify(self) -> None:
        """Check names, shapes and dtypes against the architecture."""
        if not self._entries.keys() & self._shapes.keys():
            stored = min((entry.stored for entry in self._entries.values()), default="nothing")
            raise InvalidRequest(f"{self.directory}: no tensor has the name of one in a {self.architecture.model_type} model, "
                                 f"such as {EMBEDDING}; the files hold {stored}")
        for name, shape in self._shapes.items():
            entry = self._entries.get(name)
            if entry is None:
                raise InvalidRequest(f"{self.directory}: tensor {name} is missing (expected shape {list(shape)})")
            if entry.shape != shape:
                raise InvalidRequest(
                    f"{entry.path}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
            if entry.dtype not in FLOAT_BYTES:
                raise InvalidRequest(
                    f"{entry.path}: tensor {name} is stored as {entry.dtype}; supported are {', '.join(FLOAT_BYTES)}")
        layers = tuple(f"model.layers.{layer}." for layer in range(self.architecture.num_layers))
        left_over = []
        for name, entry in self._entries.items():
            if name in self._shapes or name == HEAD or ".rotary_emb." in name:
                continue
            if name.startswith(layers):
                raise InvalidRequest(
                    f"{entry.path}: tensor {name} has no place in a {self.architecture.model_type} decoder with this "
                    "config.json; ignoring it would change the model")
            left_over.append(entry.stored)
        if left_over:
            warnings.warn(_left_over(self.directory, left_over, self.architecture.num_layers), stacklevel=3)

    def _settle_head(self) -> None:
        """A tied head may be stored instead of the embeddings; one that differs from them is not tied: transformers' rules."""
        if not self.architecture.tie_word_embeddings or not self.has(HEAD):
            return
        if not self.has(EMBEDDING):
            self._entries[EMBEDDING] = self._entries[HEAD]
            return
        head, embedding = self._entries[HEAD], self._entries[EMBEDDING]
        if head.dtype not in FLOAT_BYTES or embedding.dtype not in FLOAT_BYTES or head.shape != embedding.shape:
            same = False
        else:
            same = torch.equal(self.read(EMBEDDING, torch.float32), self.read(HEAD, torch.float32))
        if not same:
            self.architecture = replace(self.architecture, tie_word_embeddings=False)
            warnings.warn(
                f"{self.directory}: {HEAD} differs from {EMBEDDING}, though config.json ties them; the stored head is used, as "
                "transformers does. Set tie_word_embeddings to false", stacklevel=3)


def _by_parameter(stored: Mapping[str, _Entry]) -> dict[str, _Entry]:
    """Tensors by the names of a causal language model. Raises InvalidRequest where two have one name."""
    found: dict[str, _Entry] = {}
    for name, entry in stored.items():
        parameter = parameter_name(name)
        if parameter in found:
            raise InvalidRequest(f"{entry.path}: tensors {found[parameter].stored} and {name} are the same parameter")
        found[parameter] = entry
    return found


def _left_over(directory: Path, names: list[str], num_layers: int) -> str:
    """Names tensors that nothing reads, and the reason that is meant by layers among them."""
    shown = ", ".join(sorted(names)[:4])
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    beyond = any(parameter_name(name).startswith("model.layers.") for name in names)
    why = f"; num_hidden_layers is {num_layers}, so the model is cut short" if beyond else ""
    return f"{directory}: tensors in the checkpoint that this model does not have are ignored: {shown}{more}{why}"


def _refuse_quantised(raw: Mapping[str, Any], directory: Path) -> None:
    for field in ("quantization_config", "quantization", "compression_config"):  # the second is MLX's
        quantisation = raw.get(field)
        if quantisation:
            method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else "unknown"
            raise InvalidRequest(
                f"{directory} holds a quantised checkpoint ({field}, method {method}); use the original bfloat16 or float32 "
                "weights")


def _unreadable(path: Path, error: Exception) -> InvalidRequest:
    return InvalidRequest(f"{path} is not a readable safetensors file (truncated, corrupt or a Git LFS pointer): "
                          f"{one_line(error)}")


def _read_headers(directory: Path) -> dict[str, _Entry]:
    """Every tensor in the directory's weight files, from their headers alone."""
    entries: dict[str, _Entry] = {}
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.exists():
        return _read_header(single)
    if not index.exists():
        raise _no_weights(directory)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InvalidRequest(f"{index} must map tensor names to files under weight_map")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise InvalidRequest(f"{index}: {file!r} is not the name of a file beside it")
        if not (directory / file).exists():
            raise InvalidRequest(f"{index} names {file}, which is missing from the directory")
        entries.update(_read_header(directory / file))
    absent = next((name for name in weight_map if name not in entries), None)
    if absent is not None:
        raise InvalidRequest(f"{directory / weight_map[absent]}: tensor {absent} is missing, though {INDEX_FILE} "
                             "says it is there")
    return entries


def _read_header(path: Path) -> dict[str, _Entry]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: _Entry(path, name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def _no_weights(directory: Path) -> InvalidRequest | NotFound:
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickles:
        return InvalidRequest(
            f"{directory} has only pickled weights ({pickles[0]}), which can run code when loaded; convert them to "
            "safetensors with transformers' from_pretrained and save_pretrained")
    return NotFound(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}")
