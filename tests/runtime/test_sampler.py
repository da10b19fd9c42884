"""Sampling: what is excluded, the distribution over positions, noise that only (seed, position) decide, penalties and
log-probabilities, and rows that share a batch and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.config.settings import SamplingConfig
from coserve.grammar.matcher import packed
from coserve.runtime import sampler
from coserve.runtime.sampler import SamplerRow, _edited, gumbel_noise, prompt_logprobs, sample_rows

CPU = torch.device("cpu")
LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, -3.0, 1.9, 0.0, -1.0])


def sample(logits_V: Tensor, config: SamplingConfig, position: int) -> int:
    """The next token of one request without penalties, which has `position` tokens."""
    row = SamplerRow(config, config.seed, position, (), (), frozenset())
    return sample_rows(logits_V[None], [row])[0].token


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
    long = gumbel_noise([(seed, position)], 60, CPU)[0]
    assert torch.equal(gumbel_noise([(seed, position)], size, CPU)[0], long[:size]), "a larger vocabulary changed the noise"
    assert torch.isfinite(long).all()
    assert not torch.equal(gumbel_noise([(seed + 1, position)], 60, CPU)[0], long)
    assert not torch.equal(gumbel_noise([(seed, position + 1)], 60, CPU)[0], long)


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
    noise = torch.cat([gumbel_noise([(1, position)], 500, CPU)[0] for position in range(40)]).double()
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


# rows


def row(
    seed: int = 0, position: int = 0, *, prompt: Sequence[int] = (), output: Sequence[int] = (),
    ending: Sequence[int] = (), **settings: Any,
) -> SamplerRow:
    return SamplerRow(SamplingConfig(**settings), seed, position, prompt, output, frozenset(ending))


def edited(logits: Tensor, each: SamplerRow) -> Tensor:
    """The row's logits after all that precedes the temperature."""
    before = logits.clone()
    result = _edited(logits[None].float(), [each])[0]
    assert torch.equal(logits, before), "the raw logits are needed for log-probabilities"
    return result


def test_repetition_penalty_counts_prompt_and_output_once() -> None:
    """Positive logits are divided, others multiplied; a token that comes often is penalized like one that comes once."""
    got = edited(LOGITS, row(prompt=[0, 0, 1, 6], output=[2, 2, 4, 0], repetition_penalty=2.0))
    assert got.tolist() == pytest.approx([0.5, -1.0, 1.0, 0.3, -6.0, 1.9, 0.0, -1.0])


def test_presence_and_frequency_count_the_output_only() -> None:
    got = edited(LOGITS, row(prompt=[7, 7, 7], output=[2, 2, 4], presence_penalty=0.5, frequency_penalty=0.25))
    assert got.tolist() == pytest.approx([1.0, -0.5, 1.0, 0.3, -3.75, 1.9, 0.0, -1.0])
    got = edited(LOGITS, row(output=[2, 2], frequency_penalty=-1.0))
    assert got.tolist() == pytest.approx([1.0, -0.5, 4.0, 0.3, -3.0, 1.9, 0.0, -1.0])


def test_penalties_then_bias_in_this_order() -> None:
    got = edited(LOGITS, row(output=[2], repetition_penalty=2.0, presence_penalty=0.5, logit_bias={2: 10.0, 99: 5.0, 1: -1.0}))
    assert got.tolist() == pytest.approx([1.0, -1.5, 10.5, 0.3, -3.0, 1.9, 0.0, -1.0])


def test_endings_are_excluded_before_min_tokens() -> None:
    """Even against a bias, and only until there are so many tokens."""
    settings: dict[str, Any] = {"ending": [2, 5, 99], "min_tokens": 2, "logit_bias": {2: 50.0}, "temperature": 0}
    assert sample_rows(LOGITS[None], [row(output=[1], **settings)])[0].token == 0
    assert sample_rows(LOGITS[None], [row(output=[1, 1], **settings)])[0].token == 2


def allowing(tokens: Sequence[int], size: int = 8) -> np.ndarray:
    """A grammar's mask, with rubbish beyond the vocabulary."""
    return packed(tokens, size) | np.where(np.arange(-(-size // 32)) == size // 32, -1 << size % 32, 0).astype(np.int32)


def masked(tokens: Sequence[int], size: int = 8, **settings: Any) -> SamplerRow:
    return row(**settings)._replace(allowed=allowing(tokens, size))


@pytest.mark.parametrize("size", [8, 32, 33, 100])
def test_what_a_grammar_does_not_allow_is_excluded_from_its_row_alone(size: int) -> None:
    logits = torch.randn(4, size, generator=torch.Generator().manual_seed(size))
    tokens = [1, 5, size - 1]
    got = _edited(logits, [row(), masked(tokens, size), row(logit_bias={3: 1.0}), masked([0], size, logit_bias={0: 2.0})])
    for number, kept in ((0, range(size)), (1, tokens), (2, range(size)), (3, [0])):
        assert torch.isfinite(got[number]).nonzero()[:, 0].tolist() == sorted(set(kept))
    assert torch.equal(got[1, tokens], logits[1, tokens]) and got[3, 0] == logits[3, 0] + 2
    assert torch.equal(got[0], logits[0])


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.9, "temperature": 2.0}])
def test_filters_count_among_what_a_grammar_allows(settings: dict[str, Any]) -> None:
    """As if the other tokens were not there."""
    kept = [1, 4, 6, 7]
    alone = LOGITS.clone()
    alone[[0, 2, 3, 5]] = -math.inf
    for position in range(30):
        got = sample_rows(LOGITS[None], [masked(kept, seed=1, position=position, **settings)])[0].token
        assert got in kept
        assert got == sample_rows(alone[None], [row(1, position, **settings)])[0].token


