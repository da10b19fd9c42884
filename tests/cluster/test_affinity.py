"""Homes and heat, and the index of who holds what."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.cluster.affinity import HOT_S, PER_HOME, SPARE, AdapterHeat, name_hash, rendezvous_order
from coserve.cluster.holders import HolderIndex, bool_array


def test_first_homes_are_spread_evenly() -> None:
    seeds = np.array([name_hash(f"r{number}") for number in range(10)], np.uint64)
    first = np.bincount([rendezvous_order(f"adapter-{number}", seeds)[0] for number in range(5000)], minlength=10)
    assert first.min() > 400 and first.max() < 600


def test_heat_is_an_average_and_bursts_alone_make_nothing_hot() -> None:
    heat = AdapterHeat()
    heat.add("hot", 40, 0.0)
    heat.add(None, 40, 0.0)
    assert heat.num_homes("hot", 100, 1, 0.5) == 1, "a burst"
    assert heat.num_homes("hot", 100, 1, 10 * HOT_S) == pytest.approx(40 / PER_HOME, abs=1), "many, and no more than they need"
    assert heat.num_homes("hot", 10, 1, 10 * HOT_S) == pytest.approx(SPARE * 5, abs=1), "its share of ten replicas"
    assert heat.num_homes("hot", 10, 4, 10 * HOT_S) == pytest.approx(SPARE * 5, abs=1)
    assert heat.num_homes("unknown", 10, 1, 10 * HOT_S) == 1
    heat.add("hot", -40, 10 * HOT_S)
    assert heat.num_homes("hot", 100, 1, 20 * HOT_S) == 1


def test_cold_adapters_are_forgotten() -> None:
    heat = AdapterHeat()
    for number in range(20_000):
        heat.add(f"adapter-{number}", 1, number * 0.1)
        heat.add(f"adapter-{number}", -1, number * 0.1 + 0.05)
    assert len(heat) < 3000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.sets(st.integers(0, 9))), max_size=30))
def test_the_index_equals_a_plain_table(steps: list[tuple[int, set[int]]]) -> None:
    index, plain = HolderIndex[int](), dict[int, set[int]]()
    for replica, things in steps:
        index.update(replica, things)
        plain[replica] = things
        index.check_integrity()
    for thing in range(10):
        held = bool_array(index.holders(thing), 71)
        assert {place for place in range(71) if held[place]} == {name for name, things in plain.items() if thing in things}
    assert len(index) == len(set().union(*plain.values())) if plain else not len(index)
