"""Hashes of prefixes, by which a router knows which engine has how much of a prompt in its cache.

    (salt, adapter) -> seed -> hash of block 1 -> hash of blocks 1 and 2 -> ...      each from the one before and its own tokens

A hash only says where a prompt had best go; which blocks a request shares is decided by exact comparison (prefix.py). An engine
tells a bounded number of hashes, and of a long prefix only those of some lengths (`is_told`), so that a router knows at least
four fifths of what is cached. The engine's thread only notes new and used nodes; the thread that collects hashes computes them.

Owns: the hashes, which of them are told. Does not own: the tree (prefix.py), who asks (engine/report.py).
"""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Sequence

import numpy as np

from coserve.scheduler.prefix import PrefixNode, PrefixTree

MOST_HASHES = 2048
"""Hashes that an engine tells; the prefixes that were used last."""
MOST_BLOCKS = 1024
"""Blocks of a prompt that are hashed."""
_MOST_NOTES = 65536
"""Nodes that may be noted between two collections; older notes are lost."""
_BYTES = 8


def prefix_seed(salt: str, adapter: str | None) -> bytes:
    """The hash that stands before the first block of a tenant's (salt) prompts on an adapter."""
    name = b"" if adapter is None else b"\1" + adapter.encode()
    return hashlib.blake2b(struct.pack("<I", len(salt)) + salt.encode() + name, digest_size=_BYTES).digest()


def _chain(before: bytes, tokens: bytes) -> bytes:
    """The hash of a prefix with one more block. tokens: as 32-bit integers."""
    return hashlib.blake2b(before + tokens, digest_size=_BYTES).digest()


def prompt_hashes(salt: str, adapter: str | None, tokens: Sequence[int], block_tokens: int) -> tuple[int, ...]:
    """Hashes of a prompt's prefixes in full blocks, the shortest first; of MOST_BLOCKS at most."""
    count = min(len(tokens) // block_tokens, MOST_BLOCKS)
    packed, size = np.asarray(tokens[: count * block_tokens], dtype="<u4").tobytes(), 4 * block_tokens
    hashes, last = [], prefix_seed(salt, adapter)
    for start in range(0, len(packed), size):
        last = _chain(last, packed[start : start + size])
        hashes.append(int.from_bytes(last, "little"))
    return tuple(hashes)


def is_told(depth: int) -> bool:
    """Whether hashes of prefixes of so many blocks are told: 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ..."""
    step = 1 << max(0, depth.bit_length() - 3)
    return depth % step == 0


class PrefixHashes:
    """The hashes of a tree's prefixes. `collect` may be called from any one thread while another uses the tree."""

    def __init__(self, tree: PrefixTree) -> None:
        self._told: dict[int, PrefixNode] = {}
        """By hash; those that were used last come last, each after all that continue it."""
        self._notes: deque[PrefixNode] = deque(maxlen=_MOST_NOTES)
        tree.watch(self._notes)

    def collect(self) -> list[int]:
        """Hashes of prefixes that are in the cache now."""
        seen: set[PrefixNode] = set()
        for _ in range(len(self._notes)):
            node: PrefixNode | None = self._notes.popleft()
            while node is not None and node.depth and node not in seen:  # what a prefix begins with was used with it
                seen.add(node)
                if is_told(node.depth) and node.block is not None:
                    value = int.from_bytes(_hash(node), "little")
                    self._told.pop(value, None)
                    self._told[value] = node
                node = node.parent
        told = [(value, node) for value, node in self._told.items() if node.block is not None]
        self._told = dict(told[-MOST_HASHES:])
        return list(self._told)


def _hash(node: PrefixNode) -> bytes:
    """A node's hash. It and those of all nodes before it are kept in the nodes."""
    missing: list[PrefixNode] = []
    above: PrefixNode | None = node
    while above is not None and above.digest is None:
        missing.append(above)
        above = above.parent
    last = b"" if above is None or above.digest is None else above.digest
    for below in reversed(missing):
        tokens = below.tokens
        last = _chain(last, struct.pack(f"<{len(tokens)}I", *tokens)) if below.depth else prefix_seed(*below.key[:2])
        below.digest = last
    return last
