"""The model-level operators as a protocol: what the decoder and the bypasses are written in.

Values are opaque to the decoder: symbols under the compiler's tracer, tensors under the tests' `TorchOps`. Every value has one
row per token. Parameters are named, never passed: a norm or linear by its site, an adapter's factor as "SITE.lora_A".
"""

from __future__ import annotations

from typing import Protocol, TypeVar

V = TypeVar("V")


class Vocabulary(Protocol[V]):
    def rmsnorm(self, x: V, name: str) -> V:
        """Norm over groups as wide as the weight `name`."""

    def linear(self, x: V, site: str) -> V:
        """The frozen linear of `site`, with its bias if it has one."""

    def segment_linear(self, x: V, name: str) -> V:
        """Factor `name` of each row's adapter, times its scale; 0 for rows without an adapter."""

    def segment_scale(self, x: V, name: str) -> V:
        """What scaling by the vector `name` of each row's adapter adds to x; 0 for rows without an adapter."""

    def relu(self, x: V) -> V:
        """max(x, 0)."""

    def gelu(self, x: V) -> V:
        """x Phi(x), exactly."""

    def rope(self, x: V) -> V:
        """Rotary embedding of each head at the row's position."""

    def attention(self, q: V, k: V, v: V) -> V:
        """Causal attention within each row's sequence."""

    def silu_mul(self, gate: V, up: V) -> V:
        """silu(gate) * up."""

    def add(self, a: V, b: V, name: str = "sum") -> V:
        """a + b; `name` is what plans call the sum."""

    def dropout(self, x: V, site: str, p: float) -> V:
        """Inverted dropout with the site's mask."""
