"""The programs of `coserve bench paper` --measured: started, run one at a time, observed. Real ones are stood in for."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from coserve.bench import observe as observe_module
from coserve.bench import trainers
from coserve.bench.cells import CellStore
from coserve.bench.metrics import SloInMs
from coserve.bench.rivals import COSERVE, VLLM, Configuration, RivalMissing, Rivals, RivalSetup
from coserve.bench.servers import ProcessGroup, processor_seconds, running_process
from coserve.bench.trainers import JobData, PeftTrainer
from coserve.bench.versus import SIDE_BY_SIDE, Versus, VersusConfig
from coserve.bench.versusrows import make_versus_rows

FAKE = str(Path(__file__).parents[1] / "fake_rival.py")


def write_environment(directory: Path, kind: str) -> Path:
    """A virtual environment whose bin/vllm is the stand-in."""
    program = directory / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{FAKE}" {kind} "$@"\n')
    program.chmod(0o755)
    return directory


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RivalSetup:
    monkeypatch.setattr(observe_module, "SAMPLE_S", 0.05)
    monkeypatch.setattr(trainers, "LOOK_S", 0.02)
    data = tmp_path / "train.jsonl"
    data.write_text('{"text": "a"}\n')
    return RivalSetup(
        model=tmp_path, vllm=write_environment(tmp_path / "env", "serve"), data=JobData(data, 8), directory=tmp_path,
        dtype="float32", objectives=SloInMs(ttft_ms=1000.0, tpot_ms=100.0), timeout_s=5.0, warmup=((1, 2), (3, 4)),
        serve=(sys.executable, FAKE, "serve"), peft_train=(sys.executable, FAKE, "train"),
    )


def make_prompts(count: int, key: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple((number, *key) for number in range(count))


CONFIG = VersusConfig(rates=(20.0,), burst=None, repeats=1, window_s=1.0, warmup_s=0.2, ttft_ms=1000.0, tpot_ms=100.0,
                      output_tokens=4)


def test_all_configurations_are_measured_and_kept(setup: RivalSetup) -> None:
    configurations = [
        Configuration(name=COSERVE, server=COSERVE, serve_cores=(0,), train_cores=(0,)),
        Configuration(name=SIDE_BY_SIDE, server=VLLM, serve_cores=(0,), train_cores=(0,)),
    ]
    store = CellStore(setup.directory, {}, lambda label, stored: None)
    with Rivals(setup) as rivals:
        cells = Versus(CONFIG, configurations, rivals, make_prompts, store, missing={}).measure()
        halted = [group for rival in rivals._started.values() for group in rival.servers]
        before = [processor_seconds(group.pid) for group in halted]
        time.sleep(0.1)
        assert [processor_seconds(group.pid) for group in halted] == before and all(group.alive() for group in halted)
    assert not any(group.alive() for group in halted)
    own, theirs = make_versus_rows(cells, CONFIG.objectives)
    assert own["num_requests"] == theirs["num_requests"] == 20 and own["slo_attainment"] == 1.0 and theirs["holds"]
    assert own["finetune_tokens_per_s"] == pytest.approx(1000, rel=0.3), "the server's counter, over the window"
    assert 500 < theirs["finetune_tokens_per_s"] < 2050, "100 tokens every 0.05 s and a little"
    with Rivals(replace(setup, serve=("false",), vllm=setup.directory / "nowhere")) as rivals:
        again = Versus(CONFIG, configurations, rivals, make_prompts, store, missing={}).measure()
    assert make_versus_rows(again, CONFIG.objectives) == [own, theirs], "nothing was started again"


def test_vllm_that_does_not_start_is_missing_with_the_reason(setup: RivalSetup, tmp_path: Path) -> None:
    setup = replace(setup, vllm=write_environment(tmp_path / "broken", "fail"))
    configuration = Configuration(name=SIDE_BY_SIDE, server=VLLM, serve_cores=(0,), train_cores=(0,))
    told: list[str] = []
    with Rivals(setup) as rivals:
        config = replace(CONFIG, repeats=2)
        store = CellStore(setup.directory, {}, lambda label, stored: None)
        cells = Versus(config, [configuration], rivals, make_prompts, store, missing={}, tell=told.append).measure()
    assert len(told) == 1 and "vLLM did not start: ValueError: no such card" in told[0], "tried once"
    (row,) = make_versus_rows(cells, config.objectives)
    assert row["missing"].startswith("vLLM did not start") and "finetune_tokens_per_s" not in row


def test_coserve_that_does_not_start_ends_the_measurement(setup: RivalSetup) -> None:
    configuration = Configuration(name=COSERVE, server=COSERVE, serve_cores=(0,), train_cores=(0,))
    with (
        Rivals(replace(setup, serve=(sys.executable, FAKE, "fail"))) as rivals,
        pytest.raises(RuntimeError, match="no such card") as raised, rivals.running(configuration),
    ):
        pass
    assert not isinstance(raised.value, RivalMissing)


def test_a_process_is_tied_to_its_processors(tmp_path: Path) -> None:
    core = max(os.sched_getaffinity(0))
    code = "import os; print(sorted(os.sched_getaffinity(0)), flush=True)"
    mine = os.sched_getaffinity(0)
    with running_process([sys.executable, "-c", code], tmp_path / "log", cores=(core,)) as process:
        process.wait()
    assert json.loads((tmp_path / "log").read_text()) == [core] and os.sched_getaffinity(0) == mine


def test_a_trainer_that_ends_is_noticed(tmp_path: Path) -> None:
    with running_process([sys.executable, FAKE, "fail"], tmp_path / "log") as process:
        trainer = PeftTrainer(ProcessGroup(process.pid), tmp_path / "out", tmp_path / "log")
        process.wait()
        with pytest.raises(RuntimeError, match=r"peft has ended: ValueError: no such card"):
            trainer.start()


def test_progress_is_read_once_and_by_whole_lines(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text('{"time_s": 1.5, "tokens": 10}\n{"time_s": 2')
    trainer = PeftTrainer(ProcessGroup(os.getpid()), output, tmp_path / "log")
    assert trainer.poll() == [(1.5, 10)]
    with output.open("a") as file:
        file.write('.5, "tokens": 30}\n')
    assert trainer.poll() == [(2.5, 30)] and trainer.poll() == []
