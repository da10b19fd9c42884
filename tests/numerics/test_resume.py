"""An interrupted and resumed job ends where an uninterrupted one does: to the last bit with `deterministic`.

In process a listener raises at random events; in the full set a real process is killed at random moments. What must agree:
metrics.csv but for seconds, and the bytes of the adapter.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from coserve.config.data import to_dict
from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.core import InvalidRequest
from coserve.finetune import job as job_module
from coserve.finetune.job import Job, JobEvent, Verb
from coserve.kernels import native
from coserve.kernels.processor import Bfloat16Products
from coserve.runtime import loaded as model_module
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.training import finetuning as finetuning_module
from coserve.training.finetuning import finetune
from tests.outcome import result
from tests.tiny_directory import build_job_inputs

ROOT = Path(__file__).parents[2]
SFT = FinetuneConfig(
    lora=LoraConfig(r=4), optimizer=OptimizerConfig(learning_rate=0.01, schedule="cosine", warmup_steps=2),
    batch_size=3, max_steps=13, max_microbatch_tokens=120, window_tokens=32, checkpoint_steps=2, keep_checkpoints=2, seed=4,
    deterministic=True,
)
DROPOUT = replace(SFT, lora=LoraConfig(r=4, dropout=0.2, target_modules=("q_proj", "up_proj")))
DPO = replace(SFT, objective="dpo", max_microbatch_tokens=300, max_steps=9)


class Crash(RuntimeError):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_job_inputs(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(str(directory / "model"), device="cpu", dtype="float32")


def run_with_crashes(
    model: LoadedModel, data: Path, output: Path, config: FinetuneConfig, rng: Random, *, validation: Path | None = None,
    chance: float = 0.15,
) -> list[list[int]]:
    """Resumes until the job is done, raising at random events. Returns each run's steps."""
    runs: list[list[int]] = []

    def listen(event: JobEvent) -> None:
        if event.row is not None:
            runs[-1].append(event.row.step)
        if rng.random() < chance:
            raise Crash

    while True:
        runs.append([])
        try:
            finetune(
                data, output, model=model, config=config, validation=validation, listen=listen,
                resume=(output / "job.json").exists(),
            )
        except Crash:
            assert len(runs) < 200
            continue
        assert len(runs) > 2, "it crashed at least twice"
        return runs


@pytest.mark.parametrize(("seed", "config"), [(1, SFT), (2, SFT), (4, DROPOUT)])
def test_a_deterministic_job_ends_bit_identical(
    tmp_path: Path, directory: Path, model: LoadedModel, seed: int, config: FinetuneConfig
) -> None:
    data, valid = directory / "sft.jsonl", directory / "valid.jsonl"
    finetune(data, tmp_path / "whole", model=model, config=config, validation=valid)
    runs = run_with_crashes(model, data, tmp_path / "broken", config, Random(seed), validation=valid)
    assert {step for steps in runs for step in steps} == set(range(1, 14))
    assert sum(len(steps) for steps in runs) > 13, "some steps were run again"
    assert result(tmp_path / "broken") == result(tmp_path / "whole")


def test_masters_and_working_weights_agree_after_a_resume(tmp_path: Path, directory: Path) -> None:
    """bfloat16: the checkpoint holds float32 masters, from which the working weights come back."""
    model = load_model(str(directory / "model"), device="cpu", dtype="bfloat16")
    finetune(directory / "sft.jsonl", tmp_path / "whole", model=model, config=SFT)
    run_with_crashes(model, directory / "sft.jsonl", tmp_path / "broken", SFT, Random(2))
    assert result(tmp_path / "broken") == result(tmp_path / "whole")


def test_dpo_ends_bit_identical(tmp_path: Path, directory: Path, model: LoadedModel) -> None:
    data = directory / "dpo.jsonl"
    finetune(data, tmp_path / "whole", model=model, config=DPO)
    run_with_crashes(model, data, tmp_path / "broken", DPO, Random(1))
    assert result(tmp_path / "broken") == result(tmp_path / "whole")


