"""LoRA: the bypass in the operator vocabulary, and an adapter as one flat tensor.

R rank. A site's update is scale * (dropout(x) A^T) B^T with A [R, in] and B [out, R]; scale = alpha / R, or alpha / sqrt(R)
with rsLoRA. Source: Hu et al. 2021; names and defaults as in PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from coserve.config import LINEAR_SITES, LoraConfig
from coserve.core import ConfigError
from coserve.model.architecture import Architecture
from coserve.model.decoder import MODULE_PATHS, linear_shapes
from coserve.ops.run import Factor
from coserve.ops.vocabulary import Vocabulary

V = TypeVar("V")


class LoraBypass:
    """LoRA at some sites of a layer."""

    def __init__(self, sites: frozenset[str], dropout: float = 0.0) -> None:
        self.sites, self.dropout = sites, dropout

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        if site not in self.sites:
            return out
        if self.dropout > 0:
            x = ops.dropout(x, site, self.dropout)
        delta = ops.segment_linear(ops.segment_linear(x, f"{site}.lora_A"), f"{site}.lora_B")
        return ops.add(out, delta, f"{site}+lora")


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Where one site's factors lie in the flat tensor, in elements: A [rank, num_in] then B [num_out, rank]."""

    layer: int
    site: str
    rank: int
    scale: float
    num_out: int
    num_in: int
    offset: int

    @property
    def num_elements(self) -> int:
        return self.rank * (self.num_in + self.num_out)

    def factors(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Views of A and B in a flat tensor of this layout."""
        middle = self.offset + self.rank * self.num_in
        a = flat[self.offset : middle].view(self.rank, self.num_in)
        return a, flat[middle : self.offset + self.num_elements].view(self.num_out, self.rank)

    @property
    def module(self) -> str:
        """The module's full name in Hugging Face's model."""
        return module_name(self.layer, self.site)


def module_name(layer: int, site: str) -> str:
    """A linear's full name in Hugging Face's model."""
    return f"model.layers.{layer}.{MODULE_PATHS[site]}"


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The entry whose key (a suffix of the path, or a regular expression) matches the module's name, as in PEFT."""
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", name):
                return value
        except re.error as error:
            raise ConfigError(f"pattern: {key!r} is no module name or regular expression ({error})", param="pattern") from error
    return default


def _targeted(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def lora_layout(arch: Architecture, config: LoraConfig) -> tuple[LoraSite, ...]:
    """The sites a config names, in layer order. Raises ConfigError for a target that matches no module."""
    shapes = linear_shapes(arch)
    targets = LINEAR_SITES if config.target_modules == "all-linear" else config.target_modules
    names = {(layer, site): module_name(layer, site) for layer in range(arch.num_layers) for site in LINEAR_SITES}
    for target in targets:
        if not any(_targeted(name, (target,)) for name in names.values()):
            raise ConfigError(
                f"target_modules: no module is called {target!r}; these exist: {', '.join(LINEAR_SITES)} (all of them: "
                "all-linear)", param="target_modules",
            )
    sites: list[LoraSite] = []
    offset = 0
    for (layer, site), name in names.items():
        if not _targeted(name, tuple(targets)):
            continue
        rank = int(_by_pattern(config.rank_pattern, name, config.r))
        alpha = _by_pattern(config.alpha_pattern, name, config.alpha)
        num_out, num_in = shapes[site]
        scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        sites.append(LoraSite(layer, site, rank, scale, num_out, num_in, offset))
        offset += sites[-1].num_elements
    return tuple(sites)


class LoraAdapter:
    """One version of an adapter on a device: a flat tensor in the model's dtype, and its factors by layer and name.

    `grad`, a flat float32 tensor of the same layout (float64 when the model is), makes it trainable.
    """

    def __init__(
        self, config: LoraConfig, sites: tuple[LoraSite, ...], flat: Tensor, *, num_layers: int, grad: Tensor | None = None
    ) -> None:
        self.config, self.sites, self.flat, self.grad = config, sites, flat, grad
        self.num_layers = num_layers
        self._factors: list[dict[str, Factor]] = [{} for _ in range(num_layers)]
        for site in sites:
            a, b = site.factors(flat)
            grad_a, grad_b = (None, None) if grad is None else site.factors(grad)
            self._factors[site.layer][f"{site.site}.lora_A"] = Factor(a, 1.0, grad_a)
            self._factors[site.layer][f"{site.site}.lora_B"] = Factor(b, site.scale, grad_b)

    @classmethod
    def create(
        cls, arch: Architecture, config: LoraConfig, *, dtype: torch.dtype, device: torch.device, seed: int
    ) -> LoraAdapter:
        """A new adapter: A uniform as PEFT draws it (Kaiming, a = sqrt 5), B zero."""
        sites = lora_layout(arch, config)
        flat = torch.zeros(sum(site.num_elements for site in sites), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        for site in sites:
            bound = 1 / math.sqrt(site.num_in)
            site.factors(flat)[0].uniform_(-bound, bound, generator=generator)
        return cls(config, sites, flat.to(device=device, dtype=dtype), num_layers=arch.num_layers)

    def factor(self, layer: int, name: str) -> Factor | None:
        """The factor `SITE.lora_A` or `SITE.lora_B` of a layer, if the adapter has it."""
        return self._factors[layer].get(name)

    def factor_widths(self, layer: int) -> dict[str, int]:
        """{factor: out features} of a layer."""
        return {name: factor.matrix.shape[0] for name, factor in self._factors[layer].items()}

    def trainable(self) -> LoraAdapter:
        """The same memory with a gradient buffer."""
        wide = torch.promote_types(self.flat.dtype, torch.float32)
        grad = torch.zeros(self.flat.shape, dtype=wide, device=self.flat.device)
        return LoraAdapter(self.config, self.sites, self.flat, num_layers=self.num_layers, grad=grad)

    def copy(self) -> LoraAdapter:
        """An independent version with the present values."""
        return LoraAdapter(self.config, self.sites, self.flat.clone(), num_layers=self.num_layers)
