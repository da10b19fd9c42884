"""Packed layouts of frozen linears and of the output head give the plain matrix's products.

T rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.model import linear as module
from coserve.model.linear import FrozenLinear, OutputHead, PackedHead, PackedLinear, can_pack, make_head, make_linear

CPU = torch.device("cpu")
PACKED = [False, pytest.param(True, marks=pytest.mark.skipif(not can_pack(torch.float32, CPU), reason="no oneDNN here"))]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(have: Tensor, want: Tensor) -> None:
    assert have.dtype == torch.float32
    assert torch.allclose(have.double(), want, rtol=0, atol=2e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("packed", PACKED)
@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 33]), num_out=st.integers(1, 70), num_in=st.integers(1, 70), biased=st.booleans(),
    accumulate=st.booleans(), strided=st.booleans(), seed=st.integers(0, 10**6),
)
def test_both_products(
    packed: bool, rows: int, num_out: int, num_in: int, biased: bool, accumulate: bool, strided: bool, seed: int
) -> None:
    """Each product twice: a packed copy is made at the first use and must serve the second as well."""
    weight, bias = noise(num_out, num_in, seed=seed), noise(num_out, seed=seed + 1) if biased else None
    linear = make_linear(weight.clone(), None if bias is None else bias.clone(), packed=packed)
    assert isinstance(linear, PackedLinear) == packed
    margin = 3 if strided else 0
    x, grad = noise(rows, num_in + margin)[:, margin:], noise(rows, num_out + margin, seed=1)[:, margin:]
    want_y = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    want_dx = grad.double() @ weight.double()
    for _ in range(2):
        for product, given_, want in ((linear.forward, x, want_y), (linear.input_grad, grad, want_dx)):
            wide = torch.full((rows, want.shape[1] + 2 * margin), math.nan)
            out = wide[:, margin : margin + want.shape[1]]
            base = noise(*want.shape, seed=2)
            if accumulate:
                out.copy_(base)
            product(out, given_, accumulate)
            assert_close(out, want + base.double() if accumulate else want)
            assert not strided or wide[:, :margin].isnan().all(), "columns beside the output were written"


@pytest.mark.parametrize("packed", PACKED)
def test_rows_are_a_linear_of_some_outputs(packed: bool) -> None:
    weight, bias = noise(40, 24), noise(40, seed=1)
    whole = make_linear(weight.clone(), bias.clone(), packed=packed)
    x, grad = noise(5, 24, seed=2), noise(5, 17, seed=3)
    part = whole.rows(11, 28)
    assert isinstance(part, PackedLinear) == packed
    y, dx = torch.empty(5, 17), torch.empty(5, 24)
    part.forward(y, x)
    part.input_grad(dx, grad)
    assert_close(y, x.double() @ weight[11:28].double().T + bias[11:28].double())
    assert_close(dx, grad.double() @ weight[11:28].double())
    assert torch.equal(part.weight, weight[11:28])
    inner = part.rows(2, 5)
    inner.forward(y[:, :3], x)
    assert_close(y[:, :3], x.double() @ weight[13:16].double().T + bias[13:16].double())
    assert make_linear(weight, None, packed=packed).rows(0, 3).bias is None


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (100, 37), (257, 129)])
def test_the_plain_matrix_comes_back_bit_for_bit(packed: bool, shape: tuple[int, int]) -> None:
    weight = noise(*shape)
    assert torch.equal(make_linear(weight.clone(), None, packed=packed).weight, weight)


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


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("block", [7, 16, 8192])
def test_head_in_blocks(packed: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEAD_BLOCK", block)
    table = noise(45, 12)
    head = make_head(table, packed=packed)
    assert isinstance(head, OutputHead)
    assert isinstance(head, PackedHead) == packed
    for rows in (1, 6):
        x, grad = noise(rows, 12, seed=1), noise(rows, 45, seed=2)
        for _ in range(2):
            out = torch.full((rows, 45), math.nan)
            head.logits(out, x)
            assert_close(out, x.double() @ table.double().T)
            assert_close(head.input_grad(grad), grad.double() @ table.double())


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


def test_only_float32_on_the_cpu_packs() -> None:
    assert not can_pack(torch.float64, CPU)
    assert not can_pack(torch.bfloat16, CPU)
    assert not can_pack(torch.float32, torch.device("cuda"))
