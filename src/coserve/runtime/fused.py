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

from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import FusedLayer, Place, Program, Storage
from coserve.core import Unit
from coserve.kernels import library
from coserve.model.weights import ModelWeights
from coserve.ops.run import Factor, FactorStack
from coserve.peft.adapter import Adapter, Kind
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.graphs import DecodeGraphs
from coserve.runtime.memory import columns
from coserve.runtime.microbatch import InFlight
from coserve.runtime.plans import fused_plan, serving_plan
from coserve.runtime.rows import ForwardRows
from coserve.runtime.spans import NO_ADAPTER, RowSpan, SpanRows

_MAX_PLANS = 64
"""The most programs that are kept for forward passes with a training window, and as many for those without."""


class TrainWindow(NamedTuple):
    """A forward unit over all layers that is fused into a forward pass."""

    state: InFlight
    unit: Unit
    adapter: Adapter | None


class BatchRows(ForwardRows):
    """The rows of a forward pass, as operators see them: rows of requests alone. cos, sin: [rows, K].

    programs: one per layer. The executor calls `enter` before each layer's program, `leave` after it, and `finish` after all.
    """

    reads_workspace = False
    """Whether `leave` reads what a program left in the workspace."""

    def __init__(self, spans: SpanRows, programs: Sequence[Program], cos: Tensor, sin: Tensor) -> None:
        self.spans, self.programs, self.cos, self.sin = spans, programs, cos, sin
        self.num_serving = self.num_rows = spans.num_rows

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

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.spans.attention(out, q, k, v)


class FusedRows(BatchRows):
    """Rows of requests, then the rows of a training window, whose kept values, hidden rows and losses go to its micro-batch."""

    reads_workspace = True

    def __init__(
        self, spans: SpanRows, layers: Sequence[FusedLayer], cos: Tensor, sin: Tensor, train: TrainExecutor, window: TrainWindow
    ) -> None:
        rows = train.rows(window.state, window.unit, window.adapter)
        super().__init__(
            spans, [layer.program for layer in layers], torch.cat((cos, rows.cos)), torch.cat((sin, rows.sin))
        )
        self.layers, self.train, self.rows = layers, train, rows
        self.state, self.unit = window.state, window.unit
        self.num_rows += rows.end - rows.start
        self.dropout_keys = rows.dropout_keys

    def embed(self, weights: ModelWeights, token_ids: Tensor, hidden: Tensor) -> None:
        super().embed(weights, token_ids, hidden)
        weights.embed(hidden[self.num_serving :], self.state.batch.token_ids[self.rows.start : self.rows.end])

    def enter(self, layer: int, hidden: Tensor) -> None:
        super().enter(layer, hidden)
        self.state.check_forward(self.unit, layer)
        self.train.enter(self.state, self.rows, layer)
        self._park(layer, hidden)

    def _park(self, layer: int, hidden: Tensor) -> None:
        """Stores the window's rows of the residual stream as the input of `layer`."""
        self.state.hidden(layer)[self.rows.start : self.rows.end] = hidden[self.num_serving :]

    def leave(self, ends: Mapping[Place, Tensor]) -> None:
        """Brings the window's kept values of the layer into its arena."""
        layer, start, end = self.rows.layer, self.rows.start, self.rows.end
        program, keeps = self.layers[layer].program, self.layers[layer].keeps
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
        self.state.forward_rows[layer] = end

    def finish(self, hidden: Tensor) -> None:
        self._park(len(self.layers), hidden)
        self.train.head(self.state, self.rows.start, self.rows.end)

    def segments(self, name: str) -> Iterator[tuple[slice, Factor | FactorStack]]:
        yield from self.spans.segments(name)
        for _, factor in self.rows.segments(name):
            yield slice(self.num_serving, None), factor

    def dropout_site(self, name: str) -> int:
        return self.rows.dropout_site(name)

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        serving, training = slice(None, self.num_serving), slice(self.num_serving, None)
        if self.num_serving:
            self.spans.attention(out[serving], q[serving], k[serving], v[serving])
        rows = self.rows
        assert lse is not None
        rows.keys[rows.start : rows.end] = k[training]
        rows.values[rows.start : rows.end] = v[training]
        rows.attention(out[training], lse[training], q[training], k[training], v[training])


