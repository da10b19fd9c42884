"""CUDA graphs for iterations that only decode: a pass as one launch instead of hundreds.

    host:    positions | blocks | contexts | slots | tables   --one queued copy-->   static inputs, with ids
    graph:   embedding -> layers, by the same programs as any pass -> hidden [padded rows, D]

There are a few sizes: rows in powers of two, contexts in steps of four. Nothing is captured while requests wait for it. Passes
of the base model are captured before the engine serves. Those with adapters are captured while the engine has nothing else to
do, since a graph reads the memory of their factors, which moves when there are more. Until then such passes run launch by
launch, as all passes with prompts or training rows do. Rows of padding have no context and no adapter, and write to the pool's
scratch block.

B rows, N blocks of a table, D model width.

Not yet run on a device: none was there when this was written. Tests play the capture on the CPU.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.compiler.program import FusedLayer, Place, Storage
from coserve.kernels.triton.segments import NO_SLOT, SlotFactors
from coserve.model.weights import ModelWeights
from coserve.ops.run import RowContext
from coserve.runtime.adapters import AdapterRows, AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor
from coserve.runtime.sequences import block_tables
from coserve.runtime.spans import NO_ADAPTER, PagedDecode, RowSpan, fresh_blocks
from coserve.runtime.transfer import to_device

MAX_ROWS = 512
MIN_CONTEXT = 1024
"""The shortest context that passes are captured for."""
CONTEXT_STEP = 4
"""How much longer the next one is. What a row doesn't use of its context costs programs that end at once."""


def padded_rows(rows: int) -> int:
    """The captured number of rows for a batch."""
    return 1 << (rows - 1).bit_length()


def padded_context(longest: int) -> int:
    """The captured context for a batch whose longest row sees so many tokens."""
    context = MIN_CONTEXT
    while context < longest:
        context *= CONTEXT_STEP
    return context


class _Size(NamedTuple):
    """rows, context: as padded. adapters: whether rows may have adapters."""

    rows: int
    context: int
    adapters: bool


