"""A job that several engines share, in one of them: its share of each batch, the common total, the common update.

    forward_backward --> SharedBatchRun: pulls micro-batches while there is time for units, seals their sum, takes the total
    optim_step       --> SharedOptimizerRun: an update by the total, whose result all members compare

Nothing here waits: while a member waits for others, the engine's thread runs requests and other jobs, and looks again in
`done`. Owns: a member's part in a job. Does not own: who runs which micro-batch (exchange.py), which verb comes next
(finetune/job.py). Validation, checkpoints and publishing are the primary's alone; the reference's sums (DPO) are computed where
the policy's micro-batch runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from coserve.core import ConfigError, Group, JobFailed
from coserve.engine.exchange import Dismissed, DropShare, Exchange, SealShare, StepTotal, TakeShare
from coserve.engine.verbs import BatchRun, Host, OptimizerRun
from coserve.finetune.checkpoints import Cursor
from coserve.finetune.job import Job, StepLoss
from coserve.runtime.transfer import to_device
from coserve.scheduler.work import JobWork
from coserve.training.batchwork import BatchWork
from coserve.training.trainer import AdapterTrainer

_OWN_FACTS = ("start",)
"""Facts of a job that may differ between members: where the adapter that it continues lies."""


def refuse_sharing(*, deterministic: bool, num_ranks: int) -> None:
    """Raises ConfigError for a job that can't have several members."""
    if deterministic:
        raise ConfigError(
            "members: a deterministic job runs on one replica, since sums over several are added in another order; leave out "
            "members, or deterministic", param="members",
        )
    if num_ranks > 1:
        raise ConfigError(
            f"members: this replica's model is shared by {num_ranks} processes, and such replicas can't share a job yet; leave "
            "out members", param="members",
        )


def shared_facts(facts: Mapping[str, object], dtype: str) -> dict[str, str]:
    """What members must agree on, by name, as texts."""
    named = {"dtype": dtype, **{name: value for name, value in facts.items() if name not in _OWN_FACTS}}
    return {name: json.dumps(value, sort_keys=True) for name, value in named.items()}


class Membership:
    """A job's part in an exchange, on the engine's thread. facts: as `shared_facts`."""

    def __init__(self, exchange: Exchange, trainer: AdapterTrainer, job: Job, facts: Mapping[str, str]) -> None:
        self.exchange, self._trainer, self._job, self._facts = exchange, trainer, job, facts
        self._entered = self._began = False
        self._norm = 0.0

    @property
    def follows(self) -> bool:
        """Whether another member holds the job's lease."""
        return not self.exchange.primary

    def ready(self, *, updating: bool) -> bool:
        """Whether the job may go on; called before it does. A member that follows waits for the primary's state first, and the
        primary tells it. updating: whether an update is under way. Raises Dismissed."""
        exchange, trainer = self.exchange, self._trainer
        if exchange.failure is not None:
            raise exchange.failure
        if not self._entered:
            self._entered = True
            state, num_updates = trainer.optimizer_state()
            exchange.enter(num_updates, self._facts, state)
            self._began = exchange.primary
        if not self._began:
            joined = exchange.joined()
            if joined is None:
                return False
            trainer.restore(dict(joined.tensors), joined.step)
            self._job.cursor = Cursor(step=joined.step, trained_tokens=0)
            self._began = True
        if exchange.wants_state and not updating:
            state, num_updates = trainer.optimizer_state()
            exchange.give_state(num_updates, state)
        return True

    def batch(self, host: Host, job: int, groups: Sequence[Group], step: int) -> SharedBatchRun:
        """A step's batch. job: the job's number."""
        return SharedBatchRun(self._trainer, host, job, groups, step, self.exchange, self._take_norm)

    def _take_norm(self, norm: float) -> None:
        self._norm = norm

    def optimizer(self, work: JobWork, rate: float) -> SharedOptimizerRun:
        """The update by the total that came last."""
        return SharedOptimizerRun(self._trainer, work, rate, self._norm, self.exchange)

    def leave(self) -> None:
        """Takes part no more."""
        self.exchange.leave()


