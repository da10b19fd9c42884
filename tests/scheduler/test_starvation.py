"""Nobody waits much longer than if requests were served as they come, whatever load and objectives are; on the fake clock.

The law is that of a small processor: 22 ms for a pass, 1.3 ms a row, so that 128 tokens in and 64 out at 32 clients are more
than objectives of 100 ms per token leave time for.
"""

from __future__ import annotations

import random

import pytest

from coserve.config.settings import SchedulerConfig
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.requests import SimulatedRequest
from tests.checked_engine import CheckedEngine
from tests.fake_machine import law

UNHURRIED_MS = 1e9


def machine() -> LatencyModel:
    return law(once=0.022, row=0.0013, layers=0.001, row_layer=0.00004)


def make_engine(policy: str = "coserve", *, tpot_ms: float = 100.0, ttft_ms: float = 3000.0) -> CheckedEngine:
    config = SchedulerConfig(policy=policy, tpot_ms=tpot_ms, ttft_ms=ttft_ms, reserve=0.05)
    return CheckedEngine(config, machine(), num_layers=30, check_cache=False)


def waits(requests: list[SimulatedRequest]) -> list[float]:
    """Seconds from arrival to the first token."""
    return [request.token_times[0] - request.state.arrival_s for request in requests]


def closed_loop(num_clients: int, fake: CheckedEngine, seconds: float = 120.0) -> list[SimulatedRequest]:
    """Each client sends its next request when the last one has ended. All that had begun to be sent by the end are served."""
    current = [fake.submit(128, 64) for _ in range(num_clients)]
    sent = list(current)
    while fake.clock() < seconds:
        fake.step()
        for client, request in enumerate(current):
            if request.finished_s is not None:
                current[client] = fake.submit(128, 64)
                sent.append(current[client])
    fake.jobs.clear()
    fake.scheduler.jobs.clear()
    fake.run()
    return sent


@pytest.mark.parametrize("job", [False, True], ids=["alone", "job"])
@pytest.mark.parametrize("num_clients", [8, 16, 32])
def test_clients_in_a_closed_loop_are_all_served(num_clients: int, job: bool) -> None:
    unhurried = closed_loop(num_clients, make_engine("inference-only", tpot_ms=UNHURRIED_MS, ttft_ms=UNHURRIED_MS))
    fake = make_engine()
    if job:
        fake.add_job([[256] * 4] * 4, elements=5_000_000)
    sent = closed_loop(num_clients, fake)
    longest = max(waits(sent))
    assert longest <= max(1.5 * max(waits(unhurried)), 3.2)
    assert job or len(sent) >= 0.95 * len(unhurried), "throughput of an engine without objectives"
    assert num_clients > 16 or all(request.met for request in sent[2 * num_clients:]) or job


def arrivals(rng: random.Random, load: float) -> list[dict[str, float]]:
    """Thirty seconds of requests, Poisson, at a share of what the machine can do."""
    found, at = [], 0.0
    while (at := at + rng.expovariate(1.0)) < 30.0 * load * 2.9:
        found.append({
            "prompt": rng.choice([20, 128, 128, 700]), "max_tokens": rng.choice([4, 64, 64, 150]), "at": at / (load * 2.9),
            "tpot_s": rng.choice([0.001, 0.05, 0.1, 2.0]), "ttft_s": rng.choice([0.001, 0.5, 3.0, 60.0]),
        })
    return found


def served(load: list[dict[str, float]], fake: CheckedEngine, *, hurried: bool) -> list[SimulatedRequest]:
    keys = ("prompt", "max_tokens", "at") if not hurried else tuple(load[0])
    requests = [fake.submit(**{key: item[key] for key in keys}) for item in load]  # type: ignore[arg-type]
    fake.run()
    return requests


@pytest.mark.parametrize("seed", range(12))
def test_nobody_waits_twice_as_long_as_first_come_first_served(seed: int) -> None:
    """Up to three times what the machine can do, with objectives that can and can't be met. An iteration can't be
    interrupted: the longest one is allowed on top."""
    rng = random.Random(seed)
    load = arrivals(rng, rng.choice([0.3, 0.8, 1.5, 3.0]))
    fcfs = served(load, make_engine("inference-only", tpot_ms=UNHURRIED_MS, ttft_ms=UNHURRIED_MS), hurried=False)
    fake = make_engine()
    fair = served(load, fake, hurried=True)
    longest = max(plan.predicted_s for _, plan in fake.plans)
    late = [(a, b) for a, b in zip(waits(fair), waits(fcfs), strict=True) if a > 2 * b + longest]
    assert not late


@pytest.mark.parametrize("seed", range(6))
def test_a_job_makes_nobody_late(seed: int) -> None:
    """Beside a job a request waits as long as its own objective allows, or as long as without one."""
    rng = random.Random(seed)
    load = arrivals(rng, rng.choice([0.3, 0.8, 1.5, 3.0]))
    fcfs = served(load, make_engine("inference-only", tpot_ms=UNHURRIED_MS, ttft_ms=UNHURRIED_MS), hurried=False)
    fake = make_engine()
    fake.add_job([[256] * 4] * 4, elements=5_000_000, steps=40)
    fair = served(load, fake, hurried=True)
    longest = max(plan.predicted_s for _, plan in fake.plans)
    late = [
        (r.state.id, a, b) for r, a, b in zip(fair, waits(fair), waits(fcfs), strict=True)
        if a > max(2 * b, r.state.ttft_s) + longest
    ]
    assert not late
