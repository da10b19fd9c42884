"""One rank's part of an adapter, and the whole adapter from the ranks' parts.

Files, checkpoints and new adapters have the whole; only memory is shared. Parameters whose gradients are sums over all ranks
come first in a rank's flat tensor, so that one all-reduce per optimizer step sums them. Next come those that several ranks have
the same slice of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from coserve.config.settings import AdapterConfig, LoraConfig
from coserve.core import InvalidRequest
from coserve.model.decoder import ROW_SITES, column_parts
from coserve.model.weights import ModelWeights
from coserve.parallel import Ranks, Sharding, Shardings
from coserve.peft.adapter import Adapter, Parameter, num_elements
from coserve.peft.foreign import refuse
from coserve.peft.format import WEIGHTS_FILE, fill_adapter, require_finite
from coserve.peft.gate import PassedAdapter
from coserve.peft.kinds import empty_adapter
from coserve.peft.lora import FrozenRows, LoraAdapter, LoraSite, updated_norms


class RankLayout:
    """Where one rank's part of an adapter lies. whole: all parameters. own: this rank's, in their order in its flat tensor (see
    `_order`)."""

    def __init__(self, whole: Sequence[Parameter], shardings: Shardings, ranks: Ranks) -> None:
        self.whole, self.shardings, self.ranks = tuple(whole), shardings, ranks
        order = sorted(self.whole, key=self._order)
        own: list[Parameter] = []
        for p in order:
            sharding = self.of(p)
            shape = list(p.shape)
            if sharding.axis is not None:
                shape[sharding.axis] //= sharding.parts
            own.append(replace(p, shape=(shape[0], shape[1]), offset=own[-1].end if own else 0))
        self.own = tuple(own)
        self._ends = [num_elements([p for p in own if self._order(p) <= last]) for last in range(4)]

    def of(self, p: Parameter) -> Sharding:
        """How a parameter is held."""
        return self.shardings[p.layer, p.name]

    def _order(self, p: Parameter) -> int:
        """0: every rank has the parameter, and its gradient is a sum over ranks. 1: ranks that have the same slice sum its
        gradient. 2: every rank has the parameter and all of its gradient. 3: each rank has a slice of its own."""
        sharding = self.of(p)
        return (0 if sharding.axis is None else 1) if sharding.summed else (2 if sharding.axis is None else 3)

    def take(self, flat: Tensor) -> Tensor:
        """This rank's flat tensor, of a whole one."""
        own = flat.new_empty(num_elements(self.own))
        places = {(p.layer, p.name): p for p in self.whole}
        for p in self.own:
            whole = places[p.layer, p.name].of(flat)
            p.of(own).copy_(self.of(p).part(whole, self.ranks.rank, self.ranks.size))
        return own

    def join(self, own: Tensor) -> Tensor:
        """The whole flat tensor, of this rank's; all ranks call it together."""
        parts = own.new_empty(self.ranks.size * own.numel())
        self.ranks.gather(parts, own)
        flat = own.new_empty(num_elements(self.whole))
        places = {(p.layer, p.name): p for p in self.own}
        for p in self.whole:
            sharding, place = self.of(p), places[p.layer, p.name]
            slices = [place.of(part) for part in parts.view(self.ranks.size, -1)[:: self.ranks.size // sharding.parts]]
            p.of(flat).copy_(slices[0] if sharding.axis is None else torch.cat(slices, dim=sharding.axis))
        return flat

    def sum_gradients(self, grad: Tensor) -> None:
        """Completes this rank's flat gradient before an optimizer step."""
        summed, copied, _, _ = self._segments(grad)
        if summed.numel():
            self.ranks.sum(summed)
        if copied.numel():
            first = self.ranks.rank // self._copies * self._copies
            found = copied.new_empty(self.ranks.size * copied.numel())
            self.ranks.gather(found, copied)
            copied.copy_(found.view(self.ranks.size, -1)[first : first + self._copies].sum(0))

    def norm(self, own: Tensor) -> float:
        """The norm of the whole flat tensor, of this rank's; all ranks call it together."""
        summed, copied, whole, split = (float(torch.linalg.vector_norm(part)) ** 2 for part in self._segments(own))
        squares = split
        if self.ranks.rank == 0:
            squares += summed + whole
        if copied and self.ranks.rank % self._copies == 0:
            squares += copied
        total = torch.tensor([squares], dtype=torch.float64, device=own.device)
        return math.sqrt(float(self.ranks.sum(total)))

    @property
    def _copies(self) -> int:
        """How many ranks have the same slice, where several do: they are those with the same key-value heads."""
        parts = next(sharding.parts for sharding in self.shardings.values() if sharding.summed and sharding.axis is not None)
        return self.ranks.size // parts

    def _segments(self, own: Tensor) -> list[Tensor]:
        """This rank's flat tensor by `_order`."""
        return [own[start:end] for start, end in pairwise((0, *self._ends))]

    def gathered(self, p: Parameter, own: Tensor) -> Tensor:
        """A whole parameter [out, in], of this rank's part; all ranks call it together."""
        sharding = self.of(p)
        if sharding.axis is None:
            return own
        rows = own if sharding.axis == 1 else own.T
        whole = gather_parts(self.ranks, rows, sharding.parts)
        return whole if sharding.axis == 1 else whole.T


def num_on_rank(parameters: Sequence[Parameter], shardings: Shardings) -> int:
    """Elements of an adapter that each rank has."""
    return sum(p.shape[0] * p.shape[1] // shardings[p.layer, p.name].parts for p in parameters)


def gather_parts(ranks: Ranks, own: Tensor, parts: int) -> Tensor:
    """The whole [T, W], of every rank's [T, W / parts]; neighbours have the same where there are more ranks than parts."""
    whole = own.new_empty(own.shape[0], ranks.size * own.shape[1])
    ranks.gather(whole, own)
    return whole.unflatten(1, (ranks.size, -1))[:, :: ranks.size // parts].flatten(1)


class SharedLora(LoraAdapter):
    """One rank's part of a LoRA or DoRA adapter. DoRA's norms are those of whole rows, which no rank has alone: each computes
    them from products that are put together."""

    def __init__(
        self, config: LoraConfig, sites: Sequence[LoraSite], flat: Tensor, *, num_layers: int, layout: RankLayout,
        grad: Tensor | None = None, bases: Mapping[tuple[int, str], FrozenRows] | None = None,
    ) -> None:
        super().__init__(config, sites, flat, num_layers=num_layers, grad=grad, bases=bases)
        self.layout = layout
        self._parts: dict[tuple[int, str], int] = {}
        """Into how many different slices the outputs of column-parallel sites are split."""

    @classmethod
    def part_of(cls, whole: LoraAdapter, layout: RankLayout) -> SharedLora:
        """This rank's part of a whole adapter, not yet bound to a backbone."""
        own = {(p.layer, p.name): p for p in layout.own}
        sites = [
            LoraSite(*(None if p is None else own[p.layer, p.name] for p in site)) for site in whole.sites  # type: ignore[arg-type]
        ]
        return cls(whole.config, sites, layout.take(whole.flat), num_layers=whole.num_layers, layout=layout)

    def _base(self, site: LoraSite, base: FrozenRows, weights: ModelWeights) -> FrozenRows:
        """Lengths and bias are those of the rows that the rank's part of the vector scales. Of a value that is a sum over ranks
        the bias is taken once, by the first."""
        assert site.dora is not None
        ranks, sharding = self.layout.ranks, self.layout.of(site.dora)
        bias = base.bias
        if site.a.site in ROW_SITES:
            lengths = ranks.sum(base.lengths.square()).sqrt_()
            bias = None if bias is None else ranks.sum(bias.clone())
        else:
            arch = weights.whole_architecture
            assert arch is not None
            self._parts[site.key] = parts = column_parts(arch.num_kv_heads, site.a.site, ranks.size)
            lengths = gather_parts(ranks, base.lengths[None], parts)[0]
            bias = None if bias is None else gather_parts(ranks, bias[None], parts)[0]
        self.lengths[site.key] = lengths  # of all rows, as files need them
        if bias is not None:
            bias = bias * (ranks.rank == 0) if sharding.reads == "+" else sharding.part(bias, ranks.rank, ranks.size)
        return base._replace(lengths=sharding.part(lengths, ranks.rank, ranks.size), bias=bias)

    def _norms(self, site: LoraSite, base: FrozenRows) -> Tensor:
        """|W + s B A| of the rows that the rank's part of the vector scales; all ranks call it together."""
        assert site.dora is not None
        ranks, sharding = self.layout.ranks, self.layout.of(site.dora)
        a, b = (self.layout.gathered(p, p.of(self.flat)) for p in (site.a, site.b))
        if site.a.site in ROW_SITES:
            product = ranks.sum(base.product(ranks.mine(a).contiguous()).contiguous())
        else:
            product = gather_parts(ranks, base.product(a), self._parts[site.key])
        product, b = (sharding.part(each, ranks.rank, ranks.size) for each in (product.T, b))
        return updated_norms(base.lengths, product.T, a, b, self._scale(site))

    def _like(self, flat: Tensor, grad: Tensor | None) -> Self:
        other = type(self)(
            self.config, self.sites, flat, num_layers=self.num_layers, layout=self.layout, grad=grad, bases=self._bases
        )
        other._parts = self._parts
        return other


def rank_adapter(whole: Adapter, layout: RankLayout) -> Adapter:
    """This rank's part of an adapter, not yet bound to a backbone."""
    if isinstance(whole, LoraAdapter):
        own: Adapter = SharedLora.part_of(whole, layout)
    else:
        own = Adapter(whole.config, whole.kind, layout.own, layout.take(whole.flat), num_layers=whole.num_layers)
    own.end_token_ids = whole.end_token_ids
    return own


def shared_adapter(
    weights: ModelWeights, config: AdapterConfig, shardings: Shardings, *, seed: int, passed: PassedAdapter | None = None
) -> tuple[Adapter, RankLayout]:
    """This rank's part of an adapter, bound to its weights: one as a job starts it, or one that was read from files. Which
    values it has does not depend on the number of ranks; all ranks call it together. passed: settings and tensors from files.
    Raises InvalidRequest for values that are not finite on this base."""
    arch = weights.whole_architecture
    assert arch is not None, "the weights are one rank's"
    whole = empty_adapter(arch, config, dtype=weights.dtype, device=weights.device)
    layout = RankLayout(whole.parameters, shardings, weights.ranks)
    own = rank_adapter(whole.start(seed), layout)
    own.bind(weights)
    if passed is None:
        return own, layout
    if isinstance(whole, LoraAdapter) and isinstance(own, LoraAdapter):
        whole.lengths = own.lengths
    fill_adapter(whole, passed)
    own.flat.copy_(layout.take(whole.flat))
    own.refresh()
    own.end_token_ids = whole.end_token_ids
    _require_finite_everywhere(own, weights.ranks)
    return own, layout


def _require_finite_everywhere(own: Adapter, ranks: Ranks) -> None:
    """As `require_finite`, for all ranks: either all raise InvalidRequest or none."""
    error: InvalidRequest | None = None
    try:
        require_finite(own)
    except InvalidRequest as found:
        error = found
    failed = ranks.sum(torch.tensor([float(error is not None)], device=own.flat.device))
    if error is None and failed:
        error = refuse(f"{WEIGHTS_FILE}: on this base it gives values that are not finite")
    if error is not None:
        raise error


def whole_view(own: Adapter, layout: RankLayout, weights: ModelWeights) -> Adapter:
    """An adapter with the settings and parameters of the whole one, for `save_adapter`. Its own values have no meaning."""
    arch = weights.whole_architecture
    assert arch is not None and own.config is not None
    view = empty_adapter(arch, own.config, dtype=torch.float32, device=torch.device("meta"))
    if isinstance(view, LoraAdapter) and isinstance(own, LoraAdapter):
        view.lengths = own.lengths
    view.end_token_ids = own.end_token_ids
    return view
