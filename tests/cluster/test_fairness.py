"""Sums of a round: what tenants had elsewhere, each token charged once, however many ingresses there are."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.cluster.fairness import TenantLedger

SERVED = st.lists(st.tuples(st.integers(0, 2), st.sampled_from("rst"), st.sampled_from("xy"), st.integers(0, 50)), max_size=30)


def test_a_replica_hears_what_others_served() -> None:
    ledger = TenantLedger()
    ledger.add("r", "a", 10)
    ledger.add("s", "a", 5)
    ledger.add("s", "b", 7)
    assert ledger.close_round(["r", "s", "t"]) == {"r": {"a": 5, "b": 7}, "s": {"a": 10}, "t": {"a": 15, "b": 7}}
    assert ledger.close_round(["r", "s", "t"]) == {}


@settings(max_examples=60, deadline=None)
@given(SERVED)
def test_every_token_is_charged_once_to_every_other_replica(served: list[tuple[int, str, str, int]]) -> None:
    ledgers, charged = [TenantLedger() for _ in range(3)], Counter[tuple[str, str]]()
    for place, (ingress, replica, tenant, tokens) in enumerate(served):
        ledgers[ingress].add(replica, tenant, tokens)
        if place % 7 == 0:
            for ledger in ledgers:
                for other, rounds in ledger.close_round("rst").items():
                    charged.update({(other, name): count for name, count in rounds.items()})
    for ledger in ledgers:
        for other, rounds in ledger.close_round("rst").items():
            charged.update({(other, name): count for name, count in rounds.items()})
    for replica in "rst":
        for tenant in "xy":
            expected = sum(tokens for _, where, name, tokens in served if name == tenant and where != replica)
            assert charged[replica, tenant] == expected
