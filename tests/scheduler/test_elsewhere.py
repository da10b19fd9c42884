"""What other engines served a tenant counts for its turns here, within limits."""

from __future__ import annotations

import pytest

from coserve.config.settings import SchedulerConfig
from coserve.scheduler import fairness
from coserve.scheduler.fairness import ELSEWHERE_SHARE, LEAD_TOKENS, ElsewhereCharges, TokenCounters
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.engine import SimulatedEngine
from tests.tiny_engine import LATENCY


def test_a_charge_counts_up_to_the_allowance() -> None:
    counters = TokenCounters()
    charges = ElsewhereCharges(counters)
    counters.charge("here", 1000)
    charges.charge({"away": 500}, ["here", "away"])
    assert counters.served("away") == 500
    charges.charge({"away": 10**6}, ["here", "away"])
    assert counters.served("away") == LEAD_TOKENS
    counters.charge("here", 400)
    charges.charge({"away": 10**6}, ["here", "away"])
    assert counters.served("away") == LEAD_TOKENS + ELSEWHERE_SHARE * 400


def test_nobody_is_charged_where_nobody_else_waits() -> None:
    counters = TokenCounters()
    charges = ElsewhereCharges(counters)
    charges.charge({"away": 10**6}, ["away"])
    charges.charge({"away": 10**6}, [])
    assert counters.served("away") == 0


def shares(elsewhere: int) -> dict[str, int]:
    """How many requests end of each of two tenants, whose requests are alike, where one tenant gets so many tokens elsewhere
    in every iteration."""
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, tpot_ms=50, ttft_ms=2000)
    engine = SimulatedEngine(config, LatencyModel(dict(LATENCY)))
    requests = [engine.submit(60, 4, at=number * 1e-6, tenant="here" if number % 2 else "away") for number in range(400)]
    for _ in range(200):
        engine.step()
        engine.scheduler.charge_elsewhere({"away": elsewhere})
    ended = [one for one in requests if one.finished_s is not None]
    return {"here": sum(one in ended for one in requests[1::2]), "away": sum(one in ended for one in requests[::2])}


def test_who_is_served_elsewhere_gets_less_here_and_not_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "LEAD_TOKENS", 500.0)
    even, uneven = shares(0), shares(1000)
    assert 0.8 < even["away"] / even["here"] < 1.25
    assert 0.05 < uneven["away"] / uneven["here"] < 0.5
