"""CUDA graphs for iterations that only decode, on the bare base: a pass as one launch instead of a thousand.

    host:    ids | positions | blocks | contexts | tables   --one queued copy-->   static inputs
    graph:   embedding -> layers, by the same programs as any pass -> hidden [padded rows, D]

A graph is captured at its first use, per padded number of rows and padded context, and replayed from then on. Rows of padding
have no context and write to the pool's scratch block. Everything else (adapters, prefill, training rows) is the eager pass's.
B rows, N blocks of a table, D model width.

Not yet run on a device: none was there when this was written. Tests play the capture on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.compiler.program import Place, Program, Storage
from coserve.ops.run import RowContext
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor
from coserve.runtime.spans import NO_ADAPTER, PagedDecode, RowSpan, block_tables, fresh_blocks
from coserve.runtime.transfer import to_device

MAX_ROWS = 512
MIN_CONTEXT = 1024
"""Contexts are padded to a power of two from here on; what a row doesn't use costs a program that ends at once."""


class _DecodeRows(RowContext):
    """Rows of a captured batch as operators see them. cos, sin: [B, K]."""

    def __init__(self, pool: KeyValuePool, windows: Sequence[int | None], paged: PagedDecode, token_rows: Tensor) -> None:
        self.pool, self.windows, self.paged, self.token_rows = pool, windows, paged, token_rows
        self.num_serving = paged.tables.shape[0]
        self.cos = self.sin = token_rows
        self.layer = 0

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.pool.write(self.layer, self.token_rows, k, v)
        self.paged.attention(out, q, self.pool, self.layer, self.windows[self.layer])

    def rotary_attention(
        self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, rotated: Sequence[Tensor], scale: float
    ) -> None:
        if not self.pool.has_row_kernels:
            super().rotary_attention(out, lse, q, k, v, rotated, scale)
            return
        self.pool.rotary_write(self.layer, self.token_rows, q, k, v, self.cos, self.sin, scale)
        self.paged.attention(out, q, self.pool, self.layer, self.windows[self.layer])


class _Captured(NamedTuple):
    """inputs: int32 [3 * B + B * N], as in the module's figure without ids; ids: int64 [B]; streams: [2, B, D].

    held: memory that the graph reads or writes and that others may replace; stale as soon as they have.
    """

    inputs: Tensor
    ids: Tensor
    streams: Tensor
    replay: Callable[[], None]
    held: tuple[Tensor, ...]


def record(body: Callable[[], None], device: torch.device, memory: Any) -> Callable[[], None]:
    """Captures what `body` launches; the result launches it again. It runs once before: kernels compile, memory grows."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):  # a checkpoint's writer may be at work
        body()
    return graph.replay


class DecodeGraphs:
    """Captured decode passes over a pool, on a device whose decode attention is the paged kernel (`runs_triton`).

    programs: each layer's, without adapters. Nothing runs until the first use.
    """

    def __init__(self, executor: Executor, pool: KeyValuePool, programs: Sequence[Program]) -> None:
        assert pool.scratch is not None
        self.executor, self.pool, self.programs, self.scratch = executor, pool, programs, pool.scratch
        self.arch, self.device = executor.arch, executor.weights.device
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._memory: Any = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._broken = False

    def takes(self, decode: Sequence[RowSpan]) -> bool:
        """Whether a batch of these rows alone can be replayed."""
        return not self._broken and 0 < len(decode) <= MAX_ROWS and all(span.slot == NO_ADAPTER for span in decode)

    def run(self, token_ids: Tensor, decode: Sequence[RowSpan]) -> Tensor | None:
        """Last hidden rows [B, D], valid until the next pass; None if capturing fails, which is tried once."""
        rows = 1 << (len(decode) - 1).bit_length()
        context = max(MIN_CONTEXT, 1 << (max(span.end for span in decode) - 1).bit_length())
        try:
            captured = self._get(rows, context)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            warnings.warn(f"decode passes run without CUDA graphs: {error}", stacklevel=2)
            self._broken = True
            self._captured.clear()
            return None
        self.pool.clear(fresh_blocks(decode, self.pool.block_tokens))
        captured.ids[: len(decode)].copy_(token_ids)
        captured.inputs.copy_(to_device(self._inputs(decode, rows, context), self.device))
        captured.replay()
        return captured.streams[len(self.programs) % 2, : len(decode)]

    def _inputs(self, decode: Sequence[RowSpan], rows: int, context: int) -> np.ndarray:
        """int32 [3 * B + B * N]: positions, blocks of the new tokens, contexts, tables; padding without context."""
        size, used = self.pool.block_tokens, len(decode)
        head, tables = np.zeros((3, rows), np.int32), np.full((rows, -(-context // size)), self.scratch, np.int32)
        head[1] = self.scratch
        if decode:
            own, head[2, :used] = block_tables(decode, size, 1)
            tables[:used, : own.shape[1]] = own
            head[0, :used] = head[2, :used] - 1
            head[1, :used] = own[np.arange(used), head[0, :used] // size]
        return np.concatenate([head.ravel(), tables.ravel()])

    def _held(self) -> tuple[Tensor, ...]:
        """What others may replace by something larger."""
        return (self.executor.workspace.reserve(1), *self.executor.rotary.tables)

    def _get(self, rows: int, context: int) -> _Captured:
        found = self._captured.get((rows, context))
        if found is not None and all(a.data_ptr() == b.data_ptr() for a, b in zip(found.held, self._held(), strict=True)):
            return found
        inputs = to_device(self._inputs((), rows, context), self.device)
        weights = self.executor.weights
        ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        streams = torch.zeros(2, rows, self.arch.hidden_size, dtype=weights.dtype, device=self.device)
        self.executor.rotary.reserve(max(context, self.arch.max_position_embeddings))

        def body() -> None:
            self._pass(inputs, ids, streams, rows, context)

        replay = record(body, self.device, self._memory)
        self._captured[rows, context] = _Captured(inputs, ids, streams, replay, self._held())
        return self._captured[rows, context]

    def _pass(self, inputs: Tensor, ids: Tensor, streams: Tensor, rows: int, context: int) -> None:
        """The pass over static memory. No step of it may depend on a value."""
        positions, blocks, contexts, tables = inputs.split([rows, rows, rows, inputs.numel() - 3 * rows])
        places = positions.long()
        token_rows = self.pool.token_rows(blocks.long(), places % self.pool.block_tokens)
        paged = PagedDecode(tables.view(rows, -1), contexts, context)
        batch = _DecodeRows(self.pool, self.arch.sliding_windows, paged, token_rows)
        batch.cos, batch.sin = self.executor.rotary.rows(places, context)
        self.executor.weights.embed(streams[0], ids)
        for layer, program in enumerate(self.programs):
            batch.layer = layer
            ends = {Place.INPUT: streams[layer % 2], Place.OUTPUT: streams[(layer + 1) % 2]}

            def external(number: int, storage: Storage, ends: dict[Place, Tensor] = ends) -> Tensor:
                return ends[storage.place]

            self.executor.execute(program, layer, batch, rows, external)
