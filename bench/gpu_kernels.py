"""Kernels against the reference in float64, and their times, at a model's shapes. On a CPU its own kernels run. Kernels that
only a GPU has are in gpu_pass_kernels.py.

H query heads, G key-value heads, K head width, B requests, T rows, D model width, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_checks import BLOCK_TOKENS, CHECKED_ROWS, FULL, QUICK, TOLERANCE, KernelChecks, relative_error
from gpu_clock import checked, device_of
from gpu_model import architecture_of
from gpu_pass_kernels import PassChecks
from gpu_rows import Item
from torch import Tensor

from coserve.config.settings import SamplingConfig
from coserve.kernels import cuda_attention, library, reference
from coserve.kernels.attention import decode_attention
from coserve.kernels.choose import runs_triton
from coserve.kernels.cuda_attention import KeyedRows
from coserve.kernels.triton.paged_decode import paged_decode_attention
from coserve.model.linear import make_head
from coserve.runtime.sampler import SamplerRow, sample_rows
from coserve.runtime.sequences import packed_calls


class Checks(KernelChecks):
    """Those of this file."""

    # --- row-wise kernels ---

    def rmsnorm(self) -> Iterator[dict[str, Any]]:
        rows, width, eps = self.shapes.rows, self.arch.hidden_size, self.arch.rms_norm_eps
        yield from self.row_wise(
            "rmsnorm", lambda out, x, weight: library.rmsnorm(out, x, weight, eps),
            lambda x, weight: (reference.rmsnorm(x, weight, eps),),
            (self.noise(rows, width), self.noise(width)), (self.empty(rows, width),),
        )

    def rmsnorm_dgrad(self) -> Iterator[dict[str, Any]]:
        rows, width, eps = self.shapes.rows, self.arch.hidden_size, self.arch.rms_norm_eps

        def want(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaf = x.requires_grad_()
                return torch.autograd.grad(reference.rmsnorm(leaf, weight, eps), leaf, grad)

        yield from self.row_wise(
            "rmsnorm gradient",
            lambda out, grad, x, weight: library.rmsnorm_dgrad(out, grad, x, weight, eps, accumulate=False), want,
            (self.noise(rows, width), self.noise(rows, width), self.noise(width)), (self.empty(rows, width),),
        )

    def rope(self) -> Iterator[dict[str, Any]]:
        rows, width = self.shapes.rows, self.arch.head_dim
        angles = torch.outer(torch.arange(rows, device=self.device), torch.tensor(self.arch.rope_inv_freq, device=self.device))
        cos, sin = (torch.cat((t, t), -1).to(self.dtype) for t in (angles.cos(), angles.sin()))
        negated = torch.cat((-sin[:, : width // 2], sin[:, width // 2 :]), -1)  # as the kernel wants it
        del sin

        def want(x: Tensor, cos: Tensor, negated: Tensor) -> tuple[Tensor, ...]:
            return (reference.rope(x, cos, torch.cat((-negated[:, : width // 2], negated[:, width // 2 :]), -1)),)

        size = self.arch.num_heads * width
        yield from self.row_wise("rope", library.rope, want, (self.noise(rows, size), cos, negated), (self.empty(rows, size),))

    def silu_mul(self) -> Iterator[dict[str, Any]]:
        rows, width = self.shapes.rows, self.arch.intermediate_size
        yield from self.row_wise(
            "silu times up", library.silu_mul, lambda gate, up: (reference.silu_mul(gate, up),),
            (self.noise(rows, width), self.noise(rows, width)), (self.empty(rows, width),),
        )

    def silu_mul_dgrad(self) -> Iterator[dict[str, Any]]:
        rows, width = self.shapes.rows, self.arch.intermediate_size

        def want(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                leaves = gate.requires_grad_(), up.requires_grad_()
                return torch.autograd.grad(reference.silu_mul(*leaves), leaves, grad)

        inputs = tuple(self.noise(rows, width) for _ in range(3))
        yield from self.row_wise(
            "silu times up gradient", library.silu_mul_dgrad, want, inputs, (self.empty(rows, width), self.empty(rows, width)),
        )

    # --- the head ---

    def loss(self) -> Iterator[dict[str, Any]]:
        """Log-probabilities of labels and their gradient, as a training window's loss rows run them."""
        rows, width, vocab, eps = self.shapes.loss_rows, self.arch.hidden_size, self.arch.vocab_size, self.arch.rms_norm_eps
        hidden, norm = self.noise(rows, width), self.noise(width)
        table = self.noise(vocab, width, scale=0.02)
        labels = torch.randint(vocab, (rows,), generator=self.generator, device=self.device)
        logprobs = torch.full((rows,), math.nan, device=self.device)
        correct, grad = torch.zeros(rows, dtype=torch.bool, device=self.device), self.empty(rows, width)
        logits = torch.empty(min(rows, 1024), vocab, dtype=self.dtype, device=self.device)
        head = make_head(table, packed=False)

        def run() -> None:
            library.label_rows(logprobs, correct, grad, hidden, labels, norm, eps, head, logits)

        run()
        with torch.enable_grad():
            few = hidden[:CHECKED_ROWS].float().requires_grad_()
            exact = torch.log_softmax(reference.rmsnorm(few, norm.float(), eps) @ table.float().t(), -1)
            want = exact.gather(1, labels[:CHECKED_ROWS, None])[:, 0]
            (want_grad,) = torch.autograd.grad(want.sum(), few)
        errors = relative_error(logprobs[:CHECKED_ROWS], want.detach()), relative_error(grad[:CHECKED_ROWS], want_grad)
        taken = self.time(run)
        row = {"kernel": "loss head", "rows": rows, "seconds": taken, "flops_per_s": 4 * rows * width * vocab / taken}
        yield checked(row, max(errors), 2 * TOLERANCE[self.dtype])

    def sampler(self) -> Iterator[dict[str, Any]]:
        """Tokens of logits: greedy against the arg max, and by how much a temperature and top-p take longer."""
        rows, vocab = self.shapes.sampled, self.arch.vocab_size
        logits = self.noise(rows, vocab)
        ways = {"greedy": SamplingConfig(temperature=0.0), "temperature": SamplingConfig(temperature=1.0),
                "top-p": SamplingConfig(temperature=1.0, top_p=0.95), "top-k": SamplingConfig(temperature=1.0, top_k=50)}
        for name, sampling in ways.items():
            asked = [SamplerRow(sampling, seed, 7, [1, 2], [3], frozenset()) for seed in range(rows)]
            tokens = [sampled.token for sampled in sample_rows(logits, asked)]
            again = [sampled.token for sampled in sample_rows(logits, asked)]
            taken = self.time(partial(sample_rows, logits, asked))
            row = {"kernel": f"sampler {name}", "rows": rows, "seconds": taken}
            own = logits[torch.arange(rows, device=self.device), torch.tensor(tokens, device=self.device)]
            best = bool((own == logits.amax(-1)).all())  # several tokens may be as good
            wrong = tokens != again or best != (name == "greedy")
            on_cpu = [sampled.token for sampled in sample_rows(logits[:CHECKED_ROWS].cpu(), asked[:CHECKED_ROWS])]
            row["as_on_a_cpu"] = sum(map(operator.eq, tokens, on_cpu)) / len(on_cpu)
            wrong |= row["as_on_a_cpu"] < 0.95  # a filter's sums may differ in their last bits, and so who is at its edge
            if name == "top-k":
                wrong |= bool((own < logits.topk(min(50, vocab)).values[:, -1]).any())
            yield {**row, "failed": f"sampler {name}: tokens are wrong"} if wrong else row

    # --- attention ---

    def training_attention(self) -> Iterator[dict[str, Any]]:
        """The last rows of a long example, forward and backward; errors at a whole example that is shorter."""
        length, window, check = self.shapes.attention
        for first, last, compared in ((0, check, True), (max(0, length - window), length, False)):
            heads, kv_heads, width = self.arch.num_heads, self.arch.num_kv_heads, self.arch.head_dim
            rows = last - first
            (q, grad), (out, d_q) = ([make(rows, heads * width) for _ in range(2)] for make in (self.noise, self.empty))
            k, v = (self.noise(last, kv_heads * width) for _ in range(2))
            lse = torch.empty(rows, heads, device=self.device)
            sums = [torch.zeros(last, kv_heads * width, device=self.device) for _ in range(2)]
            call = packed_calls({None: [KeyedRows(0, first, last)]}, self.device)[None]
            where: dict[str, Any] = {"call": call, "width": width, "window": None}

            def forward() -> None:
                cuda_attention.attention(out, lse, q, k, v, **where)  # noqa: B023  called inside this turn

            def backward() -> None:
                cuda_attention.attention_dgrad(d_q, sums[0], sums[1], grad, q, k, v, out, lse, **where)  # noqa: B023

            if compared:
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
            row = {"kernel": f"training attention {name}", "rows": q.shape[0]}
            yield checked(row, relative_error(have, wanted.flatten(1)), 2 * TOLERANCE[self.dtype])

    def decode(self) -> Iterator[dict[str, Any]]:
        """Decode attention of one layer, by tables where there is Triton, else of gathered tokens."""
        for batch, context in self.shapes.decode:
            yield self.decode_of(batch, context)

    def decode_of(self, batch: int, context: int) -> dict[str, Any]:
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
        errors = []
        for request in {0, batch - 1}:
            keys, values = (t[request].transpose(0, 1)[:context].double() for t in gathered)
            want, _ = reference.attention(q[request].double().view(1, heads, width), keys, values, window=None)
            errors.append(relative_error(out[request], want.flatten()))
        taken = self.time(run)
        read = 2 * batch * context * kv_heads * width * self.dtype.itemsize
        row = {"kernel": f"decode attention {context}", "rows": batch, "seconds": taken, "bytes_per_s": read / taken}
        return checked(row, max(errors), 2 * TOLERANCE[self.dtype])


def items(options: argparse.Namespace) -> list[Item]:
    """The checks."""
    device = device_of(options)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given = (architecture_of(options.model), dtype, device, QUICK if options.quick else FULL,
             torch.Generator(device).manual_seed(0))
    checks, of_passes = Checks(*given), PassChecks(*given)
    runs = (
        checks.decode, checks.training_attention, checks.rmsnorm, checks.rmsnorm_dgrad, checks.rope, checks.silu_mul,
        checks.silu_mul_dgrad, checks.loss, checks.sampler, of_passes.add_rmsnorm, of_passes.rotary_write, of_passes.context,
        of_passes.cross_entropy, of_passes.adapters,
    )
    return [Item(run.__name__, partial(_without_gradients, run)) for run in runs]


def _without_gradients(run: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    with torch.no_grad():
        yield from run()
