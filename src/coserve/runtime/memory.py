"""Planned memory: the workspace of programs, and arenas of kept values.

    workspace (one per engine)            arena (one per micro-batch in flight)
    storage i: bytes [off_i * n, ...)     layer l, storage i: bytes [(base_l + off_i) * T, ...), rows 0 .. T-1
    of a window of n rows                 of the micro-batch's T tokens; a window's rows are a slice

Offsets come from the compiler, per row, so that every window size has its own dense layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from coserve.compiler.graph import Element
from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import Call, Place, Program, Slot, Storage
from coserve.ops.run import Runner

_ALIGN = 64
_MOST_BOUND = 256


def carve(buffer: Tensor, offset: int, rows: int, storage: Storage, dtype: torch.dtype) -> Tensor:
    """[rows, width] at a byte offset of a byte buffer, for a model of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    kind = {Element.MODEL: dtype, Element.WIDE: wide, Element.BYTE: torch.uint8}[storage.element]
    size = rows * storage.width * kind.itemsize
    return buffer[offset : offset + size].view(kind).view(rows, storage.width)


def columns(tensor: Tensor, slot: Slot) -> Tensor:
    """A slot's columns of a storage's rows."""
    return tensor if slot.width == tensor.shape[1] else tensor[:, slot.column : slot.column + slot.width]


class BoundProgram:
    """A program whose calls have their tensors, for one number of rows.

    tensors: one per slot, None for slots outside the workspace. Tensors of those slots are put in for each execution and taken
    out again, so that nothing is kept alive.
    products: one entry per call. If the call is a linear that is the first to write a storage of the workspace and writes all
    of it, the entry is that storage's number, else None. Such a product may take the storage's place instead of a copy.
    """

    def __init__(self, program: Program, tensors: list[Tensor | None]) -> None:
        self.program, self.tensors = program, tensors
        self.calls: list[tuple[Runner, Mapping[str, Any], bool, list[Tensor], list[Tensor]]] = []
        self.products: list[int | None] = []
        self._uses: dict[int, dict[int, list[tuple[list[Any], int]]]] = {}
        """By storage, by slot: where the slot's tensor stands in the calls."""
        self._put: list[int] = []
        self._weights: dict[int, list[Any]] = {}
        for call in program.calls:
            self.products.append(self._product(call))
            outs, ins = self._places(call.outs), self._places(call.ins)
            self.calls.append((call.run, call.attrs, call.accumulate, outs, ins))
        self._outside = [number for number in self._uses if program.storages[number].place is not Place.WORK]

    def _product(self, call: Call) -> int | None:
        if call.op != "linear" or call.accumulate:
            return None
        slot = self.program.slots[call.outs[0]]
        storage = self.program.storages[slot.storage]
        whole = storage.place is Place.WORK and slot.width == storage.width
        return slot.storage if whole and slot.storage not in self._uses else None

    def _places(self, numbers: tuple[int, ...]) -> list[Any]:
        places: list[Any] = [self.tensors[number] for number in numbers]
        for index, number in enumerate(numbers):
            uses = self._uses.setdefault(self.program.slots[number].storage, {})
            uses.setdefault(number, []).append((places, index))
        return places

    def put(self, storage: int, rows: Tensor) -> None:
        """Lets `rows` [n, width] be a storage's memory until `clear`."""
        self._put.append(storage)
        for number, places in self._uses[storage].items():
            found = columns(rows, self.program.slots[number])
            for tensors, index in places:
                tensors[index] = found

    def fill(self, external: Callable[[int, Storage], Tensor]) -> None:
        """Puts in the window's rows of storages outside the workspace."""
        for storage in self._outside:
            self.put(storage, external(storage, self.program.storages[storage]))

    def clear(self) -> None:
        """Takes out all that was put in."""
        while self._put:
            for number, places in self._uses[self._put.pop()].items():
                for tensors, index in places:
                    tensors[index] = self.tensors[number]

    def weights(self, layer: int, parameter: Callable[[str, str], Any]) -> list[Any]:
        """What each call computes with in a layer: parameter(operator, name), the name of an adapter's factor, or None."""
        if layer not in self._weights:
            self._weights[layer] = [
                name if (name := call.weight) is None or call.op.startswith("segment_") else parameter(call.op, name)
                for call in self.program.calls
            ]
        return self._weights[layer]


class Workspace:
    """Transient memory of one engine: grown to the largest need, shared by layers, directions and the loss head."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._bound: dict[tuple[int, int], BoundProgram] = {}

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel()

    def reserve(self, num_bytes: int) -> Tensor:
        """The first `num_bytes` of the workspace."""
        if num_bytes > self._buffer.numel():
            self._bound.clear()
            self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._buffer[:num_bytes]

    def bind(self, program: Program, rows: int) -> BoundProgram:
        """A program over the workspace, for `rows` rows."""
        key = (id(program), rows)  # a bound program keeps its program, so that no other gets its id
        if key not in self._bound:
            stride = -(-rows // _ALIGN) * _ALIGN
            buffer = self.reserve(program.work_bytes * stride)
            if len(self._bound) > _MOST_BOUND:
                self._bound.clear()
            tensors = [self._tensor(buffer, program, slot, rows, stride) for slot in program.slots]
            self._bound[key] = BoundProgram(program, tensors)
        return self._bound[key]

    def _tensor(self, buffer: Tensor, program: Program, slot: Slot, rows: int, stride: int) -> Tensor | None:
        storage = program.storages[slot.storage]
        if storage.place is not Place.WORK:
            return None
        return columns(carve(buffer, storage.offset * stride, rows, storage, self.dtype), slot)


class Arena:
    """Kept values of one micro-batch of `num_tokens` rows under a plan."""

    def __init__(self, plan: ModelPlan, num_tokens: int, dtype: torch.dtype, buffer: Tensor) -> None:
        stride = arena_rows(num_tokens)
        self.num_bytes = plan.arena_bytes * stride
        self._plan, self._num_tokens, self._dtype, self._buffer = plan, num_tokens, dtype, buffer
        self._storages: list[dict[int, Tensor]] = [{} for _ in plan.layers]
        """By number, as far as someone has asked."""
        self._inputs: list[Tensor | None] = []
        self._bases: list[int] = []
        base = 0
        for layer in plan.layers:
            offset = (base + layer.input_offset) * stride
            self._inputs.append(carve(buffer, offset, num_tokens, layer.arena[0], dtype) if layer.keeps_input else None)
            self._bases.append(base)
            base += layer.arena_bytes

    def storage(self, layer: int, number: int) -> Tensor:
        """All rows of one kept storage of a layer."""
        found = self._storages[layer].get(number)
        if found is None:
            storage = self._plan.layers[layer].arena[number]
            assert storage.place is Place.ARENA
            offset = (self._bases[layer] + storage.offset) * arena_rows(self._num_tokens)
            found = self._storages[layer][number] = carve(self._buffer, offset, self._num_tokens, storage, self._dtype)
        return found

    def input(self, layer: int) -> Tensor | None:
        """All rows of a layer's input, if the plan keeps it."""
        return self._inputs[layer]


def arena_rows(num_tokens: int) -> int:
    """Rows an arena reserves for a micro-batch: a multiple that keeps every storage aligned."""
    return -(-num_tokens // 4) * 4
