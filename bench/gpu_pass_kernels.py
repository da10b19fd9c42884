"""Kernels of passes that only a GPU has, against the reference in float64: a sum with its norm, rotary embedding with the
write of keys and values, the gathering of contexts, cross-entropy, adapters' products. On a CPU what it runs in their place is
checked where there is such a thing; else a row says that there is none.

H query heads, G key-value heads, K head width, T rows, S tokens of context, D model width, V vocabulary, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from gpu_checks import BLOCK_TOKENS, CHECKED_ROWS, TOLERANCE, KernelChecks, relative_error
from gpu_clock import checked
from torch import Tensor

from coserve.kernels import library, reference
from coserve.kernels.choose import runs_triton
from coserve.kernels.triton import crossentropy, gather
from coserve.kernels.triton import rows as triton_rows
from coserve.kernels.triton.segments import SlotFactors, segment_pairs

RANK = 16
PROMPTS = 4
"""Requests whose contexts are gathered."""


class PassChecks(KernelChecks):
    """Those of this file."""

    @property
    def has_triton(self) -> bool:
        return runs_triton(self.device)

    def add_rmsnorm(self) -> Iterator[dict[str, Any]]:
        rows, width, eps = self.shapes.rows, self.arch.hidden_size, self.arch.rms_norm_eps

        def want(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            return x + y, reference.rmsnorm(x + y, weight, eps)

        yield from self.row_wise(
            "sum and rmsnorm", lambda total, out, x, y, weight: library.add_rmsnorm(total, out, x, y, weight, eps), want,
            (self.noise(rows, width), self.noise(rows, width), self.noise(width)),
            (self.empty(rows, width), self.empty(rows, width)),
        )

    def rotary_write(self) -> Iterator[dict[str, Any]]:
        """q and k turned where they lie beside v; k and v among random rows of the cache. On a CPU these are three steps."""
        rows, width, kv_heads = self.shapes.rows, self.arch.head_dim, self.arch.num_kv_heads
        sizes = [self.arch.num_heads * width, kv_heads * width, kv_heads * width]
        angles = torch.outer(torch.arange(rows, device=self.device), torch.tensor(self.arch.rope_inv_freq, device=self.device))
        cos, sin = (torch.cat((t, t), -1).to(self.dtype) for t in (angles.cos(), angles.sin()))
        negated = torch.cat((-sin[:, : width // 2], sin[:, width // 2 :]), -1)
        packed = self.noise(rows, sum(sizes))
        keys, values = (self.empty(rows * kv_heads, width) for _ in range(2))
        places = torch.randperm(rows * kv_heads, generator=self.generator, device=self.device)
        before = packed[:CHECKED_ROWS].double()
        q, k, v = packed.split(sizes, 1)

        def run() -> None:
            if self.has_triton:
                triton_rows.rotary_write(
                    q, k, v, cos, negated, 1.0, cache_keys=keys, cache_values=values, token_rows=places, dense=None,
                )
                return
            for part in (q, k):
                part.copy_(_turned(part, cos, negated))
            keys[places], values[places] = k.reshape(-1, width), v.reshape(-1, width)

        run()
        tables = (cos[:CHECKED_ROWS].double(), sin[:CHECKED_ROWS].double())
        want_q, want_k = (reference.rope(part, *tables) for part in before.split(sizes, 1)[:2])
        stored = [cache[places].view(rows, -1) for cache in (keys, values)]
        found = (q, k, stored[0], stored[1])
        wanted = (want_q, want_k, want_k, before[:, -sizes[2] :])
        error = max(relative_error(have[:CHECKED_ROWS], want) for have, want in zip(found, wanted, strict=True))
        unwritten = sum(int(cache.isnan().sum()) for cache in (keys, values))
        taken, itemsize = self.time(run), self.dtype.itemsize
        moved = itemsize * (2 * (q.numel() + k.numel()) + 3 * v.numel())
        row = {"kernel": "rope and key-value write", "rows": rows, "seconds": taken, "bytes_per_s": moved / taken}
        yield checked(row, math.nan if unwritten else error, TOLERANCE[self.dtype])

    def context(self) -> Iterator[dict[str, Any]]:
        """Contexts of a few prompts out of the paged cache, one of which begins within a block."""
        name = "gathered contexts"
        if not self.has_triton:
            yield _absent(name)
            return
        tokens, width, kv_heads = self.shapes.attention[1], self.arch.head_dim, self.arch.num_kv_heads
        blocks = -(-tokens // BLOCK_TOKENS)
        cache = self.noise(PROMPTS * blocks, 1, 2, kv_heads, BLOCK_TOKENS, width)
        tables = torch.randperm(PROMPTS * blocks, generator=self.generator, device=self.device).view(PROMPTS, blocks)
        firsts = [0, 5] + [0] * (PROMPTS - 2)
        ends = [0]
        for first in firsts:
            ends.append(ends[-1] + tokens - first)
        keys, values = (self.empty(ends[-1], kv_heads * width) for _ in range(2))
        given = [torch.tensor(each, dtype=torch.int32, device=self.device) for each in (firsts, ends)]
        small = tables.to(torch.int32)

        def run() -> None:
            gather.gather_context(
                keys, values, cache.view(-1, BLOCK_TOKENS * width), layer=0, num_layers=1, kv_heads=kv_heads,
                block_tokens=BLOCK_TOKENS, tables_BN=small, firsts_B=given[0], ends=given[1], max_tokens=tokens,
            )

        run()
        whole = cache[tables, 0].permute(2, 0, 1, 4, 3, 5).flatten(2, 3).flatten(3)  # [2, prompts, S, G * K]
        errors = []
        for side, have in enumerate((keys, values)):
            want = torch.cat([whole[side, n, first:tokens] for n, first in enumerate(firsts)])
            errors.append(relative_error(have, want))
        taken = self.time(run)
        row = {"kernel": name, "rows": ends[-1], "seconds": taken,
               "bytes_per_s": 4 * keys.numel() * self.dtype.itemsize / taken}
        yield checked(row, max(errors), 0.0)

    def cross_entropy(self) -> Iterator[dict[str, Any]]:
        """Log-probabilities of labels, with the softmax in the logits' place. A CPU has it within the loss head."""
        name = "cross-entropy"
        if not self.has_triton:
            yield _absent(name)
            return
        rows, vocab = self.shapes.loss_rows, self.arch.vocab_size
        logits = self.noise(rows, vocab, scale=3.0)
        few = logits[:CHECKED_ROWS].double()
        labels = torch.randint(vocab, (rows,), generator=self.generator, device=self.device)
        labels[0] = few[0].argmax()
        logprobs = torch.full((rows,), math.nan, device=self.device)
        correct = torch.zeros(rows, dtype=torch.bool, device=self.device)

        def run() -> None:
            crossentropy.label_logprobs(logprobs, correct, logits, labels, probabilities=True)

        run()
        exact = torch.log_softmax(few, -1)
        label_logits, best = few.gather(1, labels[:CHECKED_ROWS, None])[:, 0], few.amax(-1)
        error = max(
            relative_error(logprobs[:CHECKED_ROWS], exact.gather(1, labels[:CHECKED_ROWS, None])[:, 0]),
            relative_error(logits[:CHECKED_ROWS], exact.exp()),
        )
        wrong = not bool((correct[:CHECKED_ROWS] == (label_logits == best)).all())
        taken = self.time(run)
        row = {"kernel": name, "rows": rows, "seconds": taken,
               "bytes_per_s": 2 * logits.numel() * self.dtype.itemsize / taken}
        yield checked(row, math.nan if wrong else error, TOLERANCE[self.dtype])

    # --- adapters ---

    def adapters(self) -> Iterator[dict[str, Any]]:
        """LoRA of q, k and v: rows of several adapters in no order, and some without one."""
        for rows, count in self.shapes.adapters:
            yield self.adapters_of(rows, count)

    def adapters_of(self, rows: int, count: int) -> dict[str, Any]:
        width, hidden = self.arch.head_dim, self.arch.hidden_size
        sizes = [heads * width for heads in (self.arch.num_heads, self.arch.num_kv_heads, self.arch.num_kv_heads)]
        x, packed = self.noise(rows, hidden), self.noise(rows, sum(sizes))
        downs = [self.noise(count, RANK, hidden, scale=hidden**-0.5) for _ in sizes]
        ups = [self.noise(count, size, RANK) for size in sizes]
        slots = torch.randint(-1, count, (rows,), generator=self.generator, device=self.device)  # -1: none
        before = packed.clone()

        def run() -> None:
            if self.has_triton:
                segment_pairs(packed.split(sizes, 1), None, x, factors[0], factors[1], accumulate=True)
                return
            for out, down, up in zip(packed.split(sizes, 1), downs, ups, strict=True):
                for order, ends in grouped:
                    inner = self.empty(len(order), RANK)
                    library.grouped_matmul_into(inner, x[order], down.transpose(1, 2), ends, accumulate=False)
                    added = self.empty(len(order), out.shape[1])
                    library.grouped_matmul_into(added, inner, up.transpose(1, 2), ends, accumulate=False)
                    out[order] += added

        nobody = [None] * len(sizes)
        factors = [SlotFactors(slots.int(), stacks, nobody, [1.0] * len(sizes), nobody) for stacks in (downs, ups)]
        order = slots.argsort()[int((slots < 0).sum()) :]
        grouped = [(order, torch.bincount(slots[order], minlength=count).cumsum(0).int())] if not self.has_triton else []
        run()
        error = self._adapters_error(packed - before, x, slots, downs, ups, before)
        taken, itemsize = self.time(run), self.dtype.itemsize
        moved = itemsize * (x.numel() + 2 * packed.numel() + sum(each.numel() for each in (*downs, *ups)))
        row = {"kernel": f"{count} adapters of q, k and v", "rows": rows, "seconds": taken, "bytes_per_s": moved / taken}
        return checked(row, error, 4 * TOLERANCE[self.dtype])

    def _adapters_error(
        self, added: Tensor, x: Tensor, slots: Tensor, downs: list[Tensor], ups: list[Tensor], before: Tensor
    ) -> float:
        """Of what was added, relative to it; NaN where a row without an adapter has changed."""
        if bool(added[slots < 0].any()) or bool(added.isnan().any()):
            return math.nan
        wanted = torch.zeros_like(added, dtype=torch.float64)
        for slot in slots.unique().tolist():
            if slot >= 0:
                mine = slots == slot
                products = [x[mine].double() @ a[slot].double().T @ b[slot].double().T for a, b in zip(downs, ups, strict=True)]
                wanted[mine] = torch.cat(products, 1)
        rounded = (before.double() + wanted)  # what was added can't be finer than its sum
        return relative_error(before.double() + added.double(), rounded)


def _turned(x: Tensor, cos: Tensor, negated: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    library.rope(out, x.contiguous(), cos, negated)
    return out


def _absent(kernel: str) -> dict[str, Any]:
    return {"kernel": f"{kernel}: none on a CPU"}
