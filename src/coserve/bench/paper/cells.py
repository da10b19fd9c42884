"""Runs of one pipeline, each a cell on disk: a model under a law and a policy at a rate.

Owns: which machine a cell runs on, what is kept of its run, processes. Does not own: which cells there are (evaluation.py), a
run (bench/simulate.py).
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import coserve.core
from coserve.bench.arrivals import ArrivalConfig, make_burst
from coserve.bench.burst import BIN_S, bin_series, read_burst
from coserve.bench.cells import CellStore
from coserve.bench.driver import Run, RunConfig
from coserve.bench.metrics import summarize
from coserve.bench.paper.device import DEVICE, Fit, make_device, part_of
from coserve.bench.paper.models import MODELS, TTFT_MS
from coserve.bench.sharing import BurstConfig
from coserve.bench.simulate import ALONE, Simulation, SimulationConfig
from coserve.bench.simulated import SimulatedMachine, make_machine
from coserve.bench.workload import endless_job
from coserve.config.settings import EngineConfig, LoraConfig, SchedulerConfig
from coserve.devices.table import Device
from coserve.machine import versions
from coserve.model.architecture import Architecture
from coserve.simulation.disturbance import EXACT, Disturbance

EXAMPLE_TOKENS, ACCUMULATION, RANK = 8192, 8, 16
"""Of training: tokens of an example, examples of an optimizer step, LoRA's rank on down_proj."""
USABLE_SHARE = 0.9
"""Of a device's memory."""
MAX_NUM_SEQS = 512
_ROOMS = ("scheduler", "simulation", "devices", "planning")
BURST = "burst"
"""A cell of coserve amid a burst."""
BURST_SHAPE = BurstConfig(base_load=1.0, factor=6.0, warmup_s=20.0, before_s=15.0, burst_s=15.0, after_s=30.0)
"""base_load: here requests/s of a pipeline."""


C = TypeVar("C")


class PaperCell(NamedTuple):
    """One run. law: one of LAWS. share: the part of the devices that it has. policy: as in SchedulerConfig, or BURST. rate:
    requests/s of this pipeline; 0: finetuning alone."""

    law: str
    model: str
    share: float
    policy: str
    rate: float

    @property
    def label(self) -> str:
        """For the reader, and the name of its file."""
        part = "" if self.share == 1 else f"-{self.share:g}"
        return f"{self.law}-{self.model}{part}-{self.policy}-{self.rate:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellConfig:
    """What all cells share. Seconds are simulated ones."""

    arrivals: ArrivalConfig
    duration: float
    seed: int
    alone_s: float
    fit: Fit


def run_cells(
    cells: Sequence[PaperCell], config: CellConfig, directory: Path, workers: int, listen: Callable[[int, PaperCell], None]
) -> dict[PaperCell, dict[str, Any]]:
    """What each cell gave, from its file or from a run. Finished ones are kept in `directory`. workers: processes; 1: this one.
    listen: told how many are done, and the last of them."""
    results: dict[PaperCell, dict[str, Any]] = {}
    for cell, result in finished(cells, functools.partial(run_cell, config=config, directory=directory), workers):
        results[cell] = result
        listen(len(results), cell)
    return {cell: results[cell] for cell in cells}


def finished(cells: Iterable[C], run: Callable[[C], dict[str, Any]], workers: int) -> Iterator[tuple[C, dict[str, Any]]]:
    """Runs cells in processes, and gives each with its figures when it is done. workers: processes; 1: this one."""
    if workers == 1:
        yield from ((cell, run(cell)) for cell in cells)
        return
    # Processes start afresh: a fork of one with threads may stand still.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        asked: dict[Future[dict[str, Any]], C] = {pool.submit(run, cell): cell for cell in cells}
        try:
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_cell(cell: PaperCell, config: CellConfig, directory: Path) -> dict[str, Any]:
    """The cell's figures, in plain JSON types."""
    given = {name: value for name, value in asdict(config).items() if name != "fit"}
    common = {"device": asdict(_device(cell, config.fit)), "versions": versions(), "code": code_digest(), **given}
    store = CellStore(directory, common, lambda label, stored: None)
    return store.get(f"simulated-{cell.label}", cell._asdict(), lambda: _run(cell, config))


