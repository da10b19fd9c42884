"""A deterministic job in an engine gives the same bits whatever runs beside it, and after an engine that stopped in the middle.

What must agree: metrics.csv but for seconds, and the bytes of the adapter. `coserve.finetune` has the same grid and agrees.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from coserve.config.settings import (
    GRID_TOKENS,
    FinetuneConfig,
    LoraConfig,
    OptimizerConfig,
    SamplingConfig,
    SchedulerConfig,
)
from coserve.core import CapacityError, ConfigError, StepPlan
from coserve.engine.engine import Engine
from coserve.finetune.optimizer import FlatAdamW
from coserve.grammar import json_object
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.scheduler.units import LEAST_SLICE
from coserve.training.finetuning import finetune
from tests.outcome import result
from tests.tiny_directory import build_tiny_directory, chat_lines, preference_lines, write_lines
from tests.tiny_engine import MakeEngine, PlanLog, build_model, drive, prompt, tracked_engines

SFT = FinetuneConfig(
    lora=LoraConfig(r=4, dropout=0.1), optimizer=OptimizerConfig(learning_rate=0.01, schedule="cosine", warmup_steps=2),
    batch_size=5, max_steps=6, max_microbatch_tokens=300, window_tokens=48, checkpoint_steps=2, seed=4, deterministic=True,
)
DPO = replace(SFT, objective="dpo", max_microbatch_tokens=400)
GREEDY = SamplingConfig(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deterministic")
    write_lines(root / "sft.jsonl", chat_lines(14))
    write_lines(root / "dpo.jsonl", preference_lines(10))
    write_lines(root / "valid.jsonl", chat_lines(3))
    return root


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return build_model(directory / "model")


def run_beside(engine: Engine, seed: int, steps: int | None = None) -> list[StepPlan]:
    """Random requests come and go until the engine's job has ended, or for so many steps. The plans that ran."""
    rng, log = Random(seed), PlanLog(engine)
    while not engine.idle and (steps is None or len(log.plans) < steps):
        if engine.jobs.jobs and rng.random() < 0.3 and len(engine.requests.live) < 6:
            grammar = rng.choice([None, json_object()])
            engine.submit(prompt(rng.randrange(1, 60)), replace(GREEDY, max_tokens=rng.randrange(1, 20), grammar=grammar))
        engine.step()
    return log.plans


def start(engine: Engine, directory: Path, output: Path, config: FinetuneConfig, *, resume: bool = False) -> None:
    valid = directory / "valid.jsonl" if config.objective == "sft" else None
    engine.finetune(directory / f"{config.objective}.jsonl", output, config, validation=valid, resume=resume)


@pytest.mark.parametrize("config", [SFT, DPO], ids=["sft", "dpo"])
def test_losses_are_the_same_bits_whatever_runs_beside_the_job(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, config: FinetuneConfig
) -> None:
    valid = directory / "valid.jsonl" if config.objective == "sft" else None
    finetune(directory / f"{config.objective}.jsonl", tmp_path / "blocking", model=model, config=config, validation=valid)
    engine = engines()
    start(engine, directory, tmp_path / "alone", config)
    drive(engine)
    shapes = set()
    for seed, quantum, blocks in ((1, 250.0, 4096), (2, 2.0, 900)):
        engine = engines(num_blocks=blocks, scheduler=SchedulerConfig(tpot_ms=6, ttft_ms=3000, preemption_quantum_ms=quantum))
        start(engine, directory, tmp_path / f"busy{seed}", config)
        plans = run_beside(engine, seed)
        assert any(plan.spans and plan.units for plan in plans) and not any(plan.fused for plan in plans)
        shapes |= {work.unit.layer_end - work.unit.layer_start for plan in plans for work in plan.units}
        drive(engine)
    assert len(shapes) > 1, "layer ranges follow the load"
    expected = result(tmp_path / "alone")
    assert len(expected[0]) == 6
    for name in ("busy1", "busy2", "blocking"):
        assert result(tmp_path / name) == expected, name
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("config", [SFT, DPO], ids=["sft", "dpo"])
def test_a_job_resumes_in_another_engine_with_the_same_bits(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, config: FinetuneConfig
) -> None:
    whole, rng = engines(), Random(3)
    start(whole, directory, tmp_path / "whole", config)
    run_beside(whole, 7)
    drive(whole)
    output, stops = tmp_path / "broken", 0
    while not (output / "adapter_model.safetensors").exists():
        tpot_ms, quantum_ms = rng.choice([4, 20]), rng.choice([4, 60])
        engine = engines(scheduler=SchedulerConfig(tpot_ms=tpot_ms, ttft_ms=3000, preemption_quantum_ms=quantum_ms))
        start(engine, directory, output, config, resume=(output / "job.json").exists())
        run_beside(engine, stops, steps=6 + 6 * stops)
        engine.close()
        stops += 1
        assert stops < 40
    assert stops >= 3, "it was stopped twice"
    assert result(output) == result(tmp_path / "whole")


