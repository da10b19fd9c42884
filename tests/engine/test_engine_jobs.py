"""Finetuning jobs beside requests: the same result as alone, memory given back, and failures that stay their own."""

from __future__ import annotations

import gc
import json
import re
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig, SchedulerConfig
from coserve.core import (
    CapacityError,
    ConfigError,
    CoserveError,
    Direction,
    InvalidRequest,
    JobFailed,
    NotFound,
    Unit,
    WorkUnit,
)
from coserve.engine.engine import Engine
from coserve.engine.jobhandle import JobHandle
from coserve.engine.jobtable import shape_of
from coserve.finetune import job as job_module
from coserve.finetune.checkpoints import read_manifest
from coserve.finetune.job import MetricsTable
from coserve.peft.gate import PassedAdapter, read_adapter
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.fused import FusedRows
from coserve.runtime.loaded import LoadedModel
from coserve.training import request
from coserve.training.finetuning import finetune
from tests.tiny_directory import chat_lines, preference_lines, write_lines
from tests.tiny_engine import (
    MakeEngine,
    PlanLog,
    assert_nothing_left,
    build_model,
    drive,
    make_engine,
    prompt,
)

SFT = FinetuneConfig(
    max_steps=6, batch_size=4, max_microbatch_tokens=512, checkpoint_steps=0, lora=LoraConfig(r=4, dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
)
DPO = replace(SFT, objective="dpo", lora=LoraConfig(r=8, target_modules=("q_proj", "down_proj")))
ENDLESS = replace(SFT, max_steps=100_000)
GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("jobs")
    write_lines(directory / "sft.jsonl", chat_lines(20))
    write_lines(directory / "dpo.jsonl", preference_lines(12))
    write_lines(directory / "valid.jsonl", chat_lines(26)[20:])
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return build_model(directory / "model")


def assert_same_result(directory: Path, reference: Path) -> None:
    """Weights to 1e-4, and the same rows but for their time: the units are other ones, so sums are in other orders."""
    found, wanted = (load_file(path / "adapter_model.safetensors") for path in (directory, reference))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).norm()) <= 1e-4 * float(tensor.norm()), name
    rows, expected = (MetricsTable(path / "metrics.csv").rows() for path in (directory, reference))
    for row, other in zip(rows, expected, strict=True):
        assert (row.step, row.tokens, row.learning_rate) == (other.step, other.tokens, other.learning_rate)
        assert row.train_mean_token_accuracy == pytest.approx(other.train_mean_token_accuracy)
        assert (row.train_loss, row.grad_norm) == pytest.approx((other.train_loss, other.grad_norm), rel=1e-4)
        assert (row.valid_loss is None) == (other.valid_loss is None)
        if other.valid_loss is not None:
            assert row.valid_loss == pytest.approx(other.valid_loss, rel=1e-4)


# --- units ---


def test_shapes_of_units_are_rounded_up_to_powers_of_two() -> None:
    assert shape_of(WorkUnit(1, Unit(Direction.BACKWARD, 3, 6, 0, 100))) == ("backward", 4, 128)
    assert shape_of(WorkUnit(1, Unit(Direction.FORWARD, 0, 4, 64, 65), fused=True)) == ("fused", 4, 1)


# --- the result ---


@pytest.mark.parametrize("config", [SFT, replace(SFT, max_microbatch_tokens=96), DPO], ids=["one", "several", "dpo"])
@pytest.mark.parametrize("busy", [False, True], ids=["alone", "beside requests"])
def test_a_job_ends_as_the_blocking_finetune(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, config: FinetuneConfig, busy: bool
) -> None:
    data, valid = directory / f"{config.objective}.jsonl", directory / "valid.jsonl" if config.objective == "sft" else None
    finetune(data, tmp_path / "reference", model=model, config=config, validation=valid)
    engine = engines()
    log = PlanLog(engine)
    job = engine.finetune(data, tmp_path / "job", config, validation=valid)
    while busy and not job.finished:
        if len(engine.requests.live) < 3:
            engine.submit(prompt(20), GREEDY)
        engine.step()
    drive(engine)
    assert job.status == "succeeded" and job.result() == tmp_path / "job"
    assert_same_result(tmp_path / "job", tmp_path / "reference")
    assert job.progress().step == job.progress().num_steps == 6
    if busy:
        assert any(plan.fused for plan in log.plans)


