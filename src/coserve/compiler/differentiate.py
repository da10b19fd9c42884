"""Differentiation: adds the whole backward graph, by the gradient rules of the operator table. Pruning comes after it."""

from __future__ import annotations

from coserve.compiler.graph import Graph, JointGraph, Node, Value
from coserve.ops.table import Gradient


class _Backward:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.values: dict[str, Value] = dict(graph.values)
        self.nodes: list[Node] = []
        self.grads: dict[str, str] = {}
        self.weight_grads: dict[str, str] = {}

    def fresh(self, name: str, like: Value) -> str:
        while name in self.values:
            name += "'"
        self.values[name] = Value(name, like.width)
        return name

    def contribute(self, value: str, grad: str) -> None:
        """Adds to the gradient of `value`. From the second contribution on that takes an `add` node."""
        if value not in self.grads:
            self.grads[value] = grad
            return
        total = self.fresh(f"d:{value}", self.graph.values[value])
        self.nodes.append(Node("add", (self.grads[value], grad), (total,)))
        self.grads[value] = total

    def apply(self, rule: Gradient, node: Node) -> None:
        names = dict(zip((*node.row.inputs, *node.row.outputs), (*node.inputs, *node.outputs), strict=True))
        takes = []
        for take in rule.takes:
            if not take.startswith("d:"):
                takes.append(names[take])
            elif names[take[2:]] in self.grads:
                takes.append(self.grads[names[take[2:]]])
            else:
                return  # the output has no gradient
        if rule.op == "identity":
            self.contribute(names[rule.yields[0]], takes[0])
            return
        outputs = []
        for result in rule.yields:
            if result == "weight":
                assert node.weight is not None and node.weight not in self.weight_grads, "a parameter is used once"
                name = f"dW:{node.weight}"
                self.values[name] = Value(name, 0)
                self.weight_grads[node.weight] = name
                outputs.append(name)
            else:
                value = names[result]
                outputs.append(self.fresh(f"d:{value}", self.graph.values[value]))
        self.nodes.append(Node(rule.op, tuple(takes), tuple(outputs), node.weight, node.attrs))
        for result, grad in zip(rule.yields, outputs, strict=True):
            if result != "weight":
                self.contribute(names[result], grad)


def differentiate(joint: JointGraph) -> JointGraph:
    """Adds all gradients of a layer: of its input and of every parameter, frozen or not."""
    graph = joint.forward
    backward = _Backward(graph)
    output_grad = backward.fresh(f"d:{graph.output}", graph.values[graph.output])
    backward.grads[graph.output] = output_grad
    for node in reversed(graph.nodes):
        for rule in node.row.gradients:
            backward.apply(rule, node)
    return JointGraph(
        forward=graph, values=backward.values, backward=tuple(backward.nodes), output_grad=output_grad,
        input_grad=backward.grads.get(graph.input), weight_grads=backward.weight_grads,
    )
