"""Objectives: coefficients are the gradient of the written loss with respect to each log-probability."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.config.settings import FinetuneConfig, Objective
from coserve.core import Example, Group
from coserve.finetune.objectives import OBJECTIVES, PreferenceObjective, Scored, SupervisedObjective

F64 = torch.float64


def scored(count: int, seed: int, reference: float | None = None, dtype: torch.dtype = F64) -> Scored:
    """Random log-probabilities, and weights among which some are 0 and some not 1."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(count, dtype=dtype, generator=generator) * 5
    weights = torch.tensor([0.0, 1.0, 1.0, 0.25, 2.0])[torch.randint(0, 5, (count,), generator=generator)]
    return Scored(logprobs, weights, reference)


def group(index: int, *weights: Sequence[float]) -> Group:
    examples = tuple(
        Example(index=index, token_ids=np.zeros(len(w), np.int64), weights=np.array(w, np.float32)) for w in weights
    )
    return Group(index=index, examples=examples)


def cross_entropy(examples: Sequence[Scored], logprobs: Sequence[Tensor], normalizer: float) -> Tensor:
    return sum((-(e.weights * p).sum() for e, p in zip(examples, logprobs, strict=True)), torch.zeros(())) / normalizer


def dpo(pairs: Sequence[tuple[Scored, Scored]], logprobs: Sequence[tuple[Tensor, Tensor]], beta: float) -> Tensor:
    """Rafailov et al. 2023, equation 7: the mean of -log sigmoid(beta log(pi/ref)(chosen) - beta log(pi/ref)(rejected))."""
    losses = []
    for (chosen, rejected), (p_chosen, p_rejected) in zip(pairs, logprobs, strict=True):
        assert chosen.reference is not None
        assert rejected.reference is not None
        ratio_chosen = (chosen.weights * p_chosen).sum() - chosen.reference
        ratio_rejected = (rejected.weights * p_rejected).sum() - rejected.reference
        losses.append(-torch.log(1 / (1 + torch.exp(-(beta * ratio_chosen - beta * ratio_rejected)))))
    return torch.stack(losses).mean()


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=5), normalizer=st.floats(0.5, 50), seed=st.integers(0, 10**6))
def test_supervised_coefficients_are_the_gradient(counts: list[int], normalizer: float, seed: int) -> None:
    """Each group gives its share; the shares of an optimizer batch add up to its loss."""
    examples = [scored(count, seed + i) for i, count in enumerate(counts)]
    leaves = [example.logprobs.clone().requires_grad_() for example in examples]
    loss = cross_entropy(examples, leaves, normalizer)
    outcomes = [SupervisedObjective().outcome([example], normalizer) for example in examples]
    assert sum(outcome.loss for outcome in outcomes) == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-12)
    grads = torch.autograd.grad(loss, leaves)
    for outcome, grad, example in zip(outcomes, grads, examples, strict=True):
        (coefficients,) = outcome.coefficients
        assert coefficients.shape == example.logprobs.shape
        assert torch.allclose(coefficients, grad, rtol=1e-12, atol=0)
        assert outcome.metrics == {}


