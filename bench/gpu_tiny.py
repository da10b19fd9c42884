"""A tiny engine on the device against the CPU: the same tokens and gradients, graphs against eager passes, requests beside a
job, and a deterministic job that is stopped and goes on. In float32, so that equal means equal."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_clock import checked, device_of
from gpu_model import random_model
from gpu_rows import Item
from torch import Tensor

from coserve.config.settings import (
    EngineConfig,
    FinetuneConfig,
    LoraConfig,
    OptimizerConfig,
    SamplingConfig,
    SchedulerConfig,
)
from coserve.core import Example, Group
from coserve.engine.engine import Engine
from coserve.finetune.job import MetricsTable
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.latency import LatencyModel
from coserve.training.trainer import AdapterTrainer

CPU = torch.device("cpu")
STD = 0.15
"""Of the weights: larger than a real model's, so that a tiny one has clear favourites among its tokens."""
OUTPUT_TOKENS = 16
GREEDY = SamplingConfig(max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True)
DRAWN = SamplingConfig(max_tokens=OUTPUT_TOKENS, temperature=1.0, top_p=0.95, ignore_eos=True)
LEAST_EQUAL = 0.95
"""Share of drawn tokens that have to be the same: noise is keyed, but a draw between two tokens may hang on the last bit."""
LAW = {
    ("iteration", "once", 0): 1e-3, ("inference", "once", 0): 1e-3, ("inference", "rows", 1): 2e-5,
    ("forward", "rows", 0): 1e-5, ("forward", "layers", 0): 1e-5, ("backward", "rows", 0): 2e-5,
    ("optimizer", "elements", 0): 1e-9,
}
"""Made up, so that nothing is measured."""
JOB = FinetuneConfig(
    lora=LoraConfig(r=4, alpha=8, dropout=0.1), optimizer=OptimizerConfig(learning_rate=0.01), batch_size=4, max_steps=4,
    max_microbatch_tokens=300, window_tokens=48, checkpoint_steps=2, seed=4, deterministic=True,
)


def verdict(check: str, shown: str, good: bool) -> dict[str, Any]:
    """A row of a check."""
    return {"check": check, "shown": shown} | ({} if good else {"failed": f"{check}: {shown}"})


