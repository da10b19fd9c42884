"""Who holds which block of the one device pool. Integers only; the tensors are in runtime/cache.py.

    blocks:   0  1  2  3  4  5 | 6  7 | 8  9 | 10 11       owners' blocks from the bottom, lowest first;
    held by:  AB A  B  c  B  - | arena| -  - | arena       training arenas from the top

Every block is in one of four states:

    owned     It is in the table of an owner, or in those of several.
    cached    It has no owner, but holds a known prefix. It is kept until its memory is needed.
    free      It holds nothing.
    arena     It is part of a training arena.

A new arena goes to the upper end of the highest gap that it fits into, or else below all other arenas. A gap is left where an
arena was released. Its blocks are ordinary ones, which owners take last.

The prefix tree (prefix.py) knows which block holds which tokens. Only full blocks enter it, so that a shared block is never
written again. `seal` enters blocks, `acquire` shares them, and eviction takes the longest unused ones out.

When two owners compute the same prefix at the same time, the tree knows it by the block of one of them. If that block is
evicted, all blocks that continue its prefix leave the tree too, those of the other owner included. The next `seal` of the
other owner enters its own blocks instead.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coserve.core import BlockMove, CapacityError
from coserve.scheduler.prefix import PrefixKey, PrefixNode, PrefixTree
from coserve.scheduler.prefixhash import PrefixHashes


class ArenaBlocks(NamedTuple):
    """Blocks [first, end) of a training job."""

    first: int
    end: int


class PoolStats(NamedTuple):
    """used (owned), cached, free, arena: the number of blocks in each state. queried_tokens: tokens that all calls of `acquire`
    looked up. hits_tokens: those of them that they found."""

    used: int
    cached: int
    free: int
    arena: int
    hits_tokens: int
    queried_tokens: int


@dataclass(slots=True)
class _Owner:
    """chain: the tree's nodes of its first blocks, as far as they were sealed. cacheable: False once its key was forgotten.
    packed: the table again, as 32-bit integers side by side."""

    key: PrefixKey | None = None
    table: list[int] = field(default_factory=list)
    packed: array[int] = field(default_factory=lambda: array("i"))
    chain: list[PrefixNode] = field(default_factory=list)
    cacheable: bool = True


class BlockPool:
    """Blocks of `block_tokens` tokens each. guaranteed_blocks: how many of them arenas always leave. caching: whether prefixes
    are shared."""

    def __init__(self, num_blocks: int, block_tokens: int, *, guaranteed_blocks: int = 0, caching: bool = True) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.guaranteed_blocks, self.caching = guaranteed_blocks, caching
        self._owners: dict[Hashable, _Owner] = {}
        self._holders = [0] * num_blocks  # how many tables each block is in
        self._free = list(range(num_blocks))  # a heap
        self._cached: OrderedDict[int, None] = OrderedDict()  # longest unused first; a prefix comes after all that continue it
        self._arenas: list[ArenaBlocks] = []  # in ascending order
        self._tree = PrefixTree(block_tokens)
        self._hits_tokens = self._queried_tokens = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be had at once: free or cached ones. Those in gaps between arenas count."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self.num_free - self.num_arena

    @property
    def num_arena(self) -> int:
        """Blocks of all arenas."""
        return sum(arena.end - arena.first for arena in self._arenas)

    def stats(self) -> PoolStats:
        return PoolStats(self.num_used, len(self._cached), len(self._free), self.num_arena,
                         self._hits_tokens, self._queried_tokens)

    def table(self, owner: Hashable) -> list[int]:
        """The owner's blocks in the order of its tokens."""
        return self._owners[owner].table

    def packed_table(self, owner: Hashable) -> array[int]:
        """The same as 32-bit integers side by side, for whoever copies many tables at once."""
        return self._owners[owner].packed

    def watch_prefixes(self) -> PrefixHashes:
        """The hashes of the prefixes that are known, from now on. Thread-safe."""
        return PrefixHashes(self._tree)

    def match(self, key: PrefixKey, tokens: Sequence[int]) -> int:
        """How many leading tokens `acquire` would cover: whole blocks, at most len(tokens) - 1. Changes nothing.

        The cached ones among their blocks count in `num_free` until they are acquired.
        """
        return len(self._tree.find(key, tokens)) * self.block_tokens

    def touch(self, key: PrefixKey, tokens: Sequence[int]) -> int:
        """The same as `match`, but the blocks count as used just now: they are evicted last."""
        chain = self._tree.find(key, tokens)
        for node in reversed(chain):
            assert node.block is not None
            if node.block in self._cached:
                self._cached.move_to_end(node.block)
        return len(chain) * self.block_tokens

    def acquire(self, owner: Hashable, key: PrefixKey, tokens: Sequence[int]) -> int:
        """Begins a new owner's table with the known blocks of `tokens`. Returns the number of tokens that they hold."""
        assert owner not in self._owners
        chain = self._tree.find(key, tokens)
        state = self._owners[owner] = _Owner(key=key, chain=chain)
        for node in chain:
            assert node.block is not None
            state.table.append(node.block)
            state.packed.append(node.block)
            self._holders[node.block] += 1
            self._cached.pop(node.block, None)
        if chain:
            self._tree.note_use(chain[-1])
        covered = len(chain) * self.block_tokens
        self._queried_tokens += len(tokens)
        self._hits_tokens += covered
        return covered

    def allocate(self, owner: Hashable, num_tokens: int) -> None:
        """Grows the owner's table until it holds `num_tokens` tokens.

        The lowest free blocks are taken first, then the longest unused cached ones. Raises CapacityError if there are too few;
        nothing has changed then.
        """
        state = self._owners.get(owner)
        missing = -(-num_tokens // self.block_tokens) - (0 if state is None else len(state.table))
        if state is not None and missing <= 0:
            return
        if missing > self.num_free:
            raise CapacityError(f"the key-value cache needs {missing} more blocks and has {self.num_free}")
        if state is None:
            state = self._owners[owner] = _Owner()
        for _ in range(missing):
            block = self._take()
            self._holders[block] = 1
            state.table.append(block)
            state.packed.append(block)

    def seal(self, owner: Hashable, key: PrefixKey, tokens: Sequence[int], num_tokens: int) -> None:
        """The owner's blocks hold tokens[:num_tokens] by now, and the full ones may be shared from now on. Only tokens of new
        blocks are read."""
        state = self._owners[owner]
        assert state.key in (None, key) and num_tokens <= len(tokens)
        state.key = key
        if not (self.caching and state.cacheable):
            return
        chain = state.chain
        while chain and chain[-1].block is None:  # it left the tree with an evicted block before it
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
            # The tree may know this prefix by another block. That counts as used too, so that it outlives what continues it.
            known = state.chain[position].block if position < len(state.chain) else None
            if known is not None and known in self._cached:
                self._cached.move_to_end(known)

    def forget(self, adapter: str | None, version: int) -> None:
        """Forgets every prefix of an adapter's version, under any salt. Present owners with such a key seal nothing more."""
        for state in self._owners.values():
            if state.key is not None and (state.key.adapter, state.key.version) == (adapter, version):
                state.cacheable = False
        self._release(self._tree.forget(adapter, version))

    def reserve_arena(self, num_blocks: int) -> tuple[ArenaBlocks, list[BlockMove]]:
        """Takes contiguous blocks for a training job, as high as they fit.

        Cached blocks in the way are evicted, and owned ones move to the lowest blocks that can be had. Returns the arena and
        these moves. Their copies must be made, in this order, before the arena is written. The tables of owners have changed
        already. The cost is O(blocks in the pool). Raises CapacityError if fewer blocks would be left than owners hold or than
        are guaranteed, or if no gap is long enough; nothing has changed then.
        """
        assert num_blocks >= 1
        left = self.num_blocks - self.num_arena - num_blocks
        needed = max(self.num_used, self.guaranteed_blocks)
        if left < needed:
            raise CapacityError(f"a training arena of {num_blocks} blocks leaves {left} for inference, which needs {needed}")
        arena = self._highest_fit(num_blocks)
        if arena is None:
            raise CapacityError(f"no {num_blocks} contiguous blocks are left between the training arenas")
        blocks = range(arena.first, arena.end)
        for block in sorted(self._cached.keys() & blocks):
            if block in self._cached:  # it may have gone with one before it
                self._release(self._tree.drop(block))
        self._free = sorted(set(self._free).difference(blocks))  # which is a heap
        self._arenas = sorted([*self._arenas, arena])
        return arena, self._move([block for block in blocks if self._holders[block]])

    def _highest_fit(self, num_blocks: int) -> ArenaBlocks | None:
        """The highest contiguous blocks that are in no arena; None if there are too few."""
        end = self.num_blocks
        for arena in reversed(self._arenas):
            if end - arena.end >= num_blocks:
                break
            end = arena.first
        return ArenaBlocks(end - num_blocks, end) if end >= num_blocks else None

    def release_arena(self, arena: ArenaBlocks) -> None:
        """The arena's blocks are free again."""
        self._arenas.remove(arena)
        self._free += range(arena.first, arena.end)
        heapq.heapify(self._free)

    def _take(self) -> int:
        """Takes the lowest free block. If none is free, the longest unused prefix is evicted first."""
        if not self._free:
            self._release(self._tree.drop(next(iter(self._cached))))
        return heapq.heappop(self._free)

    def _release(self, blocks: Sequence[int]) -> None:
        """Frees those of the blocks that have no owner. They have left the tree."""
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
            if not targets.keys().isdisjoint(state.table):
                state.table[:] = [targets.get(block, block) for block in state.table]
                state.packed[:] = array("i", state.table)
        return moves

    def check_integrity(self) -> None:
        """Asserts that each block is in one state, and that tables, holders, tree and order of eviction agree."""
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
            assert len(set(state.table)) == len(state.table) and state.packed.tolist() == state.table
            assert {block for block in state.table if block in self._tree} <= {node.block for node in state.chain}
