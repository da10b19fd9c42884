"""The block pool rule by rule, then random walks over it with a fake memory that says what each block really holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coserve.core import BlockMove, CapacityError
from coserve.scheduler.blocks import ArenaBlocks, BlockPool, PoolStats
from coserve.scheduler.prefix import PrefixKey

KEY = PrefixKey("", None, 0)
ADAPTERS: list[tuple[str | None, int]] = [(None, 0), ("a", 1), ("a", 2)]
KEYS = st.sampled_from([PrefixKey("x", None, 0)] * 6 + [PrefixKey(salt, *adapter) for salt in "xy" for adapter in ADAPTERS])
OWNERS: list[object] = ["a", "b", 3, ("d", 4), "e"]
TOKENS = st.builds(lambda first, cut, tail: ([first] * 14)[:cut] + tail,  # prefixes are often shared
                   st.integers(0, 1), st.integers(0, 14), st.lists(st.integers(0, 1), max_size=3))


def computed(pool: BlockPool, owner: object, tokens: list[int], key: PrefixKey = KEY) -> None:
    """A new owner acquires what is known, computes the rest and seals it."""
    pool.acquire(owner, key, tokens)
    pool.allocate(owner, len(tokens))
    pool.seal(owner, key, tokens, len(tokens))


def remembered(pool: BlockPool, owner: object, tokens: list[int], key: PrefixKey = KEY) -> None:
    """The same, and the owner leaves."""
    computed(pool, owner, tokens, key)
    pool.free(owner)


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
    for num_tokens in (0, 1, 2, 3, 4, 2):
        pool.allocate("a", num_tokens)
        assert pool.table("a") == [0][:num_tokens]
    pool.allocate("a", 5)
    assert pool.table("a") == [0, 1]


def test_a_refused_growth_changes_nothing() -> None:
    pool = BlockPool(3, 2)
    pool.allocate("a", 3)
    pool.allocate("b", 1)
    with pytest.raises(CapacityError, match="needs 1 more blocks and has 0"):
        pool.allocate("b", 4)
    with pytest.raises(CapacityError):
        pool.allocate("c", 1)
    assert (pool.table("a"), pool.table("b"), pool.num_free) == ([0, 1], [2], 0)
    with pytest.raises(KeyError):
        pool.table("c")
    pool.check_integrity()


def test_a_known_prefix_is_shared_in_whole_blocks_but_for_the_last_token() -> None:
    pool = BlockPool(8, 2)
    computed(pool, "a", [1, 2, 3, 4, 5])
    assert [pool.match(KEY, [1, 2, 3, 4, 5, 6][:n]) for n in range(7)] == [0, 0, 0, 2, 2, 4, 4]
    assert pool.match(KEY, [1, 2, 9, 9, 9]) == 2 and pool.match(KEY, [3, 4, 5]) == 0
    assert pool.acquire("b", KEY, [1, 2, 3, 4]) == 2
    pool.allocate("b", 4)
    assert (pool.table("a"), pool.table("b")) == ([0, 1, 2], [0, 3])
    assert (pool.num_used, pool.stats().cached, pool.num_free) == (4, 0, 4)
    pool.free("a")
    assert (pool.num_used, pool.stats().cached, pool.num_free) == (2, 1, 6)
    assert pool.stats() == PoolStats(used=2, cached=1, free=5, arena=0, hits_tokens=2, queried_tokens=9)
    pool.check_integrity()


@pytest.mark.parametrize("other", [PrefixKey("salt", None, 0), PrefixKey("", "a", 0), PrefixKey("", None, 1)])
def test_every_part_of_the_key_separates(other: PrefixKey) -> None:
    pool = BlockPool(8, 2)
    remembered(pool, "a", [1, 2, 3])
    assert (pool.match(KEY, [1, 2, 3]), pool.match(other, [1, 2, 3])) == (2, 0)


def test_only_sealed_tokens_are_known() -> None:
    pool = BlockPool(8, 2)
    assert pool.acquire("a", KEY, [1, 2, 3, 4, 5]) == 0 and pool.table("a") == []
    pool.allocate("a", 5)
    for num_tokens, known in [(0, 0), (1, 0), (2, 2), (3, 2), (4, 4), (5, 4)]:
        pool.seal("a", KEY, [1, 2, 3, 4, 5], num_tokens)
        assert pool.match(KEY, [1, 2, 3, 4, 5]) == known
        pool.check_integrity()


def test_sealing_reads_new_blocks_only() -> None:
    class Counted(list[int]):
        read = 0

        def __getitem__(self, index: object) -> object:  # type: ignore[override]
            assert isinstance(index, slice)
            Counted.read += index.stop - index.start
            return super().__getitem__(index)

    pool, tokens = BlockPool(60, 2), Counted(range(100))
    pool.allocate("a", 100)
    for num_tokens in range(101):
        pool.seal("a", KEY, tokens, num_tokens)
    assert Counted.read == 100


def test_without_caching_nothing_is_shared() -> None:
    pool = BlockPool(4, 2, caching=False)
    computed(pool, "a", [1, 2, 3])
    assert pool.acquire("b", KEY, [1, 2, 3]) == 0
    pool.free("a")
    assert (pool.stats().cached, pool.num_free) == (0, 4)


def test_a_touched_prefix_is_evicted_last() -> None:
    pool = BlockPool(4, 2)
    remembered(pool, "a", [1, 2, 3, 4])  # blocks 0, 1
    remembered(pool, "b", [5, 6, 7, 8])  # blocks 2, 3
    assert pool.touch(KEY, [1, 2, 3, 4, 5]) == 4 and pool.touch(KEY, [9, 9, 9]) == 0
    pool.check_integrity()
    pool.allocate("c", 4)
    assert pool.table("c") == [3, 2] and pool.match(KEY, [1, 2, 3, 4, 5]) == 4
    pool.allocate("c", 6)
    assert pool.table("c") == [3, 2, 1], "of the touched prefix the last block"
    assert (pool.stats().hits_tokens, pool.stats().queried_tokens) == (0, 8), "touching is no use of the cache"


def test_free_blocks_go_before_cached_ones_and_a_prefix_outlives_what_continues_it() -> None:
    pool = BlockPool(5, 2)
    remembered(pool, "a", [1, 2, 3, 4])  # blocks 0, 1
    remembered(pool, "b", [5, 6])  # block 2... of the free ones the lowest
    pool.allocate("c", 4)
    assert pool.table("c") == [3, 4] and pool.stats().cached == 3
    pool.allocate("c", 6)
    assert pool.table("c") == [3, 4, 1], "of the longest unused prefix the last block"
    assert (pool.match(KEY, [1, 2, 3, 4, 5]), pool.match(KEY, [5, 6, 7])) == (2, 2)
    pool.allocate("c", 8)
    assert (pool.match(KEY, [1, 2, 3, 4, 5]), pool.match(KEY, [5, 6, 7])) == (0, 2)
    pool.check_integrity()


def test_use_protects_from_eviction() -> None:
    pool = BlockPool(3, 2)
    remembered(pool, "a", [1, 2])
    remembered(pool, "b", [3, 4])
    assert pool.acquire("c", KEY, [1, 2, 9]) == 2
    pool.free("c")
    pool.allocate("d", 4)
    assert (pool.match(KEY, [1, 2, 9]), pool.match(KEY, [3, 4, 9])) == (2, 0)


def test_owned_blocks_are_never_evicted() -> None:
    pool = BlockPool(3, 2)
    computed(pool, "a", [1, 2, 3, 4])
    pool.acquire("b", KEY, [1, 2, 9])
    pool.free("a")
    with pytest.raises(CapacityError, match="needs 3 more blocks and has 2"):
        pool.allocate("b", 8)
    pool.allocate("b", 6)
    assert pool.table("b")[0] == 0 and pool.match(KEY, [1, 2, 9]) == 2


def twins() -> BlockPool:
    """a and b computed [1 2] at the same time; the tree knows it by a's block 0, which b's [3 4] (block 3) hangs on."""
    pool = BlockPool(4, 2)
    pool.allocate("a", 2)
    pool.allocate("b", 4)
    pool.seal("a", KEY, [1, 2], 2)
    pool.seal("b", KEY, [1, 2, 3, 4], 4)
    assert (pool.table("a"), pool.table("b")) == ([0], [1, 2])
    pool.free("a")
    pool.check_integrity()
    return pool


def test_a_prefix_known_by_another_block_is_not_entered_twice() -> None:
    pool = twins()
    assert pool.acquire("c", KEY, [1, 2, 3, 4, 5]) == 4
    assert pool.table("c") == [0, 2]
    pool.free("b")
    assert (pool.num_used, pool.stats().cached) == (2, 0), "b's copy of the prefix is free"
    pool.check_integrity()


def test_what_hangs_on_an_evicted_block_goes_out_until_its_owner_seals_again() -> None:
    pool = twins()
    pool.allocate("c", 4)
    assert pool.table("c") == [3, 0] and pool.match(KEY, [1, 2, 3, 4, 5]) == 0
    pool.check_integrity()
    pool.seal("b", KEY, [1, 2, 3, 4], 4)
    assert pool.match(KEY, [1, 2, 3, 4, 5]) == 4
    pool.check_integrity()


def test_freeing_what_hangs_on_an_idle_block_counts_as_its_use() -> None:
    pool = twins()
    pool.free("b")
    pool.allocate("c", 6)
    assert pool.table("c") == [1, 3, 2] and pool.match(KEY, [1, 2, 3, 4, 5]) == 2


def test_a_forgotten_version_is_not_matched_nor_sealed_again() -> None:
    pool, mine, other = BlockPool(12, 2), PrefixKey("x", "a", 1), PrefixKey("x", "a", 2)
    remembered(pool, "idle", [1, 2, 3], mine)
    remembered(pool, "salted", [1, 2, 3], mine._replace(salt="y"))
    remembered(pool, "newer", [1, 2, 3], other)
    computed(pool, "running", [5, 6, 7, 8], mine)
    pool.acquire("sharing", mine, [5, 6, 7, 8])
    pool.forget("a", 1)
    pool.check_integrity()
    pool.seal("running", mine, [5, 6, 7, 8], 4)
    assert [pool.match(key, [1, 2, 3]) for key in (mine, mine._replace(salt="y"), other)] == [0, 0, 2]
    assert pool.match(mine, [5, 6, 7, 8, 9]) == 0 and pool.stats().cached == 1
    pool.free("running")
    assert pool.num_used == 1, "still shared"
    pool.free("sharing")
    assert (pool.num_used, pool.stats().cached) == (0, 1)
    pool.check_integrity()


def test_arenas_grow_from_the_top_and_fill_gaps_first() -> None:
    pool = BlockPool(12, 2)
    top, middle, low = (pool.reserve_arena(n)[0] for n in (2, 3, 1))
    assert (top, middle, low) == (ArenaBlocks(10, 12), ArenaBlocks(7, 10), ArenaBlocks(6, 7))
    pool.release_arena(middle)
    assert (pool.num_free, pool.stats().arena) == (9, 3)
    assert pool.reserve_arena(2) == (ArenaBlocks(8, 10), [])
    assert pool.reserve_arena(2) == (ArenaBlocks(4, 6), [])
    for arena in (low, ArenaBlocks(4, 6), top, ArenaBlocks(8, 10)):
        pool.check_integrity()
        pool.release_arena(arena)
    assert (pool.num_free, pool.stats().arena) == (12, 0)
    with pytest.raises(ValueError, match="not in list"):
        pool.release_arena(top)


def test_gaps_serve_the_cache_last() -> None:
    pool = BlockPool(6, 2)
    top, _ = pool.reserve_arena(2)
    pool.reserve_arena(2)
    pool.release_arena(top)
    pool.allocate("a", 8)
    assert pool.table("a") == [0, 1, 4, 5]


def test_owned_blocks_in_the_way_move_with_their_prefixes_and_cached_ones_go() -> None:
    pool = BlockPool(6, 2)
    pool.allocate("low", 4)
    computed(pool, "a", [1, 2, 3, 4, 5])  # blocks 2, 3, 4
    pool.acquire("b", KEY, [1, 2, 3, 4, 9])
    remembered(pool, "c", [7, 7])  # block 5
    table = pool.table("b")
    pool.free("low")
    arena, moves = pool.reserve_arena(3)
    assert (arena, moves) == (ArenaBlocks(3, 6), [BlockMove(3, 0), BlockMove(4, 1)])
    assert (pool.table("a"), pool.table("b"), table) == ([2, 0, 1], [2, 0], [2, 0])
    assert (pool.match(KEY, [1, 2, 3, 4, 9]), pool.match(KEY, [7, 7, 7])) == (4, 0)
    pool.check_integrity()


def test_a_move_evicts_what_is_cached_below() -> None:
    pool = BlockPool(3, 2)
    computed(pool, "a", [1, 2])
    computed(pool, "b", [3, 4])
    pool.allocate("b", 4)
    pool.free("a")
    assert pool.reserve_arena(1) == (ArenaBlocks(2, 3), [BlockMove(2, 0)]) and pool.table("b") == [1, 0]
    assert pool.match(KEY, [1, 2, 3]) == 0 and pool.match(KEY, [3, 4, 5]) == 2
    pool.check_integrity()


def test_arenas_leave_the_guaranteed_share_and_what_is_owned() -> None:
    pool = BlockPool(8, 2, guaranteed_blocks=3)
    with pytest.raises(CapacityError, match="of 6 blocks leaves 2 for inference, which needs 3"):
        pool.reserve_arena(6)
    pool.reserve_arena(1)
    remembered(pool, "a", [1, 2, 3, 4])
    pool.allocate("b", 8)
    before = pool.stats()
    with pytest.raises(CapacityError, match="of 4 blocks leaves 3 for inference, which needs 4"):
        pool.reserve_arena(4)
    assert (pool.stats(), pool.match(KEY, [1, 2, 3, 4, 5])) == (before, 4)
    arena, _ = pool.reserve_arena(3)
    assert (arena, pool.num_free) == (ArenaBlocks(4, 7), 0)
    pool.check_integrity()


def test_an_arena_needs_contiguous_blocks() -> None:
    pool = BlockPool(7, 2)
    top, _ = pool.reserve_arena(3)
    pool.reserve_arena(1)
    pool.release_arena(top)
    with pytest.raises(CapacityError, match="no 4 contiguous blocks"):
        pool.reserve_arena(4)
    assert (pool.num_free, pool.stats().arena) == (6, 1)
    pool.check_integrity()


@pytest.mark.parametrize("spoil", [
    lambda pool: pool._free.pop(), lambda pool: pool._free.append(0), lambda pool: pool.table("a").append(5),
    lambda pool: pool.table("a").pop(), lambda pool: pool._cached.popitem(), lambda pool: pool._arenas.pop(),
    lambda pool: pool._tree.drop(2), lambda pool: pool._tree.move(2, 5), lambda pool: pool._cached.move_to_end(3),
    lambda pool: pool._owners["a"].chain.clear(), lambda pool: pool._free.reverse(),
])
def test_integrity_notices(spoil: Callable[[BlockPool], object]) -> None:
    pool = BlockPool(8, 2)
    pool.reserve_arena(1)
    computed(pool, "a", [9, 9, 8])
    remembered(pool, "b", [1, 2, 3, 4])
    pool.check_integrity()
    spoil(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


class Content(NamedTuple):
    """What keys and values depend on: the key, how often it was forgotten before, and all tokens up to their own."""

    key: PrefixKey
    epoch: int
    tokens: tuple[int, ...]


class Request(NamedTuple):
    key: PrefixKey
    epoch: int
    tokens: list[int]
    written: list[int]  # one number: how many tokens are in memory


class Pool(RuleBasedStateMachine):
    """Requests come, compute, seal and leave; jobs take and give back arenas; versions are forgotten."""

    @initialize(num_blocks=st.integers(6, 14), block_tokens=st.integers(1, 3), guaranteed=st.integers(0, 6))
    def start(self, num_blocks: int, block_tokens: int, guaranteed: int) -> None:
        self.pool = BlockPool(num_blocks, block_tokens, guaranteed_blocks=guaranteed)
        self.guaranteed = guaranteed
        self.memory: dict[tuple[int, int], Content] = {}  # (block, slot)
        self.requests: dict[object, Request] = {}
        self.arenas: list[ArenaBlocks] = []
        self.epochs = dict.fromkeys(ADAPTERS, 0)

    def slot(self, owner: object, position: int) -> tuple[int, int]:
        block, slot = divmod(position, self.pool.block_tokens)
        return self.pool.table(owner)[block], slot

    def in_arenas(self) -> set[int]:
        return {block for arena in self.arenas for block in range(arena.first, arena.end)}

    def owned(self) -> set[int]:
        return {block for owner in self.requests for block in self.pool.table(owner)}

    @precondition(lambda self: len(self.requests) < 5)
    @rule(data=st.data(), key=KEYS, tokens=TOKENS, at_once=st.booleans(), touched=st.booleans())
    def arrive(self, data: st.DataObject, key: PrefixKey, tokens: list[int], at_once: bool, touched: bool) -> None:
        owner = data.draw(st.sampled_from([each for each in OWNERS if each not in self.requests]))
        matched = self.pool.match(key, tokens)
        if touched:
            assert self.pool.touch(key, tokens) == matched
            self.pool.check_integrity()
        covered = self.pool.acquire(owner, key, tokens)
        assert covered == matched and covered % self.pool.block_tokens == 0 and covered <= max(0, len(tokens) - 1)
        assert len(self.pool.table(owner)) * self.pool.block_tokens == covered
        # `agrees` looks into memory: what is covered was computed of equal tokens under this key, not forgotten since.
        self.requests[owner] = Request(key, self.epochs[key.adapter, key.version], tokens, [covered])
        if at_once:
            self.advance(owner, len(tokens), seal=True)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), seal=st.booleans())
    def compute(self, data: st.DataObject, seal: bool) -> None:
        owner = data.draw(st.sampled_from(list(self.requests)))
        request = self.requests[owner]
        self.advance(owner, data.draw(st.integers(request.written[0], len(request.tokens))), seal)

    def advance(self, owner: object, end: int, seal: bool) -> None:
        """Tokens up to `end` are computed, if there is room."""
        request = self.requests[owner]
        done = request.written[0]
        before, num_free = list(self.pool.table(owner)), self.pool.num_free
        missing = max(0, -(-end // self.pool.block_tokens) - len(before))
        free = sorted(set(range(self.pool.num_blocks)) - self.owned() - self.in_arenas())
        assert num_free == len(free)
        if missing > num_free:
            with pytest.raises(CapacityError):
                self.pool.allocate(owner, end)
            assert self.pool.table(owner) == before
            return
        nothing_cached = self.pool.stats().cached == 0
        self.pool.allocate(owner, end)
        new = self.pool.table(owner)[len(before):]
        assert self.pool.table(owner)[:len(before)] == before and len(new) == missing and set(new) <= set(free)
        assert not nothing_cached or new == free[:missing]
        for position in range(done, end):
            block, slot = self.slot(owner, position)
            assert sum(block in self.pool.table(each) for each in self.requests) == 1, "a shared block is never written"
            self.memory[block, slot] = Content(request.key, request.epoch, tuple(request.tokens[:position + 1]))
        request.written[0] = end
        if seal:
            self.pool.seal(owner, request.key, request.tokens, end)
            if request.epoch == self.epochs[request.key.adapter, request.key.version]:
                whole = end // self.pool.block_tokens * self.pool.block_tokens
                assert self.pool.match(request.key, [*request.tokens[:end], 7]) == whole

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(list(self.requests)))
        self.pool.free(owner)
        del self.requests[owner]
        with pytest.raises(KeyError):
            self.pool.free(owner)

    @rule(num_blocks=st.integers(1, 6))
    def job_starts(self, num_blocks: int) -> None:
        taken, owned, pool = self.in_arenas(), self.owned(), self.pool
        fits = [first for first in range(pool.num_blocks - num_blocks + 1) if not taken & {*range(first, first + num_blocks)}]
        if not fits or pool.num_blocks - len(taken) - num_blocks < max(len(owned), self.guaranteed):
            stats, tables = pool.stats(), [list(pool.table(owner)) for owner in self.requests]
            with pytest.raises(CapacityError):
                pool.reserve_arena(num_blocks)
            assert stats == pool.stats() and tables == [pool.table(owner) for owner in self.requests]
            return
        arena, moves = pool.reserve_arena(num_blocks)
        assert arena == ArenaBlocks(fits[-1], fits[-1] + num_blocks)
        assert {move.source for move in moves} == owned & {*range(*arena)}
        for source, target in moves:
            for slot in range(pool.block_tokens):
                if (source, slot) in self.memory:
                    self.memory[target, slot] = self.memory[source, slot]
        self.arenas.append(arena)
        self.memory = {place: content for place, content in self.memory.items() if place[0] not in range(*arena)}

    @precondition(lambda self: self.arenas)
    @rule(data=st.data())
    def job_ends(self, data: st.DataObject) -> None:
        arena = data.draw(st.sampled_from(self.arenas))
        self.pool.release_arena(arena)
        self.arenas.remove(arena)

    @precondition(lambda self: self.pool.stats().cached > 4)
    @rule(adapter=st.sampled_from(ADAPTERS))
    def forget(self, adapter: tuple[str | None, int]) -> None:
        self.pool.forget(*adapter)
        self.epochs[adapter] += 1

    @invariant()
    def agrees(self) -> None:
        self.pool.check_integrity()
        for owner, request in self.requests.items():
            for position in range(request.written[0]):
                held = Content(request.key, request.epoch, tuple(request.tokens[:position + 1]))
                assert self.memory[self.slot(owner, position)] == held
        assert self.pool.num_used == len(self.owned())
        assert self.pool.num_used + self.pool.num_free + len(self.in_arenas()) == self.pool.num_blocks
        used, cached, free, arena, hits, queried = self.pool.stats()
        assert arena == len(self.in_arenas()) and used + cached + free + arena == self.pool.num_blocks and hits <= queried

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for owner in self.requests:
            self.pool.free(owner)
        for arena in self.arenas:
            self.pool.release_arena(arena)
        self.pool.check_integrity()
        assert (self.pool.num_used, self.pool.num_free) == (0, self.pool.num_blocks)
        for adapter in ADAPTERS:
            self.pool.forget(*adapter)
        assert self.pool.stats().cached == 0 and not self.pool._tree._roots


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
