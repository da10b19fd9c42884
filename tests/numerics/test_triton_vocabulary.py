"""The Triton kernels over vocabulary rows, sampling and cross-entropy, against PyTorch.

As in test_triton.py, one test runs this file again in Triton's interpreter. Tiles are made short, so that small vocabularies
have several. Memory that a kernel may not read or write holds NaN.

B rows (requests), C rows (labels), V vocabulary.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.config.settings import SamplingConfig
from coserve.core import Sampled
from coserve.grammar.matcher import packed
from coserve.kernels import library
from coserve.kernels.triton import crossentropy, cuts, jit, sampling
from coserve.model.linear import OutputHead
from coserve.runtime import sampler
from coserve.runtime.executor import HEAD_BYTES, head_rows
from coserve.runtime.sampler import SamplerRow, gumbel_noise, launch, result, sample_rows
from tests.triton_interpreter import compiled, import_without_triton, interpreted, needs_triton, run_in_the_interpreter

try:
    import triton.language as tl
except ImportError:
    tl = None

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities in the interpreter


@pytest.mark.full
@needs_triton
@compiled
def test_all_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@compiled
def test_modules_import_without_triton() -> None:
    import_without_triton("crossentropy", "cuts", "sampling")


# --- sampling -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PEAK_TILE", 64)
    monkeypatch.setattr(cuts, "CUT_TILE", 128)


def by_kernels(logits_BV: Tensor, rows: list[SamplerRow]) -> list[Sampled]:
    """`sample_rows` as a device with Triton runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "runs_triton", lambda device: True)
        patch.delattr(sampler, "_draw")
        return sample_rows(logits_BV, rows)


def tokens_of(sampled: list[Sampled]) -> list[int]:
    return [each.token for each in sampled]


def row(seed: int = 0, position: int = 0, **settings: Any) -> SamplerRow:
    return SamplerRow(SamplingConfig(**settings), seed, position, (), (), frozenset())


def random_logits(rng: random.Random, rows: int, size: int) -> Tensor:
    """Rows of many shapes: flat and steep, with ties, with excluded tokens, far from zero, and a float32 step apart."""
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    logits = torch.randn(rows, size, generator=generator) * rng.choice([0.0, 0.01, 1.0, 3.0, 10.0])
    kind = rng.randrange(6)
    if kind == 0:
        return logits.round()
    if kind == 1:
        return logits.bfloat16()
    if kind == 2:
        return logits.masked_fill(torch.rand(rows, size, generator=generator) < 0.4, -math.inf)
    if kind == 3:
        return logits + rng.choice([3e4, -3e4, 1e9])
    if kind == 4:
        steps = torch.randint(0, 40, (rows, size), generator=generator)
        return rng.choice([1.0, -7.3, 25.0]) * (1 + steps.float() * 2.0**-23)
    return logits


