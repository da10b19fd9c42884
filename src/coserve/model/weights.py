"""Frozen weights as objects with two products, and the whole backbone made of them.

Owns: layouts (merged q/k/v and gate/up) and the products. A quantized or packed layout is another class with the same two
methods. Does not own: reading files (checkpoint.py), what the products are used for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.model.architecture import Architecture
from coserve.model.checkpoint import Checkpoint
from coserve.model.decoder import MERGED, MODULE_PATHS, linear_shapes


class FrozenLinear:
    """y = x W^T (+ bias), and its input gradient dy W. weight: [out, in]; bias: [out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def forward(self, out: Tensor, x: Tensor, accumulate: bool = False) -> None:
        """out [T, out] (+)= x [T, in] W^T + bias."""
        if accumulate:
            out.addmm_(x, self.weight.T)
            if self.bias is not None:
                out.add_(self.bias)
        elif self.bias is not None:
            torch.addmm(self.bias, x, self.weight.T, out=out)
        else:
            torch.mm(x, self.weight.T, out=out)

    def input_grad(self, out: Tensor, grad: Tensor, accumulate: bool = False) -> None:
        """out [T, in] (+)= grad [T, out] W."""
        if accumulate:
            out.addmm_(grad, self.weight)
        else:
            torch.mm(grad, self.weight, out=out)

    def rows(self, start: int, end: int) -> FrozenLinear:
        """The linear of output features [start, end), sharing memory."""
        return FrozenLinear(self.weight[start:end], None if self.bias is None else self.bias[start:end])


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """linears: by site, and by merged name; norms: by name."""

    linears: Mapping[str, FrozenLinear]
    norms: Mapping[str, Tensor]

    def parameter(self, op: str, name: str) -> FrozenLinear | Tensor:
        """What an operator of the layer's program computes with."""
        return self.linears[name] if op.startswith("linear") else self.norms[name]


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """embedding, head: [vocabulary, hidden] (the same tensor when tied); norm: the final norm's weight [hidden]."""

    architecture: Architecture
    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights, tied ones once."""
        tensors = [self.embedding, self.norm]
        if self.head is not self.embedding:
            tensors.append(self.head)
        for layer in self.layers:
            tensors += layer.norms.values()
            for name, linear in layer.linears.items():
                if name in MERGED or not any(name in sites for sites in MERGED.values()):
                    tensors += [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _merge(checkpoint: Checkpoint, prefix: str, sites: Sequence[str], has_bias: bool, dtype: torch.dtype,
           device: torch.device) -> FrozenLinear:
    """Reads several linears of one input into one matrix, tensor by tensor."""
    shapes = linear_shapes(checkpoint.architecture)
    total, width = sum(shapes[site][0] for site in sites), shapes[sites[0]][1]
    weight = torch.empty(total, width, dtype=dtype, device=device)
    bias = torch.empty(total, dtype=dtype, device=device) if has_bias else None
    start = 0
    for site in sites:
        end = start + shapes[site][0]
        path = f"{prefix}{MODULE_PATHS[site]}"
        weight[start:end] = checkpoint.read(f"{path}.weight", dtype, device)
        if bias is not None:
            bias[start:end] = checkpoint.read(f"{path}.bias", dtype, device)
        start = end
    return FrozenLinear(weight, bias)


def _load_layer(checkpoint: Checkpoint, index: int, dtype: torch.dtype, device: torch.device) -> LayerWeights:
    arch = checkpoint.architecture
    prefix = f"model.layers.{index}."
    shapes = linear_shapes(arch)
    biased = {"q_proj": arch.qkv_bias, "o_proj": arch.o_bias, "gate_proj": arch.mlp_bias, "down_proj": arch.mlp_bias}
    linears = {}
    for name, sites in MERGED.items():
        whole = _merge(checkpoint, prefix, sites, biased[sites[0]], dtype, device)
        linears[name] = whole
        start = 0
        for site in sites:
            linears[site] = whole.rows(start, start + shapes[site][0])
            start += shapes[site][0]
    for site in ("o_proj", "down_proj"):
        linears[site] = _merge(checkpoint, prefix, (site,), biased[site], dtype, device)
    names = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
    if arch.qk_norm:
        names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    norms = {name: checkpoint.read(f"{prefix}{path}.weight", dtype, device) for name, path in names.items()}
    return LayerWeights(linears, norms)


def load_weights(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> ModelWeights:
    """Streams a checkpoint onto the device. progress(layers done, layers)."""
    arch = checkpoint.architecture
    embedding = checkpoint.read("model.embed_tokens.weight", dtype, device)
    head = embedding if arch.tie_word_embeddings else checkpoint.read("lm_head.weight", dtype, device)
    layers = []
    for index in range(arch.num_layers):
        layers.append(_load_layer(checkpoint, index, dtype, device))
        if progress is not None:
            progress(index + 1, arch.num_layers)
    return ModelWeights(arch, embedding, layers, checkpoint.read("model.norm.weight", dtype, device), head)
