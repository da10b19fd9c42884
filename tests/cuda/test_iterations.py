"""Whole engines on a device that computes nothing: what would fail on a GPU, or make the host wait in an iteration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch

from coserve.config.settings import (
    AdapterConfig,
    BottleneckConfig,
    EngineConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    SamplingConfig,
    SchedulerConfig,
)
from coserve.engine.engine import Engine
from coserve.engine.jobs import LiveJob
from coserve.engine.poolsize import pool_bytes
from coserve.peft.kinds import new_adapter
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.spans import NO_ADAPTER
from coserve.runtime.warmup import warm_up
from coserve.scheduler.latency import LatencyModel
from coserve.text.tokenizer import ChatTokenizer
from tests.cuda_iterations import adapters, fake_device, fake_model, spans
from tests.fake_cuda import CudaFault, FakeCuda, fake_cuda, needs_fake_cuda
from tests.tiny_directory import build_tiny_directory, chat_lines, write_lines
from tests.tiny_engine import LATENCY, drive

pytestmark = needs_fake_cuda

KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=8), "dora": LoraConfig(r=16, use_dora=True), "ia3": IA3Config(), "bottleneck": BottleneckConfig(),
}
FIELDS = {kind: {"lora" if kind == "dora" else kind: config} for kind, config in KINDS.items()}
"""How a job's settings name them."""
SAMPLINGS: dict[str, SamplingConfig] = {
    "greedy": SamplingConfig(temperature=0), "temperature": SamplingConfig(temperature=0.7),
    "top_k": SamplingConfig(top_k=5), "top_p": SamplingConfig(top_p=0.8), "min_p": SamplingConfig(min_p=0.1),
    "penalties": SamplingConfig(repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3),
    "bias": SamplingConfig(logit_bias={3: 2.0}), "min_tokens": SamplingConfig(min_tokens=2, stop_token_ids=(5,)),
    "logprobs": SamplingConfig(logprobs=3), "prompt_logprobs": SamplingConfig(prompt_logprobs=2),
    "n": SamplingConfig(n=2, seed=1), "grammar": SamplingConfig(temperature=0.7, grammar="start: <[*]>+"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(build_tiny_directory(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def make_engine(cuda: FakeCuda, tokenizer: ChatTokenizer, name: str = "Llama-3.1-8B") -> Engine:
    """An engine on a fake model. Jobs may read values between iterations; the runner may not."""
    model: LoadedModel = dataclasses.replace(fake_model(name), tokenizer=tokenizer)
    config = EngineConfig(
        memory_bytes=4 << 30, inference_share=0.2, max_adapters=16, cuda_graphs=False,
        scheduler=SchedulerConfig(tpot_ms=200, ttft_ms=3000),
    )
    engine = Engine(model, config, latency=LatencyModel(dict(LATENCY)))
    advance = engine.jobs.advance

    def reading(watcher: object) -> None:
        with cuda.host_may_read():
            advance(watcher)  # type: ignore[arg-type]

    engine.jobs.advance = reading  # type: ignore[method-assign,assignment]
    engine.jobs.writer.shutdown()
    engine.jobs.writer = HereAndNow(cuda)
    return engine


class HereAndNow(Executor):
    """Runs what another thread would run, since a fake device lives in one thread: writes, which may read values."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        with self.cuda.host_may_read():
            try:
                done.set_result(fn(*args, **kwargs))
            except Exception as error:
                done.set_exception(error)
        return done


def raise_error(job: object, error: Exception) -> None:
    raise error


def submit(engine: Engine, samplings: Sequence[SamplingConfig], adapters: Sequence[str | None] = (None,)) -> None:
    for number, sampling in enumerate(samplings):
        sampling = dataclasses.replace(sampling, max_tokens=4, ignore_eos=True)
        engine.submit(list(range(3, 40 + number)), sampling, adapter=adapters[number % len(adapters)])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling(cuda: FakeCuda, tokenizer: ChatTokenizer, sampling: str) -> None:
    engine = make_engine(cuda, tokenizer)
    submit(engine, [SAMPLINGS[sampling], SAMPLINGS["greedy"]])
    drive(engine)
    assert engine.metrics()["requests_finished"] == 2 + (sampling == "n") and cuda.syncs == 0


@pytest.mark.parametrize(("name", "kind"), [
    ("Llama-3.1-8B", "dora"),
    *(pytest.param(*case, marks=pytest.mark.full) for case in (
        ("Llama-3.1-8B", "lora"), ("Llama-3.1-8B", "ia3"), ("Llama-3.1-8B", "bottleneck"), ("Qwen2.5-14B", "dora"),
    )),
])
def test_a_job_beside_requests_of_all_adapters(
    cuda: FakeCuda, tokenizer: ChatTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    monkeypatch.setattr(LiveJob, "fail", raise_error)
    engine = make_engine(cuda, tokenizer, name)
    for number, config in enumerate(KINDS.values()):
        engine.add_adapter(f"adapter-{number}", new_adapter(engine.model.weights, config, seed=number))
    data = write_lines(tmp_path / "data.jsonl", chat_lines(4))
    config = FinetuneConfig(
        max_steps=1, batch_size=4, max_microbatch_tokens=64, checkpoint_steps=1,
        deterministic=kind == "lora", **FIELDS[kind],
    )
    with cuda.host_may_read():
        job = engine.finetune(data, tmp_path / "out", config)
    submit(engine, list(SAMPLINGS.values()), [None, *(f"adapter-{n}" for n in range(4))])
    drive(engine)
    assert job.status == "succeeded", job.error
    assert {shape["direction"] for shape in engine.metrics()["unit_shapes"]} >= {"forward", "backward"}


def seeded(fault: str) -> None:
    """What each check catches."""
    x = torch.empty(8, 8, dtype=torch.bfloat16, device="cuda")
    match fault:
        case "another device":
            torch.mm(x, torch.zeros(8, 8, dtype=torch.bfloat16))
        case "a read":
            float(x.sum())
        case "a list":
            x.sum(0).tolist()
        case "a copy":
            x.cpu()
        case "a condition":
            x[x > 0]
        case "an operator of the CPU":
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[x.view(1, 1, 8, 8)] * 3)
        case "float64":
            x.repeat(64, 64).double()
        case "another dtype":
            torch.mm(x, x.float())


@pytest.mark.parametrize("fault", [
    "another device", "a read", "a list", "a copy", "a condition", "an operator of the CPU", "float64", "another dtype",
])
def test_the_check_can_fail(cuda: FakeCuda, fault: str) -> None:
    with pytest.raises((CudaFault, RuntimeError, TypeError)):
        seeded(fault)


def test_a_decode_pass_is_one_launch_beside_its_inputs(cuda: FakeCuda) -> None:
    """With adapters too, once their sizes are captured; and what is captured never depends on what is served."""
    device = fake_device(fake_model("Llama-3.1-8B"), graphs=True)
    for kinds in ([], list(KINDS.values())):
        slots = adapters(device, kinds) or [NO_ADAPTER]
        with cuda.counting() as captured:
            while device.capture_next():
                pass
        assert bool(captured) == bool(kinds)
        for rows, context in ((1, 9), (5, 3000), (64, 640)):
            with cuda.counting() as found:
                device.run_pass([7] * rows, *spans(rows, slots=slots, context=context), None)
            assert found["a graph"] == 1 and found.total() <= 8, found


def test_kernels_are_started_before_requests_come(cuda: FakeCuda) -> None:
    """A kernel's first start compiles it."""
    device = fake_device(fake_model("Llama-3.1-8B"))
    with cuda.counting() as found:
        warm_up(device.passes)
    assert {"_split_kernel", "_combine_kernel", "_gather_kernel", "_peaks_kernel", "_pick_kernel", "_cut_kernel"} <= set(found)


def test_the_pools_size_is_what_iterations_leave(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest iterations run, and their peak is put aside, with a job's adapter and optimizer."""
    model, lines = fake_model("Llama-3.1-8B"), list[str]()
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 5 << 30)
    with cuda.counting() as found, cuda.host_may_read():
        size = pool_bytes(model, EngineConfig(), report=lines.append)
    assert size is not None and (44 << 30) < size < (50 << 30), "64 of 80 GiB are free, 72 may be taken, 5 are beside"
    assert found["_flash_attention_backward"] and found["_split_kernel"], "decode, prompts, windows of both directions"
    assert "GiB for the largest iterations" in lines[0]
    assert pool_bytes(model, EngineConfig(memory_bytes=1 << 30)) == 1 << 30
