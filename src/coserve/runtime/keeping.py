"""Copies of a training window's rows out of a fused pass, on devices that make all of a layer's in one launch.

    workspace of layer l | output of layer l    --one launch-->    arena of layer l | input of layer l + 1

Where each value lies is known before the pass, so that one table for all layers is sent to the device, without a wait.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from coserve.compiler.program import FusedLayer, Keep
from coserve.kernels.triton.copies import can_copy, copy_rows, pieces
from coserve.runtime.memory import Workspace
from coserve.runtime.microbatch import InFlight
from coserve.runtime.transfer import to_device

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
        sources: dict[int, list[tuple[Keep, _Rows]]] = {}
        for each in {id(layer): layer for layer in layers}.values():
            workspace.bind(each.program, num_rows)  # all of them before any address is taken
        copies: list[tuple[_Rows, _Rows]] = []
        ends = [0]
        for number, layer in enumerate(layers):
            if id(layer) not in sources:
                sources[id(layer)] = _sources(layer, workspace, num_rows, num_serving)
            others = [keep for keep in layer.keeps if keep.pack is not None]
            for keep, source in sources[id(layer)]:
                (slot,) = keep.targets
                target = _rows(state.arena.storage(number, slot.storage), start, slot.column, source[2])
                if can_copy(*source, *target):
                    copies.append((source, target))
                else:
                    others.append(keep)
            following = _rows(streams[(number + 1) % 2], num_serving)
            copies.append((following, _rows(state.hidden(number + 1), start)))
            ends.append(len(copies))
            self.others.append(tuple(others))
        columns = np.array(copies, np.int64)
        table, counts = pieces(columns[:, 0, 0], columns[:, 1, 0], columns[:, 0, 1], columns[:, 1, 1], columns[:, 0, 2])
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


def _sources(layer: FusedLayer, workspace: Workspace, num_rows: int, first: int) -> list[tuple[Keep, _Rows]]:
    """Where a layer's plain copies begin. They are all in the workspace: a layer's input is its parked rows' business."""
    tensors = dict(zip(layer.program.slots, workspace.bind(layer.program, num_rows).tensors, strict=True))
    found = []
    for keep in layer.keeps:
        if keep.pack is None:
            whole = tensors[keep.source]
            assert whole is not None
            found.append((keep, _rows(whole, first, width=keep.width * whole.element_size())))
    return found
