"""GGUF files (llama.cpp's format) turned into Hugging Face directories.

Owns: the metadata and tensor names of the GGUF architectures llama, qwen2 and qwen3, dequantisation to plain
floats, and the atomic write of a directory that transformers loads. Does not own: tokens (ggufvocab.py), where converted
models are kept (locate.py). Source: gguf-py's constants and llama.cpp's convert_hf_to_gguf.py, undone.

transformers reads GGUF files too, and gives the same weights. But it holds the whole model in float32, where this holds one
file of SHARD_BYTES. And its tokenizer ignores how the file says that text is split: a tenth of random texts get other tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coserve.core import ConfigError, InvalidRequest, NotFound, one_line
from coserve.durable import write_directory
from coserve.model.architecture import Architecture, read_architecture
from coserve.model.checkpoint import INDEX_FILE, SINGLE_FILE, expected_shapes
from coserve.model.ggufvocab import GGUFVocabulary, write_tokenizer

SHARD_BYTES = 2 << 30
"""Weights are written in files of at most this size (unless one tensor is larger), so that few are in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFamily:
    """How one GGUF architecture differs from Hugging Face's model type of the same name."""

    permuted: bool
    """llama.cpp stores the rows of q and k with the two halves of each head interleaved."""
    optional_bias: bool
    """Biases of the attention are stated by the presence of their tensors, not implied by the family."""


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily(permuted=True, optional_bias=True),
    "qwen2": GgufFamily(permuted=False, optional_bias=False),
    "qwen3": GgufFamily(permuted=False, optional_bias=True),
}

CONFIG_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
"""Hugging Face config fields that are one required integer in the metadata, under the architecture's prefix."""

REFUSED_KEYS = (
    "expert_count", "attention.scale", "attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping",
    "logit_scale", "embedding_scale", "residual_scale",
)
"""Metadata that changes what a decoder computes in ways that these families do not have; 0 means absent."""

YARN_KEYS: Mapping[str, str] = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


