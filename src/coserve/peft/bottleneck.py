"""Bottleneck adapters: out + up(activation(down(out))) behind attention and the MLP, or behind the MLP only.

`out` is the block's output before it is added to the residual stream. The down-projection starts as LoRA's A does, the
up-projection at 0; there are no biases. Sources: Houlsby et al. 2019; Pfeiffer et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TypeVar

from coserve.config.settings import BottleneckConfig
from coserve.model.architecture import Architecture
from coserve.model.decoder import NoBypass
from coserve.ops.vocabulary import Vocabulary
from coserve.peft.adapter import Parameter

V = TypeVar("V")

PLACEMENTS = {"houlsby": ("o_proj", "down_proj"), "pfeiffer": ("down_proj",)}
"""The sites whose output an adapter reads and adds to."""


class BottleneckBypass(NoBypass):
    """Bottlenecks at some sites: SITE.relu_down and SITE.relu_up, SITE.gelu_down and SITE.gelu_up."""

    def __init__(self, names: Collection[str], dropout: float = 0.0) -> None:
        self.names = names

    def apply(self, ops: Vocabulary[V], site: str, x: V, out: V) -> V:
        for activation, act in (("relu", ops.relu), ("gelu", ops.gelu)):
            name = f"{site}.{activation}"
            if f"{name}_down" in self.names:
                inner = act(ops.segment_linear(out, f"{name}_down"))
                out = ops.add(out, ops.segment_linear(inner, f"{name}_up"), f"{name}.sum")
        return out


def bottleneck_layout(arch: Architecture, config: BottleneckConfig) -> tuple[Parameter, ...]:
    """Down [size, D] then up [D, size] of each site, in layer order."""
    width, size = arch.hidden_size, config.size
    parameters: list[Parameter] = []
    offset = 0
    for layer in range(arch.num_layers):
        for site in PLACEMENTS[config.placement]:
            name = f"{site}.{config.activation}"
            parameters.append(Parameter(
                layer=layer, name=f"{name}_down", shape=(size, width), offset=offset, rank_axis=0, bound=1 / math.sqrt(width)
            ))
            offset += size * width
            parameters.append(Parameter(layer=layer, name=f"{name}_up", shape=(width, size), offset=offset, rank_axis=1))
            offset += size * width
    return tuple(parameters)
