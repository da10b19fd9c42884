"""Copies of a training window's rows out of a fused pass, on devices that make all of a layer's in one launch.

    workspace of layer l | output of layer l    --one launch-->    arena of layer l | input of layer l + 1

Where each value lies is known before the pass, so that one table for all layers is sent to the device, without a wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from coserve.compiler.program import FusedLayer, Keep
from coserve.kernels.triton.copies import can_copy, copy_rows, pieces
from coserve.runtime.memory import Workspace
from coserve.runtime.microbatch import InFlight
from coserve.runtime.transfer import to_device


class _LayerCopies(NamedTuple):
    """Of layer `first`, and of those that are equal to it. copies: as for `pieces`; others: as for `KeptCopies`."""

    first: int
    copies: np.ndarray
    others: tuple[Keep, ...]


_Rows = tuple[int, int, int]
"""Address of the first row, distance of rows, and width, in bytes."""


class KeptCopies:
    """What follows each layer of one pass. others: by layer, what the kernel can't copy, or what is packed instead.

    The workspace may not grow any more when this is made: addresses of its values are in the table.
    """

    def __init__(
        self, layers: Sequence[FusedLayer], state: InFlight, start: int, end: int, workspace: Workspace, streams: Tensor,
        num_serving: int,
    ) -> None:
        """[start, end): the window. streams: [2, rows of the pass, D], inputs and outputs of layers in turn."""
        num_rows = streams.shape[1]
        self.num_rows = end - start
        self.others: list[tuple[Keep, ...]] = []
        for each in {id(layer): layer for layer in layers}.values():
            workspace.bind(each.program, num_rows)  # all of them before any address is taken
        alike: dict[tuple[int, int], _LayerCopies] = {}
        parts, ends = [], [0]
        for number, layer in enumerate(layers):
            key = id(layer), id(state.plan.layers[number])
            if key not in alike:
                alike[key] = _layer_copies(layer, number, state, start, workspace, num_rows, num_serving)
            first, copies, others = alike[key]
            following = (*_rows(streams[(number + 1) % 2], num_serving), *_rows(state.hidden(number + 1), start)[:2])
            parts.append(np.array([following], np.int64))
            if len(copies):
                parts.append(copies + np.array([0, 0, 0, _distance(layer, state, first, number), 0]))
            ends.append(ends[-1] + 1 + len(copies))
            self.others.append(others)
        table, counts = pieces(np.concatenate(parts))
        bounds = np.concatenate([[0], np.cumsum(counts)])[ends]
        self._tables = to_device(table, streams.device).split(np.diff(bounds).tolist())

    def run(self, layer: int) -> None:
        """Copies what `layer` has left: kept values, and its output as the input of the layer above."""
        copy_rows(self._tables[layer], self.num_rows)


def _rows(whole: Tensor, first: int, column: int = 0, width: int | None = None) -> _Rows:
    """Rows of a tensor [rows, features] from row `first` and `column` on. width: bytes; None: the whole row."""
    size = whole.element_size()
    stride = whole.stride(0) * size
    return whole.data_ptr() + first * stride + column * size, stride, whole.shape[1] * size if width is None else width


def _layer_copies(
    layer: FusedLayer, number: int, state: InFlight, start: int, workspace: Workspace, num_rows: int, num_serving: int
) -> _LayerCopies:
    """The plain copies of layer `number`. They are all from the workspace: a layer's input is its parked rows' business."""
    tensors = dict(zip(layer.program.slots, workspace.bind(layer.program, num_rows).tensors, strict=True))
    copies: list[tuple[int, ...]] = []
    others = [keep for keep in layer.keeps if keep.pack is not None]
    for keep in layer.keeps:
        if keep.pack is None:
            whole, (slot,) = tensors[keep.source], keep.targets
            assert whole is not None
            source = _rows(whole, num_serving, width=keep.width * whole.element_size())
            target = _rows(state.arena.storage(number, slot.storage), start, slot.column)
            copy = (*source, *target[:2])
            copies.append(copy) if can_copy(*copy) else others.append(keep)
    return _LayerCopies(number, np.array(copies, np.int64).reshape(-1, 5), tuple(others))


def _distance(layer: FusedLayer, state: InFlight, first: int, number: int) -> int:
    """Bytes from what layer `first` keeps to what an equal layer keeps: the same for all values, and a multiple of 16."""
    storage = next(keep.targets[0].storage for keep in layer.keeps if keep.pack is None)
    return state.arena.storage(number, storage).data_ptr() - state.arena.storage(first, storage).data_ptr()
