"""A micro-batch: examples packed into rows, and everything one keeps while its units are in flight.

T packed tokens, D model width, G * K key-value width, L layers. Examples lie one after another; attention is causal within
each. The label of a row is the next token of its own example, wherever the next window begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.core import Example, Unit
from coserve.kernels.cuda_attention import PackedCall
from coserve.kernels.reference import hash_key, mix32
from coserve.model.architecture import Architecture
from coserve.runtime.memory import Arena, arena_rows
from coserve.runtime.transfer import to_device


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """token_ids, positions, dropout_keys: int64 [T]; bounds: (first row, end row) per example.

    label_rows: int64 [N], the rows with a label, ascending; labels: int64 [N]; label_bounds: (first, end) among the labels per
    example. host_label_rows: the same as label_rows, for whoever must not wait for the device. label_weights: float32 [N], on
    the host.
    """

    examples: tuple[Example, ...]
    token_ids: Tensor
    positions: Tensor
    bounds: tuple[tuple[int, int], ...]
    label_rows: Tensor
    labels: Tensor
    label_bounds: tuple[tuple[int, int], ...]
    dropout_keys: Tensor
    host_label_rows: np.ndarray
    label_weights: Tensor

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


def pack(examples: Sequence[Example], *, device: torch.device, seed: int = 0, step: int = 0) -> PackedBatch:
    """Lays examples one after another. `seed` and `step` key the dropout masks."""
    bounds, label_bounds, rows, labels, weights, keys = [], [], [], [], [], []
    start = num_labels = 0
    for example in examples:
        end = start + example.num_tokens
        predicting = np.flatnonzero(example.weights[1:])
        rows.append(predicting + start)
        labels.append(example.token_ids[predicting + 1])
        weights.append(example.weights[predicting + 1])
        label_bounds.append((num_labels, num_labels + len(predicting)))
        keys.append(mix32(torch.arange(example.num_tokens) ^ hash_key(seed, step, example.index)))
        bounds.append((start, end))
        start, num_labels = end, num_labels + len(predicting)

    def tensor(parts: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return to_device(torch.from_numpy(np.concatenate(parts)).to(dtype), device)

    return PackedBatch(
        examples=tuple(examples),
        token_ids=tensor([example.token_ids for example in examples], torch.int64),
        positions=to_device(torch.cat([torch.arange(end - begin) for begin, end in bounds]), device),
        bounds=tuple(bounds),
        label_rows=tensor(rows, torch.int64),
        labels=tensor(labels, torch.int64),
        label_bounds=tuple(label_bounds),
        dropout_keys=to_device(torch.cat(keys), device),
        host_label_rows=np.concatenate(rows),
        label_weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
    )


class MicrobatchLayout(NamedTuple):
    """Bytes of one micro-batch in flight, in this order; each part begins on a multiple of 64.

    arena: kept values; parked: 2 x [T, D]; grad: [T, D]; d_kv: accumulators of keys and values, 2 x [T, G * K] in float32 or
    wider.
    """

    arena: int
    parked: int
    grad: int
    d_kv: int

    @property
    def total(self) -> int:
        return sum(self)


def microbatch_layout(
    plan: ModelPlan, num_tokens: int, arch: Architecture, itemsize: int, *, forward_only: bool
) -> MicrobatchLayout:
    """What a micro-batch of `num_tokens` tokens takes in flight under a plan."""
    stream = num_tokens * arch.hidden_size * itemsize
    kv = 2 * num_tokens * arch.num_kv_heads * arch.head_dim * max(itemsize, 4)
    parts = (plan.arena_bytes * arena_rows(num_tokens), 2 * stream, *((0, 0) if forward_only else (stream, kv)))
    return MicrobatchLayout(*(-(-part // 64) * 64 for part in parts))


class InFlight:
    """One micro-batch between its first forward unit and its last backward unit, in `buffer` (bytes, by `microbatch_layout`).

    forward_rows[l]: rows that have passed layer l; backward_row[l]: rows from here on have been through layer l's backward.
    parked: hidden rows of layers whose input the plan doesn't keep, by parity of the layer (a row is at one boundary only).
    grad_TD: the residual stream's gradient, rewritten in place from layer to layer. d_keys, d_values: accumulators of the one
    layer whose backward is under way; d_keys_values: both as one tensor. attention_calls: by window, what all layers and both
    directions share.
    """

    def __init__(
        self, batch: PackedBatch, plan: ModelPlan, buffer: Tensor, arch: Architecture, *, dtype: torch.dtype, forward_only: bool
    ) -> None:
        num_tokens, wide = batch.num_tokens, torch.promote_types(dtype, torch.float32)
        layout = microbatch_layout(plan, num_tokens, arch, dtype.itemsize, forward_only=forward_only)
        arena, parked, grad, d_kv, _ = torch.split(buffer, [*layout, buffer.numel() - layout.total])
        self.batch, self.plan, self.arena = batch, plan, Arena(plan, num_tokens, dtype, arena)
        self.forward_rows = [0] * len(plan.layers)
        self.backward_row = [num_tokens] * len(plan.layers)
        stream = num_tokens * arch.hidden_size
        self.parked = parked.view(dtype)[: 2 * stream].view(2, num_tokens, arch.hidden_size)
        num_labels = batch.labels.shape[0]
        self.logprobs = torch.zeros(num_labels, dtype=wide, device=buffer.device)
        self.correct = torch.zeros(num_labels, dtype=torch.bool, device=buffer.device)
        self.forward_only = forward_only
        self.coefficients_set = False
        self.attention_calls: dict[tuple[int, int], Mapping[int | None, PackedCall]] = {}
        if not forward_only:
            self.grad_TD = grad.view(dtype)[:stream].view(num_tokens, arch.hidden_size)
            self.grad_TD.zero_()
            kv_width = arch.num_kv_heads * arch.head_dim
            self.d_keys_values = d_kv.view(wide)[: 2 * num_tokens * kv_width].view(2, num_tokens, kv_width)
            self.d_keys, self.d_values = self.d_keys_values

    def hidden(self, layer: int) -> Tensor:
        """All rows of the input of `layer`; of the decoder's output for layer L."""
        if layer < len(self.plan.layers):
            kept = self.arena.input(layer)
            if kept is not None:
                return kept
        return self.parked[layer % 2]

    def check_forward(self, unit: Unit, layer: int) -> None:
        """Asserts that every row of a forward unit finds what it needs at a layer."""
        assert self.forward_rows[layer] == unit.start, f"{unit} comes out of order at layer {layer}"
        assert layer == 0 or self.forward_rows[layer - 1] >= unit.end, f"{unit} needs layer {layer - 1} first"

    def labels_within(self, start: int, end: int) -> slice:
        """The labels whose rows lie in [start, end)."""
        first, last = np.searchsorted(self.batch.host_label_rows, (start, end))
        return slice(int(first), int(last))

    def set_coefficients(self, coefficients_N: Tensor) -> None:
        """Multiplies the unscaled gradient rows by the training loss's coefficients: d loss / d logprob, per label."""
        assert not self.coefficients_set and all(rows == self.batch.num_tokens for rows in self.forward_rows)
        rows = self.batch.label_rows
        self.grad_TD[rows] *= coefficients_N[:, None].to(self.grad_TD.dtype)
        self.coefficients_set = True

    @property
    def finished(self) -> bool:
        lowest = self.plan.lowest_trained
        return all(row == 0 for row in self.backward_row[lowest:])
