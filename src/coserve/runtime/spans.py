"""Rows of requests in a batch: where their keys and values go, whose adapter each row has, and their attention.

Rows are [decode | prefill], each part sorted by adapter slot, rows without an adapter first. B decode rows, T rows of one
prefill span, S context tokens, N blocks of a table, G key-value heads, K head width.

There are three readers of context. The compiled kernel (on a CPU) serves all rows through their block tables. Triton's kernel
serves decode rows that way. Without either, decode rows are grouped by length of context; each group gathers its keys and reads
values where they lie. Prefill spans that the reader does not serve use `kernels.attention` one by one, on CUDA all in one call
(sequences.py). What an iteration needs on the device goes there in few copies, queued without a wait.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.kernels import native
from coserve.kernels.attention import attention, decode_attention
from coserve.kernels.choose import packs_attention, runs_triton
from coserve.kernels.triton.paged_decode import paged_decode_attention
from coserve.kernels.triton.segments import SlotFactors
from coserve.model.architecture import Architecture
from coserve.ops.run import Factor, FactorStack
from coserve.runtime.adapters import AdapterRows, AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.sequences import NO_ADAPTER, TABLE_STEP, PackedPrefill, RowSpan, SpanArrays
from coserve.runtime.transfer import to_device

_GATHERED_BYTES = 10 << 20
"""Keys that a group of decode rows gathers at most, on devices that gather."""
_NO_TABLES = np.zeros((0, 0), np.int32), np.zeros(0, np.int32)


class _DecodeGroup(NamedTuple):
    """n decode rows whose contexts have about the same length, padded to S tokens; H query heads.

    rows: which rows of the batch, a slice or int64 [n]. block_rows: [n, G, blocks], where the keys lie in the pool. value_rows:
    int32 [n * H * S], where the values lie, once per query head. starts: int32 [n * H], where each query head's part of
    value_rows begins. bias: [n, 1, 1, S], 0 for a token that the row sees and -inf for others.
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


class _GatheredDecode(NamedTuple):
    """Decode rows where there is no kernel that reads through tables: by sliding window, the groups that share a product."""

    groups: Mapping[int | None, Sequence[_DecodeGroup]]

    def attention(self, out: Tensor, q: Tensor, pool: KeyValuePool, layer: int, window: int | None) -> None:
        """q, out: [B, H * K], over what the tables hold. Keys are copied side by side, values are read where they lie."""
        for group in self.groups[window]:
            keys, values = pool.keys(layer, group.block_rows), pool.values(layer)
            if isinstance(group.rows, slice):
                decode_attention(out[group.rows], q[group.rows], keys, values, group.value_rows, group.starts, group.bias)
            else:
                part = torch.empty(len(group.rows), out.shape[1], dtype=out.dtype, device=out.device)
                decode_attention(part, q[group.rows], keys, values, group.value_rows, group.starts, group.bias)
                out[group.rows] = part


