"""Compression: kept values in fewer bytes.

pack_signs is exact. A value of which backward reads only the signs is kept as one bit per element. The pass runs before
rematerialization, for which the bits are one more value that can be kept.

    forward   out = relu(h);  bits = sign_bits(out)         backward   out~ = sign_values(bits);  d_h = relu_dgrad(d_out, out~)

to_fp8 changes gradients, so it runs on request only. It keeps every value of the model's dtype that only its own window reads
as e4m3 with a power of two per row. Forward computes with the value itself. Backward, and what it runs again, computes with the
decoded one. K and V stay as they are, because the forward pass of later windows reads them. q and log-sum-exp stay too:
backward finds the probabilities from both, and their rows sum to 1 only if the two belong together. The pass runs after
rematerialization, which knows fp8's sizes and makes q again only together with log-sum-exp.

    forward   g = linear(x);  g.fp8, g.exponent = fp8_encode(g)        backward   g = fp8_decode(g.fp8, g.exponent);  ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from coserve.compiler.graph import Element, Graph, JointGraph, Node, Value
from coserve.compiler.rematerialize import Kept, Rematerialized


def pack_signs(joint: JointGraph) -> JointGraph:
    """Adds sign bits for each forward value of which backward reads only the signs, and lets backward read those."""
    read: set[str] = set()
    whole: set[str] = set()
    for node in joint.backward:
        for name, value in zip(node.row.inputs, node.inputs, strict=True):
            (read if name in node.row.signs else whole).add(value)
    values = [joint.forward.values[name] for name in joint.forward.values if name in read - whole]
    bits = {value.name: Value(f"{value.name}.signs", -(-value.width // 8), Element.BYTE) for value in values}
    copies = {value.name: Value(f"{value.name}.sign", value.width) for value in values}
    packing = [Node("sign_bits", (name,), (value.name,)) for name, value in bits.items()]
    unpacking = {name: Node("sign_values", (value.name,), (copies[name].name,)) for name, value in bits.items()}

    def backward() -> Iterator[Node]:
        for node in joint.backward:
            for name in node.inputs:
                if name in unpacking:
                    yield unpacking.pop(name)
            yield replace(node, inputs=tuple(copies[name].name if name in copies else name for name in node.inputs))

    return replace(
        joint, forward=_with(joint.forward, bits.values(), packing), backward=tuple(backward()),
        values={**joint.values, **{value.name: value for value in (*bits.values(), *copies.values())}},
    )


def to_fp8(itemsize: int, choice: Rematerialized) -> Rematerialized:
    """The same choice with kept values in fp8, where that is smaller. itemsize: bytes of an element of the model's dtype."""
    joint, graph = choice.joint, choice.joint.forward
    whole = joint.read_whole() | joint.read_exactly()
    kept: list[Kept] = []
    values: list[Value] = []
    encode: list[Node] = []
    decode: list[Node] = []
    for entry in choice.kept:
        value = graph.values[entry.name]
        if value.name in whole or value.fp8_bytes(itemsize) >= value.num_bytes(itemsize):
            kept.append(entry)
            continue
        bits = Value(f"{value.name}.fp8", value.width, Element.BYTE)
        exponent = Value(f"{value.name}.exponent", 1, Element.BYTE)
        values += [bits, exponent]
        kept += [Kept(bits.name, entry.reason), Kept(exponent.name, f"to decode {bits.name}")]
        encode.append(Node("fp8_encode", (value.name,), (bits.name, exponent.name)))
        decode.append(Node("fp8_decode", (bits.name, exponent.name), (value.name,)))
    compressed = replace(
        joint, forward=_with(graph, values, encode), values={**joint.values, **{value.name: value for value in values}}
    )
    num_bytes = sum(compressed.values[entry.name].num_bytes(itemsize) for entry in kept)
    return replace(
        choice, joint=compressed, kept=tuple(kept), recompute=(*decode, *choice.recompute), num_bytes=num_bytes
    )


def _with(graph: Graph, values: Iterable[Value], packing: Iterable[Node]) -> Graph:
    """Adds nodes that read one value each. Each comes right after the node that makes its value."""
    waiting = {node.inputs[0]: node for node in packing}
    nodes = [waiting[graph.input]] if graph.input in waiting else []
    for node in graph.nodes:
        nodes.append(node)
        nodes += [waiting[name] for name in node.outputs if name in waiting]
    return replace(graph, values={**graph.values, **{value.name: value for value in values}}, nodes=tuple(nodes))
