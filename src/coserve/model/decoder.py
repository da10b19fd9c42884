"""The decoder layer of every family, written once against the operator vocabulary.

Owns: the order of operators, the names of sites, and the shapes and biases of the frozen linears. Does not own: weights,
memory or how an operator runs. A bypass is called at every linear site with the site's input and output.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from coserve.model.architecture import Architecture
from coserve.ops.vocabulary import Vocabulary

V = TypeVar("V")

MODULE_PATHS = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Site -> module path below a layer, in Hugging Face's names."""

MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Frozen linears whose rows lie in one matrix, so that one product serves them all."""


class Bypass(Protocol):
    """A trainable subgraph beside the backbone: reads a site's tensors and adds to the site's input or output."""

    def enter(self, ops: Vocabulary[V], site: str, x: V) -> V:
        """The site's input with the bypass added; `x` itself where the bypass has nothing there."""

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        """The site's output with the bypass added; `out` itself where the bypass has nothing at this site."""


class NoBypass:
    """The bare backbone; and what kinds of bypass override."""

    def enter(self, ops: Vocabulary[V], site: str, x: V) -> V:
        return x

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        return out


def linear_shapes(arch: Architecture) -> dict[str, tuple[int, int]]:
    """(out features, in features) of each linear site."""
    d, inner = arch.hidden_size, arch.intermediate_size
    queries, keys = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    return {
        "q_proj": (queries, d), "k_proj": (keys, d), "v_proj": (keys, d), "o_proj": (d, queries),
        "gate_proj": (inner, d), "up_proj": (inner, d), "down_proj": (d, inner),
    }


def biased_sites(arch: Architecture) -> frozenset[str]:
    """The linear sites that add a bias."""
    attention = MERGED["qkv_proj"] if arch.qkv_bias else ()
    mlp = (*MERGED["gate_up_proj"], "down_proj") if arch.mlp_bias else ()
    return frozenset({*attention, *mlp, *(["o_proj"] if arch.o_bias else [])})


def layer(ops: Vocabulary[V], arch: Architecture, bypass: Bypass, x: V, *, rotary: bool = True) -> V:
    """One decoder layer: x and the result are the residual stream, one row per token. rotary: whether it turns q and k."""

    def project(site: str, value: V) -> V:
        value = bypass.enter(ops, site, value)
        return bypass.apply(ops, site, value, ops.linear(value, site))

    normed = ops.rmsnorm(x, "input_layernorm")
    q, k, v = project("q_proj", normed), project("k_proj", normed), project("v_proj", normed)
    if arch.qk_norm:
        q, k = ops.rmsnorm(q, "q_norm"), ops.rmsnorm(k, "k_norm")
    if rotary:
        q, k = ops.rope(q), ops.rope(k)
    attended = ops.attention(q, k, v)
    h = ops.add(x, project("o_proj", attended), "h")
    normed = ops.rmsnorm(h, "post_attention_layernorm")
    inner = ops.silu_mul(project("gate_proj", normed), project("up_proj", normed))
    return ops.add(h, project("down_proj", inner), "y")
