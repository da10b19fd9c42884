"""The strictest test: windowed gradients equal full-sequence autograd through transformers + peft, in float64.

Any split of forward, any other of backward, any budget of kept values, packed examples with masks, all families, sliding
windows, random adapters with non-zero B, SFT and DPO: ||g - g'|| / ||g'|| <= 1e-9 for every tensor. Three mutations of the code
must make it fail. COSERVE_EXAMPLES: how many random cases the long run tries (300); its relatives try a share of that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.compiler.plan import ModelPlan, TrainingPlans
from coserve.config.settings import LINEAR_SITES, AdapterConfig, Compression, LoraConfig
from coserve.core import Direction, Example, Unit
from coserve.finetune.objectives import PreferenceObjective, Scored, SupervisedObjective
from coserve.kernels import attention as attention_kernels
from coserve.kernels.reference import dropout
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import ModelWeights, load_weights
from coserve.peft.adapter import Adapter
from coserve.peft.kinds import new_adapter
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.memory import Arena
from coserve.runtime.microbatch import InFlight, PackedBatch, pack
from coserve.runtime.plans import scoring_plan, training_plans
from coserve.runtime.rows import site_key
from tests import oracle
from tests.splits import backward_units, forward_units
from tests.tiny_models import FAMILIES, build_tiny_model

TOLERANCE = 1e-9
AT_LENGTH = int(os.environ.get("COSERVE_EXAMPLES", "300"))
CPU = torch.device("cpu")
VARIANTS = [(family, None) for family in FAMILIES] + [("mistral", 7), ("qwen2", 5), ("qwen3", 6), ("smollm3", 6)]


@dataclass(frozen=True)
class Pair:
    """The same tiny model twice: coserve's weights, and Hugging Face's."""

    weights: ModelWeights
    reference: torch.nn.Module


@cache
def pair(family: str, sliding_window: int | None) -> Pair:
    directory = build_tiny_model(family, Path(mkdtemp()) / family, sliding_window=sliding_window)
    weights = load_weights(Checkpoint(directory), dtype=torch.float64, device=CPU)
    return Pair(weights, oracle.load_oracle(directory))


@dataclass(frozen=True)
class Case:
    family: str
    sliding_window: int | None
    config: AdapterConfig
    examples: tuple[Example, ...]
    objective: str
    query_block: int
    seed: int
    budget: float = 1.0
    """What is kept, from 0 (as little as can be) to 1 (all that costs a matrix product)."""
    compression: Compression = "lossless"


def random_example(rng: np.random.Generator, index: int, length: int) -> Example:
    weights = (rng.random(length) < rng.choice([0.3, 0.9, 1.0])).astype(np.float32)
    weights[rng.integers(1, length)] = 1.0
    return Example(index=index, token_ids=rng.integers(0, 97, length), weights=weights)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family, sliding_window = draw(st.sampled_from(VARIANTS))
    names = draw(st.lists(st.sampled_from(LINEAR_SITES), min_size=1, max_size=7, unique=True))
    only_layer = draw(st.sampled_from([None, None, 0, 1, 2]))
    targets = names if only_layer is None else [f"layers.{only_layer}.mlp.down_proj", *names[:1]]
    config = LoraConfig(
        r=draw(st.integers(1, 6)), alpha=draw(st.floats(1, 16)), target_modules=tuple(targets),
        use_rslora=draw(st.booleans()), rank_pattern=draw(st.sampled_from([{}, {names[0]: 3}])),
        alpha_pattern=draw(st.sampled_from([{}, {names[-1] if only_layer is None else names[0]: 5.0}])),
    )
    objective = draw(st.sampled_from(["sft", "dpo"]))
    lengths = draw(st.lists(st.integers(2, 24), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if objective == "dpo":
        lengths = [*lengths, *reversed(lengths)]
    examples = tuple(random_example(rng, i, length) for i, length in enumerate(lengths))
    budget = draw(st.one_of(st.just(1.0), st.floats(0, 1)))
    return Case(family, sliding_window, config, examples, objective, draw(st.sampled_from([2, 4, 256])), seed, budget)


def random_adapter(weights: ModelWeights, config: AdapterConfig, seed: int) -> Adapter:
    """An adapter whose parameters are all far from where they start."""
    adapter = new_adapter(weights, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=generator, dtype=torch.float64) * 0.3)
    adapter.refresh()
    return adapter.trainable()


def train_by_units(
    case: Case, weights: ModelWeights, adapter: Adapter, forward: Sequence[Unit] | None = None,
    backward: Sequence[Unit] | None = None, plan: ModelPlan | None = None,
) -> InFlight:
    """One micro-batch through random units, with the objective in between; by default under the plan of the case's budget."""
    executor = TrainExecutor(Executor(weights))
    rng, layers = Random(case.seed), weights.architecture.num_layers
    batch = pack(case.examples, device=CPU, seed=case.seed, step=3)
    references = reference_sums(case, executor, batch) if case.objective == "dpo" else None
    plan = plan or budgeted_plan(weights, adapter, case.budget, case.compression)
    state = executor.begin(batch, plan)
    for unit in forward or forward_units(rng, layers, batch.num_tokens):
        executor.run(state, unit, adapter)
    state.set_coefficients(coefficients(case, state, references))
    for unit in backward or backward_units(rng, layers, plan.lowest_trained, batch.num_tokens):
        executor.run(state, unit, adapter)
    assert state.finished
    return state


