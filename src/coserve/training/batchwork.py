"""One optimizer batch, or one validation, as micro-batches of which several may be in flight.

    groups --pack--> micro-batches --begin--> forward units --answer--> backward units --close--> the batch's loss

The caller runs the units: `AdapterTrainer` sweeps through one micro-batch after another, the engine's scheduler picks units as
they fit. A DPO batch begins with forward-only micro-batches of the reference policy.

Members of one job (engine/sharing.py) each run a share of the batch: the micro-batches that `take` names, and first what the
reference policy says of them. A group's reference sums never depend on which member computes them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.config.settings import FinetuneConfig
from coserve.core import Example, Group
from coserve.finetune.batches import pack_groups
from coserve.finetune.job import StepLoss
from coserve.finetune.objectives import Scored, TrainingLoss
from coserve.peft.adapter import Adapter
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.microbatch import InFlight, MicrobatchLayout, PackedBatch, microbatch_layout, pack

Role = Literal["train", "score", "reference"]
"""What a micro-batch is for: gradients, the policy's loss alone, or the reference policy's log-probabilities."""

ReferenceSums = dict[bytes, tuple[float, ...]]
"""Summed log-probabilities under a job's reference policy, one per example of a group, by `group_key`."""


def group_key(group: Group) -> bytes:
    """A digest of a group's tokens and loss weights, on which alone its reference sums depend. Its index would not do, since
    training and validation groups are stored together."""
    digest = hashlib.sha256()
    for example in group.examples:
        digest.update(example.num_tokens.to_bytes(8, "little"))
        digest.update(example.token_ids.tobytes())
        digest.update(example.weights.tobytes())
    return digest.digest()


class Lane(NamedTuple):
    """What the micro-batches of one role run with."""

    plan: ModelPlan
    adapter: Adapter | None


class BatchSource(Protocol):
    """What a batch needs of its trainer."""

    config: FinetuneConfig
    objective: TrainingLoss
    executor: TrainExecutor
    reference_sums: ReferenceSums

    def lane(self, role: Role) -> Lane:
        """What micro-batches of a role run with."""

    def begin(self, micro: Microbatch, buffer: Tensor | None) -> InFlight:
        """Takes a micro-batch's memory: `buffer`, or the executor's own."""

    def set_coefficients(self, state: InFlight, coefficients_N: Tensor) -> None:
        """As `InFlight.set_coefficients`, from the host's memory."""


@dataclass(slots=True, kw_only=True)
class Microbatch:
    """One micro-batch. keys: of its groups in ReferenceSums, if the objective needs a reference. step: part of the key of the
    dropout masks. deterministic: its units use deterministic algorithms. state: None while it has no memory."""

    groups: Sequence[Group]
    keys: Sequence[bytes]
    batch: PackedBatch
    role: Role
    lane: Lane
    step: int
    deterministic: bool
    state: InFlight | None = None

    @property
    def plan(self) -> ModelPlan:
        return self.lane.plan

    @property
    def adapter(self) -> Adapter | None:
        return self.lane.adapter

    @property
    def forward_only(self) -> bool:
        return self.role != "train"

    @property
    def is_reference(self) -> bool:
        """Whether it only scores the reference policy."""
        return self.role == "reference"


class LossCounts(NamedTuple):
    """What micro-batches add to a batch's result. loss, extra: shares of the batch's. correct, labels: label tokens that are
    the arg max, and all. tokens: of the examples."""

    loss: float
    correct: int
    labels: int
    tokens: int
    extra: Mapping[str, float]

    @property
    def result(self) -> StepLoss:
        """If these are all of the batch: its loss and counts."""
        return StepLoss(self.loss, self.correct / max(1, self.labels), self.tokens, dict(self.extra))


def examples_of(groups: Sequence[Group]) -> list[Example]:
    """The examples of groups, in order."""
    return [example for group in groups for example in group.examples]


