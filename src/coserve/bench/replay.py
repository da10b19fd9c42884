"""A logged run again, on the virtual clock: what would have happened if the machine had behaved otherwise.

    belief   the law with which the run's scheduler began
    truth    the law refitted to the run's own iterations; the pace of the machine, which is how many times as long as this law
             says each iteration took, by the time when it began; and the time between iterations that none accounts for

The scheduler, its settings, the pool, the requests and the job's batches are the run's. A replay under belief and truth should
meet the run. Then parts of the truth are changed one at a time (`ablation`), which says what each of them costs.

Owns: the truth of a log, replays, their comparison. Does not own: the log (runlog.py), the simulation (coserve/simulation/).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median, pstdev
from typing import Any, NamedTuple

from coserve.bench.driver import Run, run_load
from coserve.bench.metrics import SloInMs, summarize
from coserve.bench.runlog import Iteration, RunLog
from coserve.bench.simulate import make_prompts
from coserve.bench.simulated import SimulatedServer, SimulatedTraining
from coserve.core import InvalidRequest
from coserve.devices.bound import OfferedLoad, fused_bound
from coserve.profiling.fit import fit, profile_points
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.disturbance import EXACT, LARGEST_ERROR, Disturbance
from coserve.simulation.engine import SimulatedEngine

JITTER = 0.02
"""Noise of a case that is otherwise the run's: whether its outcome hangs on a hair."""
STALL = 0.5
"""An iteration stalled if it took so much longer than the refitted law says, as a share."""
_MOST_NOISE = 0.99 / LARGEST_ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a replay takes to be so. believed: the law with which the scheduler begins. truth: what iterations take, before the
    disturbance."""

    name: str
    believed: LatencyModel
    truth: LatencyModel
    disturbance: Disturbance


class Replayed(NamedTuple):
    """A case, and its runs by seed of the disturbance."""

    case: Case
    runs: tuple[Run, ...]


def replay(log: RunLog, case: Case) -> Run:
    """Runs a log's requests and job again."""
    pool = log.pool
    engine = SimulatedEngine(
        log.scheduler, LatencyModel(case.believed.coefficients), truth=case.truth, disturbance=case.disturbance,
        pool=BlockPool(pool.num_blocks, pool.block_tokens, guaranteed_blocks=pool.guaranteed_blocks, caching=pool.caching),
        num_layers=log.num_layers,
    )
    server = SimulatedServer(engine, {
        "the model's longest context": pool.max_context,
        "what the key-value cache is guaranteed": pool.guaranteed_blocks * pool.block_tokens,
    })
    job = SimulatedTraining(engine.start_job(log.batches), engine) if log.batches else None
    arrivals = [request.arrival for request in log.requests]
    return run_load(server, arrivals, make_prompts(), log.plan, sleep=server.sleep, job=job)


# --- the truth ---


def as_it_was(log: RunLog) -> Case:
    """The run's own belief and truth. Raises InvalidRequest (param `log`) for a run without iterations.

    The fit also gets the points of a profile, at what the belief says of them times how much slower the run was. They are few
    beside the run's iterations, so that they only count for contents that the run did not have.
    """
    done = [item for item in log.iterations if item.seconds > 0 and _has_cost(item)]
    if not done:
        raise InvalidRequest("log: the run has no iteration to learn from", param="log")
    belief = LatencyModel(log.law)
    slower = median(item.seconds / belief.seconds(item.contents) for item in done)
    rows = max(log.scheduler.max_num_batched_tokens, log.scheduler.max_window_tokens)
    anchors = [(point, slower * belief.seconds(point)) for point in profile_points(log.num_layers, rows)]
    samples = [*((item.contents, item.seconds) for item in done), *(point for point in anchors if point[1] > 0)]
    law = fit(samples, gpu=belief.uncaptured_seconds > 0)
    calm = _calm(law, done)
    scale = sum(item.seconds for item in calm) / sum(law.seconds(item.contents) for item in calm)
    law = LatencyModel({name: seconds * scale for name, seconds in law.coefficients.items()})
    gaps = log.gaps()
    return Case(
        name="replayed", believed=belief, truth=law,
        disturbance=Disturbance(
            pace=[(item.start_s, _ratio(law, item)) for item in done], between_s=mean(gaps) if gaps else 0.0,
        ),
    )