def _decode_groups(decode: Sequence[RowSpan], pool: KeyValuePool, share: int, window: int | None) -> list[_DecodeGroup]:
    """Cuts decode rows into groups: padding to a group's longest context at most doubles what is read, and what is gathered
    stays in the processor's cache. share: query heads per key-value head; window: the layer's sliding window."""
    size, device = pool.block_tokens, pool.buffer.device
    ends = np.array([span.end for span in decode])
    counts = -(-ends // size)
    order = np.argsort(counts, kind="stable")
    block = pool.rows.shape[1] * pool.rows.element_size() * pool.kv_heads
    groups: list[_DecodeGroup] = []
    first = 0
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
        bias = torch.zeros(len(chosen), 1, 1, len(keys), dtype=pool.rows.dtype, device=device)
        bias.masked_fill_(~torch.from_numpy(seen).to(device)[:, None, None], -torch.inf)
        in_a_row = bool((np.diff(chosen) == 1).all())
        rows = slice(int(chosen[0]), int(chosen[-1]) + 1) if in_a_row else torch.from_numpy(chosen).to(device)
        block_rows = pool.block_rows(torch.from_numpy(table).to(device))
        value_rows = pool.value_rows(block_rows, share).flatten()
        starts = torch.arange(0, len(value_rows), len(keys), dtype=torch.int32, device=device)
        groups.append(_DecodeGroup(rows, block_rows, value_rows, starts, bias))
        first += len(chosen)
    return groups


class _Segments(NamedTuple):
    """Rows [first, end) that have adapters, sorted by slot. slot: the one that all of them use, or None. ends: int32 [slots],
    the row at which each slot's rows end, if they use several."""

    first: int
    end: int
    slot: int | None
    ends: Tensor | None


class SpanRows:
    """One batch's rows of requests. positions: int64 [rows]; token_rows: where the pool holds their keys (`token_rows` there);
    longest: the end of the longest context, at least 1; with_adapters: whether any row has one. `layer` is set before each
    program."""

    def __init__(
        self, decode: Sequence[RowSpan], prefill: Sequence[RowSpan], pool: KeyValuePool, arch: Architecture,
        adapters: AdapterSlots,
    ) -> None:
        self.pool, self.adapters, self.windows, self.width = pool, adapters, arch.sliding_windows, arch.head_dim
        self.layer = 0
        device = pool.buffer.device
        spans = [*decode, *prefill]
        arrays = SpanArrays(spans, pool.block_tokens)
        positions = arrays.positions()
        self.num_rows = len(positions)
        compiled, triton = native.paged_attention_for(pool.rows, pool.block_tokens), runs_triton(device)
        read: Sequence[RowSpan] = spans if compiled is not None else decode
        paged = len(read) > 0 and (compiled is not None or triton)
        tables: np.ndarray = _NO_TABLES[0]
        contexts: np.ndarray = _NO_TABLES[1]
        if paged:
            tables, contexts = arrays.tables(len(read), TABLE_STEP), arrays.ends[: len(read)]
        slots = arrays.by_row(arrays.slots) if adapters.takes_slots else _NO_TABLES[1]
        places = arrays.blocks(positions) * np.int64(pool.token_stride) + positions % pool.block_tokens
        parts = (positions, places, contexts, tables, slots)
        on_device = to_device(np.concatenate([part.ravel() for part in parts]).astype(np.int32), device)
        sent = on_device.split([part.size for part in parts])
        self.positions = sent[0].long()
        self.token_rows = pool.head_rows(sent[1].long())
        self.longest, self.with_adapters = int(arrays.ends.max(initial=1)), max(arrays.slots, default=NO_ADAPTER) != NO_ADAPTER
        self._fresh = arrays.fresh()
        starts = np.concatenate([[0], np.cumsum(arrays.lengths)])
        self._read_rows = slice(int(starts[len(read)]))
        self._reader: PagedDecode | _PagedSpans | _GatheredDecode
        if compiled is not None:
            self._reader = _PagedSpans(compiled, sent[3].view(tables.shape), sent[2], torch.from_numpy(starts.astype(np.int32)))
        elif triton:
            self._reader = PagedDecode(sent[3].view(tables.shape), sent[2], int(contexts.max(initial=0)))
        else:
            share = arch.num_heads // arch.num_kv_heads
            self._reader = _GatheredDecode({w: _decode_groups(decode, pool, share, w) for w in set(self.windows)})
        unread = spans[len(read) :]
        self._packed = PackedPrefill(unread, pool, self.windows) if unread and packs_attention(device) else None
        self._prefill: list[tuple[slice, RowSpan, Tensor | None]] = [
            (slice(int(first), int(end)), span, self._context(span))
            for first, end, span in zip(starts[len(read) : -1], starts[len(read) + 1 :], unread, strict=True)
        ] if self._packed is None else []
        self.rows_slots = AdapterRows(adapters, sent[4]) if adapters.takes_slots else None
        """Each row's adapter, where kernels take slots; `segments` has nothing to say then."""
        parted = ((decode, 0), (prefill, len(decode))) if self.rows_slots is None else ()
        self._segments = [part for some, row in parted for part in _segments(some, row, adapters.num_slots, device)]

    def clear_fresh(self) -> None:
        """Zeroes the blocks that get their first token in this batch."""
        self.pool.clear(self._fresh)

    def _context(self, span: RowSpan) -> Tensor | None:
        """Block rows of a span's context; None where the span is all of it."""
        if span.start == 0:
            return None
        used = span.table[: -(-span.end // self.pool.block_tokens)]
        return self.pool.block_rows(to_device(used, self.pool.buffer.device))

    def segments(self, name: str) -> Iterator[tuple[slice, Factor | FactorStack]]:
        """The rows with adapters and the factors of the present layer."""
        stack = self.adapters.factor(self.layer, name) if self._segments else None
        if stack is None:
            return
        center = self.adapters.center(self.layer, name)
        for part in self._segments:
            rows = slice(part.first, part.end)
            if part.ends is None:
                yield rows, Factor(stack[part.slot].T, 1.0, None, center)
            else:
                yield rows, FactorStack(stack, part.ends, center)

    def slot_factors(self, names: tuple[str, ...]) -> SlotFactors | None:
        """Several sites' factors in the present layer, with each row's slot; None where kernels don't take slots."""
        return None if self.rows_slots is None else self.rows_slots.factors(self.layer, names)

    def attention(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """q, out: [rows, H * K]; k, v: [rows, G * K], which are stored first."""
        self.pool.write(self.layer, self.token_rows, k, v)
        self.attend(out, q, k, v)

    def attend(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """`attention` of rows whose k and v are in the pool already."""
        window = self.windows[self.layer]
        if self._read_rows.stop:
            self._reader.attention(out[self._read_rows], q[self._read_rows], self.pool, self.layer, window)
        if self._packed is not None:
            rows = slice(self._read_rows.stop, None)
            self._packed.attention(out[rows], q[rows], k[rows], v[rows], self.layer, window)
        for rows, span, context in self._prefill:
            keys, values = k[rows], v[rows]
            if context is not None:
                keys, values = (t.transpose(0, 1).flatten(1) for t in self.pool.gather(self.layer, context))
            lse = torch.empty(span.end - span.start, q.shape[1] // self.width,
                              dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
            attention(
                out[rows], lse, q[rows], keys, values, width=self.width, begin=0, first=span.start, last=span.end, window=window
            )


def fresh_blocks(spans: Sequence[RowSpan], size: int) -> list[int]:
    """Blocks whose first token is in the batch."""
    found: list[int] = []
    for start, end, table, _ in spans:
        first, last = -(-start // size), -(-end // size)
        if first < last:  # not so for most rows that decode
            found += table[first:last]
    return found


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
    used = [slot for slot, count in enumerate(counts) if count]
    if len(used) == 1:
        return [_Segments(first, row, used[0], None)]
    return [_Segments(first, row, None, to_device(np.cumsum(counts).astype(np.int32), device))]
