"""Every kernel that runs against the reference and its autograd: float64 tight, float32 and bfloat16 loose.

T rows, D features, H query heads, G key-value heads, K head width, V vocabulary. Outputs are filled with NaN before a kernel
writes them, so that whatever it leaves out is seen; inputs and outputs are column slices of wider rows half of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.kernels import attention as kernel
from coserve.kernels import library, reference
from coserve.kernels.reference import dropout_keep, hash_key, mix32
from coserve.model.linear import OutputHead

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TOLERANCE = {F64: 1e-12, F32: 2e-5, BF16: 4e-2}
SEEDS = st.integers(0, 10**6)
DTYPES = st.sampled_from([F64, F32])
fast = settings(max_examples=40, deadline=None)


def label_logprobs(hidden_TD: Tensor, norm: Tensor, eps: float, head_VD: Tensor, labels: Tensor) -> Tensor:
    """log p(label) per row, through the final norm and the output head."""
    logits = reference.rmsnorm(hidden_TD, norm, eps) @ head_VD.T
    return torch.log_softmax(logits, dim=-1).gather(-1, labels[:, None])[:, 0]


class Maker:
    """Random tensors from one seed; with `strided`, as columns of wider rows."""

    def __init__(self, seed: int, dtype: torch.dtype, strided: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.strided = dtype, strided

    def noise(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = (torch.randn(shape, dtype=F64, generator=self.generator) * scale).to(dtype or self.dtype)
        return self._place(values)

    def blank(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._place(torch.full(shape, math.nan, dtype=dtype or self.dtype))

    def _place(self, values: Tensor) -> Tensor:
        if not self.strided or values.ndim != 2:
            return values
        wide = torch.full((values.shape[0], values.shape[1] + 5), math.nan, dtype=values.dtype)
        wide[:, 2:-3] = values
        return wide[:, 2:-3]


def assert_close(have: Tensor, want: Tensor, what: str = "", *, times: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Relative to the largest entry, by the precision of `have`, or of the `dtype` that it was computed in."""
    assert have.shape == want.shape, what
    error = float((have.to(F64) - want.to(F64)).abs().max()) if have.numel() else 0.0
    allowed = times * TOLERANCE[dtype or have.dtype] * max(1.0, float(want.abs().max()) if want.numel() else 0.0)
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def exact(*tensors: Tensor) -> list[Tensor]:
    """float64 leaves with the same values, for the reference."""
    return [t.detach().to(F64).contiguous().requires_grad_() for t in tensors]


# --- row kernels ----------------------------------------------------------------------------------------------------------


@fast
@given(
    rows=st.integers(1, 9), inner=st.integers(1, 9), width=st.integers(1, 9), alpha=st.sampled_from([1.0, 0.5, -2.0]),
    accumulate=st.booleans(), strided=st.booleans(), dtype=DTYPES, seed=SEEDS,
)
def test_matmul_into(
    rows: int, inner: int, width: int, alpha: float, accumulate: bool, strided: bool, dtype: torch.dtype, seed: int
) -> None:
    make = Maker(seed, dtype, strided)
    a, b, base = make.noise(rows, inner), make.noise(width, inner).T, make.noise(rows, width)
    out = base.clone() if accumulate else make.blank(rows, width)
    library.matmul_into(out, a, b, alpha=alpha, accumulate=accumulate)
    want = alpha * (a.to(F64) @ b.to(F64)) + (base.to(F64) if accumulate else 0)
    assert_close(out, want)


