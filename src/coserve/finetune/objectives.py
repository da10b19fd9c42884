"""Training objectives: from the log-probabilities of complete groups to coefficients d loss / d logprob.

An objective never sees activations. Forward gives log p and its gradient row for each label; the objective gives the factor by
which that row is scaled. Losses are means over an optimizer batch, and every group contributes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from coserve.config.settings import FinetuneConfig
from coserve.core import Group


class Scored(NamedTuple):
    """One example after forward. logprobs, weights: [labels of the example]. reference: sum of weighted log-probabilities under
    the reference policy, or None."""

    logprobs: Tensor
    weights: Tensor
    reference: float | None


class Outcome(NamedTuple):
    """A group's result. coefficients: one tensor [labels] per example. loss, metrics: the group's share of the batch's."""

    coefficients: tuple[Tensor, ...]
    loss: float
    metrics: Mapping[str, float]


class TrainingLoss(Protocol):
    """A training objective, as a job needs it."""

    needs_reference: bool

    def normalizer(self, groups: Sequence[Group]) -> float:
        """The number by which the sum over an optimizer batch is divided."""

    def outcome(self, examples: Sequence[Scored], normalizer: float) -> Outcome:
        """The coefficients and loss of one complete group."""


class SupervisedObjective:
    """Cross-entropy: the weighted mean of -log p over the label tokens of the optimizer batch, as Hugging Face's Trainer
    computes it under gradient accumulation."""

    needs_reference = False

    def normalizer(self, groups: Sequence[Group]) -> float:
        return sum(example.label_weight for group in groups for example in group.examples)

    def outcome(self, examples: Sequence[Scored], normalizer: float) -> Outcome:
        (example,) = examples
        weights = example.weights.to(example.logprobs.dtype)
        coefficients = -weights / normalizer
        return Outcome((coefficients,), float((coefficients * example.logprobs).sum()), {})


class PreferenceObjective:
    """DPO over (chosen, rejected): -log sigmoid(beta * (chosen margin - rejected margin)), the mean over pairs.

    A margin is log p under the policy minus log p under the reference. Source: Rafailov et al. 2023.
    """

    needs_reference = True

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def normalizer(self, groups: Sequence[Group]) -> float:
        return float(len(groups))

    def outcome(self, examples: Sequence[Scored], normalizer: float) -> Outcome:
        sums = []
        for example in examples:
            assert example.reference is not None
            total = (example.weights.to(example.logprobs.dtype) * example.logprobs).sum().double()
            sums.append(total - example.reference)
        chosen, rejected = sums
        logit = self.beta * (chosen - rejected)
        pull = float(self.beta * torch.sigmoid(-logit) / normalizer)
        coefficients = tuple(
            sign * pull * example.weights.to(example.logprobs.dtype)
            for sign, example in zip((-1, 1), examples, strict=True)
        )
        metrics = {
            "reward_margin": float(logit) / normalizer,
            "reward_accuracy": float(logit > 0) / normalizer,
        }
        return Outcome(coefficients, float(-torch.nn.functional.logsigmoid(logit) / normalizer), metrics)


OBJECTIVES: Mapping[str, Callable[[FinetuneConfig], TrainingLoss]] = {
    "sft": lambda config: SupervisedObjective(),
    "dpo": lambda config: PreferenceObjective(config.dpo_beta),
}
