"""A layer as a graph: values (one row per token), and nodes in execution order. Graphs are immutable; each compiler pass makes
a new one."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from coserve.ops.table import TABLE, Operator


class Element(enum.Enum):
    """What a value's elements are."""

    MODEL = "the model's dtype"
    WIDE = "float32 whatever the model's dtype; float64 when that is float64"
    BYTE = "bytes, whose meaning only the operators know that write and read them"

    def num_bytes(self, itemsize: int) -> int:
        """Bytes of one element, for a model dtype of `itemsize` bytes."""
        return {Element.MODEL: itemsize, Element.WIDE: max(itemsize, 4), Element.BYTE: 1}[self]


@dataclass(frozen=True, slots=True)
class Value:
    """width: elements per token."""

    name: str
    width: int
    element: Element = Element.MODEL

    def num_bytes(self, itemsize: int) -> int:
        """Bytes per token, for a model dtype of `itemsize` bytes."""
        return self.width * self.element.num_bytes(itemsize)

    def fp8_bytes(self, itemsize: int) -> int:
        """Bytes per token in fp8, with one byte for the row's exponent; as it is if that is less, or if fp8 can't hold it."""
        size = self.num_bytes(itemsize)
        return min(size, self.width + 1) if self.element is Element.MODEL else size


@dataclass(frozen=True, slots=True)
class Node:
    """One operator: names of values in and out, the parameter's name, constants. site: the linear site to whose bypass a
    forward operator belongs; None for the backbone's."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    site: str | None = None

    @property
    def row(self) -> Operator:
        return TABLE[self.op]

    @property
    def exact_inputs(self) -> tuple[str, ...]:
        """The values that this node reads as inputs of `Operator.exact`."""
        return tuple(value for name, value in zip(self.row.inputs, self.inputs, strict=True) if name in self.row.exact)

    def __str__(self) -> str:
        weight = f"[{self.weight}]" if self.weight else ""
        return f"{', '.join(self.outputs)} = {self.op}{weight}({', '.join(self.inputs)})"


@dataclass(frozen=True, slots=True)
class Graph:
    """The forward pass of one layer."""

    values: Mapping[str, Value]
    nodes: tuple[Node, ...]
    input: str
    output: str


@dataclass(frozen=True, slots=True)
class JointGraph:
    """A forward graph with its backward nodes, or those of them that pruning left.

    values: those of the forward graph and of the backward nodes. output_grad: the gradient of the layer's output, where
    backward starts. input_grad: the gradient of the layer's input, or None if no layer below needs it. weight_grads:
    {parameter: value}; kernels add into the parameter's gradient, so these values have no memory.
    """

    forward: Graph
    values: Mapping[str, Value]
    backward: tuple[Node, ...]
    output_grad: str
    input_grad: str | None
    weight_grads: Mapping[str, str]

    @classmethod
    def of(cls, forward: Graph) -> JointGraph:
        """A forward graph before it is differentiated."""
        return cls(forward, forward.values, (), f"d:{forward.output}", None, {})

    def check(self) -> None:
        """Raises AssertionError unless every value is made once, and before it is read."""
        made = {self.forward.input, self.output_grad}
        for node in (*self.forward.nodes, *self.backward):
            assert made.issuperset(node.inputs), f"{node} reads a value that is not there yet"
            assert made.isdisjoint(node.outputs), f"{node} makes a value twice"
            made.update(node.outputs)
        ends = {self.forward.output, *self.weight_grads.values(), *([] if self.input_grad is None else [self.input_grad])}
        assert made >= ends, f"{ends - made} are never made"

    def saved(self) -> tuple[str, ...]:
        """Forward values that the backward nodes read, in forward order."""
        read = {name for node in self.backward for name in node.inputs}
        return tuple(name for name in self.forward.values if name in read)

    def read_exactly(self) -> frozenset[str]:
        """Forward values that backward must see bit for bit, unless it makes their reader's output again (`exact`)."""
        return frozenset(value for node in self.forward.nodes for value in node.exact_inputs)

    def read_whole(self) -> frozenset[str]:
        """Forward values of which some node reads rows outside its own window (`Operator.whole`)."""
        return frozenset(
            value for node in (*self.forward.nodes, *self.backward)
            for name, value in zip(node.row.inputs, node.inputs, strict=True)
            if name in node.row.whole and value in self.forward.values
        )


def producers(nodes: Iterable[Node]) -> dict[str, Node]:
    """The node that makes each value."""
    return {name: node for node in nodes for name in node.outputs}


def counterparts(own: Graph, larger: Graph) -> dict[str, str]:
    """Maps each value of the training graph `own` to its equal in `larger`, the graph of a fused pass (value numbering).

    `larger` has the bypasses of requests' adapters too. In rows of the training job those add nothing, so that a sum with one
    equals its first term:

        own     q = linear(x)                        rope(q)
        larger  q = linear(x)   q2 = add(q, lora)    rope(q2)       q -> q2, the last value that equals q

    Returns {name in `own`: name in `larger`}.
    """

    def place(node: Node, inputs: Iterable[str | None]) -> object:
        return node.op, node.weight, tuple(inputs), tuple(node.attrs.items())

    twins = {place(node, node.inputs): node for node in own.nodes}
    equal: dict[str, str] = {larger.input: own.input}
    result = {own.input: larger.input}
    for node in larger.nodes:
        inputs = [equal.get(name) for name in node.inputs]
        twin = twins.get(place(node, inputs))
        if twin is not None:
            pairs = list(zip(twin.outputs, node.outputs, strict=True))
        else:
            pairs = [(inputs[0], node.outputs[0])] if node.op == "add" and inputs[0] is not None else []
        for value, found in pairs:
            equal[found] = value
            result[value] = found
    return result
