"""The serving benchmark without a real server: ratios, bounds, the order of cells, arguments, the file."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving_cpu
from serving_cpu import Measurement, Pair, System, read_options, requests_each
from serving_rows import (
    COSERVE,
    IN_PROCESS,
    VLLM,
    Cell,
    capacity,
    cell_summary,
    describe,
    describe_ratios,
    fcfs_ttft_s,
    make_rows,
)

from coserve.bench.loads import PromptLoad
from coserve.bench.metrics import RequestRecord


def record(due_s: float, ttft_s: float, tokens: int = 3, tpot_s: float = 0.1, *, finished: bool = True) -> RequestRecord:
    times = tuple(due_s + ttft_s + index * tpot_s for index in range(tokens))
    return RequestRecord(due_s=due_s, prompt_tokens=4, token_times=times, finished=finished)


def cell(system: str, pair: int, *records: RequestRecord, clients: int | None = 1, rate: float | None = None) -> Cell:
    return Cell(
        system=system, dtype="float32", pair=pair, clients=clients, rate=rate, records=records, prefill_s=0.2, floor_s=0.02,
        client_cores=0.01, server_cores=1.9, other_cores=0.05,
    )


def test_first_come_first_served_is_a_queue() -> None:
    assert fcfs_ttft_s([0.0, 0.0, 0.0], 0.2) == pytest.approx([0.2, 0.4, 0.6])
    assert fcfs_ttft_s([1.0, 0.0, 0.1], 0.2) == pytest.approx([0.2, 0.2, 0.3]), "in the order of arrival"
    assert fcfs_ttft_s([], 0.2) == []


def test_ratios_are_of_pairs_and_their_median_is_the_row() -> None:
    # Output tokens per second: 6 in 0.4 + 0.1 * 2 = 10 over vLLM's 6 in 0.8 + 0.2, and so on.
    def at(system: str, pair: int, rate: float) -> Cell:
        return cell(system, pair, record(0.0, 3 / rate - 0.2))

    ours, theirs = (12.0, 6.0, 4.5), (4.0, 4.0, 9.0)
    cells = [at(COSERVE, n, rate) for n, rate in enumerate(ours)] + [at(VLLM, n, rate) for n, rate in enumerate(theirs)]
    cells += [at(IN_PROCESS, 0, 6.0), at(IN_PROCESS, 1, 6.0)]
    row, vllm, inside = make_rows(cells)
    assert row["output_tokens_per_s"] == pytest.approx(6.0) and row["pairs"] == 3
    assert [row["ratio_vllm"], row["ratio_vllm_least"], row["ratio_vllm_greatest"]] == pytest.approx([1.5, 0.5, 3.0])
    assert row["ttft_p99_ratio_vllm"] == pytest.approx(0.3 / 0.55)
    assert row["ratio_in_process"] == pytest.approx(1.5), "only of the pairs that have both"
    assert vllm["system"] == VLLM and "ratio_vllm" not in vllm and "ratio_in_process" not in vllm
    assert inside["ratio_vllm"] == pytest.approx((1.5 + 1.5) / 2) and "ratio_in_process" not in inside
    assert "output tokens/s over vLLM's 1.50 (0.50 to 3.00)" in describe_ratios(row) and describe_ratios(vllm) == ""


def test_a_row_holds_latencies_failures_and_the_share_of_the_floor() -> None:
    mine = [
        cell(COSERVE, 0, record(0.0, 0.2, tpot_s=0.05), record(0.0, 0.4, tpot_s=0.05)),
        cell(COSERVE, 1, record(0.0, 0.3, tpot_s=0.08), record(0.0, 9.0, tokens=1, finished=False)),
    ]
    (row,) = make_rows(mine)
    assert (row["clients"], row["num_requests"], row["failures"]) == (1, 4, 1)
    assert row["ttft_ms"]["p50"] == pytest.approx(300) and row["ttft_ms"]["max"] == pytest.approx(400)
    assert row["tpot_ms"]["p50"] == pytest.approx(50) and row["tpot_ms"]["p99"] == pytest.approx(80, rel=0.02)
    assert row["share_of_floor"] == pytest.approx((20 / 50 + 20 / 80) / 2) and row["floor_ms"] == pytest.approx(20)
    assert row["output_tokens_per_s"] == pytest.approx((6 / 0.5 + 3 / 0.46) / 2), "tokens of failures don't count"
    assert row["cores_used"] == {"client": 0.01, "server": 1.9, "others": 0.05}
    assert "ratio_vllm" not in row
    assert cell_summary(mine[1])["pair"] == 1 and json.dumps(row, allow_nan=False)
    assert "1 clients, coserve: 6.5 output tokens/s" in describe(mine[1]) and "1 failures" in describe(mine[1])


def test_requests_above_the_bound_are_counted() -> None:
    # Replayed: 0.2, 0.4, 0.6, and 0.2 for the one alone: their median is 0.3, the bound 0.6.
    sent = (0.0, 0.0, 0.0, 5.0)
    waits = (0.2, 0.5, 0.7, 0.7)
    records = [record(due, wait) for due, wait in zip(sent, waits, strict=True)]
    (row,) = make_rows([cell(COSERVE, 0, *records, record(9.0, 0.0, tokens=0, finished=False), clients=4)])
    assert row["fcfs"]["prefill_ms"] == pytest.approx(200) and "share_of_floor" not in row
    fcfs = make_rows([cell(COSERVE, 0, *records, clients=4)])[0]["fcfs"]
    assert fcfs["ttft_p50_ms"] == pytest.approx(300) and fcfs["bound_ms"] == pytest.approx(600)
    assert fcfs["num_above"] == 2 and fcfs["num_above_own"] == 1, "the third of those sent at once may wait 1.2 s"
    assert row["fcfs"]["num_above"] == 4, "who never got a token waited too long; the median is 0.2 here"


def test_nothing_was_answered() -> None:
    dead = [cell(COSERVE, 0, record(0.0, 0.0, tokens=0, finished=False)), cell(VLLM, 0, record(0.0, 0.1))]
    row, _ = make_rows(dead)
    assert row["output_tokens_per_s"] == 0 and row["failures"] == 1
    assert "ttft_ms" not in row and "ratio_vllm" not in row and json.dumps(row, allow_nan=False)


def test_capacity_is_vllms_with_the_most_clients() -> None:
    one, two = record(0.0, 0.3), record(0.0, 0.05, tpot_s=0.1)
    few, ours = cell(VLLM, 0, two, clients=1), cell(COSERVE, 0, two, clients=8)
    assert capacity([few, ours, cell(VLLM, 0, one, clients=8)]) == pytest.approx(2.0)
    assert capacity([ours]) == pytest.approx(4.0)


# --- a pair ---


class FakeGroup:
    """A halted group's pid is among the halted."""

    def __init__(self, running: list[str], name: str) -> None:
        self.running, self.name, self.pid = running, name, 1

    def halt(self) -> None:
        self.running.remove(self.name)

    def resume(self) -> None:
        self.running.append(self.name)
        assert self.running == [self.name], "only one runs at a time"

    def processor_seconds(self) -> float:
        return 0.0


