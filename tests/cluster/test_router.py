"""The router rule by rule, then random walks: requests and replicas come and go, reports come late or not at all."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from coserve.cluster.affinity import name_hash, rendezvous_order
from coserve.cluster.load import Ask, Choice, Load, NoReplica
from coserve.cluster.router import PATIENCE_S, SPARE_HOMES, STALE_S, Router
from coserve.cluster.table import REPORT_LAG_S
from coserve.core import CapacityError

BLOCK = 16
FAST = {"prefill_s_per_token": 1e-4, "iteration_s": 0.01, "output_s": 1e-3}


def load(replica: str, number: int = 1, **changes: Any) -> Load:
    fields = {**FAST, "free_blocks": 1000, "num_blocks": 1000, "block_tokens": BLOCK, "adapter_load_s": 0.05, **changes}
    return Load(replica=replica, number=number, **fields)


def router(*loads: Load, now: float = 0.0, **options: Any) -> Router:
    made = Router(**options)
    for one in loads:
        made.report(one, now)
    return made


def choices(made: Router, ask: Ask, now: float = 0.0, times: int = 200) -> Counter[str]:
    """How often each replica is chosen if nothing is sent."""
    return Counter(made.choose(ask, now).replica for _ in range(times))


def send(made: Router, id: object, ask: Ask, now: float = 0.0) -> Choice:
    choice = made.choose(ask, now)
    made.sent(id, choice, ask, now)
    return choice


def homes(adapter: str, names: list[str]) -> list[str]:
    """All replicas by their rank for an adapter."""
    order = rendezvous_order(adapter, np.array([name_hash(name) for name in names], np.uint64))
    return [names[place] for place in order]


# --- what would one wait ---


def test_nothing_is_known_at_first() -> None:
    with pytest.raises(NoReplica):
        Router().choose(Ask(10), 0.0)


def test_the_prediction_is_queue_and_own_prompt_and_iteration_and_load() -> None:
    made = router(load("a", queued_prompt_tokens=2000, resident=["x"]))
    assert made.choose(Ask(1000), 0.0).predicted_ttft_s == pytest.approx(0.2 + 0.1 + 0.011)
    assert made.choose(Ask(1000, adapter="x"), 0.0).predicted_ttft_s == pytest.approx(0.311)
    there = made.choose(Ask(1000, adapter="y", outputs=2), 0.0)
    assert there.predicted_ttft_s == pytest.approx(0.312 + 0.05) and not there.resident and there.feasible


def test_the_longest_known_prefix_is_not_computed() -> None:
    made = router(load("a", prefixes=[1, 2, 3, 9]), load("b", prefixes=[1, 2, 3, 4, 5]), load("c"))
    ask = Ask(1000, blocks=(1, 2, 3, 4, 5, 6))
    assert choices(made, ask) == {"b": 200}
    assert made.choose(ask, 0.0).uncached_tokens == 1000 - 5 * BLOCK
    assert made.choose(ask, 0.0, exclude={"b"}) == Choice("a", pytest.approx(0.0952 + 0.011), True, True, 1000 - 3 * BLOCK)
    assert made.choose(Ask(5 * BLOCK, blocks=(1, 2, 3, 4, 5)), 0.0).uncached_tokens == 1, "the last row is always computed"
    made.report(load("b", 2, prefixes=None), 0.0)
    assert made.choose(ask, 0.0).replica == "b", "no list: as before"
    made.report(load("b", 3, prefixes=[]), 0.0)
    assert made.choose(ask, 0.0).replica == "a"


def test_a_prefix_is_not_worth_a_longer_queue() -> None:
    ask = Ask(1000, blocks=tuple(range(50)))
    made = router(load("a", prefixes=list(range(50)), queued_prompt_tokens=9000), load("b"))
    assert choices(made, ask) == {"b": 200}


def test_a_wait_for_places_or_memory_counts() -> None:
    made = router(load("a", running=4, waiting=2, max_running=4, end_s=0.5), load("b", running=4, max_running=8))
    assert made.choose(Ask(10), 0.0).replica == "b"
    assert made.choose(Ask(10), 0.0, exclude={"b"}).predicted_ttft_s == pytest.approx(1.5 + 0.001 + 0.011)
    made = router(load("a", running=10, free_blocks=2, end_s=0.5))  # 99.8 blocks come free with each end
    assert made.choose(Ask(102 * BLOCK - 1), 0.0).predicted_ttft_s == pytest.approx(100 * 0.5 / 99.8 + 0.1631 + 0.011)


def test_feasible_is_both_objectives() -> None:
    made = router(load("a", running=9, iteration_s=0.05), load("b", queued_prompt_tokens=5000))
    assert made.choose(Ask(10, tpot_s=0.02), 0.0).replica == "b"
    assert made.choose(Ask(10, ttft_s=0.2), 0.0).replica == "a"
    neither = made.choose(Ask(10, ttft_s=0.2, tpot_s=0.02), 0.0)
    assert not neither.feasible


def test_the_least_late_serves_what_nobody_can_in_time() -> None:
    made = router(load("a", queued_prompt_tokens=90_000), load("b", queued_prompt_tokens=50_000))
    late = made.choose(Ask(10, ttft_s=1.0), 0.0)
    assert late.replica == "b" and not late.feasible and late.predicted_ttft_s > 5


def test_a_request_is_refused_only_where_all_queues_are_over_their_bound() -> None:
    full = {"running": 4, "max_running": 4, "max_waiting": 2}
    made = router(load("a", waiting=2, **full), load("b", waiting=1, queued_prompt_tokens=10**6, **full))
    assert made.choose(Ask(10), 0.0).replica == "b"
    with pytest.raises(CapacityError) as caught:
        made.choose(Ask(10, outputs=2), 0.0)
    assert caught.value.param == "max_waiting"
    send(made, 1, Ask(10))
    with pytest.raises(CapacityError):
        made.choose(Ask(10), 0.0)
    made.ended(1)
    assert made.choose(Ask(10), 0.0).replica == "b"
    assert made.summary().refused == 2


# --- which replicas ---


def test_draining_and_excluded_replicas_get_nothing() -> None:
    made = router(load("a", draining=True), load("b"), load("c"))
    assert choices(made, Ask(10)).keys() == {"b", "c"}
    assert made.choose(Ask(10), 0.0, exclude={"b", "unknown"}).replica == "c"
    with pytest.raises(NoReplica):
        made.choose(Ask(10), 0.0, exclude={"b", "c"})


def test_a_suspect_replica_is_used_only_if_there_is_no_other() -> None:
    made = router(load("a"), load("b", queued_prompt_tokens=10**5))
    made.report(load("b", 2, queued_prompt_tokens=10**5), STALE_S + 0.1)
    now = STALE_S + 0.2
    assert choices(made, Ask(10), now).keys() == {"b"} and made.summary(now).suspect == 1
    made.remove("b")
    assert made.choose(Ask(10), now).replica == "a"


def test_a_removed_replica_is_gone_until_it_reports_again() -> None:
    made = router(load("a"), load("b", resident=["x"], prefixes=[1]))
    send(made, 1, Ask(10))
    made.remove("b")
    made.remove("b")
    assert choices(made, Ask(50, blocks=(1,), adapter="x")).keys() == {"a"}
    made.report(load("c"), 0.0)  # which gets the free place
    assert not made.choose(Ask(50, blocks=(1,), adapter="x"), 0.0).resident
    made.report(load("b", 1), 0.0)
    assert set(made.replicas) == {"a", "b", "c"}
    made.check_integrity()


def test_old_reports_are_ignored_but_a_new_start_counts() -> None:
    made = router(load("a", 7, queued_prompt_tokens=1000))
    made.report(load("a", 6, queued_prompt_tokens=0), 0.1)
    assert made.choose(Ask(10), 0.1).predicted_ttft_s > 0.1
    made.report(load("a", 1, queued_prompt_tokens=0), STALE_S + 0.5)
    assert made.choose(Ask(10), STALE_S + 0.5).predicted_ttft_s < 0.1


def test_equals_are_drawn_at_random_and_the_worse_of_two_loses() -> None:
    made = router(*(load(name) for name in "abcdefgh"))
    drawn = choices(made, Ask(10), times=800)
    assert drawn.keys() == set("abcdefgh") and min(drawn.values()) > 50
    other = router(*(load(name) for name in "abcdefgh"), seed=1)
    assert [other.choose(Ask(10), 0.0).replica for _ in range(20)] != [made.choose(Ask(10), 0.0).replica for _ in range(20)]


# --- the router's own requests ---


def test_own_requests_count_until_a_report_has_them() -> None:
    made = router(load("a"))
    before = made.choose(Ask(1000), 0.0).predicted_ttft_s
    send(made, 1, Ask(1000), now=0.0)
    assert made.choose(Ask(1000), 0.0).predicted_ttft_s == pytest.approx(before + 0.1 + 0.001)
    made.report(load("a", 2), REPORT_LAG_S / 2)
    assert made.choose(Ask(1000), 0.0).predicted_ttft_s > before, "it may have been under way"
    made.report(load("a", 3, queued_prompt_tokens=1000, running=1), 0.1)
    assert made.choose(Ask(1000), 0.1).predicted_ttft_s == pytest.approx(before + 0.1), "once, not twice"


def test_a_prompt_counts_until_its_first_token_and_an_output_until_its_end() -> None:
    made = router(load("a"))
    before = made.choose(Ask(1000), 0.0).predicted_ttft_s
    send(made, 1, Ask(1000))
    made.first_token(1, 0.01)
    made.first_token(1, 0.02)
    assert made.choose(Ask(1000), 0.0).predicted_ttft_s == pytest.approx(before + 0.001)
    made.ended(1)
    made.ended(1)
    assert made.choose(Ask(1000), 0.0).predicted_ttft_s == pytest.approx(before) and not made.num_under_way


def test_a_burst_does_not_herd_between_two_reports() -> None:
    made = router(*(load(name) for name in "abcd"))
    sent = Counter(send(made, number, Ask(400)).replica for number in range(80))
    assert max(sent.values()) <= 24


def test_a_burst_counts_for_the_other_routers_too() -> None:
    """They see the same reports, and are likely to send as much."""
    alone, one_of_five = router(load("a")), router(load("a"), num_routers=5)
    waits = [[], []]  # type: list[list[float]]
    for number in range(6):
        for made, found in zip((alone, one_of_five), waits, strict=True):
            found.append(send(made, number, Ask(1000, max_tokens=1)).predicted_ttft_s)
    assert waits[0][:3] == waits[1][:3] and waits[0][5] == pytest.approx(0.5 + 0.1 + 0.016)
    assert waits[1][5] == pytest.approx((5 + 4 * 3) * 0.1 + 0.1 + 0.01 + 0.001 * (5 + 4 * 3 + 1))
    one_of_five.num_routers = 1
    one_of_five.report(load("a", 2), 1.0)
    assert one_of_five.choose(Ask(1000), 1.0).predicted_ttft_s == pytest.approx(0.111)


def test_a_request_that_is_sent_again_counts_once() -> None:
    made = router(load("a"), load("b"))
    first = send(made, 1, Ask(1000))
    other = made.choose(Ask(1000), 0.0, exclude={first.replica})
    made.sent(1, other, Ask(1000), 0.0)
    assert made.num_under_way == 1
    made.check_integrity()
    made.remove(other.replica)
    made.first_token(1, 0.1)
    made.ended(1)
    made.check_integrity()


# --- adapters ---


def test_a_request_stays_with_its_adapter_unless_a_home_costs_clearly_less() -> None:
    made = router(load("a", resident=["x"], queued_prompt_tokens=800), load("b"))
    ask = Ask(100, adapter="x", ttft_s=1.0)
    assert choices(made, ask) == {"a": 200} and made.choose(ask, 0.0).resident
    assert choices(made, ask._replace(adapter=None)) == {"b": 200}
    made.report(load("a", 2, resident=["x"], queued_prompt_tokens=3000), 0.0)
    assert choices(made, ask) == {"b": 200}, "although it has to be loaded there"


def test_a_request_leaves_the_homes_only_where_they_are_not_comfortable() -> None:
    names = [f"r{number}" for number in range(20)]
    ranked = homes("x", names)
    made = router(*(load(name) for name in names))
    ask, number = Ask(100, adapter="x", ttft_s=1.0), 1

    def busy(seconds: float) -> None:
        nonlocal number
        number += 1
        for name in ranked[: 1 + SPARE_HOMES]:
            made.report(load(name, number, resident=["x"], queued_prompt_tokens=int(1e4 * seconds)), 0.0)

    busy(0.4)
    assert choices(made, ask).keys() == set(ranked[: 1 + SPARE_HOMES]), "others are idle, and would have to load it"
    busy(0.6)
    assert choices(made, ask).keys() == {ranked[1 + SPARE_HOMES]}, "half of the objective is gone"
    assert choices(made, ask._replace(ttft_s=math.inf)).keys() == set(ranked[: 1 + SPARE_HOMES]), "best effort is patient"
    busy(PATIENCE_S)
    assert choices(made, ask._replace(ttft_s=math.inf)).keys() == {ranked[1 + SPARE_HOMES]}, "not for ever"


def test_where_nothing_is_comfortable_adapters_are_not_loaded_for_nothing() -> None:
    names = [f"r{number}" for number in range(20)]
    made = router(*(load(name, queued_prompt_tokens=30_000, resident=["x"] if name == "r5" else []) for name in names))
    assert choices(made, Ask(100, adapter="x", ttft_s=1.0)).keys() == {"r5"}
    made.report(load("r5", 2, queued_prompt_tokens=60_000, resident=["x"]), 0.0)
    assert "r5" not in choices(made, Ask(100, adapter="x", ttft_s=1.0))


def test_a_cold_adapter_goes_to_a_home_that_all_routers_agree_on() -> None:
    names = [f"r{number}" for number in range(20)]
    for adapter in ("x", "y", "z"):
        expected = set(homes(adapter, names)[: 1 + SPARE_HOMES])
        for seed in range(3):
            made = router(*(load(name) for name in reversed(names)), seed=seed)
            assert choices(made, Ask(10, adapter=adapter)).keys() == expected


def test_only_adapters_of_a_replica_that_left_get_other_homes() -> None:
    names = [f"r{number}" for number in range(20)]
    for number in range(50):
        before, gone = homes(f"adapter-{number}", names)[:2], "r7"
        after = homes(f"adapter-{number}", [name for name in names if name != gone])[:2]
        assert after == before if gone not in before else next(name for name in before if name != gone) in after


def test_a_cold_burst_stays_together_while_it_is_comfortable() -> None:
    names = [f"r{number}" for number in range(50)]
    made = router(*(load(name) for name in names))
    ask = Ask(400, adapter="cold", ttft_s=2.0, tpot_s=1.0)
    sent = Counter(send(made, number, ask).replica for number in range(200))  # 8 s of prompts
    ranked = homes("cold", names)
    assert set(sent) == set(ranked[: len(sent)]), "the next home comes when those before it are taken"
    assert 4 <= len(sent) <= 12, "as many as 1 s of comfort needs"


def test_a_hot_adapter_gets_homes_by_its_share() -> None:
    names = [f"r{number}" for number in range(20)]
    made = router(*(load(name) for name in names))
    ask, other, now = Ask(10, adapter="hot"), Ask(10), 0.0
    under_way, used = list[tuple[object, str]](), Counter[str]()
    resident: dict[str, list[str]] = {name: [] for name in names}
    for step in range(600):  # 60 s: a third of all requests under way are the hot adapter's
        now += 0.1
        running = Counter(replica for _, replica in under_way)
        for name in names if step % 5 == 0 else ():
            made.report(load(name, step + 2, resident=resident[name], running=running[name],
                             iteration_s=0.01 + 0.001 * running[name]), now)
        for place, kind in enumerate((ask, other, other)):
            choice = send(made, (step, place), kind, now)
            under_way.append(((step, place), choice.replica))
            if kind is ask and step > 300:
                used[choice.replica] += 1
            resident[choice.replica] = ["hot"] if kind is ask else resident[choice.replica]
        while len(under_way) > 90:
            made.ended(under_way.pop(0)[0])
    assert 6 <= len(used) <= 10, "a third of 20, and some to spare"
    assert set(used) <= set(homes("hot", names)[:10])


def test_an_adapter_that_is_being_loaded_attracts_the_next_request() -> None:
    names = [f"r{number}" for number in range(9)]
    made = router(*(load(name) for name in names))
    ask = Ask(10, adapter="x", ttft_s=10.0)
    first = send(made, 1, ask)
    assert choices(made, ask) == {first.replica: 200} and not made.choose(ask, 0.0).resident
    for name in names:
        made.report(load(name, 2), 5.0)
    assert len(choices(made, ask, 5.0)) == 1 + SPARE_HOMES, "no report has ever had it"


# --- metrics ---


def test_the_summary_says_what_an_autoscaler_needs() -> None:
    busy = load("a", queued_prompt_tokens=10_000, free_blocks=250, running=3, waiting=1, headroom=0.2)
    made = router(busy, load("b", draining=True))
    for _ in range(10):
        made.choose(Ask(10, ttft_s=0.5, adapter="x"), 0.0)
    found = made.summary(job_backlog=3)
    assert found.replicas == 2 and found.draining == 1 and found.missing_share == 1 and found.job_backlog == 3
    assert found.kv_pressure == pytest.approx(750 / 2000) and found.fullest == pytest.approx(0.75)
    assert found.queue_s == pytest.approx(0.5) and found.resident_share == 0 and found.chosen == 10
    assert found.headroom == pytest.approx(0.1) and (found.running, found.waiting) == (3, 1)


# --- random walks ---

NAMES = st.sampled_from(["a", "b", "c", "d"])
ADAPTERS = st.sampled_from([None, "x", "y"])


class RouterWalk(RuleBasedStateMachine):
    """What is known of replicas and requests is also kept here, in the simplest way."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router(num_routers=2)
        self.now, self.numbers = 0.0, Counter[str]()
        self.known: dict[str, Load] = {}
        self.live: dict[int, Ask] = {}
        self.last_id = 0

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=NAMES, queued=st.integers(0, 10**5), running=st.integers(0, 4), waiting=st.integers(0, 4), drains=st.booleans(),
          resident=st.sets(st.sampled_from(["x", "y"])), prefixes=st.none() | st.sets(st.integers(0, 5)))
    def report(self, name: str, queued: int, running: int, waiting: int, drains: bool, resident: set[str],
               prefixes: set[int] | None) -> None:
        self.numbers[name] += 1
        self.known[name] = load(
            name, self.numbers[name], queued_prompt_tokens=queued, running=running, waiting=waiting, draining=drains,
            resident=sorted(resident), prefixes=None if prefixes is None else sorted(prefixes), max_running=4, max_waiting=4,
            end_s=0.1, free_blocks=queued % 1000,
        )
        self.router.report(self.known[name], self.now)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        self.router.remove(name)
        self.known.pop(name, None)

    @rule(adapter=ADAPTERS, outputs=st.integers(1, 3), tokens=st.integers(1, 200), excluded=st.sets(NAMES, max_size=2),
          ttft_s=st.sampled_from([0.1, 1.0, math.inf]), again=st.booleans())
    def choose_and_send(
        self, adapter: str | None, outputs: int, tokens: int, excluded: set[str], ttft_s: float, again: bool
    ) -> None:
        ask = Ask(tokens, blocks=tuple(range(tokens // BLOCK)), adapter=adapter, outputs=outputs, ttft_s=ttft_s)
        allowed = {name for name, known in self.known.items() if not known.draining and name not in excluded}
        try:
            choice = self.router.choose(ask, self.now, exclude=excluded)
        except NoReplica:
            assert not allowed
            return
        except CapacityError:
            assert allowed
            return
        assert choice.replica in allowed
        assert choice.resident == (adapter is None or adapter in self.known[choice.replica].resident)
        assert 1 <= choice.uncached_tokens <= tokens
        assert choice.feasible <= (choice.predicted_ttft_s <= ttft_s)
        if not (again and self.live):
            self.last_id += 1
        self.live[self.last_id] = ask
        self.router.sent(self.last_id, choice, ask, self.now)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        self.router.first_token(data.draw(st.sampled_from(sorted(self.live))), self.now)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.live)))
        del self.live[id]
        self.router.ended(id)

    @invariant()
    def accounts_agree(self) -> None:
        self.router.check_integrity()
        assert self.router.num_under_way == len(self.live)
        assert set(self.router.replicas) == self.known.keys()


TestRouterWalk = RouterWalk.TestCase
TestRouterWalk.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