def test_a_continued_adapter_is_read_once_and_let_go(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are needed until the job's own adapter has their values, not while the job runs."""
    once = replace(SFT, max_steps=1)
    start = finetune(directory / "sft.jsonl", tmp_path / "first", model=model, config=once).directory
    read: list[Path] = []

    def reading(directory: Path, base: Any) -> PassedAdapter:
        read.append(directory)
        return read_adapter(directory, base)

    monkeypatch.setattr(request, "read_adapter", reading)
    engine = engines()
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "second", replace(once, lora=None), start=start)
    gc.collect()
    assert not any(isinstance(held, PassedAdapter) for held in gc.get_objects())
    drive(engine)
    finetune(directory / "sft.jsonl", tmp_path / "third", model=model, config=replace(once, lora=None), start=start)
    assert job.status == "succeeded" and read == [start, start]


def test_two_jobs_at_once_end_as_alone(engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    configs = {"sft": replace(SFT, max_microbatch_tokens=96), "dpo": DPO}
    engine = engines()
    for name, config in configs.items():
        finetune(directory / f"{name}.jsonl", tmp_path / f"{name}-alone", model=model, config=config)
        engine.finetune(directory / f"{name}.jsonl", tmp_path / name, config)
    drive(engine)
    for name in configs:
        assert_same_result(tmp_path / name, tmp_path / f"{name}-alone")
    assert engine.adapters.names == ("dpo", "sft") or engine.adapters.names == ("sft", "dpo")


def test_a_second_job_of_a_name_fails_though_both_were_prepared_before_one_began(
    engines: MakeEngine, directory: Path, tmp_path: Path
) -> None:
    """Both would publish under the name, and requests would get the one or the other."""
    engine = engines()
    first, second = (engine.finetune(directory / "sft.jsonl", tmp_path / place / "tuned", SFT) for place in ("a", "b"))
    drive(engine)
    assert (first.status, second.status) == ("succeeded", "failed")
    with pytest.raises(InvalidRequest, match="name: a job called 'tuned' is running; name another"):
        second.result()


def test_checkpoints_are_served_and_requests_keep_their_version(
    engines: MakeEngine, directory: Path, tmp_path: Path
) -> None:
    engine = engines()
    config = replace(SFT, checkpoint_steps=2, optimizer=OptimizerConfig(learning_rate=0.05))
    with pytest.raises(NotFound):
        engine.submit(prompt(9), GREEDY, adapter="tuned")
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", config, name="tuned")
    drive(engine, lambda: "tuned" in engine.adapters.names)
    assert job.step == 2
    early = engine.adapters.get("tuned")
    request = engine.submit(prompt(9), replace(GREEDY, max_tokens=200), adapter="tuned")
    engine.step()
    job_end = [engine.submit(prompt(5), GREEDY)]
    drive(engine, lambda: job.finished)
    drive(engine)
    assert job_end[0].finished
    late = engine.adapters.get("tuned")
    assert not torch.equal(early.flat, late.flat)
    for name, adapter in (("early", early), ("late", late)):
        engine.add_adapter(name, adapter)
    by = {
        name: engine.generate([prompt(9)], request.sampling, adapter=name)[0].token_ids for name in ("early", "late", "tuned")
    }
    assert request.token_ids == by["early"] != by["late"]
    assert by["tuned"] == by["late"]
    assert torch.equal(engine.model.load_adapter(tmp_path / "out").flat, late.flat)


def test_a_cancelled_job_leaves_whole_checkpoints_and_resumes(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path
) -> None:
    config = replace(SFT, checkpoint_steps=2)
    finetune(directory / "sft.jsonl", tmp_path / "reference", model=model, config=config)
    engine = engines()
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", config)
    drive(engine, lambda: (tmp_path / "out/checkpoints/step-00000002").exists())
    drive(engine, lambda: engine.blocks.num_arena > 0)
    job.cancel()
    drive(engine)
    assert job.status == "cancelled" and job.step < 6
    with pytest.raises(JobFailed, match="cancelled"):
        job.result()
    assert_nothing_left(engine)
    engine.close()
    whole = sorted((tmp_path / "out/checkpoints").iterdir())
    assert whole and all(read_manifest(path)["step"] == int(path.name[-8:]) for path in whole)
    other = engines()
    changed = replace(config, optimizer=OptimizerConfig(learning_rate=1e-4))
    with pytest.raises(InvalidRequest, match="learning_rate"):
        other.finetune(directory / "sft.jsonl", tmp_path / "out", changed, resume=True)
    again = other.finetune(directory / "sft.jsonl", tmp_path / "out", config, resume=True)
    assert again.step in (2, 4)
    drive(other)
    assert again.status == "succeeded"
    assert_same_result(tmp_path / "out", tmp_path / "reference")


def test_pausing_keeps_everything(engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    finetune(directory / "sft.jsonl", tmp_path / "reference", model=model, config=SFT)
    engine = engines(scheduler=SchedulerConfig(preemption_quantum_ms=3))
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", SFT)
    drive(engine, lambda: job.step == 2)
    job.pause()
    assert not engine.step() and job.status == job.progress().status == "paused"
    before = job.trained_tokens
    engine.generate([prompt(9)], GREEDY)
    assert job.trained_tokens == before and not engine.step()
    job.resume()
    drive(engine)
    assert job.status == "succeeded"
    assert_same_result(tmp_path / "out", tmp_path / "reference")
    job.pause()
    job.cancel()
    assert engine.idle and job.status == "succeeded"


# --- failures ---


def test_a_job_that_explodes_harms_nobody(engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    """Requests beside it get bit for bit what they get without it, and a second job goes on."""
    sampling = replace(GREEDY, temperature=0.8, logprobs=2)
    expected = engines().generate([prompt(n) for n in (5, 20, 40)], sampling)
    engine = engines()
    hot = replace(ENDLESS, optimizer=OptimizerConfig(learning_rate=1e9, schedule="constant"))
    bad = engine.finetune(directory / "sft.jsonl", tmp_path / "bad", hot)
    good = engine.finetune(directory / "sft.jsonl", tmp_path / "good", SFT)
    handles = []
    while not engine.idle:
        if not bad.finished or len(handles) < 6:
            handles += [engine.submit(prompt(n), sampling) for n in (5, 20, 40)]
        for _ in range(6):
            engine.step()
    assert bad.status == bad.progress().status == "failed"
    with pytest.raises(JobFailed, match="learning rate") as caught:
        bad.result()
    assert caught.value.param == "learning_rate" and bad.events[-1].level == "error"
    assert good.status == "succeeded"
    assert not (tmp_path / "bad/adapter_config.json").exists() and "bad" not in engine.adapters.names
    for number, handle in enumerate(handles):
        assert handle.token_ids == expected[number % 3].token_ids
        assert [entry.logprob for entry in handle.outputs[0].logprobs] == pytest.approx(
            [entry.logprob for entry in expected[number % 3].outputs[0].logprobs], abs=1e-5)
    finetune(directory / "sft.jsonl", tmp_path / "reference", model=model, config=SFT)
    assert_same_result(tmp_path / "good", tmp_path / "reference")


def raise_once(monkeypatch: pytest.MonkeyPatch, error: Exception, at: int, when: Any = lambda unit: True) -> SimpleNamespace:
    """The at-th unit that fits `when` raises, once it has run."""
    run, seen = TrainExecutor.run, SimpleNamespace(count=0, windows=[])

    def failing(self: TrainExecutor, state: Any, unit: Any, adapter: Any) -> None:
        run(self, state, unit, adapter)
        seen.windows.append(unit.end - unit.start)
        seen.count += when(unit)
        if seen.count == at and when(unit):
            raise error

    monkeypatch.setattr(TrainExecutor, "run", failing)
    return seen


@pytest.mark.parametrize("config", [SFT, replace(SFT, max_microbatch_tokens=96), DPO], ids=["one", "several", "dpo"])
@pytest.mark.parametrize("at", [1, 4])
def test_out_of_memory_starts_the_batch_again(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    config: FinetuneConfig, at: int,
) -> None:
    """Backward included: what it has added to the gradients is taken back."""
    data = directory / f"{config.objective}.jsonl"
    finetune(data, tmp_path / "reference", model=model, config=config)
    engine = engines(scheduler=SchedulerConfig(max_window_tokens=64))
    seen = raise_once(monkeypatch, torch.OutOfMemoryError("none left"), at, lambda unit: unit.direction.value == "backward")
    job = engine.finetune(data, tmp_path / "out", config)
    drive(engine)
    assert job.status == "succeeded" and seen.count > at
    assert any("out of memory" in event.message for event in job.events)
    assert max(seen.windows) > 32 >= max(seen.windows[-5:])
    assert_same_result(tmp_path / "out", tmp_path / "reference")
    seen.windows.clear()
    engine.finetune(data, tmp_path / "next", config)
    drive(engine)
    assert max(seen.windows) > 32, "the next job has large windows again"


def test_out_of_memory_for_good_fails_the_job(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(TrainExecutor, "run", never)
    engine = engines(scheduler=SchedulerConfig(max_window_tokens=128))
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", SFT)
    drive(engine)
    with pytest.raises(CapacityError, match="smallest window") as caught:
        job.result()
    assert caught.value.param == "max_microbatch_tokens"


def test_another_error_ends_only_its_job(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    expected = engine.generate([prompt(20)], GREEDY)[0].token_ids
    jobs = [engine.finetune(directory / "sft.jsonl", tmp_path / name, SFT) for name in ("first", "second")]
    drive(engine, lambda: jobs[0].step == 1)
    raise_once(monkeypatch, ZeroDivisionError("a bug"), 1)
    request = engine.submit(prompt(20), GREEDY)
    drive(engine)
    assert sorted(job.status for job in jobs) == ["failed", "succeeded"]
    failed = next(job for job in jobs if job.status == "failed")
    with pytest.raises(JobFailed, match="ZeroDivisionError: a bug"):
        failed.result()
    assert request.token_ids == expected


def test_a_fused_window_that_fails_leaves_its_pass_alone(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    expected = engine.generate([prompt(n) for n in (9, 20)], GREEDY)
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", ENDLESS)
    failed = []

    def failing(*arguments: Any) -> None:
        failed.append(job.step)
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(FusedRows, "leave", failing)
    handles = [engine.submit(prompt(n), GREEDY) for n in (9, 20)]
    drive(engine)
    assert len(failed) == 1
    assert job.status == "failed"
    assert [h.token_ids for h in handles] == [h.token_ids for h in expected]


def test_a_full_disk_fails_the_job(
    engines: MakeEngine, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(job_module, "save_checkpoint", full)
    engine = engines()
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", SFT)
    drive(engine)
    with pytest.raises(JobFailed, match="no space left"):
        job.result()


# --- memory ---


def test_a_job_with_little_room_runs_products_again(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path
) -> None:
    """Where the pool has no room for everything that could be kept, the plan is a smaller one, and the result the same."""
    data = directory / "sft.jsonl"
    config = replace(SFT, max_microbatch_tokens=200)
    finetune(data, tmp_path / "reference", model=model, config=config)
    for number, (blocks, asked) in enumerate([(100, "auto"), (4096, 450_000), (4096, "0.45MB"), (4096, 0.7)]):
        engine = engines(num_blocks=blocks)
        events: list[str] = []
        job = engine.finetune(
            data, tmp_path / f"job{number}", replace(config, activation_memory=asked),
            listen=lambda event, events=events: events.append(event.message),
        )
        (chosen,) = (line for line in events if "matrix products again" in line)
        share = float(re.search(r"runs ([\d.]+)% of", chosen)[1])
        assert 0 < share < 40
        drive(engine)
        assert job.status == "succeeded"
        assert_same_result(tmp_path / f"job{number}", tmp_path / "reference")


# --- what is refused ---


def refused(engine: Engine, output: Path, data: Path, config: FinetuneConfig, kind: type[CoserveError], **options: Any) -> str:
    """The field that the refusal names; nothing has been written."""
    with pytest.raises(kind) as caught:
        engine.finetune(data, output, config, **options)
    assert not output.exists() and engine.idle
    return caught.value.param or ""


def test_bad_jobs_are_refused_before_anything_is_written(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine, out, data = engines(max_lora_rank=16), tmp_path / "out", directory / "sft.jsonl"
    broken = write_lines(tmp_path / "broken.jsonl", [{"nothing": 1}])
    assert refused(engine, out, broken, SFT, InvalidRequest) == "training_file"
    assert refused(engine, out, data, SFT, InvalidRequest, validation=broken) == "validation_file"
    assert refused(engine, out, data, replace(SFT, lora=LoraConfig(r=32)), ConfigError) == "r"
    assert refused(engine, out, data, replace(SFT, lora=LoraConfig(target_modules=("x",))), ConfigError) == "target_modules"
    assert refused(engine, out, data, SFT, InvalidRequest, resume=True) == "output"
    with pytest.raises(NotFound):
        engine.finetune(tmp_path / "missing.jsonl", out, SFT)
    with pytest.raises(CoserveError):
        engine.finetune(data, out, SFT, start=tmp_path / "missing")
    assert not out.exists()


def test_a_job_that_the_pool_can_never_hold_is_refused(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine = engines(num_blocks=30)
    name = refused(engine, tmp_path / "out", directory / "sft.jsonl", SFT, CapacityError)
    assert name == "max_microbatch_tokens"
    tight = replace(SFT, activation_memory=1000)
    assert refused(engines(), tmp_path / "out", directory / "sft.jsonl", tight, CapacityError) == "activation_memory"
    steady = replace(SFT, deterministic=True)
    assert refused(engines(num_blocks=100), tmp_path / "out", directory / "sft.jsonl", steady, CapacityError) == name
    small = replace(SFT, max_microbatch_tokens=70, batch_size=1, max_steps=2)
    engine = engines(num_blocks=400)
    many = write_lines(tmp_path / "valid.jsonl", chat_lines(20))
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "out", small, validation=many)
    drive(engine)
    assert job.status == "succeeded"


# --- threads ---


def test_jobs_of_a_running_engine(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    events: list[str] = []
    with engines() as engine:
        jobs: dict[str, JobHandle] = {}

        def begin(name: str) -> None:
            jobs[name] = engine.finetune(directory / "sft.jsonl", tmp_path / name, SFT, listen=lambda e: events.append(e.level))

        threads = [threading.Thread(target=begin, args=(name,)) for name in ("a", "b", "c")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert jobs["a"].result(60) == tmp_path / "a"
        jobs["b"].result(60)
        jobs["c"].result(60)
        assert engine.generate([prompt(5)], GREEDY, adapter="c")[0].finish_reason == "length"
        last = engine.finetune(directory / "sft.jsonl", tmp_path / "last", ENDLESS)
        with pytest.raises(TimeoutError, match="running"):
            last.result(0.05)
    assert last.status == "cancelled" and "info" in events
    record = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert record["r"] == 4


def test_jobs_fail_with_the_engines_thread_and_stay_failed(
    model: LoadedModel, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    jobs = [engine.finetune(directory / "sft.jsonl", tmp_path / name, ENDLESS) for name in "ab"]
    drive(engine, lambda: engine.blocks.num_arena > 0)
    monkeypatch.setattr(engine.blocks, "release_arena", lambda *_: 1 / 0)  # what the end of a job needs is broken too
    monkeypatch.setattr(engine.runner, "run", lambda *_: 1 / 0)
    engine.start()
    assert engine.wait_failed(20)
    monkeypatch.undo()
    for job in jobs:
        with pytest.raises(CoserveError, match="ZeroDivisionError"):
            job.result(20)
    engine.close()
    assert [job.status for job in jobs] == ["failed", "failed"]


@pytest.mark.parametrize("config", [SFT, ENDLESS], ids=["ended", "cancelled"])
def test_closing_gives_a_jobs_memory_back_without_the_garbage_collector(
    model: LoadedModel, directory: Path, tmp_path: Path, config: FinetuneConfig
) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = make_engine(model)
        storage, whole = StorageWeakRef(engine.device.pool.buffer.untyped_storage()), weakref.ref(engine)
        handles = [engine.finetune(directory / "sft.jsonl", tmp_path / "out", config)]
        request = engine.submit(prompt(20), replace(GREEDY, max_tokens=200), adapter=None)
        drive(engine, lambda: handles[0].step >= 3)
        if config is SFT:
            drive(engine)
        engine.close()
        assert storage.expired() and handles[0].finished
        handles.clear()
        del engine, request
        assert whole() is None
    finally:
        gc.enable()
