"""Matrix FLOPs per token: 2 x in x out of every linear, and attention's products over the mean context of a token.

Element-wise work is not counted, nor is the loss head. Attention has 2 products forward and 5 backward (scores again, and
the gradients of V, P, Q and K), of 2 x context x (heads x head width) each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from coserve.compiler.graph import JointGraph, Node, Value
from coserve.ops.table import Cost

SEQUENCE_LENGTH = 1024
"""The default number of tokens of an example."""


class LayerFlops(NamedTuple):
    """Matrix FLOPs per token of one layer. recompute: of the forward nodes that backward runs again."""

    forward: int
    backward: int
    recompute: int


NO_FLOPS = LayerFlops(0, 0, 0)


def mean_context(sequence_length: int, window: int | None) -> float:
    """Keys that a token of a causal sequence sees on average, under a sliding window if there is one."""
    reach = min(sequence_length, window or sequence_length)
    return (reach * (reach + 1) / 2 + (sequence_length - reach) * reach) / sequence_length


def node_flops(node: Node, values: Mapping[str, Value], context: float) -> int:
    """Matrix FLOPs per token of a node, forward or backward."""
    widths = [values[name].width for name in node.inputs]
    match node.row.cost:
        case Cost.MATMUL:
            # a weight's gradient has no width of its own: it is the product of its two inputs
            return 2 * widths[0] * (values[node.outputs[0]].width or widths[-1])
        case Cost.ATTENTION:
            return int(2 * node.row.products * context * widths[0])
        case _:
            return 0


def layer_flops(joint: JointGraph, recompute: Iterable[Node], context: float) -> LayerFlops:
    """Matrix FLOPs per token of a layer. recompute: the forward nodes that backward runs again."""

    def total(nodes: Iterable[Node]) -> int:
        return sum(node_flops(node, joint.values, context) for node in nodes)

    return LayerFlops(total(joint.forward.nodes), total(joint.backward), total(recompute))