def test_supervised_loss_is_the_mean_over_label_tokens() -> None:
    """As transformers' Trainer counts under accumulation: one mean over all label tokens of the optimizer batch."""
    groups = [group(0, [9.0, 1, 0, 1]), group(1, [9.0, 1]), group(2, [9.0, 0, 0.5])]
    objective = SupervisedObjective()
    assert objective.normalizer(groups) == 3.5, "the first token has no predecessor"
    assert not objective.needs_reference
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    labels = torch.tensor([3, 1, 0, 6, 2])
    logprobs = torch.log_softmax(logits, 1).gather(1, labels[:, None])[:, 0]
    ones = torch.ones(2), torch.ones(3)
    total = sum(
        objective.outcome([Scored(part, weights, None)], 5.0).loss
        for part, weights in zip(logprobs.split([2, 3]), ones, strict=True)
    )
    assert total == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), beta=st.floats(0.01, 2),
    offset=st.floats(-8, 8), seed=st.integers(0, 10**6),
)
def test_dpo_coefficients_are_the_gradient(counts: list[tuple[int, int]], beta: float, offset: float, seed: int) -> None:
    pairs = [
        (scored(a, seed + 2 * i, -6.0 + offset), scored(b, seed + 2 * i + 1, -6.5)) for i, (a, b) in enumerate(counts)
    ]
    leaves = [tuple(e.logprobs.clone().requires_grad_() for e in pair) for pair in pairs]
    loss = dpo(pairs, leaves, beta)
    objective = PreferenceObjective(beta)
    outcomes = [objective.outcome(pair, float(len(pairs))) for pair in pairs]
    assert sum(outcome.loss for outcome in outcomes) == pytest.approx(float(loss.detach()), rel=1e-10)
    grads = torch.autograd.grad(loss, [leaf for pair in leaves for leaf in pair])
    found = [c for outcome in outcomes for c in outcome.coefficients]
    for have, want in zip(found, grads, strict=True):
        assert torch.allclose(have, want, rtol=1e-9, atol=1e-15)


def margin_pair(margin: float) -> tuple[Scored, Scored]:
    """A pair whose chosen ratio exceeds the rejected one by `margin`."""
    one = torch.ones(1)
    return Scored(torch.tensor([-2.0], dtype=F64), one, -2.0 - margin), Scored(torch.tensor([-3.0], dtype=F64), one, -3.0)


def test_dpo_at_the_reference_starts_at_log_two() -> None:
    outcome = PreferenceObjective(0.1).outcome(margin_pair(0.0), 1.0)
    assert outcome.loss == pytest.approx(math.log(2))
    assert [float(c) for c in outcome.coefficients] == pytest.approx([-0.05, 0.05])


@pytest.mark.parametrize(("margin", "loss", "pull"), [(-5000.0, 5000.0, 1.0), (5000.0, 0.0, 0.0)])
def test_dpo_far_from_the_reference_is_finite(margin: float, loss: float, pull: float) -> None:
    outcome = PreferenceObjective(1.0).outcome(margin_pair(margin), 1.0)
    assert outcome.loss == pytest.approx(loss)
    assert [float(c) for c in outcome.coefficients] == pytest.approx([-pull, pull])


def test_dpo_metrics_are_shares_of_the_batch() -> None:
    objective = PreferenceObjective(0.5)
    outcomes = [objective.outcome(margin_pair(margin), 4.0) for margin in (3.0, -1.0, 2.0, 0.0)]
    total = {name: sum(outcome.metrics[name] for outcome in outcomes) for name in outcomes[0].metrics}
    assert total == pytest.approx({"reward_margin": 0.5 * (3 - 1 + 2) / 4, "reward_accuracy": 0.5})


def test_dpo_counts_pairs() -> None:
    objective = PreferenceObjective(0.1)
    assert objective.normalizer([group(0, [1.0, 1.0], [1.0, 1.0]), group(1, [1.0] * 5, [1.0] * 7)]) == 2.0
    assert objective.needs_reference
    with pytest.raises(AssertionError):
        objective.outcome([scored(2, 0, None), scored(2, 1, -1.0)], 1.0)


def test_float32_log_probabilities_give_float32_coefficients() -> None:
    for objective, examples in (
        (SupervisedObjective(), [scored(3, 0, dtype=torch.float32)]),
        (PreferenceObjective(0.1), [scored(3, 0, -1.0, torch.float32), scored(2, 1, -1.0, torch.float32)]),
    ):
        outcome = objective.outcome(examples, 2.0)
        assert all(c.dtype == torch.float32 for c in outcome.coefficients)
        assert isinstance(outcome.loss, float)


def test_objectives_by_name() -> None:
    assert OBJECTIVES.keys() == {*get_args(Objective)}
    assert isinstance(OBJECTIVES["sft"](FinetuneConfig()), SupervisedObjective)
    preference = OBJECTIVES["dpo"](FinetuneConfig(objective="dpo", dpo_beta=0.7))
    assert isinstance(preference, PreferenceObjective)
    assert preference.beta == 0.7
