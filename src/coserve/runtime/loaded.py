"""A model by its name: found on disk, then ready to work with weights on a device, tokenizer and executor."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from coserve.config.values import AUTO, Quantization, read_quantization, require
from coserve.core import ConfigError
from coserve.kernels.processor import bfloat16_products, bfloat16_speed
from coserve.model.architecture import Architecture
from coserve.model.checkpoint import Checkpoint
from coserve.model.decoder import rank_architecture
from coserve.model.locate import DEFAULT_MODEL, locate_model
from coserve.model.memory import device_bytes, one_copy_to_load, weight_bytes
from coserve.model.weights import ModelWeights, load_weights
from coserve.parallel import ALONE, Ranks
from coserve.peft.adapter import Adapter
from coserve.peft.format import bind_adapter
from coserve.peft.gate import Base, read_adapter
from coserve.runtime.executor import Executor
from coserve.runtime.ranks import RankProcesses, require_devices, sharing_note
from coserve.text.tokenizer import ChatTokenizer

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
FLOAT32_SHARE = 0.5
"""'auto' is float32 only where the weights take at most this share of the machine's memory."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name that settings have for it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model whose files are known, and where and in what its weights would be. name: as the user gave it; fingerprint:
    identifies the base in adapters and checkpoints; quantization: of the decoder layers' linears."""

    name: str
    checkpoint: Checkpoint
    fingerprint: str
    tokenizer: ChatTokenizer
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "none"

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def architecture(self) -> Architecture:
        return self.checkpoint.architecture

    def load(self, one_copy: bool | None = None, processes: RankProcesses | None = None) -> LoadedModel:
        """Reads the weights. one_copy: as for `load_model`. processes: ranks that share the model; each reads its part. Raises
        InvalidRequest, CapacityError, RankFailed."""
        size = 1 if processes is None else processes.size
        if one_copy is None:
            own = rank_architecture(self.architecture, size)
            one_copy = one_copy_to_load(own, self.dtype, self.device, size, self.quantization)
        if processes is None:
            return self.load_part(ALONE, one_copy)
        place = (str(self.directory), self.device.type, dtype_name(self.dtype), self.quantization)
        with processes.told(_load_part, processes.ranks, *place, one_copy, keeps=True) as keep:
            return keep(self.load_part(processes.ranks, one_copy, processes))

    def load_part(self, ranks: Ranks, one_copy: bool, processes: RankProcesses | None = None) -> LoadedModel:
        """The same for one of several ranks."""
        weights = load_weights(
            self.checkpoint, dtype=self.dtype, device=self.device, one_copy=one_copy, ranks=ranks,
            quantization=self.quantization,
        )
        return LoadedModel(
            self.name, self.directory, self.fingerprint, self.tokenizer, weights, Executor(weights), processes
        )


def _load_part(ranks: Ranks, directory: str, device: str, dtype: str, quantization: str, one_copy: bool) -> LoadedModel:
    return find_model(directory, device=device, dtype=dtype, quantization=quantization).load_part(ranks, one_copy)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedModel:
    """A model with its weights in memory, or this rank's part of them. name, fingerprint: as FoundModel's. processes: of the
    ranks that share it, if there are several and this is the first."""

    name: str
    directory: Path
    fingerprint: str
    tokenizer: ChatTokenizer
    weights: ModelWeights
    executor: Executor
    processes: RankProcesses | None = None

    def close(self) -> None:
        """Ends the processes that share the model, if there are any. Without it they end with this process."""
        if self.processes is not None:
            self.processes.close()

    @property
    def tensor_parallel_size(self) -> int:
        """How many ranks share the model."""
        return self.weights.ranks.size

    @property
    def architecture(self) -> Architecture:
        """Of the model, also where this is one of several ranks that share it."""
        return self.weights.whole_architecture or self.weights.architecture

    @property
    def end_token_ids(self) -> frozenset[int]:
        """The tokens that end an output: those of the model's configurations, and the tokenizer's end of sequence."""
        own = self.tokenizer.eos_token_id
        ids = {*self.architecture.eos_token_ids, *([] if own is None else [own])}
        return frozenset(token for token in ids if 0 <= token < self.architecture.vocab_size)

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.dtype

    @property
    def quantization(self) -> Quantization:
        """Of the decoder layers' linears."""
        return self.weights.quantization

    def load_adapter(self, directory: Path, warn: Callable[[str], None] = _log.warning) -> Adapter:
        """An adapter in PEFT's format for this base. warn: takes what its maker should know; default: the log. Raises NotFound,
        InvalidRequest; ConfigError where several ranks share the model, as each has a part of the adapter too."""
        require(self.tensor_parallel_size == 1, "tensor_parallel_size",
                "several ranks share the model; load the adapter by Engine.load_adapter")
        return bind_adapter(read_adapter(directory, adapter_base(self)), self.weights, warn=warn)


def adapter_base(model: FoundModel | LoadedModel) -> Base:
    """What an adapter must fit to be used on a model."""
    return Base(model.architecture, model.fingerprint, model.dtype, model.tokenizer.knows)


