"""Pruning: drops the backward nodes whose result nobody needs.

Gone are the gradients of frozen weights, whatever only they read, and all backward work below the lowest adapter.
Source: FlexLLM, graph pruning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from coserve.compiler.graph import JointGraph, Node


def prune(joint: JointGraph, *, trainable: Callable[[str], bool], input_gradient: bool) -> JointGraph:
    """Keeps the backward nodes that a trainable parameter's gradient, or the layer's input gradient, needs."""
    weight_grads = {weight: grad for weight, grad in joint.weight_grads.items() if trainable(weight)}
    needed = set(weight_grads.values())
    if input_gradient and joint.input_grad is not None:
        needed.add(joint.input_grad)
    kept: list[Node] = []
    for node in reversed(joint.backward):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    return replace(
        joint, backward=tuple(reversed(kept)), weight_grads=weight_grads,
        input_grad=joint.input_grad if input_gradient else None,
    )
