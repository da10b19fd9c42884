"""An engine whose model several processes share, when one of them dies or fails: it ends with a clear error, and jobs
go on from their checkpoints. Models and processes as in test_rank_engine.py."""

from __future__ import annotations

import os
import pickle
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from coserve.core import CoserveError, RankFailed
from coserve.finetune.job import JobEvent
from coserve.runtime import ranks as ranks_module
from coserve.runtime.loaded import LoadedModel
from coserve.training.finetuning import finetune
from tests.numerics.test_rank_engine import GREEDY, JOBS, assert_job_alike
from tests.numerics.test_rank_engine import load as load_on
from tests.tiny_directory import build_job_inputs
from tests.tiny_engine import drive, make_engine, prompt

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
JOB = JOBS["lora"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_job_inputs(tmp_path_factory.mktemp("deaths"))


def load(directory: Path) -> LoadedModel:
    return load_on(directory, 2)


@pytest.mark.full
def test_a_rank_that_is_killed_ends_the_engine_and_jobs_go_on_from_their_checkpoints(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    with closing(load(directory)) as model:
        processes = model.processes
        assert processes is not None
        with closing(make_engine(model).start()) as engine:
            requests = [engine.submit(prompt(30), replace(GREEDY, max_tokens=400, ignore_eos=True))]

            def kill(event: JobEvent) -> None:
                if event.checkpoint_step == 2:
                    requests.append(engine.submit(prompt(30), GREEDY))
                    os.kill(processes.pids[0], signal.SIGKILL)

            job = engine.finetune(directory / "sft.jsonl", output, JOB, listen=kill)
            assert engine.wait_failed(30)
            assert isinstance(engine.failure, RankFailed) and "rank 1 ended by signal 9" in str(engine.failure)
            running, waiting = requests
            assert job.status == "failed" and waiting.error is not None
            assert running.error is not None or len(running.outputs[0].token_ids) == 400, "it failed, or was done before"
            with pytest.raises(CoserveError, match="rank 1 ended by signal 9"):
                engine.submit(prompt(3))
    with closing(load(directory)) as model, closing(make_engine(model)) as engine:
        handle = engine.finetune(directory / "sft.jsonl", output, JOB, resume=True)
        drive(engine)
        assert handle.status == "succeeded"
    model_name = str(directory / "model")
    finetune(directory / "sft.jsonl", tmp_path / "whole", model=model_name, device="cpu", dtype="float64", config=JOB)
    assert_job_alike(output, tmp_path / "whole")


@pytest.mark.full
def test_a_rank_that_dies_while_nothing_runs_is_noticed(directory: Path) -> None:
    with closing(load(directory)) as model:
        assert model.processes is not None
        with closing(make_engine(model).start()) as engine:
            os.kill(model.processes.pids[0], signal.SIGKILL)
            assert engine.wait_failed(10)
            assert "rank 1 ended by signal 9" in str(engine.failure)


@pytest.mark.full
def test_an_error_on_one_rank_ends_the_engine(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that would end only a job, were the model on one rank: the others may have gone on."""
    with closing(load(directory)) as model, closing(make_engine(model)) as engine:
        monkeypatch.setattr(engine.device.passes, "run", None)
        engine.submit(prompt(3), GREEDY)
        with pytest.raises(RankFailed, match="rank 0 failed: TypeError"):
            drive(engine)


@pytest.mark.full
def test_in_debug_mode_another_order_is_noticed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="coserve")
    with closing(load(directory)) as model, closing(make_engine(model)) as engine:
        send = ranks_module.RankProcess.send

        def send_another(self: ranks_module.RankProcess, data: bytes) -> None:
            send(self, pickle.dumps(pickle.loads(data)._replace(dropped=(99,))) if data else data)

        monkeypatch.setattr(ranks_module.RankProcess, "send", send_another)
        with pytest.raises(RankFailed, match="rank 0 and rank 1 differ in their orders up to _run_pass"):
            engine.generate([prompt(20)], GREEDY)
