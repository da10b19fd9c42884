"""The decoder layer of every family, written once against the operator vocabulary.

Owns: the order of operators, the names of sites, and the shapes and biases of the frozen linears. Does not own: weights,
memory or how an operator runs. A bypass is called at every linear site with the site's input and output.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Protocol, TypeVar

from coserve.core import ConfigError
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

ROW_SITES = ("o_proj", "down_proj")
"""Sites of which each rank of a tensor-parallel group has some input features. Of the others it has some output features."""


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


def column_parts(num_kv_heads: int, site: str, size: int) -> int:
    """Into how many different slices `size` ranks split the output of a site that is not in ROW_SITES. Keys and values have no
    more slices than heads: where there are more ranks, several have the same one."""
    return min(size, num_kv_heads) if site in ("k_proj", "v_proj") else size


def tensor_parallel_sizes(arch: Architecture) -> list[int]:
    """The numbers of ranks that can share a model: they divide the query heads and the MLP's width, and divide the key-value
    heads or are divided by their number. In the latter case several ranks have the same key-value head."""
    shared, keys = math.gcd(arch.num_heads, arch.intermediate_size), arch.num_kv_heads
    return [size for size in range(1, shared + 1) if shared % size == 0 and (keys % size == 0 or size % keys == 0)]


def rank_architecture(arch: Architecture, size: int) -> Architecture:
    """What each of `size` ranks has of a model: some of the heads, of the MLP's features and of the vocabulary, which is padded
    where it doesn't divide. Raises ConfigError for a number of ranks that can't share the model."""
    possible = tensor_parallel_sizes(arch)
    if size not in possible:
        raise ConfigError(
            f"tensor_parallel_size: {size} ranks can't share {arch.num_heads} heads, {arch.num_kv_heads} key-value heads and "
            f"an MLP of {arch.intermediate_size}; possible are {', '.join(map(str, possible))}", param="tensor_parallel_size",
        )
    return replace(
        arch, num_heads=arch.num_heads // size, num_kv_heads=max(1, arch.num_kv_heads // size),
        intermediate_size=arch.intermediate_size // size, vocab_size=-(-arch.vocab_size // size),
    )


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
