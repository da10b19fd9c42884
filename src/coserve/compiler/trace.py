"""Tracing: runs the decoder layer with symbols instead of tensors, and writes down the operators that it calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from coserve.compiler.graph import Element, Graph, Node, Value
from coserve.model.architecture import Architecture
from coserve.model.decoder import Bypass, layer, linear_shapes


class Tracer:
    """The operator vocabulary on symbols. factor_widths: {name: out features} of the bypass's trainable factors."""

    def __init__(self, arch: Architecture, factor_widths: Mapping[str, int]) -> None:
        self.arch = arch
        self.linear_widths = {site: out for site, (out, _) in linear_shapes(arch).items()}
        self.factor_widths = factor_widths
        self.values: dict[str, Value] = {}
        self.nodes: list[Node] = []
        self.site: str | None = None
        """The linear site whose bypass is being traced."""

    def value(self, name: str, width: int, element: Element = Element.MODEL) -> Value:
        while name in self.values:
            name += "'"
        self.values[name] = Value(name, width, element)
        return self.values[name]

    def node(self, op: str, inputs: tuple[Value, ...], out: Value, weight: str | None = None, **attrs: Any) -> Value:
        self.nodes.append(Node(op, tuple(v.name for v in inputs), (out.name,), weight, attrs, self.site))
        return out

    def rmsnorm(self, x: Value, name: str) -> Value:
        return self.node("rmsnorm", (x,), self.value(name, x.width), name, eps=self.arch.rms_norm_eps)

    def linear(self, x: Value, site: str) -> Value:
        return self.node("linear", (x,), self.value(site, self.linear_widths[site]), site)

    def segment_linear(self, x: Value, name: str) -> Value:
        return self.node("segment_linear", (x,), self.value(name, self.factor_widths[name]), name)

    def segment_scale(self, x: Value, name: str) -> Value:
        return self.node("segment_scale", (x,), self.value(name, x.width), name)

    def relu(self, x: Value) -> Value:
        return self.node("relu", (x,), self.value(f"{x.name}.relu", x.width))

    def gelu(self, x: Value) -> Value:
        return self.node("gelu", (x,), self.value(f"{x.name}.gelu", x.width))

    def rope(self, x: Value) -> Value:
        return self.node("rope", (x,), self.value(f"{x.name}.rope", x.width), scale=math.sqrt(self.arch.score_scale))

    def attention(self, q: Value, k: Value, v: Value) -> Value:
        out = self.value("attention", q.width)
        lse = self.value("log_sum_exp", q.width // self.arch.head_dim, Element.WIDE)
        self.nodes.append(Node("attention", (q.name, k.name, v.name), (out.name, lse.name)))
        return out

    def silu_mul(self, gate: Value, up: Value) -> Value:
        return self.node("silu_mul", (gate, up), self.value("silu_mul", gate.width))

    def add(self, a: Value, b: Value, name: str = "sum") -> Value:
        return self.node("add", (a, b), self.value(name, a.width))

    def dropout(self, x: Value, site: str, p: float) -> Value:
        return self.node("dropout", (x,), self.value(f"{site}.dropout", x.width), site=site, p=p)


class _AtSites:
    """A bypass that tells the tracer which site it is at."""

    def __init__(self, bypass: Bypass, tracer: Tracer) -> None:
        self.bypass, self.tracer = bypass, tracer

    def enter(self, ops: Any, site: str, x: Any) -> Any:
        self.tracer.site = site
        try:
            return self.bypass.enter(ops, site, x)
        finally:
            self.tracer.site = None

    def apply(self, ops: Any, site: str, x: Any, out: Any) -> Any:
        self.tracer.site = site
        try:
            return self.bypass.apply(ops, site, x, out)
        finally:
            self.tracer.site = None


def trace(arch: Architecture, bypass: Bypass, factor_widths: Mapping[str, int], *, rotary: bool = True) -> Graph:
    """The graph of one decoder layer with `bypass`."""
    tracer = Tracer(arch, factor_widths)
    x = tracer.value("x", arch.hidden_size)
    y = layer(tracer, arch, _AtSites(bypass, tracer), x, rotary=rotary)
    return Graph(dict(tracer.values), tuple(tracer.nodes), x.name, y.name)
