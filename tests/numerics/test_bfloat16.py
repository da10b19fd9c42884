"""bfloat16 on the CPU: gradients at most twice as far from float64 as transformers + peft's own, for every kind of adapter.

The checkpoint and the adapters hold bfloat16 exactly, so that only arithmetic differs. Weights are packed where the processor
multiplies bfloat16; one test each takes them plain and held once.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from torch import Tensor

from coserve.config.settings import (
    AdapterConfig,
    BottleneckConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    OptimizerConfig,
)
from coserve.core import Example, Group
from coserve.model.checkpoint import Checkpoint
from coserve.model.linear import can_pack
from coserve.model.weights import ModelWeights, load_weights
from coserve.peft.adapter import Adapter
from coserve.peft.kinds import new_adapter
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.training.trainer import AdapterTrainer
from tests import oracle
from tests.numerics.test_gradients import Case, random_example, reference_gradients, train_by_units
from tests.tiny_models import FAMILIES, build_tiny_model

CPU = torch.device("cpu")
BF16, F64 = torch.bfloat16, torch.float64

KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=4, alpha=6),
    "dora": LoraConfig(r=4, alpha=6, use_dora=True),
    "ia3": IA3Config(target_modules="all-linear", feedforward_modules=("q_proj", "up_proj", "o_proj")),
    "houlsby relu": BottleneckConfig(size=5, placement="houlsby"),
    "pfeiffer gelu": BottleneckConfig(size=3, activation="gelu"),
}


@cache
def directory_of(family: str, sliding_window: int | None = None) -> Path:
    return build_tiny_model(family, Path(mkdtemp()) / family, sliding_window=sliding_window, dtype=BF16)


@cache
def weights_of(family: str, sliding_window: int | None, dtype: torch.dtype, packed: bool | None = None) -> ModelWeights:
    return load_weights(Checkpoint(directory_of(family, sliding_window)), dtype=dtype, device=CPU, packed=packed)


@cache
def reference_of(family: str, sliding_window: int | None, dtype: torch.dtype) -> torch.nn.Module:
    return oracle.load_oracle(directory_of(family, sliding_window), dtype)


def model_of(weights: ModelWeights, directory: Path) -> LoadedModel:
    return LoadedModel("tiny", directory, "tiny", None, weights, Executor(weights))  # type: ignore[arg-type]  # no text here


def examples_of(lengths: list[int], seed: int = 5) -> tuple[Example, ...]:
    rng = np.random.default_rng(seed)
    return tuple(random_example(rng, index, length) for index, length in enumerate(lengths))


def adapter_like(flat: Tensor, weights: ModelWeights, config: AdapterConfig) -> Adapter:
    """An adapter with these parameters, in the dtype of the weights."""
    adapter = new_adapter(weights, config, seed=0)
    adapter.flat.copy_(flat)
    adapter.refresh()
    return adapter.trainable()


def mean_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    return float(np.mean([oracle.relative_error(found[name].double(), exact[name]) for name in exact]))


def errors_of(case: Case, weights: ModelWeights) -> tuple[float, float]:
    """Mean relative errors of coserve's gradients and of peft's, both in bfloat16, against autograd in float64."""
    shape = new_adapter(weights, case.config, seed=0).flat.shape
    flat = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed)).mul_(0.2).to(BF16)
    exact_weights = weights_of(case.family, case.sliding_window, F64)
    adapter, exact_adapter = (adapter_like(flat, each, case.config) for each in (weights, exact_weights))
    train_by_units(case, weights, adapter)
    exact = reference_gradients(case, reference_of(case.family, case.sliding_window, F64), exact_adapter)
    theirs = reference_gradients(case, reference_of(case.family, case.sliding_window, BF16), adapter)
    return mean_error(oracle.own_gradients(adapter), exact), mean_error(theirs, exact)


LENGTHS = [40, 25, 31, 60]


@pytest.mark.parametrize("budget", [1.0, 0.0])
@pytest.mark.parametrize(("family", "sliding_window"), [*((family, None) for family in FAMILIES), ("mistral", 9)])
def test_gradients_are_as_exact_as_pefts(family: str, sliding_window: int | None, budget: float) -> None:
    case = Case(family, sliding_window, KINDS["lora"], examples_of(LENGTHS), "sft", 16, 11, budget)
    own, theirs = errors_of(case, weights_of(family, sliding_window, BF16))
    assert 0 < own <= 2 * theirs


@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_kind(kind: str, objective: str) -> None:
    lengths = LENGTHS if objective == "sft" else [40, 25, 25, 40]
    case = Case("qwen3", None, KINDS[kind], examples_of(lengths), objective, 16, 11)
    own, theirs = errors_of(case, weights_of("qwen3", None, BF16))
    assert 0 < own <= 2 * theirs


@pytest.mark.parametrize("one_copy", [False, True])
def test_gradients_from_plain_weights_and_from_one_copy(one_copy: bool) -> None:
    case = Case("llama", None, KINDS["lora"], examples_of(LENGTHS), "sft", 16, 11)
    weights = weights_of("llama", None, BF16, can_pack(BF16, CPU) and one_copy)
    weights.hold_one_copy(one_copy)
    own, theirs = errors_of(case, weights)
    assert 0 < own <= 2 * theirs


@pytest.mark.parametrize("kind", KINDS)
def test_kept_values_in_fewer_bytes(kind: str) -> None:
    """fp8 rounds kept values to 4 significant bits: gradients are off by percents, not by more."""
    case = Case("llama", None, KINDS[kind], examples_of(LENGTHS), "sft", 16, 11, compression="fp8")
    own, _ = errors_of(case, weights_of("llama", None, BF16))
    assert 0 < own <= 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_steps_bring_the_loss_down(kind: str) -> None:
    """The masters are float32, what forward reads is their bfloat16, and the loss falls as it does in float32."""
    losses = {}
    for dtype in (BF16, torch.float32):
        model = model_of(weights_of("qwen2", None, dtype), directory_of("qwen2"))
        config = FinetuneConfig(max_microbatch_tokens=256, window_tokens=50).with_adapter(KINDS[kind])
        trainer = AdapterTrainer(model, config)
        groups = [Group(index=e.index, examples=(e,)) for e in examples_of([30, 20, 25])]
        first = trainer.forward_backward(groups, 0).loss
        for step in range(12):
            trainer.optim_step(1e-2)
            last = trainer.forward_backward(groups, step + 1).loss
        losses[dtype] = (first, last)
        assert trainer.optimizer.master.dtype == torch.float32
        assert trainer.adapter.flat.dtype == dtype
    (first, last), (first_f32, last_f32) = losses[BF16], losses[torch.float32]
    assert first == pytest.approx(first_f32, rel=0.01)
    assert first - last == pytest.approx(first_f32 - last_f32, rel=0.1)


def test_small_updates_are_not_lost_to_rounding() -> None:
    """Steps far below bfloat16's resolution add up in the float32 master."""
    config = FinetuneConfig(lora=LoraConfig(r=4), optimizer=OptimizerConfig(learning_rate=1e-6))
    trainer = AdapterTrainer(model_of(weights_of("llama", None, BF16), directory_of("llama")), config)
    before = trainer.optimizer.master.clone()
    (example,) = examples_of([30])
    for step in range(3):
        trainer.forward_backward([Group(index=0, examples=(example,))], step)
        trainer.optim_step(1e-6)
    moved = (trainer.optimizer.master - before).abs().max()
    assert 1e-6 < float(moved) < 1e-5
    assert trainer.optimizer.master.dtype == torch.float32
    assert trainer.adapter.flat.dtype == torch.bfloat16
