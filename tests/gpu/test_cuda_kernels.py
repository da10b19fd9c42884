"""CUDA kernels against the reference. Not yet run on a device: none was there when they were written.

Tests marked gpu need one. The others hold what can be held without: that the library's calls take our arguments (on tensors
without memory), and that what surrounds them is right (on the CPU, with the library's contract played by the reference).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.kernels import cuda_attention, library, reference
from coserve.kernels.triton import available, paged_decode, segments

SHAPES = [(4, 4, 64), (6, 2, 128), (2, 1, 16)]
WINDOWS = [(0, 0, 300, None), (7, 7, 8, None), (5, 100, 431, None), (3, 200, 201, None), (0, 64, 200, 50), (9, 9, 309, 1)]
"""(begin, first, last, sliding window)"""


def close(have: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """By norms, with a floor: a window of one key has gradients that are 0 but for rounding."""
    error = float((have.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm().clamp(min=1.0))
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def check_training_attention(
    heads: int, kv_heads: int, width: int, begin: int, first: int, last: int, window: int | None,
    device: str, dtype: torch.dtype, tolerance: float,
) -> None:
    generator = torch.Generator().manual_seed(heads * last + first)
    rows, size = last - first, last + 3

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    packed = noise(rows, (heads + 2) * width)
    q, grad = packed[:, width : (heads + 1) * width], noise(rows, heads * width)
    k_all, v_all = noise(size, kv_heads * width), noise(size, kv_heads * width)
    for t in (k_all, v_all):  # the arena's other rows are someone else's
        t[:begin] = math.nan
        t[last:] = math.nan
    out = torch.full((rows, heads * width), math.nan, dtype=dtype, device=device)
    lse, d_q = torch.full((rows, heads), math.nan, device=device), torch.full_like(out, math.nan)
    sums = [torch.ones(size, kv_heads * width, device=device) for _ in range(2)]
    where: dict[str, Any] = {"width": width, "begin": begin, "first": first, "last": last, "window": window}
    cuda_attention.attention(out, lse, q, k_all, v_all, **where)
    cuda_attention.attention_dgrad(d_q, *sums, grad, q, k_all, v_all, out, lse, **where)

    inputs = (q, k_all[begin:last], v_all[begin:last])
    exact = [t.double().cpu().unflatten(-1, (-1, width)).requires_grad_() for t in inputs]
    want, want_lse = reference.attention(*exact, window=window)
    grads = torch.autograd.grad(want, exact, grad.double().cpu().unflatten(-1, (-1, width)))
    close(out, want.detach().flatten(1), tolerance, "out")
    close(lse, want_lse.detach(), tolerance, "lse")
    close(d_q, grads[0].flatten(1), tolerance, "d_q")
    for name, found, wanted in zip(("d_k", "d_v"), sums, grads[1:], strict=True):
        close(found[begin:last] - 1, wanted.flatten(1), tolerance, name)
        assert (found[:begin] == 1).all() and (found[last:] == 1).all(), name


@pytest.mark.parametrize("where", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_attention(
    heads: int, kv_heads: int, width: int, where: tuple[int, int, int, int | None], dtype: torch.dtype
) -> None:
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}[dtype]
    check_training_attention(heads, kv_heads, width, *where, "cuda", dtype, tolerance)


def play_forward(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, dropout: float, causal: bool,
    debug: bool, *, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:
    """The library's forward by the reference: rows [T, n, K], log-sum-exp [H, T]."""
    assert ends_q.tolist() == [0, max_q] and ends_k.tolist() == [0, max_k] and (max_q, max_k) == (len(q), len(k))
    assert ends_q.dtype == ends_k.dtype == torch.int32 and causal and not debug and dropout == 0 == window_size_right
    assert scale == pytest.approx(q.shape[-1] ** -0.5)
    out, lse = reference.attention(q, k, v, window=None if window_size_left < 0 else window_size_left + 1)
    return out, lse.t().contiguous(), torch.empty(2), torch.empty(0), torch.empty(0)