def test_a_mask_says_itself_when_the_end_has_to_wait() -> None:
    """It may leave nothing but an end token."""
    settings: dict[str, Any] = {"ending": [2, 5], "min_tokens": 2, "temperature": 0}
    assert sample_rows(LOGITS[None], [masked([5], **settings)])[0].token == 5


def test_logprobs_beside_a_mask_are_of_the_raw_logits() -> None:
    got = sample_rows(LOGITS[None], [masked([4], temperature=0, logprobs=1)])[0]
    assert got.token == 4 and got.logprob is not None
    assert got.logprob.logprob == pytest.approx(float(torch.log_softmax(LOGITS.double(), 0)[4]), abs=1e-5)
    assert [token for token, _ in got.logprob.top] == [2]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 1001])
def test_bits_are_unpacked_on_a_device_as_on_the_host(size: int) -> None:
    packed_bits = np.random.default_rng(size).integers(0, 256, (3, -(-size // 8)), np.uint8)
    got = sampler.unpacked(torch.from_numpy(packed_bits), size)
    assert got.dtype == torch.uint8 and got.shape == (3, size)
    assert np.array_equal(got.numpy(), np.unpackbits(packed_bits, axis=1, count=size, bitorder="little"))


@pytest.mark.parametrize(("min_p", "kept"), [(1.0, [2]), (0.8, [2, 5]), (0.3, [0, 2, 5]), (0.15, [0, 2, 3, 5])])
def test_min_p_is_a_share_of_the_likeliest(min_p: float, kept: list[int]) -> None:
    """Shares of token 2's probability: 5 .905, 0 .368, 3 .183, 6 .135, 1 .082."""
    counts = draws(LOGITS, SamplingConfig(min_p=min_p, seed=3), 400)
    assert counts.nonzero()[:, 0].tolist() == kept


def test_min_p_counts_after_temperature() -> None:
    counts = draws(LOGITS, SamplingConfig(min_p=0.3, temperature=0.25, seed=3), 300)
    assert counts.nonzero()[:, 0].tolist() == [2, 5]


def test_tokens_as_good_as_the_kth_stay() -> None:
    counts = draws(torch.tensor([1.0, 2.0, 1.0, 0.0]), SamplingConfig(top_k=2, seed=3), 200)
    assert counts.nonzero()[:, 0].tolist() == [0, 1, 2]


def test_a_flat_tail_is_not_lost() -> None:
    """Without top_p even tokens of a 10^-15th of the best one's probability may be drawn; with it they count for nothing."""
    logits = torch.tensor([[0.0, -35.0]])
    forced = [row(seed, min_p=1e-30, top_k=1000) for seed in range(3)]
    assert [each.token for each in sample_rows(logits.expand(3, -1), forced)] == [0, 0, 0]
    kept = sampler._filter(logits, [SamplingConfig(min_p=1e-30)])
    assert torch.equal(kept, logits)
    assert sampler._filter(logits, [SamplingConfig(top_p=0.999)]).tolist() == [[0.0, -math.inf]]


def row_of_any_kind(seed: int, position: int, allowed: list[int] | None, **settings: Any) -> SamplerRow:
    made = row(seed, position, **settings)
    return made if allowed is None else made._replace(allowed=allowing(allowed, 37))


rows_of_any_kind = st.builds(
    row_of_any_kind,
    st.integers(0, 100), st.integers(0, 100), st.none() | st.lists(st.integers(0, 36), min_size=1, max_size=6),
    prompt=st.lists(st.integers(0, 36), max_size=6), output=st.lists(st.integers(0, 36), max_size=6),
    ending=st.lists(st.integers(0, 36), max_size=2),
    temperature=st.sampled_from([0, 1e-7, 0.3, 1.0, 3.0]), top_k=st.sampled_from([0, 1, 3, 50]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]), min_p=st.sampled_from([0.0, 0.2]),
    presence_penalty=st.sampled_from([0.0, 1.0]), frequency_penalty=st.sampled_from([0.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.5]), logit_bias=st.sampled_from([{}, {3: 4.0, 7: -100.0}]),
    min_tokens=st.sampled_from([0, 4]), logprobs=st.sampled_from([None, 0, 2, 20]),
)


@given(rows=st.lists(rows_of_any_kind, min_size=1, max_size=6), seed=st.integers(0, 1000), data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_row_does_not_depend_on_the_others(rows: list[SamplerRow], seed: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    logits = (3 * torch.randn(len(rows), 37, generator=torch.Generator().manual_seed(seed))).to(dtype)
    alone = [sample_rows(logits[i : i + 1], [each])[0] for i, each in enumerate(rows)]
    assert sample_rows(logits, rows) == alone
    assert sample_rows(logits.flip(0), rows[::-1]) == alone[::-1]


def test_rows_are_independent_in_a_large_vocabulary_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = 2 * torch.randn(24, 5003, generator=torch.Generator().manual_seed(0))
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40, "temperature": 0.7}, {"min_p": 0.05}, {"temperature": 0}]
    rows = [row(i, 3 * i, **kinds[i % 5]) for i in range(24)]
    alone = [sample_rows(logits[i : i + 1], [each])[0] for i, each in enumerate(rows)]
    assert sample_rows(logits, rows) == alone
    monkeypatch.setattr(sampler, "_MAX_ELEMENTS", 4 * 5003)
    assert sample_rows(logits, rows) == alone


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"logprobs": 3},
    {"top_p": 0.5, "top_k": 3, "min_p": 0.1},
])
def test_a_broken_row_leaves_its_neighbours_alone(bad: float, settings: dict[str, Any]) -> None:
    whole = torch.stack([LOGITS, torch.full((8,), bad), LOGITS.flip(0), LOGITS])
    whole[3, 4] = bad
    rows = [row(i, 5, **settings) for i in range(4)]
    got = sample_rows(whole, rows)
    assert got[0] == sample_rows(LOGITS[None], [rows[0]])[0]
    assert got[2] == sample_rows(LOGITS.flip(0)[None], [rows[2]])[0]
    assert [each.token for each in sample_rows(whole, rows)] == [each.token for each in got]
    if bad != -math.inf:
        assert [got[1].token, got[3].token] == [0, 4], "the argmax"
    else:
        assert got[1].token == 0
        assert got[3].token != 4


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every tensor that is read on the host, in order. Each reading waits for the device."""
    found: list[int] = []
    to_list = Tensor.tolist

    def counted(tensor: Tensor) -> list[Any]:
        found.append(tensor.numel())
        return to_list(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    return found


def test_plain_greedy_rows_are_one_argmax(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the logits, no noise, no row by row work, one wait for the device."""
    for name in ("_edit", "_draw", "_measure", "gumbel_noise"):
        monkeypatch.delattr(sampler, name)
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    got = sample_rows(logits, [row(temperature=0, top_p=0.5)] * 5)
    assert waits == [5]
    assert [each.token for each in got] == list(logits.argmax(-1))


