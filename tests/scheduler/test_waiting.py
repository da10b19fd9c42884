"""Ten thousand requests that wait: in the same order as a plain sort, and cheap for every iteration."""

from __future__ import annotations

import random
import time
from statistics import median

import pytest

from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.waiting import WaitingRequests, is_overdue
from tests.checked_engine import CheckedEngine
from tests.fake_machine import decoding, engine


def request(number: int, rng: random.Random) -> RequestState:
    """Of one of five tenants; every fifth was preempted with tokens."""
    state = RequestState(
        id=number, tenant=rng.choice("abcde"), prompt=[1, 2, 3], max_tokens=8, key=PrefixKey("", None, 0),
        arrival_s=rng.choice([0.0, 1.0, rng.uniform(0, 9)]), ttft_s=rng.choice([0.5, 1.0, 6.0]), tpot_s=0.2,
        fcfs_s=rng.uniform(0, 12),
    )
    if rng.random() < 0.2:
        state.output, state.first_token_s = [5] * rng.randrange(1, 9), rng.uniform(0, 9)
        state.in_flight = rng.choice([0, 0, 1])
    return state


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_that_of_a_sort(seed: int) -> None:
    rng = random.Random(seed)
    waiting, kept = WaitingRequests(), {}
    for number in range(200):
        kept[number] = request(number, rng)
        waiting.add(kept[number])
        if rng.random() < 0.3:
            gone = kept.pop(rng.choice(list(kept)))
            waiting.discard(gone)
            waiting.discard(gone)
    assert len(waiting) == len(kept)
    served = {tenant: rng.choice([0.0, 1.0, 2.5]) for tenant in "abcde"}
    for now in (0.0, 1.0, 1.5, 4.0, 20.0):
        come: dict[str, list[RequestState]] = {}
        for r in sorted((r for r in kept.values() if not r.num_sampled), key=lambda r: (r.fcfs_s, r.id)):
            come.setdefault(r.tenant, []).append(r)
        overdue = {tenant for tenant, states in come.items() if is_overdue(states[0], now)}
        assert waiting.overdue(now) == overdue
        expected = sorted(
            (r for r in kept.values() if not r.in_flight and not r.sampled_enough),
            key=lambda r: (served[r.tenant], r.fcfs_s if r.tenant in overdue else r.arrival_s + r.ttft_s, r.id),
        )
        assert [r.id for r in waiting.in_order(served.__getitem__, overdue)] == [r.id for r in expected]


def test_admitting_while_looking() -> None:
    rng = random.Random(0)
    waiting = WaitingRequests()
    requests = [request(number, rng) for number in range(50)]
    for state in requests:
        waiting.add(state)
    seen = []
    for place, state in enumerate(waiting.in_order(lambda tenant: 0.0, {"a"})):
        seen.append(state.id)
        waiting.discard(state)
        if place % 3 == 0:
            waiting.add(state)  # it found no memory
    assert len(seen) == len(set(seen)) and len(waiting) < 50


def flooded(num_waiting: int, tenants: int) -> CheckedEngine:
    """64 requests decode, a job trains, and so many wait."""
    fake = engine(num_blocks=1 << 14)
    for _ in range(64):
        decoding(fake, 5000)
    fake.add_job([[500]] * 4)
    for number in range(num_waiting):
        fake.submit(50, 20, tenant=f"tenant-{number % tenants}", ttft_s=1e6)
    fake.step()
    assert fake.scheduler.num_waiting == num_waiting and fake.scheduler.num_running == 64
    return fake


def schedule_seconds(fake: CheckedEngine, iterations: int, *, freeing: bool) -> float:
    """Median time of the scheduler itself. freeing: a running request ends before each iteration, so that one is admitted."""
    scheduler, times = fake.scheduler, []
    schedule = scheduler.schedule

    def timed(now: float) -> object:
        started = time.perf_counter()
        plan = schedule(now)
        times.append(time.perf_counter() - started)
        return plan

    scheduler.schedule = timed  # type: ignore[method-assign, assignment]
    for _ in range(iterations):
        if freeing:
            scheduler.remove_request(next(iter(scheduler.requests)))
        fake.step()
    return median(times[-iterations:])


@pytest.mark.parametrize("freeing", [False, True], ids=["full", "admitting"])
def test_an_iteration_does_not_look_at_all_that_wait(freeing: bool) -> None:
    """Against the same engine with few waiting, so that the machine's speed and load hardly matter."""
    few = schedule_seconds(flooded(100, 20), 15, freeing=freeing)
    many = schedule_seconds(flooded(10_000, 20), 15, freeing=freeing)
    assert many < 3 * few + 1e-3, (few, many)
