"""The verbs of finetuning on one loaded model: forward_backward, score, optim_step, save, publish."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.config import FinetuneConfig
from coserve.core import CapacityError, Direction, Example, Group, Unit
from coserve.engine.model import LoadedModel
from coserve.finetune.batches import pack_groups
from coserve.finetune.job import StepLoss
from coserve.finetune.objectives import OBJECTIVES, Outcome, Scored
from coserve.finetune.optimizer import FlatAdamW
from coserve.peft.format import save_adapter
from coserve.peft.lora import LoraAdapter
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.microbatch import InFlight, pack
from coserve.runtime.plans import scoring_plan, training_plan

MIN_WINDOW = 32


def sweep(num_layers: int, lowest: int, num_tokens: int, window: int, *, forward_only: bool = False) -> Iterator[Unit]:
    """The units of one micro-batch in the plainest order: windows left to right, then layers down, windows right to left."""
    starts = range(0, num_tokens, window)
    for start in starts:
        yield Unit(Direction.FORWARD, 0, num_layers, start, min(start + window, num_tokens))
    if forward_only:
        return
    for layer in reversed(range(lowest, num_layers)):
        for start in reversed(starts):
            yield Unit(Direction.BACKWARD, layer, layer + 1, start, min(start + window, num_tokens))


class LoraTrainer:
    """One job's adapter, its optimizer and its plans. `start`: an adapter to continue from (also the DPO reference)."""

    def __init__(
        self, model: LoadedModel, config: FinetuneConfig, *, start: LoraAdapter | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.config, self.warn = model, config, warn
        arch, weights = model.architecture, model.weights
        adapter = start or LoraAdapter.create(
            arch, config.lora, dtype=weights.dtype, device=weights.device, seed=config.seed
        )
        self.adapter = adapter.trainable()
        assert self.adapter.grad is not None
        self.objective = OBJECTIVES[config.objective](config)
        self.reference = start.copy() if start is not None else None
        self.optimizer = FlatAdamW(config.optimizer, self.adapter.flat, self.adapter.grad)
        self.executor = TrainExecutor(model.executor)
        itemsize = weights.dtype.itemsize
        self.plan = training_plan(arch, self.adapter, itemsize=itemsize)
        self.scoring = scoring_plan(arch, self.adapter, itemsize=itemsize)
        self.reference_scoring = scoring_plan(arch, self.reference, itemsize=itemsize)
        self.window = config.window_tokens
        self.published: LoraAdapter | None = None
        self._reference_sums: dict[int, float] = {}

    # --- verbs ---

    def forward_backward(self, groups: Sequence[Group], step: int) -> StepLoss:
        """Adds the gradients of one optimizer batch. Out of memory: the batch starts again with smaller windows."""
        assert self.adapter.grad is not None
        while True:
            try:
                return self._run(groups, step, train=True)
            except torch.OutOfMemoryError as error:
                self.adapter.grad.zero_()
                if self.window // 2 < MIN_WINDOW or self.config.deterministic:
                    reason = "and deterministic keeps the windows" if self.config.deterministic else "at the smallest window"
                    raise CapacityError(
                        f"out of memory, {reason}; lower max_microbatch_tokens ({error})", param="max_microbatch_tokens"
                    ) from error
                self.window //= 2
                self.warn(f"out of memory: windows are now at most {self.window} tokens; the step starts again")

    def score(self, groups: Sequence[Group]) -> StepLoss:
        """The mean loss of `groups`, without gradients and without dropout."""
        return self._run(groups, 0, train=False)

    def optim_step(self, rate: float) -> float:
        norm = self.optimizer.clip()
        self.optimizer.step(rate)
        return norm

    def save(self, directory: Path) -> None:
        save_adapter(
            directory, self.adapter, self.optimizer.master, base_name=self.model.name, fingerprint=self.model.fingerprint
        )

    def publish(self) -> None:
        self.published = self.adapter.copy()

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        return self.optimizer.state(), self.optimizer.num_updates

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        self.optimizer.load(state, num_updates)

    # --- inside ---

    def _run(self, groups: Sequence[Group], step: int, *, train: bool) -> StepLoss:
        normalizer = self.objective.normalizer(groups)
        loss, correct, labels, tokens = 0.0, 0, 0, 0
        extra: dict[str, float] = {}
        for micro in pack_groups(groups, self.config.max_microbatch_tokens):
            state, outcomes = self._forward(micro, step, normalizer, train=train)
            if train:
                state.set_coefficients(torch.cat([c for outcome in outcomes for c in outcome.coefficients]))
                self._backward(state)
            loss += sum(outcome.loss for outcome in outcomes)
            for outcome in outcomes:
                for name, value in outcome.metrics.items():
                    extra[name] = extra.get(name, 0.0) + value
            correct += int(state.correct.sum())
            labels += state.correct.shape[0]
            tokens += state.batch.num_tokens
        return StepLoss(loss, correct / max(1, labels), tokens, extra)

    def _forward(
        self, micro: Sequence[Group], step: int, normalizer: float, *, train: bool
    ) -> tuple[InFlight, list[Outcome]]:
        """Forward units of a micro-batch, and the objective's answer for each of its groups."""
        references = self._references(micro) if self.objective.needs_reference else {}
        examples = [example for group in micro for example in group.examples]
        plan = self.plan if train else self.scoring
        state = self._units(examples, step, plan, self.adapter, forward_only=not train)
        bounds = iter(state.batch.label_bounds)
        outcomes = []
        for group in micro:
            scored = []
            for example in group.examples:
                part = slice(*next(bounds))
                scored.append(Scored(state.logprobs[part], state.batch.label_weights[part], references.get(example.index)))
            outcomes.append(self.objective.outcome(scored, normalizer))
        return state, outcomes

    def _units(
        self, examples: Sequence[Example], step: int, plan: ModelPlan, adapter: LoraAdapter | None, *, forward_only: bool
    ) -> InFlight:
        batch = pack(examples, device=self.model.weights.device, seed=self.config.seed, step=step)
        state = self.executor.begin(batch, plan, forward_only=forward_only)
        layers = self.model.architecture.num_layers
        for unit in sweep(layers, layers, batch.num_tokens, self.window, forward_only=True):
            self.executor.run(state, unit, adapter)
        return state

    def _backward(self, state: InFlight) -> None:
        layers, lowest = self.model.architecture.num_layers, state.plan.lowest_trained
        for unit in sweep(layers, lowest, state.batch.num_tokens, self.window):
            if unit.direction is Direction.BACKWARD:
                self.executor.run(state, unit, self.adapter)

    def _references(self, micro: Sequence[Group]) -> dict[int, float]:
        """Summed log-probabilities under the reference, computed once per example and remembered.

        A group at a time, so that a sum never depends on what shared its micro-batch: a resumed job meets the same numbers.
        """
        for group in micro:
            if group.examples[0].index in self._reference_sums:
                continue
            state = self._units(group.examples, 0, self.reference_scoring, self.reference, forward_only=True)
            weighted = state.logprobs.double() * state.batch.label_weights
            for example, (first, end) in zip(group.examples, state.batch.label_bounds, strict=True):
                self._reference_sums[example.index] = float(weighted[first:end].sum())
        return self._reference_sums