@fast
@given(
    rows=st.integers(1, 9), groups=st.integers(1, 4), width=st.integers(1, 8), accumulate=st.booleans(), strided=st.booleans(),
    dtype=DTYPES, seed=SEEDS, eps=st.sampled_from([1e-6, 1e-2]),
)
def test_rmsnorm_over_groups(
    rows: int, groups: int, width: int, accumulate: bool, strided: bool, dtype: torch.dtype, seed: int, eps: float
) -> None:
    make = Maker(seed, dtype, strided)
    x, weight, grad = make.noise(rows, groups * width), make.noise(width), make.noise(rows, groups * width)
    x += 0.1 * x.sign()  # away from rows of zeros, whose gradient is 1 / eps
    out = make.blank(rows, groups * width)
    library.rmsnorm(out, x, weight, eps)
    x_ref, weight_ref = exact(x, weight)
    want = reference.rmsnorm(x_ref, weight_ref, eps)
    assert_close(out, want.detach(), "forward")
    by_hand = x.to(F64).unflatten(-1, (groups, width))
    by_hand = by_hand / (by_hand.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(F64)
    assert_close(want.detach(), by_hand.flatten(1), "the reference itself")

    (d_x,) = torch.autograd.grad(want, [x_ref], grad.to(F64))
    base = make.noise(rows, groups * width)
    have = base.clone() if accumulate else make.blank(rows, groups * width)
    library.rmsnorm_dgrad(have, grad, x, weight, eps, accumulate)
    assert_close(have, d_x + base.to(F64) if accumulate else d_x, "gradient", times=10)


@fast
@given(
    rows=st.integers(1, 9), heads=st.integers(1, 4), half=st.integers(1, 4), strided=st.booleans(), inplace=st.booleans(),
    scale=st.sampled_from([1.0, 1.3]), dtype=DTYPES, seed=SEEDS,
)
def test_rope_and_its_inverse(
    rows: int, heads: int, half: int, strided: bool, inplace: bool, scale: float, dtype: torch.dtype, seed: int
) -> None:
    make = Maker(seed, dtype, strided)
    x, grad = make.noise(rows, heads * 2 * half), make.noise(rows, heads * 2 * half)
    angles = Maker(seed, dtype).noise(rows, half).repeat(1, 2)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    (x_ref,) = exact(x)
    want = reference.rope(x_ref, cos.to(F64), sin.to(F64))
    # each pair of features (i, i + K/2) is a complex number that is turned by the angle
    pairs = torch.view_as_complex(x_ref.detach().unflatten(-1, (heads, 2, half)).transpose(-1, -2).contiguous())
    turned = torch.view_as_real(pairs * torch.polar(torch.full_like(angles.to(F64), scale), angles.to(F64))[:, None, :half])
    assert_close(want.detach(), turned.transpose(-1, -2).flatten(1), "the reference itself", times=1 if dtype == F64 else 1e7)
    (d_x,) = torch.autograd.grad(want, [x_ref], grad.to(F64))
    for source, expected, inverse in ((x, want.detach(), False), (grad, d_x, True)):
        given_ = source.clone()
        out = source if inplace else make.blank(*source.shape)
        signed = torch.cat((-sin[:, :half], sin[:, half:]), -1)
        library.rope(out, source, cos, signed, inverse=inverse)
        assert_close(out, expected, f"inverse={inverse}")
        assert inplace or torch.equal(source, given_), "the input was written"


@fast
@given(rows=st.integers(1, 9), width=st.integers(1, 33), strided=st.booleans(), dtype=DTYPES, seed=SEEDS,
       scale=st.sampled_from([1.0, 30.0]))
def test_silu_mul(rows: int, width: int, strided: bool, dtype: torch.dtype, seed: int, scale: float) -> None:
    make = Maker(seed, dtype, strided)
    gate, up, grad = make.noise(rows, width, scale=scale), make.noise(rows, width), make.noise(rows, width)
    out = make.blank(rows, width)
    library.silu_mul(out, gate, up)
    gate_ref, up_ref = exact(gate, up)
    want = reference.silu_mul(gate_ref, up_ref)
    assert_close(want.detach(), (gate_ref / (1 + (-gate_ref).exp()) * up_ref).detach(), "the reference itself")
    assert_close(out, want.detach(), "forward")
    expected = torch.autograd.grad(want, [gate_ref, up_ref], grad.to(F64))
    have = make.blank(rows, width), make.blank(rows, width)
    library.silu_mul_dgrad(*have, grad, gate, up)
    for name, one, other in zip(("gate", "up"), have, expected, strict=True):
        assert_close(one, other, name)


# --- dropout and its hash -------------------------------------------------------------------------------------------------


def test_mix32_changes_half_of_the_bits() -> None:
    """Flipping any of the 32 input bits flips each output bit with probability 1/2 (and the map is one to one on samples)."""
    x = torch.randint(0, 2**32, (4096,), dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    base = mix32(x)
    assert int(base.min()) >= 0
    assert int(base.max()) < 2**32
    assert base.unique().numel() == x.unique().numel()
    for bit in range(32):
        changed = base ^ mix32(x ^ (1 << bit))
        shares = torch.stack([(changed >> place & 1).double().mean() for place in range(32)])
        assert abs(float(shares.mean()) - 0.5) < 0.01, bit
        assert float((shares - 0.5).abs().max()) < 6 * 0.5 / math.sqrt(4096), bit


def test_mix32_known_values() -> None:
    """Computed with Python integers from the published constants (lowbias32, Wellons 2018)."""
    for value in (0, 1, 0x9E3779B9, 2**32 - 1):
        x = value
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        assert int(mix32(torch.tensor(value))) == x ^ (x >> 16)


@fast
@given(counters=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4), place=st.integers(0, 3), bit=st.integers(0, 62))
def test_hash_key_hears_every_bit_of_every_counter(counters: list[int], place: int, bit: int) -> None:
    key = hash_key(*counters)
    assert 0 <= key < 2**32
    assert hash_key(*counters) == key
    other = list(counters)
    other[place % len(counters)] ^= 1 << bit
    assert hash_key(*other) != key
    assert hash_key(*counters, 0) != key, "one more counter is another key"


def test_hash_key_hears_the_order_and_half_of_the_bits_change() -> None:
    assert hash_key(1, 2) != hash_key(2, 1)
    for place in range(2):
        for bit in range(63):
            flips = []
            for n in range(400):
                counters = [7, n, n * n]
                before = hash_key(*counters)
                counters[place] ^= 1 << bit
                flips.append((before ^ hash_key(*counters)).bit_count())
            assert abs(sum(flips) / len(flips) - 16) < 6 * math.sqrt(8 / 400), (place, bit)


def row_keys(example: int, rows: int, seed: int = 0, step: int = 0) -> Tensor:
    """As the runtime makes them."""
    return mix32(torch.arange(rows) ^ hash_key(seed, step, example))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_dropout_keeps_its_share(p: float) -> None:
    keep = dropout_keep(row_keys(3, 512), hash_key(1), 256, p)
    count = keep.numel()
    assert abs(float(keep.double().sum()) - count * (1 - p)) < 4 * math.sqrt(count * p * (1 - p))
    for axis, size in ((0, 512), (1, 256)):
        shares = keep.double().mean(axis)
        assert float((shares - (1 - p)).abs().max()) < 5.5 * math.sqrt(p * (1 - p) / size), "a row or column stands out"
    together = (keep[:, 1:] & keep[:, :-1]).double().mean()
    assert abs(float(together) - (1 - p) ** 2) < 6 * math.sqrt((1 - p) ** 2 / count), "neighbours are not independent"


def test_dropout_mask_is_another_for_each_site_step_seed_and_example_only() -> None:
    def mask(*, site: int = 5, step: int = 1, seed: int = 2, example: int = 3) -> Tensor:
        return dropout_keep(row_keys(example, 64, seed, step), hash_key(0, site), 64, 0.5)

    base = mask()
    assert torch.equal(base, mask())
    for other in (mask(site=6), mask(step=2), mask(seed=3), mask(example=4), mask(seed=1, step=2)):
        agreement = float((base == other).double().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / 64, "masks are related"


@fast
@given(
    rows=st.integers(1, 12), width=st.integers(1, 12), cut=st.integers(0, 12), p=st.sampled_from([0.1, 0.5]), seed=SEEDS,
    accumulate=st.booleans(), strided=st.booleans(), dtype=DTYPES,
)
def test_dropout_of_parts_is_the_part_of_dropout(
    rows: int, width: int, cut: int, p: float, seed: int, accumulate: bool, strided: bool, dtype: torch.dtype
) -> None:
    make = Maker(seed, dtype, strided)
    x, base = make.noise(rows, width), make.noise(rows, width)
    keys, site = row_keys(seed, rows), hash_key(9, seed)
    want = reference.dropout(x.to(F64), keys, site, p)
    assert bool(((want == 0) | (want - x.to(F64) / (1 - p)).abs().lt(1e-12)).all())
    out = base.clone() if accumulate else make.blank(rows, width)
    for part in (slice(0, min(cut, rows)), slice(min(cut, rows), rows)):
        library.dropout(out[part], x[part], keys[part], site, p, accumulate)
    assert_close(out, want + base.to(F64) if accumulate else want)


# --- the loss head --------------------------------------------------------------------------------------------------------


@fast
@given(
    rows=st.integers(1, 11), width=st.integers(2, 8), vocab=st.integers(2, 40), chunk=st.integers(1, 12),
    forward_only=st.booleans(), dtype=DTYPES, seed=SEEDS, scale=st.sampled_from([0.1, 1.0, 40.0]),
)
def test_label_rows_in_chunks(
    rows: int, width: int, vocab: int, chunk: int, forward_only: bool, dtype: torch.dtype, seed: int, scale: float
) -> None:
    make = Maker(seed, dtype)
    hidden, norm, table = make.noise(rows, width), make.noise(width), make.noise(vocab, width, scale=scale)
    labels = torch.randint(0, vocab, (rows,), generator=make.generator)
    logprobs, correct = make.blank(rows), torch.zeros(rows, dtype=torch.bool)
    grad = None if forward_only else make.blank(rows, width)
    workspace = make.blank(chunk, vocab)
    library.label_rows(logprobs, correct, grad, hidden, labels, norm, 1e-5, OutputHead(table), workspace)

    hidden_ref, norm_ref, table_ref = exact(hidden, norm, table)
    want = label_logprobs(hidden_ref, norm_ref, 1e-5, table_ref, labels)
    assert_close(logprobs, want.detach(), "log-probabilities", times=4)
    logits = (reference.rmsnorm(hidden_ref, norm_ref, 1e-5) @ table_ref.T).detach()
    top = logits.topk(2, dim=1)
    sure = (top.values[:, 0] - top.values[:, 1]) > 1e-3 * scale  # in float32 a tie may fall either way
    assert torch.equal(correct[sure], (top.indices[:, 0] == labels)[sure])
    if grad is not None:
        (expected,) = torch.autograd.grad(want.sum(), [hidden_ref])
        assert_close(grad, expected, "gradient", times=40)


def test_norm_and_loss_head_in_bfloat16_sum_in_float32() -> None:
    """Wide rows: sums kept in bfloat16 would be off by a percent and more."""
    make = Maker(5, BF16)
    hidden, norm, table = make.noise(6, 512), make.noise(512), make.noise(300, 512, scale=0.05)
    grad, labels = make.noise(6, 512), torch.randint(0, 300, (6,), generator=make.generator)
    hidden_ref, norm_ref, table_ref = exact(hidden, norm, table)
    normed = reference.rmsnorm(hidden_ref, norm_ref, 1e-5)
    (d_hidden,) = torch.autograd.grad(normed, [hidden_ref], grad.to(F64))
    out, have = make.blank(6, 512), make.noise(6, 512)
    library.rmsnorm(out, hidden, norm, 1e-5)
    assert_close(out, normed.detach(), "norm", times=0.3)
    base = have.clone().to(F64)
    library.rmsnorm_dgrad(have, grad, hidden, norm, 1e-5, True)
    assert_close(have, base + d_hidden, "gradient of the norm", times=0.3)

    logprobs, correct, rows = torch.empty(6), torch.empty(6, dtype=torch.bool), make.blank(6, 512)
    library.label_rows(logprobs, correct, rows, hidden, labels, norm, 1e-5, OutputHead(table), make.blank(4, 300))
    want = label_logprobs(hidden_ref, norm_ref, 1e-5, table_ref, labels)
    assert float((logprobs - want).detach().abs().max()) < 0.03
    (expected,) = torch.autograd.grad(want.sum(), [hidden_ref])
    assert float((rows - expected).norm() / expected.norm()) < 0.02


def test_a_bfloat16_norm_is_the_rounded_exact_norm() -> None:
    """A factor of the row that was itself rounded to bfloat16 would change about every second entry."""
    x, ones = Maker(6, BF16).noise(8, 512), torch.ones(512, dtype=BF16)
    out = torch.empty_like(x)
    library.rmsnorm(out, x, ones, 1e-5)
    want = reference.rmsnorm(x.to(F64), ones.to(F64), 1e-5).to(BF16)
    assert float((out == want).double().mean(1).min()) > 0.98


class Logits:
    """A head whose logits are given, whatever the hidden rows; its gradient is not asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.given = logits

    def logits(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self.given)

    def input_grad(self, grad: Tensor) -> Tensor:
        raise AssertionError

    rows = input_grad


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_label_rows_with_large_logits_and_improbable_labels(offset: float) -> None:
    """log p of -200, whose p is 0 in float32, comes out exactly; nothing overflows."""
    gaps = [0.0, 1.0, 50.0, 200.0, 1000.0]
    logits = torch.zeros(len(gaps), 7)
    for row, gap in enumerate(gaps):
        logits[row] = torch.tensor([offset, offset - gap, *[offset - 2000.0] * 5])
    labels = torch.ones(len(gaps), dtype=torch.int64)
    logprobs, correct = torch.full((5,), math.nan), torch.zeros(5, dtype=torch.bool)
    library.label_rows(
        logprobs, correct, None, torch.randn(5, 4), labels, torch.ones(4), 1e-5, Logits(logits), torch.empty(5, 7)
    )
    want = torch.tensor([-math.log1p(math.exp(-gap)) - gap for gap in gaps])
    assert torch.allclose(logprobs, want, rtol=1e-6, atol=1e-3 if offset else 1e-6)
    assert correct.tolist() == [True, False, False, False, False]
    assert torch.isfinite(logprobs).all()


def test_label_rows_with_a_gradient_of_a_certain_label() -> None:
    """A label of probability 1 in float32: log p is 0 and so is its gradient."""
    table = torch.tensor([[300.0, 0.0], [-300.0, 0.0], [0.0, 0.0]])
    logprobs, correct, grad = torch.empty(2), torch.empty(2, dtype=torch.bool), torch.empty(2, 2)
    hidden, labels = torch.tensor([[3.0, 0.1], [3.0, 0.1]]), torch.tensor([0, 1])
    library.label_rows(
        logprobs, correct, grad, hidden, labels, torch.ones(2), 1e-5, OutputHead(table), torch.empty(2, 3)
    )
    (hidden_ref,) = exact(hidden)
    want = label_logprobs(hidden_ref, torch.ones(2, dtype=F64), 1e-5, table.to(F64), labels)
    assert float(logprobs[0]) == 0.0
    assert float(logprobs[1]) == pytest.approx(float(want[1].detach()), rel=1e-6)
    assert float(want[1].detach()) < -800
    (expected,) = torch.autograd.grad(want.sum(), [hidden_ref])
    assert torch.allclose(grad.to(F64), expected, rtol=1e-4, atol=1e-4)


# --- attention ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One sequence of `length` rows that starts at row `begin` of an arena, queries [first, last), and its shapes."""

    begin: int
    length: int
    first: int
    last: int
    kv_heads: int
    share: int
    width: int
    window: int | None
    block: int
    strided: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn, *, max_length: int = 30, widths: tuple[int, ...] = (2, 5, 8)) -> Case:
    begin, length = draw(st.integers(0, 7)), draw(st.integers(1, max_length))
    first = draw(st.integers(0, length - 1))
    last = draw(st.one_of(st.just(length), st.integers(first + 1, length)))
    return Case(
        begin, length, begin + first, begin + last, draw(st.integers(1, 3)), draw(st.integers(1, 3)),
        draw(st.sampled_from(widths)), draw(st.one_of(st.none(), st.integers(1, 20))), draw(st.sampled_from([1, 3, 4, 8, 256])),
        draw(st.booleans()), draw(SEEDS),
    )


class Arena:
    """Random K and V rows of an arena, with NaN where the kernel has no business, and the reference's answers."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.make = make = Maker(case.seed, dtype, case.strided)
        self.kv, self.queries = case.kv_heads * case.width, case.kv_heads * case.share * case.width
        rows = case.begin + case.length + 3
        self.k, self.v = make.noise(rows, self.kv), make.noise(rows, self.kv)
        for tensor in (self.k, self.v):
            tensor[: case.begin] = math.nan
            tensor[case.last :] = math.nan
        num = case.last - case.first
        self.q, self.grad = make.noise(num, self.queries), make.noise(num, self.queries)

    def reference(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Output, log-sum-exp, and the gradients of q, and of k and v of rows [begin, last)."""
        case = self.case
        used = slice(case.begin, case.last)
        q, k, v = exact(self.q, self.k[used], self.v[used])
        heads = [t.unflatten(-1, (-1, case.width)) for t in (q, k, v)]
        out, lse = reference.attention(*heads, window=case.window)
        grads = torch.autograd.grad(out.flatten(1), [q, k, v], self.grad.to(F64))
        return out.flatten(1).detach(), lse.detach(), list(grads)

    def forward(self, q: Tensor | None = None) -> tuple[Tensor, Tensor]:
        case, q = self.case, self.q if q is None else q
        out = self.make.blank(*self.q.shape)
        lse = self.make.blank(self.q.shape[0], case.kv_heads * case.share, dtype=torch.promote_types(self.dtype, F32))
        kernel.attention(
            out, lse, q, self.k, self.v, width=case.width, begin=case.begin, first=case.first, last=case.last,
            window=case.window,
        )
        return out, lse

    def backward(self, out: Tensor, lse: Tensor, q: Tensor | None = None) -> list[Tensor]:
        """Gradients beyond what the accumulators held before, which rows of other sequences still hold."""
        case, q = self.case, self.q if q is None else q
        wide = torch.promote_types(self.dtype, F32)
        d_q = self.make.blank(*self.q.shape)
        held = [self.make.noise(*self.k.shape, dtype=wide) for _ in range(2)]
        d_k, d_v = (t.clone() for t in held)
        kernel.attention_dgrad(
            d_q, d_k, d_v, self.grad, q, self.k, self.v, out, lse, width=case.width, begin=case.begin, first=case.first,
            last=case.last, window=case.window,
        )
        used = slice(case.begin, case.last)
        for have, before in ((d_k, held[0]), (d_v, held[1])):
            changed = (have != before).any(dim=1)
            changed[used] = False
            assert not changed.any(), "rows of another sequence were written"
        return [d_q, d_k[used] - held[0][used], d_v[used] - held[1][used]]

    def compare(self, q: Tensor | None = None, *, times: float = 10.0) -> None:
        want, want_lse, want_grads = self.reference()
        out, lse = self.forward(q)
        assert_close(out, want, "output", dtype=self.dtype)
        assert_close(lse, want_lse, "log-sum-exp", dtype=self.dtype)
        for name, have, expected in zip("qkv", self.backward(out, lse, q), want_grads, strict=True):
            assert_close(have, expected, f"d_{name}", times=times, dtype=self.dtype)


@settings(max_examples=150, deadline=None)
@given(case=cases(), dtype=DTYPES)
def test_attention_of_any_window(case: Case, dtype: torch.dtype) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "QUERY_BLOCK", case.block)
        Arena(case, dtype).compare()


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("first", [0, 70, 255, 256, 257])
def test_attention_across_blocks_of_full_size(first: int, window: int | None) -> None:
    case = Case(3, 601, 3 + first, 604, 2, 3, 8, window, 256, False, 1)
    Arena(case, F64).compare()