def test_dpo_from_an_adapter_keeps_its_reference(tmp_path: Path, directory: Path, model: LoadedModel) -> None:
    """The reference is the adapter the job started from, not the one it resumes with: losses agree to rounding."""
    start = finetune(directory / "sft.jsonl", tmp_path / "start", model=model, config=replace(SFT, max_steps=3)).directory
    data, config = directory / "dpo.jsonl", replace(DPO, max_steps=6)
    finetune(data, tmp_path / "whole", model=model, config=config, start=start)

    def crash(event: JobEvent) -> None:
        if event.row is not None and event.row.step == 5:
            raise Crash

    with pytest.raises(Crash):
        finetune(data, tmp_path / "broken", model=model, config=config, start=start, listen=crash)
    finetune(data, tmp_path / "broken", model=model, config=config, start=start, resume=True)
    whole, broken = (result(tmp_path / name)[0] for name in ("whole", "broken"))
    assert [row.train_loss for row in broken] == pytest.approx([row.train_loss for row in whole], rel=1e-4)
    assert abs(whole[-1].train_loss - math.log(2)) > 0.01, "a reference that moved along would give log 2"


def test_without_deterministic_the_schedule_is_exact_and_losses_agree(
    tmp_path: Path, directory: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SFT, deterministic=False)
    orders: dict[str, dict[int, list[int]]] = {"whole": {}, "broken": {}}
    original = Job._step

    def step(self: Job) -> Generator[Verb, Any, None]:
        number = self.cursor.step
        seen = orders[self.directory.name].setdefault(number, self.order.indices(number))
        assert seen == self.order.indices(number)
        yield from original(self)

    monkeypatch.setattr(job_module.Job, "_step", step)
    finetune(directory / "sft.jsonl", tmp_path / "whole", model=model, config=config)
    run_with_crashes(model, directory / "sft.jsonl", tmp_path / "broken", config, Random(3))
    assert orders["broken"] == orders["whole"]
    whole, broken = (result(tmp_path / name)[0] for name in ("whole", "broken"))
    for name in ("step", "tokens", "learning_rate"):
        assert [getattr(row, name) for row in broken] == [getattr(row, name) for row in whole]
    for name in ("train_loss", "grad_norm"):
        assert [getattr(row, name) for row in broken] == pytest.approx([getattr(row, name) for row in whole], rel=1e-5)


