"""The backbone's weights on a device.

Owns: which linears lie in one matrix, and the loading order. Does not own: reading files (checkpoint.py), the products
(linear.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coserve.model.architecture import Architecture
from coserve.model.checkpoint import Checkpoint
from coserve.model.decoder import MERGED, MODULE_PATHS, biased_sites, linear_shapes
from coserve.model.linear import FrozenLinear, OutputHead, can_pack, make_head, make_linear


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
    """embedding: [vocabulary, hidden], which the head shares when tied; norm: the final norm's weight [hidden], divided by what
    divides the logits."""

    architecture: Architecture
    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: OutputHead

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def products(self) -> tuple[FrozenLinear | OutputHead, ...]:
        """The objects that hold matrices: every linear, and the head."""
        return (*(linear for layer in self.layers for linear in layer.linears.values()), self.head)

    @property
    def layout(self) -> str:
        """As the head's."""
        return self.head.layout

    @property
    def copied_bytes(self) -> int:
        """Bytes of packed copies beyond one of each matrix."""
        return sum(each.copied_bytes for each in self.products)

    def embed(self, out: Tensor, token_ids: Tensor) -> None:
        """out [T, hidden] = the residual stream before the first layer; token_ids: int64 [T]."""
        torch.index_select(self.embedding, 0, token_ids, out=out)
        if self.architecture.embedding_scale != 1:
            out.mul_(self.architecture.embedding_scale)

    def hold_one_copy(self, wanted: bool) -> None:
        """Whether each matrix may be held only once from now on; copies beyond that are dropped. Products that would read them
        get slower, and their last bits change."""
        for each in self.products:
            each.hold_one_copy(wanted)


def _merge(
    checkpoint: Checkpoint, prefix: str, sites: Sequence[str], dtype: torch.dtype, device: torch.device, packed: bool,
    one_copy: bool,
) -> FrozenLinear:
    """Reads several linears of one input into one matrix, tensor by tensor."""
    shapes = linear_shapes(checkpoint.architecture)
    total, width = sum(shapes[site][0] for site in sites), shapes[sites[0]][1]
    weight = torch.empty(total, width, dtype=dtype, device=device)
    bias = torch.empty(total, dtype=dtype, device=device) if sites[0] in biased_sites(checkpoint.architecture) else None
    start = 0
    for site in sites:
        end = start + shapes[site][0]
        path = f"{prefix}{MODULE_PATHS[site]}"
        weight[start:end] = checkpoint.read(f"{path}.weight", dtype, device)
        if bias is not None:
            bias[start:end] = checkpoint.read(f"{path}.bias", dtype, device)
        start = end
    return make_linear(weight, bias, packed=packed, one_copy=one_copy)


def _load_layer(
    checkpoint: Checkpoint, index: int, dtype: torch.dtype, device: torch.device, packed: bool, one_copy: bool
) -> LayerWeights:
    arch = checkpoint.architecture
    prefix = f"model.layers.{index}."
    shapes = linear_shapes(arch)
    linears: dict[str, FrozenLinear] = {}
    for name, sites in MERGED.items():
        whole = _merge(checkpoint, prefix, sites, dtype, device, packed, one_copy)
        linears[name] = whole
        start = 0
        for site in sites:
            linears[site] = whole.rows(start, start + shapes[site][0])
            linears[site].hold_one_copy(one_copy)
            start += shapes[site][0]
    for site in ("o_proj", "down_proj"):
        linears[site] = _merge(checkpoint, prefix, (site,), dtype, device, packed, one_copy)
    names = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
    if arch.qk_norm:
        names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    norms = {name: checkpoint.read(f"{prefix}{path}.weight", dtype, device) for name, path in names.items()}
    return LayerWeights(linears, norms)


def load_weights(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, packed: bool | None = None, one_copy: bool = False
) -> ModelWeights:
    """Streams a checkpoint onto the device.

    packed: whether linears are kept in the processor's own layout; default: where that pays (`can_pack`).
    one_copy: whether each matrix is held once (`ModelWeights.hold_one_copy`).
    """
    if packed is None:
        packed = can_pack(dtype, device)
    arch = checkpoint.architecture
    embedding = checkpoint.read("model.embed_tokens.weight", dtype, device)
    table = embedding if arch.tie_word_embeddings else checkpoint.read("lm_head.weight", dtype, device)
    layers = [_load_layer(checkpoint, index, dtype, device, packed, one_copy) for index in range(arch.num_layers)]
    norm = checkpoint.read("model.norm.weight", dtype, device).div_(arch.logits_scaling)
    return ModelWeights(arch, embedding, layers, norm, make_head(table, packed=packed, one_copy=one_copy))
