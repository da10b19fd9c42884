"""Shares of tenants before anything is done for them: places in the queue, threads that read, amounts held."""

from __future__ import annotations

import asyncio
import threading
import time
from random import Random

import pytest

from coserve.core import CapacityError
from coserve.server.places import Claim, Places
from coserve.server.work import Allowance, WorkPool


class Tried:
    """Places, and who was refused."""

    def __init__(self, capacity: int, most: int | None = None) -> None:
        self.places, self.refused = Places(capacity, most), list[str]()

    def take(self, tenant: str, count: int = 1, name: str = "") -> Claim:
        return self.places.take(tenant, count, lambda error: self.refused.append(name or tenant))


def test_a_tenant_alone_may_have_all_places() -> None:
    tried = Tried(10)
    tried.take("a", 10)
    with pytest.raises(CapacityError, match="of at most 10"):
        tried.take("a")
    assert tried.refused == []


def test_who_floods_gives_way_to_who_comes() -> None:
    tried = Tried(10)
    for number in range(5):
        tried.take("a", 2, f"a{number}")
    tried.take("b", 4)
    assert tried.refused == ["a4", "a3"], "the newest first, no more than needed"
    tried.take("b", 1)
    assert tried.refused == ["a4", "a3", "a2"]
    tried.take("b", 1)  # there is room for it
    for tenant, count in (("b", 1), ("a", 2)):
        with pytest.raises(CapacityError, match="your share is 5"):
            tried.take(tenant, count)
    tried.take("c", 3)
    assert tried.refused == ["a4", "a3", "a2", "b", "b", "a1"], "whoever holds the most"


def test_one_that_has_begun_goes_on_if_another_has_not() -> None:
    tried = Tried(4)
    tried.take("a", 1, "old")
    new = tried.take("a", 3, "new")
    new.begun = True
    tried.take("b", 1)
    assert tried.refused == ["old"]
    tried.take("b", 1)
    assert tried.refused == ["old", "new"], "there is none that hasn't begun"


def test_places_come_back_as_outputs_end() -> None:
    tried = Tried(4)
    claim = tried.take("a", 4)
    tried.places.give_back(claim, 1)
    tried.take("a", 1)
    tried.places.give_back(claim)
    tried.places.give_back(claim)
    tried.take("a", 3)
    with pytest.raises(CapacityError):
        tried.take("a", 1)


def test_a_tenant_may_have_a_limit_of_its_own() -> None:
    tried = Tried(10, most=3)
    tried.take("a", 3)
    with pytest.raises(CapacityError, match="of at most 3"):
        tried.take("a")
    tried.take("b", 3)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_within_its_share_is_refused(seed: int) -> None:
    """Whatever tenants do: a request that leaves its tenant within capacity / tenants is taken; no more is held than fits."""
    draw = Random(seed)
    places, live = Places(24), list[Claim]()

    def held(tenant: str) -> int:
        return sum(claim.count for claim in live if claim.tenant == tenant)

    def refuse(claim: list[Claim]) -> None:
        live.remove(claim[0])

    for _ in range(500):
        tenant, count = draw.choice("abcde"), draw.choice((1, 1, 2, 5, 12))
        if live and draw.random() < 0.3:
            claim = live.pop(draw.randrange(len(live)))
            places.give_back(claim)
            continue
        share = 24 // len({tenant, *(claim.tenant for claim in live)})
        mine: list[Claim] = []
        try:
            mine.append(places.take(tenant, count, lambda error, mine=mine: refuse(mine)))  # type: ignore[misc]
        except CapacityError:
            assert held(tenant) + count > share
        else:
            live.append(mine[0])
        assert sum(claim.count for claim in live) <= 24


def test_work_of_tenants_is_done_in_turn() -> None:
    async def play() -> list[str]:
        pool, done = WorkPool(num_threads=2), list[str]()

        async def one(tenant: str, seconds: float) -> None:
            await pool.run(tenant, lambda: time.sleep(seconds))
            done.append(tenant)

        flood = [asyncio.create_task(one("a", 0.05)) for _ in range(10)]
        await asyncio.sleep(0.01)
        await one("b", 0.0)
        assert done.count("a") <= 1, "a thread is left to others"
        await asyncio.gather(*flood)
        pool.close()
        return done

    assert asyncio.run(play()).count("a") == 10


def test_work_fails_where_it_was_asked_for_and_cancelled_work_gives_its_turn_back() -> None:
    async def play() -> None:
        pool, gate = WorkPool(num_threads=1, max_waiting=3), threading.Event()
        with pytest.raises(ZeroDivisionError):
            await pool.run("a", lambda: 1 // 0)
        blocked = asyncio.create_task(pool.run("a", gate.wait))
        await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(pool.run("a", lambda: 1)) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(CapacityError, match="try again later"):
            await pool.run("a", lambda: 1)
        for task in (*waiting[:2], blocked):
            task.cancel()
        await asyncio.gather(*waiting[:2], blocked, return_exceptions=True)
        gate.set()
        assert await asyncio.wait_for(waiting[2], 5) == 1
        assert await asyncio.wait_for(pool.run("b", lambda: 2), 5) == 2
        pool.close()

    asyncio.run(play())


def test_an_allowance_is_each_tenant_s_own() -> None:
    allowance = Allowance(2, "too many")
    with allowance.hold("a", 2):
        with pytest.raises(CapacityError, match="too many"), allowance.hold("a"):
            pass
        with allowance.hold("b", 5):  # one is always taken, however large
            pass
    with allowance.hold("a"):
        pass