class _DecodeRows(RowContext):
    """Rows of a captured batch as operators see them. cos, sin: [B, K]. adapters: None where no row has one."""

    def __init__(
        self, pool: KeyValuePool, windows: Sequence[int | None], paged: PagedDecode, token_rows: Tensor,
        adapters: AdapterRows | None,
    ) -> None:
        self.pool, self.windows, self.paged, self.token_rows = pool, windows, paged, token_rows
        self.adapters = adapters
        self.num_serving = paged.tables.shape[0]
        self.cos = self.sin = token_rows
        self.layer = 0

    def slot_factors(self, names: tuple[str, ...]) -> SlotFactors | None:
        return None if self.adapters is None else self.adapters.factors(self.layer, names)

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
    """rows: int32 [4, B], positions, blocks of the new tokens, contexts, slots; tables: int32 [B, N]; ids: int64 [B]; streams:
    [2, B, D]."""

    rows: Tensor
    tables: Tensor
    ids: Tensor
    streams: Tensor
    replay: Callable[[], None]


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """One stream for all captures: the library keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def record(body: Callable[[], None], device: torch.device, memory: Any) -> Callable[[], None]:
    """Captures what `body` launches; the result launches it again. It runs once before: kernels compile, memory grows. Whatever
    happens, the calling thread is on its stream again afterwards."""
    before, stream = torch.cuda.current_stream(device), _capture_stream(device)
    try:
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            body()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # a checkpoint's writer may be at work: only this thread's calls are watched
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            body()
        return graph.replay
    finally:
        torch.cuda.set_stream(before)


class DecodeGraphs:
    """Captured decode passes over a pool, on a device whose decode attention is the paged kernel (`runs_triton`).

    programs: each layer's, for rows without adapters or with those that are in `adapters` now. max_rows: the most that a batch
    has. They have a workspace of their own, so that nothing that grows elsewhere is memory of theirs.
    """

    def __init__(
        self, weights: ModelWeights, pool: KeyValuePool, adapters: AdapterSlots,
        programs: Callable[[bool], Sequence[FusedLayer]], *, max_rows: int = MAX_ROWS,
    ) -> None:
        assert pool.scratch is not None
        self.executor = Executor(weights)
        self.pool, self.adapters, self.programs, self.scratch = pool, adapters, programs, pool.scratch
        self.arch, self.device = weights.architecture, weights.device
        self.max_rows = padded_rows(min(max_rows, MAX_ROWS))
        longest = min(self.arch.max_position_embeddings, pool.num_blocks * pool.block_tokens)
        self.max_context = -(-longest // pool.block_tokens) * pool.block_tokens
        self.executor.rotary.reserve(self.arch.max_position_embeddings)
        self._captured: dict[_Size, _Captured] = {}
        self._adapters_were: Hashable = None
        self._memory: Any = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        self._broken = False

    # --- what is captured ---

    def sizes(self) -> list[_Size]:
        """What there should be: short contexts first, which most batches have, and of each the most rows first, so that others
        find their memory there."""
        rows = [1 << power for power in reversed(range(self.max_rows.bit_length()))]
        contexts = [min(MIN_CONTEXT, self.max_context)]
        while contexts[-1] < self.max_context:
            contexts.append(self._padded(contexts[-1] + 1))
        kinds = (False, True) if self.adapters.takes_slots and self.adapters.kinds else (False,)
        return [_Size(number, context, kind) for kind in kinds for context in contexts for number in rows]

    def _padded(self, longest: int) -> int:
        return min(padded_context(longest), self.max_context)

    def capture_next(self) -> bool:
        """Captures one more size; False if all are there, or if capturing has failed, which is tried once."""
        self._drop_stale()
        missing = next((size for size in self.sizes() if size not in self._captured), None)
        if missing is None or self._broken:
            return False
        try:
            self._captured[missing] = self._capture(missing)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            warnings.warn(f"decode passes run without CUDA graphs: {error}", stacklevel=2)
            self._broken = True
            self._captured.clear()
        return True

    def __len__(self) -> int:
        return len(self._captured)

    def _drop_stale(self) -> None:
        """Forgets passes with adapters whose factors have moved, or whose programs are for other adapters."""
        now = (self.adapters.layout, self.adapters.moves)
        if now != self._adapters_were:
            self._adapters_were = now
            self._captured = {size: kept for size, kept in self._captured.items() if not size.adapters}

    def _capture(self, size: _Size) -> _Captured:
        weights = self.executor.weights
        head = to_device(self._head((), size.rows, None), self.device)
        blocks = -(-size.context // self.pool.block_tokens)
        tables = torch.full((size.rows, blocks), self.scratch, dtype=torch.int32, device=self.device)
        ids = torch.zeros(size.rows, dtype=torch.int64, device=self.device)
        streams = torch.zeros(2, size.rows, self.arch.hidden_size, dtype=weights.dtype, device=self.device)
        layers = self.programs(size.adapters)
        workspace = max(layer.program.work_bytes for layer in layers) * padded_rows(max(64, self.max_rows))
        if workspace > self.executor.workspace.num_bytes:
            self._captured.clear()  # they read and write the memory that is replaced
            self.executor.workspace.reserve(workspace)

        def body() -> None:
            self._pass(head, tables, ids, streams, size, layers)

        return _Captured(head, tables, ids, streams, record(body, self.device, self._memory))

    # --- replaying ---

    def run(self, token_ids: Tensor, decode: Sequence[RowSpan]) -> Tensor | None:
        """Last hidden rows [B, D] of a batch of decode rows alone, valid until the next pass; None if no captured pass fits."""
        if not 0 < len(decode) <= self.max_rows:
            return None
        self._drop_stale()
        size = _Size(
            padded_rows(len(decode)), self._padded(max(span.end for span in decode)),
            any(span.slot != NO_ADAPTER for span in decode),
        )
        captured = self._captured.get(size)
        if captured is None:
            return None
        self.pool.clear(fresh_blocks(decode, self.pool.block_tokens))
        tables, contexts = block_tables(decode, self.pool.block_tokens, 1)
        head = self._head(decode, size.rows, (tables, contexts))
        sent = to_device(np.concatenate([head.ravel(), tables.ravel()]), self.device)
        captured.ids[: len(decode)].copy_(token_ids)
        captured.rows.copy_(sent[: head.size].view(4, -1))
        captured.tables[: len(decode), : tables.shape[1]].copy_(sent[head.size :].view(tables.shape))
        captured.replay()
        return captured.streams[self.arch.num_layers % 2, : len(decode)]

    def _head(
        self, decode: Sequence[RowSpan], rows: int, known: tuple[np.ndarray, np.ndarray] | None
    ) -> np.ndarray:
        """int32 [4, rows]: positions, blocks of the new tokens, contexts, slots. known: the tables and contexts of `decode`.
        Rows of padding have no context, and nothing of their tables is read."""
        head, used = np.zeros((4, rows), np.int32), len(decode)
        head[1], head[3] = self.scratch, NO_SLOT
        if known is not None:
            tables, head[2, :used] = known
            head[0, :used] = head[2, :used] - 1
            head[1, :used] = tables[np.arange(used), head[0, :used] // self.pool.block_tokens]
            head[3, :used] = [span.slot for span in decode]
        return head

    def _pass(
        self, head: Tensor, tables: Tensor, ids: Tensor, streams: Tensor, size: _Size, layers: Sequence[FusedLayer]
    ) -> None:
        """The pass over static memory. No step of it may depend on a value."""
        rows = size.rows
        positions, blocks, contexts, slots = head
        places = positions.long()
        token_rows = self.pool.token_rows(blocks.long(), places % self.pool.block_tokens)
        paged = PagedDecode(tables, contexts, size.context)
        adapters = AdapterRows(self.adapters, slots) if size.adapters else None
        batch = _DecodeRows(self.pool, self.arch.sliding_windows, paged, token_rows, adapters)
        batch.cos, batch.sin = self.executor.rotary.rows(places, 1)
        self.executor.weights.embed(streams[0], ids)
        for number, layer in enumerate(layers):
            batch.layer = number
            ends = {Place.INPUT: streams[number % 2], Place.OUTPUT: streams[(number + 1) % 2]}

            def external(number: int, storage: Storage, ends: dict[Place, Tensor] = ends) -> Tensor:
                return ends[storage.place]

            self.executor.execute(layer.program, number, batch, rows, external)
