"""Packed layouts of frozen linears and of the output head give the plain matrix's products, also where each is held once.

T rows, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.kernels.processor import bfloat16_products
from coserve.model import linear as module
from coserve.model.linear import FrozenLinear, OutputHead, PackedHead, PackedLinear, can_pack, make_head, make_linear

CPU = torch.device("cpu")
PACKED = [False, pytest.param(True, marks=pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="no oneDNN here"))]


class Layout(NamedTuple):
    dtype: torch.dtype
    packed: bool
    one_copy: bool = False


def needs_packing(layout: Layout) -> object:
    """The layout as a parameter, skipped where the processor has it not."""
    reason = f"no packed {layout.dtype} here"
    return pytest.param(layout, marks=pytest.mark.skipif(layout.packed and not can_pack(layout.dtype, CPU), reason=reason))


LAYOUTS = [
    needs_packing(Layout(dtype, *how))
    for dtype in (torch.float32, torch.bfloat16) for how in ((False,), (True,), (True, True))
]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def made(layout: Layout, weight: Tensor, bias: Tensor | None) -> FrozenLinear:
    return make_linear(
        weight.clone(), None if bias is None else bias.clone(), packed=layout.packed, one_copy=layout.one_copy
    )


def assert_close(have: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """To a few units in the last place of the largest element."""
    assert have.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(have.double(), want, rtol=0, atol=tolerance * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 33]), num_out=st.integers(1, 70), num_in=st.integers(1, 70), biased=st.booleans(),
    accumulate=st.booleans(), strided=st.booleans(), seed=st.integers(0, 10**6),
)
def test_both_products(
    layout: Layout, rows: int, num_out: int, num_in: int, biased: bool, accumulate: bool, strided: bool, seed: int
) -> None:
    """Each product twice: a packed copy is made at the first use and must serve the second as well."""
    dtype = layout.dtype
    weight = noise(num_out, num_in, seed=seed, dtype=dtype)
    bias = noise(num_out, seed=seed + 1, dtype=dtype) if biased else None
    linear = made(layout, weight, bias)
    assert isinstance(linear, PackedLinear) == layout.packed
    margin = 3 if strided else 0
    x = noise(rows, num_in + margin, dtype=dtype)[:, margin:]
    grad = noise(rows, num_out + margin, seed=1, dtype=dtype)[:, margin:]
    want_y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    want_dx = grad.double() @ weight.double()
    for _ in range(2):
        for product, given_, want in ((linear.forward, x, want_y), (linear.input_grad, grad, want_dx)):
            wide = torch.full((rows, want.shape[1] + 2 * margin), math.nan, dtype=dtype)
            out = wide[:, margin : margin + want.shape[1]]
            base = noise(*want.shape, seed=2, dtype=dtype)
            if accumulate:
                out.copy_(base)
            product(out, given_, accumulate)
            assert_close(out, want + base.double() if accumulate else want, dtype)
            assert not strided or wide[:, :margin].isnan().all(), "columns beside the output were written"
    product = linear.product(x)
    assert (product is not None) == (layout.packed and not (layout.one_copy and dtype == torch.bfloat16))
    if product is not None:
        out = torch.empty(rows, num_out, dtype=dtype)
        linear.forward(out, x)
        assert torch.equal(product, out)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_a_linear_of_some_outputs(layout: Layout) -> None:
    dtype = layout.dtype
    weight, bias = noise(40, 24, dtype=dtype), noise(40, seed=1, dtype=dtype)
    whole = made(layout, weight, bias)
    x, grad = noise(5, 24, seed=2, dtype=dtype), noise(5, 17, seed=3, dtype=dtype)
    part = whole.rows(11, 28)
    part.hold_one_copy(layout.one_copy)
    assert isinstance(part, PackedLinear) == layout.packed
    y, dx = torch.empty(5, 17, dtype=dtype), torch.empty(5, 24, dtype=dtype)
    part.forward(y, x)
    part.input_grad(dx, grad)
    assert_close(y, x.double() @ weight[11:28].double().T + bias[11:28].double(), dtype)
    assert_close(dx, grad.double() @ weight[11:28].double(), dtype)
    assert torch.equal(part.weight, weight[11:28])
    inner = part.rows(2, 5)
    inner.forward(y[:, :3], x)
    assert_close(y[:, :3], x.double() @ weight[13:16].double().T + bias[13:16].double(), dtype)
    assert made(layout, weight, None).rows(0, 3).bias is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (100, 37), (257, 129)])
def test_the_plain_matrix_comes_back_bit_for_bit(layout: Layout, shape: tuple[int, int]) -> None:
    weight = noise(*shape, dtype=layout.dtype)
    assert torch.equal(made(layout, weight, None).weight, weight)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_copy_may_be_asked_for_and_taken_back(dtype: torch.dtype, first: bool) -> None:
    """In any order of uses the matrix and its products stay what they are, also those of a part of it."""
    if not can_pack(dtype, CPU):
        pytest.skip(f"no packed {dtype} here")
    weight = noise(40, 24, dtype=dtype)
    whole = make_linear(weight.clone(), None, packed=True, one_copy=first)
    part = whole.rows(8, 24)
    x, grad = noise(3, 24, seed=1, dtype=dtype), noise(3, 40, seed=2, dtype=dtype)
    for one_copy in (first, not first, first, not first):
        whole.hold_one_copy(one_copy)
        part.hold_one_copy(one_copy)
        y, dx, dx_part = (torch.empty(3, width, dtype=dtype) for width in (16, 24, 24))
        part.input_grad(dx_part, grad[:, 8:24])
        whole.input_grad(dx, grad)
        part.forward(y, x)
        assert_close(y, x.double() @ weight[8:24].double().T, dtype)
        assert_close(dx, grad.double() @ weight.double(), dtype)
        assert_close(dx_part, grad[:, 8:24].double() @ weight[8:24].double(), dtype)
        assert torch.equal(whole.weight, weight) and torch.equal(part.weight, weight[8:24])
        assert (whole.copied_bytes > 0) == (part.copied_bytes > 0) == (not one_copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_counted_and_dropped(dtype: torch.dtype) -> None:
    """Forward of a whole matrix has its one copy; everything else has one more, of the matrix's size, unless one is all."""
    if not can_pack(dtype, CPU):
        pytest.skip(f"no packed {dtype} here")
    whole = make_linear(noise(64, 32, dtype=dtype), None, packed=True)
    part, head = whole.rows(0, 16), make_head(noise(128, 32, dtype=dtype), packed=True)
    assert isinstance(head, PackedHead)

    def use_all() -> None:
        for linear in (whole, part):
            num_out, num_in = linear.weight.shape
            linear.forward(torch.empty(1, num_out, dtype=dtype), noise(1, num_in, dtype=dtype))
            linear.input_grad(torch.empty(1, num_in, dtype=dtype), noise(1, num_out, dtype=dtype))
            linear.prepare(backward=True)
        head.logits(torch.empty(1, 128, dtype=dtype), noise(1, 32, dtype=dtype))
        head.input_grad(noise(1, 128, dtype=dtype))
        head.prepare()

    assert (whole.copied_bytes, part.copied_bytes, head.copied_bytes, head.layout) == (0, 0, 0, "packed")
    use_all()
    sizes = [dtype.itemsize * n for n in (64 * 32, 2 * 16 * 32, 2 * 128 * 32)]
    assert [whole.copied_bytes, part.copied_bytes, head.copied_bytes] == sizes
    for each in (whole, part, head):
        each.hold_one_copy(True)
    use_all()
    assert (whole.copied_bytes, part.copied_bytes, head.copied_bytes, head.layout) == (0, 0, 0, "held once")
    for each in (whole, part, head):
        each.hold_one_copy(False)
    use_all()
    assert [whole.copied_bytes, part.copied_bytes, head.copied_bytes] == sizes


