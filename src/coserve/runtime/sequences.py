"""Sequences that one attention call serves on CUDA: those of a training window, and the prompts of a batch.

Owns: which keys each sequence of a call has, and the tables that tell the device, made once and used in all layers. Does not
own: the calls (kernels/cuda_attention.py), readers of decode rows (spans.py).

B spans, N blocks of a table, T rows of all spans, S keys of all spans, G key-value heads, K head width.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.kernels import cuda_attention
from coserve.kernels.choose import runs_triton
from coserve.kernels.cuda_attention import KeyedRows, PackedCall, call_ends
from coserve.kernels.triton.gather import gather_context
from coserve.kernels.triton.segments import NO_SLOT
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.transfer import to_device, to_device_together

NO_ADAPTER = NO_SLOT
TABLE_STEP = 16
"""Tables are padded to a multiple of this: Triton compiles anew for strides that are no multiple of 16."""
GATHERED_BYTES = 256 << 20
"""Keys and values that prefill spans gather at a time; more spans take more calls."""


class RowSpan(NamedTuple):
    """A request's tokens [start, end) in this batch. table: its blocks, in order, fastest as array("i"). slot: its adapter's,
    or NO_ADAPTER."""

    start: int
    end: int
    table: Sequence[int]
    slot: int


class SpanArrays:
    """Spans as arrays, without a call of NumPy per span. starts, ends, lengths: int64 [B], in tokens."""

    def __init__(self, spans: Sequence[RowSpan], size: int) -> None:
        """size: tokens of a block."""
        columns: tuple[tuple[Any, ...], ...] = tuple(zip(*spans, strict=True)) or ((), (), (), ())
        starts, ends, tables, self.slots = columns
        self.size, self.starts, self.ends = size, np.array(starts, np.int64), np.array(ends, np.int64)
        self.lengths = self.ends - self.starts
        self._single = bool((self.lengths == 1).all())
        packed = b"".join([table if isinstance(table, array) else array("i", table) for table in tables])
        self._blocks = np.frombuffer(packed, np.int32)
        """All tables, one behind another."""
        self._sizes = np.array([len(table) for table in tables], np.int64)
        self._firsts = np.cumsum(self._sizes) - self._sizes

    def by_row(self, values_B: np.ndarray | Sequence[int]) -> np.ndarray:
        """[T]: each span's value, once per row."""
        return np.asarray(values_B) if self._single else np.repeat(values_B, self.lengths)

    def positions(self) -> np.ndarray:
        """int64 [T]: of each row."""
        if self._single:
            return self.starts
        ends = np.cumsum(self.lengths)
        return np.arange(int(ends[-1])) + self.by_row(self.starts - ends + self.lengths)

    def blocks(self, positions_T: np.ndarray) -> np.ndarray:
        """int32 [T]: the block of each row, from its position."""
        return self._blocks[self.by_row(self._firsts) + positions_T // self.size]

    def fresh(self) -> list[int]:
        """Blocks whose first token is among the rows."""
        begun, used = -(-self.starts // self.size), -(-self.ends // self.size)
        found: list[int] = []
        for span in np.flatnonzero(begun < used).tolist():
            first = int(self._firsts[span])
            found += self._blocks[first + int(begun[span]) : first + int(used[span])].tolist()
        return found

    def tables(self, count: int, step: int) -> np.ndarray:
        """int32 [count, N]: the blocks of the first spans' contexts. N is a multiple of `step`; unused entries are 0."""
        used = -(-self.ends[:count] // self.size)
        columns = np.arange(-(-int(used.max(initial=0)) // step) * step)
        tables, wanted = np.zeros((count, len(columns)), np.int32), columns < used[:, None]
        if (self._sizes[:count] == used).all():  # nobody has blocks beyond its context
            tables[wanted] = self._blocks[: int(used.sum())]
        else:
            tables[wanted] = self._blocks[(self._firsts[:count, None] + columns)[wanted]]
        return tables


def block_tables(spans: Sequence[RowSpan], size: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """int32 [B, N] blocks and int32 [B] context tokens of spans; N is a multiple of `step`, unused entries are 0."""
    arrays = SpanArrays(spans, size)
    return arrays.tables(len(spans), step), arrays.ends.astype(np.int32)


def first_seen(begin: int, first: int, window: int | None) -> int:
    """The first key that a query on key `first` or a later one sees, of a sequence that begins at key `begin`."""
    return begin if window is None else max(begin, first - window + 1)


def _calls(
    sequences: Mapping[int | None, Sequence[KeyedRows]], device: torch.device, beside: Sequence[np.ndarray] = ()
) -> tuple[dict[int | None, PackedCall], list[Tensor]]:
    """A call per sliding window, of the same queries, and `beside` as int32 tensors on the device: all in one copy."""
    ends = {window: call_ends(part) for window, part in sequences.items()}
    (queries, _), *_ = ends.values()
    ends_q, *sent = to_device_together([queries, *(keys for _, keys in ends.values()), *beside], device)
    calls = {}
    for (window, part), ends_k in zip(sequences.items(), sent, strict=False):
        max_q, max_k = max(one.last - one.first for one in part), max(one.last - one.begin for one in part)
        calls[window] = PackedCall(part, ends_q, ends_k, max_q, max_k)
    return calls, sent[len(calls) :]


def packed_calls(
    sequences: Mapping[int | None, Sequence[KeyedRows]], device: torch.device
) -> dict[int | None, PackedCall]:
    """A call per sliding window, without the keys before the first sequence's that no query's window reaches: all other
    sequences' queries begin at their first key.

    sequences: those of each layer's sliding window, or None for layers that have none; the same queries in all.
    """
    cut = {}
    for window, (head, *others) in sequences.items():
        assert all(one.begin == one.first for one in others)
        cut[window] = [head._replace(begin=first_seen(head.begin, head.first, window)), *others]
    return _calls(cut, device)[0]


class _Context(NamedTuple):
    """What is gathered for the layers of one sliding window. call: over the gathered rows; firsts: the first token of each
    span's; on_device: the same, int32 [B]."""

    call: PackedCall
    firsts: Sequence[int]
    on_device: Tensor


class _OwnRows:
    """Prefill spans that begin at token 0: their keys and values are the batch's own rows."""

    def __init__(self, spans: Sequence[RowSpan], pool: KeyValuePool, kinds: Sequence[int | None]) -> None:
        self.width = pool.width
        ends = np.cumsum([0, *(span.end for span in spans)]).tolist()
        own = [KeyedRows(begin, begin, end) for begin, end in itertools.pairwise(ends)]
        self._calls = packed_calls(dict.fromkeys(kinds, own), pool.buffer.device)

    def attention(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> None:
        """As `PackedPrefill.attention`, of these spans' rows."""
        cuda_attention.attention(out, None, q, k, v, self._calls[window], width=self.width, window=window)


class _Gathered:
    """Prefill spans whose keys and values are gathered from the pool: all that some query sees, span by span. memory: for them,
    [2, rows, G * K], once `rows` is known."""

    def __init__(self, spans: Sequence[RowSpan], pool: KeyValuePool, kinds: Sequence[int | None]) -> None:
        self.spans, self.pool = spans, pool
        device = pool.buffer.device
        firsts = {window: [first_seen(0, span.start, window) for span in spans] for window in kinds}
        sequences: dict[int | None, list[KeyedRows]] = {}
        for window in kinds:
            lengths = [span.end - first for span, first in zip(spans, firsts[window], strict=True)]
            ends = np.cumsum([0, *lengths]).tolist()
            sequences[window] = [
                KeyedRows(begin, end - (span.end - span.start), end)
                for span, (begin, end) in zip(spans, itertools.pairwise(ends), strict=True)
            ]
        tables, _ = block_tables(spans, pool.block_tokens, TABLE_STEP)
        calls, (self._tables, *sent) = _calls(
            sequences, device, [tables, *(np.asarray(firsts[window], np.int32) for window in kinds)]
        )
        self._contexts = {
            window: _Context(calls[window], firsts[window], own) for window, own in zip(kinds, sent, strict=True)
        }
        self.rows = max(call.keys.stop for call in calls.values())
        self.memory = pool.rows.new_empty(2, 0, pool.kv_heads * pool.width)
        self._blocks: list[Tensor] | None = None
        if not runs_triton(device):
            used = [span.table[: -(-span.end // pool.block_tokens)] for span in spans]
            self._blocks = [pool.block_rows(to_device(table, device)) for table in used]

    def attention(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> None:
        """As `PackedPrefill.attention`, of these spans' rows. The pool holds k and v already."""
        context = self._contexts[window]
        keys, values = self.memory[0], self.memory[1]
        if self._blocks is None:
            pool = self.pool
            gather_context(
                keys, values, pool.rows, layer=layer, num_layers=pool.num_layers, kv_heads=pool.kv_heads,
                block_tokens=pool.block_tokens, tables_BN=self._tables, firsts_B=context.on_device, ends=context.call.ends_k,
                max_tokens=context.call.max_k,
            )
        else:
            self._gather(self._blocks, context, layer)
        cuda_attention.attention(out, None, q, keys, values, context.call, width=self.pool.width, window=window)

    def _gather(self, blocks: Sequence[Tensor], context: _Context, layer: int) -> None:
        """What the kernel does, by library calls."""
        heads = self.memory.unflatten(2, (self.pool.kv_heads, self.pool.width))
        for span, own, rows, first in zip(self.spans, blocks, context.call.sequences, context.firsts, strict=True):
            for target, found in zip(heads, self.pool.gather(layer, own), strict=True):
                target[rows.begin : rows.last].copy_(found[:, first : span.end].transpose(0, 1))


class PackedPrefill:
    """Attention of a batch's prefill spans over their contexts, in one call per layer, or in several if they have more context
    than is gathered at a time. windows: each layer's sliding window."""

    def __init__(self, spans: Sequence[RowSpan], pool: KeyValuePool, windows: Sequence[int | None]) -> None:
        kinds = tuple(dict.fromkeys(windows))
        self._parts: list[tuple[slice, _OwnRows | _Gathered]] = []
        if all(span.start == 0 for span in spans):
            self._parts.append((slice(None), _OwnRows(spans, pool, kinds)))
            return
        token_bytes = 2 * pool.kv_heads * pool.width * pool.rows.element_size()
        gathered: list[_Gathered] = []
        row = 0
        while spans:
            held = np.cumsum([
                token_bytes * max(span.end - first_seen(0, span.start, window) for window in kinds) for span in spans
            ])
            taken = max(1, int(np.searchsorted(held, GATHERED_BYTES, side="right")))
            part, spans = spans[:taken], spans[taken:]
            end = row + sum(span.end - span.start for span in part)
            gathered.append(_Gathered(part, pool, kinds))
            self._parts.append((slice(row, end), gathered[-1]))
            row = end
        memory = pool.rows.new_empty(2, max(part.rows for part in gathered), pool.kv_heads * pool.width)
        for each in gathered:
            each.memory = memory

    def attention(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, layer: int, window: int | None) -> None:
        """q, out: [T, H * K] of the spans' rows; k, v: [T, G * K], which the pool holds already. window: the layer's."""
        for rows, part in self._parts:
            part.attention(out[rows], q[rows], k[rows], v[rows], layer, window)