class PassExecutor:
    """Runs forward passes over a pool of key-value blocks, with the adapters in `adapters`. cuda_graphs: whether passes that
    only decode are replayed as CUDA graphs, on devices that can."""

    def __init__(
        self, executor: Executor, train: TrainExecutor, pool: KeyValuePool, adapters: AdapterSlots, *, cuda_graphs: bool = False
    ) -> None:
        self.executor, self.train, self.pool, self.adapters = executor, train, pool, adapters
        self.weights, self.arch = executor.weights, executor.arch
        self._plans: dict[object, list[Program]] = {}
        self._fused: dict[object, tuple[ModelPlan, tuple[FusedLayer, ...]]] = {}
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs and DecodeGraphs.possible(self.weights.device):
            self._graphs = DecodeGraphs(executor, pool, self._programs(False))
        self._streams = torch.empty(2, 0, self.arch.hidden_size, dtype=self.weights.dtype, device=self.weights.device)

    def run(
        self, token_ids: Tensor, decode: Sequence[RowSpan], prefill: Sequence[RowSpan], window: TrainWindow | None
    ) -> Tensor:
        """Last hidden rows [requests' rows, D] of the batch; valid until the next pass. token_ids: int64 [requests' rows].

        The window's kept values, loss rows and progress are in its micro-batch afterwards.
        """
        if self._graphs is not None and window is None and not prefill and self._graphs.takes(decode):
            replayed = self._graphs.run(token_ids, decode)
            if replayed is not None:
                return replayed
        rows = self._rows(decode, prefill, window)
        hidden, following = self._stream_rows(rows.num_rows)
        rows.embed(self.weights, token_ids, hidden)
        for layer, program in enumerate(rows.programs):
            rows.enter(layer, hidden)
            ends = {Place.INPUT: hidden, Place.OUTPUT: following}

            def external(number: int, storage: Storage, ends: dict[Place, Tensor] = ends) -> Tensor:
                return ends[storage.place]

            self.executor.execute(program, layer, rows, rows.num_rows, external, workspace_read=rows.reads_workspace)
            rows.leave(ends)
            hidden, following = following, hidden
        rows.finish(hidden)
        return hidden[: rows.num_serving]

    def _rows(self, decode: Sequence[RowSpan], prefill: Sequence[RowSpan], window: TrainWindow | None) -> BatchRows:
        """The rows of a pass, with their programs. Blocks that get their first token are zeroed."""
        spans = SpanRows(decode, prefill, self.pool, self.arch, self.adapters)
        spans.clear_fresh()
        longest = max((span.end for span in (*decode, *prefill)), default=1)
        cos, sin = self.executor.rotary.rows(spans.positions, longest)
        with_adapters = any(span.slot != NO_ADAPTER for span in (*decode, *prefill))
        if window is None:
            return BatchRows(spans, self._programs(with_adapters), cos, sin)
        return FusedRows(spans, self._fused_layers(window, with_adapters), cos, sin, self.train, window)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, V] of last hidden rows [rows, D]."""
        normed = torch.empty_like(hidden)
        library.rmsnorm(normed, hidden, self.weights.norm, self.arch.rms_norm_eps)
        logits = torch.empty(hidden.shape[0], self.arch.vocab_size, dtype=hidden.dtype, device=hidden.device)
        self.weights.head.logits(logits, normed)
        return logits

    def _stream_rows(self, rows: int) -> tuple[Tensor, Tensor]:
        if rows > self._streams.shape[1]:
            self._streams = self._streams.new_empty(2, rows, self.arch.hidden_size)
        return self._streams[0, :rows], self._streams[1, :rows]

    def _served(self, with_adapters: bool) -> tuple[tuple[Kind, ...], list[dict[str, int]]]:
        """What programs have to serve: the kinds of adapter, and by layer the out features of their factors."""
        layers = range(self.arch.num_layers)
        if not with_adapters:
            return (), [{} for _ in layers]
        return self.adapters.kinds, [self.adapters.widths(layer) for layer in layers]

    def _programs(self, with_adapters: bool) -> list[Program]:
        """Each layer's program for rows of requests."""
        key = self.adapters.layout if with_adapters else None
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:  # of adapters that are long gone
                self._plans.clear()
            plan = serving_plan(self.arch, *self._served(with_adapters), itemsize=self.weights.dtype.itemsize)
            self._plans[key] = [layer.forward for layer in plan.layers]
        return self._plans[key]

    def _fused_layers(self, window: TrainWindow, with_adapters: bool) -> tuple[FusedLayer, ...]:
        """Each layer's program for rows of requests and of `window` together."""
        own, key = window.state.plan, self.adapters.layout if with_adapters else None
        entry = self._fused.get((id(own), key))
        if entry is None or entry[0] is not own:
            dropout = 0.0 if window.adapter is None or window.state.forward_only else window.adapter.dropout
            layers = fused_plan(
                self.arch, window.adapter, *self._served(with_adapters), own, dropout=dropout,
                itemsize=self.weights.dtype.itemsize,
            )
            if len(self._fused) >= _MAX_PLANS:  # plans of jobs that are long over
                self._fused.clear()
            entry = self._fused[id(own), key] = (own, layers)
        return entry[1]