def random_settings(rng: random.Random, size: int, *, filtered: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"temperature": rng.choice([0.3, 0.7, 1.0, 1.7, 3.0])}
    if filtered:
        settings["top_k"] = rng.choice([0, 0, 1, 3, 50, size // 2, size + 1])
        settings["top_p"] = rng.choice([1.0, 1.0, 0.9, 0.5, 0.999, 0.01, rng.random() or 1.0])
        settings["min_p"] = rng.choice([0.0, 0.0, 0.1, 0.001, 1.0, rng.random()])
    elif rng.random() < 0.2:
        settings["temperature"] = 0.0
    return settings


@interpreted
@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("seed", range(8))
def test_tokens_without_filters(seed: int) -> None:
    rng = random.Random(seed)
    size, count = [1, 2, 63, 64, 65, 150, 150, 200][seed], 40
    logits = random_logits(rng, count, size)
    kinds = [random_settings(rng, size, filtered=False) for _ in range(count)]
    rows = [row(rng.randrange(1 << 40), rng.randrange(10_000), **kind) for kind in kinds]
    assert tokens_of(by_kernels(logits, rows)) == tokens_of(sample_rows(logits, rows))


@interpreted
@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("seed", range(14))
def test_filters_leave_the_same_tokens(seed: int) -> None:
    """The sets themselves, which say more than the token that is drawn from each."""
    rng = random.Random(seed)
    size, count = rng.choice([2, 31, 128, 150, 200]), 8
    logits = random_logits(rng, count, size)
    rows = [row(rng.randrange(1 << 40), number, **random_settings(rng, size, filtered=True)) for number in range(count)]
    assert tokens_of(by_kernels(logits, rows)) == tokens_of(sample_rows(logits, rows))
    scores = logits.float() / torch.tensor([[each.sampling.temperature] for each in rows])
    want = sampler._filter(scores, [each.sampling for each in rows]) > -math.inf
    lowest, limits = cuts.row_cuts(logits, sampler._settings(rows, sampler._draws(rows))[0])
    kept = (scores > lowest[:, None]) | ((scores == lowest[:, None]) & (torch.arange(size) < limits[:, None]))
    kept &= scores > -math.inf
    assert torch.equal(kept, want), [each.sampling for each, same in zip(rows, (kept == want).all(1), strict=True) if not same]


@interpreted
@pytest.mark.usefixtures("short_tiles")
def test_ties_on_the_edge_of_top_p_stay_in_order_of_their_ids() -> None:
    logits = torch.zeros(5, 200)
    logits[1, 150:] = 2.0
    rows = [row(number, top_p=top_p) for number, top_p in enumerate([0.101, 0.5, 0.1, 1e-9, 0.9999])]
    table = sampler._settings(rows, sampler._draws(rows))[0]
    lowest, limits = cuts.row_cuts(logits, table)
    share = math.exp(2.0)
    assert lowest.tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    assert limits.tolist() == [21, 150 + math.ceil((50 * share + 150) / 2 / share), 20, 1, 200]


@interpreted
@pytest.mark.parametrize("size", [1000, 49152])
def test_tokens_of_real_vocabularies(size: int) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"top_p": 0.9}, {"top_k": 40, "temperature": 0.7}, {"min_p": 0.05}, {"temperature": 0},
        {"top_k": 200, "top_p": 0.95, "min_p": 0.01, "temperature": 1.3},
    ]
    kinds = kinds if size < 10_000 else kinds[-1:]
    logits = 2 * torch.randn(len(kinds), size, generator=torch.Generator().manual_seed(size)).bfloat16()
    rows = [row(number, 3 * number, **kind) for number, kind in enumerate(kinds)]
    assert tokens_of(by_kernels(logits, rows)) == tokens_of(sample_rows(logits, rows))


@interpreted
@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
])
def test_broken_rows(bad: float, settings: dict[str, Any]) -> None:
    """The first NaN, or else the first infinity; a row of minus infinity gives token 0; neighbours are as before."""
    logits = torch.randn(6, 150, generator=torch.Generator().manual_seed(1))
    logits[1] = bad
    logits[3, [70, 71, 149]] = bad
    logits[4, 100], logits[4, 140] = bad, math.inf
    logits[5, 3], logits[5, 90] = math.inf, bad
    rows = [row(number, 5, **settings) for number in range(6)]
    got = tokens_of(by_kernels(logits, rows))
    assert got == tokens_of(sample_rows(logits, rows))
    if math.isnan(bad):
        assert [got[1], got[3], got[4], got[5]] == [0, 70, 100, 90]


@interpreted
@pytest.mark.usefixtures("short_tiles")
def test_rows_are_slices_of_wider_ones_and_depend_on_nothing_beside_them() -> None:
    wide = torch.full((12, 170), math.nan)
    logits = wide[::2, 8:158]
    logits.copy_(torch.randn(6, 150, generator=torch.Generator().manual_seed(3)))
    rows = [row(number, top_p=0.9, top_k=40) for number in range(5)] + [row(9)]
    before, got = logits.clone(), tokens_of(by_kernels(logits, rows))
    assert got == tokens_of(sample_rows(before, rows))
    assert torch.equal(logits, before)
    assert got == [tokens_of(by_kernels(logits[i : i + 1], [each]))[0] for i, each in enumerate(rows)]


@interpreted
def test_penalties_and_logprobs_beside_the_kernels() -> None:
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(4)).bfloat16()
    rows = [
        SamplerRow(SamplingConfig(logprobs=2, repetition_penalty=1.5), 1, 2, (3, 4), (5,), frozenset()), row(2, 3, logprobs=0),
        row(4, temperature=0, logit_bias={7: 50.0}),
    ]
    got = by_kernels(logits, rows)
    assert got == sample_rows(logits, rows)
    assert got[2].token == 7
    assert got[0].logprob is not None