def by_chance(disturbance: Disturbance) -> Disturbance:
    """The same pace, but without its order: as noise and stalls that each iteration has or has not, whatever the one before it
    had."""
    calm = [factor for _, factor in disturbance.pace if factor <= 1 + STALL]
    stalled = [factor for _, factor in disturbance.pace if factor > 1 + STALL]
    return replace(
        disturbance, pace=(), noise=min(_MOST_NOISE, pstdev(calm)) if calm else 0.0,
        stall_share=len(stalled) / max(1, len(disturbance.pace)), stall_factor=mean(stalled) if stalled else 1.0,
    )


def _has_cost(item: Iteration) -> bool:
    contents = item.contents
    return contents.inference is not None or bool(contents.units) or contents.optimizer_elements > 0


def _ratio(law: LatencyModel, item: Iteration) -> float:
    """How many times as long as the law says an iteration took."""
    return item.seconds / law.seconds(item.contents)


def _calm(law: LatencyModel, done: Sequence[Iteration]) -> Sequence[Iteration]:
    """The iterations that did not stall; all, if each did."""
    return [item for item in done if _ratio(law, item) <= 1 + STALL] or done


# --- parts of the truth, one at a time ---


def cases(log: RunLog) -> list[Case]:
    """The run as it was, and a little off; then with each part of its truth taken away, with noise and stalls in another order,
    and without all four."""
    whole = as_it_was(log)
    said = whole.disturbance

    def paced(noise: bool, stalls: bool) -> Disturbance:
        keep = {False: noise, True: stalls}
        return replace(said, pace=[(at, factor if keep[factor > 1 + STALL] else 1.0) for at, factor in said.pace])

    return [
        whole,
        replace(whole, name=f"times {JITTER:.0%} off by chance", disturbance=replace(said, noise=JITTER)),
        replace(whole, name="exact belief", believed=whole.truth),
        replace(whole, name="nothing between iterations", disturbance=replace(said, between_s=0.0)),
        replace(whole, name="no noise", disturbance=paced(noise=False, stalls=True)),
        replace(whole, name="no stalls", disturbance=paced(noise=True, stalls=False)),
        replace(whole, name="noise and stalls by chance", disturbance=by_chance(said)),
        replace(whole, name="none of the four", believed=whole.truth, disturbance=EXACT),
    ]


def ablation(log: RunLog, seeds: int) -> Iterator[Replayed]:
    """Replays every case. seeds: runs of each case with a disturbance by chance, whose figures are averaged."""
    for case in cases(log):
        chance = case.disturbance.noise > 0 or case.disturbance.stall_share > 0
        yield Replayed(case, tuple(
            replay(log, replace(case, disturbance=replace(case.disturbance, seed=seed)))
            for seed in range(seeds if chance else 1)
        ))


# --- figures ---


def figures(log: RunLog, runs: Sequence[Run]) -> dict[str, Any]:
    """The figures of runs of one case, or of the log's own: latencies over all requests, the mean of everything else."""
    objectives = objectives_of(log)
    row = summarize([record for run in runs for record in run.records], objectives, sum(run.window_s for run in runs))
    return {
        **row, "finetune_tokens_per_s": mean(run.finetune_tokens_per_s for run in runs),
        "iterations": mean(run.iterations for run in runs), "busy_s": mean(run.busy_s for run in runs),
    }


def objectives_of(log: RunLog) -> SloInMs:
    """The objectives that the run's requests had. A benchmark always sets them."""
    tpot_ms, ttft_ms = log.scheduler.tpot_ms, log.scheduler.ttft_ms
    assert isinstance(tpot_ms, int | float) and isinstance(ttft_ms, int | float)
    return SloInMs(ttft_ms=ttft_ms, tpot_ms=tpot_ms)


def bound(log: RunLog, truth: LatencyModel) -> float | None:
    """The most trained tokens per second beside the run's requests, under the truth and without anything between iterations.
    None for a run without requests in its window, or without a job."""
    asked = [request.arrival for request in log.requests if request.arrival.due_s > log.plan.window_start_s]
    machine = log.run.machine
    if not asked or machine is None or machine.job is None:
        return None
    load = OfferedLoad.of(len(asked) / log.run.window_s, [(arrival.prompt_tokens, arrival.output_tokens) for arrival in asked])
    return fused_bound(
        truth, log.num_layers, load, objectives_of(log).tpot_ms / 1e3, machine.job, log.scheduler.preemption_quantum_ms / 1e3)


def kinds(runs: Sequence[Run]) -> list[str]:
    """The kinds of iteration of which predictions are known, the most frequent first."""
    known = itertools.chain.from_iterable(run.prediction_errors.items() for run in runs)
    count: dict[str, float] = {}
    for kind, errors in known:
        count[kind] = count.get(kind, 0.0) + errors["iterations"]
    return sorted(count, key=lambda kind: -count[kind])
