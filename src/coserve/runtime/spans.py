"""Rows of requests in a batch: where their keys and values go, whose adapter each row has, and their attention.

Rows are [decode | prefill], each part sorted by adapter slot, rows without an adapter first. B decode rows, T rows of one
prefill span, S context tokens, N blocks of a table, G key-value heads, K head width.

Where there is a compiled kernel (on a CPU) all rows read their context through their tables, where Triton runs decode rows do.
Else decode rows read keys from gathered copies, in groups of like length, and values where they lie. Whatever an iteration
needs on the device goes there in one copy, queued without a wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.kernels import native
from coserve.kernels.attention import decode_attention
from coserve.kernels.choose import attention_for, runs_triton
from coserve.kernels.triton.paged_decode import paged_decode_attention
from coserve.model.architecture import Architecture
from coserve.ops.run import Factor, FactorStack
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.transfer import to_device

NO_ADAPTER = -1
_TABLE_STEP = 16
"""Tables are padded to a multiple of this: Triton compiles anew for strides that are no multiple of 16."""


_NONE = np.zeros(0, np.int32)


class RowSpan(NamedTuple):
    """A request's tokens [start, end) in this batch. table: its blocks, in order; slot: its adapter's, or NO_ADAPTER."""

    start: int
    end: int
    table: Sequence[int]
    slot: int


_GATHERED_BYTES = 10 << 20
"""Keys that a group of decode rows gathers at most, on devices that gather."""


class _DecodeGroup(NamedTuple):
    """Decode rows of like context.

    rows: slice or int64 [n]; block_rows: [n, G, blocks]; value_rows: int32 [n * H * S], once per query head; starts: int32
    [n * H], where each query head's begin; bias: [n, 1, 1, S], 0 or -inf.
    """

    rows: slice | Tensor
    block_rows: Tensor
    value_rows: Tensor
    starts: Tensor
    bias: Tensor


class PagedDecode(NamedTuple):
    """Decode rows for the paged kernel. tables: int32 [B, N]; contexts: int32 [B], 0 for a row of padding, none above
    max_context."""

    tables: Tensor
    contexts: Tensor
    max_context: int

    def attention(self, out: Tensor, q: Tensor, pool: KeyValuePool, layer: int, window: int | None) -> None:
        """q, out: [B, H * K], over what the tables hold."""
        paged_decode_attention(
            out, q, pool.rows, layer=layer, num_layers=pool.num_layers, kv_heads=pool.kv_heads,
            block_tokens=pool.block_tokens, tables_BN=self.tables, context_B=self.contexts, max_context=self.max_context,
            window=window, scale=1 / math.sqrt(pool.width),
        )


class _PagedSpans(NamedTuple):
    """All rows for the compiled kernel, `attend`. tables: int32 [B, N]; contexts: int32 [B]; starts: int32 [B + 1], where each
    span's rows begin."""

    attend: Callable[..., None]
    tables: Tensor
    contexts: Tensor
    starts: Tensor

    def attention(self, out: Tensor, q: Tensor, pool: KeyValuePool, layer: int, window: int | None) -> None:
        """q, out: [rows, H * K], over what the tables hold."""
        self.attend(
            out, q, pool.rows, layer=layer, num_layers=pool.num_layers, kv_heads=pool.kv_heads, block_tokens=pool.block_tokens,
            tables_BN=self.tables, context_B=self.contexts, starts=self.starts, window=window, scale=1 / math.sqrt(pool.width),
        )


class _Segments(NamedTuple):
    """Rows [first, end) that have adapters, sorted by slot. counts: the number of rows of each slot that is used. ends: int32
    [slots], the row at which each slot's rows end; None if all rows use one slot."""

    first: int
    end: int
    counts: dict[int, int]
    ends: Tensor | None


