"""A job's trainer where several ranks share the model: every rank has one, and all are told the same.

    the caller, on rank 0     TrainerOnRanks: each verb, and each piece of a verb, is an order (runtime/ranks.py)
    ranks 1 to N - 1          an AdapterTrainer, its twin

Owns: which methods are orders. Does not own: what they do (trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from coserve.compiler.parallelize import TensorParallel
from coserve.config.settings import FinetuneConfig
from coserve.core import Example, Group
from coserve.finetune.job import StepLoss
from coserve.peft.adapter import Adapter
from coserve.peft.gate import PassedAdapter
from coserve.planning.budget import FittedPlan
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.microbatch import InFlight, pack
from coserve.training.batchwork import Microbatch, Role, examples_of
from coserve.training.trainer import AdapterTrainer


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSetup:
    """What a rank needs to know to make a job's trainer. group: with the adapter's shardings. fitted: the plan. passed: the
    adapter that is continued. end_token_ids: as for AdapterTrainer."""

    settings: FinetuneConfig
    group: TensorParallel
    fitted: FittedPlan
    passed: PassedAdapter | None
    end_token_ids: Sequence[int]


def make_trainer(setup: JobSetup, loaded: LoadedModel) -> AdapterTrainer:
    """A rank's trainer; all ranks make theirs together."""
    trainer = AdapterTrainer(loaded, setup.settings, **_arguments(setup))
    trainer.prepare_weights()
    return trainer


def _arguments(setup: JobSetup) -> dict[str, Any]:
    """Of AdapterTrainer, as its setup has them."""
    return {
        "plan": setup.fitted.plan, "in_flight": setup.fitted.in_flight, "group": setup.group, "passed": setup.passed,
        "end_token_ids": setup.end_token_ids,
    }


def _begin(
    trainer: AdapterTrainer, role: Role, examples: Sequence[Example], step: int, buffer: Tensor | None
) -> InFlight:
    """A micro-batch's memory on a rank."""
    batch = pack(examples, device=trainer.executor.weights.device, seed=trainer.config.seed, step=step)
    plan, _ = trainer.lane(role)
    return trainer.executor.begin(batch, plan, forward_only=role != "train", buffer=buffer)


class TrainerOnRanks(AdapterTrainer):
    """A job's trainer on rank 0, whose twins do what it does. warn: as for AdapterTrainer."""

    def __init__(self, loaded: LoadedModel, setup: JobSetup, warn: Callable[[str], None]) -> None:
        assert loaded.processes is not None
        self._processes = loaded.processes
        self._master: Tensor | None = None
        """The whole adapter's present values, once they have been put together."""
        with self._processes.told(make_trainer, setup, loaded, keeps=True) as keep:
            super().__init__(loaded, setup.settings, warn=warn, **_arguments(setup))
            keep(self)
        for name in ("adapter", "reference"):  # units are told which of them they compute with
            if getattr(self, name) is not None:
                self._processes.call(getattr, self, name, keeps=True)

    # --- verbs ---

    def forward_backward(self, groups: Sequence[Group], step: int) -> StepLoss:
        return self._processes.call(AdapterTrainer.forward_backward, self, groups, step)

    def score(self, groups: Sequence[Group]) -> StepLoss:
        return self._processes.call(AdapterTrainer.score, self, groups)

    def optim_step(self, rate: float) -> float:
        self._master = None
        return self._processes.call(AdapterTrainer.optim_step, self, rate)

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        state, num_updates = self._processes.call(AdapterTrainer.optimizer_state, self)
        self._master = state["master"]
        return state, num_updates

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        self._master = None
        self._processes.call(AdapterTrainer.restore, self, state, num_updates)

    def publish(self) -> None:
        """Nobody is served here."""

    def save(self, directory: Path, *, master: Tensor | None = None) -> None:
        if master is None:
            self.before_save()
            master = self._master
        super().save(directory, master=master)

    # --- their pieces ---

    def begin(self, micro: Microbatch, buffer: Tensor | None) -> InFlight:
        arguments = (micro.role, examples_of(micro.groups), micro.step, buffer)
        with self._processes.told(_begin, self, *arguments, keeps=True) as keep:
            return keep(super().begin(micro, buffer))

    def set_coefficients(self, state: InFlight, coefficients_N: Tensor) -> None:
        self._processes.call(AdapterTrainer.set_coefficients, self, state, coefficients_N)

    def clip(self, norm: float | None = None) -> float:
        return self._processes.call(AdapterTrainer.clip, self, norm)

    def update(self, start: int, end: int, rate: float) -> None:
        self._master = None
        self._processes.call(AdapterTrainer.update, self, start, end, rate)

    def copy_adapter(self) -> Adapter:
        return self._processes.call(AdapterTrainer.copy_adapter, self, keeps=True)

    def snapshot(self) -> dict[str, Tensor]:
        return self.optimizer_state()[0]

    def before_save(self) -> None:
        if self._master is None:
            self.optimizer_state()
