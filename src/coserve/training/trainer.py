"""Carries out the verbs of one job on a loaded model: forward_backward, score, optim_step, save, publish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.plan import ModelPlan
from coserve.config.settings import FinetuneConfig
from coserve.core import CapacityError, Direction, Group, RankFailed, Unit
from coserve.finetune.job import StepLoss
from coserve.finetune.objectives import OBJECTIVES
from coserve.finetune.optimizer import FlatAdamW
from coserve.peft.adapter import Adapter
from coserve.peft.format import save_adapter
from coserve.peft.gate import PassedAdapter
from coserve.peft.kinds import new_adapter
from coserve.peft.share import RankLayout, shared_adapter, whole_view
from coserve.planning.budget import JobPlans, Workload
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.microbatch import InFlight
from coserve.runtime.plans import scoring_plan
from coserve.runtime.transfer import to_device
from coserve.training.batchwork import BatchWork, Lane, Microbatch, ReferenceSums, Role

MIN_WINDOW = 32
"""The fewest tokens to which windows shrink after out-of-memory."""


def out_of_memory(error: torch.OutOfMemoryError, *, deterministic: bool) -> CapacityError:
    """The error for a job whose windows can't get smaller."""
    reason = "and deterministic keeps the windows" if deterministic else "at the smallest window"
    return CapacityError(f"out of memory, {reason}; lower max_microbatch_tokens ({error})", param="max_microbatch_tokens")


def sweep(num_layers: int, lowest: int, num_tokens: int, window: int, *, forward_only: bool = False) -> Iterator[Unit]:
    """A micro-batch's units in the simplest order: forward left to right, then backward layer by layer, right to left."""
    starts = range(0, num_tokens, window)
    for start in starts:
        yield Unit(Direction.FORWARD, 0, num_layers, start, min(start + window, num_tokens))
    if forward_only:
        return
    for layer in reversed(range(lowest, num_layers)):
        for start in reversed(starts):
            yield Unit(Direction.BACKWARD, layer, layer + 1, start, min(start + window, num_tokens))


