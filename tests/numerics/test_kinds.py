"""The strictest tests for every kind of adapter: gradients equal autograd through transformers + peft, also beside other kinds.

Under any budget of kept values, in any split. LoRA, DoRA and IA3 are held against peft's own modules, through files;
bottlenecks against hooks on transformers' modules.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve.config.settings import (
    LINEAR_SITES,
    AdapterConfig,
    BottleneckConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    OptimizerConfig,
)
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import load_weights
from coserve.peft.tensors import tensor_name, to_file
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.training.trainer import AdapterTrainer
from tests import oracle
from tests.numerics.test_fused_gradients import Mix, check, fixed_mix, mixes
from tests.numerics.test_gradients import (
    AT_LENGTH,
    CPU,
    TOLERANCE,
    VARIANTS,
    Case,
    error_of,
    pair,
    random_adapter,
    random_example,
)
from tests.numerics.test_training_loop import random_groups
from tests.tiny_models import build_tiny_model

SITE_LISTS = st.lists(st.sampled_from(LINEAR_SITES), min_size=1, max_size=7, unique=True)

KINDS: dict[str, AdapterConfig] = {
    "ia3": IA3Config(),
    "ia3 everywhere": IA3Config(target_modules="all-linear", feedforward_modules=("q_proj", "up_proj", "o_proj")),
    "houlsby relu": BottleneckConfig(size=5, placement="houlsby"),
    "pfeiffer gelu": BottleneckConfig(size=3, activation="gelu"),
    "dora": LoraConfig(r=4, alpha=6, use_dora=True),
}


@st.composite
def ia3_configs(draw: st.DrawFn) -> IA3Config:
    names = draw(SITE_LISTS)
    if draw(st.booleans()):
        names = [f"layers.{draw(st.integers(0, 2))}.mlp.down_proj", *(name for name in names if name != "down_proj")]
    inputs = draw(st.none() | st.lists(st.sampled_from(names), unique=True))
    return IA3Config(target_modules=tuple(names), feedforward_modules=None if inputs is None else tuple(inputs))


BOTTLENECKS = st.builds(
    BottleneckConfig, size=st.integers(1, 9), placement=st.sampled_from(["houlsby", "pfeiffer"]),
    activation=st.sampled_from(["relu", "gelu"]),
)


@st.composite
def low_rank_configs(draw: st.DrawFn, use_dora: bool, dropout: float = 0.0) -> LoraConfig:
    """LoRA or DoRA, with ranks that may differ by site and by layer."""
    names = draw(SITE_LISTS)
    if draw(st.booleans()):
        names = [f"layers.{draw(st.integers(0, 2))}.mlp.up_proj", *(name for name in names if name != "up_proj")]
    ranks: list[dict[str, int]] = [{}, {names[-1]: 3}, {r"layers\.1\..*": 2}, {r"layers\.0\..*": 7, r"layers\.2\..*": 1}]
    if names[-1].startswith("layers."):
        ranks = ranks[:2]  # a pattern must match a module that there is
    return LoraConfig(
        r=draw(st.integers(1, 12)), alpha=draw(st.floats(1, 16)), target_modules=tuple(names), use_dora=use_dora,
        use_rslora=draw(st.booleans()), rank_pattern=draw(st.sampled_from(ranks)), dropout=dropout,
    )


ANY = st.one_of(ia3_configs(), BOTTLENECKS, low_rank_configs(use_dora=True), low_rank_configs(use_dora=False))
BUDGETS = st.sampled_from([0.0, 1.0]) | st.floats(0, 1)
"""Shares of the way from the least that can be kept to the most, ends included."""


@st.composite
def cases(draw: st.DrawFn, configs: st.SearchStrategy[AdapterConfig] = ANY) -> Case:
    """Any kind under any budget."""
    family, sliding_window = draw(st.sampled_from(VARIANTS))
    objective = draw(st.sampled_from(["sft", "dpo"]))
    lengths = draw(st.lists(st.integers(2, 20), min_size=1, max_size=3))
    lengths = [*lengths, *reversed(lengths)] if objective == "dpo" else lengths
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate(lengths))
    query_block = draw(st.sampled_from([2, 256]))
    return Case(family, sliding_window, draw(configs), examples, objective, query_block, seed, draw(BUDGETS))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_under_any_budget_of_any_kind_equals_autograd(case: Case) -> None:
    assert error_of(case) <= TOLERANCE


@pytest.mark.full
@settings(max_examples=AT_LENGTH // 6, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_under_any_budget_of_any_kind_at_length(case: Case) -> None:
    assert error_of(case) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("family", ["qwen3", "granite", "smollm3"])
def test_every_kind(kind: str, budget: float, family: str) -> None:
    rng = np.random.default_rng(5)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate([19, 6, 23]))
    assert error_of(Case(family, None, KINDS[kind], examples, "sft", 4, 11, budget)) <= TOLERANCE


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=low_rank_configs(use_dora=True), seed=st.integers(0, 2**32 - 1), data=st.data())
def test_norms_by_slices_are_those_of_the_whole(config: LoraConfig, seed: int, data: st.DataObject) -> None:
    """However an optimizer step is cut, and in a copy, which doesn't work them out again."""
    weights = pair("qwen2", None).weights
    sliced, whole = (random_adapter(weights, config, seed) for _ in range(2))
    total = whole.flat.numel()
    cuts = data.draw(st.lists(st.integers(0, total), max_size=8).map(sorted))
    new = torch.randn(total, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for start, end in pairwise([0, *cuts, total]):
        sliced.flat[start:end] = new[start:end]
        sliced.refresh(start, end)
    lengths = [p for p in whole.parameters if p.name.endswith(".dora")]
    before = [whole.factor(p.layer, p.name) for p in lengths]
    whole.flat.copy_(new)
    whole.refresh()
    after = [whole.factor(p.layer, p.name) for p in lengths]
    assert lengths and not any(a and b and torch.equal(a.matrix, b.matrix) for a, b in zip(after, before, strict=True))
    for p in whole.parameters:
        factor = whole.factor(p.layer, p.name)
        for other in (sliced, sliced.copy(), whole.copy()):
            found = other.factor(p.layer, p.name)
            assert factor is not None and found is not None
            assert torch.equal(found.matrix, factor.matrix)
            assert factor.slope is None or (found.slope is not None and torch.equal(found.slope, factor.slope))


# --- in one batch: jobs and requests of different kinds ---


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes(ANY))
def test_kinds_together_equal_the_oracle(mix: Mix) -> None:
    check(mix)


