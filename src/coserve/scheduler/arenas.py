"""Where a training arena goes: contiguous blocks at the top of the pool.

    blocks:   0 .. 9 | 10 11 12 13 | 14 15 16 | 17 18 19       [10, 14) and [17, 20) are arenas, boundary = 10
                          arena        gap       arena

The blocks of a gap are ordinary ones for the cache: since it fills from the bottom, they are the last that it takes. An
arena that fits into a gap goes there, at its upper end; else below all others.
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
    """The highest `size` contiguous blocks outside `arenas` (in ascending order); None if there are none."""
    end = num_blocks
    for arena in reversed(arenas):
        if end - arena.end >= size:
            break
        end = arena.first
    return ArenaBlocks(end - size, end) if end >= size else None