class AdapterTrainer:
    """One job's adapter, its optimizer and its plans.

    start: an adapter to continue, which is also the DPO reference. plan: default what `config` asks for, with micro-batches of
    `max_microbatch_tokens`. in_flight: how many micro-batches an engine may have in flight at once. end_token_ids: tokens that
    the data teaches to end with. group: the ranks that share the model, where there are several; every rank has a trainer, and
    calls the same verbs in the same order. passed: as `start`, read from files but on no backbone, which ranks need. warn:
    called with warnings.
    """

    def __init__(
        self, model: LoadedModel, config: FinetuneConfig, *, start: Adapter | None = None,
        plan: ModelPlan | None = None, in_flight: int = 1, end_token_ids: Sequence[int] = (),
        group: TensorParallel | None = None, passed: PassedAdapter | None = None,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.config, self.warn = model, config, warn
        arch, weights = model.architecture, model.weights
        self.layout: RankLayout | None = None
        """Where this rank's part of the adapter lies, where several ranks share it."""
        if group is not None:
            first, self.layout = shared_adapter(weights, config.adapter, group.fixed, seed=config.seed, passed=passed)
            start = None if passed is None else first
        else:
            first = start or new_adapter(weights, config.adapter, seed=config.seed)
        self.adapter = first.trainable()
        self.adapter.end_token_ids = tuple(end_token_ids)
        assert self.adapter.grad is not None
        self.objective = OBJECTIVES[config.objective](config)
        self.reference = start.copy() if start is not None else None
        self.optimizer = FlatAdamW(config.optimizer, self.adapter.flat, self.adapter.grad, changed=self.adapter.refresh)
        self.executor = TrainExecutor(model.executor)
        itemsize = weights.dtype.itemsize
        whole = self.whole
        if plan is None:
            workload = Workload(config.max_microbatch_tokens, config.max_length or config.max_microbatch_tokens)
            plans = JobPlans(
                arch, whole, workload, itemsize=itemsize, compression=config.activation_compression, ranks=group
            )
            plan = plans.asked(config).plan
        self.plan, self.in_flight = plan, in_flight
        reference = None if self.reference is None else whole
        self.scoring = scoring_plan(arch, whole, itemsize=itemsize, ranks=group)
        self.reference_scoring = scoring_plan(arch, reference, itemsize=itemsize, ranks=group)
        self.window = config.grid_tokens or config.window_tokens
        self.refresh_seconds = self._refresh_seconds()
        self.published: Adapter | None = None
        self.reference_sums: ReferenceSums = {}

    @property
    def whole(self) -> Adapter:
        """The adapter, or where ranks share it one with the parameters of the whole and no values."""
        return self.adapter if self.layout is None else whole_view(self.adapter, self.layout, self.model.weights)

    def prepare_weights(self) -> None:
        """Lays weights out for training, which the first step would do otherwise, with more memory."""
        self.executor.prepare(self.plan)

    # --- verbs ---

    def forward_backward(self, groups: Sequence[Group], step: int) -> StepLoss:
        """Adds the gradients of one optimizer batch. Out of memory: starts it again with smaller windows, or CapacityError; on
        one of several ranks, RankFailed."""
        assert self.adapter.grad is not None
        while True:
            try:
                return self._run(groups, step, train=True)
            except torch.OutOfMemoryError as error:
                self.adapter.grad.zero_()
                if self.layout is not None:  # the other ranks are in the middle of it
                    raise RankFailed(f"out of memory; lower max_microbatch_tokens or window_tokens ({error})") from error
                if self.window // 2 < MIN_WINDOW or self.config.deterministic:
                    raise out_of_memory(error, deterministic=self.config.deterministic) from error
                self.window //= 2
                self.warn(f"out of memory: windows are now at most {self.window} tokens; the step starts again")

    def score(self, groups: Sequence[Group]) -> StepLoss:
        """The mean loss of `groups`, without gradients or dropout."""
        return self._run(groups, 0, train=False)

    def optim_step(self, rate: float) -> float:
        norm = self.clip()
        self.optimizer.step(rate)
        return norm

    def save(self, directory: Path, *, master: Tensor | None = None) -> None:
        """Writes the adapter. master: values of an earlier moment, from `optimizer_state`; default the present ones. One of
        several ranks needs it."""
        assert master is not None or self.layout is None, "a rank has no adapter to write"
        values = self.optimizer.master if master is None else master
        save_adapter(
            directory, self.whole, values, base_name=self.model.name, fingerprint=self.model.fingerprint,
            quantization=self.model.quantization,
        )

    def publish(self) -> None:
        self.published = self.adapter.copy()

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        state = self.optimizer.state()
        if self.layout is not None:
            state = {name: self.layout.join(part) for name, part in state.items()}
        return state, self.optimizer.num_updates

    def restore(self, state: dict[str, Tensor], num_updates: int) -> None:
        if self.layout is not None:
            state = {name: self.layout.take(whole) for name, whole in state.items()}
        self.optimizer.load(state, num_updates)

    # --- the pieces of verbs, for an engine that runs them within iterations ---

    def lane(self, role: Role) -> Lane:
        """What micro-batches of a role run with."""
        match role:
            case "train":
                return Lane(self.plan, self.adapter)
            case "score":
                return Lane(self.scoring, self.adapter)
            case "reference":
                return Lane(self.reference_scoring, self.reference)

    def begin(self, micro: Microbatch, buffer: Tensor | None) -> InFlight:
        """Takes a micro-batch's memory: `buffer` (bytes), or the executor's own, which serves one at a time."""
        return self.executor.begin(micro.batch, micro.plan, forward_only=micro.forward_only, buffer=buffer)

    def set_coefficients(self, state: InFlight, coefficients_N: Tensor) -> None:
        """Multiplies a micro-batch's unscaled gradient rows by coefficients [N], in the host's memory, one per label."""
        state.set_coefficients(to_device(coefficients_N, state.logprobs.device))

    def clip(self, norm: float | None = None) -> float:
        """Completes the gradient, and clips it. Returns its norm before. norm: of a gradient that is complete already."""
        if self.layout is not None and norm is None:
            assert self.adapter.grad is not None
            self.layout.sum_gradients(self.adapter.grad)
            norm = self.layout.norm(self.adapter.grad)
        return self.optimizer.clip(norm)

    def update(self, start: int, end: int, rate: float) -> None:
        """Updates elements [start, end) of the parameters. The slice that ends with the last one ends the step."""
        self.optimizer.update(start, end, rate)
        if end == self.num_elements:
            self.optimizer.close_step()

    @property
    def num_elements(self) -> int:
        """Parameters that are updated here."""
        return self.optimizer.master.numel()

    def copy_adapter(self) -> Adapter:
        """A version of the adapter with the present values, for requests."""
        return self.adapter.copy()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the optimizer's state, for a checkpoint: of the whole adapter, also where ranks share it."""
        state, _ = self.optimizer_state()
        return state if self.layout is not None else {name: tensor.clone() for name, tensor in state.items()}

    def before_save(self) -> None:
        """Makes `save` possible in any thread."""

    # --- inside ---

    def _refresh_seconds(self) -> float:
        """The measured time to refresh what the adapter derives from its parameters (DoRA's norms), in seconds."""
        def now() -> float:
            if self.adapter.flat.device.type == "cuda":
                torch.cuda.synchronize(self.adapter.flat.device)
            return time.perf_counter()

        started = now()
        self.adapter.refresh()
        return now() - started

    def _run(self, groups: Sequence[Group], step: int, *, train: bool) -> StepLoss:
        """Runs one micro-batch after another, in the order of `sweep`."""
        work = BatchWork(self, groups, step, train=train)
        layers = self.model.architecture.num_layers
        while work.next is not None:
            micro = work.begin()
            assert micro.state is not None
            for unit in sweep(layers, layers, micro.batch.num_tokens, self.window, forward_only=True):
                self.executor.run(micro.state, unit, micro.adapter)
            work.answer(micro)
            if not micro.forward_only:
                for unit in sweep(layers, micro.plan.lowest_trained, micro.batch.num_tokens, self.window):
                    if unit.direction is Direction.BACKWARD:
                        self.executor.run(micro.state, unit, micro.adapter)
            work.close(micro)
        return work.result()
