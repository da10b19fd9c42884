"""Adapters of any kind: named parameters in one flat tensor, and the bypass that reads them.

A kind is a function from the parameters' names that a layer has to a `Bypass`, and a layout. Parameters are called "SITE.PART";
kinds that may meet in a batch have parts of different names, so that rows of one kind pass the others' bypasses unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from coserve.config.settings import LINEAR_SITES, AdapterConfig
from coserve.config.values import shown
from coserve.core import ConfigError
from coserve.model.decoder import MODULE_PATHS, Bypass, NoBypass
from coserve.model.weights import ModelWeights
from coserve.ops.run import Factor
from coserve.ops.vocabulary import Vocabulary

V = TypeVar("V")

Kind = Callable[[frozenset[str], float], Bypass]
"""(names of the parameters in a layer, dropout) -> the bypass. Plans are shared between equal kinds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of an adapter and where it lies in the flat tensor, in elements.

    shape: [out, in]; [width, 1] of a scaling, which without a rank_axis is stored less 1. rank_axis: the
    dimension that is the adapter's own. scale: what the product is multiplied by, if anything.
    bound: it starts uniform in [-bound, bound].
    """

    layer: int
    name: str
    shape: tuple[int, int]
    offset: int
    rank_axis: int | None = None
    scale: float | None = None
    bound: float = 0.0

    @property
    def end(self) -> int:
        """The element behind its last one."""
        return self.offset + self.shape[0] * self.shape[1]

    @property
    def site(self) -> str:
        return self.name.rsplit(".", 1)[0]

    @property
    def part(self) -> str:
        return self.name.rsplit(".", 1)[1]

    @property
    def module(self) -> str:
        """The module's full name in Hugging Face's model."""
        return module_name(self.layer, self.site)

    def of(self, flat: Tensor) -> Tensor:
        """A view in a flat tensor of this layout."""
        return flat[self.offset : self.end].view(self.shape)


class Adapter:
    """One version of an adapter on a device: a flat tensor in the model's dtype, and its factors by layer and name.

    `grad`, a flat float32 tensor of the same layout (float64 when the model is), makes it trainable. config: None for a kind
    that no file holds.
    """

    def __init__(
        self, config: AdapterConfig | None, kind: Kind, parameters: Sequence[Parameter], flat: Tensor, *, num_layers: int,
        grad: Tensor | None = None,
    ) -> None:
        self.config, self.kind, self.parameters, self.flat, self.grad = config, kind, tuple(parameters), flat, grad
        self.num_layers = num_layers
        self.end_token_ids: tuple[int, ...] = ()
        """Tokens that end its answers beside the base's (generation_config.json)."""
        self._factors: list[dict[str, Factor]] = [{} for _ in range(num_layers)]
        for p in self.parameters:
            factor = Factor(p.of(flat), 1.0 if p.scale is None else p.scale, None if grad is None else p.of(grad))
            self._factors[p.layer][p.name] = factor

    def factor(self, layer: int, name: str) -> Factor | None:
        """A factor of a layer, if the adapter has it."""
        return self._factors[layer].get(name)

    def factor_widths(self, layer: int) -> dict[str, int]:
        """{factor: out features} of a layer."""
        return {name: factor.matrix.shape[0] for name, factor in self._factors[layer].items()}

    @property
    def rank(self) -> int:
        """The largest dimension of its own: rank or bottleneck; 0 if it has none."""
        return max((p.shape[p.rank_axis] for p in self.parameters if p.rank_axis is not None), default=0)

    @property
    def dropout(self) -> float:
        """In training."""
        return getattr(self.config, "dropout", 0.0)

    def start(self, seed: int) -> Self:
        """Gives all parameters their values before the first step."""
        flat = torch.zeros(self.flat.shape, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters:
            if p.bound:
                p.of(flat).uniform_(-p.bound, p.bound, generator=generator)
        self.flat.copy_(flat)
        self.refresh()
        return self

    def origin(self, p: Parameter) -> Tensor | None:
        """What a parameter's stored values are to be added to, [out, in] or like it; None for 0."""
        return torch.ones(1, dtype=torch.float64) if p.shape[1] == 1 and p.rank_axis is None else None

    def bind(self, weights: ModelWeights) -> None:
        """Tells the adapter which backbone it is on, for kinds that depend on it. Comes before the first use."""

    def refresh(self, start: int = 0, end: int | None = None) -> None:
        """Brings what follows from the parameters up to date, after they have changed: from those that end in elements
        [start, end) of the flat tensor; None: all from `start` on."""

    def trainable(self) -> Self:
        """The same memory with a gradient buffer."""
        wide = torch.promote_types(self.flat.dtype, torch.float32)
        return self._with_ends(self._over(self.flat, torch.zeros(self.flat.shape, dtype=wide, device=self.flat.device)))

    def copy(self) -> Self:
        """An independent version with the present values."""
        return self._with_ends(self._over(self.flat.clone(), None))

    def _over(self, flat: Tensor, grad: Tensor | None) -> Self:
        return type(self)(self.config, self.kind, self.parameters, flat, num_layers=self.num_layers, grad=grad)

    def _with_ends(self, other: Self) -> Self:
        other.end_token_ids = self.end_token_ids
        return other


class CompositeBypass(NoBypass):
    """The bypasses of all kinds in a batch. A row's adapter has the parameters of one of them; the others leave it alone."""

    def __init__(self, bypasses: Sequence[Bypass]) -> None:
        self.bypasses = bypasses

    def enter(self, ops: Vocabulary[V], site: str, x: V) -> V:
        for bypass in self.bypasses:
            x = bypass.enter(ops, site, x)
        return x

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        for bypass in self.bypasses:
            out = bypass.apply(ops, site, x, out)
        return out


def sites_with(names: Iterable[str], part: str) -> frozenset[str]:
    """The sites that have a parameter called `part`."""
    return frozenset(name.rsplit(".", 1)[0] for name in names if name.endswith(f".{part}"))


def num_elements(parameters: Sequence[Parameter]) -> int:
    """Of the flat tensor that holds them all."""
    return max((p.end for p in parameters), default=0)


def module_name(layer: int, site: str) -> str:
    """A linear's full name in Hugging Face's model."""
    return f"model.layers.{layer}.{MODULE_PATHS[site]}"


def all_modules(num_layers: int) -> dict[tuple[int, str], str]:
    """{(layer, site): full name} of every linear."""
    return {(layer, site): module_name(layer, site) for layer in range(num_layers) for site in LINEAR_SITES}


def is_targeted(name: str, targets: Iterable[str]) -> bool:
    """Whether a module is named by its last path components."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def targeted_modules(num_layers: int, targets: Sequence[str], field: str = "target_modules") -> Mapping[tuple[int, str], str]:
    """{(layer, site): full name} of the modules that are named. Raises ConfigError for a target that matches none."""
    names = all_modules(num_layers)
    for target in targets:
        if not any(is_targeted(name, (target,)) for name in names.values()):
            raise ConfigError(
                f"{field}: no module is called {shown(target)}; these exist: {', '.join(LINEAR_SITES)} (all of them: "
                "all-linear)", param=field,
            )
    return {key: name for key, name in names.items() if is_targeted(name, targets)}
