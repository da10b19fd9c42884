"""A simulated engine as benchmarks see one, and the machine that makes them.

Owns: requests and jobs in the driver's words, what is counted of them. Does not own: the simulation (coserve/simulation/), the
load (driver.py), which runs there are (simulate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coserve.config.settings import POLICIES, EngineConfig, FinetuneConfig, SamplingConfig, SchedulerConfig
from coserve.core import ContextExceeded, CoserveError
from coserve.devices.law import device_law
from coserve.devices.table import Device
from coserve.model.architecture import Architecture
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.disturbance import Disturbance
from coserve.simulation.engine import SimulatedEngine
from coserve.simulation.jobs import SimulatedJob
from coserve.simulation.memory import DeviceMemory, PlannedBatch, device_memory, plan_batch
from coserve.simulation.requests import SimulatedRequest

ITEMSIZE = 2
"""Bytes of bfloat16, in which models run here."""
LISTEN_STEPS = 64
"""Iterations between two calls of a listener."""


@dataclass(slots=True)
class SimulatedHandle:
    """A request in a simulated engine."""

    request: SimulatedRequest
    engine: SimulatedEngine

    @property
    def finished(self) -> bool:
        return self.request.finished_s is not None or self.request.cancelled

    @property
    def finish_reason(self) -> str | None:
        if self.request.cancelled:
            return "cancelled"
        return "length" if self.finished else None

    @property
    def token_times(self) -> Sequence[float]:
        return self.request.token_times

    def cancel(self) -> None:
        if not self.finished:
            self.engine.cancel(self.request)


@dataclass(slots=True)
class SimulatedTraining:
    """A job in a simulated engine. It never fails."""

    job: SimulatedJob
    engine: SimulatedEngine
    cancelled: bool = False

    @property
    def finished(self) -> bool:
        return self.cancelled or self.job.finished

    @property
    def error(self) -> CoserveError | None:
        return None

    def cancel(self) -> None:
        if not self.cancelled:
            self.cancelled = True
            self.engine.remove_job(self.job)


class SimulatedServer:
    """The driver's LoadEngine over a simulated engine. limits: most tokens of a prompt and its output, and why. listen: called
    now and then with the clock's seconds."""

    def __init__(
        self, engine: SimulatedEngine, limits: Mapping[str, int], listen: Callable[[float], None] = lambda now: None
    ) -> None:
        self.engine, self._limits, self._listen = engine, limits, listen

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> SimulatedHandle:
        """A request that arrives now. Raises ContextExceeded for one that the engine could never run."""
        total = len(prompt_ids) + sampling.max_tokens
        for what, most in self._limits.items():
            if total > most:
                raise ContextExceeded(f"prompt: {total} tokens with its output exceed {what}, {most}", param="max_tokens")
        return SimulatedHandle(self.engine.submit(prompt_ids, sampling.max_tokens), self.engine)

    def train(self, planned: PlannedBatch) -> SimulatedTraining:
        """A job that trains a batch over and over, from now on."""
        return SimulatedTraining(self.engine.start_job(planned.batch), self.engine)

    def step(self) -> bool:
        """One iteration; False if there was nothing to do."""
        if self.engine.idle:
            return False
        if self.engine.runner.iterations % LISTEN_STEPS == 0:
            self._listen(self.engine.clock())
        return not self.engine.run_once().empty

    def now(self) -> float:
        return self.engine.clock()

    def sleep(self, seconds: float) -> None:
        """Lets time pass without an iteration."""
        self.engine.clock.advance(seconds)

    def metrics(self) -> Mapping[str, Any]:
        """As Engine.metrics, of what a simulation has. forward_rows: of finetuning, through all layers. fused_rows: those of
        them that rode in a pass with requests."""
        runner, scheduler = self.engine.runner, self.engine.scheduler
        return {
            "iterations": runner.iterations, "busy_s": runner.busy_s, "finetune_busy_s": runner.finetune_s,
            "finetune_tokens": sum(runner.trained.values()), "forward_rows": runner.rows.forward,
            "fused_rows": runner.rows.fused, "preemptions": scheduler.admission.num_preemptions, "memory": {},
            "prediction_errors": {kind: e._asdict() for kind, e in scheduler.latency.errors().items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedMachine:
    """A model on devices, as numbers.

    law: what iterations take before the disturbance. believed: what schedulers begin with. job: what trains beside requests.
    example_tokens: of the examples of its optimizer batch.
    """

    arch: Architecture
    memory: DeviceMemory
    scheduler: SchedulerConfig
    law: LatencyModel
    believed: LatencyModel
    disturbance: Disturbance
    job: FinetuneConfig
    example_tokens: tuple[int, ...]
    _planned: dict[str, PlannedBatch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def planned(self, policy: str = POLICIES[0]) -> PlannedBatch:
        """The job's batch under a policy, which decides how many micro-batches in flight are worth their memory. Raises
        ConfigError and CapacityError as plan_batch does."""
        if policy not in self._planned:
            self._planned[policy] = plan_batch(
                self.arch, self.job, self.example_tokens, self.memory, self.believed, replace(self.scheduler, policy=policy),
                itemsize=ITEMSIZE,
            )
        return self._planned[policy]

    def make(self, policy: str, listen: Callable[[float], None] = lambda now: None) -> SimulatedServer:
        """A fresh engine under a policy, whose clock stands at 0."""
        engine = SimulatedEngine(
            replace(self.scheduler, policy=policy), LatencyModel(self.believed.coefficients), truth=self.law,
            disturbance=self.disturbance, pool=self.memory.make_pool(), num_layers=self.arch.num_layers,
        )
        return SimulatedServer(engine, {
            "the model's longest context": self.arch.max_position_embeddings,
            "what the key-value cache is guaranteed": self.memory.guaranteed_blocks * self.memory.engine.block_tokens,
        }, listen)


def make_machine(
    arch: Architecture, device: Device, size: int, job: FinetuneConfig, engine: EngineConfig, disturbance: Disturbance,
    example_tokens: Sequence[int], usable_share: float, *, captured: bool = False,
) -> SimulatedMachine:
    """A model on `size` devices under their law, which schedulers believe. example_tokens: of an optimizer batch. usable_share:
    of the devices' memory. captured: as for `device_law`. Raises ConfigError, CapacityError."""
    law = device_law(arch, device, itemsize=ITEMSIZE, tensor_parallel_size=size, captured=captured)
    memory = device_memory(
        arch, job, engine, memory_bytes=device.memory_bytes, usable_share=usable_share, itemsize=ITEMSIZE,
        tensor_parallel_size=size,
    )
    machine = SimulatedMachine(
        arch=arch, memory=memory, scheduler=engine.scheduler, law=law, believed=law, disturbance=disturbance, job=job,
        example_tokens=tuple(example_tokens),
    )
    machine.planned()  # a job that doesn't fit is refused before anything runs
    return machine
