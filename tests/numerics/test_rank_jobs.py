"""`coserve finetune` on several processes: the same job as on one, whatever happens to a rank.

The model is a tiny llama with 4 query and 2 key-value heads, in float64, so that sums in another order make no difference that
a test must allow for. Processes are real, and gloo connects them.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coserve.config.settings import BottleneckConfig, FinetuneConfig, IA3Config, LoraConfig, OptimizerConfig
from coserve.core import ConfigError, InvalidRequest, RankFailed
from coserve.finetune.job import JobEvent
from coserve.planning.budget import shape_adapter
from coserve.runtime import ranks as ranks_module
from coserve.runtime.loaded import find_model
from coserve.runtime.ranks import require_devices
from coserve.training.finetuning import FinetuneResult, finetune, planned_bytes
from coserve.training.request import JobRequest
from tests.tiny_directory import build_job_inputs, chat_lines, write_lines

SFT = FinetuneConfig(
    lora=LoraConfig(r=4, target_modules="all-linear"), optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=1),
    batch_size=3, max_steps=6, max_microbatch_tokens=120, window_tokens=32, checkpoint_steps=2, seed=4,
)
JOBS = {
    "lora with dropout": replace(SFT, lora=LoraConfig(r=4, target_modules="all-linear", dropout=0.1)),
    "dora": replace(SFT, lora=LoraConfig(r=4, target_modules="all-linear", use_dora=True)),
    "ia3": replace(SFT, lora=None).with_adapter(IA3Config()),
    "bottleneck": replace(SFT, lora=None).with_adapter(BottleneckConfig(size=8)),
    "dpo": replace(SFT, objective="dpo", max_microbatch_tokens=300),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_job_inputs(tmp_path_factory.mktemp("ranks"))


def run(directory: Path, output: Path, config: FinetuneConfig, size: int, **more: object) -> FinetuneResult:
    """One job of `size` ranks."""
    return finetune(
        directory / f"{config.objective}.jsonl", output, model=str(directory / "model"), config=config, device="cpu",
        dtype="float64", tensor_parallel_size=size, **more,  # type: ignore[arg-type]
    )


def require_same(found: FinetuneResult, wanted: FinetuneResult, tolerance: float = 1e-6) -> None:
    """Asserts that two jobs lost the same at every step, and that their files hold the same adapter."""
    assert [row.step for row in found.rows] == [row.step for row in wanted.rows]
    for own, other in zip(found.rows, wanted.rows, strict=True):
        assert own.train_loss == pytest.approx(other.train_loss, rel=tolerance)
        assert own.grad_norm == pytest.approx(other.grad_norm, rel=tolerance)
        assert own.valid_loss == (None if other.valid_loss is None else pytest.approx(other.valid_loss, rel=tolerance))
    tensors, others = (load_file(each.directory / "adapter_model.safetensors") for each in (found, wanted))
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, others[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.full
@pytest.mark.parametrize("kind", JOBS)
def test_a_job_on_two_ranks_is_the_job_on_one(directory: Path, tmp_path: Path, kind: str) -> None:
    config, validation = JOBS[kind], directory / "valid.jsonl" if JOBS[kind].objective == "sft" else None
    one = run(directory, tmp_path / "one", config, 1, validation=validation)
    require_same(run(directory, tmp_path / "two", config, 2, validation=validation), one)


@pytest.mark.full
def test_a_job_goes_on_with_another_number_of_ranks(directory: Path, tmp_path: Path) -> None:
    """Checkpoints and adapters don't depend on it."""
    whole = run(directory, tmp_path / "whole", SFT, 1)

    class Stop(RuntimeError):
        pass

    def stop_after(step: int) -> object:
        def listen(event: JobEvent) -> None:
            if event.checkpoint_step == step:
                raise Stop

        return listen

    mixed = tmp_path / "mixed"
    with pytest.raises(Stop):
        run(directory, mixed, SFT, 2, listen=stop_after(2))
    with pytest.raises(Stop):
        run(directory, mixed, SFT, 1, resume=True, listen=stop_after(4))
    require_same(run(directory, mixed, SFT, 2, resume=True), whole)


@pytest.mark.full
def test_an_adapter_of_one_rank_is_continued_on_two(directory: Path, tmp_path: Path) -> None:
    config = JOBS["dora"]
    first = run(directory, tmp_path / "first", config, 1)
    config = replace(config, lora=None)
    one = run(directory, tmp_path / "one", config, 1, start=first.directory)
    require_same(run(directory, tmp_path / "two", config, 2, start=first.directory), one)


def remembered(monkeypatch: pytest.MonkeyPatch) -> list[ranks_module.RankProcess]:
    """The processes of ranks, as they are started from now on."""
    started: list[ranks_module.RankProcess] = []
    make = ranks_module.RankProcess.__init__

    def remember(self: ranks_module.RankProcess, *arguments: object) -> None:
        make(self, *arguments)  # type: ignore[arg-type]
        started.append(self)

    monkeypatch.setattr(ranks_module.RankProcess, "__init__", remember)
    return started


