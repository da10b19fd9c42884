"""bench/gpu.sh: no part can cost another's results, the figures mean what they say, and all of it runs on the CPU."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_report
import gpu_sharing
import pytest
from gpu_course import Course, Outcome, Part
from gpu_profile import Span, summarize
from gpu_rows import Rows, read_rows

from coserve.bench.metrics import RequestRecord, SloInMs, meets
from coserve.cachedir import cache_directory
from coserve.config.settings import parse_policy

ROOT = Path(__file__).resolve().parents[2]
STUBS = (sys.executable, str(Path(__file__).with_name("gpu_stub_parts.py")))
SHORT_S = {"hangs": 3.5, "hangs-at-once": 2.0, "no-time": 1.0}
"""Seconds after which a stub is killed; others have more than they need."""


def stub_parts(*names: str, seconds: float = 1.0) -> list[Part]:
    return [
        Part(name=name, seconds=seconds, command=STUBS, limit_s=SHORT_S.get(name, 30.0),
             item_s=1.0 if name == "slow-item" else 30.0)
        for name in names
    ]


class Ran:
    """A course over stubs that has ended. code: its exit code."""

    def __init__(self, folder: Path, *names: str, budget_s: float = 300.0, seconds: float = 1.0) -> None:
        parts = stub_parts(*names, seconds=seconds)
        environment = {"COSERVE_STUB_PID": str(folder / "pid")}
        self.course = Course(parts, folder, budget_s, environment=environment, listen=lambda course: None)
        self.code = self.course.run()
        self.outcomes = {outcome.name: outcome for outcome in self.course.outcomes}
        self.rows = read_rows(self.course.rows_path)
        self.log = self.course.log_path.read_text()

    def values(self, name: str) -> list[Any]:
        return [row["value"] for row in self.rows if row["part"] == name and "value" in row]


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_parts_that_fail_cost_only_themselves(tmp_path: Path) -> None:
    names = ("raises", "memory", "killed", "torn", "wrong", "broken-setup", "large")
    ran = Ran(tmp_path, "good", *names, "also-good")
    assert ran.code == 1
    assert {name: outcome.status for name, outcome in ran.outcomes.items()} == {
        "good": "ok", "also-good": "ok", **dict.fromkeys(names, "failed"),
    }
    assert [ran.values(name) for name in ("raises", "memory", "killed", "torn")] == [[1]] * 4
    told = {name: " | ".join(ran.outcomes[name].reasons) for name in names}
    assert "ValueError: no good" in told["raises"]
    assert "OutOfMemoryError: CUDA out of memory" in told["memory"]
    assert "SIGKILL" in told["killed"] and "died in one" in told["killed"]
    assert "exit code 7" in told["torn"]
    assert "relative error 1.0" in told["wrong"]
    assert "the device can't be set up" in told["broken-setup"]
    assert "a row of" in told["large"] and ran.values("large") == [1]
    assert "begun" in ran.outcomes["killed"].tail
    for line in ran.course.rows_path.read_text().splitlines():
        if not line.endswith('"val'):
            json.loads(line)
    (torn,) = (line for line in ran.course.rows_path.read_text().splitlines() if line.endswith('"val'))
    assert torn, "the next part's row is on a line of its own"


@pytest.mark.full
def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    begin = time.monotonic()
    ran = Ran(tmp_path, "hangs", "hangs-at-once", "good")
    assert time.monotonic() - begin < 20
    assert ran.code == 1 and [outcome.status for outcome in ran.course.outcomes] == ["failed", "failed", "ok"]
    assert ran.values("hangs") == [1]
    assert not alive(int((tmp_path / "pid").read_text()))
    assert any("took too long" in reason for reason in ran.outcomes["hangs"].reasons)
    assert any("killed after 2 s" in reason for reason in ran.outcomes["hangs-at-once"].reasons)
    for name in ("hangs", "hangs-at-once"):
        assert "gpu_stub_parts.py" in ran.outcomes[name].tail, "where it hung is told"


def test_what_a_dead_part_had_not_begun_runs_in_another_process(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "dies", "slow-item", "broken-device")
    dies, slow, broken = ran.course.outcomes
    assert ran.code == 1 and [outcome.attempts for outcome in ran.course.outcomes] == [2, 2, 2]
    assert broken.items == {"first": "failed", "second": "ok"}
    assert any("the device's error stays" in reason for reason in broken.reasons)
    assert dies.items == {"first": "ok", "second": "died", "third": "ok"}
    assert slow.items == {"sleeps": "died", "after": "ok"}
    assert any("took too long" in reason for reason in slow.reasons)
    assert sum(row.get("rows") == 1 for row in ran.rows if row["part"] == "dies") == 2, "no item ran twice"


def test_a_flood_of_output_is_read_and_bounded(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "floods")
    assert ran.code == 0 and ran.values("floods") == [1, 2]
    assert len(ran.log) < 400_000 and "begun" in ran.log and ran.log.rstrip().endswith("the last line")
    assert "bytes ..." in ran.log


def test_what_has_no_time_left_is_skipped_and_says_so(tmp_path: Path) -> None:
    ran = Ran(tmp_path, "good", "also-good", budget_s=30.0, seconds=40.0)
    assert ran.code == 0, "six tenths of a part's time are enough to try it"
    ran = Ran(tmp_path, "good", budget_s=20.0, seconds=40.0)
    assert ran.code == 2 and ran.outcomes["good"].status == "skipped"
    assert "20 s were left of 20" in ran.outcomes["good"].reasons[0]
    ran = Ran(tmp_path, "no-time")
    assert ran.code == 2 and not ran.values("no-time"), "items that the part's own time has no room for are not begun"
    ran = Ran(tmp_path, "late")
    assert ran.code == 2 and ran.outcomes["late"].items == {"one": "skipped"} and ran.values("late") == [1]


def run_script(folder: Path, parts: str, *, kill_when: str | None = None) -> tuple[int, str]:
    """gpu.run over stubs in a process of its own; SIGTERM once a row of a part is there. (exit code, output)."""
    code = (
        "import sys, gpu; from gpu_course import Part; from pathlib import Path\n"
        f"options = gpu.parse(['--output', {str(folder)!r}, '--device', 'cpu'])\n"
        f"parts = [Part(name=n, seconds=1, limit_s=30, command={STUBS!r}) for n in {parts!r}.split(',')]\n"
        "sys.exit(gpu.run(options, parts))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "bench"), "COSERVE_STUB_PID": str(folder.parent / "pid")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    until = time.monotonic() + 30
    while kill_when is not None and time.monotonic() < until:
        if any(row["part"] == kill_when and "value" in row for row in read_rows(folder / "gpu_rows.jsonl")):
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.02)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_a_stopped_run_keeps_what_it_has_and_leaves_no_process(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, output = run_script(folder, "good,hangs,also-good", kill_when="hangs")
    assert code == 130, output
    found = json.loads((folder / "gpu_summary.json").read_text())
    assert found["failed"] == ["hangs"] and found["skipped"] == ["also-good"] and not found["ok"]
    assert "stopped by SIGTERM" in found["parts"][1]["reasons"][0]
    with contextlib.suppress(FileNotFoundError):
        assert not alive(int((tmp_path / "pid").read_text()))


def test_the_summary_and_the_table_name_what_failed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    code, output = run_script(folder, "good,killed")
    assert code == 1
    found = json.loads((folder / "gpu_summary.json").read_text())
    assert {"device", "date", "versions", "command", "parts", "budget_s"} <= found.keys()
    assert found["failed"] == ["killed"] and found["parts"][1]["reasons"] and "begun" in found["parts"][1]["tail"]
    assert "SIGKILL" in output[-2000:] and "the end of what killed printed" in output
    assert {path.name for path in folder.iterdir()} <= set(gpu.FILES) and len(gpu.FILES) <= 8


def test_a_table_is_short_whatever_the_rows_hold() -> None:
    rows = [{"part": "kernels", "kernel": f"kernel {i}", "rows": 9, "seconds": 1.0, "relative_error": 1e-9} for i in range(500)]
    course = Course(stub_parts("good"), Path("/nowhere"), 1.0, environment={})
    course.outcomes = [
        Outcome(name="kernels", planned_s=1, status="ok", attempts=1, rows=rows),
        Outcome(name="passes", planned_s=1, status="failed", attempts=1, rows=[{"kind": "decode", "seconds": None}],
                reasons=["x " * 999]),
    ]
    text = gpu_report.table(course)
    assert len(text) < 9000 and "passes" in text and "can't be shown" in text


def test_rows_end_where_a_file_is_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpu_rows.MAX_FILE_BYTES", 200)
    rows = Rows(tmp_path / "rows", "part")
    for number in range(50):
        rows.add({"number": number})
    rows.add({"event": "end"})
    found = read_rows(tmp_path / "rows")
    assert 3 < len(found) < 20 and found[-1]["event"] == "end"


def test_the_plan_fits_the_budget() -> None:
    options = gpu.parse([])
    assert sum(part.seconds for part in gpu.make_parts(options)) <= options.budget_s <= 560
    smoke = gpu.parse(["--smoke"])
    assert [part.name for part in gpu.make_parts(smoke)] == ["environment", "kernels", "engine"] and smoke.budget_s == 120
    assert {*gpu.PLANNED_S} == {*gpu_report.SAYS, *gpu_sharing.CELLS}
    load = gpu_sharing.FULL
    took = load.settle_s + load.seconds + load.output_tokens * load.tpot_ms * 1e-3
    for name, cell in gpu_sharing.CELLS.items():
        parse_policy(cell.policy)
        assert took < gpu.PLANNED_S[name], "and there is time to start"


def test_the_output_goes_where_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.parse([]).output == ROOT / "bench" / "results"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.parse([]).output == tmp_path
    assert gpu.parse(["--output", "elsewhere"]).output == Path("elsewhere")
    with pytest.raises(SystemExit):
        gpu.parse(["--parts", "kernels,nonsense"])


@pytest.mark.parametrize("load", [gpu_sharing.FULL, gpu_sharing.QUICK])
def test_no_request_misses_because_the_drain_is_short(load: gpu_sharing.Load) -> None:
    """The slowest request that meets its objectives, if it came last, ends within the drain."""
    first, step = load.ttft_ms * 1e-3, load.tpot_ms * 1e-3
    times = tuple(load.seconds + first * 0.999 + step * 0.999 * i for i in range(load.output_tokens))
    slowest = RequestRecord(due_s=load.seconds, prompt_tokens=load.prompt_tokens, token_times=times, finished=True)
    assert meets(slowest, SloInMs(ttft_ms=load.ttft_ms, tpot_ms=load.tpot_ms))
    assert times[-1] <= load.seconds + load.drain_s
    assert load.settle_s >= load.output_tokens * step


def test_a_profile_counts_overlapping_work_once() -> None:
    device = [Span("a", 0, 400), Span("b", 200, 300), Span("a", 700, 100)]
    names = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cudaStreamSynchronize", "anything")
    host = [Span(name, 0, 5) for name in names]
    found = summarize(device, host, wall_s=1e-6, runs=1, layers=2)
    assert found["busy_share"] == pytest.approx(0.6) and found["kernels_per_layer"] == 1.5
    assert found["launches"] == 2 and found["waits"] == 1
    assert [(top["name"], top["count"]) for top in found["top"]] == [("a", 2), ("b", 1)]
    assert summarize([], host, wall_s=1.0, runs=1, layers=2)["busy_share"] is None


MISSING = "re2 gguf msgspec sqlalchemy fastapi uvicorn pydantic zmq multipart openai schemathesis psycopg"
"""Packages that a machine with a GPU lacks where it has torch, transformers, peft and pytest, but no network."""


@pytest.mark.full
def test_the_parts_need_no_package_that_such_a_machine_lacks() -> None:
    modules = ["gpu_clock", "gpu_kernels", "gpu_tiny", "gpu_passes", "gpu_peer", "gpu_sharing", "gpu_tests"]
    modules += [f"tests.gpu.{path.stem}" for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py"))]
    code = (
        "from importlib.machinery import PathFinder\n"
        f"real, missing = PathFinder.find_spec, {MISSING.split()!r}\n"
        "PathFinder.find_spec = classmethod(lambda cls, name, *a: None if name.split('.')[0] in missing else real(name, *a))\n"
        "import gpu_standins, importlib\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("src", "bench", ""))}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.full
def test_every_part_runs_on_the_cpu(tmp_path: Path) -> None:
    """As on a device, with tiny sizes. Cells that differ only in a policy's name or in the rate are left out."""
    alike = ("20-layer-sliced", "20-coserve-again", "20-dynamic-temporal", "5-coserve")
    names = [name for name in gpu.PLANNED_S if name not in alike]
    env = {
        **os.environ, "PYTHON": sys.executable, "COSERVE_CACHE": str(cache_directory()), "OMP_NUM_THREADS": "1",
        "OUT": str(tmp_path),
    }
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--device", "cpu", "--model", "tiny", "--quick"]
    command += ["--parts", ",".join(names)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-1000:]
    found = json.loads((tmp_path / "gpu_summary.json").read_text())
    assert found["ok"] and [part["name"] for part in found["parts"]] == names and all(part["says"] for part in found["parts"])
    assert found["device"] != "unknown" and "torch" in found["versions"] and found["ceilings"]["matmul_flops"] > 0
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for row in read_rows(tmp_path / "gpu_rows.jsonl"):
        rows[row["part"]].append(row)
    assert len([row for row in rows["kernels"] if "kernel" in row]) >= 15
    assert all(row["relative_error"] < 4e-5 for row in rows["kernels"] if "relative_error" in row)
    assert {row["check"] for row in rows["engine"] if "check" in row} >= {"a job stopped and resumed", "graphs as eager"}
    assert {row["kind"] for row in rows["passes"] if "kind" in row} == {"decode", "prefill", "finetune", "profile"}
    assert {row["kind"] for row in rows["row-cost"] if "kind" in row} == {"pass", "forward", "backward"}
    assert [row["finetune_tokens_per_s"] > 0 for row in rows["peer"] if "policy" in row] == [True, True]
    cells = {name: next(row for row in rows[name] if "policy" in row) for name in names if name in gpu_sharing.CELLS}
    assert cells["20-coserve"]["finetune_tokens_per_s"] > 0 and cells["20-coserve"]["num_requests"] >= 1
    assert "finetune_tokens_per_s" not in cells["20-inference-only"] and "slo_attainment" not in cells["finetune-only"]
    assert cells["20-inference-only"]["unfinished"] == 0
    (tests,) = (row for row in rows["tests"] if "command" in row)
    assert tests["collected"] > 50