def test_the_comparison_would_see_a_lost_moment(
    tmp_path: Path, directory: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutation: a resume that changes one of Adam's moments a little must not pass for the whole run."""
    original = job_module.load_optimizer

    def forgetful(path: Path) -> dict[str, Tensor]:
        state = original(path)
        state["exp_avg_sq"].mul_(0.999)
        return state

    data = directory / "sft.jsonl"
    finetune(data, tmp_path / "whole", model=model, config=SFT)
    monkeypatch.setattr(job_module, "load_optimizer", forgetful)
    run_with_crashes(model, data, tmp_path / "broken", SFT, Random(1))
    assert result(tmp_path / "broken") != result(tmp_path / "whole")


CHILD = """
import json, sys, time
from pathlib import Path
from coserve.config.data import finetune_config_from_dict
from coserve.training.finetuning import finetune

model, data, output, config = sys.argv[1:]

def listen(event):
    print("training", flush=True)
    time.sleep(0.1)

output = Path(output)
finetune(data, output, model=model, config=finetune_config_from_dict(json.loads(config)), device="cpu", dtype="float32",
         resume=(output / "job.json").exists(), listen=listen)
print("done", flush=True)
"""


def run_and_kill(directory: Path, output: Path, config: FinetuneConfig, after: float | None) -> bool:
    """One process, killed `after` seconds after it has begun to train. Returns whether it finished."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    arguments = [str(directory / "model"), str(directory / "sft.jsonl"), str(output), json.dumps(to_dict(config))]
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n", process.communicate(timeout=60)
    if after is not None:
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGKILL), errors
    assert (process.returncode == 0) == shown.endswith("done\n")
    return process.returncode == 0


@pytest.mark.full
def test_a_killed_process_resumes_bit_identical(tmp_path: Path, directory: Path) -> None:
    config = replace(SFT, max_steps=40, checkpoint_steps=3)
    assert run_and_kill(directory, tmp_path / "whole", config, None)
    rng, kills = Random(20), 0
    while not run_and_kill(directory, tmp_path / "broken", config, rng.uniform(0.1, 0.9) if kills < 6 else None):
        kills += 1
    assert kills >= 4
    rows, adapter = result(tmp_path / "broken")
    assert [row.step for row in rows] == list(range(1, 41))
    whole, expected = result(tmp_path / "whole")
    assert [repr(row) for row in rows] == [repr(row) for row in whole]
    assert adapter == expected
    names = {path.name for path in (tmp_path / "broken").rglob("*") if "tmp" in path.name}
    assert not names, f"killed writes left {names}"


def stopped_after_a_step(data: Path, output: Path, config: FinetuneConfig, **options: Any) -> None:
    """A job that dies at its second row: its first checkpoint is written."""

    def listen(event: JobEvent) -> None:
        if event.row is not None and event.row.step == 2:
            raise Crash

    with pytest.raises(Crash):
        finetune(data, output, config=replace(config, checkpoint_steps=1, max_steps=4), listen=listen, **options)


@pytest.mark.parametrize("named", [False, True])
def test_auto_is_the_dtype_that_the_job_began_in(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Whatever the processor multiplies when it is resumed, and also for jobs that don't say it: they are float32's."""
    data, output, base = directory / "sft.jsonl", tmp_path / "out", str(directory / "model")
    stopped_after_a_step(data, output, SFT, model=base, dtype="float32")
    record = json.loads((output / "job.json").read_text())
    assert record.pop("dtype") == "float32"
    if not named:
        (output / "job.json").write_text(json.dumps(record))
    monkeypatch.setattr(model_module, "bfloat16_products", lambda: Bfloat16Products(True, "this one does"))
    monkeypatch.setattr(model_module, "bfloat16_speed", lambda: 2.0)
    config = replace(SFT, checkpoint_steps=1, max_steps=4)
    found = finetune(data, output, model=base, config=config, resume=True)
    assert found.model.weights.dtype == torch.float32
    fresh = finetune(data, tmp_path / "fresh", model=base, config=config)
    assert fresh.model.weights.dtype == torch.bfloat16
    assert json.loads((tmp_path / "fresh" / "job.json").read_text())["dtype"] == "bfloat16"


def test_a_deterministic_job_needs_weights_held_the_same_way(tmp_path: Path, directory: Path, model: LoadedModel) -> None:
    """Its bits depend on the dtype, and on how often weights are held."""
    data, output = directory / "sft.jsonl", tmp_path / "out"
    stopped_after_a_step(data, output, SFT, model=model)
    assert json.loads((output / "job.json").read_text())["weights_layout"] == f"float32 {model.weights.layout}"
    config = replace(SFT, checkpoint_steps=1, max_steps=4)
    other = load_model(str(directory / "model"), device="cpu", dtype="bfloat16")
    with pytest.raises(InvalidRequest, match="weights_layout has changed") as caught:
        finetune(data, output, model=other, config=config, resume=True)
    assert caught.value.param == "weights_layout"
    finetune(data, output, model=model, config=config, resume=True)


def test_a_deterministic_job_needs_the_same_kernels(
    tmp_path: Path, directory: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled kernels and the library's calls differ in their last bits."""
    data, output = directory / "sft.jsonl", tmp_path / "out"
    config = replace(SFT, checkpoint_steps=1, max_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(native, "compiled_kernels", lambda: native.Compiled({}, "off"))
        stopped_after_a_step(data, output, SFT, model=model)
        assert json.loads((output / "job.json").read_text())["kernels"] is None
    monkeypatch.setattr(finetuning_module, "kernels_identity", lambda weight: "rows-1")
    with pytest.raises(InvalidRequest, match="kernels has changed"):
        finetune(data, output, model=model, config=config, resume=True)
    monkeypatch.setattr(finetuning_module, "kernels_identity", lambda weight: None)
    finetune(data, output, model=model, config=config, resume=True)
