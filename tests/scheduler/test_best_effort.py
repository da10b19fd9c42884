"""Requests without objectives on the fake clock: nobody is promised anything, and nobody starves.

The law is that of test_starvation.py: a pass of 22 ms, 1.3 ms a row. By its profile TPOT is 47 ms and TTFT 5.6 s.
"""

from __future__ import annotations

import math
import random
from statistics import median
from typing import Any

import pytest

from coserve.config.settings import SchedulerConfig
from coserve.scheduler.prompts import LATE
from coserve.scheduler.requests import RequestState
from coserve.scheduler.slo import profile_slo
from coserve.simulation.engine import BASE_KEY
from coserve.simulation.requests import SimulatedRequest
from tests.checked_engine import CheckedEngine
from tests.fake_machine import law
from tests.scheduler.test_starvation import UNHURRIED_MS, closed_loop, machine, waits

NONE = math.inf
PASS, ROW = 0.022, 0.0013
PROFILE = profile_slo(machine())
JOB: dict[str, Any] = {"microbatches": [[256] * 4] * 4, "elements": 5_000_000}


def engine(policy: str = "coserve", **options: Any) -> CheckedEngine:
    """An engine whose requests are served by best effort, unless they or the options say otherwise."""
    config: dict[str, Any] = {"tpot_ms": "none", "ttft_ms": "none", "reserve": 0.05, **options}
    return CheckedEngine(SchedulerConfig(policy=policy, **config), machine(), num_layers=30, check_cache=False)


def token_s(request: SimulatedRequest) -> float:
    """Mean time of a token after the first."""
    times = request.token_times
    return (times[-1] - times[0]) / (len(times) - 1)


def decoding(fake: CheckedEngine, count: int, tokens: int = 4000) -> list[SimulatedRequest]:
    """So many requests whose prompts are through."""
    requests = [fake.submit(16, tokens) for _ in range(count)]
    while not all(request.token_times for request in requests):
        fake.step()
    return requests


# --- no job ---


@pytest.mark.parametrize("clients", [1, 8, 32])
def test_without_a_job_no_time_is_left_unused(clients: int) -> None:
    """Against an engine whose objectives are too long to matter: as much is served, and nobody waits longer."""
    unhurried = CheckedEngine(
        SchedulerConfig(policy="inference-only", tpot_ms=UNHURRIED_MS, ttft_ms=UNHURRIED_MS, reserve=0.05), machine(),
        num_layers=30, check_cache=False,
    )
    expected = closed_loop(clients, unhurried)
    fake = engine()
    sent = closed_loop(clients, fake)
    assert len(sent) >= 0.99 * len(expected)
    assert max(waits(sent)) <= 1.1 * max(waits(expected))
    for (start, plan), (next_start, _) in zip(fake.plans, fake.plans[1:], strict=False):
        assert plan.spans and next_start == pytest.approx(start + plan.predicted_s), "the next iteration follows at once"


def test_a_prompt_never_waits_for_requests_without_objectives() -> None:
    fake = engine()
    decoding(fake, 8)
    long = fake.submit(1500, 4)
    while not long.token_times:
        plan = fake.step()
        assert plan is not None and plan.prefill and len(plan.decode) == 8
        assert plan.predicted_s <= 0.25 + 1e-9, "somebody with objectives may come: they wait for one quantum"


# --- beside a job ---


@pytest.mark.parametrize("count", [1, 8, 64])
def test_a_job_and_best_effort_requests_both_advance(count: int) -> None:
    """A token takes twice the profile's TPOT at most, or twice what decoding takes; the job has the rest."""
    fake = engine()
    requests = decoding(fake, count)
    fake.add_job(**JOB)
    start, trained = fake.clock(), fake.runner.finetune_s
    fake.run(start + 30)
    alone_s = PASS + (count - 1) * ROW
    longest = 2 * max(PROFILE.tpot_s, alone_s)
    for request in requests:
        gaps = [b - a for a, b in zip(request.token_times, request.token_times[1:], strict=False) if a > start]
        assert max(gaps) <= longest + 1e-9
        assert len(gaps) >= 30 / longest - 2
    share = (fake.runner.finetune_s - trained) / (fake.clock() - start)
    assert 0.8 * (1 - alone_s / longest) <= share <= 1 - alone_s / longest + 1e-9


@pytest.mark.parametrize("clients", [8, 32])
def test_beside_a_job_best_effort_requests_come_and_go(clients: int) -> None:
    alone, fake = engine(), engine()
    fake.add_job(**JOB)
    expected, sent = closed_loop(clients, alone), closed_loop(clients, fake)
    assert len(sent) >= 0.45 * len(expected)
    assert max(waits(sent)) <= max(2 * max(waits(expected)), PROFILE.ttft_s)
    assert fake.runner.finetune_s >= 0.1 * 120


def test_the_server_s_own_longer_objective_bounds_best_effort_too() -> None:
    """Whoever asks for nothing gets no more than whoever takes the default."""
    paces = []
    for tpot_s in (None, NONE):
        fake = engine(tpot_ms=150.0, ttft_ms=9000.0)
        requests = [fake.submit(16, 200, tpot_s=tpot_s) for _ in range(4)]
        fake.add_job(**JOB)
        while any(request.finished_s is None for request in requests):
            fake.step()
        paces.append(median(map(token_s, requests)))
    assert 2 * PROFILE.tpot_s < paces[0] <= 0.15 + 1e-9 < paces[1] <= 0.3 + 1e-9