@interpreted
@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("unpack_by_numpy", [True, False])
def test_grammars_beside_the_kernels(unpack_by_numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that leave few tokens, one, or most of them; with filters and without; by NumPy's bits and by a device's."""
    if not unpack_by_numpy:
        monkeypatch.setattr(sampler.np, "unpackbits", lambda packed, count, **_: sampler.unpacked(torch.from_numpy(packed),
                                                                                                   count).numpy())
    rng, size = random.Random(3), 150
    logits = torch.randn(24, size, generator=torch.Generator().manual_seed(6)).bfloat16()
    kept = [rng.sample(range(size), rng.choice([1, 2, 5, 140])) for _ in range(24)]
    plain = [row(number, number, **random_settings(rng, size, filtered=number % 2 == 0)) for number in range(24)]
    rows = [each if number % 5 == 4 else each._replace(allowed=packed(kept[number], size)) for number, each in enumerate(plain)]
    got = tokens_of(by_kernels(logits, rows))
    assert got == tokens_of(sample_rows(logits, rows))
    assert all(token in kept[number] for number, token in enumerate(got) if number % 5 != 4)


def test_launch_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rows ask for; and the result is one reading."""
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(5))
    rows = [row(1, logprobs=2), row(2, top_p=0.5), row(3, temperature=0, logprobs=0)]
    rows[1] = rows[1]._replace(allowed=packed(range(20), 30))
    want, to_list = sample_rows(logits, rows), Tensor.tolist
    reads: list[int] = []

    def counted(tensor: Tensor) -> list[Any]:
        reads.append(tensor.numel())
        return to_list(tensor)

    def refused(*_: object) -> None:
        raise AssertionError("read on the host")

    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"):
            patch.setattr(Tensor, name, refused)
        launched = launch(logits, rows)
    monkeypatch.setattr(Tensor, "tolist", counted)
    assert result(launched) == want
    assert reads == [3 + (2 + 2 * 2) + 2]


@interpreted
def test_near_noise_is_within_its_error() -> None:
    """Also for the smallest and largest bits, and where the series begins."""

    @jit()
    def kernel(near: tl.tensor, exact: tl.tensor, bits: tl.tensor, tile: tl.constexpr) -> None:
        index = tl.arange(0, tile)
        own = tl.load(bits + index).to(tl.uint32)
        tl.store(near + index, sampling._near_noise(own))
        tl.store(exact + index, sampling._exact_noise(own))

    edges = [edge + step for edge in (0, 1 << 16, 1 << 31, 15 << 28) for step in range(-40, 40)]
    others = random.Random(0).sample(range(1 << 32), 16_384)
    bits = torch.tensor([*edges, *range(2**32 - 100, 2**32), *others][:16_384]) & 0xFFFFFFFF
    near, exact = torch.empty(16_384), torch.empty(16_384)
    kernel[(1,)](near, exact, bits, tile=16_384)
    assert float((near.double() - exact.double()).abs().max()) < 2.0**-16 / 2
    uniform = (bits.double() + 0.5) / 2**32
    assert torch.equal(exact, -torch.log(-torch.log(uniform)).float())


@interpreted
def test_kernel_noise_is_the_samplers() -> None:
    """By the token that the noise alone chooses."""
    keys = [(seed, position) for seed in range(5) for position in range(5)]
    want = gumbel_noise(keys, 300, torch.device("cpu")).argmax(-1)
    assert tokens_of(by_kernels(torch.zeros(25, 300), [row(*key) for key in keys])) == want.tolist()


# --- cross-entropy --------------------------------------------------------------------------------------------------------


