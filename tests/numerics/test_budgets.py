"""A budget changes no gradient: any plan on the curve against the one that runs no matrix product again, in float32 by the bit.

In the same windows, backward's like forward's, what runs again runs on the same rows. Where that is the same arithmetic, these
are the same bits. It isn't
- where an operator adds into its output under one plan and not under the other, as an `add` into memory that is kept can't be
  done in place: x + x v of DoRA and IA3 then rounds once or twice;
- where gate and up come of one product under one plan and of two under the other: the ends of a vectorized loop, over columns
  or over whole rows, are computed by another exponential;
- where rows of a kept value of another width than the model's aren't aligned to 64 bytes, as BLAS may take another kernel for
  them: windows here begin where they are.
There the same windows give the same gradients in float64, to 1e-9. Against autograd, in any windows: test_kinds.py.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import Call, LayerPlan
from coserve.config.settings import LoraConfig
from coserve.kernels import attention as attention_kernels
from coserve.model.checkpoint import Checkpoint
from coserve.model.decoder import MERGED
from coserve.model.weights import ModelWeights, load_weights
from coserve.runtime.plans import training_plans
from tests import oracle
from tests.joined_calls import apart, operators
from tests.numerics.test_gradients import (
    AT_LENGTH,
    CPU,
    TOLERANCE,
    Case,
    pair,
    random_adapter,
    random_example,
    train_by_units,
    within_share,
)
from tests.numerics.test_kinds import ANY, KINDS, cases, low_rank_configs
from tests.splits import mirrored_units
from tests.tiny_models import build_tiny_model

ALIGNED = 16
"""Values of 64 bytes. The tiny models' own widths are multiples of it."""
CASES = cases(ANY | low_rank_configs(use_dora=False, dropout=0.3))


@cache
def single(family: str, sliding_window: int | None) -> ModelWeights:
    """A tiny model in float32, packed as it is served."""
    directory = build_tiny_model(family, Path(mkdtemp()) / family, sliding_window=sliding_window)
    return load_weights(Checkpoint(directory), dtype=torch.float32, device=CPU)


def arithmetic(layer: LayerPlan) -> dict[object, set[bool]]:
    """Whether an operator adds into its output, in every place where it runs. Products of q, k and v that are merged count as
    three: what reads them is indifferent to columns."""
    calls: list[Call] = [*layer.forward.calls, *(layer.backward.calls if layer.backward is not None else ())]
    found: dict[object, set[bool]] = {}
    for call in (each for joined in apart(calls) for each in operators(joined)):
        for weight in MERGED["qkv_proj"] if call.weight == "qkv_proj" else (call.weight,):
            found.setdefault((call.op, weight, *sorted(call.attrs.items())), set()).add(call.accumulate)
    return found


def same_arithmetic(plan: ModelPlan, whole: ModelPlan) -> bool:
    pairs = [(arithmetic(a), arithmetic(b)) for a, b in zip(plan.layers, whole.layers, strict=True)]
    return all(own == other and all(len(ways) == 1 for ways in own.values()) for own, other in pairs)


def gradients(case: Case, weights: ModelWeights, plan: ModelPlan) -> dict[str, Tensor]:
    """Under a plan, in random windows that are alike in both directions."""
    adapter = random_adapter(weights, case.config, case.seed)
    num_tokens = sum(len(example.token_ids) for example in case.examples)
    ranks = [p.shape[p.rank_axis] for p in adapter.parameters if p.rank_axis is not None]
    grid = ALIGNED // gcd(ALIGNED, *ranks)
    units = mirrored_units(Random(case.seed), weights.architecture.num_layers, plan.lowest_trained, num_tokens, grid)
    attention_kernels.QUERY_BLOCK, default = case.query_block, attention_kernels.QUERY_BLOCK
    try:
        train_by_units(case, weights, adapter, *units, plan)
    finally:
        attention_kernels.QUERY_BLOCK = default
    return oracle.own_gradients(adapter)


def compare(case: Case) -> None:
    """A case under its budget and without one."""
    weights = single(case.family, case.sliding_window)
    plans = training_plans(
        weights.architecture, random_adapter(weights, case.config, case.seed), itemsize=weights.dtype.itemsize
    )
    plan, whole = within_share(plans, case.budget), plans.plan()
    if same_arithmetic(plan, whole):
        found, expected = (gradients(case, weights, each) for each in (plan, whole))
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
        return
    weights = pair(case.family, case.sliding_window).weights
    plans = training_plans(
        weights.architecture, random_adapter(weights, case.config, case.seed), itemsize=weights.dtype.itemsize
    )
    found, expected = (gradients(case, weights, each) for each in (within_share(plans, case.budget), plans.plan()))
    assert oracle.worst_error(found, expected) <= TOLERANCE


@pytest.mark.parametrize(("kind", "share"), [
    ("lora", 1.0), ("dora", 0.1), ("ia3", 0.1), ("houlsby relu", 0.3), ("pfeiffer gelu", 0.5),
])
def test_bits_along_the_curve(kind: str, share: float) -> None:
    """At least `share` of the points are compared bit for bit: all of LoRA's."""
    rng = np.random.default_rng(5)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate([19, 6, 23]))
    config = KINDS.get(kind, LoraConfig(r=4, alpha=6))
    case, weights = Case("llama", None, config, examples, "sft", 4, 11), single("llama", None)
    plans = training_plans(
        weights.architecture, random_adapter(weights, config, 11), itemsize=weights.dtype.itemsize
    )
    whole, points = plans.plan(), plans.frontier(num_points=25)
    same = [plan for plan in (plans.plan(p.arena_bytes) for p in points) if same_arithmetic(plan, whole)]
    assert len(same) >= share * len(points)
    expected = gradients(case, weights, whole)
    for plan in same[1::2]:
        found = gradients(case, weights, plan)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_any_budget_gives_the_gradients_of_none(case: Case) -> None:
    compare(case)


@pytest.mark.full
@settings(max_examples=AT_LENGTH // 6, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_any_budget_gives_the_gradients_of_none_at_length(case: Case) -> None:
    compare(case)
