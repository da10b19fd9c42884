"""Kernels that no library call gives, in Triton: decode attention over the paged cache, products of many adapters, sampling,
and the loss head's rows.

Owns: the guard around an optional package. Every module here imports without Triton; its kernels are then plain functions that
nothing may call, and `available()` says so. With TRITON_INTERPRET=1, set before Triton is first imported, they run on CPU
tensors, which is how their tests run without a device. Not yet run on a device: none was there when they were written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

try:
    import triton
except ImportError:
    triton = None


def available() -> bool:
    """Whether Triton is installed. Whether there is a device for it is the caller's question."""
    return triton is not None


def jit(*, unspecialized: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: `triton.jit`, or the bare function where there is no Triton.

    unspecialized: integers and addresses that change from call to call. Triton would compile anew for 1 and
    for multiples of 16.
    """

    def decorate(kernel: Callable[..., Any]) -> Any:
        return kernel if triton is None else triton.jit(kernel, do_not_specialize=list(unspecialized))

    return decorate


def next_power(n: int) -> int:
    """The least power of two that is n or more: Triton's tiles have no other sizes."""
    return 1 << (n - 1).bit_length()


def require_aligned(*tensors: Tensor) -> None:
    """Asserts that rows begin at multiples of 16 bytes, as a device's allocations do. For other rows Triton compiles a
    kernel anew, which loads an element at a time and keeps in memory what belongs in registers."""
    for tensor in tensors:
        size, start, stride = tensor.element_size(), tensor.storage_offset(), tensor.stride(0)
        assert start * size % 16 == 0 == stride * size % 16, f"rows of {stride} elements from {start} on: not at 16 bytes each"