@pytest.mark.full
def test_a_rank_that_is_killed_ends_the_job_with_its_name_and_a_resume_goes_on(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = remembered(monkeypatch)

    def kill(event: JobEvent) -> None:
        if event.checkpoint_step == 2:
            os.kill(started[-1].pid, signal.SIGKILL)

    with pytest.raises(RankFailed, match=r"rank 1 ended by signal 9"):
        run(directory, tmp_path / "killed", SFT, 2, listen=kill)
    assert all(not process.alive for process in started), "no process is left behind"
    assert not torch.distributed.is_initialized()
    require_same(run(directory, tmp_path / "killed", SFT, 2, resume=True), run(directory, tmp_path / "whole", SFT, 1))


@pytest.mark.full
def test_of_several_ranks_the_one_that_was_killed_is_named(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end too, since their collectives fail."""
    started = remembered(monkeypatch)

    def kill(event: JobEvent) -> None:
        if event.checkpoint_step == 2:
            os.kill(started[1].pid, signal.SIGKILL)

    with pytest.raises(RankFailed, match=r"rank 2 ended by signal 9"):
        run(directory, tmp_path / "killed", SFT, 4, listen=kill)
    assert all(not process.alive for process in started)


@pytest.mark.full
def test_a_rank_that_hangs_ends_the_job(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks_module, "UNIT_S", 3.0)
    started = remembered(monkeypatch)

    def stop(event: JobEvent) -> None:
        if event.checkpoint_step == 2:
            os.kill(started[-1].pid, signal.SIGSTOP)

    with pytest.raises(RankFailed, match="a rank has not answered for 3 s"):
        run(directory, tmp_path / "stopped", SFT, 2, listen=stop)
    assert all(not process.alive for process in started)


@pytest.mark.parametrize(("size", "message"), [
    (0, "tensor_parallel_size: must be at least 1, got 0"),
    (3, "tensor_parallel_size: 3 ranks can't share 4 heads, 2 key-value heads and an MLP of 48; possible are 1, 2, 4"),
])
def test_a_number_of_ranks_that_cannot_be_is_refused_before_anything_is_written(
    directory: Path, tmp_path: Path, size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        run(directory, tmp_path / "job", SFT, size)
    assert str(error.value) == message
    assert not (tmp_path / "job").exists()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="tensor_parallel_size: 2 ranks need 2 CUDA devices, and there are 1"):
        require_devices(2, torch.device("cuda"))


@pytest.mark.full
def test_an_adapter_lies_where_it_is_told_to_and_a_deterministic_job_stays_there(directory: Path, tmp_path: Path) -> None:
    config = replace(SFT, deterministic=True, max_steps=2)
    told = "q_proj.lora_A=out,q_proj.lora_B=whole"
    found = run(directory, tmp_path / "told", config, 2, adapter_sharding=told)
    require_same(found, run(directory, tmp_path / "one", config, 1))
    assert told in json.loads((tmp_path / "told" / "job.json").read_text())["adapter_sharding"]
    with pytest.raises(InvalidRequest, match="adapter_sharding has changed") as error:
        run(directory, tmp_path / "told", config, 2, resume=True)
    assert error.value.param == "adapter_sharding"


def test_what_a_checkpoint_gathers_is_planned(directory: Path, tmp_path: Path) -> None:
    base = find_model(str(directory / "model"), device="cpu", dtype="float32")
    request = JobRequest.of(
        directory / "sft.jsonl", tmp_path / "job", SFT, validation=None, start=None, resume=False, listen=lambda event: None
    )
    alone, shared = (
        planned_bytes(job, base, job.plans.fastest().plan, one_copy=False)
        for job in (request.resolve(base, size=size) for size in (1, 2))
    )
    whole = 3 * 4 * shape_adapter(base.architecture, SFT.adapter).flat.numel()
    assert {name: shared[name] for name in shared.keys() - alone.keys()} == {
        "whole state of the optimizer, for a checkpoint": whole
    }


@pytest.mark.full
def test_smollm2_on_three_ranks(tmp_path: Path) -> None:
    """9 query and 3 key-value heads: 3 is the only number of ranks beside 1."""
    write_lines(tmp_path / "sft.jsonl", chat_lines(6))
    config = replace(SFT, max_steps=3, checkpoint_steps=100)
    data = tmp_path / "sft.jsonl"
    one, three = (
        finetune(data, tmp_path / str(size), config=config, device="cpu", dtype="float32", tensor_parallel_size=size)
        for size in (1, 3)
    )
    for own, other in zip(three.rows, one.rows, strict=True):
        assert own.train_loss == pytest.approx(other.train_loss, rel=1e-4)
