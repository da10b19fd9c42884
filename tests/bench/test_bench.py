"""The sharing benchmark on a fake engine with a fake clock: arrivals, measures, the bound, the driver, resuming, the page."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from coserve.bench.arrivals import ArrivalConfig, make_arrivals, make_burst, read_trace, rescale
from coserve.bench.burst import BIN_S, Series, bin_series, read_burst
from coserve.bench.capacity import allowed_misses, find_capacity
from coserve.bench.cells import CellStore, run_from_dict, run_to_dict
from coserve.bench.charts import ticks
from coserve.bench.driver import Run, RunConfig, TokensDone, run_load
from coserve.bench.machine import MachineRecord, bound_keys, law_from_dict, law_to_dict
from coserve.bench.metrics import RequestRecord, SloInMs, meets, summarize, summary, wilson
from coserve.bench.report import make_page
from coserve.bench.results import make_results, prediction_errors
from coserve.bench.sharing import BurstConfig, Cell, Measured, Sharing, SharingConfig, SharingSetup
from coserve.bench.workload import endless_job, prompts, word_ids, write_training_file
from coserve.config.settings import FinetuneConfig, SamplingConfig
from coserve.core import CapacityError, ConfigError, CoserveError, InvalidRequest, JobFailed, NotFound
from coserve.devices.bound import JobShape, OfferedLoad

OBJECTIVES = SloInMs(ttft_ms=1000.0, tpot_ms=100.0)


class FakeClock:
    def __init__(self) -> None:
        self.time_s = 100.0

    def sleep(self, seconds: float) -> None:
        assert 0 <= seconds <= 1e-3
        self.time_s += max(seconds, 1e-6)


@dataclass
class FakeHandle:
    remaining: int
    finished: bool = False
    finish_reason: str | None = None
    token_times: list[float] = field(default_factory=list)

    def cancel(self) -> None:
        self.finished, self.finish_reason = True, "cancelled"


@dataclass
class FakeJob:
    finished: bool = False
    error: CoserveError | None = None

    def cancel(self) -> None:
        self.finished = True


class FakeEngine:
    """An iteration takes 10 ms + 1 ms per running request, 30 ms more with a job, which then advances by 50 tokens."""

    def __init__(self, clock: FakeClock, *, max_waiting: int = 10_000, job_steps: int = 10**9) -> None:
        self.clock, self.max_waiting, self.job_steps = clock, max_waiting, job_steps
        self.running: list[FakeHandle] = []
        self.job: FakeJob | None = None
        self.busy_s, self.iterations, self.finetune_tokens = 0.0, 0, 0.0
        self.prompts: list[list[int]] = []
        self.closed = False

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> FakeHandle:
        assert sampling.ignore_eos and sampling.temperature == 0
        if len(self.running) >= self.max_waiting:
            raise CapacityError("full")
        self.prompts.append(list(prompt_ids))
        self.running.append(FakeHandle(sampling.max_tokens))
        return self.running[-1]

    def step(self) -> bool:
        self.running = [handle for handle in self.running if not handle.finished]
        training = self.job is not None and not self.job.finished
        if not self.running and not training:
            return False
        seconds = 0.01 + 0.001 * len(self.running) + 0.03 * training
        self.clock.time_s += seconds
        self.busy_s, self.iterations = self.busy_s + seconds, self.iterations + 1
        if training:
            self.finetune_tokens += 50
            self.job_steps -= 1
            if self.job is not None and self.job_steps == 0:
                self.job.finished, self.job.error = True, JobFailed("no loss")
        for handle in self.running:
            handle.token_times.append(self.clock.time_s)
            handle.remaining -= 1
            if handle.remaining == 0:
                handle.finished, handle.finish_reason = True, "length"
        return True

    def finetune(self, data_path: Path, output_dir: Path, config: FinetuneConfig, *, name: str) -> FakeJob:
        assert name and not output_dir.exists()
        self.job = FakeJob()
        return self.job

    def now(self) -> float:
        return self.clock.time_s

    def metrics(self) -> Mapping[str, Any]:
        return {
            "finetune_tokens": self.finetune_tokens, "busy_s": self.busy_s, "iterations": self.iterations,
            "memory": {"peak_bytes": 1234},
        }

    def machine(self) -> MachineRecord | None:
        """As the fake behaves: 10 ms an iteration, 1 ms a request, 0.6 ms a trained token."""
        return MACHINE if self.job is not None else replace(MACHINE, job=None)

    def close(self) -> None:
        self.closed = True


def record(due_s: float = 0.0, times: Sequence[float] = (), finished: bool = True) -> RequestRecord:
    return RequestRecord(due_s=due_s, prompt_tokens=4, token_times=tuple(times), finished=finished)


def run_of(records: Sequence[RequestRecord] = (), samples: Sequence[TokensDone] = (), window_s: float = 10.0) -> Run:
    return Run(records=tuple(records), window_s=window_s, inference_tokens=0, samples=tuple(samples), busy_s=1.0,
               iterations=10, rows=20)


# --- arrivals


@pytest.mark.parametrize(("kind", "variation"), [("poisson", 1.0), ("gamma:2", 2.0), ("gamma:0.5", 0.5)])
def test_gaps_have_the_stated_variation_and_the_rate_is_exact(kind: str, variation: float) -> None:
    found = make_arrivals(ArrivalConfig(kind=kind), 4.0, 20_000, seed=1)
    due = np.array([a.due_s for a in found])
    gaps = np.diff(due)
    assert (gaps >= 0).all() and due[0] > 0 and due[-1] < 5000
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.06)
    assert gaps.mean() == pytest.approx(0.25, rel=1e-3)
    assert {(a.prompt_tokens, a.output_tokens) for a in found} == {(128, 64)}


def test_equal_seeds_give_equal_gaps_at_any_rate() -> None:
    slow, fast = (make_arrivals(ArrivalConfig(), rate, 30, seed=3) for rate in (1.0, 4.0))
    assert [a.due_s for a in slow] == pytest.approx([4 * a.due_s for a in fast])
    assert slow != make_arrivals(ArrivalConfig(), 1.0, 30, seed=4)


def test_rescaled_times_keep_their_pattern() -> None:
    due = rescale(np.array([50.0, 51.0, 53.0, 60.0]), 2.0)
    assert np.diff(due).mean() == pytest.approx(0.5) and due[0] == 0.25
    assert np.diff(due) / np.diff(due)[0] == pytest.approx([1, 2, 7])
    with pytest.raises(InvalidRequest, match="same time"):
        rescale(np.array([1.0, 1.0]), 2.0)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:59:5{i}.{i}000001,{100 * (i + 1)},{10 * (i + 1)}\n" for i in range(8)
)
BURST_GPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,Conversation log\n"
    "45,GPT-4,1087,230,1317,Conversation log\n118,ChatGPT,417,276,693,Conversation log\n120,ChatGPT,99,0,99,API log\n"
)


def test_azure_trace_is_read_and_its_lengths_scaled(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE)
    trace = read_trace(path)
    assert trace.times_s.tolist() == pytest.approx([i * 1.1 for i in range(8)])
    scaled = make_arrivals(ArrivalConfig(kind=f"trace:{path}", length_scale=0.5, max_tokens=300), 2.0, 8, seed=0)
    assert [a.output_tokens for a in scaled] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [a.prompt_tokens for a in scaled] == [50, 100, 150, 200, 250, 270, 265, 260], "cut to leave room for the output"
    assert np.diff([a.due_s for a in scaled]).mean() == pytest.approx(0.5)
    fixed = make_arrivals(ArrivalConfig(kind=f"trace:{path}"), 2.0, 8, seed=0)
    assert {(a.prompt_tokens, a.output_tokens) for a in fixed} == {(128, 64)}


def test_burst_gpt_trace_keeps_chatgpt_rows_that_have_a_response(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(BURST_GPT)
    trace = read_trace(path)
    assert trace.times_s.tolist() == [0, 113] and trace.prompt_tokens.tolist() == [472, 417]
    with pytest.raises(InvalidRequest, match="2 usable requests"):
        make_arrivals(ArrivalConfig(kind=f"trace:{path}"), 1.0, 3, seed=0)


@pytest.mark.parametrize(("text", "message"), [
    ("a,b\n1,2\n", "columns a, b"), ("", "columns none"), (AZURE + "yesterday,1,2\n", "line 10"),
    ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,5,0\n", "no request"),
    (BURST_GPT + "7,ChatGPT,12\n", "line 6"),
])
def test_trace_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_trace(path)


def test_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no trace file"):
        read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize("kind", ["", "uniform", "gamma", "gamma:0", "gamma:nan", "gamma:x", "trace:", "poisson:1"])
def test_unknown_arrivals_are_refused(kind: str) -> None:
    with pytest.raises(ConfigError, match="arrivals"):
        ArrivalConfig(kind=kind)


def test_burst_has_three_times_the_rate_in_its_middle() -> None:
    due = np.array([a.due_s for a in make_burst(2.0, 3.0, 10.0, 5.0, 20.0, ArrivalConfig(), seed=0)])
    assert (np.diff(due) >= 0).all()
    assert [int(((due >= a) & (due < b)).sum()) for a, b in ((0, 10), (10, 15), (15, 35))] == [20, 30, 40]


# --- measures


@pytest.mark.parametrize(("hits", "total", "low", "high"), [
    (8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (147, 150, 0.9428, 0.9932), (50, 100, 0.4038, 0.5962),
])
def test_wilson_interval_of_known_shares(hits: int, total: int, low: float, high: float) -> None:
    assert wilson(hits, total) == pytest.approx((low, high), abs=1e-4)


def test_request_measures_count_from_the_due_time() -> None:
    found = record(2.0, [2.5, 2.6, 2.9])
    assert found.ttft_ms == pytest.approx(500) and found.tpot_ms == pytest.approx(200)
    assert found.itl_ms == pytest.approx([100, 300])
    assert record(0.0, [1.0]).tpot_ms is None and record().ttft_ms is None


@pytest.mark.parametrize(("found", "met"), [
    (record(0.0, [1.0, 1.099]), True), (record(0.0, [1.001, 1.1]), False), (record(0.0, [0.5, 0.601]), False),
    (record(0.0, [0.5, 0.7, 0.7]), True), (record(0.0, [0.5, 0.6], finished=False), False), (record(), False),
    (record(0.0, [0.5]), True),
])
def test_objectives(found: RequestRecord, met: bool) -> None:
    assert meets(found, OBJECTIVES) is met


def test_summary_of_requests_counts_unfinished_ones_as_missed() -> None:
    done = [record(0.0, [0.2, 0.25]), record(1.0, [1.4, 1.45])]
    records = [*done, record(2.0, [2.5], finished=False), record(3.0, finished=False)]
    row = summarize(records, OBJECTIVES, 8.0)
    assert row["num_requests"] == 4 and row["slo_attainment"] == 0.5 and row["goodput"] == 0.25
    assert row["slo_interval"] == list(wilson(2, 4))
    assert row["ttft_ms"]["mean"] == pytest.approx(300), "of finished requests"
    assert summarize([], OBJECTIVES, 8.0) == {}
    assert not {"ttft_ms", "tpot_ms", "itl_ms"} & summarize([record(finished=False)], OBJECTIVES, 8.0).keys()
    assert summary([1, 2, 3, 4, 100]) == {"mean": 22.0, "p50": 3.0, "p99": pytest.approx(96.16)}


# --- the bound


LAW = {
    ("inference", "once", 0): 0.01, ("inference", "rows", 1): 0.001, ("forward", "rows", 0): 0.0002,
    ("backward", "rows", 0): 0.0004,
}
MACHINE = MachineRecord(
    law=LAW, num_layers=1, quantum_s=0.25, pass_ratio=1.1, job=JobShape(tokens=100, pairs=5050, labels=99),
)


def test_bound_is_the_measured_throughput_times_what_the_law_leaves() -> None:
    """A load so low that at most one request runs: it leaves (T - pass) / T while one does. Rows in a pass cost more."""
    load = OfferedLoad(rate=0.01, prompt_tokens=0, output_tokens=10)
    running = 1 - np.exp(-0.01 * 10 * 0.05)
    found = MACHINE.bound(load, 0.05, alone=300.0)
    assert found == pytest.approx(300 * (1 - running * 0.01 / 0.05), rel=1e-4)
    slower = MACHINE.bound(load, 0.05, alone=300.0, pass_ratio=2.0)
    assert slower == pytest.approx(300 * (1 - running * 0.02 / 0.05), rel=1e-4)
    assert MACHINE.bound(OfferedLoad(rate=0, prompt_tokens=0, output_tokens=0), 0.05, alone=300.0) == 300


def test_bound_includes_rows_that_ride_for_less() -> None:
    free = replace(MACHINE, law={name: seconds for name, seconds in LAW.items() if name[1] != "rows" or name[0] != "inference"})
    load = OfferedLoad(rate=5.0, prompt_tokens=0, output_tokens=20)
    assert free.bound(load, 0.05, alone=300.0) > 1.1 * MACHINE.bound(load, 0.05, alone=300.0)


def test_bound_keys_of_a_row() -> None:
    assert bound_keys(0.5, 2.0, 150.0, 300.0, 120.0) == {"bound_tokens_per_s": 150.0, "bound": 0.75, "bound_reached": 0.8}
    assert bound_keys(0.5, 2.0, 150.0, 300.0, None) == {"bound_tokens_per_s": 150.0, "bound": 0.75}
    assert bound_keys(0.5, 2.0, 0.0, 300.0, 1.0) == {"bound_tokens_per_s": 0.0, "bound": 0.25}


def test_machine_is_kept_as_json() -> None:
    assert MachineRecord.from_dict(json.loads(json.dumps(MACHINE.to_dict()))) == MACHINE
    assert MachineRecord.from_dict({**MACHINE.to_dict(), "job": None}).job is None
    assert law_from_dict(law_to_dict(LAW)) == LAW and "inference rows 1" in law_to_dict(LAW)


# --- capacity


@pytest.mark.parametrize("start", [0.3, 2.0, 50.0])
def test_capacity_is_found_within_the_tolerance(start: float) -> None:
    found = find_capacity(lambda rate: rate <= 7.3, start=start, tolerance=0.05)
    assert 7.3 / 1.05 <= found <= 7.3


@pytest.mark.parametrize("holds", [True, False])
def test_capacity_that_is_out_of_reach(holds: bool) -> None:
    with pytest.raises(ConfigError):
        find_capacity(lambda rate: holds, start=1.0, tolerance=0.05)


def test_capacity_allows_one_percent() -> None:
    assert [allowed_misses(n) for n in (40, 99, 100, 150, 300)] == [0, 0, 1, 1, 3]


# --- the driver


def drive(engine: FakeEngine, rate: float = 5.0, count: int = 40, job: FakeJob | None = None, **options: Any) -> Run:
    arrivals = make_arrivals(ArrivalConfig(prompt_tokens=3, output_tokens=5), rate, count, seed=0)
    config = RunConfig(**{"window_start_s": arrivals[3].due_s, "window_end_s": arrivals[-1].due_s, "drain_s": 5.0, **options})
    return run_load(engine, arrivals, lambda n: list(range(n)), config, sleep=engine.clock.sleep, job=job)


def test_every_request_after_the_warm_up_is_counted_and_served() -> None:
    engine = FakeEngine(FakeClock())
    run = drive(engine)
    assert len(run.records) == 36 and all(r.finished and len(r.token_times) == 5 for r in run.records)
    assert run.window_s == pytest.approx(36 / 5.0, rel=0.2)
    ttft = sorted(r.ttft_ms or 0 for r in run.records)
    assert ttft[0] >= 11 and ttft[-1] < 40
    assert run.rows == 40 * (3 + 4) and run.iterations == engine.iterations and run.busy_s == engine.busy_s
    assert run.finetune_tokens_per_s == 0 and run.peak_memory_bytes == 1234
    assert run.inference_tokens == pytest.approx(36 * 5, abs=10), "those of the last warm-up request fall in as well"
    assert run_from_dict(json.loads(json.dumps(run_to_dict(run)))).window_s == run.window_s


def test_finetuning_is_counted_over_the_window_only() -> None:
    engine = FakeEngine(FakeClock())
    run = drive(engine, job=engine.finetune(Path("data"), Path("missing"), endless_job(8, 512), name="bench"))
    assert len(run.samples) == 2
    assert 50 / 0.047 < run.finetune_tokens_per_s < 50 / 0.04
    assert run.samples[-1].time_s - run.samples[0].time_s == pytest.approx(run.window_s, abs=0.1)
    sampled = drive(engine, job=engine.job, sample_s=0.5)
    assert len(sampled.samples) == pytest.approx(sampled.window_s / 0.5, abs=2)


def test_ttft_counts_the_wait_for_a_long_iteration() -> None:
    clock = FakeClock()

    class Stalling(FakeEngine):
        def step(self) -> bool:
            clock.time_s += 0.5 if self.iterations == 10 else 0.0
            return super().step()

    run = drive(Stalling(clock))
    assert max(r.ttft_ms or 0 for r in run.records) > 300


def test_unfinished_requests_are_cancelled_at_the_limit_and_missed() -> None:
    engine = FakeEngine(FakeClock())
    handles: list[FakeHandle] = []
    submit = engine.submit

    def stuck(prompt_ids: Sequence[int], sampling: SamplingConfig) -> FakeHandle:
        handles.append(submit(prompt_ids, sampling))
        handles[-1].remaining = 10**6
        return handles[-1]

    engine.submit = stuck  # type: ignore[method-assign]
    run = drive(engine, count=6, drain_s=1.0)
    assert not any(meets(r, OBJECTIVES) for r in run.records) and not any(r.finished for r in run.records)
    assert all(handle.finish_reason == "cancelled" for handle in handles)


def test_refused_requests_have_missed() -> None:
    run = drive(FakeEngine(FakeClock(), max_waiting=0))
    assert len(run.records) == 36 and not any(meets(r, OBJECTIVES) for r in run.records)


def test_a_hopeless_run_is_given_up_early() -> None:
    engine = FakeEngine(FakeClock())
    run = drive(engine, count=400, give_up=(SloInMs(ttft_ms=1000.0, tpot_ms=1.0), 2))
    assert run.gave_up and len(run.records) < 40


def test_a_job_that_ends_within_the_window_is_an_error() -> None:
    engine = FakeEngine(FakeClock(), job_steps=20)
    job = engine.finetune(Path("data"), Path("missing"), endless_job(8, 512), name="bench")
    with pytest.raises(JobFailed, match=r"ended before.*no loss"):
        drive(engine, job=job)


# --- bursts


def test_burst_is_read_off_a_series() -> None:
    """Finetuning at 100/s, 10/s in the burst of 10 to 15 s and until 17 s; the last waiting request gets its token at 16 s."""
    times = np.arange(120) * BIN_S
    rates = np.where((times >= 10) & (times < 17), 10.0, 100.0)
    zeros = (0.0,) * 120
    series = Series(time_s=tuple(times), inference_tokens_per_s=zeros, finetune_tokens_per_s=tuple(rates), queue=(0,) * 120)
    records = [record(14.0, [16.0, 16.2]), record(5.0, [5.1]), record(14.5, [15.5])]
    reading = read_burst(series, records, 10.0, 15.0)
    assert reading.base_rate == 100 and reading.lowest_rate == pytest.approx(10) and reading.queue_empty_s == 16.0
    assert reading.recovery_s == pytest.approx(1.0, abs=BIN_S)
    waiting = read_burst(series, [*records, record(15.0)], 10.0, 15.0)
    assert waiting.queue_empty_s is None and waiting.recovery_s is None


def test_burst_without_a_dip_or_without_a_return() -> None:
    times = tuple(np.arange(80) * BIN_S)
    zeros = (0.0,) * 80
    steady = Series(time_s=times, inference_tokens_per_s=zeros, finetune_tokens_per_s=(50.0,) * 80, queue=(0,) * 80)
    assert read_burst(steady, [], 5.0, 10.0).recovery_s == 0.0
    gone = Series(time_s=times, inference_tokens_per_s=zeros, queue=(0,) * 80,
                  finetune_tokens_per_s=tuple(50.0 if t < 5 else 0.0 for t in times))
    assert read_burst(gone, [], 5.0, 10.0).recovery_s is None


def test_series_bins_tokens_queue_and_finetuning() -> None:
    run = run_of([record(0.1, [0.6, 0.7, 0.8])], [TokensDone(0.0, 100.0), TokensDone(0.5, 150.0), TokensDone(1.0, 150.0)], 1.0)
    series = bin_series(run)
    assert series.time_s == (0.0, 0.25, 0.5, 0.75)
    assert series.inference_tokens_per_s == (0, 0, 8, 4) and series.queue == (1, 1, 0, 0)
    assert series.finetune_tokens_per_s == (100, 100, 0, 0)


# --- the whole


class Words:
    """A tokenizer whose tokens are words with a space before them, and a few others."""

    vocab_size = 60

    def decode(self, ids: Sequence[int]) -> str:
        return "".join("<>" if i < 10 else f" w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in ids)

    def encode(self, text: str) -> list[int]:
        table = {self.decode([i]): i for i in range(10, 60)}
        return [table[word] for word in re.findall(r" \w+", text)]


def test_workload_is_made_of_whole_words(tmp_path: Path) -> None:
    tokenizer = Words()
    ids = word_ids(tokenizer)
    assert set(ids) == set(range(10, 60))
    source = prompts(ids, (1, 2))
    assert len(source(30)) == 30 and source(30) != source(30) and set(source(50)) <= set(ids)
    path = write_training_file(tmp_path / "a" / "t.jsonl", tokenizer, ids, mean_tokens=40, count=50, seed=0)
    lines = path.read_text().splitlines()
    lengths = [len(tokenizer.encode(json.loads(line)["text"])) for line in lines]
    assert len(lines) == 50 and 20 <= min(lengths) < max(lengths) <= 60 and np.mean(lengths) == pytest.approx(40, abs=5)


CONFIG = SharingConfig(
    policies=("inference-only", "coserve", "temporal:4"), loads=(0.25, 0.5), requests=30, pairs=2, settle_s=0.5, alone_s=2.0,
    arrivals=ArrivalConfig(prompt_tokens=3, output_tokens=8), capacity_requests=40, drain_s=5.0, ttft_ms=1000.0,
    burst=BurstConfig(warmup_s=0.5, before_s=3.0, burst_s=2.0, after_s=3.0),
)


class Lab:
    """A benchmark in a directory on fake engines, and what it did."""

    def __init__(self, directory: Path, config: SharingConfig = CONFIG, fail_at: int = 10**9) -> None:
        self.engines: list[tuple[str, FakeEngine]] = []
        self.labels: list[tuple[str, bool]] = []
        self.peers = 0
        clock = FakeClock()

        def make_engine(policy: str, objectives: SloInMs) -> FakeEngine:
            if len(self.engines) == fail_at:
                raise RuntimeError("stopped here")
            assert objectives.tpot_ms == 50.0
            self.engines.append((policy, FakeEngine(clock)))
            return self.engines[-1][1]

        def peer() -> float:
            self.peers += 1
            return 40.0

        source: Callable[[Sequence[int]], Callable[[int], list[int]]] = lambda seed: prompts(np.arange(20), seed)  # noqa: E731
        setup = SharingSetup(make_engine, source, peer, directory / "data", endless_job(8, 512), directory, clock.sleep)
        store = CellStore(directory, {"seed": 0}, lambda label, stored: self.labels.append((label, stored)))
        self.sharing = Sharing(config, setup, store)

    def results(self) -> dict[str, Any]:
        measured = self.sharing.measure()
        return {"device": "a fake", "date": "today", "versions": {"torch": "2"}, "command": "coserve bench sharing <x>",
                **make_results(measured, self.sharing.config, "tiny <model>")}


def test_whole_measurement(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    data = lab.results()
    assert lab.peers == 1 and all(engine.closed for _, engine in lab.engines)
    order = [label for label, _ in lab.labels if not label.startswith(("capacity", "peer", "burst"))]
    assert order == [
        name for repeat in (0, 1) for name in
        [f"finetune-only-{repeat}", *(f"{p}-{load}-{repeat}" for load in (0.25, 0.5) for p in CONFIG.policies)]
    ]
    assert lab.sharing.num_cells() == len(order) + 2
    rows = {(row["experiment"], row["policy"], row["load"]): row for row in data["results"]}
    assert set(rows) == {("sharing", "finetune-only", 0.0), *(("sharing", p, x) for p in CONFIG.policies for x in (0.25, 0.5)),
                         ("burst", "coserve", 0.2), ("burst", "temporal:4", 0.2)}
    allowed = {
        "experiment", "policy", "model", "load", "rate", "trace", "num_requests", "slo_attainment", "slo_interval", "goodput",
        "ttft_ms", "tpot_ms", "itl_ms", "inference_tokens_per_s", "finetune_tokens_per_s", "finetune_share", "gain", "bound",
        "peak_memory_bytes", "bound_tokens_per_s", "bound_reached", "tpot_slo_ms", "ttft_slo_ms",
    }
    assert all(row.keys() <= allowed for row in data["results"])
    served = rows["sharing", "inference-only", 0.5]
    assert "finetune_tokens_per_s" not in served and "finetune_share" not in served and served["num_requests"] == 60
    assert served["gain"] == pytest.approx(served["goodput"] / data["capacity"]["rate"])
    alone, shared = rows["sharing", "finetune-only", 0.0], rows["sharing", "coserve", 0.25]
    assert alone["finetune_tokens_per_s"] == pytest.approx(1250, rel=0.01) and "num_requests" not in alone
    assert shared["finetune_share"] == pytest.approx(shared["finetune_tokens_per_s"] / 1250, rel=0.02)
    assert shared["gain"] == pytest.approx(shared["goodput"] / data["capacity"]["rate"] + shared["finetune_share"])
    assert rows["sharing", "coserve", 0.5]["rate"] == data["capacity"]["rate"] / 2
    assert data["machine"] == MACHINE.to_dict() and data["pass_ratios"] == {0.0: 1.1, 0.25: 1.1, 0.5: 1.1}
    load = OfferedLoad(rate=shared["rate"], prompt_tokens=3, output_tokens=8)
    bound = MACHINE.bound(load, 0.05, alone["finetune_tokens_per_s"], 1.1)
    assert shared["bound_tokens_per_s"] == pytest.approx(bound, rel=0.01), "finetuning alone is a median of each row's repeats"
    assert shared["bound_reached"] == shared["finetune_tokens_per_s"] / shared["bound_tokens_per_s"]
    assert shared["bound"] == pytest.approx(0.25 + shared["bound_tokens_per_s"] / 1250, rel=0.01)
    assert (shared["tpot_slo_ms"], shared["ttft_slo_ms"]) == (50.0, 1000.0)
    assert served["bound_tokens_per_s"] > 0 and "bound_reached" not in served and "bound" not in alone
    # A request takes 8 x 50 ms at most, so 40 run at 100 requests/s, and 40 running make an iteration of 50 ms.
    assert data["capacity"]["rate"] == pytest.approx(100, rel=0.1)
    held = [probe for probe in data["capacity"]["probes"] if not probe["gave_up"]]
    assert all(probe["num_requests"] == max(40, 4 * int(np.ceil(probe["rate"] * 0.4))) for probe in held)
    json.dumps(data)


def test_throughput_is_a_median_and_its_share_is_taken_inside_each_repeat() -> None:
    def cell(policy: str, load: float, repeat: int, rate: float, records: Sequence[RequestRecord] = ()) -> Cell:
        return Cell(policy, load, 2 * load, repeat, run_of(records, [TokensDone(0.0, 5.0), TokensDone(10.0, 5.0 + 10 * rate)]))

    good, bad = record(0.1, [0.2, 0.25]), record(0.1, [2.0])
    cells = [cell("finetune-only", 0.0, i, rate) for i, rate in enumerate((100.0, 200.0, 50.0))]
    shared = ((90.0, good), (100.0, bad), (40.0, good))
    cells += [cell("coserve", 0.5, i, rate, (good, other)) for i, (rate, other) in enumerate(shared)]
    data = make_results(Measured(OBJECTIVES, None, 2.0, (), tuple(cells), ()), replace(CONFIG, burst=None), "tiny")
    alone, row = data["results"]
    assert alone["finetune_tokens_per_s"] == 100 and alone["gain"] == 1 and "rate" not in alone
    assert row["finetune_tokens_per_s"] == 90 and row["finetune_share"] == pytest.approx(0.8), "of 0.9, 0.5 and 0.8"
    assert row["num_requests"] == 6 and row["slo_attainment"] == pytest.approx(5 / 6)
    assert row["goodput"] == pytest.approx(5 / 30)
    assert "bound" not in row and "machine" not in data and "peak_memory_bytes" not in row, "of engines that don't tell"


def test_prediction_errors_of_repeats_are_medians_per_kind() -> None:
    def errors(count: int, mid: float, high: float) -> dict[str, float]:
        return {"iterations": count, "median": mid, "p95": high}

    second = {"decode": errors(7, 0.2, 0.2), "backward": errors(1, 0.4, 0.4)}
    pooled = prediction_errors([{"decode": errors(5, 0.1, 0.3)}, second, {}])
    assert pooled == {"decode": errors(12, pytest.approx(0.15), pytest.approx(0.25)), "backward": errors(1, 0.4, 0.4)}


def test_a_stopped_benchmark_goes_on_where_it_was(tmp_path: Path) -> None:
    stopped = Lab(tmp_path, fail_at=5)
    with pytest.raises(RuntimeError, match="stopped here"):
        stopped.sharing.measure()
    again = Lab(tmp_path)
    first = again.results()
    kept = [label for label, stored in again.labels if stored]
    assert kept == [label for label, _ in stopped.labels][:-1]
    assert len(again.engines) == again.sharing.num_cells() - 4 and again.peers == 0
    third = Lab(tmp_path)
    assert third.results() == first and not third.engines
    assert not (tmp_path / "job").exists()


def test_other_settings_are_other_cells(tmp_path: Path) -> None:
    store = CellStore(tmp_path, {"seed": 0}, lambda label, stored: None)
    assert store.get("a:1/2", {"x": 1}, lambda: {"n": 1}) == {"n": 1}
    assert store.get("a:1/2", {"x": 1}, lambda: {"n": 2}) == {"n": 1}
    assert store.get("a:1/2", {"x": 2}, lambda: {"n": 3}) == {"n": 3}
    assert CellStore(tmp_path, {"seed": 1}, lambda label, stored: None).get("a:1/2", {"x": 1}, lambda: {"n": 4}) == {"n": 4}
    for path in (tmp_path / "cells").iterdir():
        path.write_text("{")
    assert store.get("a:1/2", {"x": 1}, lambda: {"n": 5}) == {"n": 5}, "a torn file is run again"


@pytest.mark.parametrize(("name", "value"), [
    ("policies", ("temporal:0",)), ("policies", ("fast",)), ("loads", ()), ("loads", (0.5, -1)), ("requests", 0), ("pairs", 0),
    ("tpot_ms", 0.0), ("capacity", -1.0), ("ttft_ms", 0.0),
])
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(ConfigError):
        SharingConfig(**{name: value})


class Page(HTMLParser):
    """Counts charts, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.titles: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}
        if tag == "svg":
            self.titles.append(str(dict(attrs)["aria-label"]))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.parametrize("loads", [(0.25, 0.5), (0.5,)])
