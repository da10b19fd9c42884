"""`coserve bench paper`: bad input as one line, and a whole measurement with stand-ins for the programs."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from coserve.bench import observe as observe_module
from coserve.bench.rivals import RivalSetup
from coserve.bench.servers import free_port
from coserve.bench.versus import VersusConfig, make_configurations
from coserve.cli import paper as paper_module
from tests.commands import Run
from tests.tiny_directory import build_tiny_directory

FAKE = str(Path(__file__).parents[1] / "fake_rival.py")


def write_programs(directory: Path, kind: str) -> Path:
    """An environment whose vLLM is the stand-in, and whose Python knows the versions of both packages."""
    (directory / "bin").mkdir(parents=True)
    for name, line in (("vllm", f'exec "{sys.executable}" "{FAKE}" {kind} "$@"'), ("python", "echo 0.1 0.2")):
        (directory / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (directory / "bin" / name).chmod(0o755)
    return directory


@pytest.mark.parametrize(("arguments", "said"), [
    (("--vllm", "nowhere"), "--vllm: nowhere has no bin/vllm; give a virtual environment"),
    (("--vllm", "http://127.0.0.1"), "vllm: a URL must be http://HOST:PORT"),
    (("--vllm", "http://127.0.0.1:x"), "vllm: a URL must be http://HOST:PORT"),
    (("--vllm", "https://127.0.0.1:1"), "vllm: a URL must be http://HOST:PORT"),
    (("--vllm", "http://127.0.0.1:PORT"), "vllm: no server is healthy at http://127.0.0.1:"),
    (("--rates", "1,x"), "rates: write numbers joined by commas, got '1,x'"),
    (("--rates", "0"), "rates: must be positive"), (("--repeats", "0"), "repeats"), (("--window-s", "-1"), "window_s"),
    (("--dtype", "auto"), "dtype: must be float32 or bfloat16, got 'auto'"),
    (("--no-simulated", "--no-measured"), "measured: "),
    (("--workers", "0"), "workers: must be at least 1, got 0"), (("--simulated-s", "0"), "duration: must be"),
    (("--simulated-arrivals", "gamma:x"), "arrivals: must be poisson, gamma:CV"),
    (("--simulated-arrivals", "trace:nowhere.csv"), "arrivals: there is no trace file nowhere.csv"),
])
def test_bad_input_is_one_line(run: Run, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    given = [argument.replace("PORT", str(free_port())) if "127" in argument else argument for argument in arguments]
    if "HOST" in said:
        given = list(arguments)
    ran = run("bench", "paper", "-o", tmp_path / "out", *given)
    assert ran.code == 2 and ran.err.count("\n") == 1 and said in ran.err, ran.err
    assert not (tmp_path / "out").exists()


def test_a_vllm_that_runs_already_is_taken_for_the_middle_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_module, "healthy", lambda url: url == "http://127.0.0.1:8000")
    where, versions = paper_module.read_vllm("http://127.0.0.1:8000/v1/")
    assert where == "http://127.0.0.1:8000" and versions == {"vllm": "at http://127.0.0.1:8000"}
    missing = paper_module.find_missing(make_configurations(range(4)), where)
    assert missing.keys() == {"split 1+3", "split 3+1", "side by side"} and "taken for split 2+2" in missing["side by side"]


def test_an_environment_without_vllm_inside(run: Run, tmp_path: Path) -> None:
    environment = write_programs(tmp_path / "env", "serve")
    (environment / "bin" / "python").write_text("#!/bin/sh\necho 'ModuleNotFoundError: no vllm' >&2\nexit 1\n")
    ran = run("bench", "paper", "-o", tmp_path / "out", "--vllm", environment)
    assert ran.code == 2 and "can't tell its versions of vllm and torch (ModuleNotFoundError: no vllm)" in ran.err


@pytest.mark.full
def test_a_whole_measurement(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "SAMPLE_S", 0.05)
    monkeypatch.setattr(paper_module, "VersusConfig", partial(VersusConfig, warmup_s=0.1))
    serve, train = (sys.executable, FAKE, "serve"), (sys.executable, FAKE, "train")
    monkeypatch.setattr(paper_module, "RivalSetup", partial(RivalSetup, serve=serve, peft_train=train))
    monkeypatch.setattr(paper_module.os, "sched_getaffinity", lambda _: {0, 1})
    build_tiny_directory(tmp_path / "model")
    command = ("bench", "paper", tmp_path / "model", "-o", tmp_path / "out", "--rates", "10", "--window-s", "0.4", "--repeats",
               "1", "--no-burst", "--no-simulated", "--vllm")
    ran = run(*command, write_programs(tmp_path / "env", "serve"))
    assert ran.code == 0, ran.err
    data = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert {"device", "date", "versions", "command", "objectives", "settings", "results", "comparisons"} <= data.keys()
    assert data["versions"]["vllm"] == "0.1" and data["command"].startswith("coserve bench paper")
    assert [row["configuration"] for row in data["results"]] == ["coserve", "split 1+1", "side by side"]
    assert all(row["num_requests"] == 4 and row["finetune_tokens_per_s"] > 0 for row in data["results"])
    assert "coserve at 10 requests/s, repeat 1" in ran.out and "coserve trained" in ran.out
    page = (tmp_path / "out" / "paper.html").read_text()
    assert "side by side" in page and "http" not in page.replace("over HTTP", "").split("Command:")[0]
    assert not list((tmp_path / "out").glob("coserve-data-*")), "the server's data is not kept"
    ran = run(*command, write_programs(tmp_path / "broken", "fail"))
    assert ran.code == 0 and ran.out.count("(kept from before)") == 3, "nothing is started for cells that are there"


def test_without_vllm_coserve_is_measured_alone(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe_module, "SAMPLE_S", 0.05)
    monkeypatch.setattr(paper_module, "VersusConfig", partial(VersusConfig, warmup_s=0.1))
    monkeypatch.setattr(paper_module, "RivalSetup", partial(RivalSetup, serve=(sys.executable, FAKE, "serve")))
    build_tiny_directory(tmp_path / "model")
    ran = run("bench", "paper", tmp_path / "model", "-o", tmp_path / "out", "--rates", "10", "--window-s", "0.3", "--repeats",
              "1", "--no-burst", "--no-simulated")
    assert ran.code == 0, ran.err
    rows = json.loads((tmp_path / "out" / "measured.json").read_text())["results"]
    assert [row.get("missing") for row in rows] == [None] + ["no vLLM was given (--vllm)"] * (len(rows) - 1)
    failing = partial(RivalSetup, serve=(sys.executable, FAKE, "fail"))
    monkeypatch.setattr(paper_module, "RivalSetup", failing)
    ran = run("bench", "paper", tmp_path / "model", "-o", tmp_path / "other", "--no-simulated")
    assert ran.code == 2 and ran.err.count("\n") == 1 and "did not start" in ran.err and "no such card" in ran.err
