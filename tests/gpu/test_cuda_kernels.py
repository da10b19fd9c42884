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
from coserve.kernels.cuda_attention import KeyedRows, PackedCall
from coserve.kernels.triton import available, paged_decode, segments
from coserve.runtime.sequences import packed_calls
from tests.fake_cuda import fake_cuda, needs_fake_cuda
from tests.played_flash import play_flash

SHAPES = [(4, 4, 64), (6, 2, 128), (2, 1, 16)]
Case = tuple[list[tuple[int, int, int]], int | None]
CASES: list[Case] = [
    ([(0, 0, 300)], None), ([(7, 7, 8)], None), ([(5, 100, 431)], None), ([(3, 200, 201)], None), ([(0, 64, 200)], 50),
    ([(9, 9, 309)], 1),
    # a training window that cuts its first example, then whole ones, one of them a single token, and one that goes on
    ([(4, 90, 131), (131, 131, 132), (132, 132, 190), (190, 190, 230)], None),
    ([(4, 90, 131), (131, 131, 132), (132, 132, 190), (190, 190, 230)], 17),
    ([(6, 6, 7), (7, 7, 8), (8, 8, 9)], None),
    # prompts with gathered contexts, of which one has a single new token
    ([(0, 70, 90), (90, 90, 120), (120, 199, 200)], None), ([(0, 70, 90), (90, 90, 120), (120, 199, 200)], 40),
]
"""((begin, first, last) per sequence, sliding window)"""


