"""How much memory a model's weights take, how much there is, and whether that allows packed copies of them."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import torch

from coserve.config.values import Quantization
from coserve.model.architecture import Architecture
from coserve.model.checkpoint import expected_shapes
from coserve.model.decoder import linear_shapes
from coserve.model.fp8 import largest_elements, linear_bytes
from coserve.model.linear import PackedHead, can_pack
from coserve.model.weights import ModelWeights

POOL_SHARE = 0.4
"""Share of the free memory that an engine's pool takes if nothing is said."""

COPIES_SHARE = 0.5
"""Share of the memory beside an engine's pool that packed copies of weights may take; workspaces and adapters need some too."""

GIB = 1 << 30

SLOWER = "products are slower that way, finetuning's above all"
"""What is said of weights that are held once."""


def weight_bytes(arch: Architecture, itemsize: int, quantization: Quantization = "none") -> int:
    """Bytes of the backbone's weights. itemsize: of what is not quantized. Quantized weights count with the largest matrix in
    the model's dtype, which they are decoded into; on a CPU it is a part of that."""
    whole = itemsize * sum(math.prod(shape) for shape in expected_shapes(arch).values())
    return whole - linear_bytes(arch, itemsize, "none") + linear_bytes(arch, itemsize, quantization)


def packed_bytes(arch: Architecture, itemsize: int, *, training: bool = True, quantization: Quantization = "none") -> int:
    """Bytes that the packed layout (model/linear.py) adds: the head, and in training the linears' transposes and the head's.
    Quantized linears have none."""
    head = arch.vocab_size * arch.hidden_size
    linears = arch.num_layers * sum(math.prod(shape) for shape in linear_shapes(arch).values()) if quantization == "none" else 0
    return itemsize * (linears + 2 * head if training else head)


def unpacked_bytes(arch: Architecture, itemsize: int) -> int:
    """Bytes of the largest matrix that is unpacked for a product where each is held once, packed: in float32."""
    return 0 if itemsize < 4 else itemsize * largest_elements(arch)


def settle_copies(weights: ModelWeights, free: int | None, *, training: bool) -> str | None:
    """Decides by free memory whether the weights may have more than one copy of each matrix.

    free: bytes that are not spoken for otherwise, None if that can't be told; training: whether backward will run. Returns a
    line for the log, None for weights that are not packed.
    """
    if not isinstance(weights.head, PackedHead):
        return None
    needed = packed_bytes(
        weights.architecture, weights.dtype.itemsize, training=training, quantization=weights.quantization
    )
    room = math.inf if free is None else COPIES_SHARE * free + weights.copied_bytes
    weights.hold_one_copy(needed > room)
    if needed <= room:
        return f"packed copies of the weights: up to {needed / GIB:.2f} GiB more"
    return (
        f"each weight matrix is held once: packed copies would take {needed / GIB:.2f} GiB more, and {room / GIB:.2f} GiB are "
        f"free for them; {SLOWER}"
    )


def one_copy_to_load(
    arch: Architecture, dtype: torch.dtype, device: torch.device, size: int = 1, quantization: Quantization = "none"
) -> bool:
    """Whether weights that are about to be loaded should be held once. This is a guess from free memory and the default size of
    an engine's pool; `settle_copies` decides later. arch, size: of one rank, and how many there are."""
    available = available_to_each(device, size)
    if available is None or not can_pack(dtype, device):
        return False
    free = available - weight_bytes(arch, dtype.itemsize, quantization)
    return packed_bytes(arch, dtype.itemsize, quantization=quantization) > COPIES_SHARE * (1 - POOL_SHARE) * free


def device_bytes(device: torch.device) -> int:
    """All memory of the device, taken or not."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on the device; None where it can't be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _host_available(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def gpu_bytes(device: torch.device, size: int) -> list[tuple[int, int]]:
    """(free, all) bytes of each GPU that `size` ranks have. device: the first one's."""
    return [torch.cuda.mem_get_info(device if size == 1 else number) for number in range(size)]


def available_to_each(device: torch.device, size: int) -> int | None:
    """Bytes that each of `size` ranks may take: of the fullest GPU, or a share of the host's. None where it can't be told."""
    if device.type == "cuda":
        return min(free for free, _ in gpu_bytes(device, size))
    available = available_bytes(device)
    return None if available is None else available // size


def _host_available(meminfo: Path, cgroup: Path) -> int | None:
    """The lesser of the host's MemAvailable and what the control group's limit leaves; file cache counts as free."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    try:
        limit, used = ((cgroup / name).read_text().strip() for name in ("memory.max", "memory.current"))
        left = int(limit) - int(used)
    except (OSError, ValueError):
        return free
    with contextlib.suppress(OSError, ValueError):
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        left += int(stat.get("inactive_file", 0))
    return left if free is None else min(free, left)
