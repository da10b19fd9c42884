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
from coserve.kernels.triton import (
    attention_grads,
    copies,
    crossentropy,
    dequantize,
    gather,
    paged_decode,
    rows,
    sampling,
    segments,
)

LAYERS, HEADS, KV_HEADS, WIDTH, HIDDEN, VOCABULARY = 32, 32, 8, 128, 4096, 128_256
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


def _factors(slots: Tensor, shapes: list[tuple[int, int]], slots_held: int, training: bool) -> segments.SlotFactors:
    """Of sites with these (out, in)."""
    return segments.SlotFactors(
        slots, [empty(slots_held, *shape) for shape in shapes], [empty(*shape) if training else None for shape in shapes],
        [1.0] * len(shapes), [None] * len(shapes),
    )


def _adapters(rows: int = 64, slots_held: int = 100, rank: int = 16, training: bool = False) -> None:
    """LoRA of q, k and v; with a training window's rows among them, the products with A are kept."""
    slots, widths = empty(rows, dtype=torch.int32), [HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH]
    packed = empty(rows, sum(widths))
    inner = [empty(rows, rank) for _ in widths]
    segments.segment_pairs(
        packed.split(widths, 1), inner if training else None, empty(rows, HIDDEN),
        _factors(slots, [(rank, HIDDEN)] * 3, slots_held, training),
        _factors(slots, [(width, rank) for width in widths], slots_held, training), accumulate=True,
    )


def _small_unit(rows: int = 512, rank: int = 16) -> None:
    """LoRA of gate and up in a unit: all rows are those of training."""
    slots, gate_up = empty(rows, dtype=torch.int32), empty(rows, 2 * 14336)

    def factors(*shapes: tuple[int, int]) -> segments.SlotFactors:
        count = len(shapes)
        return segments.SlotFactors(
            slots, [None] * count, [empty(*shape) for shape in shapes], [1.0] * count, [None] * count
        )

    segments.segment_pairs(
        gate_up.split(14336, 1), [empty(rows, rank) for _ in range(2)], empty(rows, HIDDEN),
        factors(*[(rank, HIDDEN)] * 2), factors(*[(14336, rank)] * 2), accumulate=True,
    )


def _first_factors(rows: int = 512, rank: int = 16) -> None:
    """Products with A alone, as bypasses that are not LoRA have them."""
    factors = _factors(empty(rows, dtype=torch.int32), [(rank, HIDDEN)], 100, True)
    segments.segment_linear([empty(rows, rank)], empty(rows, HIDDEN), factors, accumulate=False)


def _scalings(rows: int = 64) -> None:
    """IA3 of the MLP."""
    x = empty(rows, 14336)
    segments.segment_scale(x, x, _factors(empty(rows, dtype=torch.int32), [(14336, 1)], 100, False), accumulate=False)


def _loss_head(rows: int = 1024) -> None:
    crossentropy.label_logprobs(
        empty(rows, dtype=torch.float32), empty(rows, dtype=torch.bool), empty(rows, VOCABULARY),
        empty(rows, dtype=torch.int64), probabilities=True,
    )


def _sampling(rows: int = 64) -> None:
    sampling.draw_tokens(empty(rows, VOCABULARY), empty(rows, sampling.NUM_SETTINGS, dtype=torch.int64), filtered=True)


def _row_wise(count: int = 64, inner: int = 14336) -> None:
    """Everything between a layer's products, forward and backward."""
    x, weight, tables = empty(count, HIDDEN), empty(HIDDEN), empty(count, WIDTH)
    packed, gate_up, grad = empty(count, (HEADS + 2 * KV_HEADS) * WIDTH), empty(count, 2 * inner), empty(count, inner)
    q, k, v = packed.split([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH], 1)
    gate, up = gate_up.split(inner, 1)
    cache = empty(4096 * LAYERS * 2 * KV_HEADS * BLOCK_TOKENS, WIDTH)
    rows.rmsnorm(x, x, weight, 1e-5)
    rows.add_rmsnorm(x, x, x, x, weight, 1e-5)
    rows.rmsnorm_dgrad(x, x, x, weight, 1e-5, True)
    rows.rope(q, q, tables, tables, inverse=True, scale=1.0)
    rows.rotary_write(
        q, k, v, tables, tables, 1.0, cache_keys=cache, cache_values=cache,
        token_rows=empty(count * KV_HEADS, dtype=torch.int64), dense=None,
    )
    rows.silu_mul(grad, gate, up)
    rows.silu_mul_dgrad(gate, up, grad, gate, up)
    copies.copy_rows(empty(20, 6, dtype=torch.int64), count)


