"""The log of a run, as JSON Lines: all that a replay needs, and what it is compared with.

    {"run": ...}          the scheduler's settings and law, the pool, the window, what the driver counted
    {"request": [...]}    due_s, prompt tokens, output tokens, submitted_s, [token times], finished
    {"batch": {...}}      an optimizer step's micro-batches: examples, labels as ranges of rows, memory
    {"iteration": [...]}  start_s, seconds, predicted_s, idle_s, pass or null, [units], optimizer elements, refresh seconds

Owns: this form, and what a log is. Does not own: how a run is noted (recording.py) or replayed (replay.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from coserve.bench.arrivals import Arrival
from coserve.bench.cells import run_from_dict, run_to_dict
from coserve.bench.driver import Run, RunConfig
from coserve.bench.machine import law_from_dict, law_to_dict
from coserve.bench.metrics import RequestRecord
from coserve.config.settings import SchedulerConfig
from coserve.core import Contents, CoserveError, InvalidRequest, NotFound, PassCost, UnitCost
from coserve.durable import write_file
from coserve.scheduler.latency import Coefficient
from coserve.simulation.jobs import SimulatedBatch

_VERSION = 1
SUFFIX = ".log.jsonl"
"""Ends the name of a log. Before it stands the name of its cell."""


class Iteration(NamedTuple):
    """One iteration. start_s: when it began. seconds: that it took. predicted_s: what the scheduler expected then. idle_s: for
    which the engine had had nothing to do before it."""

    start_s: float
    seconds: float
    predicted_s: float
    idle_s: float
    contents: Contents


class LoggedRequest(NamedTuple):
    """A request. submitted_s: when the engine got it. token_times: of its tokens. Seconds from the run's start."""

    arrival: Arrival
    submitted_s: float
    token_times: tuple[float, ...]
    finished: bool


class PoolShape(NamedTuple):
    """The engine's pool of blocks, and the most tokens of a prompt with its output."""

    num_blocks: int
    block_tokens: int
    guaranteed_blocks: int
    caching: bool
    max_context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """A run. Times are seconds from its start. law: coefficients with which the scheduler began. batches: of the job's
    optimizer steps, in order; none without a job. plan: the window."""

    scheduler: SchedulerConfig
    law: Mapping[Coefficient, float]
    num_layers: int
    pool: PoolShape
    plan: RunConfig
    run: Run
    requests: Sequence[LoggedRequest]
    batches: Sequence[SimulatedBatch]
    iterations: Sequence[Iteration]

    def gaps(self) -> list[float]:
        """Seconds between the end of each iteration and the start of the next, without those in which there was nothing to
        do."""
        return [
            max(0.0, after.start_s - after.idle_s - before.start_s - before.seconds)
            for before, after in zip(self.iterations, self.iterations[1:], strict=False)
        ]


def write_log(path: Path, log: RunLog) -> None:
    """Writes a log whole, or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in _lines(log)).encode(), cached=True)


def read_log(path: Path) -> RunLog:
    """Reads a log, or that of a cell whose path is given. Raises NotFound and InvalidRequest (param `log`)."""
    if path.suffix == ".json":
        path = path.with_name(path.stem + SUFFIX)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise NotFound(
            f"log: {path} can't be read ({error}); coserve bench sharing --log writes one beside each cell", param="log"
        ) from error
    try:
        return _parse(text)
    except (ValueError, LookupError, TypeError, CoserveError) as error:
        raise InvalidRequest(
            f"log: {path} is no log of this version ({type(error).__name__}: {error}); measure again with "
            "coserve bench sharing --log", param="log",
        ) from error


def _lines(log: RunLog) -> Iterator[dict[str, Any]]:
    run = run_to_dict(log.run)
    del run["records"]  # they are made of the requests
    yield {"run": {
        "version": _VERSION, "scheduler": asdict(log.scheduler), "law": law_to_dict(log.law), "num_layers": log.num_layers,
        "pool": log.pool._asdict(), "window": [log.plan.window_start_s, log.plan.window_end_s, log.plan.drain_s], "run": run,
    }}
    for request in log.requests:
        times = [_rounded(at) for at in request.token_times]
        yield {"request": [*request.arrival, _rounded(request.submitted_s), times, request.finished]}
    for batch in log.batches:
        yield {"batch": {**asdict(batch), "label_rows": [_ranges(rows) for rows in batch.label_rows]}}
    for done in log.iterations:
        cost, units, elements, refresh_s = done.contents
        yield {"iteration": [
            *map(_rounded, done[:4]), None if cost is None else [*cost],
            [[int(unit.backward), *unit[1:]] for unit in units], elements, refresh_s,
        ]}


def _rounded(seconds: float) -> float:
    """To a microsecond."""
    return round(seconds, 6)


def _ranges(rows: Sequence[int]) -> list[list[int]]:
    """Ascending rows as ranges [first, end)."""
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][1] == row:
            found[-1][1] = row + 1
        else:
            found.append([row, row + 1])
    return found


def _parse(text: str) -> RunLog:
    parts: dict[str, list[Any]] = {"run": [], "request": [], "batch": [], "iteration": []}
    for line in text.splitlines():
        ((kind, item),) = json.loads(line).items()
        parts[kind].append(item)
    (head,) = parts["run"]
    if head["version"] != _VERSION:
        raise ValueError(f"version {head['version']}")
    start_s, end_s, drain_s = head["window"]
    requests = [
        LoggedRequest(Arrival(*item[:3]), item[3], tuple(item[4]), item[5]) for item in parts["request"]
    ]
    records = tuple(_record(request, start_s) for request in requests if request.arrival.due_s > start_s)
    run = run_from_dict({**head["run"], "records": []})
    return RunLog(
        scheduler=SchedulerConfig(**head["scheduler"]), law=law_from_dict(head["law"]), num_layers=head["num_layers"],
        pool=PoolShape(**head["pool"]), plan=RunConfig(window_start_s=start_s, window_end_s=end_s, drain_s=drain_s),
        run=replace(run, records=records),
        requests=requests, batches=[_batch(item) for item in parts["batch"]],
        iterations=[_iteration(item) for item in parts["iteration"]],
    )


def _record(request: LoggedRequest, start_s: float) -> RequestRecord:
    return RequestRecord(
        due_s=request.arrival.due_s - start_s, prompt_tokens=request.arrival.prompt_tokens,
        token_times=tuple(at - start_s for at in request.token_times), finished=request.finished,
    )


def _batch(item: Mapping[str, Any]) -> SimulatedBatch:
    rows = [[row for first, end in ranges for row in range(first, end)] for ranges in item["label_rows"]]
    return SimulatedBatch(**{**item, "label_rows": rows})


def _iteration(item: Sequence[Any]) -> Iteration:
    start_s, seconds, predicted_s, idle_s, cost, units, elements, refresh_s = item
    if not all(0 <= value < math.inf for value in (seconds, predicted_s, idle_s)):
        raise ValueError("an iteration's seconds are below 0 or no number")
    contents = Contents(
        None if cost is None else PassCost(*cost), tuple(UnitCost(bool(unit[0]), *unit[1:]) for unit in units), elements,
        refresh_s,
    )
    return Iteration(start_s, seconds, predicted_s, idle_s, contents)
