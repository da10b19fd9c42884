"""Many replicas on a virtual clock: no request is lost, load is even, adapters are found where they are."""

from __future__ import annotations

import time

import pytest

from coserve.cluster.load import Ask
from coserve.cluster.router import Router
from coserve.simulation.fleet import Burst, Death, FleetLayout, FleetResult, FleetTraffic, SimulatedFleet
from coserve.simulation.replica import ReplicaSpeeds


def run(policy: str, size: int, traffic: FleetTraffic, **layout: object) -> FleetResult:
    fleet = SimulatedFleet(FleetLayout(num_replicas=size, policy=policy, **layout), traffic)  # type: ignore[arg-type]
    result = fleet.run(traffic.duration_s + 60)
    for router in fleet.routers:
        router.check_integrity()
    assert all(request.finished_s is not None for request in result.requests), "no request is lost"
    assert all(not replica.live for replica in fleet.replicas.values()), "and none runs twice"
    return result


SMALL = FleetTraffic(
    rate=64, duration_s=5, num_adapters=300, bursts=(Burst(2.0, 30, "cold-1"),), deaths=(Death(2.5, 1, 1.0),), seed=3,
)


def test_a_small_fleet_loses_nothing_and_finds_adapters() -> None:
    speeds = ReplicaSpeeds(slots=48)
    routed, random = (run(policy, 8, SMALL, num_ingresses=2, speeds=speeds) for policy in ("router", "random"))
    ours, theirs = routed.figures(), random.figures()
    assert ours["resent"] > 0 and ours["lost"] == 0
    assert ours["hits"] > theirs["hits"] + 0.15 and ours["cached"] > theirs["cached"]
    assert ours["ttft_p50_s"] < theirs["ttft_p50_s"] and ours["late"] == 0
    assert routed.copies["cold-1"] <= 3 < random.copies["cold-1"], "a cold burst does not load everywhere"


@pytest.mark.full
def test_a_hundred_replicas_and_ten_thousand_adapters() -> None:
    """Measure 1 of the issue; bench/router.py prints the same for longer runs."""
    traffic = FleetTraffic(
        rate=1100, duration_s=10, num_adapters=10_000,
        bursts=tuple(Burst(2.0 + number, 100, f"cold-{number}") for number in range(5)),
        deaths=tuple(Death(3.0 + number, 7 * number, 3.0) for number in range(5)),
    )
    ours, theirs = (run(policy, 100, traffic).figures() for policy in ("router", "random"))
    assert ours["resent"] > 20 and ours["lost"] == 0
    assert ours["most_work"] < 0.2 and ours["least_work"] < 0.2
    assert ours["hits"] > 2 * theirs["hits"] and ours["late"] < 0.01


@pytest.mark.full
def test_a_choice_is_fast_at_a_hundred_replicas() -> None:
    fleet = SimulatedFleet(FleetLayout(num_replicas=100), FleetTraffic(rate=700, duration_s=2, num_adapters=10_000))
    fleet.run(2.0)
    router, asks = fleet.routers[0], [request.ask for request in fleet.requests]
    best = min(_seconds(router, asks[start : start + 100], fleet.now_s) for start in range(0, 1300, 100))
    assert best < 200e-6


def _seconds(router: Router, asks: list[Ask], now: float) -> float:
    """Of the process's own time, for one choice."""
    began = time.process_time()
    for ask in asks:
        router.choose(ask, now)
    return (time.process_time() - began) / len(asks)
