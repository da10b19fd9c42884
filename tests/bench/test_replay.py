"""Logs of runs and their replays: a simulated run that is replayed exactly, the truth that is read off a log, a tiny engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest

from coserve.bench.arrivals import ArrivalConfig, make_arrivals
from coserve.bench.cells import CellStore
from coserve.bench.driver import Handle, RunConfig, run_load
from coserve.bench.metrics import SloInMs
from coserve.bench.recording import RecordedEngine, Recorder, Submitted
from coserve.bench.replay import Case, ablation, as_it_was, bound, by_chance, figures, replay
from coserve.bench.results import make_results
from coserve.bench.runlog import SUFFIX, PoolShape, RunLog, read_log, write_log
from coserve.bench.sharing import Sharing, SharingConfig, SharingSetup
from coserve.bench.simulate import make_prompts
from coserve.bench.simulated import SimulatedServer, SimulatedTraining
from coserve.bench.workload import endless_job, prompts, word_ids, write_training_file
from coserve.config.settings import SamplingConfig, SchedulerConfig
from coserve.core import InvalidRequest, MeasuredStep, NotFound
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.disturbance import EXACT, Disturbance
from coserve.simulation.engine import SimulatedEngine
from coserve.simulation.jobs import SimulatedBatch
from coserve.simulation.runner import Launched, Ran
from tests.commands import Run as RunCommand
from tests.fake_machine import law
from tests.tiny_engine import build_model, make_engine

POOL = PoolShape(num_blocks=2000, block_tokens=16, guaranteed_blocks=800, caching=True, max_context=4096)
BATCH = SimulatedBatch(
    microbatches=[[100, 60], [80, 40, 30]], elements=200_000, recompute_fraction=0.3, arena_blocks=[30, 28],
    label_rows=[range(1, 160), [*range(10, 80), *range(100, 150)]],
)
SCHEDULER = SchedulerConfig(tpot_ms=60.0, ttft_ms=1000.0)


ROUGH = (
    LatencyModel({name: 1.3 * seconds for name, seconds in law().coefficients.items()}),
    Disturbance(noise=0.05, stall_share=0.02, stall_factor=3.0, between_s=0.002, seed=1),
)


class RecordedSimulation(SimulatedServer):
    """A simulated server that is noted as a real engine is."""

    def __init__(self, engine: SimulatedEngine) -> None:
        super().__init__(engine, {})
        self.recorder = Recorder(engine.scheduler, self._arena_blocks)
        self._run = engine.runner.run
        engine.runner.run = self._noted  # type: ignore[method-assign]

    def _arena_blocks(self, number: int) -> int:
        (job,) = self.engine.jobs.values()
        return job.arenas[number].end - job.arenas[number].first

    def _noted(self, launched: Launched) -> Ran:
        start_s = self.engine.clock()
        ran = self._run(launched)
        self.recorder.on_launch(start_s, start_s, launched.plan)
        self.recorder.on_end(MeasuredStep(launched.plan, ran.seconds))
        return ran

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Handle:  # type: ignore[override]
        self.recorder.submitted.append(Submitted(self.now(), super().submit(prompt_ids, sampling)))
        handle = self.recorder.submitted[-1].handle
        assert handle is not None
        return handle

    def step(self) -> bool:
        now, worked = self.now(), super().step()
        self.recorder.on_step(now, worked)
        return worked


def simulated_log(
    truth: LatencyModel | None = None, disturbance: Disturbance = EXACT, *, batch: SimulatedBatch | None = BATCH,
    rate: float = 4.0, seconds: float = 20.0,
) -> RunLog:
    """The log of a simulated run. The scheduler believes the law of the fake machine."""
    engine = SimulatedEngine(
        SCHEDULER, law(), truth=truth, disturbance=disturbance,
        pool=BlockPool(POOL.num_blocks, POOL.block_tokens, guaranteed_blocks=POOL.guaranteed_blocks),
    )
    server = RecordedSimulation(engine)
    job = None if batch is None else SimulatedTraining(engine.start_job(batch), engine)
    arrivals = make_arrivals(ArrivalConfig(prompt_tokens=60, output_tokens=20), rate, round(seconds * rate), 1)
    plan = RunConfig(window_start_s=arrivals[4].due_s, window_end_s=arrivals[-1].due_s, drain_s=10.0)
    run = run_load(server, arrivals, make_prompts(), plan, sleep=server.sleep, job=job)
    return server.recorder.log(replace(run, machine=server.recorder.machine()), arrivals, plan, POOL)


@pytest.fixture(scope="module")
def exact() -> RunLog:
    return simulated_log()


@pytest.fixture(scope="module")
def rough() -> RunLog:
    """Of a machine that is 1.3 times as slow as believed, with noise, stalls and time between iterations."""
    return simulated_log(*ROUGH, seconds=10.0)


# --- the log ---


def test_a_log_is_what_was_read(exact: RunLog, tmp_path: Path) -> None:
    path = tmp_path / f"cell{SUFFIX}"
    write_log(path, exact)
    found = read_log(path)
    assert read_log(tmp_path / "cell.json").run == found.run, "by the name of its cell"
    assert (found.scheduler, found.law, found.pool, found.plan) == (exact.scheduler, exact.law, POOL, exact.plan)
    assert found.run.machine == exact.run.machine and found.run.samples == exact.run.samples
    assert len(found.run.records) == len(exact.run.records) == 75
    for kept, record in zip(found.run.records, exact.run.records, strict=True):
        assert kept.finished and kept.due_s == record.due_s
        assert kept.token_times == pytest.approx(record.token_times, abs=2e-6)
    assert [done.contents for done in found.iterations] == [done.contents for done in exact.iterations]
    assert [done[:4] for done in found.iterations] == [pytest.approx(done[:4], abs=1e-6) for done in exact.iterations]
    assert all([*batch.label_rows[1]] == [*BATCH.label_rows[1]] for batch in found.batches)


def test_the_job_is_logged_as_it_was(exact: RunLog) -> None:
    steps = sum(done.contents.optimizer_elements for done in exact.iterations) / BATCH.elements
    assert len(exact.batches) - 1 <= steps <= len(exact.batches) and steps > 5
    for batch in exact.batches:
        assert [list(examples) for examples in batch.microbatches] == BATCH.microbatches
        assert [list(rows) for rows in batch.label_rows] == [list(rows) for rows in BATCH.label_rows]
        assert (batch.elements, batch.recompute_fraction, list(batch.arena_blocks)) == (200_000, 0.3, [30, 28])
    machine = exact.run.machine
    assert machine is not None and machine.job is not None and machine.pass_ratio == pytest.approx(1.0)
    assert (machine.job.tokens, machine.job.recompute_fraction) == (160, 0.3)
    pairs = [sum(n * (n + 1) // 2 for n in examples) for examples in BATCH.microbatches]
    assert machine.job.pairs == round(sum(pairs) * 160 / 310) and machine.job.labels == round((159 + 120) * 160 / 310)


def test_gaps_leave_out_what_was_idle() -> None:
    found = simulated_log(disturbance=Disturbance(between_s=0.003), batch=None, rate=0.5)
    assert found.gaps() == pytest.approx([0.003] * (len(found.iterations) - 1))
    assert sum(done.idle_s for done in found.iterations) > 10 and not found.batches
    assert found.run.machine is not None and found.run.machine.job is None
    assert bound(found, law()) is None


@pytest.mark.parametrize(("text", "error"), [
    (None, NotFound), ("", InvalidRequest), ("{", InvalidRequest), ('{"run":{"version":2}}\n', InvalidRequest),
    ('{"other":1}\n', InvalidRequest), ('{"run":[]}\n', InvalidRequest),
])
def test_a_file_that_is_no_log(tmp_path: Path, run: RunCommand, text: str | None, error: type[Exception]) -> None:
    path = tmp_path / "x.log.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=r"^log: .*coserve bench sharing --log"):
        read_log(path)
    result = run("bench", "replay", path)
    assert result.code == 2 and result.err.startswith("error: log: ") and result.err.count("\n") == 1


# --- replays ---


def test_a_simulated_run_is_replayed_exactly(exact: RunLog, tmp_path: Path) -> None:
    write_log(tmp_path / "a.log.jsonl", exact)
    log = read_log(tmp_path / "a.log.jsonl")
    again = replay(log, Case(name="exact", believed=law(), truth=law(), disturbance=EXACT))
    assert again.records == exact.run.records and again.samples == exact.run.samples
    assert (again.iterations, again.busy_s) == (exact.run.iterations, exact.run.busy_s)
    assert again.prediction_errors == exact.run.prediction_errors


def test_the_truth_of_an_exact_run_is_its_law(exact: RunLog) -> None:
    found = as_it_was(exact)
    assert found.believed.coefficients == law().coefficients
    assert [factor for _, factor in found.disturbance.pace] == pytest.approx([1.0] * len(exact.iterations), abs=0.03)
    assert found.disturbance.between_s < 1e-9
    again = replay(exact, found)
    assert again.finetune_tokens_per_s == pytest.approx(exact.run.finetune_tokens_per_s, rel=0.02)


def test_the_truth_of_a_rough_run_has_its_parts(rough: RunLog) -> None:
    found = as_it_was(rough)
    assert found.disturbance.between_s == pytest.approx(0.002, rel=1e-6)
    said = by_chance(found.disturbance)
    assert said.noise == pytest.approx(0.05, rel=0.25) and said.stall_factor == pytest.approx(3.0, rel=0.1)
    stalls = sum(factor > 1.5 for _, factor in found.disturbance.pace) / len(rough.iterations)
    assert said.stall_share == stalls == pytest.approx(0.02, abs=0.015)
    decode = next(done.contents for done in rough.iterations if done.contents.inference and not done.contents.units)
    assert found.truth.seconds(decode) == pytest.approx(1.3 * law().seconds(decode), rel=0.05)


def test_an_ablation_meets_the_run_and_undoes_its_parts(rough: RunLog) -> None:
    found = {item.case.name: item for item in ablation(rough, 2)}
    assert [len(item.runs) for item in found.values()] == [1, 2, 1, 1, 1, 1, 2, 1]
    measured = rough.run.finetune_tokens_per_s
    tokens = {name: mean(run.finetune_tokens_per_s for run in item.runs) for name, item in found.items()}
    assert tokens["replayed"] == pytest.approx(measured, rel=0.1)
    assert tokens["none of the four"] > max(tokens["replayed"], tokens["nothing between iterations"])
    assert tokens["nothing between iterations"] > tokens["replayed"]
    row = figures(rough, found["replayed"].runs)
    assert row["num_requests"] == len(rough.run.records) and 0 < row["slo_attainment"] <= 1
    most = bound(rough, found["replayed"].case.truth)
    assert most is not None and tokens["none of the four"] <= 1.02 * most


def test_a_run_without_iterations_has_no_truth(exact: RunLog) -> None:
    with pytest.raises(InvalidRequest, match="log: the run has no iteration"):
        as_it_was(replace(exact, iterations=[]))


def test_the_command_prints_the_table(tmp_path: Path, run: RunCommand) -> None:
    write_log(tmp_path / "b.log.jsonl", simulated_log(*ROUGH, seconds=4.0))
    result = run("bench", "replay", tmp_path / "b.json", "--seeds", 1)
    assert (result.code, result.err) == (0, "")
    assert "bound of finetuning under the refitted law" in result.out
    for name in ("measured", "replayed", "exact belief", "nothing between iterations", "no noise", "no stalls", "decode"):
        assert f" {name} " in result.out
    assert run("bench", "replay", tmp_path / "b.json", "--seeds", 0).code == 2


# --- a real engine ---


@pytest.mark.full
def test_sharing_keeps_logs_of_a_tiny_engine_and_bounds_its_rows(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    words = word_ids(model.tokenizer)
    data = write_training_file(tmp_path / "data.jsonl", model.tokenizer, words, mean_tokens=40, count=32, seed=0)
    config = SharingConfig(
        policies=("coserve",), loads=(0.5,), requests=12, pairs=1, capacity=20.0, tpot_ms=50.0, ttft_ms=2000.0, alone_s=1.0,
        settle_s=0.2, drain_s=10.0, arrivals=ArrivalConfig(prompt_tokens=20, output_tokens=6),
    )
    engines: list[RecordedEngine] = []

    def make(policy: str, objectives: SloInMs) -> RecordedEngine:
        engines.append(RecordedEngine(make_engine(
            model, scheduler=SchedulerConfig(policy=policy, tpot_ms=objectives.tpot_ms, ttft_ms=objectives.ttft_ms))))
        return engines[-1]

    setup = SharingSetup(
        make, lambda seed: prompts(words, seed), lambda: 40.0, data, endless_job(4, 128), tmp_path / "out", time.sleep,
        log=True,
    )
    measured = Sharing(config, setup, CellStore(tmp_path / "out", {}, lambda label, stored: None)).measure()
    rows = make_results(measured, config, "tiny")["results"]
    assert [row["policy"] for row in rows] == ["finetune-only", "coserve"]
    row = rows[1]
    assert row["bound_reached"] == row["finetune_tokens_per_s"] / row["bound_tokens_per_s"] and 0 <= row["fused_share"] <= 1
    assert 0 < row["bound_tokens_per_s"] < 2 * rows[0]["finetune_tokens_per_s"]
    names = sorted(path.name for path in (tmp_path / "out" / "cells").iterdir())
    assert len(names) == 4 and sum(name.endswith(SUFFIX) for name in names) == 2
    log = read_log(next((tmp_path / "out" / "cells").glob("coserve*.json")))
    assert log.run.records == tuple(
        replace(record, token_times=pytest.approx(record.token_times, abs=2e-5), due_s=pytest.approx(record.due_s, abs=2e-5))
        for record in measured.cells[1].run.records
    )
    assert trained(log) == pytest.approx(engines[1].metrics()["finetune_tokens"], rel=0.05)
    assert all(max(map(sum, batch.microbatches)) <= 128 for batch in log.batches)
    assert all(sum(map(len, batch.microbatches)) == 4 for batch in log.batches)
    assert log.run.machine is not None and log.run.machine.job is not None
    assert np.mean(log.gaps()) < 0.05
    again = replay(log, as_it_was(log))
    assert len(again.records) == len(log.run.records)
    first = json.loads((tmp_path / "out" / "cells" / names[0]).read_text())
    assert first["result"]["machine"]["num_layers"] == model.architecture.num_layers


def trained(log: RunLog) -> float:
    """The tokens that a log's units have trained."""
    def tokens() -> Iterator[float]:
        for done in log.iterations:
            yield from (unit.rows * unit.layers / log.num_layers / 2 for unit in done.contents.units)
            yield 0.0 if done.contents.inference is None else done.contents.inference.fused_rows / 2

    return sum(tokens())
