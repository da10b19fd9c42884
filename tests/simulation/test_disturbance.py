"""What iterations really take: noise, stalls, steeper slopes and the host's part, all of it seeded."""

from __future__ import annotations

from statistics import mean, pstdev
from typing import Any

import pytest

from coserve.core import ConfigError, Contents, PassCost, UnitCost
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.disturbance import Disturbance, TrueLaw
from tests.fake_machine import law

DECODE = PassCost(8, 8, 8, 800, 0, 0, 0, 0, 0)
CONTENTS = Contents(DECODE, (UnitCost(True, 256, 4, 1000, 0),), 1000)


def factors(count: int = 20_000, **changes: Any) -> list[float]:
    truth = TrueLaw(law(), Disturbance(**changes))
    return [truth.factor() for _ in range(count)]


def test_without_a_disturbance_times_are_the_laws() -> None:
    assert set(factors(10)) == {1.0}
    assert TrueLaw(law()).expected(CONTENTS) == law().seconds(CONTENTS)


def test_noise_has_its_deviation_and_is_cut() -> None:
    found = factors(noise=0.05)
    assert mean(found) == pytest.approx(1.0, abs=0.002) and pstdev(found) == pytest.approx(0.05, rel=0.03)
    assert 0.85 <= min(found) < 0.86 and 1.14 < max(found) <= 1.15


def test_stalls_come_as_often_and_take_as_long_as_was_said() -> None:
    found = factors(stall_share=0.02, stall_factor=7.0)
    assert set(found) == {1.0, 7.0} and found.count(7.0) == pytest.approx(400, rel=0.2)


def test_the_pace_is_a_step_function_of_time() -> None:
    truth = TrueLaw(law(), Disturbance(pace=[(1.0, 2.0), (3.0, 0.5)]))
    assert [truth.factor(now) for now in (0.0, 0.99, 1.0, 2.99, 3.0, 99.0)] == [1.0, 1.0, 2.0, 2.0, 0.5, 0.5]


def test_equal_seeds_give_equal_times() -> None:
    settings = {"noise": 0.1, "stall_share": 0.1}
    assert factors(100, seed=3, **settings) == factors(100, seed=3, **settings) != factors(100, seed=4, **settings)


def test_slopes_grow_and_constants_stay() -> None:
    terms = {("inference", "once", 0): 0.5, ("inference", "rows", 1): 0.0, ("inference", "rows", 4): 0.1,
             ("inference", "uncaptured", 0): 0.25,
             ("forward", "layers", 0): 0.2, ("forward", "rows", 0): 0.3, ("forward", "rows", 1): 0.01}
    truth = TrueLaw(LatencyModel(terms), Disturbance(slope=3.0, host_s=0.007)).law
    assert truth.pass_seconds(DECODE) == pytest.approx(0.5 + 4 * 0.3)
    assert truth.pass_seconds(DECODE._replace(decode_rows=7)) == pytest.approx(0.5 + 4 * 0.3 + 0.25)
    assert truth.unit_seconds(UnitCost(False, 1, 1, 0, 0)) == pytest.approx(0.2 + 0.3), "the first row reads the weights"
    assert truth.unit_seconds(UnitCost(False, 11, 1, 0, 0)) == pytest.approx(0.2 + 0.3 + 10 * 0.03)
    assert truth.constant_seconds == 0.007


@pytest.mark.parametrize("changes", [
    {"noise": -0.1}, {"noise": 0.34}, {"noise": float("nan")}, {"stall_share": 1.5}, {"stall_factor": 0.5}, {"slope": 0.0},
    {"slope": float("inf")}, {"host_s": -1e-3}, {"between_s": float("nan")}, {"pace": [(1.0, 1.0), (0.5, 1.0)]},
    {"pace": [(0.0, 0.0)]},
])
def test_impossible_disturbances_are_refused_by_name(changes: dict[str, float]) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        Disturbance(**changes)  # type: ignore[arg-type]
    assert caught.value.param == name