class GgufFile:
    """An opened GGUF file: metadata by key and tensors by GGUF name. Data stays on disk until read."""

    def __init__(self, path: Path) -> None:
        """Parse the header. Raises NotFound without the file, InvalidRequest for a broken file, one part of a
        split file or an architecture that is not supported."""
        if not path.is_file():
            raise NotFound(f"{path} does not exist")
        self.path = path
        self._reader = _open_reader(path)
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.get("general.architecture"))
        if self.architecture not in GGUF_FAMILIES:
            raise InvalidRequest(f"{path}: GGUF architecture {self.architecture!r} is not supported; known are "
                                 f"{', '.join(GGUF_FAMILIES)}")
        self.family = GGUF_FAMILIES[self.architecture]
        if self.get("split.count") not in (None, 0, 1):
            raise InvalidRequest(f"{path} is one part of a split GGUF file; merge the parts with llama-gguf-split")

    def get(self, key: str) -> Any:
        """The value of a whole metadata key, None where the file has no such key."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except ValueError as error:
            raise InvalidRequest(f"{self.path}: {key} is not readable: {one_line(error)}") from error

    def setting(self, key: str) -> Any:
        """The value of a key under the architecture's prefix, or None."""
        return self.get(f"{self.architecture}.{key}")

    def vocabulary(self) -> GGUFVocabulary:
        """Tokens and what is said of them. Raises InvalidRequest."""
        return GGUFVocabulary(self.get, list(self._reader.fields), self.path)

    def read(self, name: str) -> np.ndarray:
        """A tensor as float32 [rows, columns], dequantised where the file stores blocks."""
        import gguf

        tensor = self.tensors[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InvalidRequest(f"{self.path}: tensor {name} of type {tensor.tensor_type.name} cannot be "
                                 f"dequantised: {one_line(error)}") from error
        return np.require(values, dtype=np.float32, requirements=["C", "W"])


def _open_reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise ConfigError("reading GGUF files needs the gguf package: pip install gguf") from None

    class BoundedReader(gguf.GGUFReader):
        """Refuses what lies past the end of the file, which the base class cuts short and may loop on."""

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if offset + np.dtype(dtype).itemsize * int(count) > self.data.nbytes:
                raise ValueError(f"it ends at byte {self.data.nbytes}")
            return super()._get(offset, dtype, count, override_order)

    try:
        return BoundedReader(path)
    except (ArithmeticError, LookupError, MemoryError, OSError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{path} is not a readable GGUF file (truncated or corrupt): {one_line(error)}"
                             ) from error


def gguf_names(shapes: Mapping[str, object], num_layers: int) -> dict[str, str]:
    """GGUF's names of Hugging Face parameters: blk.3.ffn_up.weight of model.layers.3.mlp.up_proj.weight."""
    import gguf

    known: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, num_layers)  # the other families' names are among its
    return {name: known.get_name(name, try_suffixes=(".weight", ".bias")) for name in shapes}


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of the rows [num_heads * K, ...] of q or k: its order is that of rotating
    neighbouring features, Hugging Face rotates feature i with feature i + K / 2."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read_config(file: GgufFile) -> dict[str, Any]:
    """Hugging Face config fields of a GGUF file. Raises InvalidRequest naming the key at fault."""
    for key in REFUSED_KEYS:
        if file.setting(key):
            raise InvalidRequest(f"{file.path}: {key} = {file.setting(key)} is not supported")
    settings: dict[str, Any] = {name: _integer(file, key) for name, key in CONFIG_KEYS.items()}
    heads = settings["num_attention_heads"]
    key_length = _integer(file, "attention.key_length", settings["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.setting(key) not in (None, key_length):
            raise InvalidRequest(f"{file.path}: {key} is {file.setting(key)}, but a head has {key_length} features")
    if "token_embd.weight" not in file.tensors:
        raise InvalidRequest(f"{file.path}: tensor token_embd.weight is missing")
    window = file.setting("attention.sliding_window")
    if window and file.architecture != "llama":
        raise InvalidRequest(f"{file.path}: attention.sliding_window is not supported for {file.architecture}")
    model_type = "mistral" if window else file.architecture
    settings.update(
        vocab_size=int(file.tensors["token_embd.weight"].shape[-1]),
        head_dim=key_length,
        num_key_value_heads=_integer(file, "attention.head_count_kv", heads),
        rms_norm_eps=_float32(file, "attention.layer_norm_rms_epsilon", 1e-6),
        tie_word_embeddings="output.weight" not in file.tensors,
        rope_parameters=_rope_parameters(file, key_length),
        model_type=model_type,
        architectures=[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]],
        **_special_ids(file),
    )
    if file.family.optional_bias:
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return settings if not window else {**settings, "sliding_window": window}


def convert_gguf(path: Path, target_dir: Path) -> Path:
    """Writes a GGUF model as a Hugging Face directory (weights, config, generation config, tokenizer, chat template).

    Weights are float32, which holds dequantised values exactly. Returns target_dir, which appears whole or not at all. One that
    is there already, also made by another process meanwhile, is left as it is. Raises NotFound, InvalidRequest and ConfigError.
    """
    if target_dir.exists():
        return target_dir
    file = GgufFile(path)

    def fill(directory: Path) -> None:
        _write_model(file, directory)
        write_tokenizer(file.vocabulary(), file.get("tokenizer.chat_template"), directory)

    write_directory(target_dir, fill, cached=True)
    return target_dir


def _write_model(file: GgufFile, directory: Path) -> None:
    """config.json, generation_config.json and the weights."""
    settings = {**read_config(file), "dtype": "float32"}
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except Exception as error:  # transformers and huggingface_hub raise many unrelated types here
        raise InvalidRequest(f"{file.path}: {one_line(error)}") from error
    config.save_pretrained(directory)
    if special := _special_ids(file):
        GenerationConfig(**special).save_pretrained(directory)
    architecture = read_architecture(directory)
    shapes = expected_shapes(architecture)
    names = gguf_names(shapes, architecture.num_layers)
    _check_tensors(file, shapes, names)
    shards = _plan_shards(shapes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        target = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _read_weight(file, name, names[name], architecture) for name in shard}
        save_file(tensors, directory / target, metadata={"format": "pt"})
        (directory / target).chmod((directory / "config.json").stat().st_mode)  # safetensors writes for the owner only
        weight_map.update(dict.fromkeys(shard, target))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_num_bytes, shapes.values()))}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _check_tensors(file: GgufFile, shapes: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> None:
    """Every expected tensor is there with its shape, and no other would be dropped."""
    for name, shape in shapes.items():
        tensor = file.tensors.get(names[name])
        if tensor is None:
            raise InvalidRequest(f"{file.path}: tensor {names[name]} is missing (expected shape {list(shape)})")
        found = [int(size) for size in reversed(tensor.shape)]
        if found != list(shape):
            raise InvalidRequest(f"{file.path}: tensor {tensor.name} has shape {found}, expected {list(shape)}")
    unknown = file.tensors.keys() - {*names.values()} - {"rope_freqs.weight"}
    if unknown:
        raise InvalidRequest(f"{file.path}: tensor {min(unknown)} has no place in a {file.architecture} decoder")


def _plan_shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """Names in order, cut so that no shard exceeds SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        used += _num_bytes(shape)
        if shards[-1] and used > SHARD_BYTES:
            shards.append([])
            used = _num_bytes(shape)
        shards[-1].append(name)
    return shards


def _num_bytes(shape: tuple[int, ...]) -> int:
    """Of a tensor in float32."""
    return 4 * math.prod(shape)


def _read_weight(file: GgufFile, name: str, gguf_name: str, architecture: Architecture) -> Tensor:
    """A parameter by its Hugging Face name and GGUF's, float32, rows in Hugging Face's order."""
    values = file.read(gguf_name)
    if file.family.permuted and ".self_attn.q_proj." in name:
        values = unpermute(values, architecture.num_heads)
    if file.family.permuted and ".self_attn.k_proj." in name:
        values = unpermute(values, architecture.num_kv_heads)
    return torch.from_numpy(values)


def _integer(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.setting(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{file.path}: {file.architecture}.{key} must be a positive integer, got {value!r}")
    return value


def _float32(file: GgufFile, key: str, default: float | None = None) -> float:
    """The shortest decimal that is the float32 in the file: the number that the model's authors wrote."""
    value = file.setting(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int | float) or not np.isfinite(value) or value <= 0:
        raise InvalidRequest(f"{file.path}: {file.architecture}.{key} must be a positive number, got {value!r}")
    return float(str(np.float32(value)))


def _special_ids(file: GgufFile) -> dict[str, Any]:
    """bos, eos and pad ids; end of turn and end of message also end a generation."""
    special = file.vocabulary().special_ids()
    ends = list(dict.fromkeys(special[name] for name in ("eos", "eot", "eom") if name in special))
    ids = {"bos_token_id": special.get("bos"), "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None),
           "pad_token_id": special.get("padding")}
    return {name: value for name, value in ids.items() if value is not None}


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """transformers' rope_parameters, from the scaling keys and from rope_freqs.weight (Llama 3.1 and later)."""
    theta = _float32(file, "rope.freq_base", 10000.0)
    kind = file.setting("rope.scaling.type") or "none"
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise InvalidRequest(f"{file.path}: rope_freqs.weight together with {kind} scaling is not supported")
        return _llama3_parameters(file, theta, head_dim)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _float32(file, "rope.scaling.factor")}
    for key in ("attn_factor", "yarn_ext_factor", "yarn_attn_factor", "yarn_log_multiplier"):
        if file.setting(f"rope.scaling.{key}") is not None:
            raise InvalidRequest(f"{file.path}: rope.scaling.{key} is not supported")
    if kind != "yarn":
        raise InvalidRequest(f"{file.path}: rope.scaling.type {kind!r} is not supported; known are linear and yarn")
    stated = {name: file.setting(key) for name, key in YARN_KEYS.items()}
    return {"rope_type": "yarn", "rope_theta": theta, **{key: val for key, val in stated.items() if val is not None}}


def _llama3_parameters(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The Llama 3.1 parameters whose factors [head_dim / 2] are those in the file: all published models share the
    constants below and differ in `factor`. Raises InvalidRequest where the factors are others."""
    low, high, context = 1.0, 4.0, 8192
    found = file.read("rope_freqs.weight").reshape(-1)
    factor = float(found.max())
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    smooth = np.clip((context * inv_freq / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - smooth) / factor + smooth)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
        raise InvalidRequest(f"{file.path}: the rotary factors in rope_freqs.weight are not those of Llama 3.1; they "
                             "cannot be written as a Hugging Face config")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low,
            "high_freq_factor": high, "original_max_position_embeddings": context}