def play_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ends_q: Tensor, ends_k: Tensor,
    max_q: int, max_k: int, dropout: float, causal: bool, state: Tensor, unused: Tensor, **edges: Any,
) -> tuple[Tensor, ...]:
    """The library's backward by autograd."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    want, want_lse, *_ = play_forward(*leaves, ends_q, ends_k, max_q, max_k, dropout, causal, False, **edges)
    torch.testing.assert_close(out, want.detach())
    torch.testing.assert_close(lse, want_lse.detach())
    return torch.autograd.grad(want, leaves, grad)


@pytest.mark.parametrize("where", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_what_surrounds_the_librarys_attention(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, width: int, where: tuple[int, int, int, int | None]
) -> None:
    monkeypatch.setattr(cuda_attention, "_fits", lambda width, *rows: True)
    monkeypatch.setattr(cuda_attention, "_flash", play_forward)
    monkeypatch.setattr(cuda_attention, "_flash_backward", play_backward)
    check_training_attention(heads, kv_heads, width, *where, "cpu", torch.float32, 1e-5)


def test_the_library_takes_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, order and types of both calls, as this release of the library declares them."""
    monkeypatch.setattr(cuda_attention, "_fits", lambda width, *rows: True)
    q, grad, out, d_q = (torch.empty(5, 4 * 16, dtype=torch.bfloat16, device="meta") for _ in range(4))
    k_all, v_all = (torch.empty(9, 2 * 16, dtype=torch.bfloat16, device="meta") for _ in range(2))
    sums = [torch.empty(9, 2 * 16, device="meta") for _ in range(2)]
    lse = torch.empty(5, 4, device="meta")
    cuda_attention.attention(out, lse, q, k_all, v_all, width=16, begin=1, first=3, last=8, window=4)
    cuda_attention.attention_dgrad(
        d_q, *sums, grad, q, k_all, v_all, out, lse, width=16, begin=1, first=3, last=8, window=4
    )


def test_rows_that_the_library_does_not_take_go_the_plain_way() -> None:
    for where in WINDOWS:
        check_training_attention(4, 2, 16, *where, "cpu", torch.float32, 5e-5)


# --- Triton ---------------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and available()), reason="needs CUDA and triton")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [*SHAPES, (32, 8, 128), (3, 3, 80)])
def test_paged_decode(heads: int, kv_heads: int, width: int, window: int | None, dtype: torch.dtype) -> None:
    contexts, block_tokens, layers, layer = [1, 16, 300, 2000, 0], 16, 2, 1
    generator = torch.Generator().manual_seed(heads)
    per_request = -(-max(contexts) // block_tokens)
    tables = torch.randperm(len(contexts) * per_request, generator=generator).view(len(contexts), -1).to(torch.int32)
    shape = (tables.numel(), layers, 2, kv_heads, block_tokens, width)
    cache = torch.randn(shape, generator=generator).to("cuda", dtype)
    q = torch.randn(len(contexts), (heads + 1) * width, generator=generator).to("cuda", dtype)[:, : heads * width]
    out = torch.full_like(q, math.nan)
    paged_decode.paged_decode_attention(
        out, q, cache.view(-1, block_tokens * width), layer=layer, num_layers=layers, kv_heads=kv_heads,
        block_tokens=block_tokens, tables_BN=tables.cuda(), context_B=torch.tensor(contexts, dtype=torch.int32).cuda(),
        max_context=max(contexts), window=window, scale=width**-0.5,
    )
    for request, context in enumerate(contexts):
        if context == 0:
            assert (out[request] == 0).all()
            continue
        kv = cache[tables[request].long().cuda(), layer].double().cpu()
        keys, values = kv.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :context]
        query = q[request].double().cpu().view(1, heads, width)
        want, _ = reference.attention(query, keys, values, window=window)
        close(out[request], want.flatten(), TOLERANCE[dtype], f"context {context}")


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and available()), reason="needs CUDA and triton")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(960, 16), (8, 1536), (64, 64)])
@pytest.mark.parametrize("lengths", [[1] * 40, [0, 700, 0, 3, 200], [16]])
def test_segments(lengths: list[int], num_in: int, num_out: int, accumulate: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_in)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype)

    rows = sum(lengths)
    x, weight, out = noise(rows, num_in), noise(len(lengths), num_out, num_in).transpose(1, 2), noise(rows, num_out)
    parts = zip(x.double().split(lengths), weight.double(), out.double().split(lengths), strict=True)
    want = torch.cat([0.5 * (a @ b) + (c if accumulate else 0) for a, b, c in parts])
    offsets = torch.tensor(lengths).cumsum(0).to(torch.int32).cuda()
    segments.segment_linear(out, x, weight, offsets, alpha=0.5, accumulate=accumulate)
    close(out, want, TOLERANCE[dtype], "out")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_packed_values_are_the_cpus(dtype: torch.dtype) -> None:
    x = torch.randn(70, 577, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[3] *= 1000
    x[5, 4] = math.inf
    found = []
    for device in ("cpu", "cuda"):
        rows = x.to(device)
        bits, exponent, signs = (torch.zeros(70, n, dtype=torch.uint8, device=device) for n in (577, 1, 73))
        decoded, positive = torch.empty_like(rows), torch.empty_like(rows)
        library.fp8_encode(bits, exponent, rows)
        library.fp8_decode(decoded, bits, exponent)
        library.sign_bits(signs, rows)
        library.sign_values(positive, signs)
        found.append([part.cpu() for part in (exponent, decoded.nan_to_num(nan=9.0), signs, positive)])
    for have, want in zip(*found, strict=True):
        assert torch.equal(have, want)
