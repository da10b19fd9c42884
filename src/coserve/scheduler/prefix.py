"""Which block holds the keys and values of which tokens: a tree of full blocks under each prefix key.

    (salt, adapter, version) ── [5 7] block 0 ─┬─ [1 2] block 1
                                               └─ [3 3] block 4        5 7 3 3 ... is covered by blocks 0 and 4

A node is found by its parent and its own tokens, both compared exactly: no hash stands for a prefix. Owns: the tree, and which
node a block has. Does not own: who uses a block and when it is evicted (blocks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class PrefixKey(NamedTuple):
    """What equal tokens must share to have equal keys and values. salt: the tenant's; adapter: None is the base model."""

    salt: str
    adapter: str | None
    version: int


@dataclass(slots=True, eq=False, repr=False)
class PrefixNode:
    """One full block of tokens after those of its parent. block: None once dropped, and in a root."""

    key: PrefixKey
    parent: PrefixNode | None
    tokens: tuple[int, ...]
    block: int | None
    children: dict[tuple[int, ...], PrefixNode] = field(default_factory=dict)


class PrefixTree:
    """Nodes by key and tokens, and by block. The parent of a node in the tree is in the tree."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self._roots: dict[PrefixKey, PrefixNode] = {}
        self._nodes: dict[int, PrefixNode] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._nodes

    def parent(self, block: int) -> int | None:
        """The block of the prefix that this one continues; None at the start."""
        above = self._nodes[block].parent
        return above.block if above else None

    def find(self, key: PrefixKey, tokens: Sequence[int]) -> list[PrefixNode]:
        """The nodes of the longest known prefix of `tokens` in whole blocks. The last token is never covered: a request has
        to run at least one row to get its logits."""
        chain: list[PrefixNode] = []
        node = self._roots.get(key)
        for start in range(0, len(tokens) - self.block_tokens, self.block_tokens):
            node = node and node.children.get(tuple(tokens[start:start + self.block_tokens]))
            if node is None:
                break
            chain.append(node)
        return chain

    def intern(self, key: PrefixKey, parent: PrefixNode | None, tokens: tuple[int, ...], block: int) -> PrefixNode:
        """The node of `tokens` after `parent` (None: at the start). A new one is held by `block`, a known one by another."""
        if parent is None:
            parent = self._roots.setdefault(key, PrefixNode(key, None, (), None))
        node = parent.children.get(tokens)
        if node is None:
            assert block not in self._nodes and len(tokens) == self.block_tokens
            node = parent.children[tokens] = self._nodes[block] = PrefixNode(key, parent, tokens, block)
        return node

    def drop(self, block: int) -> list[int]:
        """Takes a block's node and all below it out; returns their blocks."""
        node = self._nodes[block]
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        if parent.parent is None and not parent.children:
            del self._roots[node.key]
        return self._detach(node)

    def forget(self, adapter: str | None, version: int) -> list[int]:
        """Takes all nodes of an adapter's version out, of every salt; returns their blocks."""
        keys = [key for key in self._roots if (key.adapter, key.version) == (adapter, version)]
        return [block for key in keys for block in self._detach(self._roots.pop(key))]

    def move(self, source: int, target: int) -> None:
        """The node of block `source` is held by block `target` from now on."""
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
        """The nodes by block are those under the roots, and no root is bare."""
        reached: dict[int, PrefixNode] = {}
        pending = list(self._roots.values())
        assert all(root.children for root in pending)
        while pending:
            node = pending.pop()
            for tokens, child in node.children.items():
                assert child.key == node.key and child.parent is node and child.tokens == tokens and child.block is not None
                assert child.block not in reached
                reached[child.block] = child
                pending.append(child)
        assert reached == self._nodes
