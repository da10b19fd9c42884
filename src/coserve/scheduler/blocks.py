"""Who owns which block of the paged key-value cache. Integers only; the tensors are in runtime/cache.py.

    blocks:   0  1  2  3  4  5 ...        lowest first, so that the pool's top stays free for training arenas
    owner:    A  A  B  -  B  -            table(A) = [0, 1], table(B) = [2, 4]
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable

from coserve.core import CapacityError


class BlockPool:
    """Fixed-size blocks of `block_tokens` tokens."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self._free = list(range(num_blocks))
        self._tables: dict[Hashable, list[int]] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def table(self, owner: Hashable) -> list[int]:
        """The owner's blocks in the order of its tokens."""
        return self._tables[owner]

    def allocate(self, owner: Hashable, num_tokens: int) -> None:
        """Grows the owner's table to hold `num_tokens` tokens. Raises CapacityError, changing nothing, if it can't."""
        table = self._tables.get(owner, [])
        missing = -(-num_tokens // self.block_tokens) - len(table)
        if missing > self.num_free:
            raise CapacityError(f"the key-value cache needs {missing} more blocks and has {self.num_free}")
        self._tables[owner] = table + [heapq.heappop(self._free) for _ in range(missing)]

    def free(self, owner: Hashable) -> None:
        """Gives all blocks of an owner back."""
        for block in self._tables.pop(owner):
            heapq.heappush(self._free, block)

    def check_integrity(self) -> None:
        """Every block is free or owned by one owner."""
        owned = [block for table in self._tables.values() for block in table]
        assert sorted(owned + self._free) == list(range(self.num_blocks))
