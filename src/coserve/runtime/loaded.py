"""A model ready to work: weights on a device, tokenizer, executor."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from coserve.core import ConfigError
from coserve.kernels.processor import bfloat16_products
from coserve.model.architecture import Architecture
from coserve.model.checkpoint import Checkpoint
from coserve.model.locate import DEFAULT_MODEL, locate_model
from coserve.model.memory import one_copy_to_load
from coserve.model.weights import ModelWeights, load_weights
from coserve.peft.adapter import Adapter
from coserve.peft.format import load_adapter
from coserve.runtime.executor import Executor
from coserve.text.tokenizer import ChatTokenizer

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that settings have for it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """name: as the user gave it; fingerprint: identifies the base in adapters and checkpoints."""

    name: str
    directory: Path
    fingerprint: str
    tokenizer: ChatTokenizer
    weights: ModelWeights
    executor: Executor

    @property
    def architecture(self) -> Architecture:
        return self.weights.architecture

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end an output: those of the model's configurations, and the tokenizer's end of sequence."""
        own = self.tokenizer.eos_token_id
        ids = {*self.architecture.eos_token_ids, *([] if own is None else [own])}
        return frozenset(token for token in ids if 0 <= token < self.architecture.vocab_size)

    def load_adapter(self, directory: Path, warn: Callable[[str], None] = _log.warning) -> Adapter:
        """An adapter in PEFT's format for this base. warn: takes what its maker should know; default: the log. Raises NotFound,
        InvalidRequest."""
        knows = self.tokenizer.knows
        return load_adapter(directory, self.weights, fingerprint=self.fingerprint, knows_token=knows, warn=warn)


def resolve_device(device: str) -> torch.device:
    """'auto' is CUDA where there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device: must be auto, cpu or cuda, got {device!r}", param="device")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: no CUDA device was found; use --device cpu", param="device")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device, report: Callable[[str], None] = lambda _: None) -> torch.dtype:
    """'auto' is bfloat16 on CUDA and on a CPU that multiplies it, else float32. report: is told what 'auto' has become and why.
    Raises ConfigError for a name that is not known."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype: must be auto or one of {', '.join(DTYPES)}, got {dtype!r}", param="dtype")
        return DTYPES[dtype]
    if device.type != "cpu":
        report("bfloat16: CUDA devices multiply it")
        return torch.bfloat16
    products = bfloat16_products()
    report(f"{'bfloat16' if products.supported else 'float32'}: {products.reason}")
    return torch.bfloat16 if products.supported else torch.float32


def base_fingerprint(checkpoint: Checkpoint) -> str:
    """A short digest of the shapes and of the final norm, whatever dtype the model runs in."""
    arch = checkpoint.architecture
    norm = checkpoint.read("model.norm.weight", torch.float32, torch.device("cpu"))
    shapes = (arch.model_type, arch.vocab_size, arch.hidden_size, arch.intermediate_size, arch.num_layers, arch.num_heads,
              arch.num_kv_heads, arch.head_dim)
    return hashlib.sha256(repr(shapes).encode() + norm.numpy().tobytes()).hexdigest()[:16]


def load_model(
    name: str | None = None, *, device: str = "auto", dtype: str = "auto", report: Callable[[str], None] = lambda _: None,
    one_copy: bool | None = None,
) -> LoadedModel:
    """Loads a model by name: None (SmolLM2), a directory, a GGUF file or a hub id. report: progress, a line each. one_copy:
    whether each weight matrix is held once (model/linear.py); None: by the memory that there is.

    Raises NotFound, InvalidRequest, ConfigError, CapacityError.
    """
    place = resolve_device(device)
    kind = resolve_dtype(dtype, place, report)
    directory = locate_model(name, report=report)
    checkpoint = Checkpoint(directory)
    tokenizer = ChatTokenizer.load(directory)
    if one_copy is None:
        one_copy = one_copy_to_load(checkpoint.architecture, kind, place)
    weights = load_weights(checkpoint, dtype=kind, device=place, one_copy=one_copy)
    return LoadedModel(
        name or DEFAULT_MODEL, directory, base_fingerprint(checkpoint), tokenizer, weights, Executor(weights)
    )