def close(have: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """By norms, with a floor: a window of one key has gradients that are 0 but for rounding."""
    error = float((have.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm().clamp(min=1.0))
    assert error <= tolerance, f"{what}: relative error {error:.2e}"


def check_training_attention(
    heads: int, kv_heads: int, width: int, case: Case, device: str, dtype: torch.dtype, tolerance: float,
) -> None:
    sequences, window = [KeyedRows(*part) for part in case[0]], case[1]
    begin, last = sequences[0].begin, sequences[-1].last
    generator = torch.Generator().manual_seed(heads * last + sequences[0].first)
    rows, size = sum(one.last - one.first for one in sequences), last + 3

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
    trained = all(one.begin == one.first for one in sequences[1:])
    call = packed_calls({window: sequences}, torch.device(device))[window] if trained else whole_call(sequences, device)
    options: dict[str, Any] = {"width": width, "window": window}
    cuda_attention.attention(out, lse, q, k_all, v_all, call, **options)
    cuda_attention.attention_dgrad(d_q, *sums, grad, q, k_all, v_all, out, lse, call, **options)
    silent = torch.full_like(out, math.nan)
    cuda_attention.attention(silent, None, q, k_all, v_all, call, **options)
    assert torch.equal(silent, out), "without log-sum-exps"

    row = 0
    for number, (one, first, end) in enumerate(sequences):
        mine, keys, what = slice(row, row + end - first), slice(one, end), f"sequence {number}: "
        row = mine.stop
        exact = [t.double().cpu().unflatten(-1, (-1, width)).requires_grad_() for t in (q[mine], k_all[keys], v_all[keys])]
        want, want_lse = reference.attention(*exact, window=window)
        grads = torch.autograd.grad(want, exact, grad[mine].double().cpu().unflatten(-1, (-1, width)))
        close(out[mine], want.detach().flatten(1), tolerance, what + "out")
        close(lse[mine], want_lse.detach(), tolerance, what + "lse")
        close(d_q[mine], grads[0].flatten(1), tolerance, what + "d_q")
        for name, found, wanted in zip(("d_k", "d_v"), sums, grads[1:], strict=True):
            close(found[keys] - 1, wanted.flatten(1), tolerance, what + name)
    for found in sums:
        assert (found[:begin] == 1).all() and (found[last:] == 1).all()


def whole_call(sequences: list[KeyedRows], device: str) -> PackedCall:
    """A call over all keys, also those that no window reaches."""
    ends_q, ends_k = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in cuda_attention.call_ends(sequences))
    lengths = [(one.last - one.first, one.last - one.begin) for one in sequences]
    return PackedCall(sequences, ends_q, ends_k, max(q for q, _ in lengths), max(k for _, k in lengths))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_training_attention(heads: int, kv_heads: int, width: int, case: Case, dtype: torch.dtype) -> None:
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}[dtype]
    check_training_attention(heads, kv_heads, width, case, "cuda", dtype, tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_what_surrounds_the_librarys_attention(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, width: int, case: Case
) -> None:
    calls = play_flash(monkeypatch, into=width != 64)
    check_training_attention(heads, kv_heads, width, case, "cpu", torch.float32, 1e-5)
    assert calls == {"forward": 2, "backward": 1}


@needs_fake_cuda
@pytest.mark.parametrize("into", [True, False])
def test_the_library_takes_our_arguments(monkeypatch: pytest.MonkeyPatch, into: bool) -> None:
    """Names, order and types of the calls, as this release of the library declares them, for tensors of a CUDA device."""
    if not into:
        monkeypatch.setattr(cuda_attention, "_flash_into", None)
    with fake_cuda() as device:
        place: dict[str, Any] = {"device": "cuda"}
        q, grad, out, d_q = (torch.empty(7, 4 * 16, dtype=torch.bfloat16, **place) for _ in range(4))
        k_all, v_all = (torch.empty(12, 2 * 16, dtype=torch.bfloat16, **place) for _ in range(2))
        sums, lse = [torch.empty(12, 2 * 16, **place) for _ in range(2)], torch.empty(7, 4, **place)
        (call,) = packed_calls({4: [KeyedRows(0, 2, 7), KeyedRows(7, 7, 9)]}, torch.device("cuda")).values()
        cuda_attention.attention(out, lse, q, k_all, v_all, call, width=16, window=4)
        cuda_attention.attention_dgrad(d_q, *sums, grad, q, k_all, v_all, out, lse, call, width=16, window=4)
    forward = "_flash_attention_forward_no_dropout_inplace" if into else "_flash_attention_forward"
    assert device.launches[forward] == 1 and device.launches["_flash_attention_backward"] > 0
    assert device.launches["arange"] == 0


def test_keys_of_a_call_lie_side_by_side() -> None:
    with pytest.raises(AssertionError, match="side by side"):
        cuda_attention.call_ends([KeyedRows(0, 0, 3), KeyedRows(4, 4, 6)])


def test_rows_that_the_library_does_not_take_go_the_plain_way() -> None:
    for case in CASES:
        check_training_attention(4, 2, 16, case, "cpu", torch.float32, 5e-5)


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
@pytest.mark.parametrize(("num_in", "rank", "widths"), [(960, 16, [960, 320, 320]), (1536, 8, [576]), (64, 64, [64, 64])])
@pytest.mark.parametrize("window", [0, 600])
@pytest.mark.parametrize("slots", [[3, 0, 0, -1] * 10, [2] * 700 + [-1] * 3 + [1] * 200, [1]])
def test_products_of_adapters(
    slots: list[int], window: int, num_in: int, rank: int, widths: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(num_in)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to("cuda", dtype)

    owners = torch.tensor([*slots, *[segments.TRAINING] * window], dtype=torch.int32).cuda()
    sites, rows = len(widths), len(owners)
    down = segments.SlotFactors(
        owners, [noise(4, rank, num_in) for _ in widths], [noise(rank, num_in) for _ in widths], [1.0] * sites, [None] * sites
    )
    up = segments.SlotFactors(
        owners, [noise(4, width, rank) for width in widths], [noise(width, rank) for width in widths], [0.5] * sites,
        [None] * sites,
    )
    x, packed = noise(rows, num_in), noise(rows, sum(widths))
    outs, wants = packed.split(widths, 1), packed.double().split(widths, 1)
    inner = [torch.full((rows, rank), math.nan, dtype=dtype, device="cuda") for _ in widths]
    for site, want in enumerate(wants):
        for slot in {*owners.tolist()} - {segments.NO_SLOT}:
            own = owners == slot
            trained = slot == segments.TRAINING
            a, b = (part.training[site] if trained else part.stacks[site][slot] for part in (down, up))
            middle = (x[own].double() @ a.double().T).to(dtype)
            want[own] += (0.5 if trained else 1.0) * (middle.double() @ b.double().T)
    segments.segment_pairs(outs, inner if window else None, x, down, up, accumulate=True)
    for out, want in zip(outs, wants, strict=True):
        close(out, want, TOLERANCE[dtype], "out")
    assert not window or not any(part.isnan().any() for part in inner)


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