def test_page_shows_the_plots_and_loads_nothing(tmp_path: Path, loads: tuple[float, ...]) -> None:
    text = make_page(Lab(tmp_path, replace(CONFIG, loads=loads)).results())
    page = Page()
    page.feed(text)
    assert not page.open
    assert len(page.titles) == 6 and page.titles[2:4] == ["Burst under coserve", "Queue under coserve"]
    assert not page.attributes & {"src", "href"} and not re.search(r"https?:|url\(|@import|<script", text)
    assert not re.search(r"\b(nan|inf|None)\b", text)
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert "tiny &lt;model&gt;" in text and "<model>" not in text
    assert text.count('<tr class="load">') == len(loads) + 1


def test_page_of_a_run_without_bound_bursts_or_finetune_only(tmp_path: Path) -> None:
    data = Lab(tmp_path).results()
    for row in data["results"]:
        for key in ("bound", "bound_tokens_per_s", "bound_reached", "gain", "finetune_share"):
            row.pop(key, None)
    data["results"] = [row for row in data["results"] if row["experiment"] == "sharing" and row["load"]]
    data["bursts"] = []
    page = Page()
    page.feed(make_page(data))
    assert len(page.titles) == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--policies", "coserve,fast"], "policy"), (["--loads", "half"], "loads"), (["--arrivals", "gamma:0"], "arrivals"),
    (["--spatial-threads", "2"], "spatial_threads"), (["--pairs", "0"], "pairs"),
    (["--arrivals", "trace:missing.csv"], "no trace file"),
])
def test_command_line_refuses_before_it_loads_a_model(arguments: list[str], message: str) -> None:
    command = importlib.import_module("coserve.cli.bench").bench_app
    found = CliRunner().invoke(command, ["sharing", *arguments])
    assert isinstance(found.exception, ConfigError | NotFound) and message in str(found.exception)


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.0, 1700.0) == [0.0, 500.0, 1000.0, 1500.0]