def _window_grads(count: int = 512, keys: int = 2048) -> None:
    """Gradients of a window's attention, behind the library's backward."""
    packed, tables = empty(count, (HEADS + 2 * KV_HEADS) * WIDTH), empty(count, WIDTH)
    sums = [empty(keys, KV_HEADS * WIDTH, dtype=torch.float32) for _ in range(2)]
    parts = [empty(count, HEADS, WIDTH), empty(keys, KV_HEADS, WIDTH), empty(keys, KV_HEADS, WIDTH)]
    shares = packed.split([HEADS * WIDTH, KV_HEADS * WIDTH, KV_HEADS * WIDTH], 1)
    attention_grads.window_grads(*shares, *sums, parts, tables, tables, 1.0)


def _context(requests: int = 4, tokens: int = 2048) -> None:
    """A prompt's context out of the paged cache."""
    dense = empty(requests * tokens, KV_HEADS * WIDTH)
    gather.gather_context(
        dense, dense, empty(4096 * LAYERS * 2 * KV_HEADS, BLOCK_TOKENS * WIDTH), layer=3, num_layers=LAYERS, kv_heads=KV_HEADS,
        block_tokens=BLOCK_TOKENS, tables_BN=empty(requests, tokens // BLOCK_TOKENS, dtype=torch.int32),
        firsts_B=empty(requests, dtype=torch.int32), ends=empty(requests + 1, dtype=torch.int32), max_tokens=tokens,
    )


def _dequantize(features: int = 14336) -> None:
    """A matrix of the MLP."""
    dequantize.decode_rows(
        empty(features, HIDDEN), empty(features, HIDDEN, dtype=torch.uint8), empty(features, 1, dtype=torch.float32)
    )


_PRODUCTS = {
    "segments._down_kernel": Bounds(products=True, registers=168), "segments._up_kernel": Bounds(products=True, registers=176),
}


EXAMPLES: dict[str, Example] = {
    "decode attention": Example(_paged_decode, {
        "paged_decode._split_kernel": Bounds(products=True, registers=128),
        "paged_decode._combine_kernel": Bounds(registers=64),
    }),
    "adapters in decode": Example(_adapters, _PRODUCTS),
    "adapters of rank 8": Example(lambda: _adapters(rank=8), _PRODUCTS),
    "adapters beside a training window": Example(lambda: _adapters(rows=512, training=True), _PRODUCTS),
    "a large window, rank 64": Example(lambda: _adapters(rows=2048, rank=64, training=True), _PRODUCTS),
    # the one narrow load is the label's logit
    "loss head": Example(_loss_head, {"crossentropy._cross_entropy_kernel": Bounds(narrow_loads=1)}),
    "sampling": Example(_sampling, {
        "cuts._cut_kernel": Bounds(), "sampling._peaks_kernel": Bounds(), "sampling._pick_kernel": Bounds(),
    }),
    "rows": Example(_row_wise, {
        f"rows._{name}_kernel": Bounds() for name in (
            "rmsnorm", "add_rmsnorm", "rmsnorm_dgrad", "rope", "rotary_write", "silu_mul", "silu_mul_dgrad",
        )
    } | {"copies._copy_kernel": Bounds()}),
    "attention's gradients": Example(_window_grads, {"attention_grads._window_grads_kernel": Bounds()}),
    "context": Example(_context, {"gather._gather_kernel": Bounds()}),
    "8-bit weights": Example(_dequantize, {"dequantize._decode_kernel": Bounds()}),
    "adapters of a small unit": Example(_small_unit, _PRODUCTS),
    "first factors": Example(_first_factors, {
        "segments._down_kernel": Bounds(products=True, registers=168),
        "segments._sum_kernel": Bounds(load_bytes=8, registers=64),
    }),
    "scalings": Example(_scalings, {"segments._scale_kernel": Bounds(registers=64)}),
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
