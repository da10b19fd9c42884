"""The CUDA path: same tokens and gradients as the CPU's. Not yet run on a device: none was there when it was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coserve.config.settings import FinetuneConfig, LoraConfig, SamplingConfig
from coserve.core import Group
from coserve.engine.generation import Generator
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import load_weights
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.training.trainer import AdapterTrainer
from tests import oracle
from tests.numerics.test_gradients import random_example
from tests.tiny_models import FAMILIES, build_tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def load(directory: Path, device: str, dtype: torch.dtype) -> LoadedModel:
    weights = load_weights(Checkpoint(directory), dtype=dtype, device=torch.device(device))
    return LoadedModel("tiny", directory, "tiny", None, weights, Executor(weights))  # type: ignore[arg-type]  # no text here


def gradients(model: LoadedModel, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(2)
    examples = [random_example(rng, i, length) for i, length in enumerate([40, 25, 300, 60])]
    trainer = AdapterTrainer(model, FinetuneConfig(lora=LoraConfig(r=4, alpha=8), window_tokens=130))
    trainer.adapter.flat.copy_(flat)
    trainer.forward_backward([Group(index=e.index, examples=(e,)) for e in examples], 0)
    return {name: g.double().cpu() for name, g in oracle.own_gradients(trainer.adapter).items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_the_cpus(tmp_path: Path, family: str, dtype: torch.dtype, tolerance: float) -> None:
    directory = build_tiny_model(family, tmp_path / "m", dtype=torch.bfloat16)
    exact = load(directory, "cpu", torch.float64)
    sizes = AdapterTrainer(exact, FinetuneConfig(lora=LoraConfig(r=4, alpha=8))).adapter.flat.shape
    flat = torch.randn(sizes, generator=torch.Generator().manual_seed(0)).mul_(0.2).bfloat16()
    own, reference = gradients(load(directory, "cuda", dtype), flat), gradients(exact, flat)
    mean = np.mean([oracle.relative_error(own[name], reference[name]) for name in reference])
    assert mean <= tolerance


def test_greedy_tokens_equal_the_cpus(tmp_path: Path) -> None:
    directory = build_tiny_model("llama", tmp_path / "m")
    prompts = [[1, 2, 3], list(range(40))]
    sampling = SamplingConfig(max_tokens=16, temperature=0, ignore_eos=True)
    found = [Generator(load(directory, device, torch.float32)).generate(prompts, sampling) for device in ("cpu", "cuda")]
    assert found[0] == found[1]