class SpanRows:
    """One batch's rows of requests. positions: int64 [rows]; `layer` is set before each program."""

    def __init__(
        self, decode: Sequence[RowSpan], prefill: Sequence[RowSpan], pool: KeyValuePool, arch: Architecture,
        adapters: AdapterSlots,
    ) -> None:
        self.pool, self.adapters, self.windows, self.width = pool, adapters, arch.sliding_windows, arch.head_dim
        self.share = arch.num_heads // arch.num_kv_heads
        self.layer = 0
        self._scales: dict[object, Tensor] = {}
        device = pool.buffer.device
        spans = [*decode, *prefill]
        lengths = [span.end - span.start for span in spans]
        self.num_rows = sum(lengths)
        positions = np.concatenate([np.arange(s.start, s.end) for s in spans]) if spans else np.zeros(0, np.int64)
        blocks = np.concatenate(
            [np.asarray(s.table, np.int64)[np.arange(s.start, s.end) // pool.block_tokens] for s in spans]
        ) if spans else positions
        compiled = native.paged_attention_for(pool.rows, pool.block_tokens)
        paged: Sequence[RowSpan] = ()
        if compiled is not None:
            paged = spans
        elif runs_triton(device):
            paged = decode
        tables, contexts = block_tables(paged, pool.block_tokens, _TABLE_STEP) if paged else (_NONE, _NONE)
        parts = (positions, blocks, contexts, tables)
        on_device = to_device(np.concatenate([part.ravel() for part in parts]).astype(np.int32), device)
        sent = on_device.split([part.size for part in parts])
        self.positions = sent[0].long()
        self._token_rows = pool.token_rows(sent[1].long(), self.positions % pool.block_tokens)
        self._fresh = fresh_blocks(spans, pool.block_tokens)
        starts = np.cumsum([0, *lengths])
        self._paged: PagedDecode | _PagedSpans | None = None
        self._paged_rows = sum(lengths[: len(paged)])
        self._decode_windows: dict[int | None, list[_DecodeGroup]] = {}
        self._prefill: list[tuple[slice, RowSpan, Tensor | None]] = []
        self._prefill_attention = attention_for(device).forward
        if compiled is not None:
            self._paged = _PagedSpans(compiled, sent[3].view(tables.shape), sent[2], torch.from_numpy(starts.astype(np.int32)))
        else:
            if paged:
                self._paged = PagedDecode(sent[3].view(tables.shape), sent[2], int(contexts.max()))
            elif decode:
                self._decode_windows = {window: self._groups(decode, window) for window in set(self.windows)}
            self._prefill = [
                (slice(int(first), int(first) + s.end - s.start), s, self._context(s))
                for first, s in zip(starts[len(decode) : -1], prefill, strict=True)
            ]
        self._segments = [
            *_segments(decode, 0, adapters.num_slots, device), *_segments(prefill, len(decode), adapters.num_slots, device)
        ]

    def clear_fresh(self) -> None:
        """Zeroes the blocks that get their first token in this batch."""
        self.pool.clear(self._fresh)

    def _context(self, span: RowSpan) -> Tensor | None:
        """Block rows of a span's context; None where the span is all of it."""
        if span.start == 0:
            return None
        used = span.table[: -(-span.end // self.pool.block_tokens)]
        return self.pool.block_rows(to_device(used, self.pool.buffer.device))

    def _groups(self, decode: Sequence[RowSpan], window: int | None) -> list[_DecodeGroup]:
        """Decode rows cut into groups: padding to a group's longest context at most doubles what is read, and what is gathered
        stays in the processor's cache."""
        size, device = self.pool.block_tokens, self.pool.buffer.device
        ends = np.array([span.end for span in decode])
        counts = -(-ends // size)
        order = np.argsort(counts, kind="stable")
        block = self.pool.rows.shape[1] * self.pool.rows.element_size() * self.pool.kv_heads
        groups, first = [], 0
        while first < len(order):
            alike = int(np.searchsorted(counts[order[first:]], 2 * counts[order[first]] + 4, side="right"))
            cached = max(1, _GATHERED_BYTES // (int(counts[order[first + alike - 1]]) * block))
            chosen = order[first : first + min(alike, cached)]
            table = np.empty((len(chosen), int(counts[chosen].max())), np.int64)
            for row, index in enumerate(chosen):
                own = decode[index].table[: counts[index]]
                table[row, : len(own)] = own
                table[row, len(own) :] = own[0]  # padding reads the request's own memory
            keys = np.arange(table.shape[1] * size)
            seen = keys < ends[chosen, None]
            if window is not None:
                seen &= keys >= ends[chosen, None] - window
            bias = torch.zeros(len(chosen), 1, 1, len(keys), dtype=self.pool.rows.dtype, device=device)
            bias.masked_fill_(~torch.from_numpy(seen).to(device)[:, None, None], -torch.inf)
            in_a_row = bool((np.diff(chosen) == 1).all())
            rows = slice(int(chosen[0]), int(chosen[-1]) + 1) if in_a_row else torch.from_numpy(chosen).to(device)
            block_rows = self.pool.block_rows(torch.from_numpy(table).to(device))
            value_rows = self.pool.value_rows(block_rows, self.share).flatten()
            starts = torch.arange(0, len(value_rows), len(keys), dtype=torch.int32, device=device)
            groups.append(_DecodeGroup(rows, block_rows, value_rows, starts, bias))
            first += len(chosen)
        return groups

    def segments(self, name: str) -> Iterator[tuple[slice, Factor | FactorStack]]:
        """The rows with adapters and the factors of the present layer."""
        stack = self.adapters.factor(self.layer, name) if self._segments else None
        if stack is None:
            return
        for part in self._segments:
            scales = {slot: self.adapters.scale(self.layer, name, slot) for slot in part.counts}
            center = self.adapters.center(self.layer, name)
            rows = slice(part.first, part.end)
            if part.ends is None:
                ((slot, scale),) = scales.items()
                yield rows, Factor(stack[slot].T, scale, None, center)
            else:
                yield rows, FactorStack(stack, part.ends, self._row_scales(part, scales), center)

    def _row_scales(self, part: _Segments, scales: dict[int, float]) -> Tensor | float:
        """[rows, 1], or the one scale of all; made once per different set."""
        if len(set(scales.values())) == 1:
            return next(iter(scales.values()))
        key = (part.first, tuple(scales.items()))
        if key not in self._scales:
            values = np.repeat([scales[slot] for slot in part.counts], list(part.counts.values()))
            tensor = to_device(torch.from_numpy(values).to(self.pool.rows.dtype), self.pool.rows.device)
            self._scales[key] = tensor[:, None]
        return self._scales[key]

    def attention(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q, out: [rows, H * K]; k, v: [rows, G * K], which are stored first."""
        self.pool.write(self.layer, self._token_rows, k, v)
        window = self.windows[self.layer]
        if self._paged is not None:
            paged = slice(self._paged_rows)
            self._paged.attention(out[paged], q[paged], self.pool, self.layer, window)
        for group in self._decode_windows.get(window, ()):
            keys, values = self.pool.keys(self.layer, group.block_rows), self.pool.values(self.layer)
            if isinstance(group.rows, slice):
                decode_attention(out[group.rows], q[group.rows], keys, values, group.value_rows, group.starts, group.bias)
            else:
                part = torch.empty(len(group.rows), out.shape[1], dtype=out.dtype, device=out.device)
                decode_attention(part, q[group.rows], keys, values, group.value_rows, group.starts, group.bias)
                out[group.rows] = part
        for rows, span, context in self._prefill:
            keys, values = k[rows], v[rows]
            if context is not None:
                keys, values = (t.transpose(0, 1).flatten(1) for t in self.pool.gather(self.layer, context))
            lse = torch.empty(span.end - span.start, q.shape[1] // self.width,
                              dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
            self._prefill_attention(
                out[rows], lse, q[rows], keys, values, width=self.width, begin=0, first=span.start, last=span.end, window=window
            )


def block_tables(spans: Sequence[RowSpan], size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, N] blocks and int32 [B] context tokens of spans; N is a multiple of `step`, unused entries are 0."""
    ends = np.array([span.end for span in spans], np.int32)
    counts = -(-ends // size)
    tables = np.zeros((len(spans), -(-int(counts.max()) // step) * step), np.int32)
    for row, (span, count) in enumerate(zip(spans, counts, strict=True)):
        tables[row, :count] = span.table[:count]
    return tables, ends


def fresh_blocks(spans: Sequence[RowSpan], size: int) -> list[int]:
    """Blocks whose first token is in the batch."""
    return [block for s in spans for block in s.table[-(-s.start // size) : -(-s.end // size)]]


def _segments(spans: Sequence[RowSpan], row: int, num_slots: int, device: torch.device) -> list[_Segments]:
    """The rows of a part that have adapters, as one run."""
    counts = [0] * num_slots
    first = None
    for span in spans:
        if span.slot != NO_ADAPTER:
            first = row if first is None else first
            counts[span.slot] += span.end - span.start
        row += span.end - span.start
    if first is None:
        return []
    used = {slot: count for slot, count in enumerate(counts) if count}
    ends = None if len(used) == 1 else to_device(np.cumsum(counts).astype(np.int32), device)
    return [_Segments(first, row, used, ends)]
