"""The bound on finetuning beside requests: against a search over riding rows, at its ends, and for a published case."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.core import PassCost
from coserve.devices.bound import JobShape, OfferedLoad, fused_bound
from coserve.devices.law import device_law
from coserve.devices.table import DEVICES
from coserve.model.architecture import Architecture
from coserve.scheduler.latency import Coefficient, LatencyModel

JOB = JobShape(tokens=100, pairs=5050, labels=50)
AHEAD, BACK = 0.01, 0.02
FLAT: Mapping[Coefficient, float] = {
    ("inference", "once", 0): 0.4, ("forward", "rows", 0): AHEAD, ("backward", "rows", 0): BACK, ("iteration", "once", 0): 0.1,
}
"""Seconds. One layer: a token takes 0.01 forward and 0.02 backward; rows in a pass take nothing."""


def chat(rate: float) -> OfferedLoad:
    return OfferedLoad(rate=rate, prompt_tokens=220, output_tokens=260)


def searched(law: LatencyModel, load: OfferedLoad, tpot_s: float, decode: int, step: float) -> float:
    """Trained tokens of an iteration with `decode` rows, where the rows that ride are a multiple of `step`."""
    prompts = load.rate * tpot_s
    rows = decode + prompts * load.prompt_tokens
    best = 0.0
    for riding in np.arange(0, tpot_s / BACK + step, step):
        cost = PassCost._make((
            rows + riding, decode + prompts, decode, decode * (load.prompt_tokens + load.output_tokens / 2),
            prompts * load.prompt_tokens * (load.prompt_tokens + 1) / 2, riding, riding * JOB.pairs / JOB.tokens,
            riding * JOB.labels / JOB.tokens, 0, prompts,
        ))
        trained = (tpot_s - law.constant_seconds - law.pass_seconds(cost) + riding * AHEAD) / (AHEAD + BACK)
        best = max(best, trained) if trained >= riding else best
    return best


def poisson(mean: float, most: int) -> list[float]:
    return [math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) for count in range(most)]


def test_nothing_runs() -> None:
    """Every iteration is a quantum: 0.9 s of work in 1 s, 0.03 s per token."""
    assert fused_bound(LatencyModel(FLAT), 1, chat(0), 0.5, JOB, 1.0) == pytest.approx(30)


@pytest.mark.parametrize(("fuse", "tokens"), [(False, 0.5 / 0.03), (True, 0.5 / 0.02)])
def test_rows_that_ride_for_nothing_save_their_forward(fuse: bool, tokens: float) -> None:
    """A pass leaves 0.5 s of an iteration of 1 s. Riding, a token costs its backward only. Next to no iteration is empty."""
    assert fused_bound(LatencyModel(FLAT), 1, chat(1), 1.0, JOB, 1.0, fuse) == pytest.approx(tokens)


@pytest.mark.parametrize(("step", "tokens"), [(0.1, 0.4 / 0.02), (0.2, 0.5 / 0.03), (0.6, 0.5 / 0.03)])
def test_riding_pays_for_what_is_not_captured(step: float, tokens: float) -> None:
    """Beside a captured pass 0.5 s are left: 16.7 tokens forward and backward. Rows that ride save their forward, but cost the
    step. An iteration with prompts need not have both, since few passes may take all prompts."""
    law = LatencyModel(FLAT | {("inference", "uncaptured", 0): step})
    assert fused_bound(law, 1, chat(1), 1.0, JOB, 1.0) == pytest.approx(tokens)


def test_a_free_piece_is_used_to_its_end() -> None:
    """Rows up to 501 are free, and further ones cost more than a token's forward alone. So as many ride as are free, and at
    most 25: their backward takes the 0.5 s that the pass leaves."""
    law = LatencyModel(FLAT | {("inference", "rows", 501): 0.015})
    load = OfferedLoad(rate=1, prompt_tokens=21, output_tokens=460)
    expected = 0.0
    for decode, share in enumerate(poisson(460, 800)):
        left = max(0.0, 0.5 - 0.015 * max(0, decode + 21 - 501))
        free = min(max(0, 480 - decode), 25)
        expected += share * (left + free * AHEAD) / (AHEAD + BACK)
    assert fused_bound(law, 1, load, 1.0, JOB, 1.0) == pytest.approx(expected, rel=1e-6)


def test_an_objective_that_the_pass_alone_breaks() -> None:
    assert fused_bound(LatencyModel(FLAT), 1, chat(10), 0.3, JOB, 1.0) == 0.0


def test_backward_may_end_above_the_first_layer_and_run_forward_again() -> None:
    law = LatencyModel(FLAT)
    half = fused_bound(law, 2, chat(0), 0.5, JobShape(tokens=100, pairs=0, labels=0, lowest_layer=1), 1.0)
    assert half == pytest.approx(0.9 / (2 * 0.01 + 0.02))
    again = fused_bound(law, 2, chat(0), 0.5, JobShape(tokens=100, pairs=0, labels=0, recompute_fraction=0.5), 1.0)
    assert again == pytest.approx(0.9 / (2 * 0.01 + 2 * 0.02 + 0.5 * 2 * 0.01))


SLOPES = st.floats(0, 0.02)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(st.sampled_from([0, 1, 20, 90, 400]), SLOPES, min_size=1), SLOPES, SLOPES, SLOPES, st.floats(0.3, 2.0),
    st.floats(0.1, 4),
)
def test_the_best_number_of_riding_rows_is_found(
    rows: dict[int, float], fused: float, pairs: float, labels: float, tpot_s: float, mean: float
) -> None:
    terms: dict[Coefficient, float] = {("inference", "rows", knot): slope for knot, slope in rows.items()}
    terms |= {("inference", "fused_rows", 0): fused, ("inference", "fused_pairs", 0): pairs / 50,
              ("inference", "fused_labels", 0): 0.0, ("inference", "fused_labels", 7): labels}
    law = LatencyModel({**FLAT, **terms})
    load = OfferedLoad(rate=mean / tpot_s / 30, prompt_tokens=5, output_tokens=30)
    nothing, *shares = poisson(mean, 20)
    step = tpot_s / BACK / 200
    best = [searched(law, load, tpot_s, decode, step) for decode in range(1, 20)]
    least = nothing * 0.9 / (AHEAD + BACK) + sum(map(operator.mul, shares, best)) / tpot_s
    bound = fused_bound(law, 1, load, tpot_s, JOB, 1.0)
    assert least - 1e-5 <= bound <= least + step * AHEAD / (AHEAD + BACK) / tpot_s + 1e-5
    assert bound >= fused_bound(law, 1, load, tpot_s, JOB, 1.0, fuse=False) - 1e-9


@pytest.mark.parametrize(("tpot_ms", "rate", "gain"), [(15, 5, 1.477), (20, 5, 1.279), (20, 10, 1.203), (45, 5, 1.061)])
def test_what_fusing_gains_for_8b_on_an_h100(
    archs: Mapping[str, Architecture], tpot_ms: float, rate: float, gain: float
) -> None:
    law = device_law(archs["llama-8b"], DEVICES["H100"])
    job = JobShape(tokens=8192, pairs=8192 * 8193 // 2, labels=8192)
    fused, sliced = (fused_bound(law, 32, chat(rate), tpot_ms / 1e3, job, 0.25, fuse) for fuse in (True, False))
    assert fused / sliced == pytest.approx(gain, abs=5e-3)
    assert fused_bound(law, 32, chat(0), 0.015, job, 0.25) == pytest.approx(14_721.7, rel=1e-4)