def by_kernel(logits_CV: Tensor, labels_C: Tensor, *, probabilities: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, correct, what the logits' place holds then) of logits inside wider memory."""
    rows, size = logits_CV.shape
    wide = torch.full((rows, size + 24), math.nan, dtype=logits_CV.dtype)
    place = wide[:, 8:-16]
    place.copy_(logits_CV)
    logprobs, correct = torch.full((rows,), math.nan), torch.zeros(rows, dtype=torch.bool)
    crossentropy.label_logprobs(logprobs, correct, place, labels_C, probabilities=probabilities)
    assert wide[:, :8].isnan().all() and wide[:, -16:].isnan().all(), "wrote outside its columns"
    return logprobs, correct, place


@interpreted
@pytest.mark.parametrize("tile", [64, 4096])
@pytest.mark.parametrize("size", [5, 64, 1000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 50.0])
def test_cross_entropy_in_float32(tile: int, size: int, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossentropy, "TILE", tile)
    generator = torch.Generator().manual_seed(size)
    logits = scale * torch.randn(7, size, generator=generator)
    labels = torch.randint(0, size, (7,), generator=generator)
    labels[:3] = logits[:3].argmax(-1)
    logprobs, correct, probabilities = by_kernel(logits, labels)
    want = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(logprobs.double(), want.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probabilities.double(), want.exp(), rtol=1e-5, atol=1e-7)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    again, _, kept = by_kernel(logits, labels, probabilities=False)
    assert torch.equal(again, logprobs) and torch.equal(kept, logits)


@interpreted
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_cross_entropy_in_bfloat16(scale: float) -> None:
    """The interpreter cuts digits off where a device rounds. So the kernel's float32 numbers are rounded here, and must be
    what it wrote but for that."""
    generator = torch.Generator().manual_seed(2)
    logits = (scale * torch.randn(6, 5000, generator=generator)).bfloat16()
    labels = torch.randint(0, 5000, (6,), generator=generator)
    logprobs, correct, probabilities = by_kernel(logits, labels)
    wide_logprobs, wide_correct, wide = by_kernel(logits.float(), labels)
    assert torch.equal(logprobs, wide_logprobs) and torch.equal(correct, wide_correct)
    cut_off = (wide.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert ((probabilities == wide.bfloat16()) | (probabilities == cut_off)).all()
    want = torch.log_softmax(logits.double(), -1)
    torch.testing.assert_close(logprobs.double(), want.gather(1, labels[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    plain = torch.softmax(logits.float(), -1).bfloat16()
    error, limit = ((found.double() - want.exp()).abs() for found in (wide.bfloat16(), plain))
    assert float(error.max()) <= 2 * float(limit.max()) and float(error.mean()) <= 1.1 * float(limit.mean())


@interpreted
def test_cross_entropy_of_improbable_and_broken_rows() -> None:
    """log p of -1000 is exact; minus infinity has probability 0; a row with NaN is NaN and spoils no other; ties count."""
    logits = torch.zeros(6, 150)
    logits[0] = -2000.0
    logits[0, 1], logits[0, 100] = 0.0, -1000.0
    logits[1] = 1e4
    logits[2, 3:] = -math.inf
    logits[3, 140] = math.nan
    logprobs, correct, probabilities = by_kernel(logits, torch.tensor([100, 5, 2, 0, 140, 149]))
    want = [-1000.0, -math.log(150), -math.log(3), math.nan, -math.log(150), -math.log(150)]
    assert logprobs.tolist() == pytest.approx(want, rel=1e-6, nan_ok=True)
    assert correct.tolist() == [False, True, True, False, True, True]
    assert probabilities.isnan().any(1).tolist() == [False, False, False, True, False, False]
    assert (probabilities[2, 3:] == 0).all()


@interpreted
@pytest.mark.parametrize("forward_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_rows_by_the_kernel(dtype: torch.dtype, forward_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient rows included, in chunks of which the last is shorter."""
    generator = torch.Generator().manual_seed(0)
    hidden, norm, table = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((11, 32), (32,), (150, 32)))
    labels = torch.randint(0, 150, (11,), generator=generator)

    def run(kind: torch.dtype, *, fused: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        wide = torch.float64 if kind == torch.float64 else torch.float32
        logprobs, correct = torch.empty(11, dtype=wide), torch.zeros(11, dtype=torch.bool)
        grad = None if forward_only else torch.empty(11, 32, dtype=kind)
        monkeypatch.setattr(library, "fused_head", lambda device, dtype: fused)
        library.label_rows(
            logprobs, correct, grad, hidden.to(kind), labels, norm.to(kind), 1e-5, OutputHead(table.to(kind)),
            torch.empty(4, 150, dtype=kind),
        )
        return logprobs, correct, grad

    (exact, _, exact_grad), (plain, right, plain_grad), (found, correct, grad) = (
        run(torch.float64, fused=False), run(dtype, fused=False), run(dtype, fused=True)
    )
    assert torch.equal(correct, right)
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    else:
        assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max()
    if grad is None:
        return
    assert plain_grad is not None and exact_grad is not None
    if dtype == torch.float32:
        torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-5)
    else:
        assert (grad.double() - exact_grad).norm() <= 2 * (plain_grad.double() - exact_grad).norm()


def test_chunks_of_a_fused_head() -> None:
    assert head_rows(128_256, 2, fused=True) == head_rows(151_936, 4, fused=True) == 1024
    assert head_rows(128_256, 2) == HEAD_BYTES // 256_512
    assert head_rows(5000, 2, fused=True) == HEAD_BYTES // 10_000 // 128 * 128