def test_a_shorter_objective_beside_best_effort_is_kept() -> None:
    fake = engine()
    background = decoding(fake, 6)
    fake.add_job(**JOB)
    promised = [fake.submit(128, 64, at=2.0 + 3 * i, tpot_s=0.08, ttft_s=3.0) for i in range(8)]
    fake.run(30.0)
    assert all(request.met for request in promised)
    assert all(len(request.token_times) > 30 / (2 * PROFILE.tpot_s) for request in background)
    assert fake.runner.finetune_s > 0.2 * fake.clock()


@pytest.mark.parametrize("tpot_s", [0.05, NONE])
def test_a_prompt_without_an_objective_is_late_in_time_beside_a_job(tpot_s: float) -> None:
    """A running request leaves no time for it, and its own objective never comes near: the profile's stands in."""
    slow = law(once=0.0995)  # decoding leaves next to nothing of 0.1 s
    ttft_s = profile_slo(slow).ttft_s
    fake = CheckedEngine(SchedulerConfig(tpot_ms=100.0, ttft_ms=3000.0, reserve=0.0), slow, check_cache=False)
    decoding(fake, 1, 60)
    fake.add_job([[500]] * 4)
    request = fake.submit(64, 2, ttft_s=NONE, tpot_s=tpot_s)
    start = fake.clock()
    fake.run(start + 2 * ttft_s)
    assert request.token_times and 0.8 * ttft_s < request.token_times[0] - start < ttft_s


def test_prompts_with_an_objective_come_first() -> None:
    fake = engine(max_num_batched_tokens=64)
    patient = [fake.submit(200, 2) for _ in range(3)]
    urgent = fake.submit(200, 2, ttft_s=9.0)
    fake.run()
    assert urgent.token_times[0] < min(request.token_times[0] for request in patient[1:])
    begun = [request.state.begun_s or 0.0 for request in patient]
    assert begun == sorted(begun), "among themselves in order of arrival"


def test_a_deterministic_job_s_long_unit_comes_seldom() -> None:
    fake = engine()
    requests = decoding(fake, 8)
    fake.add_job([[1024]] * 2, grid=128, elements=1000)
    start = fake.clock()
    fake.run(start + 30)
    assert fake.runner.units
    assert all(sum(time > start for time in request.token_times) > 100 for request in requests)


@pytest.mark.parametrize("count", [1, 8, 40])
def test_taking_turns_neither_side_waits_for_ever(count: int) -> None:
    """dynamic-temporal runs a micro-batch when all can wait, as requests without objectives always could."""
    fake = engine("dynamic-temporal")
    requests = decoding(fake, count)
    fake.add_job(**JOB)
    start, trained = fake.clock(), fake.runner.finetune_s
    fake.run(start + 60)
    share = (fake.runner.finetune_s - trained) / (fake.clock() - start)
    assert 0.3 < share < 0.6
    assert all(sum(time > start for time in request.token_times) * (PASS + count * ROW) > 20 for request in requests)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(4, 8))])
def test_random_loads_with_and_without_objectives_beside_a_job(seed: int) -> None:
    """Nobody waits longer than twice first come, first served, or than their objective; the profile's where they have none.

    Beside a job a prompt is late at LATE of that objective. The pass that has begun by then, and its own, may be long.
    """
    rng = random.Random(seed)
    load, at = rng.choice([0.3, 0.8, 1.5, 3.0]), 0.0
    asked = []
    while (at := at + rng.expovariate(2.9 * load)) < 30.0:
        asked.append({
            "prompt": rng.choice([20, 128, 700]), "max_tokens": rng.choice([1, 4, 64, 150]), "at": at,
            "tpot_s": rng.choice([0.001, 0.1, NONE, NONE]), "ttft_s": rng.choice([0.001, 3.0, NONE, NONE]),
        })
    plain, fake = engine("inference-only", tpot_ms=UNHURRIED_MS, ttft_ms=UNHURRIED_MS), engine()
    fcfs = [plain.submit(item["prompt"], item["max_tokens"], at=item["at"]) for item in asked]
    plain.run()
    fake.add_job(**JOB, steps=40)
    requests = [fake.submit(**item) for item in asked]
    fake.run()
    longest = max(plan.predicted_s for _, plan in fake.plans)
    for request, wait, plain_wait in zip(requests, waits(requests), waits(fcfs), strict=True):
        allowed = request.state.ttft_s if request.state.ttft_s < NONE else PROFILE.ttft_s
        assert wait <= max(max(2 * plain_wait, allowed) + longest, LATE * allowed + 2 * longest)


# --- a request's own figures ---


@pytest.mark.parametrize("max_tokens", [1, 5])
@pytest.mark.parametrize("reserve", [0.0, 0.2])
@pytest.mark.parametrize(("tpot_s", "ttft_s"), [(NONE, NONE), (NONE, 2.0), (0.1, NONE)])
def test_no_figure_of_a_request_without_objectives_is_undefined(
    max_tokens: int, reserve: float, tpot_s: float, ttft_s: float
) -> None:
    state = RequestState(id=1, tenant="", prompt=[1, 2], max_tokens=max_tokens, key=BASE_KEY, arrival_s=1.0, ttft_s=ttft_s,
                         tpot_s=tpot_s)

    def figures() -> list[float]:
        return [state.deadline_s, state.slack_s(1.5, reserve, 0.1), state.feasible_until_s(0.02)]

    assert figures() == pytest.approx([NONE] * 3 if ttft_s == NONE else [3.0, 1.5, 3.0])
    state.in_flight = 1  # sampled by a plan that isn't committed
    assert not any(map(math.isnan, figures())) and (figures()[1] == NONE) == (ttft_s == NONE)
    state.in_flight, state.first_token_s = 0, 2.0
    state.output.append(7)
    assert not any(map(math.isnan, figures())) and (figures()[0] == NONE) == (tpot_s == NONE)
    assert (figures()[1] == NONE) == (tpot_s == NONE) and not state.infeasible(1.0, 0.02)
