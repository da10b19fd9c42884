"""Kernels over the rows of a pass on a CPU, in C++ and compiled where they run: one call where tensor operations would be many.

Owns: the guard around a compiler that may not be there, and the calls. `kernels_for` is None for what is not on a CPU, for
other dtypes than float32 and bfloat16, without a compiler, and with COSERVE_NATIVE=0; library calls do the work then.

T rows, H query heads, G key-value heads, K head width. Features of a row lie side by side in memory; rows may lie apart.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coserve.kernels.native.build import BuildError, built_library, library_name

_MOST_WIDTH = 512
"""Widest head that attention has room for (rows.cpp)."""
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_POINTERS_AND_SIZES = {
    "rmsnorm": (3, 5, 1), "rope": (4, 5, 1), "silu_mul": (3, 5, 0), "add": (3, 5, 0), "write_cache": (5, 5, 0),
    "paged_attention": (6, 11, 1), "decode_e4m3": (3, 4, 0),
}
"""Of each function in rows.cpp: pointers, then sizes and strides, then factors."""


class Compiled(NamedTuple):
    """kernels: by dtype, none where there is no library. note: a line for a log. identity: what differs between libraries whose
    results may differ in their last bits; None where there is none."""

    kernels: dict[torch.dtype, RowKernels]
    note: str
    identity: str | None = None


class RowKernels:
    """The kernels of one element type. Arguments are checked by nobody: they are what the runtime's tensors are."""

    def __init__(self, path: Path, name: str) -> None:
        short = ctypes.PyDLL(str(path))  # keeps Python's lock, which can cost a wait to get back
        long = ctypes.CDLL(str(path))  # gives it to other threads meanwhile

        def function(kernel: str, library: ctypes.CDLL = short) -> Any:
            pointers, sizes, factors = _POINTERS_AND_SIZES[kernel]
            found = getattr(library, f"{kernel}_{name}")
            found.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * sizes + [ctypes.c_float] * factors
            found.restype = None
            return found

        self._rmsnorm, self._rope, self._silu_mul = function("rmsnorm"), function("rope"), function("silu_mul")
        self._add = function("add")
        self._write_cache, self._paged_attention = function("write_cache"), function("paged_attention")
        self._long_attention = function("paged_attention", long)
        self._decode_e4m3 = function("decode_e4m3", long)

    def rmsnorm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        """As `library.rmsnorm`."""
        rows, features = x.shape
        width = weight.shape[0]
        self._rmsnorm(
            out.data_ptr(), x.data_ptr(), weight.data_ptr(), rows, features // width, width, out.stride(0), x.stride(0), eps
        )

    def rope(self, out: Tensor, x: Tensor, cos_TK: Tensor, sin_TK: Tensor, sign: float) -> None:
        """As `library.rope`; sign: -1 for its inverse."""
        (rows, features), width = x.shape, cos_TK.shape[1]
        self._rope(
            out.data_ptr(), x.data_ptr(), cos_TK.data_ptr(), sin_TK.data_ptr(), rows, features // width, width,
            out.stride(0), x.stride(0), sign,
        )

    def silu_mul(self, out: Tensor, gate: Tensor, up: Tensor) -> None:
        """As `library.silu_mul`."""
        rows, width = out.shape
        self._silu_mul(
            out.data_ptr(), gate.data_ptr(), up.data_ptr(), rows, width, out.stride(0), gate.stride(0), up.stride(0)
        )

    def add(self, out: Tensor, x: Tensor, y: Tensor) -> None:
        """As `library.add`."""
        rows, width = out.shape
        self._add(out.data_ptr(), x.data_ptr(), y.data_ptr(), rows, width, out.stride(0), x.stride(0), y.stride(0))

    def decode_e4m3(self, out: Tensor, bits: Tensor, scales: Tensor) -> None:
        """As `float8.decode_rows`."""
        rows, width = out.shape
        self._decode_e4m3(
            out.data_ptr(), bits.data_ptr(), scales.data_ptr(), rows, width, out.stride(0), bits.stride(0)
        )

    def write_cache(self, keys: Tensor, values: Tensor, heads_TG: Tensor, k: Tensor, v: Tensor, width: int) -> None:
        """Stores k and v [T, G * K]. keys, values: a layer's memory; heads_TG: int64 [T * G], where each head goes, in units of
        K elements."""
        rows, features = k.shape
        self._write_cache(
            keys.data_ptr(), values.data_ptr(), heads_TG.data_ptr(), k.data_ptr(), v.data_ptr(), rows, features // width, width,
            k.stride(0), v.stride(0),
        )

    def paged_attention(
        self, out: Tensor, q: Tensor, cache: Tensor, *, layer: int, num_layers: int, kv_heads: int, block_tokens: int,
        tables_BN: Tensor, context_B: Tensor, starts: Tensor, window: int | None, scale: float,
    ) -> None:
        """Causal attention of each sequence's last rows over its cached context, of which the last row's token is the last.

        out, q: [T, H * K]; sequence b has rows starts[b] to starts[b + 1]. starts: int32 [B + 1], ascending from 0; context_B:
        int32, each sequence's tokens; 0 gives zeros. cache, tables_BN, window: as in Triton's `paged_decode_attention`.
        Accumulates in float32. A row's result is the same bits in every batch.
        """
        features, width, layer_elements = q.shape[1], cache.shape[1] // block_tokens, kv_heads * cache.shape[1]
        attend = self._long_attention if q.shape[0] > tables_BN.shape[0] else self._paged_attention  # prompts may take seconds
        attend(
            out.data_ptr(), q.data_ptr(), cache.data_ptr() + 2 * layer * layer_elements * cache.element_size(),
            tables_BN.data_ptr(), context_B.data_ptr(), starts.data_ptr(), tables_BN.shape[0], kv_heads,
            features // (kv_heads * width), width, out.stride(0), q.stride(0), tables_BN.stride(0), block_tokens,
            2 * num_layers * layer_elements, layer_elements, window or 0, scale,
        )