@dataclass(frozen=True, slots=True)
class Tiny:
    """The checks, on one device."""

    device: torch.device

    def model(self, device: torch.device, dtype: torch.dtype = torch.float32) -> LoadedModel:
        """The same weights anywhere; they are exact in bfloat16."""
        return random_model("tiny", device, dtype, std=STD, drawn_on=CPU)

    @staticmethod
    def prompts(count: int = 6) -> list[list[int]]:
        rng = np.random.default_rng(0)
        return [rng.integers(0, 512, length).tolist() for length in (1, 3, 16, 40, 130, 300)[:count]]

    @contextlib.contextmanager
    def engine(self, model: LoadedModel, *, graphs: bool = True, tpot_ms: float = 20.0) -> Iterator[Engine]:
        scheduler = SchedulerConfig(tpot_ms=tpot_ms, ttft_ms=3000)
        engine = Engine(
            model, EngineConfig(memory_bytes=32 << 20, scheduler=scheduler, cuda_graphs=graphs),
            latency=LatencyModel(dict(LAW)),
        )
        try:
            yield engine
        finally:
            engine.close()

    def tokens(self, device: torch.device, sampling: SamplingConfig, *, graphs: bool = True) -> list[list[int]]:
        with self.engine(self.model(device), graphs=graphs) as engine:
            return [handle.token_ids for handle in engine.generate(self.prompts(), sampling)]

    def tokens_equal_the_cpus(self) -> Iterator[dict[str, Any]]:
        """Greedy ones all; drawn ones but for a few."""
        for name, sampling, least in (("greedy", GREEDY, 1.0), ("drawn", DRAWN, LEAST_EQUAL)):
            share, shown = compare(self.tokens(self.device, sampling), self.tokens(CPU, sampling))
            yield verdict(f"{name} tokens as the CPU's", shown, share >= least)

    def graph_equals_eager(self) -> Iterator[dict[str, Any]]:
        """Passes that only decode, as CUDA graphs (on a device that has them) and launch by launch."""
        share, shown = compare(*(self.tokens(self.device, GREEDY, graphs=graphs) for graphs in (True, False)))
        yield verdict("graphs as eager", shown, share == 1)

    def gradients_equal_the_cpus(self) -> Iterator[dict[str, Any]]:
        """Of examples in several windows, against float64 on the CPU."""
        dtypes = {torch.float32: 1e-4} | ({torch.bfloat16: 0.1} if self.device.type == "cuda" else {})
        exact, want = gradient(self.model(CPU, torch.float64))
        for dtype, tolerance in dtypes.items():
            loss, have = gradient(self.model(self.device, dtype))
            error = float((have - want).norm() / want.norm())
            shown = f"relative error {error:.1e}, loss {loss:.5f} for {exact:.5f}"
            name = f"gradients in {str(dtype).removeprefix('torch.')}"
            yield checked({"check": name, "shown": shown, "kernel": name}, error, tolerance)

    def requests_beside_a_job(self) -> Iterator[dict[str, Any]]:
        """Their tokens are those without a job; the job, not a deterministic one, learns."""
        alone, model = self.tokens(self.device, GREEDY), self.model(self.device)
        with tempfile.TemporaryDirectory() as folder, self.engine(model) as engine:
            data = write_examples(Path(folder))
            job = engine.finetune(data, Path(folder) / "job", replace(JOB, deterministic=False, max_steps=8))
            beside = [handle.token_ids for handle in engine.generate(self.prompts(), GREEDY)]
            drive(engine)
            if job.error is not None:
                raise job.error
            losses = [row.train_loss for row in MetricsTable(Path(folder) / "job" / "metrics.csv").rows()]
        share, shown = compare(beside, alone)
        yield verdict("tokens beside a job", shown, share == 1)
        yield verdict("the job's loss", f"{losses[0]:.3f} to {losses[-1]:.3f}", losses[-1] < losses[0])

    def deterministic_resume(self) -> Iterator[dict[str, Any]]:
        """A job that is stopped after some iterations at a time, under another load each time: the same bits as in one go."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            data, model = write_examples(folder), self.model(self.device)
            with self.engine(model) as engine:
                engine.finetune(data, folder / "whole", JOB)
                drive(engine)
            stops = 0
            while not (folder / "broken" / "adapter_model.safetensors").exists():
                with self.engine(model, tpot_ms=(20.0, 5.0)[stops % 2]) as engine:
                    engine.finetune(data, folder / "broken", JOB, resume=(folder / "broken" / "job.json").exists())
                    engine.submit(self.prompts()[3], GREEDY)
                    drive(engine, 8 + 8 * stops)
                stops += 1
                if stops > 30:
                    raise RuntimeError("the job doesn't come to its end")
            whole, broken = (outcome(folder / part) for part in ("whole", "broken"))
        same = "the same bits" if whole == broken else f"other bits; losses {whole[0]} and {broken[0]}"
        yield verdict("a job stopped and resumed", f"{same} after {stops - 1} stops", whole == broken and stops > 1)


def compare(have: Sequence[Sequence[int]], want: Sequence[Sequence[int]]) -> tuple[float, str]:
    """The share of tokens that are equal, and how to say it. Sequences count up to where they first differ."""
    total = sum(len(sequence) for sequence in want)
    equal = 0
    for a, b in zip(have, want, strict=True):
        differs = [x != y for x, y in zip(a, b, strict=False)]
        equal += differs.index(True) if True in differs else min(len(a), len(b))
    return equal / total, f"{equal} of {total} equal"


def drive(engine: Engine, steps: int | None = None) -> None:
    """Runs the engine until it is idle, or for so many iterations."""
    count = 0
    while not engine.idle and (steps is None or count < steps):
        engine.step()
        count += 1


def write_examples(folder: Path) -> Path:
    """Ten texts of numbers with a pattern that can be learned."""
    path = folder / "examples.jsonl"
    texts = (" ".join(str((start + 3 * i) % 50) for i in range(40 + 5 * start)) for start in range(10))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def outcome(folder: Path) -> tuple[list[float], bytes]:
    """A job's losses and the bytes of its adapter."""
    losses = [row.train_loss for row in MetricsTable(folder / "metrics.csv").rows()]
    return losses, (folder / "adapter_model.safetensors").read_bytes()


@torch.no_grad()
def gradient(model: LoadedModel) -> tuple[float, Tensor]:
    """(loss, gradient in float64 on the CPU) of four examples, with an adapter away from its start."""
    rng = np.random.default_rng(2)
    groups = [
        Group(index=i, examples=(
            Example(index=i, token_ids=rng.integers(0, 512, length), weights=np.ones(length, np.float32)),
        )) for i, length in enumerate((40, 25, 300, 60))
    ]
    trainer = AdapterTrainer(model, FinetuneConfig(lora=LoraConfig(r=4, alpha=8), window_tokens=130))
    flat = trainer.adapter.flat
    flat.copy_(torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).mul_(0.1).bfloat16())
    loss = trainer.forward_backward(groups, 0).loss
    assert trainer.adapter.grad is not None
    return float(loss), trainer.adapter.grad.double().cpu()


def items(options: argparse.Namespace) -> list[Item]:
    """The checks."""
    tiny = Tiny(device_of(options))
    runs: tuple[Callable[[], Iterator[dict[str, Any]]], ...] = (
        tiny.tokens_equal_the_cpus, tiny.gradients_equal_the_cpus, tiny.graph_equals_eager, tiny.requests_beside_a_job,
        tiny.deterministic_resume,
    )
    return [Item(run.__name__, run) for run in runs]
