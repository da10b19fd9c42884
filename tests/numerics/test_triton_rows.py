"""Row-wise Triton kernels against `reference.py`, in Triton's interpreter: memory that none may read or write holds NaN.

The interpreter has to be chosen before Triton is imported: `test_all_in_the_interpreter` runs this file in a process of its
own. The last test runs whole passes and units with every kernel, and holds them to the library's calls.
T rows, D features, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coserve.config.settings import LoraConfig
from coserve.core import Direction, Example, Unit
from coserve.kernels import attention, cuda_attention, library, reference
from coserve.kernels import triton as kernels
from coserve.kernels.triton import attention_grads, copies, rows, segments
from coserve.peft.kinds import new_adapter
from coserve.runtime import executor as executor_module
from coserve.runtime import keeping, spans
from coserve.runtime import rows as train_rows
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.fused import PassExecutor, TrainWindow
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.runtime.microbatch import pack
from coserve.runtime.plans import training_plans
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from tests.tiny_directory import build_tiny_directory
from tests.triton_interpreter import INTERPRETED, compiled, interpreted, needs_triton, run_in_the_interpreter

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [(1, 64), (1, 100), (1, 576), (1, 4096), (3, 128), (40, 16), (9, 24)]
"""Groups of a row, and their width."""


@pytest.mark.full
@needs_triton
@compiled
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__, COSERVE_NATIVE="0")


@pytest.fixture(autouse=True)
def nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 off where a device rounds to the nearest bfloat16. Here it rounds too."""
    if not (INTERPRETED and kernels.available()):
        return
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        if (source, target) == (language.float32, language.bfloat16):
            bits = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).bfloat16().view(torch.int16)
            return bits.numpy().view(np.uint16)
        return convert(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)



class Rows:
    """Random rows that are column slices of wider ones, around which all is NaN."""

    def __init__(self, seed: int, num_rows: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.num_rows, self.dtype = num_rows, dtype
        self.wide: list[tuple[Tensor, int, int]] = []

    def slice(self, width: int, *, filled: bool = True, left: int = 3, right: int = 5) -> Tensor:
        whole = torch.full((self.num_rows + 2, left + width + right), math.nan, dtype=self.dtype)
        part = whole[1:-1, left : left + width]
        if filled:
            part.copy_(torch.randn(self.num_rows, width, generator=self.generator) * 2)
        self.wide.append((whole, left, width))
        return part

    def vector(self, width: int) -> Tensor:
        return (1 + 0.3 * torch.randn(width, generator=self.generator)).to(self.dtype)

    def check(self) -> None:
        """Nothing but the slices was written."""
        for whole, left, width in self.wide:
            around = whole.clone()
            around[1:-1, left : left + width] = math.nan
            assert around.isnan().all(), "wrote outside its rows"
            assert not whole[1:-1, left : left + width].isnan().any()


def close(have: Tensor, want: Tensor, plain: Tensor) -> None:
    """have: the kernel's; want: float64; plain: what the library's calls give in the same dtype."""
    if have.dtype == torch.float32:
        torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)
        return
    own, theirs = (have.double() - want).abs(), (plain.double() - want).abs()
    assert own.max() <= 2 * theirs.max() and own.mean() <= 1.05 * theirs.mean()


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def plainly(call: Callable[..., None], shape: Tensor, *args: object) -> Tensor:
    out = torch.empty_like(shape, memory_format=torch.contiguous_format)
    call(out, *args)
    return out


def in_float64(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """The reference, with the model's rounding before the weight."""
    one = torch.ones_like(weight.double())
    normed = reference.rmsnorm(x.double(), one, eps).to(dtype).double()
    return (normed.unflatten(1, (-1, weight.shape[0])) * weight.double()).flatten(1)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "width"), WIDTHS)
