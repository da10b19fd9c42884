"""The backbone's weights on a device.

Owns: which linears lie in one matrix, and the loading order. Does not own: reading files (checkpoint.py), the products
(linear.py).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from coserve.config.values import Quantization
from coserve.model.architecture import Architecture
from coserve.model.checkpoint import EMBEDDING, HEAD, Checkpoint
from coserve.model.decoder import MERGED, MODULE_PATHS, ROW_SITES, biased_sites, linear_shapes
from coserve.model.fp8 import DecodeBuffer, Fp8Rows, largest_elements
from coserve.model.linear import FrozenLinear, OutputHead, can_pack, make_head, make_linear
from coserve.model.rankcheckpoint import RankCheckpoint, TokenRange
from coserve.parallel import ALONE, Ranks

_LARGE = 16 << 20
"""Bytes of the embedding from which it is worth the milliseconds that `return_freed_memory` takes."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """linears: by site, and by merged name; norms: by name."""

    linears: Mapping[str, FrozenLinear]
    norms: Mapping[str, Tensor]

    def parameter(self, op: str, name: str) -> FrozenLinear | Tensor:
        """What an operator of the layer's program computes with."""
        return self.linears[name] if op.startswith("linear") else self.norms[name]


class Source(Protocol):
    """Where weights come from: a checkpoint, or one rank's part of it."""

    @property
    def architecture(self) -> Architecture:
        """Of the model, or what the rank has of it."""

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """One tensor by its Hugging Face name."""

    def row_magnitudes(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """The largest magnitude of each row of a matrix, float32 [out, 1], where `read` gives a part of the rows' elements;
        else None."""


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """embedding: [vocabulary, hidden], which the head shares when tied; norm: the final norm's weight [hidden], divided by what
    divides the logits. ranks: the group that shares the model. Where it has several ranks, architecture, linears, embedding and
    head are this rank's, tokens says whose rows the latter two have, and whole_architecture is the model's. quantization: of
    the linears."""

    architecture: Architecture
    embedding: Tensor
    layers: Sequence[LayerWeights]
    norm: Tensor
    head: OutputHead
    ranks: Ranks = ALONE
    tokens: TokenRange | None = None
    whole_architecture: Architecture | None = None
    quantization: Quantization = "none"

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
        """As the head's, and the linears' quantization."""
        return self.head.layout if self.quantization == "none" else f"{self.head.layout}, {self.quantization}"

    @property
    def copied_bytes(self) -> int:
        """Bytes of packed copies beyond one of each matrix."""
        return sum(each.copied_bytes for each in self.products)

    def embed(self, out: Tensor, token_ids: Tensor) -> None:
        """out [T, hidden] = the residual stream before the first layer; token_ids: int64 [T]."""
        if self.tokens is None:
            torch.index_select(self.embedding, 0, token_ids, out=out)
        else:
            self._embed_own(self.tokens, out, token_ids)
            self.ranks.reduce(out, out)
        if self.architecture.embedding_scale != 1:
            out.mul_(self.architecture.embedding_scale)

    def _embed_own(self, tokens: TokenRange, out: Tensor, token_ids: Tensor) -> None:
        """out [T, hidden] = the rows of this rank's tokens, 0 for those of others."""
        if tokens.first == tokens.end:
            out.zero_()
            return
        own = (token_ids >= tokens.first) & (token_ids < tokens.end)
        torch.index_select(self.embedding, 0, (token_ids - tokens.first).clamp_(0, tokens.end - tokens.first - 1), out=out)
        out.mul_(own[:, None])

    def return_freed_memory(self) -> None:
        """Gives the system back what laying these weights out has freed, if that may be much. glibc would keep it for later."""
        if self.device.type == "cpu" and self.embedding.nbytes >= _LARGE:
            with contextlib.suppress(OSError, AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)

    def hold_one_copy(self, wanted: bool) -> None:
        """Whether each matrix may be held only once from now on; copies beyond that are dropped. Products that would read them
        get slower, and their last bits change."""
        for each in self.products:
            each.hold_one_copy(wanted)


@dataclass(frozen=True, slots=True)
class _Form:
    """How matrices are laid out. packed, one_copy: as for `load_weights`. buffer: what those in 8-bit floats are decoded into;
    None: they keep the dtype."""

    dtype: torch.dtype
    device: torch.device
    packed: bool
    one_copy: bool
    buffer: DecodeBuffer | None


def _merge(checkpoint: Source, prefix: str, sites: Sequence[str], form: _Form) -> FrozenLinear:
    """Reads several linears of one input into one matrix, tensor by tensor."""
    shapes, dtype, device = linear_shapes(checkpoint.architecture), form.dtype, form.device
    total, width = sum(shapes[site][0] for site in sites), shapes[sites[0]][1]
    bias = torch.empty(total, dtype=dtype, device=device) if sites[0] in biased_sites(checkpoint.architecture) else None
    coded = None if form.buffer is None else Fp8Rows(total, width, bias, form.buffer, device)
    weight = torch.empty(total if coded is None else 0, width, dtype=dtype, device=device)
    start = 0
    for site in sites:
        rows, path = slice(start, start + shapes[site][0]), f"{prefix}{MODULE_PATHS[site]}"
        if coded is None:
            weight[rows] = checkpoint.read(f"{path}.weight", dtype, device)
        else:  # from what the file has, whatever the model's dtype
            name = f"{path}.weight"
            coded.encode(rows, checkpoint.read(name, torch.float32, device), checkpoint.row_magnitudes(name, device))
        if bias is not None:
            bias[rows] = checkpoint.read(f"{path}.bias", dtype, device)
        start = rows.stop
    if coded is not None:
        return coded.linear()
    return make_linear(weight, bias, packed=form.packed, one_copy=form.one_copy)


def _load_layer(checkpoint: Source, index: int, form: _Form) -> LayerWeights:
    arch = checkpoint.architecture
    prefix = f"model.layers.{index}."
    shapes = linear_shapes(arch)
    linears: dict[str, FrozenLinear] = {}
    for name, sites in MERGED.items():
        whole = _merge(checkpoint, prefix, sites, form)
        linears[name] = whole
        start = 0
        for site in sites:
            linears[site] = whole.rows(start, start + shapes[site][0])
            linears[site].hold_one_copy(form.one_copy)
            start += shapes[site][0]
    for site in ROW_SITES:
        linears[site] = _merge(checkpoint, prefix, (site,), form)
    names = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm"}
    if arch.qk_norm:
        names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    norms = {name: checkpoint.read(f"{prefix}{path}.weight", form.dtype, form.device) for name, path in names.items()}
    return LayerWeights(linears, norms)


def load_weights(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device, packed: bool | None = None, one_copy: bool = False,
    ranks: Ranks = ALONE, quantization: Quantization = "none",
) -> ModelWeights:
    """Streams a checkpoint onto the device, or of it what this one of several ranks has.

    packed: whether matrices are kept in the processor's own layout; default: where that pays (`can_pack`).
    one_copy: whether each of those is held once (`ModelWeights.hold_one_copy`).
    quantization: of the decoder layers' linears; fp8 has no packed layout, so that `packed` is the head's alone.
    """
    if packed is None:
        packed = can_pack(dtype, device)
    share = RankCheckpoint(checkpoint, ranks.rank, ranks.size) if ranks.size > 1 else None
    source: Source = checkpoint if share is None else share
    arch = source.architecture
    embedding = source.read(EMBEDDING, dtype, device)
    table = embedding if arch.tie_word_embeddings else source.read(HEAD, dtype, device)
    buffer = DecodeBuffer(largest_elements(arch), dtype, device) if quantization == "fp8" else None
    form = _Form(dtype, device, packed, one_copy, buffer)
    layers = [_load_layer(source, index, form) for index in range(arch.num_layers)]
    norm = source.read("model.norm.weight", dtype, device).div_(arch.logits_scaling)
    head = make_head(table, packed=packed, one_copy=one_copy)
    weights = ModelWeights(arch, embedding, layers, norm, head, ranks, quantization=quantization)
    weights.return_freed_memory()
    return weights if share is None else replace(weights, tokens=share.tokens, whole_architecture=checkpoint.architecture)
