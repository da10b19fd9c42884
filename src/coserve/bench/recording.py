"""What an engine did in a run: its iterations, its requests and its job, noted while it runs.

Owns: the notes, and what is read off them. Does not own: the engine, the load (driver.py), the file of a log (runlog.py). A
note is a few objects that exist anyway, so that it costs a few microseconds per iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from coserve.bench.arrivals import Arrival
from coserve.bench.driver import ENDED_WELL, DrivenJob, Handle, Run, RunConfig
from coserve.bench.machine import MachineRecord
from coserve.bench.runlog import Iteration, LoggedRequest, PoolShape, RunLog
from coserve.config.settings import FinetuneConfig, SamplingConfig
from coserve.core import CoserveError, MeasuredStep, StepPlan, StepResult
from coserve.devices.bound import JobShape
from coserve.engine.engine import Engine, PlanRunner
from coserve.engine.step import Lookup
from coserve.runtime.microbatch import microbatch_layout
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.latency import Coefficient, LatencyModel
from coserve.scheduler.work import MicrobatchWork
from coserve.simulation.jobs import SimulatedBatch
from coserve.simulation.runner import TrainedRows


class Submitted(NamedTuple):
    """A request that came. handle: None where the engine refused it."""

    time_s: float
    handle: Handle | None


class _Seen(NamedTuple):
    """A micro-batch of which a unit has run. arena_blocks: of the pool, that it takes."""

    work: MicrobatchWork
    arena_blocks: int


@dataclass(slots=True)
class Recorder:
    """Notes of one run. arena_blocks: of a micro-batch by its number."""

    scheduler: HybridScheduler
    arena_blocks: Callable[[int], int]
    iterations: list[Iteration] = field(default_factory=list)
    submitted: list[Submitted] = field(default_factory=list)
    rows: TrainedRows = field(default_factory=TrainedRows)
    law: Mapping[Coefficient, float] = field(init=False)
    _batches: list[SimulatedBatch] = field(default_factory=list)
    _open: dict[int, _Seen] = field(default_factory=dict)
    _in_flight: int = 1
    _idle_since: float | None = None
    _launched: dict[int, tuple[float, float]] = field(default_factory=dict)
    """(when it was launched, seconds without work before) of iterations that are not known to be over, by number."""

    def __post_init__(self) -> None:
        self.law = self.scheduler.latency.coefficients

    # --- called while the engine runs ---

    def on_step(self, time_s: float, worked: bool) -> None:
        """A call of the engine's `step`, which began at a time, has returned."""
        if not worked and self._idle_since is None:
            self._idle_since = time_s

    def on_launch(self, step_s: float, start_s: float, plan: StepPlan) -> None:
        """An iteration has been launched. step_s: when the call of `step` began that did. Must be called before its plan's
        commit."""
        idle_s = 0.0 if self._idle_since is None else step_s - self._idle_since
        self._idle_since = None
        self._launched[plan.number] = (start_s, idle_s)
        for item in plan.units:
            work = self.scheduler.microbatch(item.microbatch)
            self.rows.add(item, work.num_layers)
            self._in_flight = max(self._in_flight, len(self.scheduler.jobs[work.job].microbatches))
            if item.microbatch not in self._open and not work.forward_only:
                self._open[item.microbatch] = _Seen(work, self.arena_blocks(item.microbatch))
        for part in plan.optimizer:
            if part.start == 0:  # all of the batch are through
                self._batches.append(self._close(self.scheduler.jobs[part.job].optimizer_elements))

    def on_end(self, ended: MeasuredStep) -> None:
        """An iteration is over."""
        start_s, idle_s = self._launched.pop(ended.plan.number)
        self.iterations.append(Iteration(start_s, ended.seconds, ended.plan.predicted_s, idle_s, ended.plan.contents))

    def _close(self, elements: int) -> SimulatedBatch:
        """The batch of the micro-batches that are open, in their order."""
        seen = [self._open[number] for number in sorted(self._open)]
        self._open.clear()
        return _batch_of(seen, elements, self._in_flight)

    # --- afterwards ---

    @property
    def batches(self) -> list[SimulatedBatch]:
        """The batches of the optimizer steps that have begun. If none has, one of the micro-batches that have."""
        if self._batches or not self._open:
            return list(self._batches)
        return [_batch_of([self._open[number] for number in sorted(self._open)], 1, self._in_flight)]

    def job_shape(self) -> JobShape | None:
        """A micro-batch as large as the largest that ran, of which each token has as many query-key pairs and labels as the
        mean of all. None without a job."""
        works = [seen for batch in self.batches for seen in _shapes(batch)]
        if not works:
            return None
        tokens, pairs, labels = (sum(work[field] for work in works) for field in range(3))
        largest, first = max(work[0] for work in works), self.batches[0]
        return JobShape(
            tokens=largest, pairs=round(pairs * largest / tokens), labels=round(labels * largest / tokens),
            recompute_fraction=first.recompute_fraction, lowest_layer=first.lowest,
        )

    def machine(self) -> MachineRecord:
        """What the run keeps of its machine."""
        law = LatencyModel(self.law)
        ratios = [
            done.seconds / law.seconds(done.contents) for done in self.iterations
            if (cost := done.contents.inference) is not None and not (
                cost.fused_rows or done.contents.units or done.contents.optimizer_elements)
        ]
        return MachineRecord(
            law=self.law, num_layers=self.scheduler.picker.shapes.num_layers, job=self.job_shape(),
            quantum_s=self.scheduler.config.preemption_quantum_ms / 1e3, pass_ratio=median(ratios) if ratios else None,
        )


    def log(self, run: Run, arrivals: Sequence[Arrival], plan: RunConfig, pool: PoolShape) -> RunLog:
        """The log of a run that came of these arrivals. Times count from the run's start."""
        requests = [
            LoggedRequest(
                arrival, come.time_s - run.start_s,
                () if come.handle is None else tuple(at - run.start_s for at in come.handle.token_times),
                come.handle is not None and come.handle.finished and come.handle.finish_reason in ENDED_WELL,
            ) for arrival, come in zip(arrivals, self.submitted, strict=False)  # those that came before the run was given up
        ]
        return RunLog(
            scheduler=self.scheduler.config, law=self.law, num_layers=self.scheduler.picker.shapes.num_layers, pool=pool,
            plan=plan, run=run, requests=requests, batches=self.batches,
            iterations=[done._replace(start_s=done.start_s - run.start_s) for done in self.iterations],
        )