@functools.cache
def code_digest() -> str:
    """Of the rooms whose code decides what a simulation gives: with another scheduler a cell is another one."""
    root = Path(coserve.core.__file__).parent
    files = sorted(path for room in _ROOMS for path in (root / room).rglob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def make_cell_machine(cell: PaperCell, fit: Fit) -> SimulatedMachine:
    """The machine of a cell."""
    return _machine(cell._replace(policy="", rate=0.0), fit)


def _device(cell: PaperCell, fit: Fit) -> Any:
    return part_of(make_device(cell.law, MODELS[cell.model].arch.num_layers, fit), cell.share)


@functools.lru_cache(maxsize=2)
def _machine(cell: PaperCell, fit: Fit) -> SimulatedMachine:
    """Cells come in the order of their machines, and a machine takes longer to plan than a short cell to run."""
    model = MODELS[cell.model]
    return training_machine(model.arch, _device(cell, fit), model.tensor_parallel_size, model.tpot_ms, EXAMPLE_TOKENS)


def training_machine(
    arch: Architecture, device: Device, size: int, tpot_ms: float, example_tokens: int, disturbance: Disturbance = EXACT
) -> SimulatedMachine:
    """A model on `size` devices beside the paper's job, in examples of so many tokens."""
    job = endless_job(ACCUMULATION, example_tokens).with_adapter(LoraConfig(r=RANK, target_modules=("down_proj",)))
    scheduler = SchedulerConfig(tpot_ms=tpot_ms, ttft_ms=TTFT_MS, max_num_seqs=MAX_NUM_SEQS)
    return make_machine(
        arch, device, size, job, EngineConfig(scheduler=scheduler), disturbance, [example_tokens] * ACCUMULATION, USABLE_SHARE)


def _run(cell: PaperCell, config: CellConfig) -> dict[str, Any]:
    model = MODELS[cell.model]
    simulation = Simulation(SimulationConfig(
        policies=("coserve" if cell.policy == BURST else cell.policy,), rates=(cell.rate or 1.0,), duration=config.duration,
        arrivals=config.arrivals, seed=config.seed, ttft_ms=TTFT_MS, tpot_ms=model.tpot_ms, alone_s=config.alone_s,
    ), make_cell_machine(cell, config.fit))
    if cell.policy == BURST:
        return _burst(simulation, config)
    run = simulation.alone() if cell.policy == ALONE else simulation.beside(cell.policy, cell.rate)
    found = make_figures(run, simulation)
    if cell.rate and cell.share == 1:
        found["bound_tokens_per_s"] = simulation.bound(cell.rate)
    return found


def make_figures(run: Run, simulation: Simulation) -> dict[str, Any]:
    """What is kept of a run: latencies and attainment of its counted requests, and tokens per second of its window."""
    found = summarize(run.records, simulation.config.objectives, run.window_s)
    return {
        **found, "inference_tokens_per_s": run.inference_tokens / run.window_s,
        "finetune_tokens_per_s": run.finetune_tokens_per_s, "fused_share": run.fused_share, "iterations": run.iterations,
    }


def _burst(simulation: Simulation, config: CellConfig) -> dict[str, Any]:
    """The time series of a burst, and its reading."""
    shape, lengths = BURST_SHAPE, replace(config.arrivals, kind="poisson", length_scale=None)
    arrivals = make_burst(
        shape.base_load, shape.factor, shape.warmup_s + shape.before_s, shape.burst_s, shape.after_s, lengths, config.seed
    )
    plan = RunConfig(
        window_start_s=shape.warmup_s, window_end_s=shape.warmup_s + shape.before_s + shape.burst_s + shape.after_s,
        sample_s=BIN_S,
    )
    run = simulation.run("coserve", "coserve amid a burst", arrivals, plan)
    series, start, end = bin_series(run), shape.before_s, shape.before_s + shape.burst_s
    return {
        **make_figures(run, simulation), **asdict(read_burst(series, run.records, start, end)), "series": asdict(series),
        "burst_start_s": start, "burst_end_s": end, "rate": shape.base_load, "factor": shape.factor, "device": DEVICE,
    }
