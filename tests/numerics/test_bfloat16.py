"""bfloat16, the dtype of GPUs, on the CPU: gradients at most twice as far from float64 as transformers + peft's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coserve.config import FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.core import Group
from coserve.engine.model import LoadedModel
from coserve.engine.trainer import AdapterTrainer
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import load_weights
from coserve.peft.lora import LoraAdapter
from coserve.runtime.executor import Executor
from tests import oracle
from tests.numerics.test_gradients import random_example
from tests.tiny_models import FAMILIES, build_tiny_model


def load(directory: Path, dtype: torch.dtype) -> LoadedModel:
    weights = load_weights(Checkpoint(directory), dtype=dtype, device=torch.device("cpu"))
    return LoadedModel("tiny", directory, "tiny", None, weights, Executor(weights))  # type: ignore[arg-type]  # no text here


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_exact_as_pefts(tmp_path: Path, family: str) -> None:
    # a checkpoint that bfloat16 holds exactly, so that only arithmetic differs
    directory = build_tiny_model(family, tmp_path / "m", dtype=torch.bfloat16)
    rng = np.random.default_rng(2)
    examples = [random_example(rng, i, length) for i, length in enumerate([40, 25, 31, 60])]
    config = FinetuneConfig(lora=LoraConfig(r=4, alpha=8), max_microbatch_tokens=256, window_tokens=50)
    trainer = AdapterTrainer(load(directory, torch.bfloat16), config)
    flat = torch.randn(trainer.adapter.flat.shape, generator=torch.Generator().manual_seed(0)).mul_(0.2).bfloat16()
    trainer.adapter.flat.copy_(flat)
    loss = trainer.forward_backward([Group(index=e.index, examples=(e,)) for e in examples], 0).loss
    found = {}
    losses = {}
    for dtype in (torch.bfloat16, torch.float64):
        adapter = LoraAdapter(config.lora, trainer.adapter.sites, flat.to(dtype), num_layers=3)
        reference = oracle.with_adapter(oracle.load_oracle(directory, dtype), adapter)
        reference_loss = oracle.sft_loss(reference, examples)
        reference_loss.backward()
        losses[dtype] = float(reference_loss.detach())
        found[dtype] = {name: g.double() for name, g in oracle.gradients(reference, adapter).items()}
    exact = found[torch.float64]
    own = {name: g.double() for name, g in oracle.own_gradients(trainer.adapter).items()}
    error = {
        name: float(np.mean([oracle.relative_error(g[key], exact[key]) for key in exact]))
        for name, g in (("coserve", own), ("peft", found[torch.bfloat16]))
    }
    assert error["coserve"] <= 2 * error["peft"]
    assert abs(loss - losses[torch.float64]) <= 2 * abs(losses[torch.bfloat16] - losses[torch.float64]) + 1e-3


def test_small_updates_are_not_lost_to_rounding(tmp_path: Path) -> None:
    """Steps far below bfloat16's resolution add up in the float32 master."""
    directory = build_tiny_model("llama", tmp_path / "m", dtype=torch.bfloat16)
    config = FinetuneConfig(lora=LoraConfig(r=4), optimizer=OptimizerConfig(learning_rate=1e-6))
    trainer = AdapterTrainer(load(directory, torch.bfloat16), config)
    before = trainer.optimizer.master.clone()
    examples = [random_example(np.random.default_rng(0), 0, 30)]
    for step in range(3):
        trainer.forward_backward([Group(index=0, examples=(examples[0],))], step)
        trainer.optim_step(1e-6)
    moved = (trainer.optimizer.master - before).abs().max()
    assert 1e-6 < float(moved) < 1e-5
    assert trainer.optimizer.master.dtype == torch.float32
    assert trainer.adapter.flat.dtype == torch.bfloat16