def _batch_of(seen: Sequence[_Seen], elements: int, in_flight: int) -> SimulatedBatch:
    works = [item.work for item in seen]
    return SimulatedBatch(
        microbatches=[[end - first for first, end in work.bounds] for work in works], elements=elements,
        lowest=works[0].lowest, grid=works[0].grid, recompute_fraction=works[0].recompute_fraction,
        in_flight=in_flight, label_rows=[work.label_rows for work in works], arena_blocks=[item.arena_blocks for item in seen],
    )


def _shapes(batch: SimulatedBatch) -> list[tuple[int, int, int]]:
    """(tokens, query-key pairs, labels) of each micro-batch."""
    return [
        (sum(examples), sum(tokens * (tokens + 1) // 2 for tokens in examples), len(labels))
        for examples, labels in zip(batch.microbatches, batch.label_rows, strict=True)
    ]


class RecordedEngine:
    """An engine in process with notes of what it did, as a benchmark needs it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.recorder = Recorder(engine.scheduler, self._arena_blocks)
        self._step_s = 0.0
        self._runner: PlanRunner = engine.runner
        engine.runner = self

    def _arena_blocks(self, number: int) -> int:
        model, micro = self.engine.model, self.engine.jobs.microbatches[number]
        layout = microbatch_layout(
            micro.plan, micro.batch.num_tokens, model.weights.architecture, model.dtype.itemsize,
            forward_only=micro.forward_only,
        )
        return -(-layout.total // self.engine.device.pool.block_bytes)

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        """Runs an iteration, as the engine's runner, and notes it."""
        start_s = self.engine.clock()
        result = self._runner.run(plan, lookup)
        self.recorder.on_launch(self._step_s, start_s, plan)
        for ended in result.ended:
            self.recorder.on_end(ended)
        return result

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Handle:
        """As Engine.submit."""
        now = self.engine.now()
        try:
            handle = self.engine.submit(prompt_ids, sampling)
        except CoserveError:
            self.recorder.submitted.append(Submitted(now, None))
            raise
        self.recorder.submitted.append(Submitted(now, handle))
        return handle

    def step(self) -> bool:
        """As Engine.step."""
        self._step_s = self.engine.clock()
        worked = self.engine.step()
        self.recorder.on_step(self._step_s, worked)
        return worked

    def finetune(self, data_path: Path, output_dir: Path, config: FinetuneConfig, *, name: str) -> DrivenJob:
        """As Engine.finetune."""
        return self.engine.finetune(data_path, output_dir, config, name=name)

    def now(self) -> float:
        """As Engine.now."""
        return self.engine.now()

    def metrics(self) -> Mapping[str, Any]:
        """As Engine.metrics. forward_rows: of finetuning, through all layers. fused_rows: those of them that rode in a pass
        with requests."""
        rows = self.recorder.rows
        return {**self.engine.metrics(), "forward_rows": rows.forward, "fused_rows": rows.fused}

    def machine(self) -> MachineRecord:
        """What a run keeps of its machine."""
        return self.recorder.machine()

    def log(self, run: Run, arrivals: Sequence[Arrival], plan: RunConfig) -> RunLog:
        """The log of the one run that this engine has had."""
        engine, pool = self.engine, self.engine.blocks
        memory = PoolShape(
            num_blocks=pool.num_blocks, block_tokens=pool.block_tokens, guaranteed_blocks=pool.guaranteed_blocks,
            caching=engine.config.prefix_caching, max_context=engine.model.architecture.max_position_embeddings,
        )
        return self.recorder.log(run, arrivals, plan, memory)

    def close(self) -> None:
        """As Engine.close."""
        self.engine.close()
