"""Which block holds the keys and values of which tokens: a tree of full blocks under each prefix key.

    (salt, adapter, version) ── [5 7] block 0 ─┬─ [1 2] block 1
                                               └─ [3 3] block 4        5 7 3 3 ... is covered by blocks 0 and 4

A node is found by its parent and its own tokens. Both are compared exactly, so that no hash stands for a prefix.
Owns: the tree, and which node a block has. Does not own: who uses a block and when it is evicted (blocks.py), hashes for
routers (prefixhash.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class PrefixKey(NamedTuple):
    """Tokens have equal keys and values only under the same one of these. salt: separates tenants. adapter: None for the base
    model. version: of the adapter."""

    salt: str
    adapter: str | None
    version: int


@dataclass(slots=True, eq=False, repr=False)
class PrefixNode:
    """One full block of tokens, which continues its parent's prefix. block: None in a root, and once the node was dropped.
    depth: blocks of its prefix, itself included; 0 of a root. digest: its prefix's hash, once somebody has computed it."""

    key: PrefixKey
    parent: PrefixNode | None
    tokens: tuple[int, ...]
    block: int | None
    depth: int = 0
    digest: bytes | None = None
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)


class PrefixTree:
    """Finds nodes by key and tokens, and by block. A node never outlives its parent in the tree."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._roots: dict[PrefixKey, PrefixNode] = {}
        self._nodes: dict[int, PrefixNode] = {}
        self._notes: deque[PrefixNode] | None = None

    def watch(self, notes: deque[PrefixNode]) -> None:
        """From now on nodes that are new or used are added to `notes`; those that are there already, at once. Thread-safe."""
        self._notes = notes
        notes.extend(list(self._nodes.values()))

    def note_use(self, node: PrefixNode) -> None:
        """A request uses a node's prefix."""
        if self._notes is not None:
            self._notes.append(node)

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def parent(self, block: int) -> int | None:
        """The block whose prefix this block continues; None if it is the first of its prefix."""
        above = self._nodes[block].parent
        return above.block if above else None

    def find(self, key: PrefixKey, tokens: Sequence[int]) -> list[PrefixNode]:
        """The nodes of the longest known prefix of `tokens`, in whole blocks. They never cover the last token, since a request
        must run at least one row to get its logits."""
        chain: list[PrefixNode] = []
        node = self._roots.get(key)
        for start in range(0, len(tokens) - self.block_tokens, self.block_tokens):
            node = node and node.children.get(tuple(tokens[start:start + self.block_tokens]))
            if node is None:
                break
            chain.append(node)
        return chain

    def intern(self, key: PrefixKey, parent: PrefixNode | None, tokens: tuple[int, ...], block: int) -> PrefixNode:
        """The node of `tokens` after `parent`, which is made if it is not known. parent: None for the first block of a prefix.
        block: holds the tokens of a new node. A known node keeps its own block."""
        if parent is None:
            parent = self._roots.setdefault(key, PrefixNode(key, None, (), None))
        node = parent.children.get(tokens)
        if node is None:
            assert block not in self._nodes and len(tokens) == self.block_tokens
            node = parent.children[tokens] = self._nodes[block] = PrefixNode(key, parent, tokens, block, parent.depth + 1)
            if self._notes is not None:
                self._notes.append(node)
        return node

    def drop(self, block: int) -> list[int]:
        """Takes a block's node and all that continue it out of the tree. Returns their blocks."""
        node = self._nodes[block]
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        if parent.parent is None and not parent.children:
            del self._roots[node.key]
        return self._detach(node)

    def forget(self, adapter: str | None, version: int) -> list[int]:
        """Takes all nodes of an adapter's version out of the tree, under every salt. Returns their blocks."""
        keys = [key for key in self._roots if (key.adapter, key.version) == (adapter, version)]
        return [block for key in keys for block in self._detach(self._roots.pop(key))]

    def move(self, source: int, target: int) -> None:
        """Block `target` holds the tokens of the node of block `source` from now on."""
        node = self._nodes[target] = self._nodes.pop(source)
        node.block = target

    def _detach(self, top: PrefixNode) -> list[int]:
        blocks, pending = [], [top]
        while pending:
            node = pending.pop()
            pending.extend(node.children.values())
            node.children = {}
            if node.block is not None:
                del self._nodes[node.block]
                blocks.append(node.block)
                node.block = None
        return blocks

    def check_integrity(self) -> None:
        """Asserts that the nodes by block are those under the roots, and that no root is without children."""
        reached: dict[int, PrefixNode] = {}
        pending = list(self._roots.values())
        assert all(root.children for root in pending)
        while pending:
            node = pending.pop()
            for tokens, child in node.children.items():
                assert child.key == node.key and child.parent is node and child.tokens == tokens and child.block is not None
                assert child.depth == node.depth + 1
                assert child.block not in reached
                reached[child.block] = child
                pending.append(child)
        assert reached == self._nodes
