"""The order of examples and their packing: pure functions, nothing lost, nothing split."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.config.settings import FinetuneConfig
from coserve.core import Example, Group
from coserve.finetune.batches import BatchOrder, pack_groups

ORDERS = st.builds(
    BatchOrder, num_groups=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.integers(0, 2**31), shuffle=st.booleans()
)


def make_group(index: int, *lengths: int) -> Group:
    examples = tuple(
        Example(index=10 * index + i, token_ids=np.zeros(n, np.int64), weights=np.zeros(n, np.float32))
        for i, n in enumerate(lengths)
    )
    return Group(index=index, examples=examples)


GROUPS = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=2), min_size=1, max_size=25).map(
    lambda lengths: [make_group(i, *each) for i, each in enumerate(lengths)]
)


# --- order ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(order=ORDERS, epoch=st.integers(0, 3))
def test_an_epoch_has_every_group_once(order: BatchOrder, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    steps = [order.indices(step) for step in range(first, first + order.steps_per_epoch)]
    assert sorted(index for step in steps for index in step) == list(range(order.num_groups))
    assert all(len(step) == order.batch_size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= order.batch_size
    assert order.steps_per_epoch == math.ceil(order.num_groups / order.batch_size)


@settings(max_examples=60, deadline=None)
@given(order=ORDERS, steps=st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_a_step_is_a_pure_function_of_its_number(order: BatchOrder, steps: list[int]) -> None:
    """Whatever was asked before, and whatever NumPy's and Python's own generators are at."""
    fresh = BatchOrder(
        num_groups=order.num_groups, batch_size=order.batch_size, seed=order.seed, shuffle=order.shuffle
    )
    forward = {step: order.indices(step) for step in steps}
    np.random.seed(steps[0])
    random.seed(steps[0])
    assert {step: fresh.indices(step) for step in reversed(steps)} == forward


def test_shuffled_order_differs_by_seed_and_epoch_and_not_by_batch_size() -> None:
    def epoch(seed: int, number: int, batch_size: int) -> list[int]:
        order = BatchOrder(num_groups=60, batch_size=batch_size, seed=seed, shuffle=True)
        first = number * order.steps_per_epoch
        return [i for step in range(first, first + order.steps_per_epoch) for i in order.indices(step)]

    assert epoch(1, 0, 7) == epoch(1, 0, 60)
    assert len({tuple(epoch(seed, number, 7)) for seed in (1, 2) for number in (0, 1)}) == 4
    assert epoch(1, 0, 7) != list(range(60))


def test_file_order_without_shuffling() -> None:
    order = BatchOrder(num_groups=5, batch_size=2, seed=3, shuffle=False)
    assert [order.indices(step) for step in range(6)] == [[0, 1], [2, 3], [4], [0, 1], [2, 3], [4]]


def test_number_of_steps() -> None:
    order = BatchOrder(num_groups=10, batch_size=4, seed=0, shuffle=True)
    assert order.num_steps(FinetuneConfig(epochs=2)) == 6
    assert order.num_steps(FinetuneConfig(epochs=0.5)) == 2
    assert order.num_steps(FinetuneConfig(epochs=0.01)) == 1
    assert order.num_steps(FinetuneConfig(epochs=2, max_steps=5)) == 5


# --- packing --------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(groups=GROUPS, max_tokens=st.integers(1, 70), seed=st.integers(0, 100))
def test_packing_loses_and_splits_nothing(groups: list[Group], max_tokens: int, seed: int) -> None:
    bins = pack_groups(groups, max_tokens)
    packed = [group for each in bins for group in each]
    assert sorted(group.index for group in packed) == [group.index for group in groups]
    assert all(group is groups[group.index] for group in packed)
    sizes = [sum(group.num_tokens for group in each) for each in bins]
    for each, size in zip(bins, sizes, strict=True):
        assert size <= max_tokens or len(each) == 1, "only a group that is too long by itself may exceed the limit"
    # first fit: no bin's group would have fitted into an earlier bin as a whole
    for later in range(len(bins)):
        for earlier in range(later):
            assert sizes[earlier] + min(group.num_tokens for group in bins[later]) > max_tokens
    mixed = list(groups)
    random.Random(seed).shuffle(mixed)
    again = [[group.index for group in each] for each in pack_groups(mixed, max_tokens)]
    assert again == [[group.index for group in each] for each in bins], "packing depends on the order of arrival"


def test_packing_by_hand() -> None:
    groups = [make_group(i, n) for i, n in enumerate([3, 6, 5, 2, 4])]
    bins = [[group.index for group in each] for each in pack_groups(groups, 8)]
    assert bins == [[1, 3], [2, 0], [4]]
    assert [[g.index for g in each] for each in pack_groups([make_group(i, 2, 2) for i in range(3)], 8)] == [[0, 1], [2]]
    assert pack_groups([], 8) == []


@pytest.mark.parametrize("limit", [1, 4])
def test_a_group_longer_than_the_limit_stands_alone(limit: int) -> None:
    groups = [make_group(0, 5), make_group(1, 1), make_group(2, 1)]
    bins = [[group.index for group in each] for each in pack_groups(groups, limit)]
    assert bins[0] == [0]
    assert sorted(index for each in bins[1:] for index in each) == [1, 2]
