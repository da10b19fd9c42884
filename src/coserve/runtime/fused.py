"""A forward pass over all layers, for rows of requests and of a training window beside them. Every dense operator runs once.

    rows:   decode | prefill | finetuning window [a, b)
    K, V:   key-value blocks | the micro-batch's arena
    kept:          -         | copied to rows [a, b) of the arena after each layer's program

No policy: the plan says what runs. D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from coserve.compiler.parallelize import TensorParallel
from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import FusedLayer, Place, Storage
from coserve.core import Unit
from coserve.kernels import library
from coserve.kernels.choose import runs_triton
from coserve.kernels.triton.segments import SlotFactors
from coserve.model.weights import ModelWeights
from coserve.ops.run import Factor, FactorStack, RowContext
from coserve.peft.adapter import Adapter, Kind
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.graphs import DecodeGraphs
from coserve.runtime.keeping import KeptCopies
from coserve.runtime.memory import columns
from coserve.runtime.microbatch import InFlight
from coserve.runtime.plans import fused_plan, serving_plan, whole_widths
from coserve.runtime.sharedhead import shared_logits
from coserve.runtime.spans import RowSpan, SpanRows

_MAX_PLANS = 128
"""The most forward passes, with and without a training window, whose programs are kept."""


class TrainWindow(NamedTuple):
    """A forward unit over all layers that is fused into a forward pass."""

    state: InFlight
    unit: Unit
    adapter: Adapter | None


class BatchRows(RowContext):
    """The rows of a forward pass, as operators see them: rows of requests alone. cos, sin: [rows, K].

    layers: their programs. The executor calls `begin` first, then `embed`; `enter` before each layer's program and `leave`
    after it; and `finish` after all.
    """

    reads_workspace = False
    """Whether `leave` reads what a program left in the workspace."""

    def __init__(self, spans: SpanRows, layers: Sequence[FusedLayer], cos: Tensor, sin: Tensor) -> None:
        self.spans, self.layers, self.cos, self.sin = spans, layers, cos, sin
        self.num_serving = self.num_rows = spans.num_rows

    def begin(self, streams: Tensor) -> None:
        """The pass is about to run over `streams` [2, rows, D]: layers read one and write the other, in turn."""

    def embed(self, weights: ModelWeights, token_ids: Tensor, hidden: Tensor) -> None:
        """Writes the embeddings of requests' tokens (int64) into `hidden` [rows, D], and of training tokens behind them."""
        weights.embed(hidden[: self.num_serving], token_ids)

    def enter(self, layer: int, hidden: Tensor) -> None:
        """What follows is of `layer`, whose input is `hidden` [rows, D]."""
        self.spans.layer = layer

    def leave(self, ends: Mapping[Place, Tensor]) -> None:
        """The layer's program has run. ends: its input and output rows."""

    def finish(self, hidden: Tensor) -> None:
        """The last layer's output is `hidden` [rows, D]."""

    def segments(self, name: str) -> Iterator[tuple[slice, Factor | FactorStack]]:
        return self.spans.segments(name)

    def slot_factors(self, names: tuple[str, ...]) -> SlotFactors | None:
        return self.spans.slot_factors(names)

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.spans.attention(out, q, k, v)

    def rotary_attention(
        self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, rotated: Sequence[Tensor], scale: float
    ) -> None:
        pool = self.spans.pool
        if not pool.has_row_kernels:
            super().rotary_attention(out, lse, q, k, v, rotated, scale)
            return
        pool.rotary_write(
            self.spans.layer, self.spans.token_rows, q, k, v, self.cos, self.sin, scale, self._dense_keys_and_values()
        )
        self._attend(out, lse, q, k, v)

    def _dense_keys_and_values(self) -> tuple[Tensor, Tensor] | None:
        """Where keys and values of rows behind the requests' go, if there are such rows."""
        return None

    def _attend(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Attention of rows whose keys and values are stored."""
        self.spans.attend(out, q, k, v)


class FusedRows(BatchRows):
    """Rows of requests, then the rows of a training window, whose kept values, hidden rows and losses go to its micro-batch."""

    reads_workspace = True

    def __init__(
        self, spans: SpanRows, layers: Sequence[FusedLayer], cos: Tensor, sin: Tensor, train: TrainExecutor, window: TrainWindow
    ) -> None:
        rows = train.rows(window.state, window.unit, window.adapter)
        super().__init__(spans, layers, torch.cat((cos, rows.cos)), torch.cat((sin, rows.sin)))
        self.train, self.rows = train, rows
        self.state, self.unit = window.state, window.unit
        self.num_rows += rows.end - rows.start
        self.dropout_keys = rows.dropout_keys
        self._copies: KeptCopies | None = None
        own = spans.rows_slots
        self._rows_slots = None if own is None else own.beside(window.adapter, rows.end - rows.start)

    def begin(self, streams: Tensor) -> None:
        if self.spans.pool.has_row_kernels:
            workspace, (start, end) = self.train.executor.workspace, (self.rows.start, self.rows.end)
            self._copies = KeptCopies(self.layers, self.state, start, end, workspace, streams, self.num_serving)

    def embed(self, weights: ModelWeights, token_ids: Tensor, hidden: Tensor) -> None:
        super().embed(weights, token_ids, hidden)
        weights.embed(hidden[self.num_serving :], self.state.batch.token_ids[self.rows.start : self.rows.end])

    def enter(self, layer: int, hidden: Tensor) -> None:
        super().enter(layer, hidden)
        self.state.check_forward(self.unit, layer)
        self.train.enter(self.state, self.rows, layer)
        if layer == 0 or self._copies is None:
            self._park(layer, hidden)

    def _park(self, layer: int, hidden: Tensor) -> None:
        """Stores the window's rows of the residual stream as the input of `layer`."""
        self.state.hidden(layer)[self.rows.start : self.rows.end] = hidden[self.num_serving :]

    def leave(self, ends: Mapping[Place, Tensor]) -> None:
        """Brings the window's kept values of the layer into its arena."""
        layer, start, end = self.rows.layer, self.rows.start, self.rows.end
        program, keeps = self.layers[layer].program, self.layers[layer].keeps
        self.state.forward_rows[layer] = end
        if self._copies is not None:
            self._copies.run(layer)
            keeps = self._copies.others[layer]
            if not keeps:
                return
        workspace = self.train.executor.workspace
        tensors = dict(zip(program.slots, workspace.bind(program, self.num_rows).tensors, strict=True))
        for keep in keeps:
            whole = tensors[keep.source]
            if whole is None:
                whole = columns(ends[program.storages[keep.source.storage].place], keep.source)
            source = whole[self.num_serving :, : keep.width]
            targets = [columns(self.state.arena.storage(layer, slot.storage), slot)[start:end] for slot in keep.targets]
            if keep.pack is None:
                targets[0].copy_(source)
            else:
                keep.pack(self.rows, None, {}, False, targets, [source])

    def finish(self, hidden: Tensor) -> None:
        if self._copies is None:
            self._park(len(self.layers), hidden)
        self.train.head(self.state, self.rows.start, self.rows.end)

    def segments(self, name: str) -> Iterator[tuple[slice, Factor | FactorStack]]:
        yield from self.spans.segments(name)
        for _, factor in self.rows.segments(name):
            yield slice(self.num_serving, None), factor

    def slot_factors(self, names: tuple[str, ...]) -> SlotFactors | None:
        return None if self._rows_slots is None else self._rows_slots.factors(self.rows.layer, names)

    def dropout_site(self, name: str) -> int:
        return self.rows.dropout_site(name)

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        serving, training = slice(None, self.num_serving), slice(self.num_serving, None)
        if self.num_serving:
            self.spans.pool.write(self.spans.layer, self.spans.token_rows, k[serving], v[serving])
        keys, values = self._dense_keys_and_values()
        keys.copy_(k[training])
        values.copy_(v[training])
        self._attend(out, lse, q, k, v)

    def _dense_keys_and_values(self) -> tuple[Tensor, Tensor]:
        rows = self.rows
        return rows.keys[rows.start : rows.end], rows.values[rows.start : rows.end]

    def _attend(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        serving, training = slice(None, self.num_serving), slice(self.num_serving, None)
        if self.num_serving:
            self.spans.attend(out[serving], q[serving], k[serving], v[serving])
        assert lse is not None
        self.rows.attention(out[training], lse[training], q[training], k[training], v[training])


class PassExecutor:
    """Runs forward passes over a pool of key-value blocks, with the adapters in `adapters`.

    max_graph_rows: passes that decode at most so many rows and do nothing else are replayed as CUDA graphs once they are
    captured (`capture_next`), on devices that can and do not share the model. 0: none.
    ranks: the group that shares it, with a sharding for every parameter of an adapter.
    """

    def __init__(
        self, executor: Executor, train: TrainExecutor, pool: KeyValuePool, adapters: AdapterSlots, *,
        max_graph_rows: int = 0, ranks: TensorParallel | None = None,
    ) -> None:
        self.executor, self.train, self.pool, self.adapters = executor, train, pool, adapters
        self.weights, self.arch, self.ranks = executor.weights, executor.arch, ranks
        self.whole_arch = executor.weights.whole_architecture or executor.arch
        """The model's, also where `arch` is what this rank has of it."""
        self._plans: dict[object, tuple[ModelPlan | None, Sequence[FusedLayer]]] = {}
        """By the adapters' layout and the training rows' plan, which is held so that no other gets its id."""
        self._graphs: DecodeGraphs | None = None
        if max_graph_rows and ranks is None and runs_triton(self.weights.device):
            self._graphs = DecodeGraphs(
                self.weights, pool, adapters, lambda with_adapters: self._layers(None, with_adapters), max_rows=max_graph_rows
            )
        self._streams = torch.empty(2, 0, self.arch.hidden_size, dtype=self.weights.dtype, device=self.weights.device)

    def run(
        self, token_ids: Tensor, decode: Sequence[RowSpan], prefill: Sequence[RowSpan], window: TrainWindow | None
    ) -> Tensor:
        """Last hidden rows [requests' rows, D] of the batch; valid until the next pass. token_ids: int64 [requests' rows].

        The window's kept values, loss rows and progress are in its micro-batch afterwards.
        """
        if self._graphs is not None and window is None and not prefill:
            replayed = self._graphs.run(token_ids, decode)
            if replayed is not None:
                return replayed
        rows = self._rows(decode, prefill, window)
        if rows.num_rows > self._streams.shape[1]:
            self._streams = self._streams.new_empty(2, rows.num_rows, self.arch.hidden_size)
        hidden, following = self._streams[0, : rows.num_rows], self._streams[1, : rows.num_rows]
        rows.begin(self._streams[:, : rows.num_rows])
        rows.embed(self.weights, token_ids, hidden)
        for number, layer in enumerate(rows.layers):
            rows.enter(number, hidden)
            ends = {Place.INPUT: hidden, Place.OUTPUT: following}

            def external(number: int, storage: Storage, ends: dict[Place, Tensor] = ends) -> Tensor:
                return ends[storage.place]

            self.executor.execute(layer.program, number, rows, rows.num_rows, external, workspace_read=rows.reads_workspace)
            rows.leave(ends)
            hidden, following = following, hidden
        rows.finish(hidden)
        return hidden[: rows.num_serving]

    def capture_next(self) -> bool:
        """Captures one more size of decode pass; False if there is none left to capture. It takes about as long as a few
        passes."""
        return self._graphs is not None and self._graphs.capture_next()

    def _rows(self, decode: Sequence[RowSpan], prefill: Sequence[RowSpan], window: TrainWindow | None) -> BatchRows:
        """The rows of a pass, with their programs. Blocks that get their first token are zeroed."""
        spans = SpanRows(decode, prefill, self.pool, self.arch, self.adapters)
        spans.clear_fresh()
        cos, sin = self.executor.rotary.rows(spans.positions, spans.longest)
        layers = self._layers(window, spans.with_adapters)
        return BatchRows(spans, layers, cos, sin) if window is None else FusedRows(spans, layers, cos, sin, self.train, window)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, V] of last hidden rows [rows, D]; of several ranks, only the first has all of them (`shared_logits`)."""
        weights, normed = self.weights, torch.empty_like(hidden)
        library.rmsnorm(normed, hidden, weights.norm, self.arch.rms_norm_eps)
        if weights.tokens is not None:
            return shared_logits(normed, weights.head, weights.ranks, weights.tokens, self.whole_arch.vocab_size)
        logits = torch.empty(hidden.shape[0], self.arch.vocab_size, dtype=hidden.dtype, device=hidden.device)
        weights.head.logits(logits, normed)
        return logits

    def _layers(self, window: TrainWindow | None, with_adapters: bool) -> Sequence[FusedLayer]:
        """Each layer's program for rows of requests, and of `window` if there is one."""
        own = None if window is None else window.state.plan
        key = (self.adapters.layout if with_adapters else None, None if own is None else id(own))
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:  # of adapters and jobs that are long gone
                self._plans.clear()
            kinds: tuple[Kind, ...] = ()
            widths: list[dict[str, int]] = [{}] * self.arch.num_layers
            if with_adapters:
                kinds = self.adapters.kinds
                widths = [
                    whole_widths(self.adapters.widths(layer), layer, self.ranks) for layer in range(self.arch.num_layers)
                ]
            itemsize = self.weights.dtype.itemsize
            if window is None:
                plan = serving_plan(self.whole_arch, kinds, widths, itemsize=itemsize, ranks=self.ranks)
                layers = tuple(FusedLayer(layer.forward, keeps=()) for layer in plan.layers)
            else:
                adapter, state = window.adapter, window.state
                dropout = 0.0 if adapter is None or state.forward_only else adapter.dropout
                layers = fused_plan(
                    self.whole_arch, adapter, kinds, widths, state.plan, dropout=dropout, itemsize=itemsize, ranks=self.ranks
                )
            self._plans[key] = (own, layers)
        return self._plans[key][1]