@pytest.mark.full
@settings(max_examples=AT_LENGTH // 30, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes(ANY))
def test_kinds_together_equal_the_oracle_at_length(mix: Mix) -> None:
    check(mix)


def beside_lora(kind: str, poison: str | None) -> Mix:
    """A job and a request of the kind, and a job and a request with LoRA at all sites."""
    first, second = fixed_mix("qwen2", None).jobs
    job = Case("qwen2", None, KINDS[kind], first.examples, "sft", 4, 31)
    return Mix((job, second), (KINDS[kind], LoraConfig(r=9, alpha=9)), 3, poison, 6)


@pytest.mark.parametrize("kind", [
    "houlsby relu", "dora",
    *(pytest.param(kind, marks=pytest.mark.full) for kind in ("ia3", "ia3 everywhere", "pfeiffer gelu")),
])
def test_a_kind_beside_lora(kind: str) -> None:
    check(beside_lora(kind, None))


@pytest.mark.parametrize("kind", [
    "dora", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("ia3 everywhere", "houlsby relu"))
])
def test_nan_stays_with_its_owner(kind: str) -> None:
    check(beside_lora(kind, "request"))


# --- step by step ---


@pytest.mark.parametrize("kind", ["dora", pytest.param("ia3", marks=pytest.mark.full)])
def test_steps_follow_a_plain_loop(tmp_path: Path, kind: str) -> None:
    """DoRA's norm is that of the present weights at every step; and every parameter ends where peft's own does."""
    directory = build_tiny_model("qwen2", tmp_path / "model")
    weights = load_weights(Checkpoint(directory), dtype=torch.float64, device=CPU)
    model = LoadedModel("tiny", directory, "tiny", None, weights, Executor(weights))  # type: ignore[arg-type]  # no text here
    config = FinetuneConfig(
        max_microbatch_tokens=64, window_tokens=24, optimizer=OptimizerConfig(max_grad_norm=0, eps=1e-4)
    ).with_adapter(KINDS[kind])
    trainer = AdapterTrainer(model, config)
    reference = oracle.with_adapter(oracle.load_oracle(directory), trainer.adapter.copy())
    parameters = dict(reference.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0, eps=1e-4)
    groups = random_groups(np.random.default_rng(3), 12)
    for step in range(6):
        chosen = groups[2 * step : 2 * step + 2]
        trainer.forward_backward(chosen, step)
        trainer.optim_step(1e-2)
        oracle.sft_loss(reference, [group.examples[0] for group in chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    own = to_file(trainer.adapter, trainer.adapter.flat)
    for p in trainer.adapter.parameters:
        stem = tensor_name(p).removesuffix(".weight")
        theirs = next(parameters[name] for name in (f"{stem}.default.weight", f"{stem}.default") if name in parameters)
        torch.testing.assert_close(own[tensor_name(p)], theirs.detach(), rtol=1e-7, atol=1e-9)
