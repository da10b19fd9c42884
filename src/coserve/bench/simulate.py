"""`coserve bench simulate`: policies at given rates on a simulated engine, beside a job that trains throughout.

Owns: which runs there are, and the keys of the results that only a simulation has. Does not own: a run (driver.py), the engine
(simulated.py), rows (results.py), the page (report.py).

    1. capacity, by bisection of inference-only, unless given    2. finetuning alone    3. each policy at each rate

All policies at a rate see the same arrivals.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count
from typing import Any

from coserve.bench.arrivals import Arrival, ArrivalConfig, make_arrivals, poisson_arrivals
from coserve.bench.capacity import allowed_misses, find_capacity
from coserve.bench.driver import Run, RunConfig, run_load
from coserve.bench.machine import bound_keys, law_to_dict
from coserve.bench.metrics import SloInMs, meets
from coserve.bench.sharing import PROBE_RESIDENCES, SPATIAL, WARMUP_SHARE, Cell, Measured, window_of
from coserve.bench.simulated import SimulatedMachine, SimulatedServer
from coserve.config.settings import POLICIES, parse_policy
from coserve.config.values import is_number, require, require_positive
from coserve.core import StepPlan
from coserve.devices.bound import JobShape, OfferedLoad, fused_bound
from coserve.simulation.disturbance import TrueLaw
from coserve.simulation.requests import distinct_prompt

PROBE_REQUESTS = 200
"""Fewest requests of a run that searches for capacity."""
ALONE = "finetune-only"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """What is simulated. Times are of the simulated clock."""

    policies: tuple[str, ...] = ("coserve", "layer-sliced", "temporal:16", "dynamic-temporal", "inference-only")
    """As in SchedulerConfig.policy. finetune-only is always simulated: it is what throughput is a share of."""
    rates: tuple[float, ...] = (1.0, 5.0, 10.0, 20.0)
    """Requests per second."""
    duration: float = 120.0
    """Seconds over which the counted requests come."""
    arrivals: ArrivalConfig = field(default_factory=lambda: ArrivalConfig(
        prompt_tokens=220, output_tokens=260, length_spread=0.8, max_tokens=8192))
    seed: int = 0
    ttft_ms: float = 5000.0
    tpot_ms: float = 45.0
    capacity: float | None = None
    """Requests per second that inference alone holds; None: searched for."""
    capacity_tolerance: float = 0.1
    alone_s: float = 60.0
    """Window of finetune-only: long beside a micro-batch, whose forward and backward tokens differ in cost."""
    settle_s: float = 5.0
    """A job trains so long before finetune-only's window, and before requests come."""

    def __post_init__(self) -> None:
        require(bool(self.policies), "policies", f"name at least one of {', '.join(POLICIES)}")
        for policy in self.policies:
            require(policy != SPATIAL, "policies", "spatial is two processes at once on one device, for which there is no law; "
                    "measure it with coserve bench sharing, or leave it out")
            parse_policy(policy)
        require(bool(self.rates) and all(is_number(rate) and rate > 0 for rate in self.rates), "rates",
                f"must be positive numbers of requests per second, got {self.rates}")
        for name in ("ttft_ms", "tpot_ms", "duration", "capacity", "capacity_tolerance", "alone_s", "settle_s"):
            value = getattr(self, name)
            require(value is None or is_number(value), name, f"must be a finite number, got {value}")
        require_positive(self, "ttft_ms", "tpot_ms", "duration", "capacity", "capacity_tolerance", "alone_s", "settle_s")

    @property
    def objectives(self) -> SloInMs:
        return SloInMs(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms)


Listen = Callable[[str, float], None]
"""Told a run's name and how much of it is done, from 0 to 1."""


