"""coserve against vLLM and peft: which cells there are, what traffic they get, and the arithmetic of rows and comparisons."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from coserve.bench import observe as observe_module
from coserve.bench.cells import CellStore
from coserve.bench.driver import TokensDone
from coserve.bench.loads import Reply
from coserve.bench.metrics import RequestRecord, SloInMs
from coserve.bench.observe import Observed, WindowTraffic, observe, observed_from_dict, observed_to_dict
from coserve.bench.pages import make_sections_page
from coserve.bench.rivals import COSERVE, VLLM
from coserve.bench.versus import (
    BURST,
    SIDE_BY_SIDE,
    BurstTraffic,
    Demand,
    ObservedCell,
    Versus,
    VersusConfig,
    make_configurations,
)
from coserve.bench.versuspage import versus_section
from coserve.bench.versusrows import describe_comparison, describe_row, make_comparisons, make_versus_rows
from coserve.core import ConfigError

OBJECTIVES = SloInMs(ttft_ms=1000.0, tpot_ms=100.0)
USED = {"client": 0.1, "configuration": 1.5, "others": 0.0}


def record(due_s: float = 0.0, ttft_s: float = 0.5, tpot_s: float = 0.05, finished: bool = True) -> RequestRecord:
    times = tuple(due_s + ttft_s + n * tpot_s for n in range(3))
    return RequestRecord(due_s=due_s, prompt_tokens=8, token_times=times, finished=finished)


def cell(name: str, repeat: int, tokens_per_s: float, records: Sequence[RequestRecord], load: str = "0.5") -> ObservedCell:
    samples = (TokensDone(-1.0, 0.0), TokensDone(11.0, 12 * tokens_per_s))
    return ObservedCell(name, Demand(load, 0.5), repeat, Observed(records=tuple(records), samples=samples, window_s=10.0), USED)


def versus(tmp_path: Path, config: VersusConfig, missing: dict[str, str] | None = None) -> Versus:
    """One whose cells are not run."""
    def prompts(count: int, key: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        return tuple((number, *key) for number in range(count))

    rivals: Any = None
    store = CellStore(tmp_path, {}, lambda label, stored: None)
    return Versus(config, make_configurations((0, 1)), rivals, prompts, store, missing=missing or {})


@pytest.mark.parametrize(("count", "names"), [
    (2, ["coserve", "split 1+1", "side by side"]),
    (4, ["coserve", "split 1+3", "split 2+2", "split 3+1", "side by side"]),
    (16, ["coserve", "split 4+12", "split 8+8", "split 12+4", "side by side"]),
])
def test_configurations_divide_the_processors(count: int, names: list[str]) -> None:
    found = make_configurations(range(10, 10 + count))
    assert [configuration.name for configuration in found] == names
    for configuration in found:
        both = configuration.serve_cores + configuration.train_cores
        assert set(both) == set(range(10, 10 + count)) and (configuration.server == VLLM) == (configuration.name != COSERVE)
        assert configuration.pinned == (len(both) == count)


def test_each_repeat_begins_with_another_configuration(tmp_path: Path) -> None:
    config = VersusConfig(rates=(0.5,), repeats=2, alone=True)
    plan = [(c.name, d.name, repeat) for c, d, repeat in versus(tmp_path, config).plan()]
    assert plan[:3] == [("coserve", "alone", 0), ("split 1+1", "alone", 0), ("side by side", "alone", 0)]
    assert [name for name, load, repeat in plan if (load, repeat) == (BURST, 1)] == ["split 1+1", "side by side", "coserve"]
    assert len(plan) == 3 * 3 * 2
    all_cells = versus(tmp_path, config).expected_s()
    assert versus(tmp_path, config, {SIDE_BY_SIDE: "no"}).expected_s() == pytest.approx(all_cells * 2 / 3)


def test_traffic_is_the_same_for_all_and_another_in_each_repeat(tmp_path: Path) -> None:
    measurement = versus(tmp_path, VersusConfig())
    traffic = measurement.traffic(Demand("0.7", 0.7), 1)
    assert traffic == measurement.traffic(Demand("0.7", 0.7), 1) and traffic.window_s == 46.0
    warm, counted = [t for t in traffic.due_s if t < 0], [t for t in traffic.due_s if t >= 0]
    assert (len(warm), len(counted)) == (4, 32) and list(traffic.due_s) == sorted(traffic.due_s)
    assert min(warm) >= -6.0 and max(counted) <= 46.0 and len(traffic.prompts) == 36
    other = measurement.traffic(Demand("0.7", 0.7), 2)
    assert not set(traffic.prompts) & set(other.prompts) and traffic.due_s != other.due_s
    slower = measurement.traffic(Demand("0.35", 0.35), 1)
    assert not set(traffic.prompts) & set(slower.prompts), "no server finds a prompt in its cache"


def test_the_burst_rises_and_falls(tmp_path: Path) -> None:
    traffic = versus(tmp_path, VersusConfig()).traffic(Demand(BURST, 0.1), 0)
    counted = [t for t in traffic.due_s if t >= 0]
    assert traffic.window_s == BurstTraffic().seconds == 46.0
    assert [sum(a <= t < b for t in counted) for a, b in ((0, 13), (13, 33), (33, 46))] == [1, 20, 1]


@pytest.mark.parametrize(("change", "said"), [
    ({"rates": ()}, "rates"), ({"rates": (0.0,)}, "rates"), ({"repeats": 0}, "repeats"), ({"window_s": 0.0}, "window_s"),
    ({"tpot_ms": -1.0}, "tpot_ms"),
])
def test_wrong_settings(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VersusConfig(**change)


class Steady:
    """Trains 100 tokens a second in steps of 10, and tells of each step."""

    def __init__(self) -> None:
        self._began, self._told = time.monotonic() - 1.0, 0

    def start(self) -> None: ...
    def stop(self) -> None: ...

    def poll(self) -> list[TokensDone]:
        steps = int((time.monotonic() - self._began) * 10)
        found = [TokensDone(self._began + 0.1 * n, 10.0 * n) for n in range(self._told + 1, steps + 1)]
        self._told = max(self._told, steps)
        return found


def test_only_the_window_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "SAMPLE_S", 0.03)

    async def send(prompt: Sequence[int], output_tokens: int) -> Reply:
        await asyncio.sleep(0.02)
        return Reply((time.monotonic(),) * output_tokens)

    traffic = WindowTraffic(prompts=((1,), (2,), (3,)), due_s=(-0.1, 0.0, 0.3), output_tokens=2, warmup_s=0.2, window_s=0.4)
    observed = asyncio.run(observe(send, traffic, Steady()))
    assert [r.due_s for r in observed.records] == pytest.approx([0.0, 0.3]) and all(r.finished for r in observed.records)
    assert all(r.ttft_ms is not None and 19 < r.ttft_ms < 500 for r in observed.records)
    assert observed.samples[0].time_s < 0 and observed.samples[-1].time_s >= 0.4, "it waits for a sample after the window"
    assert observed.finetune_tokens_per_s == pytest.approx(100.0)
    again = observed_from_dict(json.loads(json.dumps(observed_to_dict(observed))))
    assert again.finetune_tokens_per_s == pytest.approx(100.0, rel=1e-3) and len(again.records) == 2


def test_a_silent_trainer_ends_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Steady):
        def poll(self) -> list[TokensDone]:
            return []

    monkeypatch.setattr(observe_module, "SAMPLE_S", 0.01)
    monkeypatch.setattr(observe_module, "SILENT_S", 0.05)
    traffic = WindowTraffic(prompts=(), due_s=(), output_tokens=2, warmup_s=0.01, window_s=0.01)
    with pytest.raises(RuntimeError, match="told of no progress"):
        asyncio.run(observe(lambda prompt, count: asyncio.sleep(0, Reply(())), traffic, Silent()))


def test_between_samples_training_advances_evenly() -> None:
    samples = (TokensDone(-2.0, 100.0), TokensDone(2.0, 500.0), TokensDone(7.0, 600.0), TokensDone(12.0, 1100.0))
    observed = Observed(records=(), samples=samples, window_s=10.0)
    assert observed.finetune_tokens_per_s == pytest.approx((900.0 - 300.0) / 10.0)


CELLS = [
    cell("coserve", 0, 120.0, [record()] * 100), cell("split 1+1", 0, 100.0, [record()] * 100),
    cell("side by side", 0, 300.0, [record()] * 98 + [record(tpot_s=0.2)] * 2),
    cell("coserve", 1, 90.0, [record()] * 100), cell("split 1+1", 1, 60.0, [record()] * 99 + [record(finished=False)]),
    cell("side by side", 1, 310.0, [record()] * 98 + [record(ttft_s=1.5)] * 2),
    cell("coserve", 2, 130.0, [record()] * 100), cell("split 1+1", 2, 130.0, [record()] * 100),
    cell("side by side", 2, 290.0, [record()] * 100),
]


def test_rows_pool_requests_and_take_medians_of_throughput() -> None:
    own, split, beside = make_versus_rows(CELLS, OBJECTIVES)
    assert own["finetune_tokens_per_s"] == pytest.approx(120.0) and own["repeats"] == 3 and own["holds"]
    assert own["finetune_tokens_per_s_of_repeats"] == {"0": pytest.approx(120), "1": pytest.approx(90), "2": pytest.approx(130)}
    assert own["goodput"] == pytest.approx(300 / 30.0) and own["num_requests"] == 300
    assert split["slo_attainment"] == pytest.approx(299 / 300) and split["holds"] and split["failures"] == 1
    assert beside["slo_attainment"] == pytest.approx(296 / 300) and not beside["holds"] and beside["failures"] == 0
    assert own["cores_used"] == USED and own["tpot_ms"]["p50"] == pytest.approx(50.0)
    assert "120 trained tokens/s; 100.0% of 300 requests in time" in describe_row(own)


def test_coserve_is_compared_with_the_best_that_holds() -> None:
    (entry,) = make_comparisons(make_versus_rows(CELLS, OBJECTIVES))
    assert entry["against"] == "split 1+1" and entry["coserve_holds"]
    assert entry["ratio_of_repeats"] == pytest.approx([1.2, 1.5, 1.0]) and entry["ratio"] == pytest.approx(1.2)
    assert (entry["ratio_least"], entry["ratio_greatest"]) == (pytest.approx(1.0), pytest.approx(1.5))
    assert describe_comparison(entry) == (
        "At 0.5 requests/s, coserve trained 1.20 times the tokens of split 1+1 (1.00 to 1.50 by repeat).")


def test_where_none_holds_there_is_no_ratio() -> None:
    late = [record(tpot_s=0.2)] * 10
    rows = make_versus_rows([cell("coserve", 0, 10.0, late), cell("split 1+1", 0, 20.0, late)], OBJECTIVES)
    (entry,) = make_comparisons(rows)
    assert entry == {"experiment": "comparison", "load": "0.5", "coserve_holds": False}
    assert describe_comparison(entry) == "At 0.5 requests/s, no configuration with vLLM held the objectives, nor did coserve."


def test_without_vllm_the_row_says_so(tmp_path: Path) -> None:
    missing = ObservedCell("split 1+1", Demand("0.5", 0.5), 0, missing="no vLLM was given (--vllm)")
    rows = make_versus_rows([CELLS[0], missing], OBJECTIVES)
    assert rows[1] == {"experiment": "versus", "configuration": "split 1+1", "load": "0.5", "rate": 0.5,
                       "missing": "no vLLM was given (--vllm)"}
    assert describe_row(rows[1]) == "split 1+1 at 0.5 requests/s: missing, no vLLM was given (--vllm)"
    assert not make_comparisons(rows)
    measurement = versus(tmp_path, VersusConfig(), {"split 1+1": "no vLLM"})
    split = next(configuration for configuration in measurement.configurations if configuration.pinned)
    assert measurement._cell(split, Demand("0.7", 0.7), 0).missing == "no vLLM"


class Balanced(HTMLParser):
    """Fails for a tag that isn't closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None: ...

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_marks_what_is_late_and_says_what_is_missing() -> None:
    gone = ObservedCell("split <3>", Demand("0.5", 0.5), 0, missing="vLLM did not start: <why>")
    rows = make_versus_rows([*CELLS, gone], OBJECTIVES)
    page = make_sections_page("A & B", [versus_section({
        "device": "a machine, 2 cores", "date": "today", "versions": {"vllm": "1"}, "command": "coserve bench paper",
        "objectives": {"ttft_ms": 1000.0, "tpot_ms": 100.0}, "results": rows, "comparisons": make_comparisons(rows),
        "settings": {"repeats": 3, "window_s": 10.0, "warmup_s": 6.0, "prompt_tokens": 128, "output_tokens": 64, "burst": None},
        "common": {"dtype": "float32", "cores": 2, "rank": 16, "finetune_tokens": 512, "finetune_batch": 8, "timeout_s": 30.0},
    })])
    parser = Balanced()
    parser.feed(page.removeprefix("<!doctype html>"))
    assert not parser.open and "<title>A &amp; B</title>" in page
    assert "300, late" in page and "120, 100%" in page and "100, 100%" in page
    assert len(re.findall(r'<rect fill="var\(--c7\)"', page)) == 1, "one bar is grey"
    assert "Not measured: split &lt;3&gt;. vLLM did not start: &lt;why&gt;" in page
    assert "coserve trained 1.20 times the tokens of split 1+1" in page
