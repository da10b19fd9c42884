"""Which replicas hold what, as one integer per thing with a bit per replica.

    "a/french"  ->  0b0101      replicas 0 and 2 have the adapter in memory

A question about all replicas is one look-up, and a report costs only what has changed since the one before. Owns: this index.
Does not own: what the things are (adapters, blocks of prompts), which replica has which number.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

Thing = TypeVar("Thing", bound=Hashable)


class HolderIndex(Generic[Thing]):
    """Things by replica number, both ways."""

    def __init__(self) -> None:
        self._holders: dict[Thing, int] = {}
        self._held: dict[int, frozenset[Thing]] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def holders(self, thing: Thing) -> int:
        """A bit for each replica that holds a thing."""
        return self._holders.get(thing, 0)

    def update(self, replica: int, things: Iterable[Thing]) -> None:
        """A replica holds these things now, and no others."""
        before, after = self._held.get(replica, frozenset()), frozenset(things)
        if after == before:
            return
        bit = 1 << replica
        for thing in after - before:
            self._holders[thing] = self._holders.get(thing, 0) | bit
        for thing in before - after:
            left = self._holders[thing] & ~bit
            if left:
                self._holders[thing] = left
            else:
                del self._holders[thing]
        if after:
            self._held[replica] = after
        else:
            self._held.pop(replica, None)

    def check_integrity(self) -> None:
        """Asserts that both directions agree."""
        found: dict[Thing, int] = {}
        for replica, things in self._held.items():
            for thing in things:
                found[thing] = found.get(thing, 0) | 1 << replica
        assert found == self._holders


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def bool_array(mask: int, length: int) -> np.ndarray:
    """The lowest `length` bits as a boolean array."""
    num_bytes = -(-length // 8)
    raw = np.frombuffer((mask & ((1 << length) - 1)).to_bytes(num_bytes, "little"), dtype=np.uint8)
    return np.unpackbits(raw, count=length, bitorder="little").view(np.bool_)