def test_in_bfloat16_too(directory: Path, tmp_path: Path) -> None:
    build_tiny_directory(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), device="cpu", dtype="bfloat16")
    for name, seed in (("one", 1), ("other", 2)):
        for engine_options in tracked_engines(model):
            engine = engine_options(scheduler=SchedulerConfig(tpot_ms=4 * seed, ttft_ms=3000, preemption_quantum_ms=5.0 * seed))
            start(engine, directory, tmp_path / name, SFT)
            run_beside(engine, seed)
            drive(engine)
    assert result(tmp_path / "one") == result(tmp_path / "other")


def test_without_deterministic_the_bits_follow_the_load(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    """Else the tests above would show nothing. Some loads cut windows alike, so several are tried."""
    config, found = replace(SFT, deterministic=False), []
    for seed, quantum in enumerate((250.0, 2.0, 250.0, 20.0, 250.0, 2.0, 60.0, 8.0)):
        engine = engines(scheduler=SchedulerConfig(tpot_ms=4, ttft_ms=3000, preemption_quantum_ms=quantum))
        start(engine, directory, tmp_path / str(seed), config)
        run_beside(engine, seed)
        drive(engine)
        found.append(result(tmp_path / str(seed)))
        if found[-1] != found[0]:
            return
    pytest.fail("eight loads gave the same bits")


def test_slices_of_the_optimizer_step_may_end_anywhere_on_their_grid() -> None:
    """The scheduler cuts a step at multiples of LEAST_SLICE, as there is time: no bit depends on where."""
    total, found = 3 * LEAST_SLICE + 11, []
    for cuts in ([], [1], [2], [1, 2], [1, 2, 3]):
        generator = torch.Generator().manual_seed(0)
        flat, grad = (torch.randn(total, generator=generator) for _ in range(2))
        optimizer = FlatAdamW(OptimizerConfig(weight_decay=0.1), flat, grad)
        for start_, end in zip([0, *cuts], [*cuts, None], strict=True):
            optimizer.update(start_ * LEAST_SLICE, total if end is None else end * LEAST_SLICE, 1e-3)
        found.append(flat)
    assert all(torch.equal(flat, found[0]) for flat in found)


def test_windows_over_the_engines_limit_are_refused(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine = engines(scheduler=SchedulerConfig(max_window_tokens=64))
    with pytest.raises(ConfigError, match=f"{GRID_TOKENS} tokens") as caught:
        start(engine, directory, tmp_path / "out", replace(SFT, window_tokens=1024))
    assert caught.value.param == "window_tokens" and not (tmp_path / "out").exists()


def test_out_of_memory_fails_a_deterministic_job(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(TrainExecutor, "run", never)
    engine = engines()
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", SFT)
    drive(engine)
    with pytest.raises(CapacityError, match="keeps the windows"):
        job.result()
