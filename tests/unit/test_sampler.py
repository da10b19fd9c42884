"""Sampling: what is excluded, the distribution over positions, and noise that only (seed, position) decide."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.config import SamplingConfig
from coserve.runtime.sampler import gumbel_noise, sample

CPU = torch.device("cpu")
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0, 1.9, 0.0, -1.0])


def draws(logits: Tensor, config: SamplingConfig, count: int) -> Tensor:
    """How often each token is drawn at positions 0, 1, ..."""
    tokens = torch.tensor([sample(logits, config, position) for position in range(count)])
    return torch.bincount(tokens, minlength=logits.shape[0])


def assert_distributed(counts: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square at about one in 10^5 (Wilson and Hilferty's approximation of its quantile)."""
    total, likely = int(counts.sum()), probabilities > 0
    assert int(counts[~likely].sum()) == 0
    expected, seen = probabilities[likely].double() * total, counts[likely].double()
    rare = expected < 5  # counted together, as the statistic wants
    if rare.any():
        expected = torch.cat((expected[~rare], expected[rare].sum(0, keepdim=True)))
        seen = torch.cat((seen[~rare], seen[rare].sum(0, keepdim=True)))
    statistic = float(((seen - expected).square() / expected.clamp_min(1)).sum())
    freedom = expected.shape[0] - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.3 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit, f"chi-square {statistic:.1f} of {freedom} degrees of freedom, limit {limit:.1f}"


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), position=st.integers(0, 10**6), top_k=st.integers(0, 9))
def test_temperature_zero_is_greedy_whatever_else_is_set(seed: int, position: int, top_k: int) -> None:
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(temperature=0, seed=seed, top_k=top_k, top_p=0.5)
    assert sample(logits, config, position) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_distributed_as_softmax(temperature: float) -> None:
    counts = draws(LOGITS, SamplingConfig(temperature=temperature, seed=11), 2500)
    assert_distributed(counts, torch.softmax(LOGITS.double() / temperature, 0))


def test_tokens_are_distributed_as_softmax_over_seeds_too() -> None:
    tokens = torch.tensor([sample(LOGITS, SamplingConfig(seed=seed), 5) for seed in range(2500)])
    assert_distributed(torch.bincount(tokens, minlength=8), torch.softmax(LOGITS.double(), 0))


def test_neighbouring_positions_are_independent() -> None:
    logits = torch.zeros(3)
    tokens = [sample(logits, SamplingConfig(seed=4), position) for position in range(4000)]
    pairs = torch.tensor([3 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)])
    assert_distributed(torch.bincount(pairs, minlength=9), torch.full((9,), 1 / 9))


@pytest.mark.parametrize("top_k", [1, 3, 7, 8, 100])
def test_top_k_leaves_the_best_in_their_proportions(top_k: int) -> None:
    probabilities = torch.softmax(LOGITS.double(), 0)
    kept = torch.zeros_like(probabilities).scatter(0, probabilities.topk(min(top_k, 8)).indices, 1.0)
    want = probabilities * kept / (probabilities * kept).sum()
    counts = draws(LOGITS, SamplingConfig(top_k=top_k, seed=2), 1500)
    if top_k == 1:
        assert counts.tolist() == [0, 0, 1500, 0, 0, 0, 0, 0]
    else:
        assert_distributed(counts, want)


@pytest.mark.parametrize(("top_p", "kept"), [
    (0.01, [2]), (0.5, [2, 5]), (0.65, [2, 5]), (0.7, [0, 2, 5]), (0.95, [0, 1, 2, 3, 5, 6]),
])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: list[int]) -> None:
    """Probabilities in order: token 2 .366, 5 .331, 0 .135, 3 .067, 6 .050, 1 .030, 7 .018, 4 .002."""
    probabilities = torch.softmax(LOGITS.double(), 0)
    mask = torch.zeros(8, dtype=torch.float64)
    mask[kept] = 1
    counts = draws(LOGITS, SamplingConfig(top_p=top_p, seed=3), 1500)
    if len(kept) == 1:
        assert counts.tolist() == [0, 0, 1500, 0, 0, 0, 0, 0]
    else:
        assert_distributed(counts, probabilities * mask / (probabilities * mask).sum())


def test_top_p_counts_after_temperature_and_after_top_k() -> None:
    """As in Hugging Face's and vLLM's order. Cooled to 0.25, tokens 2 and 5 alone hold 98.8% of the mass; among the two best at
    temperature 1, token 2 alone holds more than half."""
    cooled = draws(LOGITS, SamplingConfig(temperature=0.25, top_p=0.95, seed=1), 700)
    assert set(cooled.nonzero()[:, 0].tolist()) == {2, 5}
    both = draws(LOGITS, SamplingConfig(top_k=2, top_p=0.52, seed=1), 300)
    assert set(both.nonzero()[:, 0].tolist()) == {2}


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**40), position=st.integers(0, 10**6), size=st.integers(1, 50))
def test_noise_depends_on_seed_position_and_index_only(seed: int, position: int, size: int) -> None:
    long = gumbel_noise(seed, position, 60, CPU)
    assert torch.equal(gumbel_noise(seed, position, size, CPU), long[:size]), "a larger vocabulary changed the noise"
    assert torch.isfinite(long).all()
    assert not torch.equal(gumbel_noise(seed + 1, position, 60, CPU), long)
    assert not torch.equal(gumbel_noise(seed, position + 1, 60, CPU), long)


def test_a_token_depends_on_its_own_logits_seed_and_position_only() -> None:
    """Whatever runs before or beside a request (also PyTorch's own generator), it gets the same token."""
    config = SamplingConfig(seed=9, temperature=0.8, top_k=5, top_p=0.9)
    alone = [sample(LOGITS, config, position) for position in range(30)]
    torch.manual_seed(123)
    batch = torch.stack([LOGITS, LOGITS.flip(0), torch.randn(8)])
    together = []
    for position in reversed(range(30)):
        sample(batch[1], SamplingConfig(seed=1), position)
        together.append(sample(batch[0], config, position))
        sample(batch[2], SamplingConfig(seed=9), position)
    assert together[::-1] == alone
    assert len(set(alone)) > 1


def test_noise_is_gumbel() -> None:
    noise = torch.cat([gumbel_noise(1, position, 500, CPU) for position in range(40)]).double()
    assert noise.dtype == torch.float64
    assert abs(float(noise.mean()) - 0.5772156649) < 5 * math.pi / math.sqrt(6 * noise.numel())
    assert abs(float(noise.std()) - math.pi / math.sqrt(6)) < 0.05
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    steps = (torch.arange(noise.numel()) + 0.5) / noise.numel()
    assert float((uniform - steps).abs().max()) < 1.95 / math.sqrt(noise.numel()), "Kolmogorov-Smirnov"


def test_sampling_changes_no_logits() -> None:
    logits = LOGITS.clone()
    for config in (SamplingConfig(temperature=0), SamplingConfig(), SamplingConfig(top_k=2, top_p=0.5, temperature=0.5)):
        sample(logits, config, 0)
        assert torch.equal(logits, LOGITS)


def test_low_precision_logits_are_sampled_in_float32() -> None:
    counts = draws(LOGITS.bfloat16(), SamplingConfig(seed=11), 1500)
    assert_distributed(counts, torch.softmax(LOGITS.bfloat16().double(), 0))
