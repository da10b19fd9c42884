"""`coserve bench sharing`: every policy at every load, beside a job that trains throughout.

Owns: which runs there are and in what order. Does not own: a run (driver.py), engines (engines.py), rows (results.py).

    1. the TPOT objective, measured unless given    2. capacity, by bisection of inference-only, unless given
    3. per repeat: finetune-only, then for each load each policy, one after another, so that a drift of the machine hits all
    4. a burst under each policy, if asked for

Every run is a cell of its own on disk. All policies of a repeat see the same arrivals and the same training data.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from coserve.bench.arrivals import Arrival, ArrivalConfig, make_arrivals, make_burst, poisson_arrivals
from coserve.bench.capacity import allowed_misses, find_capacity
from coserve.bench.cells import CellStore, run_from_dict, run_to_dict
from coserve.bench.driver import BenchEngine, DrivenJob, Run, RunConfig, run_load
from coserve.bench.metrics import SloInMs, meets
from coserve.bench.recording import RecordedEngine
from coserve.bench.runlog import SUFFIX, write_log
from coserve.config.settings import FinetuneConfig, parse_policy
from coserve.config.values import is_number, require, require_least, require_positive
from coserve.core import CoserveError

SPATIAL = "spatial"
WARMUP_SHARE = 0.1
"""Requests before the counted ones, as a share of them; more where it takes more until as many leave as come."""
PROBE_RESIDENCES = 4
"""A search run lasts at least so many times a request's stay: less would show how a batch fills, not what rate it bears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurstConfig:
    """Poisson arrivals at a share of capacity, with a burst in the middle. Seconds."""

    base_load: float = 0.2
    factor: float = 3.0
    warmup_s: float = 5.0
    before_s: float = 15.0
    burst_s: float = 10.0
    after_s: float = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingConfig:
    """What is measured."""

    policies: tuple[str, ...] = (
        "inference-only", "coserve", "layer-sliced", "temporal:16", "temporal:64", "dynamic-temporal", SPATIAL
    )
    """As in SchedulerConfig.policy, and 'spatial'. finetune-only is always measured: it is what throughput is a share of."""
    loads: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Shares of capacity."""
    requests: int = 150
    """Counted requests per cell."""
    pairs: int = 5
    """Repeats, interleaved; medians are reported."""
    arrivals: ArrivalConfig = field(default_factory=ArrivalConfig)
    seed: int = 0
    ttft_ms: float = 3000.0
    tpot_ms: float | None = None
    """None: tpot_factor times the per-token time of transformers.generate, measured in the same run."""
    tpot_factor: float = 1.25
    capacity: float | None = None
    """Requests per second; None: measured."""
    capacity_requests: int = 100
    capacity_start: float = 2.0
    """Requests per second, where the search begins."""
    capacity_tolerance: float = 0.05
    alone_s: float = 60.0
    """Window of finetune-only: long beside a micro-batch, whose forward and backward tokens differ in cost."""
    settle_s: float = 5.0
    """A job trains so long before finetune-only's window, and before requests come."""
    drain_s: float = 60.0
    burst: BurstConfig | None = None

    def __post_init__(self) -> None:
        for policy in self.policies:
            if policy != SPATIAL:
                parse_policy(policy)
        for name in ("tpot_ms", "ttft_ms"):
            value = getattr(self, name)
            require(value is None or is_number(value), name, f"must be a number of milliseconds, got {value}: capacity and "
                    "attainment are counted against it")
        require_least(self, 1, "requests", "pairs", "capacity_requests")
        require_positive(self, "ttft_ms", "tpot_factor", "capacity_start", "capacity_tolerance", "alone_s", "drain_s",
                         "tpot_ms", "capacity")
        require(bool(self.loads) and all(load > 0 for load in self.loads), "loads",
                f"must be positive shares of capacity, got {self.loads}")


class SharingSetup(NamedTuple):
    """What the measurement runs on. prompts: a source of prompts from a seed; directory: for the jobs' outputs; log: whether a
    log of each run is kept beside its cell, if its engine has one (runlog.py). Cells that are there already get none."""

    make_engine: Callable[[str, SloInMs], BenchEngine]
    prompts: Callable[[Sequence[int]], Callable[[int], Sequence[int]]]
    measure_peer_ms: Callable[[], float]
    training_file: Path
    finetune: FinetuneConfig
    directory: Path
    sleep: Callable[[float], None]
    log: bool = False


class Cell(NamedTuple):
    """A finished run. load: share of capacity; rate: requests per second; both 0 for finetune-only."""

    policy: str
    load: float
    rate: float
    repeat: int
    run: Run