def test_rmsnorm(groups: int, width: int, dtype: torch.dtype) -> None:
    data = Rows(width, 7, dtype)
    x, out, weight = data.slice(groups * width), data.slice(groups * width, filled=False), data.vector(width)
    x[2] *= 1e-4
    rows.rmsnorm(out, x, weight, 1e-5)
    data.check()
    want = in_float64(x, weight, 1e-5, torch.float64 if dtype == torch.float32 else dtype)
    plain = plainly(library.rmsnorm, x, x, weight, 1e-5)
    close(out, want, plain)
    assert dtype == torch.float32 or (out != plain).float().mean() < 0.01, "the same roundings"


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 576, 4096])
@pytest.mark.parametrize("alias", ["", "x", "y", "norm over y"])
def test_add_rmsnorm(width: int, alias: str, dtype: torch.dtype) -> None:
    data = Rows(width, 5, dtype)
    x, y, weight = data.slice(width), data.slice(width), data.vector(width)
    first, second = x.clone(), y.clone()
    total = {"x": x, "y": y}[alias] if alias in ("x", "y") else data.slice(width, filled=False)
    out = y if alias == "norm over y" else data.slice(width, filled=False)
    rows.add_rmsnorm(total, out, x, y, weight, 1e-5)
    data.check()
    assert torch.equal(total, first + second)
    alone = data.slice(width, filled=False)
    rows.rmsnorm(alone, total.clone(), weight, 1e-5)
    assert torch.equal(out, alone), "the same bits as one after the other"


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("groups", "width"), WIDTHS)
def test_rmsnorm_dgrad(groups: int, width: int, accumulate: bool, dtype: torch.dtype) -> None:
    data = Rows(width + 1, 6, dtype)
    x, grad, weight = data.slice(groups * width), data.slice(groups * width), data.vector(width)
    out = data.slice(groups * width, filled=accumulate)
    before = out.double()
    plain = out.clone() if accumulate else torch.empty_like(x)
    library.rmsnorm_dgrad(plain, grad, x, weight, 1e-5, accumulate)
    rows.rmsnorm_dgrad(out, grad, x, weight, 1e-5, accumulate)
    data.check()
    leaf = x.double().requires_grad_()
    reference.rmsnorm(leaf, weight.double(), 1e-5).backward(grad.double())
    assert leaf.grad is not None
    close(out, before + leaf.grad if accumulate else leaf.grad, plain)


def angles(data: Rows, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K] in the model's dtype, the first half of sin negated."""
    turns = torch.outer(torch.arange(data.num_rows) * 37.0, 10000.0 ** (-torch.arange(width // 2) / (width // 2)))
    cos, sin = turns.cos().to(data.dtype), turns.sin().to(data.dtype)
    return torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int = 1, scale: float = 1.0) -> Tensor:
    """The reference in float64."""
    half = cos.shape[1] // 2
    plain_sin = torch.cat((-sin[:, :half], sin[:, half:]), 1)
    return reference.rope(x.double(), cos.double(), direction * plain_sin.double()) * scale


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("heads", "width"), [(1, 16), (5, 24), (12, 128), (40, 64)])
def test_rope(heads: int, width: int, inverse: bool, dtype: torch.dtype) -> None:
    data = Rows(heads, 5, dtype)
    x, out = data.slice(heads * width), data.slice(heads * width, filled=False)
    cos, sin = angles(data, width)
    scale = 0.37 if heads == 5 else 1.0
    want = rotated(x, cos, sin, -1 if inverse else 1, scale)
    plain = torch.empty_like(x)
    library.rope(plain, x, cos, sin, inverse=inverse, scale=scale)
    rows.rope(out, x, cos, sin, inverse=inverse, scale=scale)
    close(out, want, plain)
    rows.rope(x, x, cos, sin, inverse=inverse, scale=scale)
    assert torch.equal(x, out), "in place"
    data.check()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", [0, 4, 6])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 64), (9, 3, 24), (20, 10, 128)])
def test_rotary_write(heads: int, kv_heads: int, width: int, cached: int, dtype: torch.dtype) -> None:
    data = Rows(heads + cached, 6, dtype)
    merged = data.slice((heads + 2 * kv_heads) * width)
    q, k, v = merged.split([heads * width, kv_heads * width, kv_heads * width], 1)
    before = merged.clone()
    cos, sin = angles(data, width)
    cache = torch.full((2, 70, width), math.nan, dtype=dtype)
    places = torch.randperm(70, generator=data.generator)[: cached * kv_heads]
    dense_data = Rows(0, 6 - cached, dtype)
    dense = (dense_data.slice(kv_heads * width, filled=False), dense_data.slice(kv_heads * width, filled=False))
    scale = 1.5 if width == 24 else 1.0
    rows.rotary_write(
        q, k, v, cos, sin, scale, cache_keys=cache[0], cache_values=cache[1], token_rows=places,
        dense=None if cached == 6 else dense,
    )
    want = before.clone()
    turned = slice(None, (heads + kv_heads) * width)
    rows.rope(want[:, turned], before[:, turned], cos, sin, inverse=False, scale=scale)
    assert torch.equal(merged, want), "the same bits as the rotation alone"
    for half, part in zip(cache, (k, v), strict=True):
        assert torch.equal(half[places], part[:cached].reshape(-1, width))
    assert torch.equal(dense[0], k[cached:]) and torch.equal(dense[1], v[cached:])
    untouched = torch.ones(70, dtype=torch.bool)
    untouched[places] = False
    assert cache[:, untouched].isnan().all()
    data.check()
    dense_data.check()


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 100, 1024, 2500])
def test_silu_mul_and_its_gradients(width: int, dtype: torch.dtype) -> None:
    data = Rows(width, 5, dtype)
    both, grad, out = data.slice(2 * width), data.slice(width), data.slice(width, filled=False)
    gate, up = both[:, :width], both[:, width:]
    gate[0, :4] = torch.tensor([-100.0, 100.0, 0.0, -20.0])
    plain = torch.empty_like(out)
    library.silu_mul(plain, gate, up)
    rows.silu_mul(out, gate, up)
    close(out, reference.silu_mul(*wide(gate, up)), plain)
    leaves = [t.double().requires_grad_() for t in (gate, up)]
    reference.silu_mul(*leaves).backward(grad.double())
    plain_gate, plain_up = torch.empty_like(out), torch.empty_like(out)
    library.silu_mul_dgrad(plain_gate, plain_up, grad, gate, up)
    d_both = data.slice(2 * width, filled=False)
    rows.silu_mul_dgrad(d_both[:, :width], d_both[:, width:], grad, gate, up)
    for have, leaf, other in zip(d_both.split(width, 1), leaves, (plain_gate, plain_up), strict=True):
        assert leaf.grad is not None
        close(have, leaf.grad, other)
    expected = d_both[:, :width].clone()
    rows.silu_mul_dgrad(grad, out, grad, gate, up)
    assert torch.equal(grad, expected), "over its own input"
    data.check()


