"""Adapter versions that requests use at present, stacked so that one product serves rows of many adapters.

Per layer and factor one tensor [slots, in, out]: `SITE.lora_A` [slots, features, R] and `SITE.lora_B` [slots, R, features], R
the largest rank present. A site that an adapter lacks is 0 in its slot.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from coserve.core import CapacityError
from coserve.model.architecture import Architecture
from coserve.model.decoder import linear_shapes
from coserve.peft.lora import LoraAdapter

_RANK_STEP = 8
"""Ranks are rounded up to this: rows of the grouped product are multiples of 16 bytes."""


class AdapterSlots:
    """At most `max_slots` adapters of rank at most `max_rank`. Memory grows with use."""

    def __init__(
        self, arch: Architecture, dtype: torch.dtype, device: torch.device, *, max_slots: int, max_rank: int
    ) -> None:
        self.arch, self.dtype, self.device = arch, dtype, device
        self.max_slots, self.max_rank = max_slots, max_rank
        self.num_slots = 0
        self.rank = 0
        self._stacks: list[dict[str, Tensor]] = [{} for _ in range(arch.num_layers)]
        self._shapes = linear_shapes(arch)
        self._scales: dict[tuple[int, str], dict[int, float]] = {}
        self._placed: dict[Hashable, int] = {}
        self._free: list[int] = []

    def place(self, key: Hashable, adapter: LoraAdapter) -> int:
        """The slot of an adapter, which is copied there if it isn't yet. Raises CapacityError."""
        if key in self._placed:
            return self._placed[key]
        largest = max(site.rank for site in adapter.sites)
        if largest > self.max_rank:
            raise CapacityError(
                f"adapter: its rank {largest} is over max_lora_rank={self.max_rank}; raise that", param="max_lora_rank"
            )
        if not self._free:
            self._grow()
        rank = -(-largest // _RANK_STEP) * _RANK_STEP
        if rank > self.rank:
            self._widen(rank)
        slot = self._free.pop(0)
        for site in adapter.sites:
            a, b = site.factors(adapter.flat)
            self._stack(site.layer, f"{site.site}.lora_A")[slot, :, : site.rank] = a.T
            self._stack(site.layer, f"{site.site}.lora_B")[slot, : site.rank] = b.T
            self._scales.setdefault((site.layer, site.site), {})[slot] = site.scale
        self._placed[key] = slot
        return slot

    def remove(self, key: Hashable) -> None:
        """Frees a slot and zeroes it."""
        slot = self._placed.pop(key)
        for stacks in self._stacks:
            for stack in stacks.values():
                stack[slot] = 0
        self._free.append(slot)

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What is placed."""
        return tuple(self._placed)

    def factor(self, layer: int, name: str) -> Tensor | None:
        """[slots, in, out], or None where no adapter has the factor."""
        return self._stacks[layer].get(name)

    def scale(self, layer: int, name: str, slot: int) -> float:
        """What an adapter's product with a factor is multiplied by."""
        site, _, part = name.rpartition(".")
        return self._scales.get((layer, site), {}).get(slot, 0.0) if part == "lora_B" else 1.0

    def widths(self, layer: int) -> dict[str, int]:
        """{factor: out features} of what adapters have in a layer."""
        return {name: stack.shape[2] for name, stack in self._stacks[layer].items()}

    def _stack(self, layer: int, name: str) -> Tensor:
        if name not in self._stacks[layer]:
            num_out, num_in = self._shapes[name.rsplit(".", 1)[0]]
            shape = (num_in, self.rank) if name.endswith("lora_A") else (self.rank, num_out)
            self._stacks[layer][name] = torch.zeros(self.num_slots, *shape, dtype=self.dtype, device=self.device)
        return self._stacks[layer][name]

    def _grow(self) -> None:
        if self.num_slots >= self.max_slots:
            raise CapacityError(
                f"adapter: all {self.max_slots} places are in use (max_adapters); unload one", param="max_adapters"
            )
        more = min(max(1, self.num_slots), self.max_slots - self.num_slots)
        for stacks in self._stacks:
            for name, stack in stacks.items():
                stacks[name] = torch.cat((stack, stack.new_zeros(more, *stack.shape[1:])))
        self._free += range(self.num_slots, self.num_slots + more)
        self.num_slots += more

    def _widen(self, rank: int) -> None:
        more = rank - self.rank
        for stacks in self._stacks:
            for name, stack in stacks.items():
                size = (0, more) if name.endswith("lora_A") else (0, 0, 0, more)
                stacks[name] = torch.nn.functional.pad(stack, size)
        self.rank = rank