def test_sampling_a_mixed_batch_waits_once(waits: list[int]) -> None:
    rows = [row(temperature=0), row(1, top_p=0.5), row(2, output=[1], presence_penalty=1.0), row(3, logit_bias={1: 2.0})]
    sample_rows(LOGITS.expand(4, -1), rows)
    assert waits == [4]


def test_no_rows() -> None:
    assert sample_rows(torch.empty(0, 8), []) == []


# log-probabilities


def test_logprobs_of_the_sampled_token_and_the_best() -> None:
    """Of the raw logits, whatever changed them for sampling; each row with its own count."""
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    got = sample_rows(logits, [row(temperature=0, logprobs=2, logit_bias={4: 100.0}), row(7, 1, top_k=3), row(8, logprobs=0)])
    want = torch.log_softmax(LOGITS.double(), 0)
    first, second, third = (each.logprob for each in got)
    assert second is None
    assert first is not None
    assert (got[0].token, first.token) == (4, 4)
    assert first.logprob == pytest.approx(float(want[4]), abs=1e-5)
    assert [token for token, _ in first.top] == [2, 5]
    assert [value for _, value in first.top] == pytest.approx(want[[2, 5]].tolist(), abs=1e-5)
    assert third is not None
    assert third.top == ()
    assert third.logprob == pytest.approx(float(want[got[2].token]), abs=1e-5)


@pytest.mark.parametrize("max_elements", [1 << 22, 100, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prompt_logprobs(dtype: torch.dtype, max_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "_MAX_ELEMENTS", max_elements)
    logits = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens = [5, 0, 32, 7, 7, 1, 2]
    want = torch.log_softmax(logits.double(), -1)
    got = prompt_logprobs(logits, tokens, 3)
    assert [each.token for each in got] == tokens
    for t, each in enumerate(got):
        assert each.logprob == pytest.approx(float(want[t, tokens[t]]), abs=1e-5)
        assert [value for _, value in each.top] == pytest.approx(want[t].topk(3).values.tolist(), abs=1e-5)
        assert all(value == pytest.approx(float(want[t, token]), abs=1e-5) for token, value in each.top)
    assert prompt_logprobs(logits[:0], [], 3) == []
    assert len(prompt_logprobs(logits, tokens, 40)[0].top) == 33


def test_equal_logprobs_are_in_order_of_their_ids() -> None:
    (got,) = prompt_logprobs(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), [0], 4)
    assert [token for token, _ in got.top] == [1, 3, 0, 2]
