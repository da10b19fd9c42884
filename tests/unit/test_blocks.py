"""Block accounting against a model: a dictionary of owners and a set of free blocks."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coserve.core import CapacityError
from coserve.scheduler.blocks import BlockPool

OWNERS = st.sampled_from(["a", "b", 3, ("d", 4)])


class Pool(RuleBasedStateMachine):
    """Random allocations and frees; the model gives out the lowest free blocks first."""

    @initialize(num_blocks=st.integers(0, 12), block_tokens=st.integers(1, 5))
    def start(self, num_blocks: int, block_tokens: int) -> None:
        self.pool = BlockPool(num_blocks, block_tokens)
        self.free = set(range(num_blocks))
        self.tables: dict[object, list[int]] = {}
        self.num_blocks, self.block_tokens = num_blocks, block_tokens

    @rule(owner=OWNERS, num_tokens=st.integers(0, 40))
    def allocate(self, owner: object, num_tokens: int) -> None:
        table = self.tables.get(owner, [])
        wanted = 0
        while (len(table) + wanted) * self.block_tokens < num_tokens:
            wanted += 1
        if wanted > len(self.free):
            with pytest.raises(CapacityError, match=rf"needs {wanted} more blocks and has {len(self.free)}"):
                self.pool.allocate(owner, num_tokens)
            if owner not in self.tables:
                with pytest.raises(KeyError):
                    self.pool.table(owner)
            return
        before = list(table)
        self.pool.allocate(owner, num_tokens)
        lowest = sorted(self.free)[:wanted]
        self.free -= set(lowest)
        self.tables[owner] = before + lowest

    @precondition(lambda self: bool(self.tables))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(list(self.tables)))
        self.pool.free(owner)
        self.free |= set(self.tables.pop(owner))
        with pytest.raises(KeyError):
            self.pool.free(owner)

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_free == len(self.free)
        for owner, table in self.tables.items():
            assert self.pool.table(owner) == table


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_tables_are_in_token_order_and_low() -> None:
    pool = BlockPool(6, 4)
    pool.allocate("a", 8)
    pool.allocate("b", 1)
    pool.allocate("a", 9)
    assert (pool.table("a"), pool.table("b")) == ([0, 1, 3], [2])
    pool.free("b")
    pool.allocate("c", 9)
    assert pool.table("c") == [2, 4, 5]
    assert pool.num_free == 0


def test_growing_within_the_last_block_takes_nothing() -> None:
    pool = BlockPool(2, 4)
    for num_tokens in (1, 2, 3, 4, 2):
        pool.allocate("a", num_tokens)
        assert pool.table("a") == [0]
    pool.allocate("a", 5)
    assert pool.table("a") == [0, 1]


def test_a_refused_growth_changes_nothing() -> None:
    pool = BlockPool(3, 2)
    pool.allocate("a", 3)
    pool.allocate("b", 1)
    with pytest.raises(CapacityError):
        pool.allocate("b", 4)
    assert (pool.table("a"), pool.table("b"), pool.num_free) == ([0, 1], [2], 0)
    pool.check_integrity()


@pytest.mark.parametrize("spoil", [
    lambda pool: pool._free.pop(), lambda pool: pool._free.append(0), lambda pool: pool.table("a").append(2),
    lambda pool: pool.table("a").pop(),
])
def test_integrity_notices(spoil: object) -> None:
    pool = BlockPool(4, 2)
    pool.allocate("a", 3)
    pool.check_integrity()
    spoil(pool)  # type: ignore[operator]
    with pytest.raises(AssertionError):
        pool.check_integrity()
