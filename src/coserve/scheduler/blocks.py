"""Who holds which block of the one device pool. Integers only; the tensors are in runtime/cache.py.

    blocks:   0  1  2  3  4  5  6  7 | 8  9 10 11       owners' blocks from the bottom, lowest first;
    held by:  AB A  B  c  B  c  -  - | arena            training arenas from the top (arenas.py)

Every block is in one of four states: owned (in the tables of one or more owners), cached (idle: no owner, but it holds a known
prefix and is kept until its room is wanted), free, or part of an arena. Only full blocks enter the prefix tree (prefix.py), so
a shared block is never written again. `seal` enters them, `acquire` shares them, eviction takes the longest unused first.

The tree may know a prefix by another block than an owner's own, when two owners computed it at the same time. If that block is
evicted, all below it in the tree go out with it, the owner's blocks included; the owner's next `seal` enters its own instead.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coserve.core import BlockMove, CapacityError
from coserve.scheduler.arenas import ArenaBlocks, highest_fit
from coserve.scheduler.prefix import PrefixKey, PrefixNode, PrefixTree


class PoolStats(NamedTuple):
    """used, cached, free, arena: blocks in each state, which add up to the pool. Tokens: of all `acquire` calls so far."""

    used: int
    cached: int
    free: int
    arena: int
    hits_tokens: int
    queried_tokens: int


@dataclass(slots=True)
class _Owner:
    """chain: the tree's nodes of the first sealed blocks. cacheable: False once its key was forgotten."""

    key: PrefixKey | None = None
    table: list[int] = field(default_factory=list)
    chain: list[PrefixNode] = field(default_factory=list)
    cacheable: bool = True