def within_share(plans: TrainingPlans, share: float) -> ModelPlan:
    """The plan that keeps at most `share` of what there is between the least and the most."""
    points = plans.frontier(num_points=2)
    most, least = points[0].arena_bytes, points[-1].arena_bytes
    budget = least + share * (most - least)
    plan = plans.plan(budget)
    assert plan.arena_bytes <= budget
    return plan


def budgeted_plan(
    weights: ModelWeights, adapter: Adapter, share: float, compression: Compression = "lossless"
) -> ModelPlan:
    plans = training_plans(weights.architecture, adapter, itemsize=weights.dtype.itemsize, compression=compression)
    return within_share(plans, share)


def reference_sums(case: Case, executor: TrainExecutor, batch: PackedBatch) -> list[float]:
    """Log-probability sums of the bare backbone, through forward-only units."""
    plan = scoring_plan(executor.arch, None, itemsize=executor.weights.dtype.itemsize)
    state = executor.begin(batch, plan, forward_only=True)
    for unit in forward_units(Random(case.seed + 1), executor.arch.num_layers, batch.num_tokens):
        executor.run(state, unit, None)
    weighted = state.logprobs * batch.label_weights
    return [float(weighted[first:end].sum()) for first, end in batch.label_bounds]


def coefficients(case: Case, state: InFlight, references: list[float] | None) -> Tensor:
    batch = state.batch
    scored = [
        Scored(state.logprobs[first:end], batch.label_weights[first:end], references[i] if references else None)
        for i, (first, end) in enumerate(batch.label_bounds)
    ]
    if case.objective == "sft":
        objective = SupervisedObjective()
        total = sum(e.label_weight for e in case.examples)
        parts = [objective.outcome([s], total).coefficients[0] for s in scored]
    else:
        dpo = PreferenceObjective(0.3)
        parts = [c for i in range(0, len(scored), 2) for c in dpo.outcome(scored[i : i + 2], len(scored) / 2).coefficients]
    return torch.cat(parts)


