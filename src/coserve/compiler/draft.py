"""A program on its way from nodes to calls: what the lowering passes work on (`compiler/lower.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coserve.compiler.graph import Node, Value
from coserve.compiler.program import Place, Slot, Storage

_ALIGN = 16


def align(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def row_bytes(storage: Storage, itemsize: int) -> int:
    """Bytes of a storage per row, aligned."""
    return align(storage.width * storage.element.num_bytes(itemsize))


@dataclass(frozen=True, slots=True)
class DraftStep:
    """One operator that will run. It writes `outputs`; if `base` is a value, it adds to that one's memory instead. first: the
    operator that runs right before it as part of the step, whose output is the step's first, or None."""

    node: Node
    outputs: tuple[str, ...]
    base: str | None = None
    first: Node | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the step reads that it hasn't made itself."""
        return self.node.inputs if self.first is None else self.first.inputs

    @property
    def inplace(self) -> bool:
        """Whether the first output may take the memory of the first input."""
        return (self.first or self.node).row.inplace


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """One program on its way from nodes to calls. Every lowering pass returns a draft of which more is decided.

    values: all values of the graph, by name. steps: what runs, in order. itemsize: bytes of an element of the model's dtype.
    given: values that are there before the first step. pinned: values that no step may write over. outlive: values that are
    read after the last step. arena: values that the program keeps for backward.
    storages: first those that are given from outside. slots: where values lie; before `place`, only those that are given.
    roots: {value: the value whose memory it takes over}; a value that isn't there has memory of its own.
    beside: groups of values that lie side by side in one storage.
    arena_bytes, work_bytes: per row, after `place`.
    """

    values: Mapping[str, Value]
    steps: tuple[DraftStep, ...]
    itemsize: int
    given: frozenset[str]
    pinned: frozenset[str]
    outlive: tuple[str, ...]
    arena: frozenset[str] = frozenset()
    storages: tuple[Storage, ...]
    slots: Mapping[str, Slot]
    roots: Mapping[str, str] = field(default_factory=dict)
    beside: tuple[tuple[str, ...], ...] = ()
    arena_bytes: int = 0
    work_bytes: int = 0

    def root(self, name: str) -> str:
        """The value whose memory `name` lies in."""
        return self.roots.get(name, name)

    @property
    def kept_roots(self) -> frozenset[str]:
        """The roots of what is kept in the arena."""
        return frozenset(map(self.root, self.arena))

    def check(self) -> None:
        """Follows every value through memory: each step finds its inputs where they were left, and nothing has been written
        over them since; what is read after the last step is there too."""
        held = {name: self.slots.get(name) for name in self.given}
        for step in self.steps:
            reads = (*step.inputs, *((step.base,) if step.base is not None else ()))
            assert held.keys() >= {*reads}, f"{step.node} does not find {held.keys() ^ {*reads}}"
            for name in step.outputs:
                slot = self.slots.get(name)
                if slot is not None:
                    harmed = {other for other, place in held.items() if place is not None and self._overlap(place, slot)}
                    allowed = {step.base, step.inputs[0] if step.inplace else step.base}
                    if step.first is not None:  # row by row it reads before it writes
                        allowed |= {other for other in step.inputs if held.get(other) == slot}
                    assert harmed.intersection(reads) <= allowed, f"{step.node} writes over {harmed} while it reads them"
                    for other in harmed:
                        del held[other]
                held[name] = slot
        lost = {*self.outlive, *self.arena, *(self.pinned & self.given)} - held.keys()
        assert not lost, f"{lost} are read after the program and not there"

    def _overlap(self, one: Slot, other: Slot) -> bool:
        """Whether two slots share bytes of a row."""
        if one.storage == other.storage:
            return one.column < other.column + other.width and other.column < one.column + one.width
        first, second = self.storages[one.storage], self.storages[other.storage]
        if first.place is not second.place or first.place not in (Place.WORK, Place.ARENA):
            return False
        ends = first.offset + row_bytes(first, self.itemsize), second.offset + row_bytes(second, self.itemsize)
        return first.offset < ends[1] and second.offset < ends[0]
