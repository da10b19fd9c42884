"""One pass over all layers for rows of requests, and of a training window beside them: every dense operator runs once.

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
from coserve.ops.run import Factor, FactorStack
from coserve.peft.adapter import Adapter, Kind
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.graphs import DecodeGraphs
from coserve.runtime.memory import columns
from coserve.runtime.microbatch import InFlight
from coserve.runtime.plans import fused_plan, serving_plan
from coserve.runtime.rows import TrainRows
from coserve.runtime.spans import NO_ADAPTER, RowSpan, SpanRows

_MAX_PLANS = 64
"""Plans of passes that are kept, of those with a training window and of those without."""


class TrainWindow(NamedTuple):
    """A forward unit over all layers that rides in a pass."""

    state: InFlight
    unit: Unit
    adapter: Adapter | None


class BatchRows:
    """Requests' rows, then the rows of a training window. cos, sin: [rows, K]; `layer` is set before each program."""

    def __init__(self, spans: SpanRows, training: TrainRows | None, cos: Tensor, sin: Tensor) -> None:
        self.spans, self.training = spans, training
        self.num_serving = spans.num_rows
        self.cos, self.sin = cos, sin
        self.dropout_keys = None if training is None else training.dropout_keys

    def turn_to(self, layer: int) -> None:
        """What follows is of `layer`."""
        self.spans.layer = layer
        if self.training is not None:
            self.training.layer = layer

    def segments(self, name: str) -> Iterator[tuple[slice, Factor | FactorStack]]:
        yield from self.spans.segments(name)
        if self.training is not None:
            for _, factor in self.training.segments(name):
                yield slice(self.num_serving, None), factor

    def dropout_site(self, name: str) -> int:
        assert self.training is not None
        return self.training.dropout_site(name)

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        serving, training = slice(None, self.num_serving), slice(self.num_serving, None)
        if self.num_serving:
            self.spans.attention(out[serving], q[serving], k[serving], v[serving])
        rows = self.training
        if rows is not None:
            assert lse is not None
            rows.keys[rows.start : rows.end] = k[training]
            rows.values[rows.start : rows.end] = v[training]
            rows.attention(out[training], lse[training], q[training], k[training], v[training])

    def attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        raise AssertionError("backward units are not fused")


class PassExecutor:
    """Runs passes over a pool of key-value blocks, with the adapters in `adapters`. cuda_graphs: replays what only decodes, on
    devices that can."""

    def __init__(
        self, executor: Executor, train: TrainExecutor, pool: KeyValuePool, adapters: AdapterSlots, *, cuda_graphs: bool = False
    ) -> None:
        self.executor, self.train, self.pool, self.adapters = executor, train, pool, adapters
        self.weights, self.arch = executor.weights, executor.arch
        self._plans: dict[object, ModelPlan] = {}
        self._fused: dict[object, tuple[ModelPlan, tuple[FusedLayer, ...]]] = {}
        self._graphs: DecodeGraphs | None = None
        if cuda_graphs and DecodeGraphs.possible(self.weights.device):
            self._graphs = DecodeGraphs(executor, pool, self._programs(None, False)[0])
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
        spans = SpanRows(decode, prefill, self.pool, self.arch, self.adapters)
        spans.clear_fresh()
        serving = spans.num_rows
        training = None if window is None else self.train.rows(window.state, window.unit, window.adapter)
        total = serving + (0 if training is None else training.end - training.start)
        longest = max((span.end for span in (*decode, *prefill)), default=1)
        cos, sin = self.executor.rotary.rows(spans.positions, longest)
        if training is not None:
            cos, sin = torch.cat((cos, training.cos)), torch.cat((sin, training.sin))
        rows = BatchRows(spans, training, cos, sin)
        hidden, following = self._stream_rows(total)
        self.weights.embed(hidden[:serving], token_ids)
        if window is not None:
            self.weights.embed(hidden[serving:], window.state.batch.token_ids[window.unit.start : window.unit.end])
        with_adapters = any(span.slot != NO_ADAPTER for span in (*decode, *prefill))
        programs, fused = self._programs(window, with_adapters)
        for layer, program in enumerate(programs):
            rows.turn_to(layer)
            if window is not None:
                assert training is not None
                window.state.check_forward(window.unit, layer)
                self.train.enter(window.state, training, layer)
                window.state.hidden(layer)[training.start : training.end] = hidden[serving:]
            ends = {Place.INPUT: hidden, Place.OUTPUT: following}

            def external(number: int, storage: Storage, ends: dict[Place, Tensor] = ends) -> Tensor:
                return ends[storage.place]

            self.executor.execute(program, layer, rows, total, external, workspace_read=window is not None)
            if window is not None:
                assert training is not None
                self._keep(window, training, fused[layer], total, ends)
            hidden, following = following, hidden
        if window is not None:
            start, end = window.unit.start, window.unit.end
            window.state.hidden(self.arch.num_layers)[start:end] = hidden[serving:]
            self.train.head(window.state, start, end)
        return hidden[:serving]

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

    def _keep(
        self, window: TrainWindow, rows: TrainRows, fused: FusedLayer, total: int, ends: Mapping[Place, Tensor]
    ) -> None:
        """Brings the window's kept values of the layer that `rows` are at, the last of `total` rows, into its arena."""
        program, layer = fused.program, rows.layer
        tensors = dict(zip(program.slots, self.executor.workspace.bind(program, total).tensors, strict=True))
        state, (_, _, _, start, end) = window.state, window.unit
        for keep in fused.keeps:
            whole = tensors[keep.source]
            if whole is None:
                whole = columns(ends[program.storages[keep.source.storage].place], keep.source)
            source = whole[total - (end - start) :, : keep.width]
            targets = [columns(state.arena.storage(layer, slot.storage), slot)[start:end] for slot in keep.targets]
            if keep.pack is None:
                targets[0].copy_(source)
            else:
                keep.pack(rows, None, {}, False, targets, [source])
        state.forward_rows[layer] = end

    def _programs(self, window: TrainWindow | None, with_adapters: bool) -> tuple[list[Program], tuple[FusedLayer, ...]]:
        key, itemsize = self.adapters.layout if with_adapters else None, self.weights.dtype.itemsize

        def serving() -> tuple[tuple[Kind, ...], list[dict[str, int]]]:
            layers = range(self.arch.num_layers)
            if not with_adapters:
                return (), [{} for _ in layers]
            return self.adapters.kinds, [self.adapters.widths(layer) for layer in layers]

        if window is None:
            if key not in self._plans:
                if len(self._plans) >= _MAX_PLANS:  # of adapters that are long gone
                    self._plans.clear()
                self._plans[key] = serving_plan(self.arch, *serving(), itemsize=itemsize)
            return [layer.forward for layer in self._plans[key].layers], ()
        own = window.state.plan
        entry = self._fused.get((id(own), key))
        if entry is None or entry[0] is not own:
            dropout = 0.0 if window.adapter is None or window.state.forward_only else window.adapter.dropout
            layers = fused_plan(self.arch, window.adapter, *serving(), own, dropout=dropout, itemsize=itemsize)
            if len(self._fused) >= _MAX_PLANS:  # plans of jobs that are long over
                self._fused.clear()
            entry = self._fused[id(own), key] = (own, layers)
        return [layer.program for layer in entry[1]], entry[1]
