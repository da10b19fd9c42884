"""Engines on tiny models for tests: a made-up latency model, so that nothing is measured, and a look at what is left over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from coserve.config.settings import EngineConfig, LoraConfig, SchedulerConfig
from coserve.core import StepPlan, StepResult
from coserve.engine.engine import Engine
from coserve.engine.step import Lookup
from coserve.peft.lora import LoraAdapter
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.scheduler.latency import LatencyModel
from tests.tiny_directory import build_tiny_directory

LATENCY = {
    ("iteration", "once", 0): 1e-3, ("inference", "once", 0): 1e-3, ("inference", "rows", 1): 2e-5,
    ("forward", "rows", 0): 1e-5, ("forward", "layers", 0): 1e-5, ("backward", "rows", 0): 2e-5,
    ("optimizer", "elements", 0): 1e-9,
}
BLOCK = 16
MakeEngine = Callable[..., Engine]


def build_model(directory: Path) -> LoadedModel:
    """A tiny Llama in float32 on the CPU, with a tokenizer of about 400 tokens; end of sequence is token 2."""
    torch.set_num_threads(1)
    return load_model(str(build_tiny_directory(directory)), device="cpu", dtype="float32")


def make_engine(
    model: LoadedModel, *, num_blocks: int = 4096, share: float = 0.4, scheduler: SchedulerConfig | None = None,
    **options: object,
) -> Engine:
    """An engine whose pool has `num_blocks` blocks of 16 tokens. options: of EngineConfig."""
    arch = model.weights.architecture
    size = arch.num_layers * 2 * arch.num_kv_heads * BLOCK * arch.head_dim * model.weights.dtype.itemsize
    scheduler = scheduler or SchedulerConfig(tpot_ms=20, ttft_ms=3000)
    config = EngineConfig(
        memory_bytes=num_blocks * size, inference_share=share, scheduler=scheduler, **options  # type: ignore[arg-type]
    )
    return Engine(model, config, latency=LatencyModel(dict(LATENCY)))


def assert_nothing_left(engine: Engine) -> None:
    """An idle engine holds no block, arena, adapter or micro-batch for anyone."""
    engine.blocks.check_integrity()
    assert engine.blocks.num_used == 0
    assert engine.blocks.num_arena == 0
    assert not any(held.users for held in engine.adapters._held.values())
    assert engine.adapters.num_versions == len(engine.adapters.names)
    assert not engine.jobs.microbatches and not engine.jobs.owners
    assert not engine.scheduler.requests and not engine.scheduler.jobs
    assert not engine.requests.live and not engine.jobs.jobs


def tracked_engines(model: LoadedModel) -> Iterator[MakeEngine]:
    """For a fixture: gives `make_engine` for a model; afterwards every engine is looked at, closed, and looked at again."""
    engines: list[Engine] = []

    def make(**options: object) -> Engine:
        engines.append(make_engine(model, **options))  # type: ignore[arg-type]
        return engines[-1]

    yield make
    for engine in engines:
        if engine.idle:
            assert_nothing_left(engine)
        engine.close()
        assert_nothing_left(engine)


def drive(engine: Engine, until: Callable[[], bool] | None = None, *, seconds: float = 60.0) -> None:
    """Steps until the condition holds; default: until the engine is idle."""
    until = until or (lambda: engine.idle)
    limit = time.monotonic() + seconds
    while not until():
        if not engine.step():
            time.sleep(1e-3)  # files are being written
        engine.blocks.check_integrity()
        assert time.monotonic() < limit, f"stuck: {engine.metrics()}"


class PlanLog:
    """Notes every plan that an engine runs."""

    def __init__(self, engine: Engine) -> None:
        self.plans: list[StepPlan] = []
        self._runner, engine.runner = engine.runner, self

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        self.plans.append(plan)
        return self._runner.run(plan, lookup)


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids without the end of sequence."""
    return torch.randint(3, 390, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def random_adapter(model: LoadedModel, rank: int, *, seed: int = 0, scale: float = 0.2) -> LoraAdapter:
    """An adapter that changes what the model says."""
    config = LoraConfig(r=rank, alpha=2 * rank)
    adapter = LoraAdapter.create(model.architecture, config, dtype=torch.float32, device=torch.device("cpu"), seed=seed)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(seed)) * scale)
    return adapter