def test_attention_blocks_of_every_kind_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of diagonals, odd and even pasts, masked blocks: the cases above do reach them."""
    monkeypatch.setattr(kernel, "QUERY_BLOCK", 4)
    blocks = list(kernel._blocks(2, 5, 20, None))
    assert [(b.row, b.row_end) for b in blocks] == [(5, 6), (6, 10), (10, 14), (14, 18), (18, 20)]
    assert list(kernel._diagonals(blocks)) == [(5, 6, 1), (6, 18, 3), (18, 20, 1)]
    assert {(b.row - 2) % 2 for b in blocks} == {0, 1}
    masked = list(kernel._blocks(2, 5, 20, 6))
    assert [b.keys_from for b in masked] == [None, 2, 5, 9, 13]
    assert list(kernel._diagonals(masked)) == [(5, 6, 1)]
    assert [b.keys_from for b in kernel._blocks(0, 0, 8, 8)] == [None, None], "a window as long as the sequence cuts nothing"


@settings(max_examples=25, deadline=None)
@given(case=cases(), cuts=st.lists(st.integers(1, 29), max_size=3))
def test_windows_of_queries_give_what_one_window_gives(case: Case, cuts: list[int]) -> None:
    """Forward and backward window by window, right to left, into the same accumulators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "QUERY_BLOCK", case.block)
        arena = Arena(case, F64)
        want, want_lse, want_grads = arena.reference()
        edges = sorted({case.first, case.last, *(c for c in (case.begin + cut for cut in cuts) if case.first < c < case.last)})
        shared = {"width": case.width, "begin": case.begin, "window": case.window}
        out, lse = torch.empty_like(arena.q), torch.empty_like(want_lse)
        spans = [(slice(a - case.first, b - case.first), a, b) for a, b in pairwise(edges)]
        for rows, first, last in spans:
            kernel.attention(out[rows], lse[rows], arena.q[rows], arena.k, arena.v, first=first, last=last, **shared)
        d_q, d_k, d_v = (torch.zeros_like(t) for t in (arena.q, arena.k, arena.v))
        for rows, first, last in reversed(spans):
            kernel.attention_dgrad(
                d_q[rows], d_k, d_v, arena.grad[rows], arena.q[rows], arena.k, arena.v, out[rows], lse[rows],
                first=first, last=last, **shared,
            )
        used = slice(case.begin, case.last)
        for have, expected in zip((out, lse, d_q, d_k[used], d_v[used]), (want, want_lse, *want_grads), strict=True):
            assert_close(have, expected, times=10)


