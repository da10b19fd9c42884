"""The strictest tests for every kind of adapter: gradients equal autograd through transformers + peft, also beside other kinds.

IA3 and DoRA are held against peft's own modules, through files; bottlenecks against hooks on transformers' modules.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coserve.config import LINEAR_SITES, AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from tests.numerics.test_fused_gradients import Mix, check, fixed_mix, lora_configs, mixes
from tests.numerics.test_gradients import TOLERANCE, VARIANTS, Case, error_of, random_example

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
def dora_configs(draw: st.DrawFn) -> LoraConfig:
    names = draw(SITE_LISTS)
    return LoraConfig(
        r=draw(st.integers(1, 6)), alpha=draw(st.floats(1, 16)), target_modules=tuple(names), use_dora=True,
        use_rslora=draw(st.booleans()), rank_pattern=draw(st.sampled_from([{}, {names[0]: 3}, {r"layers\.1\..*": 2}])),
    )


ANY = st.one_of(ia3_configs(), BOTTLENECKS, dora_configs())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    family, sliding_window = draw(st.sampled_from(VARIANTS))
    objective = draw(st.sampled_from(["sft", "dpo"]))
    lengths = draw(st.lists(st.integers(2, 20), min_size=1, max_size=3))
    lengths = [*lengths, *reversed(lengths)] if objective == "dpo" else lengths
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate(lengths))
    return Case(family, sliding_window, draw(ANY), examples, objective, draw(st.sampled_from([2, 256])), seed)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_of_any_kind_equals_autograd(case: Case) -> None:
    assert error_of(case) <= TOLERANCE


@pytest.mark.full
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_split_of_any_kind_equals_autograd_at_length(case: Case) -> None:
    assert error_of(case) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_kind(family: str, kind: str) -> None:
    rng = np.random.default_rng(5)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate([19, 6, 23]))
    assert error_of(Case(family, None, KINDS[kind], examples, "sft", 4, 11)) <= TOLERANCE


# --- in one batch: jobs and requests of different kinds ---


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes(st.one_of(ANY, ANY, ANY, lora_configs())))
def test_kinds_together_equal_the_oracle(mix: Mix) -> None:
    check(mix)


@pytest.mark.full
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes(st.one_of(ANY, ANY, ANY, lora_configs())))
def test_kinds_together_equal_the_oracle_at_length(mix: Mix) -> None:
    check(mix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [None, "request"])
def test_a_kind_beside_lora(kind: str, poison: str | None) -> None:
    """A job and a request of the kind, and a job and a request with LoRA at all sites."""
    mix = fixed_mix("qwen2", None)
    first, second = mix.jobs
    jobs = (Case("qwen2", None, KINDS[kind], first.examples, "sft", 4, 31), second)
    check(Mix(jobs, (KINDS[kind], LoraConfig(r=9, alpha=9)), 3, poison, 6))
    check(Mix((second, jobs[0]), (LoraConfig(r=3, alpha=9), KINDS[kind]), 3, poison, 7))