class Measured(NamedTuple):
    """All that was measured; results.py makes rows of it. probes: inference-only runs of the search for capacity."""

    objectives: SloInMs
    peer_ms: float | None
    capacity: float
    probes: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    bursts: tuple[Cell, ...]


class Sharing:
    """The whole measurement, from cells on disk where they are, else run."""

    def __init__(self, config: SharingConfig, setup: SharingSetup, store: CellStore) -> None:
        self.config, self.setup, self.store = config, setup, store

    def measure(self) -> Measured:
        config = self.config
        objectives, peer_ms = self._objectives()
        capacity, probes = self._capacity(objectives)
        policies = [policy for policy in dict.fromkeys(config.policies) if policy != "finetune-only"]
        cells = []
        for repeat in range(config.pairs):
            cells.append(self._alone(objectives, repeat))
            for load in config.loads:
                cells += [self._cell(policy, load, load * capacity, repeat, objectives) for policy in policies]
        bursts = []
        if config.burst is not None:
            bursts = [self._burst(policy, capacity, objectives) for policy in policies if policy != "inference-only"]
        return Measured(objectives, peer_ms, capacity, tuple(probes), tuple(cells), tuple(bursts))

    def num_cells(self) -> int:
        """Cells without the search for capacity, whose length is not known beforehand."""
        policies = set(self.config.policies) - {"finetune-only"}
        bursts = len(policies - {"inference-only"}) if self.config.burst is not None else 0
        return self.config.pairs * (1 + len(self.config.loads) * len(policies)) + bursts

    def _objectives(self) -> tuple[SloInMs, float | None]:
        config = self.config
        if config.tpot_ms is not None:
            return SloInMs(ttft_ms=config.ttft_ms, tpot_ms=config.tpot_ms), None
        self.store.expected_s = None
        peer_ms = float(self.store.get("peer", {}, lambda: {"ms": self.setup.measure_peer_ms()})["ms"])
        return SloInMs(ttft_ms=config.ttft_ms, tpot_ms=config.tpot_factor * peer_ms), peer_ms

    def _capacity(self, objectives: SloInMs) -> tuple[float, list[Cell]]:
        config = self.config
        probes: list[Cell] = []
        if config.capacity is not None:
            return config.capacity, []
        with contextlib.ExitStack() as stack:
            engines: list[BenchEngine] = []

            def engine() -> BenchEngine:
                """One engine for all probes, made when the first has to be run."""
                if not engines:
                    engines.append(stack.enter_context(contextlib.closing(
                        self.setup.make_engine("inference-only", objectives))))
                    self._warm_up(engines[0])
                return engines[0]

            def holds(rate: float) -> bool:
                count = max(config.capacity_requests, PROBE_RESIDENCES * self._num_staying(rate, objectives))
                arrivals, limit = self._poisson(rate, count), allowed_misses(count)
                plan = replace(window_of(arrivals, 0, config.drain_s), give_up=(objectives, limit))
                settings = {"requests": count, **self._settings(rate, objectives)}
                self.store.expected_s = plan.window_end_s
                run = run_from_dict(self.store.get(f"capacity-{rate:.4g}", settings, lambda: run_to_dict(run_load(
                    engine(), arrivals, self.setup.prompts((config.seed, 1, len(probes))), plan, sleep=self.setup.sleep,
                ))))
                probes.append(Cell("inference-only", 0.0, rate, len(probes), run))
                return not run.gave_up and sum(not meets(r, objectives) for r in run.records) <= limit

            rate = find_capacity(holds, start=config.capacity_start, tolerance=config.capacity_tolerance)
        return rate, probes

    def _warm_up(self, engine: BenchEngine) -> None:
        """First uses (weights laid out, kernels chosen) must not count against the first probe."""
        arrivals = self._poisson(self.config.capacity_start, 4)
        prompt = self.setup.prompts((self.config.seed, 0))
        run_load(engine, arrivals, prompt, window_of(arrivals, 0, self.config.drain_s), sleep=self.setup.sleep)

    def _num_staying(self, rate: float, objectives: SloInMs) -> int:
        """Requests that run at once where each takes all the time that its objective allows."""
        sample = make_arrivals(self.config.arrivals, 1.0, self.config.requests, self.config.seed)
        return math.ceil(rate * objectives.tpot_ms / 1e3 * mean(arrival.output_tokens for arrival in sample))

    def _poisson(self, rate: float, count: int) -> list[Arrival]:
        return poisson_arrivals(self.config.arrivals, rate, count, self.config.seed)

    def _settings(self, rate: float, objectives: SloInMs) -> dict[str, Any]:
        """What every run's result depends on, for its key."""
        return {"rate": rate, "objectives": asdict(objectives), "arrivals": asdict(self.config.arrivals)}

    def _alone(self, objectives: SloInMs, repeat: int) -> Cell:
        config = self.config
        plan = RunConfig(window_start_s=config.settle_s, window_end_s=config.settle_s + config.alone_s)
        settings = {"alone_s": config.alone_s, "settle_s": config.settle_s, "objectives": asdict(objectives)}
        run = self._stored("finetune-only", f"finetune-only-{repeat}", settings, objectives, [], plan, repeat)
        return Cell("finetune-only", 0.0, 0.0, repeat, run)

    def _cell(self, policy: str, load: float, rate: float, repeat: int, objectives: SloInMs) -> Cell:
        config = self.config
        warmup = max(1, round(WARMUP_SHARE * config.requests), self._num_staying(rate, objectives))
        arrivals = make_arrivals(config.arrivals, rate, warmup + config.requests, config.seed + repeat)
        arrivals = [a._replace(due_s=a.due_s + config.settle_s) for a in arrivals]
        settings = {"requests": config.requests, "settle_s": config.settle_s, **self._settings(rate, objectives)}
        plan = window_of(arrivals, warmup, config.drain_s)
        run = self._stored(policy, f"{policy}-{load:g}-{repeat}", settings, objectives, arrivals, plan, repeat)
        return Cell(policy, load, rate, repeat, run)

    def _burst(self, policy: str, capacity: float, objectives: SloInMs) -> Cell:
        config, burst = self.config, self.config.burst
        assert burst is not None
        rate = burst.base_load * capacity
        arrivals = make_burst(
            rate, burst.factor, burst.warmup_s + burst.before_s, burst.burst_s, burst.after_s, config.arrivals, config.seed
        )
        end = burst.warmup_s + burst.before_s + burst.burst_s + burst.after_s
        plan = RunConfig(window_start_s=burst.warmup_s, window_end_s=end, drain_s=config.drain_s, sample_s=0.05)
        settings = {"burst": asdict(burst), **self._settings(rate, objectives)}
        return Cell(policy, burst.base_load, rate, 0, self._stored(
            policy, f"burst-{policy}", settings, objectives, arrivals, plan, 0))

    def _stored(
        self, policy: str, label: str, settings: dict[str, Any], objectives: SloInMs, arrivals: list[Arrival],
        plan: RunConfig, repeat: int,
    ) -> Run:
        """A run in a fresh engine, with a job unless the policy is inference-only."""
        def execute() -> dict[str, Any]:
            prompt = self.setup.prompts((self.config.seed, 2, repeat))
            with (
                contextlib.closing(self.setup.make_engine(policy, objectives)) as engine,
                self._job(engine, policy) as job,
            ):
                run = run_load(engine, arrivals, prompt, plan, sleep=self.setup.sleep, job=job)
                run = replace(run, machine=engine.machine())
                if self.setup.log and isinstance(engine, RecordedEngine):
                    cell = self.store.path(label, key)
                    write_log(cell.with_name(cell.stem + SUFFIX), engine.log(run, arrivals, plan))
                return run_to_dict(run)

        self.store.expected_s, key = plan.window_end_s, {"repeat": repeat, **settings}
        return run_from_dict(self.store.get(label, key, execute))

    @contextlib.contextmanager
    def _job(self, engine: BenchEngine, policy: str) -> Iterator[DrivenJob | None]:
        """A job that trains inside the block; its output is not kept."""
        if policy == "inference-only":
            yield None
            return
        output = self.setup.directory / "job"
        shutil.rmtree(output, ignore_errors=True)
        job = engine.finetune(self.setup.training_file, output, self.setup.finetune, name="bench")
        try:
            yield job
        finally:
            with contextlib.suppress(CoserveError):  # a job that has failed can't be cancelled
                job.cancel()
            while not job.finished and engine.step():
                pass
            shutil.rmtree(output, ignore_errors=True)


def window_of(arrivals: Sequence[Arrival], warmup: int, drain_s: float) -> RunConfig:
    """From the last warm-up request to the last one: it holds as many mean gaps as counted requests."""
    start = arrivals[warmup - 1].due_s if warmup else 0.0
    return RunConfig(window_start_s=start, window_end_s=arrivals[-1].due_s, drain_s=drain_s)
