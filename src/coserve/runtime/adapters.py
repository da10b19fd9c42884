"""Adapter versions that requests use at present, stacked so that one product serves rows of many adapters.

Per layer and factor one tensor [slots, in, out]: `SITE.lora_A` [slots, features, R] and `SITE.lora_B` [slots, R, features], R
the largest rank so far; a scaling's vector [slots, 1, features]. A product's scale is part of the factor here. A factor that an
adapter lacks is 0 in its slot. What passes run follows the adapters that are present. A factor that none of them has is left
out, and its memory is kept for the next one.

Where Triton's kernels run (`takes_slots`), the memory is laid out as [slots, out, in], as they read it. `AdapterRows` then says
which slot each row of a batch has, and nothing else about a batch's adapters is known to the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from coserve.core import CapacityError
from coserve.kernels.choose import runs_triton
from coserve.kernels.triton.segments import DTYPES, TRAINING, SlotFactors
from coserve.model.architecture import Architecture
from coserve.peft.adapter import Adapter, Kind, Parameter

_MOST_GROWN = 16
"""Slots that are added at once: their number doubles until then."""
_RANK_STEP = 8
"""Ranks are rounded up to this: rows of the grouped product are multiples of 16 bytes."""


class _Placed(NamedTuple):
    slot: int
    kind: Kind
    parameters: tuple[Parameter, ...]


class AdapterSlots:
    """At most `max_slots` adapters of rank at most `max_rank`. Memory grows with use."""

    def __init__(
        self, arch: Architecture, dtype: torch.dtype, device: torch.device, *, max_slots: int, max_rank: int
    ) -> None:
        self.arch, self.dtype, self.device = arch, dtype, device
        self.max_slots, self.max_rank = max_slots, max_rank
        self.num_slots = 0
        self._ranks: dict[str, int] = {}
        self._stacks: list[dict[str, Tensor]] = [{} for _ in range(arch.num_layers)]
        self.takes_slots = runs_triton(device) and dtype in DTYPES
        """Whether kernels take each row's slot; otherwise rows are sorted by slot."""
        self.moves = 0
        """How often a tensor of factors has got new memory: a captured pass reads the old one."""
        self._of_sites: dict[tuple[int, tuple[str, ...]], tuple[list[Tensor | None], list[Tensor | None]]] = {}
        self._centers: dict[tuple[int, str], Tensor] = {}
        self._kinds: Counter[Kind] = Counter()
        """Adapters present, in the order in which kinds first came: a kind that comes back finds its plans."""
        self._users: list[Counter[str]] = [Counter() for _ in range(arch.num_layers)]
        """Adapters present that have a factor, per layer."""
        self._placed: dict[Hashable, _Placed] = {}
        self._free: list[int] = []
        self._layout: Hashable = None

    def place(self, key: Hashable, adapter: Adapter) -> int:
        """The slot of an adapter, which is copied there if it isn't yet. Raises CapacityError."""
        if key in self._placed:
            return self._placed[key].slot
        self.check(adapter)
        try:
            if not self._free:
                self._grow()
            self._forget()
            self._widen(adapter)
            for p in adapter.parameters:
                self._stack(p)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                "adapter: the device has no memory for one more; unload one, or lower max_adapters or memory_bytes",
                param="max_adapters",
            ) from error
        slot = self._free.pop(0)
        for p in adapter.parameters:
            factor = adapter.factor(p.layer, p.name)
            assert factor is not None
            num_out, num_in = p.shape
            matrix = factor.matrix.T if factor.scale == 1 else factor.matrix.T * factor.scale
            self._stack(p)[slot, :num_in, :num_out] = matrix
            if factor.center is not None:  # the first one stays, as a captured pass reads it
                self._centers.setdefault((p.layer, p.name), factor.center)
        for p in adapter.parameters:
            self._users[p.layer][p.name] += 1
        self._kinds[adapter.kind] += 1
        self._placed[key] = _Placed(slot, adapter.kind, adapter.parameters)
        return slot

    def check(self, adapter: Adapter) -> None:
        """Raises CapacityError for an adapter whose rank is too large."""
        if adapter.rank > self.max_rank:
            raise CapacityError(
                f"adapter: its rank {adapter.rank} is over max_lora_rank={self.max_rank}; raise that", param="max_lora_rank"
            )

    def remove(self, key: Hashable) -> None:
        """Frees a slot and zeroes it."""
        slot, kind, parameters = self._placed.pop(key)
        self._kinds[kind] -= 1
        self._forget()
        for p in parameters:
            self._users[p.layer][p.name] -= 1
            self._stacks[p.layer][p.name][slot] = 0
        self._free.append(slot)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._placed

    def slot_of(self, key: Hashable) -> int:
        """The slot of what is placed."""
        return self._placed[key].slot

    @property
    def has_free(self) -> bool:
        """Whether one more can be placed."""
        return bool(self._free) or self.num_slots < self.max_slots

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What is placed, in the order in which it was."""
        return tuple(self._placed)

    def factor(self, layer: int, name: str) -> Tensor | None:
        """[slots, in, out], or None where no adapter has the factor."""
        return self._stacks[layer][name] if self._users[layer][name] else None

    def center(self, layer: int, name: str) -> Tensor | None:
        """The vector that a scaling leaves unchanged. It belongs to the backbone, so all adapters have the same."""
        return self._centers.get((layer, name))

    def of_sites(self, layer: int, names: tuple[str, ...]) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Factors [slots, out, in], contiguous where kernels take slots, and centers, by name; None where no adapter has it."""
        found = self._of_sites.get((layer, names))
        if found is None:
            stacks = [self.factor(layer, name) for name in names]
            found = (
                [None if stack is None else stack.transpose(1, 2) for stack in stacks],
                [self.center(layer, name) for name in names],
            )
            self._of_sites[layer, names] = found
        return found

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of the adapters that are present."""
        return tuple(kind for kind, users in self._kinds.items() if users)

    def widths(self, layer: int) -> dict[str, int]:
        """{factor: out features} of what the adapters that are present have in a layer."""
        return {name: stack.shape[2] for name, stack in self._stacks[layer].items() if self._users[layer][name]}

    @property
    def layout(self) -> Hashable:
        """Kinds and widths of all layers, to find plans by."""
        if self._layout is None:
            widths = tuple(tuple(sorted(self.widths(layer).items())) for layer in range(self.arch.num_layers))
            self._layout = (self.kinds, widths)
        return self._layout

    def _forget(self) -> None:
        """Adapters come or go: what follows from those that are present is to be found out again."""
        self._layout = None
        self._of_sites.clear()

    def _zeros(self, num_slots: int, num_in: int, num_out: int) -> Tensor:
        """Memory for a factor [slots, in, out]."""
        self.moves += 1
        sizes = (num_out, num_in) if self.takes_slots else (num_in, num_out)
        memory = torch.zeros(num_slots, *sizes, dtype=self.dtype, device=self.device)
        return memory.transpose(1, 2) if self.takes_slots else memory

    def _enlarged(self, stack: Tensor, *sizes: int) -> Tensor:
        """The same factors [slots, in, out] in memory of at least their size."""
        larger = self._zeros(*sizes)
        larger[: stack.shape[0], : stack.shape[1], : stack.shape[2]] = stack
        return larger

    def _stack(self, p: Parameter) -> Tensor:
        if p.name not in self._stacks[p.layer]:
            num_out, num_in = (self._ranks[p.part] if axis == p.rank_axis else size for axis, size in enumerate(p.shape))
            self._stacks[p.layer][p.name] = self._zeros(self.num_slots, num_in, num_out)
        return self._stacks[p.layer][p.name]

    def _grow(self) -> None:
        if self.num_slots >= self.max_slots:
            raise CapacityError(
                f"adapter: all {self.max_slots} places are in use (max_adapters); unload one", param="max_adapters"
            )
        more = min(max(1, self.num_slots), _MOST_GROWN, self.max_slots - self.num_slots)
        for stacks in self._stacks:
            for name, stack in stacks.items():
                if stack.shape[0] < self.num_slots + more:
                    stacks[name] = self._enlarged(stack, self.num_slots + more, *stack.shape[1:])
        self._free += range(self.num_slots, self.num_slots + more)
        self.num_slots += more

    def _widen(self, adapter: Adapter) -> None:
        """Makes room for an adapter's ranks, in all layers alike."""
        axes = {p.part: p.rank_axis for p in adapter.parameters if p.rank_axis is not None}
        largest = {part: max(p.shape[axis] for p in adapter.parameters if p.part == part) for part, axis in axes.items()}
        for part, rank in largest.items():
            rank = -(-rank // _RANK_STEP) * _RANK_STEP
            if rank <= self._ranks.setdefault(part, rank):
                continue
            for stacks in self._stacks:
                for name in [name for name in stacks if name.endswith(f".{part}")]:
                    num_slots, num_in, num_out = stacks[name].shape
                    sizes = (num_in, rank) if axes[part] == 0 else (rank, num_out)
                    if (num_in, num_out) != sizes:  # it isn't left from a try that ended without memory
                        stacks[name] = self._enlarged(stacks[name], num_slots, *sizes)
            self._ranks[part] = rank


class AdapterRows:
    """Each row's adapter, for kernels that take slots: what a pass, captured or not, knows of its batch's adapters.

    slots: int32 [rows], NO_SLOT or TRAINING too; they may be written anew between passes. training: the adapter of rows with
    TRAINING.
    """

    def __init__(self, adapters: AdapterSlots, slots: Tensor, training: Adapter | None = None) -> None:
        assert adapters.takes_slots
        self.adapters, self.slots, self.training = adapters, slots, training

    def factors(self, layer: int, names: tuple[str, ...]) -> SlotFactors:
        """What the kernels compute with in a layer, for several sites."""
        stacks, centers = self.adapters.of_sites(layer, names)
        if self.training is None:
            return SlotFactors(self.slots, stacks, [None] * len(names), [1.0] * len(names), centers)
        own = [self.training.factor(layer, name) for name in names]
        return SlotFactors(
            self.slots, stacks, [None if factor is None else factor.matrix for factor in own],
            [1.0 if factor is None else factor.scale for factor in own],
            [center if factor is None else factor.center for factor, center in zip(own, centers, strict=True)],
        )

    def beside(self, adapter: Adapter | None, num_rows: int) -> AdapterRows:
        """The same with a training window's rows behind them."""
        return AdapterRows(self.adapters, torch.nn.functional.pad(self.slots, (0, num_rows), value=TRAINING), adapter)