@interpreted
@pytest.mark.parametrize("seed", range(5))
def test_copies(seed: int) -> None:
    """Copies of several widths and dtypes in two launches over parts of one table."""
    rng = random.Random(seed)
    pairs, entries, owners = [], [], []
    for number, width in enumerate([4, 64, 4096, 7000, *(4 * rng.randint(1, 3000) for _ in range(4))]):
        owner = Rows(10 * seed + number, 6, rng.choice([torch.float32, torch.bfloat16]))
        step = 16 // owner.dtype.itemsize
        width = -(-width // step) * step
        source = owner.slice(width, left=step * rng.randrange(3), right=step * rng.randrange(3))
        target = owner.slice(width, filled=False, left=step, right=step * rng.randrange(2))
        (first, distance), (there, apart) = ((t.data_ptr(), t.stride(0) * t.element_size()) for t in (source, target))
        assert copies.can_copy(first, there, distance, apart)
        entries.append((first, distance, width * owner.dtype.itemsize, there, apart))
        pairs.append((source, target))
        owners.append(owner)
    table, counts = copies.pieces(np.array(entries, np.int64))
    assert table.shape == (counts.sum(), 6) and counts.max() > 1
    on_device, cut = torch.from_numpy(table), int(counts[:3].sum())
    copies.copy_rows(on_device[:cut], 6)
    assert all(target.isnan().all() for _, target in pairs[3:]), "only what the part of the table says"
    copies.copy_rows(on_device[cut:], 6)
    assert all(torch.equal(source, target) for source, target in pairs)
    for owner in owners:
        owner.check()


def test_pieces_cover_each_copy_once() -> None:
    widths = [16, 8192, 8208, 28672, 32]
    entries = [(1 << 30 | number << 20, 64 * number, width, 1 << 31 | number << 20, 16) for number, width in enumerate(widths)]
    table, counts = copies.pieces(np.array(entries, np.int64))
    assert counts.tolist() == [1, 1, 2, 4, 1]
    for (source, distance, width, target, apart), rows_of in zip(entries, np.split(table, np.cumsum(counts)[:-1]), strict=True):
        sizes = rows_of[:, 4] * 4
        assert sizes.sum() == width and sizes.max() <= copies.PIECE_BYTES
        offsets = np.cumsum(sizes) - sizes
        assert (rows_of[:, 0] == source + offsets).all() and (rows_of[:, 1] == target + offsets).all()
        assert (rows_of[:, 2:4] * 4 == [distance, apart]).all()


def test_what_the_copying_kernel_does_not_take() -> None:
    assert copies.can_copy(0, 16, 4096) and not copies.can_copy(0, 8) and not copies.can_copy(2)


# --- gradients of a window's attention ------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("earlier", [0, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(4, 4, 16), (6, 2, 64), (9, 3, 24), (20, 10, 128)])
def test_window_grads(heads: int, kv_heads: int, width: int, earlier: int, dtype: torch.dtype) -> None:
    data, sums = Rows(heads + earlier, 5, dtype), Rows(earlier, 5 + earlier, torch.float32)
    merged = data.slice((heads + 2 * kv_heads) * width, filled=False)
    d_q, d_k, d_v = merged.split([heads * width, kv_heads * width, kv_heads * width], 1)
    cos, sin = angles(data, width)
    sum_k, sum_v = sums.slice(kv_heads * width), sums.slice(kv_heads * width)
    before_k, before_v = sum_k.clone(), sum_v.clone()
    part_q = torch.randn(5, heads, width, generator=data.generator).to(dtype)
    part_k, part_v = (torch.randn(5 + earlier, kv_heads, width, generator=data.generator).to(dtype) for _ in range(2))
    scale = 1.5 if width == 24 else 1.0
    attention_grads.window_grads(d_q, d_k, d_v, sum_k, sum_v, (part_q, part_k, part_v), cos, sin, scale)
    total_k, total_v = before_k + part_k.flatten(1), before_v + part_v.flatten(1)
    for found, before, total in ((sum_k, before_k, total_k), (sum_v, before_v, total_v)):
        assert torch.equal(found[:earlier], total[:earlier]) and torch.equal(found[earlier:], before[earlier:])
    own_k, own_v = total_k[earlier:], total_v[earlier:]
    for found, whole in ((d_q, part_q.flatten(1)), (d_k, own_k)):
        plain = torch.empty_like(found)
        library.rope(plain, whole.to(dtype), cos, sin, inverse=True, scale=scale)
        close(found, rotated(whole, cos, sin, -1, scale), plain)
    assert torch.equal(d_v, own_v.to(dtype))
    data.check()
    sums.check()


# --- whole passes ---------------------------------------------------------------------------------------------------------


def run_everything(model: LoadedModel) -> list[Tensor]:
    """Two fused passes, with prompts and then a decoded token beside them, and backward. All memory is NaN at first."""
    cpu, arch = torch.device("cpu"), model.architecture
    pool = KeyValuePool(arch, 20, 4, torch.float32, cpu)
    pool.buffer.fill_(255)
    executor = Executor(model.weights)
    train = TrainExecutor(executor)
    passes = PassExecutor(executor, train, pool, AdapterSlots(arch, torch.float32, cpu, max_slots=1, max_rank=8))
    adapter = new_adapter(model.weights, LoraConfig(r=8, dropout=0.2), seed=1)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    adapter.refresh()
    adapter = adapter.trainable()
    rng = np.random.default_rng(5)
    examples = [
        Example(index=number, token_ids=rng.integers(0, 97, length), weights=np.ones(length, np.float32))
        for number, length in enumerate((11, 6))
    ]
    batch = pack(examples, device=cpu, seed=3, step=1)
    state = train.begin(batch, training_plans(arch, adapter, itemsize=4).plan())
    ids = torch.from_numpy(rng.integers(0, 97, 20))
    first, second, third = [3, 5], [7, 2, 1], [9]
    found = []

    def window(start: int, end: int) -> TrainWindow:
        return TrainWindow(state, Unit(Direction.FORWARD, 0, arch.num_layers, start, end), adapter)

    prompts = [RowSpan(0, 5, first, NO_ADAPTER), RowSpan(0, 9, second, NO_ADAPTER)]
    found.append(passes.run(ids[:14], [], prompts, window(0, 8)).clone())
    decode = [RowSpan(5, 6, first, NO_ADAPTER), RowSpan(9, 10, second, NO_ADAPTER)]
    found.append(passes.run(ids[14:18], decode, [RowSpan(0, 2, third, NO_ADAPTER)], window(8, 17)).clone())
    decode = [RowSpan(6, 7, first, NO_ADAPTER), RowSpan(10, 11, second, NO_ADAPTER)]
    found.append(passes.run(ids[18:], decode, [], None).clone())
    state.set_coefficients(torch.full_like(state.logprobs, -0.1))
    for layer in reversed(range(arch.num_layers)):
        for start, end in ((8, 17), (0, 8)):  # the second of these meets sums of the first
            train.run(state, Unit(Direction.BACKWARD, layer, layer + 1, start, end), adapter)
    assert adapter.grad is not None
    return [*found, state.logprobs, adapter.grad]


def shares(
    grad: Tensor, q: Tensor, k_all: Tensor, v_all: Tensor, out: Tensor, lse: Tensor, call: cuda_attention.PackedCall,
    *, width: int, window: int | None,
) -> tuple[Tensor, ...]:
    """What the library gives on a device."""
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(k_all), torch.zeros_like(v_all)
    row = 0
    for begin, first, last in call.sequences:
        own = slice(row, row := row + last - first)
        attention.attention_dgrad(
            d_q[own], d_k, d_v, grad[own], q[own], k_all, v_all, out[own], lse[own],
            width=width, begin=begin, first=first, last=last, window=window,
        )
    return tuple(part.unflatten(1, (-1, width)) for part in (d_q, d_k[call.keys], d_v[call.keys]))


@interpreted
@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "smollm3"])
def test_passes_and_units(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(str(build_tiny_directory(tmp_path / "m", family)), device="cpu", dtype="float32")
    want = run_everything(model)
    launched: list[str] = []

    def counted(name: str, call: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **options: (launched.append(name), call(*args, **options))[1]

    names = {"rmsnorm", "add_rmsnorm", "rmsnorm_dgrad", "silu_mul", "silu_mul_dgrad"}
    for name in names:
        monkeypatch.setattr(rows, name, counted(name, getattr(rows, name)))
    made: list[keeping.KeptCopies] = []
    begin = keeping.KeptCopies.__init__
    monkeypatch.setattr(keeping.KeptCopies, "__init__", lambda self, *args: (made.append(self), begin(self, *args))[1])
    monkeypatch.setattr(library, "runs_triton", lambda device: True)
    monkeypatch.setattr(spans, "runs_triton", lambda device: True)
    monkeypatch.setattr(train_rows, "packs_attention", lambda device: True)
    monkeypatch.setattr(cuda_attention, "gradient_shares", shares)
    monkeypatch.setattr(train_rows, "window_grads", counted("window_grads", attention_grads.window_grads))
    found = run_everything(model)
    for have, expected in zip(found, want, strict=True):
        assert (have - expected).norm() <= 2e-5 * expected.norm()
    assert len(made) == 2 and not any(others for copies in made for others in copies.others), "all in one launch per layer"
    assert {*names, "window_grads"} == {*launched}


@interpreted
@pytest.mark.parametrize("sites", ["all-linear", ["q_proj", "v_proj", "down_proj"]])
def test_small_units_compute_several_sites_at_once(
    sites: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(build_tiny_directory(tmp_path / "m", "llama")), device="cpu", dtype="float32")
    adapter = new_adapter(model.weights, LoraConfig(r=8, alpha=24, target_modules=sites), seed=1)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    plan = training_plans(model.architecture, adapter, itemsize=4).plan()
    example = Example(index=0, token_ids=np.arange(17) % 97, weights=np.ones(17, np.float32))
    batch = pack([example], device=torch.device("cpu"))

    def run() -> list[Tensor]:
        train = TrainExecutor(Executor(model.weights))
        state = train.begin(batch, plan)
        for start, end in ((0, 9), (9, 17)):
            train.run(state, Unit(Direction.FORWARD, 0, model.architecture.num_layers, start, end), adapter)
        kept = [
            state.arena.storage(number, slot.storage) for number, layer in enumerate(plan.layers)
            for slot in layer.kept_slots.values()
        ]
        return [state.logprobs, *(each.clone() for each in kept)]

    want = run()
    pairs: list[int] = []
    joined = segments.segment_pairs

    def counted(outs: Any, *args: Any, **options: Any) -> None:
        pairs.append(len(outs))
        joined(outs, *args, **options)

    monkeypatch.setattr(segments, "segment_pairs", counted)
    monkeypatch.setattr(executor_module, "runs_triton", lambda device: True)
    for have, expected in zip(run(), want, strict=True):
        assert (have - expected).norm() <= 2e-5 * expected.norm()
    assert {*pairs} == ({3, 2} if sites == "all-linear" else {2})