def prepare_cuda() -> None:
    """Settings that every process needs before its first tensor on CUDA: deterministic jobs are possible, products of bfloat16
    are added up in float32, and memory that was given back is not left in pieces."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same setting
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def resolve_device(device: str) -> torch.device:
    """'auto' is CUDA where there is one, which is prepared. Raises ConfigError for a device that is not there."""
    if device not in (AUTO, "cpu", "cuda"):
        raise ConfigError(f"device: must be auto, cpu or cuda, got {device!r}", param="device")
    is_there = device != "cpu" and torch.cuda.is_available()
    if device == "cuda" and not is_there:
        raise ConfigError("device: no CUDA device was found; use --device cpu", param="device")
    if is_there:
        prepare_cuda()
    return torch.device("cuda" if is_there else "cpu")


def check_dtype(dtype: str) -> None:
    """Raises ConfigError for a name that is not known."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ConfigError(f"dtype: must be auto or one of {', '.join(DTYPES)}, got {dtype!r}", param="dtype")


def resolve_dtype(
    dtype: str, device: torch.device, arch: Architecture, report: Callable[[str], None] = lambda _: None,
    quantization: Quantization = "none",
) -> torch.dtype:
    """The dtype of a name that `check_dtype` knows. 'auto' is bfloat16 on CUDA, on a CPU that multiplies it at least as fast as
    float32, and where the model's weights in float32 would take more than FLOAT32_SHARE of the memory. Elsewhere it is float32.
    report: is told what 'auto' has become and why."""
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type != "cpu":
        report("bfloat16: CUDA devices multiply it")
        return torch.bfloat16
    products = bfloat16_products()
    if not products.supported:
        report(f"float32: {products.reason}")
        return torch.float32
    speed = bfloat16_speed()
    if speed >= 1:
        report(f"bfloat16: {products.reason}, {speed:.1f} times as fast as float32")
        return torch.bfloat16
    slow = f"{products.reason}, but at {speed:.1f} times the speed of float32"
    if weight_bytes(arch, torch.float32.itemsize, quantization) > FLOAT32_SHARE * device_bytes(device):
        report(f"bfloat16: {slow}, whose weights would take more than {FLOAT32_SHARE:.0%} of the memory")
        return torch.bfloat16
    report(f"float32: {slow}")
    return torch.float32


def base_fingerprint(checkpoint: Checkpoint) -> str:
    """A short digest of the shapes and of the final norm, whatever dtype or quantization the model runs in."""
    arch = checkpoint.architecture
    norm = checkpoint.read("model.norm.weight", torch.float32, torch.device("cpu"))
    shapes = (arch.model_type, arch.vocab_size, arch.hidden_size, arch.intermediate_size, arch.num_layers, arch.num_heads,
              arch.num_kv_heads, arch.head_dim)
    return hashlib.sha256(repr(shapes).encode() + norm.numpy().tobytes()).hexdigest()[:16]


def find_model(
    name: str | None = None, *, device: str = "auto", dtype: str = "auto", report: Callable[[str], None] = lambda _: None,
    quantization: str = "none",
) -> FoundModel:
    """A model by name, without its weights: as `load_model`."""
    place = resolve_device(device)
    check_dtype(dtype)
    coded = read_quantization(quantization)
    checkpoint = Checkpoint(locate_model(name, report=report))
    kind = resolve_dtype(dtype, place, checkpoint.architecture, report, coded)
    tokenizer = ChatTokenizer.load(checkpoint.directory)
    return FoundModel(name or DEFAULT_MODEL, checkpoint, base_fingerprint(checkpoint), tokenizer, place, kind, coded)


def load_model(
    name: str | None = None, *, device: str = "auto", dtype: str = "auto", report: Callable[[str], None] = lambda _: None,
    one_copy: bool | None = None, tensor_parallel_size: int = 1, quantization: str = "none",
) -> LoadedModel:
    """Loads a model by name: None (SmolLM2), a directory, a GGUF file or a hub id. report: progress, a line each. one_copy:
    whether each weight matrix is held once (model/linear.py); None: by the memory that there is. tensor_parallel_size: how many
    processes share the model, each on a GPU of its own or on its share of the cores. They run until the model is closed.
    quantization: "fp8" stores the matrices of the decoder layers in 8-bit floats (model/fp8.py), whatever the dtype of the
    rest. That changes the model a little, and takes half of bfloat16's memory; "none" stores them in the model's dtype.

    Raises NotFound, InvalidRequest, ConfigError, CapacityError, RankFailed.
    """
    found = find_model(name, device=device, dtype=dtype, report=report, quantization=quantization)
    processes = start_ranks(found, tensor_parallel_size, report)
    try:
        return found.load(one_copy, processes)
    except BaseException:
        if processes is not None:
            processes.close(failed=True)
        raise


def start_ranks(found: FoundModel, size: int, report: Callable[[str], None] = lambda _: None) -> RankProcesses | None:
    """The processes of the ranks that share a model; None for one rank. Raises ConfigError for a number that can't share it,
    and RankFailed."""
    check_ranks(found.architecture, size, found.device)
    if size == 1:
        return None
    report(sharing_note(size, found.device))
    return RankProcesses(size, found.device)


def check_ranks(arch: Architecture, size: int, device: torch.device) -> None:
    """Raises ConfigError for a number of ranks that can't share a model on these devices."""
    require(size >= 1, "tensor_parallel_size", f"must be at least 1, got {size}")
    rank_architecture(arch, size)
    require_devices(size, device)