class Simulation:
    """All runs of one machine."""

    def __init__(self, config: SimulationConfig, machine: SimulatedMachine, listen: Listen = lambda label, done: None) -> None:
        self.config, self.machine, self._listen = config, machine, listen

    def measure(self) -> Measured:
        """Simulates everything. Raises InvalidRequest or NotFound for a trace that can't be used."""
        config = self.config
        for rate in config.rates:
            self._arrivals(rate)  # a trace that is too short is told before anything runs
        capacity, probes = self._capacity()
        policies = [policy for policy in dict.fromkeys(config.policies) if policy != ALONE]
        cells = [Cell(ALONE, 0.0, 0.0, 0, self.alone())]
        for rate in dict.fromkeys(config.rates):
            cells += [Cell(policy, rate / capacity, rate, 0, self.beside(policy, rate)) for policy in policies]
        return Measured(config.objectives, None, capacity, tuple(probes), tuple(cells), ())

    # --- runs ---

    def alone(self) -> Run:
        """Finetuning without requests."""
        config = self.config
        plan = RunConfig(window_start_s=config.settle_s, window_end_s=config.settle_s + config.alone_s)
        return self.run(ALONE, "finetuning alone", [], plan)

    def beside(self, policy: str, rate: float) -> Run:
        """A policy at a rate. Raises InvalidRequest or NotFound for a trace that can't be used."""
        arrivals = self._arrivals(rate)
        plan = window_of(arrivals, self._num_warmup(rate), self._drain_s(arrivals))
        return self.run(policy, f"{policy} at {rate:g} requests/s", arrivals, plan)

    def run(self, policy: str, label: str, arrivals: Sequence[Arrival], plan: RunConfig) -> Run:
        """A run in a fresh engine, with a job unless the policy is inference-only."""
        server = self.machine.make(policy, lambda now: self._listen(label, min(1.0, now / plan.window_end_s)))
        self._listen(label, 0.0)
        job = None if policy == "inference-only" else server.train(self.machine.planned(policy))
        run = run_load(server, arrivals, make_prompts(), plan, sleep=server.sleep, job=job)
        self._listen(label, 1.0)
        return run

    def _capacity(self) -> tuple[float, list[Cell]]:
        config, probes = self.config, list[Cell]()
        if config.capacity is not None:
            return config.capacity, probes

        def holds(rate: float) -> bool:
            number = max(PROBE_REQUESTS, PROBE_RESIDENCES * self._num_staying(rate))
            arrivals, limit = poisson_arrivals(config.arrivals, rate, number, config.seed), allowed_misses(number)
            plan = replace(window_of(arrivals, 0, self._drain_s(arrivals)), give_up=(config.objectives, limit))
            run = self.run("inference-only", f"whether {rate:.3g} requests/s hold", arrivals, plan)
            probes.append(Cell("inference-only", 0.0, rate, len(probes), run))
            return not run.gave_up and sum(not meets(r, config.objectives) for r in run.records) <= limit

        return find_capacity(holds, start=max(config.rates), tolerance=config.capacity_tolerance), probes

    # --- arrivals ---

    def _arrivals(self, rate: float) -> list[Arrival]:
        """Those of a run at a rate, warm-up included. A job trains for a while before the first."""
        config = self.config
        counted = max(1, round(rate * config.duration))
        arrivals = make_arrivals(config.arrivals, rate, self._num_warmup(rate) + counted, config.seed)
        return [arrival._replace(due_s=arrival.due_s + config.settle_s) for arrival in arrivals]

    def _num_warmup(self, rate: float) -> int:
        """Requests before the counted ones: until as many leave as come."""
        return max(1, round(WARMUP_SHARE * rate * self.config.duration), self._num_staying(rate))

    def _num_staying(self, rate: float) -> int:
        """Requests that run at once where each takes all the time that its objective allows."""
        return math.ceil(rate * self.config.tpot_ms / 1e3 * self.config.arrivals.output_tokens)

    def _drain_s(self, arrivals: Sequence[Arrival]) -> float:
        """As long as the longest request may take within its objectives, and a little more."""
        longest = max(arrival.output_tokens for arrival in arrivals)
        return 1.1 * (longest * self.config.tpot_ms + self.config.ttft_ms) / 1e3

    # --- results ---

    def add_to_rows(self, rows: Sequence[dict[str, Any]], measured: Measured) -> None:
        """Adds to each row what only a simulation has: the device, the bound, and whether its rate is beyond capacity."""
        alone = measured.cells[0].run.finetune_tokens_per_s
        for row in rows:
            row["experiment"] = "simulation"
            if "rate" not in row:
                continue
            row["beyond_capacity"] = row["rate"] > measured.capacity
            bound, reached = self.bound(row["rate"]), row.get("finetune_tokens_per_s")
            row |= bound_keys(row["rate"], measured.capacity, bound, alone, reached)

    def bound(self, rate: float, *, fuse: bool = True) -> float:
        """The most trained tokens per second beside a rate under the true law (devices/bound.py)."""
        arrivals, batch = self._arrivals(rate), self.machine.planned().batch
        largest = max(batch.microbatches, key=sum)
        shape = JobShape(
            tokens=sum(largest), pairs=sum(tokens * (tokens + 1) // 2 for tokens in largest), labels=sum(largest),
            recompute_fraction=batch.recompute_fraction, lowest_layer=batch.lowest,
        )
        load = OfferedLoad.of(rate, [(arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals])
        law = TrueLaw(self.machine.law, self.machine.disturbance).law
        quantum_s = self.machine.scheduler.preemption_quantum_ms / 1e3
        return fused_bound(law, self.machine.arch.num_layers, load, self.config.tpot_ms / 1e3, shape, quantum_s, fuse)

    # --- one decision ---

    def explain(self, policy: str, rate: float, number: int) -> list[str]:
        """The decision of a run's iteration `number`, counted from 0, in lines: what the scheduler saw, each candidate that it
        considered, what it took."""
        arrivals = self._arrivals(rate)
        plan = window_of(arrivals, self._num_warmup(rate), self._drain_s(arrivals))
        server = self.machine.make(policy)
        watched = _WatchedServer(server, number)
        job = None if policy == "inference-only" else server.train(self.machine.planned(policy))
        with contextlib.suppress(_Explained):
            run_load(watched, arrivals, make_prompts(), plan, sleep=server.sleep, job=job)
        if not watched.lines:
            return [f"{policy} at {rate:g} requests/s ends after {server.engine.runner.iterations} iterations"]
        return [f"iteration {number} of {policy} at {rate:g} requests/s", *watched.lines]


class _Explained(Exception):
    """The iteration that was to be explained has run."""


class _WatchedServer:
    """A simulated server that ends with _Explained behind an iteration, of which it then has the lines."""

    def __init__(self, server: SimulatedServer, number: int) -> None:
        self._server, self._number = server, number
        self.submit, self.now, self.metrics = server.submit, server.now, server.metrics
        self.lines: list[str] = []

    def step(self) -> bool:
        engine, found = self._server.engine, list[str]()
        if engine.runner.iterations < self._number:
            return self._server.step()
        picker: Any = engine.scheduler.picker
        picker.explain = found.append
        now, scheduler = engine.clock(), engine.scheduler
        before = f"{now:.3f} s after the start, {scheduler.num_running} requests run and {scheduler.num_waiting} wait"
        plan = engine.run_once()
        picker.explain = None
        if plan.empty:
            return False
        self.lines = [before, *found, *describe_plan(plan), f"it took {engine.clock() - now:.6f} s"]
        raise _Explained


def make_prompts() -> Callable[[int], Sequence[int]]:
    """A source of prompts of a length, of which no two share a prefix."""
    numbers = count()
    return lambda length: distinct_prompt(next(numbers), length)


def describe_plan(plan: StepPlan) -> Iterator[str]:
    """What a plan holds, in lines."""
    yield (
        f"plan: {plan.kind}, predicted to take {plan.predicted_s:.6f} s, {plan.finetune_share:.1%} of it for finetuning; "
        f"{len(plan.decode)} decode rows, {sum(span.length for span in plan.prefill)} rows of {len(plan.prefill)} prompts"
    )
    for item in plan.units:
        unit = item.unit
        where = "in the pass" if item.fused else f"layers {unit.layer_start} to {unit.layer_end - 1}"
        yield f"  {unit.direction.value} of micro-batch {item.microbatch}, rows {unit.start} to {unit.end - 1}, {where}"
    for part in plan.optimizer:
        yield f"  optimizer step of job {part.job}, elements {part.start} to {part.end - 1}"


def machine_facts(machine: SimulatedMachine) -> Mapping[str, Any]:
    """What the results say of the machine, in plain JSON types."""
    memory, planned = machine.memory, machine.planned()
    return {
        "tensor_parallel_size": memory.tensor_parallel_size,
        "memory_bytes": {**memory.fixed, "pool": memory.pool_bytes},
        "key_value_tokens": memory.num_blocks * memory.engine.block_tokens,
        "job_plan": str(planned.plan), "recompute_fraction": planned.batch.recompute_fraction,
        "microbatches_that_fit": memory.job_bytes // max(1, planned.plan.num_bytes),
        "disturbance": asdict(machine.disturbance), "scheduler": asdict(machine.scheduler),
        "law": law_to_dict(machine.law.coefficients),
        "believed_law": (
            None if machine.believed.coefficients == machine.law.coefficients else law_to_dict(machine.believed.coefficients)
        ),
    }
