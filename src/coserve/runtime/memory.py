"""Planned memory: the workspace of programs, and arenas of kept values.

    workspace (one per engine)            arena (one per micro-batch in flight)
    storage i: bytes [off_i * n, ...)     layer l, storage i: bytes [(base_l + off_i) * T, ...), rows 0 .. T-1
    of a window of n rows                 of the micro-batch's T tokens; a window's rows are a slice

Offsets come from the compiler, per row, so that every window size has its own dense layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from coserve.compiler.graph import Element
from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import LayerPlan, Place, Program, Slot, Storage

_ALIGN = 64


def storage_dtype(storage: Storage, dtype: torch.dtype) -> torch.dtype:
    """The element type of a storage, for a model of `dtype`."""
    wide = torch.promote_types(dtype, torch.float32)
    return {Element.MODEL: dtype, Element.WIDE: wide, Element.BYTE: torch.uint8}[storage.element]


def carve(buffer: Tensor, offset: int, rows: int, storage: Storage, dtype: torch.dtype) -> Tensor:
    """[rows, width] at a byte offset of a byte buffer."""
    kind = storage_dtype(storage, dtype)
    size = rows * storage.width * kind.itemsize
    return buffer[offset : offset + size].view(kind).view(rows, storage.width)


def columns(tensor: Tensor, slot: Slot) -> Tensor:
    """A slot's columns of a storage's rows."""
    return tensor if slot.width == tensor.shape[1] else tensor[:, slot.column : slot.column + slot.width]


class Workspace:
    """Transient memory of one engine: grown to the largest need, shared by layers, directions and the loss head."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self._buffer = torch.empty(0, dtype=torch.uint8, device=device)
        self._views: dict[tuple[int, int], list[Tensor | None]] = {}
        self._programs: dict[int, Program] = {}

    @property
    def num_bytes(self) -> int:
        return self._buffer.numel()

    def reserve(self, num_bytes: int) -> Tensor:
        """The first `num_bytes` of the workspace."""
        if num_bytes > self._buffer.numel():
            self._forget_views()
            self._buffer = torch.empty(0, dtype=torch.uint8, device=self.device)
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._buffer[:num_bytes]

    def _forget_views(self) -> None:
        """And the programs, which are kept only so that no other gets the id of one that has views."""
        self._views.clear()
        self._programs.clear()

    def tensors(self, program: Program, rows: int) -> list[Tensor | None]:
        """One tensor per slot of a program for `rows` rows; None for slots outside the workspace."""
        key = (id(program), rows)
        if key not in self._views:
            stride = -(-rows // _ALIGN) * _ALIGN
            buffer = self.reserve(program.work_bytes * stride)
            if len(self._views) > 256:
                self._forget_views()
            self._programs[id(program)] = program
            self._views[key] = [self._tensor(buffer, program, slot, rows, stride) for slot in program.slots]
        return self._views[key]

    def _tensor(self, buffer: Tensor, program: Program, slot: Slot, rows: int, stride: int) -> Tensor | None:
        storage = program.storages[slot.storage]
        if storage.place is not Place.WORK:
            return None
        return columns(carve(buffer, storage.offset * stride, rows, storage, self.dtype), slot)


class Arena:
    """Kept values of one micro-batch of `num_tokens` rows under a plan."""

    def __init__(self, plan: ModelPlan, num_tokens: int, dtype: torch.dtype, buffer: Tensor) -> None:
        self.num_tokens, self.dtype = num_tokens, dtype
        stride = arena_rows(num_tokens)
        self.num_bytes = plan.arena_bytes * stride
        self._storages: list[dict[int, Tensor]] = []
        self._inputs: list[Tensor | None] = []
        base = 0
        for layer in plan.layers:
            tensors = {
                number: carve(buffer, (base + storage.offset) * stride, num_tokens, storage, dtype)
                for number, storage in enumerate(layer.arena)
                if storage.place is Place.ARENA
            }
            self._storages.append(tensors)
            self._inputs.append(self._input(layer, buffer, base, stride))
            base += layer.arena_bytes

    def _input(self, layer: LayerPlan, buffer: Tensor, base: int, stride: int) -> Tensor | None:
        if not layer.keeps_input:
            return None
        storage = layer.arena[0]
        offset = (base + layer.input_offset) * stride
        return carve(buffer, offset, self.num_tokens, storage, self.dtype)

    def storage(self, layer: int, number: int) -> Tensor:
        """All rows of one kept storage of a layer."""
        return self._storages[layer][number]

    def input(self, layer: int) -> Tensor | None:
        """All rows of a layer's input, if the plan keeps it."""
        return self._inputs[layer]


def arena_rows(num_tokens: int) -> int:
    """Rows an arena reserves for a micro-batch: a multiple that keeps every storage aligned."""
    return -(-num_tokens // 4) * 4