class BatchWork:
    """A batch under way. step: part of the dropout masks' key. train: False for validation: no gradients and no dropout.
    shared: whether only those of its micro-batches run that `take` names; the normalizer is the whole batch's all the same."""

    def __init__(
        self, source: BatchSource, groups: Sequence[Group], step: int, *, train: bool, shared: bool = False
    ) -> None:
        self.source, self.train, self.step = source, train, step
        self.normalizer = source.objective.normalizer(groups)
        self._open = 0
        self._forget()
        self._packed = pack_groups(groups, source.config.max_microbatch_tokens)
        self._waiting: deque[Microbatch] = deque()
        if not shared:
            policy = [self._microbatch(micro, "train" if train else "score", step) for micro in self._packed]
            self._waiting += [*self._references(self._packed), *policy]

    # --- a share of the batch ---

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the whole batch, which `take` counts from 0. The same wherever the batch is packed."""
        return len(self._packed)

    def take(self, number: int) -> None:
        """Adds one micro-batch to those that run here."""
        micro = self._packed[number]
        coming = {key for waiting in self._waiting if waiting.is_reference for key in waiting.keys}
        self._waiting += [one for one in self._references([micro]) if one.keys[0] not in coming]
        self._waiting.append(self._microbatch(micro, "train" if self.train else "score", self.step))

    def take_counts(self) -> LossCounts:
        """What has run here since the last call."""
        counts = LossCounts(self._loss, self._correct, self._labels, self._tokens, dict(self._extra))
        self._forget()
        return counts

    def _forget(self) -> None:
        self._loss, self._correct, self._labels, self._tokens = 0.0, 0, 0, 0
        self._extra: dict[str, float] = {}

    # --- its micro-batches ---

    def _references(self, packed: Sequence[Sequence[Group]]) -> list[Microbatch]:
        """One micro-batch per group, so that a sum never depends on other groups. A resumed job then gets the same sums."""
        if not self.source.objective.needs_reference:
            return []
        unique = {group_key(group): group for micro in packed for group in micro}
        known = self.source.reference_sums
        return [self._microbatch([group], "reference", 0) for key, group in unique.items() if key not in known]

    def _microbatch(self, groups: Sequence[Group], role: Role, step: int) -> Microbatch:
        source = self.source
        keys = [group_key(group) for group in groups] if source.objective.needs_reference else []
        batch = pack(examples_of(groups), device=source.executor.weights.device, seed=source.config.seed, step=step)
        return Microbatch(
            groups=groups, keys=keys, batch=batch, role=role, lane=source.lane(role), step=step,
            deterministic=source.config.deterministic,
        )

    # --- the course of one micro-batch ---

    @property
    def next(self) -> Microbatch | None:
        """The micro-batch to begin next, or None."""
        return self._waiting[0] if self._waiting else None

    def layout(self, micro: Microbatch) -> MicrobatchLayout:
        """The memory that a micro-batch takes in flight."""
        executor = self.source.executor
        return microbatch_layout(
            micro.plan, micro.batch.num_tokens, executor.arch, executor.weights.dtype.itemsize, forward_only=micro.forward_only
        )

    def begin(self, buffer: Tensor | None = None) -> Microbatch:
        """Begins the next micro-batch in `buffer` (bytes). None: in the executor's own memory, which holds one at a time."""
        micro = self._waiting.popleft()
        micro.state = self.source.begin(micro, buffer)
        self._open += 1
        return micro

    def can_answer(self, micro: Microbatch) -> bool:
        """Whether `answer` may be called once forward has run. A micro-batch of the policy needs its groups' reference sums."""
        return micro.is_reference or all(key in self.source.reference_sums for key in micro.keys)

    def answer(self, micro: Microbatch) -> None:
        """Applies the objective to a micro-batch after its forward, so that backward may begin; or stores its reference sums.

        The objective runs on the host, so that each micro-batch waits for the device once, whatever the objective reads.
        """
        assert micro.state is not None
        if micro.is_reference:
            self._remember(micro, micro.state)
            return
        state, bounds = micro.state, iter(micro.batch.label_bounds)
        logprobs, correct = state.logprobs.cpu(), state.correct.cpu()
        weights = micro.batch.label_weights
        coefficients: list[Tensor] = []
        references = iter([total for key in micro.keys for total in self.source.reference_sums[key]])
        for group in micro.groups:
            scored = []
            for _ in group.examples:
                part = slice(*next(bounds))
                scored.append(Scored(logprobs[part], weights[part], next(references, None)))
            outcome = self.source.objective.outcome(scored, self.normalizer)
            coefficients += outcome.coefficients
            self._loss += outcome.loss
            for name, value in outcome.metrics.items():
                self._extra[name] = self._extra.get(name, 0.0) + value
        if self.train:
            self.source.set_coefficients(state, torch.cat(coefficients))
        self._correct += int(correct.sum())
        self._labels += correct.shape[0]
        self._tokens += micro.batch.num_tokens

    def _remember(self, micro: Microbatch, state: InFlight) -> None:
        weighted = state.logprobs.cpu().double() * micro.batch.label_weights
        (key,) = micro.keys
        sums = tuple(float(weighted[first:end].sum()) for first, end in micro.batch.label_bounds)
        self.source.reference_sums[key] = sums

    def close(self, micro: Microbatch) -> None:
        """Ends a micro-batch that is done. The caller may reuse its memory."""
        micro.state = None
        self._open -= 1

    @property
    def finished(self) -> bool:
        return not self._waiting and not self._open

    def result(self) -> StepLoss:
        """The loss and counts of the whole batch."""
        return LossCounts(self._loss, self._correct, self._labels, self._tokens, self._extra).result