def ended_by(error: Dismissed) -> JobFailed | None:
    """What a dismissal is for the job of this member: its failure, or nothing but its end."""
    return JobFailed(str(error)) if error.fault else None


class SharedBatchRun(BatchRun):
    """A member's share of an optimizer batch. It is done when the total of all shares lies in the adapter's gradient.
    tell_norm: is called with the total's norm."""

    def __init__(
        self, trainer: AdapterTrainer, host: Host, job: int, groups: Sequence[Group], step: int, exchange: Exchange,
        tell_norm: Callable[[float], None],
    ) -> None:
        super().__init__(trainer, host, job, groups, step, train=True)
        self._new_batch = partial(BatchWork, trainer, groups, step, train=True, shared=True)
        self._batch = self._new_batch()
        self._exchange, self._tell_norm = exchange, tell_norm
        self._taken: list[int] = []
        self._orders: list[Any] = []
        self._sealing = self._sealed = False
        self._total: StepTotal | None = None
        exchange.begin(step, self._batch.num_microbatches)

    @property
    def answer(self) -> StepLoss:
        assert self._total is not None
        return self._total.counts.result

    def done(self) -> bool:
        if self._total is None:
            self._advance()
            self._obey()
            self._begin_waiting()
            if self._sealing and self._batch.finished:
                self._seal()
            elif self._total is None and not self._sealing and self._has_room:
                self._exchange.pull()
        if self._total is None or not self._exchange.settled:
            return False
        self._gradient.copy_(to_device(self._total.gradient, self._gradient.device))
        self._tell_norm(self._total.norm)
        return True

    @property
    def _gradient(self) -> Tensor:
        assert self._trainer.adapter.grad is not None
        return self._trainer.adapter.grad

    @property
    def _has_room(self) -> bool:
        """Whether a further micro-batch could begin at once. One that finds no memory now waits, and no other is asked for."""
        return self._batch.next is None and len(self._in_flight) < self._trainer.in_flight

    def _obey(self) -> None:
        """Does what has been ordered, as far as the sum that was sealed last has been read."""
        self._orders += self._exchange.orders()
        if self._sealed:
            if not self._exchange.settled:
                return
            self._gradient.zero_()
            self._sealed = False
        while self._orders and self._total is None:
            match self._orders.pop(0):
                case TakeShare(id):
                    self._sealing = False
                    self._taken.append(id)
                    self._batch.take(id)
                case SealShare():
                    self._sealing = bool(self._taken)
                case DropShare():
                    self._forget()
                case StepTotal() as total:
                    self._forget()
                    self._total = total

    def _seal(self) -> None:
        """Hands over the sum of what has run here."""
        self._exchange.seal(tuple(self._taken), self._gradient, self._batch.take_counts())
        self._taken.clear()
        self._sealing, self._sealed = False, True

    def _forget(self) -> None:
        """Drops what was taken and not sealed."""
        if self._taken:
            self.drop()
            self._batch = self._new_batch()
            self._gradient.zero_()
        self._taken.clear()
        self._sealing = False

    def restart(self) -> None:
        """Gives back what was taken, after it ran out of memory. The caller has set the gradients to zero."""
        self._exchange.give_back()
        self._forget()


class SharedOptimizerRun(OptimizerRun):
    """An update by the total of all members. norm: of the total, which is the same number everywhere."""

    def __init__(self, trainer: AdapterTrainer, work: JobWork, rate: float, norm: float, exchange: Exchange) -> None:
        super().__init__(trainer, work, rate, norm)
        self._exchange, self._told = exchange, False

    def done(self) -> bool:
        if not super().done():
            return False
        if not self._told and self.num_elements:
            self._told = True
            state, num_updates = self._trainer.optimizer_state()
            self._exchange.told_update(num_updates - 1, state["master"])
        return True
