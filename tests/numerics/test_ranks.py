"""Windowed training on several ranks equals training on one, in float64: log-probabilities, and the gradient of every
parameter.

The ranks are threads of this process (`tests/loopback.py`). Each has its own slices of a tiny model's weights and of a random
adapter. Splits, budgets and kinds of adapter are random. One rank equals autograd (test_gradients.py), so that equality here
needs no other oracle: ||g - g'|| / ||g'|| <= 1e-9 for the whole gradient.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.compiler.parallelize import Axes, Prices, TensorParallel
from coserve.compiler.report import ranks_report
from coserve.config.settings import AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import ModelWeights, load_weights
from coserve.parallel import Ranks
from coserve.peft.adapter import Adapter
from coserve.peft.share import RankLayout, rank_adapter
from coserve.runtime.microbatch import pack
from coserve.runtime.plans import adapter_shardings, layer_bypasses, training_plans
from tests.loopback import on_ranks
from tests.numerics.test_gradients import (
    TOLERANCE,
    Case,
    budgeted_plan,
    random_adapter,
    random_example,
    train_by_units,
    within_share,
)
from tests.rank_process import on_processes
from tests.tiny_models import FAMILIES, build_tiny_model

CPU = torch.device("cpu")
PRICES = Prices(
    flops=6e14, bandwidth=2.7e12, link_bandwidth=3.6e11, link_latency_s=8e-6, itemsize=8, window_tokens=16, step_tokens=64,
    update_bytes=30,
)
SHORT = (Phase.explicit, Phase.reuse, Phase.generate)
"""A failing case is printed as it is; to shrink one takes minutes."""
KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=4, alpha=8, target_modules="all-linear"),
    "lora with dropout": LoraConfig(r=4, alpha=8, target_modules="all-linear", dropout=0.3),
    "dora": LoraConfig(r=4, alpha=8, target_modules="all-linear", use_dora=True),
    "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(size=8),
}


@cache
def checkpoint(family: str, sliding_window: int | None = None, bias: bool = False) -> Checkpoint:
    directory = Path(mkdtemp()) / family
    return Checkpoint(build_tiny_model(family, directory, sliding_window=sliding_window, bias=bias))


@cache
def whole_weights(family: str, sliding_window: int | None = None, bias: bool = False) -> ModelWeights:
    return load_weights(checkpoint(family, sliding_window, bias), dtype=torch.float64, device=CPU)


class Trained(NamedTuple):
    """What a rank has after a micro-batch. grad: the whole flat gradient, put together from all ranks. sent_bytes: by units;
    step_bytes: to sum gradients."""

    logprobs: Tensor
    grad: Tensor
    sent_bytes: int
    step_bytes: int


class Group:
    """Ranks that train one case. whole: the adapter, as one rank has it."""

    def __init__(self, case: Case, files: Checkpoint, whole: Adapter, size: int, forced: Axes | None = None) -> None:
        self.case, self.files, self.whole = case, files, whole
        arch = files.architecture
        ranks = TensorParallel(size=size, kv_heads=arch.num_kv_heads, prices=PRICES, forced=forced or {})
        self.shardings = adapter_shardings(arch, whole, ranks)
        self.ranks = ranks.fix(self.shardings)
        self.plans = training_plans(arch, whole, itemsize=8, compression=case.compression, ranks=self.ranks)

    def work(self, ranks: Ranks) -> Trained:
        """What each rank does."""
        weights = load_weights(self.files, dtype=torch.float64, device=CPU, ranks=ranks)
        layout = RankLayout(self.whole.parameters, self.shardings, ranks)
        own = rank_adapter(self.whole, layout)
        own.bind(weights)
        own = own.trainable()
        before = ranks.sent_bytes
        state = train_by_units(self.case, weights, own, plan=within_share(self.plans, self.case.budget))
        by_units = ranks.sent_bytes - before
        assert own.grad is not None
        layout.sum_gradients(own.grad)
        by_step = ranks.sent_bytes - before - by_units
        return Trained(state.logprobs.clone(), layout.join(own.grad), by_units, by_step)


def make_case(family: str, config: AdapterConfig, seed: int, budget: float = 1.0) -> Case:
    rng = np.random.default_rng(seed)
    lengths = [int(length) for length in rng.integers(2, 20, 3)]
    examples = tuple(random_example(rng, i, length) for i, length in enumerate(lengths + lengths[::-1]))
    return Case(family, None, config, examples, "sft", 4, seed, budget)


def error(found: Tensor, wanted: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - wanted) / torch.linalg.vector_norm(wanted))


def check(case: Case, size: int, *, bias: bool = False, forced: Axes | None = None) -> None:
    """Asserts that every rank of a group has what one rank alone has."""
    weights = whole_weights(case.family, case.sliding_window, bias)
    whole = random_adapter(weights, case.config, case.seed)
    alone = train_by_units(case, weights, whole, plan=budgeted_plan(weights, whole, case.budget, case.compression))
    assert whole.grad is not None
    group = Group(case, checkpoint(case.family, case.sliding_window, bias), whole, size, forced)
    for found in on_ranks(size, group.work):
        assert error(found.logprobs, alone.logprobs) <= TOLERANCE
        assert error(found.grad, whole.grad) <= TOLERANCE


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3", marks=pytest.mark.full)])
def test_ranks_train_as_one(family: str, kind: str, size: int) -> None:
    check(make_case(family, KINDS[kind], 5, budget=0.5), size)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    check(make_case(family, KINDS["lora"], 7), 2, bias=family in ("llama", "qwen3", "granite", "smollm3"))


@settings(max_examples=4, deadline=None, phases=SHORT)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), size=st.sampled_from([2, 4]), budget=st.floats(0, 1))
def test_any_candidates_under_any_split_and_budget(data: st.DataObject, seed: int, size: int, budget: float) -> None:
    """Each site has a candidate of its own, not only the cheapest."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    case = make_case("llama", KINDS[kind], seed, budget)
    weights = whole_weights("llama", None, True)
    whole = random_adapter(weights, case.config, seed)
    group = Group(case, checkpoint("llama", None, True), whole, size)
    graph = layer_bypasses(weights.architecture, whole, dropout=whole.dropout)[0].trace(weights.architecture, 0).forward
    forced: dict[str, int | None] = {}
    for site in dict.fromkeys(node.site for node in graph.nodes if node.site is not None):
        forced |= data.draw(st.sampled_from(group.ranks.candidates(graph, site))).axes
    check(case, size, bias=True, forced=forced)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_what_is_sent_is_what_the_plan_says(kind: str, size: int) -> None:
    case = make_case("llama", KINDS[kind], 3)
    whole = random_adapter(whole_weights("llama"), case.config, case.seed)
    group = Group(case, checkpoint("llama"), whole, size)
    arch, num_tokens = group.files.architecture, sum(len(example.token_ids) for example in case.examples)
    num_labels = pack(case.examples, device=CPU, seed=0, step=0).labels.numel()
    elements = {(p.layer, p.name): p.shape[0] * p.shape[1] for p in whole.parameters}
    plan = within_share(group.plans, case.budget)
    said = ranks_report(group.ranks, arch, layer_bypasses(arch, whole), plan, elements)
    layers = sum(len(entry.layers) * sum(each.num_bytes for each in entry.transfers) for entry in said.transfers)
    for found in on_ranks(size, group.work):
        assert found.sent_bytes == num_tokens * (layers + said.embedding_bytes) + num_labels * said.label_bytes
        assert found.step_bytes == 2 * said.step_bytes, "gradients are float64 here, and planned in float32"


class ProcessCase(NamedTuple):
    """A case for ranks in processes of their own, which read the checkpoint and draw the adapter themselves."""

    case: Case
    directory: Path
    size: int

    def __call__(self, ranks: Ranks) -> Trained:
        files = Checkpoint(self.directory)
        whole = random_adapter(load_weights(files, dtype=torch.float64, device=CPU), self.case.config, self.case.seed)
        return Group(self.case, files, whole, self.size).work(ranks)


@pytest.mark.parametrize(("kind", "size"), [
    *((kind, 2) for kind in KINDS), ("lora", 4),  # the last with more ranks than key-value heads
])
@pytest.mark.full
def test_processes_train_as_one(kind: str, size: int, tmp_path: Path) -> None:
    case = make_case("llama", KINDS[kind], 5, budget=0.5)
    whole = random_adapter(whole_weights("llama"), case.config, case.seed)
    alone = train_by_units(case, whole_weights("llama"), whole)
    assert whole.grad is not None
    for found in on_processes(size, ProcessCase(case, checkpoint("llama").directory, size), tmp_path):
        assert error(found.logprobs, alone.logprobs) <= TOLERANCE
        assert error(found.grad, whole.grad) <= TOLERANCE
