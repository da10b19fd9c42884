"""IA3: a factor per feature of a module's output, or of its input. Written additively: x l = x + x (l - 1).

Parameters hold l - 1, which is 0 at the start. Source: Liu et al. 2022; names and targets as in PEFT.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from coserve.config.settings import IA3Config
from coserve.model.architecture import Architecture
from coserve.model.decoder import NoBypass, linear_shapes
from coserve.ops.vocabulary import Vocabulary
from coserve.peft.adapter import Parameter, is_targeted, targeted_modules

V = TypeVar("V")


class IA3Bypass(NoBypass):
    """Scalings at some sites' inputs (SITE.ia3_in) and outputs (SITE.ia3_out)."""

    def __init__(self, names: Collection[str], dropout: float = 0.0) -> None:
        self.names = names

    def enter(self, ops: Vocabulary[V], site: str, x: V) -> V:
        return self._scale(ops, f"{site}.ia3_in", x)

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        return self._scale(ops, f"{site}.ia3_out", out)

    def _scale(self, ops: Vocabulary[V], name: str, value: V) -> V:
        return ops.add(value, ops.segment_scale(value, name), f"{name}.sum") if name in self.names else value


def ia3_layout(arch: Architecture, config: IA3Config) -> tuple[Parameter, ...]:
    """The vectors a config names, in layer order. Raises ConfigError for a name that matches no module."""
    shapes = linear_shapes(arch)
    targeted_modules(arch.num_layers, config.input_targets, "feedforward_modules")
    parameters: list[Parameter] = []
    offset = 0
    for (layer, site), name in targeted_modules(arch.num_layers, config.targets).items():
        scales_input = is_targeted(name, config.input_targets)
        width = shapes[site][1 if scales_input else 0]
        part = "ia3_in" if scales_input else "ia3_out"
        parameters.append(Parameter(layer=layer, name=f"{site}.{part}", shape=(width, 1), offset=offset))
        offset += width
    return tuple(parameters)
