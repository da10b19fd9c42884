"""Where a training arena goes: contiguous blocks at the top of the pool.

    blocks:   0 .. 9 | 10 11 12 13 | 14 15 16 | 17 18 19       [10, 14) and [17, 20) are arenas, boundary = 10
                          arena        gap       arena

A gap is left where an arena was released. Its blocks are ordinary ones for the key-value cache, which takes the lowest blocks
first and these last. A new arena goes to the upper end of the highest gap that it fits into, or else below all other arenas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class ArenaBlocks(NamedTuple):
    """Blocks [first, end) of a training job."""

    first: int
    end: int

    @property
    def num_blocks(self) -> int:
        return self.end - self.first


def highest_fit(arenas: Sequence[ArenaBlocks], num_blocks: int, size: int) -> ArenaBlocks | None:
    """The highest `size` contiguous blocks of a pool of `num_blocks` that are in no arena; None if there are none.

    arenas: in ascending order.
    """
    end = num_blocks
    for arena in reversed(arenas):
        if end - arena.end >= size:
            break
        end = arena.first
    return ArenaBlocks(end - size, end) if end >= size else None