@functools.cache
def compiled_kernels() -> Compiled:
    """The kernels and what to say of them. The first call on a machine compiles them, which takes some seconds."""
    if os.environ.get("COSERVE_NATIVE") == "0":
        return Compiled({}, "compiled kernels are off (COSERVE_NATIVE=0): decoding takes longer")
    started = time.perf_counter()
    try:
        path = built_library()
        try:
            kernels = _load(path)
        except OSError:  # made on another system
            path = built_library(anew=True)
            kernels = _load(path)
    except (BuildError, OSError) as error:
        return Compiled({}, f"no compiled kernels, decoding takes longer: {error}")
    return Compiled(kernels, f"compiled kernels, ready in {time.perf_counter() - started:.1f} s", library_name())


def _load(path: Path) -> dict[torch.dtype, RowKernels]:
    kernels = {dtype: RowKernels(path, name) for dtype, name in _NAMES.items()}
    teams = {name for line in _mapped() if (name := Path(line.split()[-1]).name).startswith(("libgomp", "libomp", "libiomp"))}
    if len(teams) > 1:
        raise BuildError(f"this PyTorch would need another OpenMP library than g++ ({' and '.join(sorted(teams))})")
    return kernels


def _mapped() -> list[str]:
    """The files in the process's memory, one per line."""
    with contextlib.suppress(OSError):
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
    return []


def compiles_for(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for this dtype on this device, given a compiler."""
    return device.type == "cpu" and dtype in _NAMES


def kernels_for(x: Tensor) -> RowKernels | None:
    """The kernels that rows like `x` can have."""
    return compiled_kernels().kernels.get(x.dtype) if x.is_cpu else None


def kernels_identity(x: Tensor) -> str | None:
    """Which kernels rows like `x` have: what has to be the same for the same bits. None for the library's calls."""
    return None if kernels_for(x) is None else compiled_kernels().identity


def paged_attention_for(cache_rows: Tensor, block_tokens: int) -> Callable[..., None] | None:
    """`RowKernels.paged_attention` for a cache [rows, block_tokens * K], or None where it has no room for such heads."""
    compiled = kernels_for(cache_rows)
    return None if compiled is None or cache_rows.shape[1] > _MOST_WIDTH * block_tokens else compiled.paged_attention