def reference_gradients(case: Case, reference: torch.nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    model = oracle.with_adapter(reference, adapter)
    try:
        if case.objective == "sft":
            loss = oracle.sft_loss(model, case.examples)
        else:
            pairs = [(case.examples[i], case.examples[i + 1]) for i in range(0, len(case.examples), 2)]
            loss = oracle.dpo_loss(model, pairs, 0.3)
        loss.backward()
        return oracle.gradients(model, adapter)
    finally:
        model.unload()


def error_of(case: Case) -> float:
    """The worst relative error of any gradient tensor."""
    models = pair(case.family, case.sliding_window)
    adapter = random_adapter(models.weights, case.config, case.seed)
    attention_kernels.QUERY_BLOCK, whole = case.query_block, attention_kernels.QUERY_BLOCK
    try:
        train_by_units(case, models.weights, adapter)
    finally:
        attention_kernels.QUERY_BLOCK = whole
    return oracle.worst_error(oracle.own_gradients(adapter), reference_gradients(case, models.reference, adapter))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_equals_autograd(case: Case) -> None:
    assert error_of(case) <= TOLERANCE


@pytest.mark.full
@settings(max_examples=AT_LENGTH, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_equals_autograd_at_length(case: Case) -> None:
    assert error_of(case) <= TOLERANCE


@pytest.mark.parametrize("targets", [("v_proj", "up_proj", "q_proj", "down_proj"), ("q_proj",)])
def test_gradient_that_is_zero_by_mathematics(targets: tuple[str, ...]) -> None:
    """One label, on a token that attends to itself alone: d q is 0 but for rounding, here and in autograd."""
    example = Example(index=0, token_ids=np.array([30, 62]), weights=np.array([0, 1], dtype=np.float32))
    config = LoraConfig(r=1, alpha=9.75, target_modules=targets)
    assert error_of(Case("qwen2", None, config, (example,), "sft", 2, 8)) <= TOLERANCE


@pytest.mark.parametrize(("family", "sliding_window"), VARIANTS)
@pytest.mark.parametrize("objective", ["sft", "dpo"])
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_every_family_and_objective(family: str, sliding_window: int | None, objective: str, budget: float) -> None:
    rng = np.random.default_rng(5)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate([19, 6, 23, 11]))
    case = Case(family, sliding_window, LoraConfig(r=4, alpha=6), examples, objective, 4, 11, budget)
    assert error_of(case) <= TOLERANCE


# --- mutations: each breaks the code the way published systems are broken, and must be noticed ---


@pytest.fixture
def split_case() -> Case:
    rng = np.random.default_rng(1)
    examples = tuple(
        Example(index=i, token_ids=rng.integers(0, 97, n), weights=np.ones(n, np.float32)) for i, n in enumerate([17, 9, 21])
    )
    return Case("llama", None, LoraConfig(r=4, alpha=6), examples, "sft", 256, 21)


def mutated_error(case: Case) -> float:
    models = pair(case.family, None)
    adapter = random_adapter(models.weights, case.config, case.seed)
    cuts = [0, 12, 30, 47]
    forward = [Unit(Direction.FORWARD, 0, 3, a, b) for a, b in pairwise(cuts)]
    backward = [
        Unit(Direction.BACKWARD, layer, layer + 1, a, b)
        for layer in (2, 1, 0) for a, b in reversed(list(pairwise(cuts)))
    ]
    train_by_units(case, models.weights, adapter, forward, backward)
    return oracle.worst_error(oracle.own_gradients(adapter), reference_gradients(case, models.reference, adapter))


def test_unmutated_code_passes(split_case: Case) -> None:
    assert mutated_error(split_case) <= TOLERANCE


def test_dropping_an_edge_label_fails(split_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = InFlight.labels_within
    monkeypatch.setattr(InFlight, "labels_within", lambda self, start, end: original(self, start, end - 1))
    assert mutated_error(split_case) > 1e-3


def test_saving_at_offset_0_fails(split_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Arena.storage

    class AtZero:
        """Kept rows whose windows all land at the arena's first rows."""

        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.shape = tensor, tensor.shape

        def __getitem__(self, key: object) -> Tensor:
            return self.tensor[: key.stop - key.start] if isinstance(key, slice) else self.tensor[key]

    monkeypatch.setattr(Arena, "storage", lambda self, layer, number: AtZero(original(self, layer, number)))
    assert mutated_error(split_case) > 1e-3


def test_assigning_instead_of_accumulating_dk_fails(split_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    original = attention_kernels.attention_dgrad

    def assign(d_q: Tensor, d_k_all: Tensor, d_v_all: Tensor, *rest: Tensor, **where: int) -> None:
        fresh_k = torch.zeros_like(d_k_all)
        original(d_q, fresh_k, d_v_all, *rest, **where)
        d_k_all[where["begin"] : where["last"]] = fresh_k[where["begin"] : where["last"]]

    monkeypatch.setattr(attention_kernels, "attention_dgrad", assign)
    assert mutated_error(split_case) > 1e-3


# --- dropout ---


class MaskedDropout(torch.nn.Module):
    """peft's dropout slot with coserve's mask for one example."""

    def __init__(self, key: int, p: float) -> None:
        super().__init__()
        self.key, self.p, self.row_keys = key, p, torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x[0], self.row_keys, self.key, self.p)[None]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1), family=st.sampled_from(FAMILIES), p=st.floats(0.05, 0.8),
    budget=st.sampled_from([1.0, 0.5, 0.0]),
)
def test_dropout_equals_autograd_with_the_same_masks(seed: int, family: str, p: float, budget: float) -> None:
    rng = np.random.default_rng(seed)
    examples = tuple(random_example(rng, i, int(n)) for i, n in enumerate(rng.integers(2, 20, 3)))
    case = Case(family, None, LoraConfig(r=3, alpha=4, dropout=p), examples, "sft", 4, seed, budget)
    models = pair(family, None)
    adapter = random_adapter(models.weights, case.config, seed)
    state = train_by_units(case, models.weights, adapter)
    model = oracle.with_adapter(models.reference, adapter)
    masked = []
    for site in adapter.sites:
        layer = model.get_submodule(f"base_model.model.{site.a.module}")
        layer.lora_dropout["default"] = MaskedDropout(site_key(*site.key), p)
        masked.append(layer.lora_dropout["default"])
    total = sum(e.label_weight for e in examples)
    for example, (first, end) in zip(examples, state.batch.bounds, strict=True):
        for module in masked:
            module.row_keys = state.batch.dropout_keys[first:end]
        loss = -(oracle.label_weights(example) * oracle.label_logprobs(model, example)).sum() / total
        loss.backward()
    expected = oracle.gradients(model, adapter)
    model.unload()
    assert oracle.worst_error(oracle.own_gradients(adapter), expected) <= TOLERANCE