class FakeStarter:
    """Systems that answer each request in 64 ms, and a log of their loads."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.log: list[tuple[str, PromptLoad]] = []
        self.started: list[str] = []

    @contextlib.contextmanager
    def start(self, name: str, dtype: str, pair: int) -> Iterator[System]:
        self.started.append(f"{name} {dtype} {pair}")
        group = FakeGroup(self.running, name)
        group.resume()

        def run(load: PromptLoad) -> list[RequestRecord]:
            assert self.running == [name]
            self.log.append((name, load))
            return [record(0.0, 0.001, load.output_tokens, 0.001) for _ in load.prompts]

        yield System(name, group, run)  # type: ignore[arg-type]


@pytest.fixture
def measurement(monkeypatch: pytest.MonkeyPatch) -> tuple[Measurement, FakeStarter]:
    starter = FakeStarter()
    monkeypatch.setattr(serving_cpu, "read_bandwidth", lambda: 1e10)
    monkeypatch.setattr(serving_cpu, "weight_bytes", lambda _, itemsize: itemsize * 10**8)
    options = argparse.Namespace(clients=[1, 8], quick=False)

    class Source:
        def __call__(self, count: int, *key: int) -> tuple[tuple[int, ...], ...]:
            return tuple((number, *key) for number in range(count))

    class NoCheckpoint:
        architecture = None

    return Measurement(options, [COSERVE, VLLM, IN_PROCESS], starter, Source(), NoCheckpoint()), starter  # type: ignore[arg-type]


def test_systems_alternate_cell_by_cell_under_the_same_load(measurement: tuple[Measurement, FakeStarter]) -> None:
    bench, starter = measurement
    cells, rate = bench.measure(Pair("bfloat16", 1, None))
    assert starter.started == [f"{name} bfloat16 1" for name in (COSERVE, VLLM, IN_PROCESS)]
    assert [(c.clients, c.system) for c in cells] == [
        (clients, name) for clients in (1, 8, None) for name in (VLLM, IN_PROCESS, COSERVE)
    ], "the second pair begins with the second system"
    assert [len(c.records) for c in cells] == [10] * 3 + [48] * 3 + [40] * 3
    assert cells[0].floor_s == pytest.approx(0.02) and cells[0].prefill_s == pytest.approx(0.001)
    assert rate == pytest.approx(0.5 * 48 / 0.064) and {c.rate for c in cells[:6]} == {None} and cells[8].rate == rate
    loads = [load for name, load in starter.log if name == COSERVE and load.output_tokens == 64]
    assert loads == [load for name, load in starter.log if name == VLLM and load.output_tokens == 64]
    assert loads[2].due_s is not None and loads[2].due_s[-1] <= 40 / rate
    assert bench.measure(Pair("bfloat16", 2, 3.0))[1] == 3.0, "later pairs keep the rate"
    assert not starter.running


def test_numbers_of_requests() -> None:
    assert [requests_each(clients, quick=False) for clients in (1, 8, 32)] == [10, 6, 3]
    assert requests_each(1, quick=True) * 64 < 200


# --- arguments ---


def options(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["serving_cpu.py", *arguments])
    return read_options()


def test_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = options(monkeypatch)
    assert usual.clients == [1, 8, 32] and usual.pairs == 3 and usual.systems == [COSERVE, VLLM]
    assert usual.dtypes[0] == "float32" and not usual.in_process
    quick = options(monkeypatch, "--quick", "--pairs", "2", "--systems", "coserve", "--dtypes", "bfloat16")
    assert (quick.clients, quick.pairs, quick.systems, quick.dtypes) == ([1, 8], 2, [COSERVE], ["bfloat16"])


@pytest.mark.parametrize(("arguments", "said"), [
    (("--clients", "1,x"), "--clients: write numbers"), (("--clients", "0"), "--clients"), (("--pairs", "0"), "--pairs"),
    (("--systems", "coserve,tgi"), "--systems: must be of coserve, vllm, got tgi"),
    (("--dtypes", "float16"), "--dtypes: must be of float32, bfloat16, got float16"),
])
def test_bad_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        options(monkeypatch, *arguments)
    assert said in capsys.readouterr().err


def test_no_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["serving_cpu.py", "--vllm", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"--vllm: .* has no bin/vllm"):
        serving_cpu.main()
    monkeypatch.setattr(sys, "argv", ["serving_cpu.py", "--systems", "vllm"])
    with pytest.raises(SystemExit, match="nothing is left"):
        serving_cpu.main()


def test_a_whole_run_writes_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    measurement: tuple[Measurement, FakeStarter],
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("COSERVE_CACHE", "kept")
    for name in ("locate_model", "Prompts", "Checkpoint"):
        monkeypatch.setattr(serving_cpu, name, lambda _: tmp_path)
    monkeypatch.setattr(serving_cpu, "Measurement", lambda *_: measurement[0])
    output = tmp_path / "serving.json"
    monkeypatch.setattr(
        sys, "argv", ["serving_cpu.py", "--dtypes", "float32", "--pairs", "2", "--output", str(output)])
    serving_cpu.main()
    data = json.loads(output.read_text())
    assert {"device", "date", "versions", "command", "results", "cells"} <= data.keys()
    assert data["skipped"] == ["vllm: no environment was given (--vllm /path/to/venv)"]
    assert "skipped vllm" in capsys.readouterr().out
    assert len(data["results"]) == 9 and len(data["cells"]) == 18 and data["results"][0]["pairs"] == 2