class BlockPool:
    """Fixed-size blocks of `block_tokens` tokens. guaranteed_blocks: arenas leave that many. caching: False shares nothing."""

    def __init__(self, num_blocks: int, block_tokens: int, *, guaranteed_blocks: int = 0, caching: bool = True) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.guaranteed_blocks, self.caching = guaranteed_blocks, caching
        self._owners: dict[Hashable, _Owner] = {}
        self._holders = [0] * num_blocks  # tables that a block is in
        self._free = list(range(num_blocks))  # a heap
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first, a prefix after all that continue it
        self._arenas: list[ArenaBlocks] = []  # in ascending order
        self._tree = PrefixTree(block_tokens)
        self._hits_tokens = self._queried_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had at once: free or cached, those in gaps between arenas included."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self.num_free - self.num_arena

    @property
    def num_cached(self) -> int:
        """Blocks without an owner that hold a known prefix."""
        return len(self._cached)

    @property
    def num_arena(self) -> int:
        """Blocks of all arenas."""
        return sum(arena.num_blocks for arena in self._arenas)

    @property
    def boundary(self) -> int:
        """First block of the lowest arena; `num_blocks` without arenas."""
        return self._arenas[0].first if self._arenas else self.num_blocks

    def stats(self) -> PoolStats:
        return PoolStats(self.num_used, len(self._cached), len(self._free), self.num_arena,
                         self._hits_tokens, self._queried_tokens)

    def table(self, owner: Hashable) -> list[int]:
        """The owner's blocks in the order of its tokens."""
        return self._owners[owner].table

    def match(self, key: PrefixKey, tokens: Sequence[int]) -> int:
        """How many leading tokens `acquire` would cover: whole blocks, at most len(tokens) - 1. Changes nothing.

        Those of their blocks that are cached count in `num_free` until they are acquired.
        """
        return len(self._tree.find(key, tokens)) * self.block_tokens

    def acquire(self, owner: Hashable, key: PrefixKey, tokens: Sequence[int]) -> int:
        """A new owner's table starts with the known blocks of `tokens`; returns the number of tokens they hold."""
        assert owner not in self._owners
        chain = self._tree.find(key, tokens)
        self._owners[owner] = _Owner(key, [], chain)
        for node in chain:
            assert node.block is not None
            self._owners[owner].table.append(node.block)
            self._holders[node.block] += 1
            self._cached.pop(node.block, None)
        covered = len(chain) * self.block_tokens
        self._queried_tokens += len(tokens)
        self._hits_tokens += covered
        return covered

    def allocate(self, owner: Hashable, num_tokens: int) -> None:
        """Grows the owner's table to hold `num_tokens` tokens: the lowest free blocks, then the longest unused cached ones.

        Raises CapacityError, changing nothing, if it can't.
        """
        held = len(self._owners[owner].table) if owner in self._owners else 0
        missing = -(-num_tokens // self.block_tokens) - held
        if missing > self.num_free:
            raise CapacityError(f"the key-value cache needs {missing} more blocks and has {self.num_free}")
        table = self._owners.setdefault(owner, _Owner()).table
        for _ in range(missing):
            block = self._take()
            self._holders[block] = 1
            table.append(block)

    def seal(self, owner: Hashable, key: PrefixKey, tokens: Sequence[int], num_tokens: int) -> None:
        """The owner's blocks hold tokens[:num_tokens] by now: the full ones may be shared. Looks at new blocks only."""
        state = self._owners[owner]
        assert state.key in (None, key) and num_tokens <= len(tokens)
        state.key = key
        if not (self.caching and state.cacheable):
            return
        chain = state.chain
        while chain and chain[-1].block is None:  # went out with an evicted block above it
            chain.pop()
        for position in range(len(chain), num_tokens // self.block_tokens):
            start = position * self.block_tokens
            own = tuple(tokens[start:start + self.block_tokens])
            chain.append(self._tree.intern(key, chain[-1] if chain else None, own, state.table[position]))

    def free(self, owner: Hashable) -> None:
        """Forgets an owner. Blocks that only it held become cached if the tree knows them, else free."""
        state = self._owners.pop(owner)
        for position in reversed(range(len(state.table))):
            block = state.table[position]
            self._holders[block] -= 1
            if not self._holders[block]:
                if block in self._tree:
                    self._cached[block] = None
                else:
                    heapq.heappush(self._free, block)
            # The tree's block of this prefix may be another one; used just now, it outlives what continues it.
            known = state.chain[position].block if position < len(state.chain) else None
            if known is not None and known in self._cached:
                self._cached.move_to_end(known)

    def forget(self, adapter: str | None, version: int) -> None:
        """No prefix of an adapter's version, of any salt, is matched again, nor sealed by an owner that has it as key now."""
        for state in self._owners.values():
            if state.key is not None and (state.key.adapter, state.key.version) == (adapter, version):
                state.cacheable = False
        self._release(self._tree.forget(adapter, version))

    def reserve_arena(self, num_blocks: int) -> tuple[ArenaBlocks, list[BlockMove]]:
        """Contiguous blocks for a training job, as high as they fit, and the copies to make, in order, before they are written.

        Cached blocks in the way are evicted, owned ones move to the lowest blocks that can be had; tables change in place, at
        a cost of O(blocks in the pool). Raises CapacityError, changing nothing, if too little would be left for the owners or
        for the guaranteed share, or if no stretch between arenas is long enough.
        """
        assert num_blocks >= 1
        left = self.num_blocks - self.num_arena - num_blocks
        needed = max(self.num_used, self.guaranteed_blocks)
        if left < needed:
            raise CapacityError(f"a training arena of {num_blocks} blocks leaves {left} for inference, which needs {needed}")
        arena = highest_fit(self._arenas, self.num_blocks, num_blocks)
        if arena is None:
            raise CapacityError(f"no {num_blocks} contiguous blocks are left between the training arenas")
        blocks = range(arena.first, arena.end)
        for block in blocks:
            if block in self._cached:
                self._release(self._tree.drop(block))
        self._free = [block for block in self._free if block not in blocks]
        heapq.heapify(self._free)
        self._arenas = sorted([*self._arenas, arena])
        return arena, self._move([block for block in blocks if self._holders[block]])

    def release_arena(self, arena: ArenaBlocks) -> None:
        """The arena's blocks are free again."""
        self._arenas.remove(arena)
        for block in range(arena.first, arena.end):
            heapq.heappush(self._free, block)

    def _take(self) -> int:
        """Takes the lowest free block; without one, what a prefix that was not used for longest held."""
        if not self._free:
            self._release(self._tree.drop(next(iter(self._cached))))
        return heapq.heappop(self._free)

    def _release(self, blocks: Sequence[int]) -> None:
        """These blocks went out of the tree: those without an owner are free."""
        for block in blocks:
            if block in self._cached:
                del self._cached[block]
                heapq.heappush(self._free, block)

    def _move(self, sources: Sequence[int]) -> list[BlockMove]:
        moves = [BlockMove(source, self._take()) for source in sources]
        for source, target in moves:
            self._holders[source], self._holders[target] = 0, self._holders[source]
            if source in self._tree:
                self._tree.move(source, target)
        targets = dict(moves)
        for state in self._owners.values():
            state.table[:] = [targets.get(block, block) for block in state.table]
        return moves

    def check_integrity(self) -> None:
        """Asserts that every block is in one state, and that tables, holders, tree and order of eviction agree."""
        holders = Counter(block for state in self._owners.values() for block in state.table)
        assert all(self._holders[block] == holders[block] for block in range(self.num_blocks))
        arenas = [block for arena in self._arenas for block in range(arena.first, arena.end)]
        assert sorted([*self._free, *self._cached, *arenas, *holders]) == list(range(self.num_blocks))
        assert self._free[:1] == sorted(self._free)[:1]
        self._tree.check_integrity()
        assert all(block in self._tree for block in self._cached)
        assert not any(block in self._tree for block in [*self._free, *arenas])
        evicted: set[int] = set()
        for block in self._cached:
            assert self._tree.parent(block) not in evicted
            evicted.add(block)
        for state in self._owners.values():
            known = [node.block is not None for node in state.chain]
            assert len(known) <= len(state.table) and known == sorted(known, reverse=True)
            assert len(set(state.table)) == len(state.table)
            assert {block for block in state.table if block in self._tree} <= {node.block for node in state.chain}
