"""A micro-batch: examples packed into rows, and everything one keeps while its units are in flight.

T packed tokens, D model width, G * K key-value width, L layers. Examples lie one after another; attention is causal within
each. The label of a row is the next token of its own example, wherever the next window begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.core import Example
from coserve.kernels.reference import hash_key, mix32
from coserve.runtime.memory import Arena


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """token_ids, positions, dropout_keys: int64 [T]; bounds: (first row, end row) per example.

    label_rows: int64 [N], the rows with a label, ascending; labels: int64 [N]; label_weights: float32 [N];
    label_bounds: (first, end) among the labels per example.
    """

    examples: tuple[Example, ...]
    token_ids: Tensor
    positions: Tensor
    bounds: tuple[tuple[int, int], ...]
    label_rows: Tensor
    labels: Tensor
    label_weights: Tensor
    label_bounds: tuple[tuple[int, int], ...]
    dropout_keys: Tensor

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
        return torch.from_numpy(np.concatenate(parts)).to(device=device, dtype=dtype)

    return PackedBatch(
        examples=tuple(examples),
        token_ids=tensor([example.token_ids for example in examples], torch.int64),
        positions=torch.cat([torch.arange(end - begin) for begin, end in bounds]).to(device),
        bounds=tuple(bounds),
        label_rows=tensor(rows, torch.int64),
        labels=tensor(labels, torch.int64),
        label_weights=tensor(weights, torch.float32),
        label_bounds=tuple(label_bounds),
        dropout_keys=torch.cat(keys).to(device),
    )


class InFlight:
    """One micro-batch between its first forward unit and its last backward unit.

    forward_rows[l]: rows that have passed layer l; backward_row[l]: rows from here on have been through layer l's backward.
    parked: hidden rows of layers whose input the plan doesn't keep, by parity of the layer (a row is at one boundary only).
    grad_TD: the residual stream's gradient, rewritten in place from layer to layer. d_keys, d_values: accumulators of the one
    layer whose backward is under way.
    """

    def __init__(
        self, batch: PackedBatch, plan: ModelPlan, arena: Arena, *, hidden_size: int, kv_width: int, dtype: torch.dtype,
        device: torch.device, forward_only: bool,
    ) -> None:
        num_tokens, wide = batch.num_tokens, torch.promote_types(dtype, torch.float32)
        self.batch, self.plan, self.arena = batch, plan, arena
        self.forward_rows = [0] * len(plan.layers)
        self.backward_row = [num_tokens] * len(plan.layers)
        self.parked = torch.empty(2, num_tokens, hidden_size, dtype=dtype, device=device)
        num_labels = batch.labels.shape[0]
        self.logprobs = torch.zeros(num_labels, dtype=wide, device=device)
        self.correct = torch.zeros(num_labels, dtype=torch.bool, device=device)
        self.forward_only = forward_only
        self.coefficients_set = False
        if not forward_only:
            self.grad_TD = torch.zeros(num_tokens, hidden_size, dtype=dtype, device=device)
            self.d_keys = torch.empty(num_tokens, kv_width, dtype=wide, device=device)
            self.d_values = torch.empty(num_tokens, kv_width, dtype=wide, device=device)

    def hidden(self, layer: int) -> Tensor:
        """All rows of the input of `layer`; of the decoder's output for layer L."""
        if layer < len(self.plan.layers):
            kept = self.arena.input(layer)
            if kept is not None:
                return kept
        return self.parked[layer % 2]

    def labels_within(self, start: int, end: int) -> slice:
        """The labels whose rows lie in [start, end)."""
        first, last = torch.searchsorted(self.batch.label_rows, torch.tensor([start, end], device=self.batch.labels.device))
        return slice(int(first), int(last))

    def set_coefficients(self, coefficients_N: Tensor) -> None:
        """Multiplies the unscaled gradient rows by the objective's coefficients: d loss / d logprob, per label."""
        assert not self.coefficients_set and all(rows == self.batch.num_tokens for rows in self.forward_rows)
        rows = self.batch.label_rows
        self.grad_TD[rows] *= coefficients_N[:, None].to(self.grad_TD.dtype)
        self.coefficients_set = True

    @property
    def finished(self) -> bool:
        lowest = self.plan.lowest_trained
        return all(row == 0 for row in self.backward_row[lowest:])