class OtherDevice(Tensor):
    """A tensor that says it is not on the CPU, so that the kernels take the path of other devices."""

    is_cpu = property(lambda self: False)  # type: ignore[assignment]


def elsewhere(x: Tensor) -> Tensor:
    return x.as_subclass(OtherDevice)


@settings(max_examples=60, deadline=None)
@given(case=cases(max_length=16), dtype=DTYPES)
def test_attention_without_the_library_call(case: Case, dtype: torch.dtype) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the library call is for the CPU")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "QUERY_BLOCK", case.block)
        patch.setattr(kernel, "_flash", refuse)
        patch.setattr(kernel, "_flash_backward", refuse)
        arena = Arena(case, dtype)
        arena.compare(elsewhere(arena.q))


@pytest.mark.parametrize("other_device", [False, True])
def test_attention_in_bfloat16(other_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "QUERY_BLOCK", 8)
    arena = Arena(Case(2, 29, 5, 31, 2, 2, 16, None, 8, True, 4), BF16)
    arena.compare(elsewhere(arena.q) if other_device else None, times=1)


def test_attention_with_scores_far_apart() -> None:
    """Scores of several hundred: the parts of a row's keys are merged by log-sum-exps without overflow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "QUERY_BLOCK", 4)
        arena = Arena(Case(0, 19, 0, 19, 2, 2, 4, None, 4, False, 2), F64)
        arena.q *= 300
        want, want_lse, _ = arena.reference()
        out, lse = arena.forward()
        assert float(want_lse.abs().max()) > 500
        assert_close(out, want)
        assert_close(lse, want_lse)


@settings(max_examples=60, deadline=None)
@given(case=cases(max_length=20), contexts=st.lists(st.integers(1, 20), min_size=1, max_size=5), dtype=DTYPES)
def test_decode_attention(case: Case, contexts: list[int], dtype: torch.dtype) -> None:
    """A row per sequence, padded to the longest; what a sequence or its window doesn't reach is excluded by the bias."""
    make = Maker(case.seed, dtype, case.strided)
    batch, longest = len(contexts), max(contexts)
    q = make.noise(batch, case.kv_heads * case.share * case.width)
    k, v = (make.noise(batch, case.kv_heads, longest, case.width) for _ in range(2))
    bias = torch.full((batch, 1, 1, longest), -math.inf, dtype=dtype)
    for row, context in enumerate(contexts):
        first = 0 if case.window is None else max(0, context - case.window)
        bias[row, ..., first:context] = 0
    out = make.blank(*q.shape)
    value_rows = torch.arange(batch * case.kv_heads * longest, dtype=torch.int32).view(batch, case.kv_heads, 1, longest)
    value_rows = value_rows.expand(-1, -1, case.share, -1).flatten()
    starts = torch.arange(0, len(value_rows), longest, dtype=torch.int32)
    kernel.decode_attention(out, q, k, v.reshape(-1, case.width), value_rows, starts, bias)
    for row, context in enumerate(contexts):
        q_THK = q[row : row + 1].to(F64).unflatten(-1, (-1, case.width))
        k_SGK, v_SGK = (t[row, :, :context].to(F64).transpose(0, 1) for t in (k, v))
        want, _ = reference.attention(q_THK, k_SGK, v_SGK, window=case.window)
        assert_close(out[row : row + 1], want.flatten(1), f"row {row}")


