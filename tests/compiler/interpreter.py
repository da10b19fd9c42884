"""Runs a layer's graph operator by operator on plain tensors, on one rank or on several in lockstep.

T rows of one sequence. Forward operators run by `reference`; every gradient operator runs as the vector-Jacobian product of the
operator that it belongs to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coserve.compiler.graph import Graph, JointGraph, Node
from coserve.kernels import reference
from coserve.ops.table import COLLECTIVES, TABLE, Gradient

RULES: Mapping[str, tuple[str, Gradient]] = {
    rule.op: (base, rule) for base, row in TABLE.items() if base not in COLLECTIVES for rule in row.gradients
    if rule.op != "identity"
}
"""{gradient operator: (the operator it belongs to, its rule)}."""


class Interpreter:
    """One rank. weights: by name, [out, in] or a vector; biases: by site. dropout_keys: int64 [T]; every dropout has the site
    key 7. first_share: of the features of a split value, those before this rank's, as a multiple of its own."""

    def __init__(
        self, graph: Graph, weights: Mapping[str, Tensor], cos: Tensor, sin: Tensor, *,
        biases: Mapping[str, Tensor] | None = None, dropout_keys: Tensor | None = None, first_share: int = 0,
    ) -> None:
        self.graph, self.weights, self.cos, self.sin = graph, weights, cos, sin
        self.biases, self.dropout_keys, self.first_share = biases or {}, dropout_keys, first_share
        self.env: dict[str, Tensor] = {}

    def operator(self, op: str, node: Node, weight: Tensor | None, ins: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of a forward operator."""
        width = self.cos.shape[-1]
        match op:
            case "rmsnorm":
                assert weight is not None
                return (reference.rmsnorm(ins[0], weight, node.attrs["eps"]),)
            case "linear" | "segment_linear":
                assert weight is not None
                bias = self.biases.get(node.weight or "")
                return (ins[0] @ weight.T if bias is None else ins[0] @ weight.T + bias,)
            case "segment_scale":
                assert weight is not None
                return (ins[0] * weight[:, 0],)
            case "rope":
                return (reference.rope(ins[0], self.cos, self.sin),)
            case "attention":
                q, k, v = (t.unflatten(-1, (-1, width)) for t in ins)
                out, lse = reference.attention(q, k, v)
                return out.flatten(1), lse
            case "silu_mul":
                return (reference.silu_mul(ins[0], ins[1]),)
            case "relu":
                return (torch.relu(ins[0]),)
            case "gelu":
                return (torch.nn.functional.gelu(ins[0]),)
            case "dropout":
                assert self.dropout_keys is not None
                p, features = node.attrs["p"], ins[0].shape[-1]
                first = self.first_share * features if node.attrs.get("split") else 0
                return (ins[0] * reference.dropout_keep(self.dropout_keys, 7, features, p, first) / (1 - p),)
        assert op == "add", op
        return (ins[0] + ins[1],)

    def run(self, node: Node) -> None:
        """One forward operator."""
        weight = None if node.weight is None else self.weights[node.weight]
        outs = self.operator(node.op, node, weight, [self.env[name] for name in node.inputs])
        self.env.update(zip(node.outputs, outs, strict=True))

    def run_gradient(self, joint: JointGraph, node: Node) -> None:
        """One operator of the backward graph."""
        if node.op == "add":
            self.env[node.outputs[0]] = self.env[node.inputs[0]] + self.env[node.inputs[1]]
            return
        base, rule = RULES[node.op]
        taken = dict(zip(rule.takes, (self.env[name] for name in node.inputs), strict=True))
        weight = None if node.weight is None else self.weights[node.weight]
        rows = self.cos.shape[0]
        # an input that the rule doesn't read may be anything: noise of the width that its gradient has
        widths = dict(zip(rule.yields, (joint.values[name].width for name in node.outputs), strict=True))
        ins = [
            taken[n] if n in taken else torch.randn(rows, widths[n], dtype=self.cos.dtype) for n in TABLE[base].inputs
        ]
        if base == "relu":
            ins = [taken["out"]]  # which is above 0 where the input is
        names = [*TABLE[base].inputs, *(["weight"] if weight is not None else [])]
        leaves = [t.detach().requires_grad_() for t in [*ins, *([weight] if weight is not None else [])]]
        outs = self.operator(base, node, leaves[-1] if weight is not None else None, leaves[: len(ins)])
        grads = torch.autograd.grad(outs[0], leaves, taken[f"d:{TABLE[base].outputs[0]}"])
        self.env.update(zip(node.outputs, (grads[names.index(result)] for result in rule.yields), strict=True))

    def forward(self, x: Tensor) -> None:
        """All forward operators on the layer's input [T, D]."""
        self.env = {self.graph.input: x}
        for node in self.graph.nodes:
            self.run(node)

    def backward(self, joint: JointGraph, grad: Tensor) -> None:
        """All backward operators on the gradient of the layer's output [T, D]."""
        self.env[joint.output_grad] = grad
        for node in joint.backward:
            self.run_gradient(joint, node)


class Lockstep:
    """Several ranks that run every operator together. sent: moves (`Operator.moves`) times elements per row of the whole value,
    over all collectives."""

    def __init__(self, ranks: Sequence[Interpreter]) -> None:
        self.ranks, self.sent = ranks, 0

    def forward(self, x: Tensor) -> None:
        for rank in self.ranks:
            rank.env = {rank.graph.input: x}
        for node in self.ranks[0].graph.nodes:
            if node.op in COLLECTIVES:
                self._collective(node)
            else:
                for rank in self.ranks:
                    rank.run(node)

    def backward(self, joint: JointGraph, grad: Tensor) -> None:
        for rank in self.ranks:
            rank.env[joint.output_grad] = grad
        for node in joint.backward:
            if node.op in COLLECTIVES:
                self._collective(node)
            else:
                for rank in self.ranks:
                    rank.run_gradient(joint, node)

    def _collective(self, node: Node) -> None:
        ins = [rank.env[node.inputs[0]] for rank in self.ranks]
        outs = collective(node.op, ins)
        self.sent += TABLE[node.op].moves * max(ins[0].shape[-1], outs[0].shape[-1])
        for rank, out in zip(self.ranks, outs, strict=True):
            rank.env[node.outputs[0]] = out


def collective(op: str, ins: Sequence[Tensor]) -> list[Tensor]:
    """What every rank gets from what every rank has, by the collective's definition."""
    size, width = len(ins), ins[0].shape[-1]
    match op:
        case "enter":
            return list(ins)
        case "reduce":
            return [sum(ins, torch.zeros_like(ins[0]))] * size
        case "gather" | "gather_entered":
            return [torch.cat(tuple(ins), dim=-1)] * size
        case "scatter":
            return list(sum(ins, torch.zeros_like(ins[0])).chunk(size, dim=-1))
        case "slice" | "slice_entered":
            return [x.chunk(size, dim=-1)[rank] for rank, x in enumerate(ins)]
    assert op == "spread", op
    return [torch.nn.functional.pad(x, (rank * width, (size - 1 - rank) * width)) for rank, x in enumerate(ins)]
