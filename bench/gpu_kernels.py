"""Part (b): kernels against the reference in float64, and their times at a model's shapes.

Errors are ||out - ref|| / ||ref|| at a size that the reference can hold; times are at full size. On a CPU its own kernels run.
H query heads, G key-value heads, K head width, B requests, T rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_clock import seconds
from torch import Tensor

from coserve.kernels import library, reference
from coserve.kernels.attention import decode_attention
from coserve.kernels.choose import attention_for, runs_triton
from coserve.kernels.triton.paged_decode import paged_decode_attention
from coserve.model.architecture import Architecture

BLOCK_TOKENS = 16


def relative_error(have: Tensor, want: Tensor) -> float:
    return float((have.double() - want.double()).norm() / want.double().norm())


class Kernels:
    """Rows of random values for a model's shapes, in its dtype."""

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device, repeats: int) -> None:
        self.arch, self.dtype, self.device, self.repeats = arch, dtype, device, repeats
        self.generator = torch.Generator(device).manual_seed(0)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(self.dtype)

    def time(self, action: Callable[[], object]) -> float:
        return seconds(action, self.device, repeats=self.repeats, warmup=2)

    def training_attention(self, length: int, window: int, check: int) -> Iterator[dict[str, Any]]:
        """The last `window` rows of an example of `length` tokens; errors at a whole example of `check` tokens."""
        for first, last, checked in ((0, check, True), (max(0, length - window), length, False)):
            heads, kv_heads, width = self.arch.num_heads, self.arch.num_kv_heads, self.arch.head_dim
            rows, kernels = last - first, attention_for(self.device)
            q, grad, out, d_q = (self.noise(rows, heads * width) for _ in range(4))
            k, v = (self.noise(last, kv_heads * width) for _ in range(2))
            lse = torch.empty(rows, heads, device=self.device)
            sums = [torch.zeros(last, kv_heads * width, device=self.device) for _ in range(2)]
            where: dict[str, Any] = {"width": width, "begin": 0, "first": first, "last": last, "window": None}

            def forward() -> None:
                kernels.attention(out, lse, q, k, v, **where)  # noqa: B023  called inside this turn

            def backward() -> None:
                kernels.attention_dgrad(d_q, *sums, grad, q, k, v, out, lse, **where)  # noqa: B023

            if checked:
                forward()
                backward()
                yield from self._training_errors(q, k, v, grad, (out, d_q, *sums))
                continue
            pairs = rows * first + rows * (rows + 1) // 2
            operations = 4 * heads * width * pairs
            for name, action, count in (("forward", forward, operations), ("backward", backward, 2.5 * operations)):
                taken = self.time(action)
                yield {"kernel": f"training attention {name}", "rows": rows, "context": last, "seconds": taken,
                       "flops_per_s": count / taken}

    def _training_errors(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, found: tuple[Tensor, ...]
    ) -> Iterator[dict[str, Any]]:
        width = self.arch.head_dim
        exact = [t.double().unflatten(-1, (-1, width)).requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            want, _ = reference.attention(*exact, window=None)
            grads = torch.autograd.grad(want, exact, grad.double().unflatten(-1, (-1, width)))
        for name, have, wanted in zip(("out", "d_q", "d_k", "d_v"), found, (want.detach(), *grads), strict=True):
            yield {"kernel": "training attention", "value": name, "rows": q.shape[0],
                   "relative_error": relative_error(have, wanted.flatten(1))}

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """Decode attention of one layer, by tables where there is Triton, else of gathered tokens."""
        heads, kv_heads, width = self.arch.num_heads, self.arch.num_kv_heads, self.arch.head_dim
        blocks = -(-context // BLOCK_TOKENS)
        cache = self.noise(batch * blocks, 1, 2, kv_heads, BLOCK_TOKENS, width)
        q = self.noise(batch, heads * width)
        out = torch.full_like(q, math.nan)
        order = torch.randperm(batch * blocks, generator=self.generator, device=self.device).view(batch, blocks)
        gathered = cache[order, 0].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
        if runs_triton(self.device):
            tables, contexts = order.to(torch.int32), torch.full((batch,), context, dtype=torch.int32, device=self.device)

            def run() -> None:
                paged_decode_attention(
                    out, q, cache.view(-1, BLOCK_TOKENS * width), layer=0, num_layers=1, kv_heads=kv_heads,
                    block_tokens=BLOCK_TOKENS, tables_BN=tables, context_B=contexts, max_context=context, window=None,
                    scale=width**-0.5,
                )
        else:
            tokens = torch.arange(blocks * BLOCK_TOKENS, device=self.device)
            bias = torch.zeros(batch, 1, 1, blocks * BLOCK_TOKENS, dtype=self.dtype, device=self.device)
            bias[..., context:] = -math.inf
            first = (order[:, None, tokens // BLOCK_TOKENS] * 2 + 1) * kv_heads  # of each token's block, its values' first head
            heads_G1 = torch.arange(kv_heads, device=self.device)[:, None]
            rows_BGS = ((first + heads_G1) * BLOCK_TOKENS + tokens % BLOCK_TOKENS).to(torch.int32)
            rows = rows_BGS[:, :, None].expand(-1, -1, heads // kv_heads, -1).flatten()
            starts = torch.arange(0, len(rows), len(tokens), dtype=torch.int32, device=self.device)

            def run() -> None:
                decode_attention(out, q, gathered[0], cache.view(-1, width), rows, starts, bias)
        run()
        keys, values = (t[0].transpose(0, 1)[:context].double() for t in gathered)
        want, _ = reference.attention(q[0].double().view(1, heads, width), keys, values, window=None)
        taken = self.time(run)
        read = 2 * batch * context * kv_heads * width * self.dtype.itemsize
        return {"kernel": "decode attention", "rows": batch, "context": context, "seconds": taken,
                "bytes_per_s": read / taken, "relative_error": relative_error(out[0], want.flatten())}

    def adapters(self, rows: int, count: int, rank: int) -> dict[str, Any]:
        """The first factor of `count` adapters over equal shares of the rows."""
        width = self.arch.hidden_size
        x, weights = self.noise(rows, width), self.noise(count, width, rank)
        ends = torch.linspace(rows / count, rows, count, device=self.device).to(torch.int32)
        out = torch.full((rows, rank), math.nan, dtype=self.dtype, device=self.device)

        def run() -> None:
            library.grouped_matmul_into(out, x, weights, ends, accumulate=False)

        run()
        bounds = [0, *ends.tolist()]
        want = torch.cat([x[a:b].double() @ w.double() for a, b, w in zip(bounds, bounds[1:], weights, strict=False)])
        return {"kernel": "products of many adapters", "rows": rows, "adapters": count, "rank": rank,
                "seconds": self.time(run), "relative_error": relative_error(out, want)}


def run_kernels(arch: Architecture, dtype: torch.dtype, device: torch.device, *, quick: bool) -> Iterator[dict[str, Any]]:
    """Result rows."""
    kernels = Kernels(arch, dtype, device, repeats=2 if quick else 20)
    yield from kernels.training_attention(*((256, 64, 48) if quick else (8192, 1024, 1024)))
    for batch, context in ((2, 40),) if quick else ((1, 1024), (16, 1024), (64, 1024), (16, 8192)):
        yield kernels.decode(batch, context)
    for rows, count in ((8, 2),) if quick else ((64, 1), (64, 16), (256, 64), (2048, 16)):
        yield kernels.adapters(rows, count, 16)