def test_a_plain_linear_shares_memory_with_its_rows() -> None:
    weight = noise(6, 4)
    part = FrozenLinear(weight).rows(2, 4)
    assert part.weight.data_ptr() == weight[2:].data_ptr()


@pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="no oneDNN here")
def test_a_packed_linear_does_not_hold_the_matrix() -> None:
    """The caller may drop or overwrite it: there is one copy of the weights."""
    weight = noise(16, 8)
    kept = weight.clone()
    linear = make_linear(weight, None, packed=True)
    weight.zero_()
    assert torch.equal(linear.weight, kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [7, 16, 8192])
def test_head_in_blocks(layout: Layout, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_BLOCK", block)
    dtype = layout.dtype
    table = noise(45, 12, dtype=dtype)
    head = make_head(table, packed=layout.packed, one_copy=layout.one_copy)
    assert isinstance(head, OutputHead)
    assert isinstance(head, PackedHead) == layout.packed
    for rows in (1, 6):
        x, grad = noise(rows, 12, seed=1, dtype=dtype), noise(rows, 45, seed=2, dtype=dtype)
        for _ in range(2):
            out = torch.full((rows, 45), math.nan, dtype=dtype)
            head.logits(out, x)
            assert_close(out, x.double() @ table.double().T, dtype)
            assert_close(head.input_grad(grad), grad.double() @ table.double(), dtype)


@pytest.mark.parametrize("packed", PACKED)
def test_head_rows_are_copies(packed: bool) -> None:
    table = noise(9, 4)
    head = make_head(table, packed=packed)
    ids = torch.tensor([8, 0, 8])
    rows = head.rows(ids)
    assert torch.equal(rows, table[ids])
    rows.zero_()
    assert table.abs().min() > 0, "the loss head subtracts in place from these rows"
    grad = head.input_grad(torch.zeros(2, 9))
    grad.add_(1)
    assert head.input_grad(torch.zeros(2, 9)).abs().max() == 0


def test_what_packs() -> None:
    assert can_pack(torch.float32, CPU) == torch.backends.mkldnn.is_available()
    assert can_pack(torch.bfloat16, CPU) == bfloat16_products().supported
    assert not can_pack(torch.float64, CPU)
    assert not can_pack(torch.float32, torch.device("cuda"))
    assert not can_pack(torch.bfloat16, torch.device("cuda"))
