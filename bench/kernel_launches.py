"""Every Triton kernel, started as a pass of Llama-3.1-8B in bfloat16 starts it, and what its machine code must keep to.

A new kernel needs an example here: the launcher, called on tensors without memory at the model's shapes.

B requests, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from kernel_figures import Bounds, Launch, launches
from torch import Tensor

from coserve.kernels import triton as kernels
from coserve.kernels.triton import paged_decode, segments

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN = 32, 32, 8, 128, 4096
BLOCK_TOKENS = 16


class Example(NamedTuple):
    """launch: calls a launcher. bounds: of each kernel that it starts, by `Launch.name`."""

    launch: Callable[[], None]
    bounds: Mapping[str, Bounds]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def _paged_decode(rows: int = 64, context: int = 8192) -> None:
    """q lies beside k and v; the table names a block per 16 tokens."""
    paged_decode.paged_decode_attention(
        empty(rows, HEADS * WIDTH), empty(rows, (HEADS + 2 * KV_HEADS) * WIDTH)[:, : HEADS * WIDTH],
        empty(4096 * LAYERS * 2 * KV_HEADS, BLOCK_TOKENS * WIDTH), layer=3, num_layers=LAYERS, kv_heads=KV_HEADS,
        block_tokens=BLOCK_TOKENS, tables_BN=empty(rows, context // BLOCK_TOKENS, dtype=torch.int32),
        context_B=empty(rows, dtype=torch.int32), max_context=context, window=None, scale=WIDTH**-0.5,
    )


def _segments(rows: int = 64, slots: int = 100, rank: int = 16) -> None:
    segments.segment_linear(
        empty(rows, rank), empty(rows, HIDDEN), empty(slots, HIDDEN, rank), empty(slots, dtype=torch.int32),
    )


EXAMPLES: dict[str, Example] = {
    "decode attention": Example(_paged_decode, {
        "paged_decode._split_kernel": Bounds(products=True, registers=128),
        "paged_decode._combine_kernel": Bounds(registers=64),
    }),
    "adapters": Example(_segments, {"segments._segment_kernel": Bounds(products=True, registers=128)}),
}


def example_launches(name: str) -> list[Launch]:
    """What an example starts, without running it."""
    with launches() as noted:
        EXAMPLES[name].launch()
    return noted


def package_kernels() -> dict[str, Any]:
    """{`Launch.name`: kernel} of every kernel in `coserve.kernels.triton` that is started by itself, found in its modules."""
    from triton.runtime.jit import JITFunction

    found: dict[str, Any] = {}
    for module in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}."):
        for name, value in inspect.getmembers(importlib.import_module(module.name)):
            if isinstance(value, JITFunction) and value.__module__ == module.name:
                found[f"{module.name.rpartition('.')[2]}.{name}"] = value
    inlined = {id(value.fn.__globals__.get(name)) for value in found.values() for name in value.fn.__code__.co_names}
    return {name: value for name, value in found.items() if id(value) not in inlined}
