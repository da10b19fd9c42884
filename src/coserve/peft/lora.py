"""LoRA and DoRA: the bypass in the operator vocabulary, and the adapter.

R rank. A site's update is scale * (dropout(x) A^T) B^T with A [R, in] and B [out, R]; scale = alpha / R, or alpha / sqrt(R)
with rsLoRA. Sources: Hu et al. 2021, Liu et al. 2024 (DoRA); names and defaults as in PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from coserve.config.settings import LINEAR_SITES, LoraConfig
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, NoBypass, linear_shapes
from coserve.model.linear import FrozenLinear
from coserve.model.weights import ModelWeights
from coserve.ops.run import Factor
from coserve.ops.vocabulary import Vocabulary
from coserve.peft.adapter import Adapter, Parameter, sites_with, targeted_modules
from coserve.peft.patterns import by_pattern, require_matches

V = TypeVar("V")


class LoraBypass(NoBypass):
    """LoRA at some sites of a layer; `rescaled` ones are DoRA's."""

    def __init__(self, sites: Collection[str], dropout: float = 0.0, rescaled: Collection[str] = ()) -> None:
        self.sites, self.dropout, self.rescaled = sites, dropout, rescaled

    @classmethod
    def of(cls, names: Collection[str], dropout: float) -> LoraBypass:
        """The kind: the sites of SITE.lora_A and SITE.dora."""
        return cls(sites_with(names, "lora_A"), dropout, sites_with(names, "dora"))

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        if site not in self.sites:
            return out
        if self.dropout > 0:
            x = ops.dropout(x, site, self.dropout)
        delta = ops.segment_linear(ops.segment_linear(x, f"{site}.lora_A"), f"{site}.lora_B")
        out = ops.add(out, delta, f"{site}+lora")
        return ops.add(out, ops.segment_scale(out, f"{site}.dora"), f"{site}+dora") if site in self.rescaled else out


class LoraSite(NamedTuple):
    """The parameters of one site: A [R, in] and B [out, R]; and DoRA's lengths (PEFT's magnitude) [out, 1], less those of the
    frozen weight's rows."""

    a: Parameter
    b: Parameter
    dora: Parameter | None

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self if p is not None)

    @property
    def end(self) -> int:
        """The element of the flat tensor behind the site's last one."""
        return max(p.end for p in self.parameters)

    @property
    def key(self) -> tuple[int, str]:
        """(layer, site)."""
        return self.a.layer, self.a.site


def lora_layout(arch: Architecture, config: LoraConfig) -> tuple[LoraSite, ...]:
    """The sites a config names, in layer order. Raises ConfigError for a target or a pattern that matches no module."""
    shapes = linear_shapes(arch)
    targets = LINEAR_SITES if config.target_modules == "all-linear" else config.target_modules
    modules = targeted_modules(arch.num_layers, targets)
    names = list(modules.values())
    ranks, idle_ranks = by_pattern(config.rank_pattern, names, "rank_pattern")
    alphas, idle_alphas = by_pattern(config.alpha_pattern, names, "alpha_pattern")
    require_matches(idle_ranks, names, "rank_pattern")
    require_matches(idle_alphas, names, "alpha_pattern")
    sites: list[LoraSite] = []
    for (layer, site), name in modules.items():
        rank, alpha = ranks.get(name, config.r), alphas.get(name, config.alpha)
        num_out, num_in = shapes[site]
        a = Parameter(
            layer=layer, name=f"{site}.lora_A", shape=(rank, num_in), offset=sites[-1].end if sites else 0, rank_axis=0,
            bound=1 / math.sqrt(num_in),  # as PEFT draws it: Kaiming, a = sqrt 5
        )
        b = Parameter(
            layer=layer, name=f"{site}.lora_B", shape=(num_out, rank), offset=a.end, rank_axis=1,
            scale=alpha / (math.sqrt(rank) if config.use_rslora else rank),
        )
        dora = Parameter(layer=layer, name=f"{site}.dora", shape=(num_out, 1), offset=b.end) if config.use_dora else None
        sites.append(LoraSite(a, b, dora))
    return tuple(sites)


class FrozenRows(NamedTuple):
    """A site's frozen weight: `rows` of a linear that may hold several sites' and has `width` of them; bias [out]; the rows'
    lengths [out], in float32 or wider."""

    linear: FrozenLinear
    width: int
    rows: slice
    bias: Tensor | None
    lengths: Tensor

    def product(self, a: Tensor) -> Tensor:
        """a [R, in] W^T: [R, out]."""
        product = a.new_empty(a.shape[0], self.width)
        self.linear.forward(product, a)
        own = self.linear.bias
        return product[:, self.rows] if own is None else product[:, self.rows] - own[self.rows]