def test_attention_in_bfloat16_is_as_exact_as_the_library() -> None:
    """Against float64: scores of ten and more, over several blocks of queries and over gathered keys of decode rows. Merged
    parts cost one rounding more; scores that were rounded to bfloat16 would be off several times as far."""
    heads, share, width, length = 2, 3, 64, 700
    make = Maker(3, BF16)
    q = make.noise(length, heads * share * width, scale=3)
    k, v = make.noise(length, heads * width), make.noise(length, heads * width)

    def theirs(dtype: torch.dtype) -> Tensor:
        split = [t.to(dtype).unflatten(-1, (-1, width)).transpose(0, 1)[None] for t in (q, k, v)]
        found = torch.nn.functional.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
        return found[0].transpose(0, 1).flatten(1)

    want = theirs(F64)
    allowed = 1.5 * float((theirs(BF16) - want).norm())
    out, lse = make.blank(*q.shape), torch.empty(length, heads * share)
    kernel.attention(out, lse, q, k, v, width=width, begin=0, first=0, last=length, window=None)
    assert float((out - want).norm()) <= allowed
    rows = torch.arange(length)[-128:]
    keys, values = (t.unflatten(-1, (-1, width)).transpose(0, 1).expand(len(rows), -1, -1, -1) for t in (k, v))
    bias = torch.zeros(len(rows), 1, 1, length).masked_fill_(torch.arange(length) > rows[:, None, None, None], -math.inf)
    value_rows = torch.arange(heads * length, dtype=torch.int32).view(1, heads, 1, length)
    value_rows = value_rows.expand(len(rows), -1, share, -1).flatten()
    starts = torch.arange(0, len(value_rows), length, dtype=torch.int32)
    decoded = make.blank(len(rows), q.shape[1])
    kernel.decode_attention(decoded, q[rows], keys, values[0].reshape(-1, width), value_rows, starts, bias.to(BF16))
    allowed = 1.5 * float((theirs(BF16)[rows] - want[rows]).norm())
    assert float((decoded - want[rows]).norm()) <= allowed


def test_reference_attention_is_softmax_by_hand() -> None:
    """The specification itself against scaled_dot_product_attention and, for a sliding window, against a loop."""
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 3, dtype=F64), torch.randn(8, 2, 3, dtype=F64), torch.randn(8, 2, 3, dtype=F64)
    out, lse = reference.attention(q, k, v)
    mask = torch.ones(5, 8, dtype=torch.bool).tril(diagonal=3)
    want = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], attn_mask=mask, enable_gqa=True
    )
    assert torch.allclose(out, want[0].transpose(0, 1), atol=1e-12)
    out, lse = reference.attention(q, k, v, window=2)
    for row in range(5):
        for head in range(4):
            seen = [3 + row - 1, 3 + row]
            scores = torch.stack([q[row, head] @ k[key, head // 2] / math.sqrt(3) for key in seen])
            assert float(lse[row, head]) == pytest.approx(float(scores.logsumexp(0)))
            assert torch.allclose(out[row, head], scores.softmax(0) @ v[seen, head // 2], atol=1e-12)