def updated_norms(lengths: Tensor, product: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + s B A| by rows [out], from products as thin as the rank: |W|^2 + 2 s (W A^T).B + s^2 (B A A^T).B.

    lengths: |W| by rows [out], in float32 or wider. product: A W^T [R, out]. a: [R, in]. b: [out, R]. scale: s.
    """
    wide_a, wide_b = a.to(lengths.dtype), b.to(lengths.dtype)
    cross = (product.T * wide_b).sum(1)
    own = ((wide_b @ (wide_a @ wide_a.T)) * wide_b).sum(1)
    return (lengths.square() + 2 * scale * cross + scale**2 * own).clamp_(min=0).sqrt_()


class LoraAdapter(Adapter):
    """LoRA or DoRA. DoRA multiplies row i of the updated weight W + s B A by length_i / |row i|, as a scaling of the output
    about the bias; the norm is no part of the gradient. `bind` gives it the backbone, without which it can't run."""

    config: LoraConfig

    def __init__(
        self, config: LoraConfig, sites: Sequence[LoraSite], flat: Tensor, *, num_layers: int, grad: Tensor | None = None,
        bases: Mapping[tuple[int, str], FrozenRows] | None = None,
    ) -> None:
        super().__init__(
            config, LoraBypass.of, [p for site in sites for p in site.parameters], flat, num_layers=num_layers, grad=grad
        )
        self.sites, self._bases = tuple(sites), bases
        self.lengths: dict[tuple[int, str], Tensor] = {}
        """Of the frozen weight's rows [out], by site, where DoRA was bound to its backbone."""

    @classmethod
    def empty(cls, arch: Architecture, config: LoraConfig, *, dtype: torch.dtype, device: torch.device) -> LoraAdapter:
        """One whose values have not been written."""
        sites = lora_layout(arch, config)
        return cls(config, sites, torch.empty(sites[-1].end, dtype=dtype, device=device), num_layers=arch.num_layers)

    @classmethod
    def create(
        cls, arch: Architecture, config: LoraConfig, *, dtype: torch.dtype, device: torch.device, seed: int
    ) -> LoraAdapter:
        """A new LoRA adapter, which needs no backbone: A uniform, B zero."""
        return cls.empty(arch, config, dtype=dtype, device=device).start(seed)

    @torch.no_grad()
    def bind(self, weights: ModelWeights) -> None:
        if not self.config.use_dora:
            return
        wide = torch.promote_types(self.flat.dtype, torch.float32)
        shapes, bases = linear_shapes(weights.architecture), {}
        for site in self.sites:
            layer, own_name = site.key
            linears = weights.layers[layer].linears
            name, together = next((item for item in MERGED.items() if own_name in item[1]), (own_name, (own_name,)))
            widths = [shapes[each][0] for each in together]
            start = sum(widths[: together.index(own_name)])
            own = linears[own_name]
            rows = slice(start, start + shapes[own_name][0])
            lengths = torch.linalg.vector_norm(own.weight, dim=1, dtype=wide)
            bases[site.key] = self._base(site, FrozenRows(linears[name], sum(widths), rows, own.bias, lengths), weights)
        self._bases = bases
        self.lengths = self.lengths or {key: base.lengths for key, base in bases.items()}
        self.refresh()

    def _base(self, site: LoraSite, base: FrozenRows, weights: ModelWeights) -> FrozenRows:
        """What DoRA computes with at a site, of what these weights have there."""
        return base

    def origin(self, p: Parameter) -> Tensor | None:
        if p.part != "dora":
            return None
        assert self.lengths, "a DoRA adapter is bound to its backbone first"
        return self.lengths[p.layer, p.site][:, None]

    @torch.no_grad()
    def refresh(self, start: int = 0, end: int | None = None) -> None:
        """Recomputes DoRA's scalings from A, B and the lengths: site by site, as the slices of an optimizer step reach its
        end."""
        if self._bases is None:
            return
        end = self.flat.numel() if end is None else end
        for site in self.sites:
            if site.dora is None or not start < site.end <= end:
                continue
            base, factors = self._bases[site.key], self._factors[site.dora.layer]
            norms = self._norms(site, base)
            matrix = ((base.lengths - norms + site.dora.of(self.flat)[:, 0]) / norms).to(self.flat.dtype)[:, None]
            factors[site.dora.name] = factors[site.dora.name]._replace(matrix=matrix, center=base.bias, slope=1 / norms)

    def _norms(self, site: LoraSite, base: FrozenRows) -> Tensor:
        """|W + s B A| by rows [out]."""
        a, b = site.a.of(self.flat), site.b.of(self.flat)
        return updated_norms(base.lengths, base.product(a), a, b, self._scale(site))

    def _scale(self, site: LoraSite) -> float:
        return self._factors[site.b.layer][site.b.name].scale

    def factor(self, layer: int, name: str) -> Factor | None:
        factor = super().factor(layer, name)
        assert factor is None or not self.config.use_dora or self._bases is not None, "DoRA is bound to its backbone first"
        return factor

    def _like(self, flat: Tensor, grad: Tensor | None) -> Self:
        """The same adapter over another flat tensor."""
        return type(self)(self.config, self.sites, flat, num_layers=self.num_layers, grad=grad, bases=self._bases)

    def _over(self, flat: Tensor, grad: Tensor | None) -> Self:
        other = self._like(flat, grad)
        other.lengths = self.lengths
        if self._bases is not None:
            for p in (p for p in self.parameters if p.part == "dora"):  # scalings are replaced, never written to
                own, factors = self._factors[p.layer][p.name], other._factors[p.layer]
                factors[p.name] = factors[p.name]._replace(matrix=own.matrix, center=own.center, slope=own.slope)
        return other
