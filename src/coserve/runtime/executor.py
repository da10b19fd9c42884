"""Runs programs: forward and backward units of finetuning, and the loss head. No policy.

The backward sweep over one layer, windows from right to left (K and V of the whole micro-batch lie in the arena):

    rows:        0 ........ a ........ b ........ T        d_keys, d_values: one layer's accumulators
    unit [a,b):  adds to [0, b) of the accumulators, then reads its own rows [a, b), which no later query can touch
    grad_TD:     rows [a, b) enter as d output of the layer and leave as d input

Units may come in any order in which every row finds what it needs; anything else is a bug and fails an assertion.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import LayerPlan, Place, Program, Storage
from coserve.core import Direction, Unit
from coserve.kernels import library
from coserve.kernels.choose import runs_triton
from coserve.kernels.triton.segments import DTYPES, TRAINING
from coserve.model.weights import ModelWeights
from coserve.ops.run import RowContext
from coserve.peft.adapter import Adapter
from coserve.runtime.memory import Workspace, columns
from coserve.runtime.microbatch import InFlight, PackedBatch, microbatch_layout
from coserve.runtime.rows import FEW_ROWS, RotaryTable, TrainRows
from coserve.runtime.sharedhead import shared_label_rows

HEAD_BYTES = 64 << 20
"""Size of the loss head's logits chunk."""

_FUSED_ROWS, _ROWS_TILE = 1024, 128
"""Where the head is fused, a chunk has at least so many rows, and whole multiples of so many, for the matrix products' sake."""


def head_rows(vocab_size: int, itemsize: int, *, fused: bool = False) -> int:
    """Label rows of a chunk: those whose logits fit into it. fused: whether `library.fused_head` holds and no ranks share the
    head. The kernel takes no memory beside the logits, so that chunks of more rows fit where others need several copies."""
    fitting = HEAD_BYTES // (vocab_size * itemsize)
    return max(_FUSED_ROWS, fitting // _ROWS_TILE * _ROWS_TILE) if fused else max(16, fitting)


class Executor:
    """Programs over one backbone. `execute` is the only place where an operator runs."""

    def __init__(self, weights: ModelWeights) -> None:
        self.weights = weights
        self.arch = weights.architecture
        self.workspace = Workspace(weights.dtype, weights.device)
        self.rotary = RotaryTable(self.arch, weights.dtype, weights.device)

    def execute(
        self, program: Program, layer: int, rows: RowContext, num_rows: int, external: Callable[[int, Storage], Tensor], *,
        workspace_read: bool = True,
    ) -> None:
        """Runs a program for one layer; external(number, storage) gives the window's rows of storages outside the workspace.

        workspace_read: whether someone reads the workspace afterwards. Otherwise products that a library gives in memory of its
        own stay there, which saves their copy.
        """
        bound = self.workspace.bind(program, num_rows)
        rows.ranks = self.weights.ranks
        try:
            bound.fill(external)
            weights = bound.weights(layer, self.weights.layers[layer].parameter)
            for call, storage, weight in zip(bound.calls, bound.products, weights, strict=True):
                run, attrs, accumulate, outs, ins = call
                product = None if storage is None or workspace_read else weight.product(ins[0])
                if product is None:
                    run(rows, weight, attrs, accumulate, outs, ins)
                else:
                    assert storage is not None
                    bound.put(storage, product)
        finally:
            bound.clear()


class TrainExecutor:
    """Units of finetuning micro-batches."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.weights, self.arch = executor, executor.weights, executor.arch
        self._own_buffer = torch.empty(0, dtype=torch.uint8, device=self.weights.device)
        by_slot = runs_triton(self.weights.device) and self.weights.dtype in DTYPES
        self._slots = torch.full((FEW_ROWS if by_slot else 0,), TRAINING, dtype=torch.int32, device=self.weights.device)
        """What `TrainRows` has as slots."""

    def begin(
        self, batch: PackedBatch, plan: ModelPlan, *, forward_only: bool = False, buffer: Tensor | None = None
    ) -> InFlight:
        """Takes all memory a micro-batch needs: `buffer` (bytes), or the executor's own, which serves one at a time."""
        if buffer is None:
            dtype = self.weights.dtype
            layout = microbatch_layout(plan, batch.num_tokens, self.arch, dtype.itemsize, forward_only=forward_only)
            if self._own_buffer.numel() < layout.total:
                self._own_buffer = torch.empty(0, dtype=torch.uint8, device=self.weights.device)
                self._own_buffer = torch.empty(layout.total, dtype=torch.uint8, device=self.weights.device)
            buffer = self._own_buffer
        return InFlight(batch, plan, buffer, self.arch, dtype=self.weights.dtype, forward_only=forward_only)

    def prepare(self, plan: ModelPlan) -> None:
        """Lays weights out for a plan's programs, which their first use would do in the middle of an iteration."""
        for weights, layer in zip(self.weights.layers, plan.layers, strict=True):
            for program in (layer.forward, layer.backward):
                for call in program.calls if program is not None else ():
                    if call.op in ("linear", "linear_dgrad") and call.weight is not None:
                        weights.linears[call.weight].prepare(backward=call.op == "linear_dgrad")
        self.weights.head.prepare()
        self.weights.return_freed_memory()

    def run(self, state: InFlight, unit: Unit, adapter: Adapter | None) -> None:
        """One unit, forward or backward."""
        (self._forward if unit.direction is Direction.FORWARD else self._backward)(state, unit, adapter)

    def rows(self, state: InFlight, unit: Unit, adapter: Adapter | None) -> TrainRows:
        """A unit's rows as operators see them."""
        batch, rotary = state.batch, self.executor.rotary
        rotary.reserve(max(end - begin for begin, end in batch.bounds))
        origin = next((begin for begin, end in batch.bounds if begin <= unit.start and unit.end <= end), None)
        if origin is None:
            cos, sin = rotary.rows(batch.positions[unit.start : unit.end], 0)
        else:
            cos, sin = rotary.part(unit.start - origin, unit.end - origin)
        keys, num_rows = batch.dropout_keys[unit.start : unit.end], unit.end - unit.start
        return TrainRows(
            adapter, batch.bounds, unit.start, unit.end, cos, sin, keys, self.arch.sliding_windows, state.attention_calls,
            self._slots[:num_rows] if num_rows <= len(self._slots) else None,
        )

    def enter(self, state: InFlight, rows: TrainRows, layer: int) -> LayerPlan:
        """Turns rows to a layer: its arena's K and V."""
        plan = state.plan.layers[layer]
        rows.layer = layer
        assert plan.keys is not None and plan.values is not None
        rows.keys = columns(state.arena.storage(layer, plan.keys.storage), plan.keys)
        rows.values = columns(state.arena.storage(layer, plan.values.storage), plan.values)
        return plan

    def _forward(self, state: InFlight, unit: Unit, adapter: Adapter | None) -> None:
        start, end = unit.start, unit.end
        rows = self.rows(state, unit, adapter)
        if unit.layer_start == 0:
            self.weights.embed(state.hidden(0)[start:end], state.batch.token_ids[start:end])
        for layer in range(unit.layer_start, unit.layer_end):
            state.check_forward(unit, layer)
            plan = self.enter(state, rows, layer)
            places = {Place.INPUT: state.hidden(layer), Place.OUTPUT: state.hidden(layer + 1)}

            def external(number: int, storage: Storage, layer: int = layer, places: dict[Place, Tensor] = places) -> Tensor:
                whole = state.arena.storage(layer, number) if storage.place is Place.ARENA else places[storage.place]
                return whole[start:end]

            self.executor.execute(plan.forward, layer, rows, end - start, external)
            state.forward_rows[layer] = end
        if unit.layer_end == self.arch.num_layers:
            self.head(state, start, end)

    def head(self, state: InFlight, start: int, end: int) -> None:
        """Log-probabilities of the window's labels and their unscaled gradient rows."""
        labels = state.labels_within(start, end)
        if labels.start == labels.stop:
            return
        index = state.batch.label_rows[labels]
        hidden = state.hidden(self.arch.num_layers)[index]
        grad = None if state.forward_only else torch.empty_like(hidden)
        vocab = self.arch.vocab_size
        fused = self.weights.tokens is None and library.fused_head(hidden.device, hidden.dtype)
        chunk = min(head_rows(vocab, hidden.element_size(), fused=fused), hidden.shape[0])
        logits = self.executor.workspace.reserve(chunk * vocab * hidden.element_size()).view(hidden.dtype).view(chunk, vocab)
        outcome = state.logprobs[labels], state.correct[labels], grad, hidden, state.batch.labels[labels]
        head = self.weights.norm, self.arch.rms_norm_eps, self.weights.head, logits
        if self.weights.tokens is None:
            library.label_rows(*outcome, *head)
        else:
            shared_label_rows(*outcome, *head, self.weights.ranks, self.weights.tokens)
        if grad is not None:
            state.grad_TD[index] = grad

    def _backward(self, state: InFlight, unit: Unit, adapter: Adapter | None) -> None:
        assert state.coefficients_set, "the training loss's coefficients come before the first backward unit"
        start, end, whole = unit.start, unit.end, state.batch.num_tokens
        assert unit.layer_end - unit.layer_start == 1 or (start, end) == (0, whole), "accumulators exist for one layer only"
        rows = self.rows(state, unit, adapter)
        rows.d_keys, rows.d_values = state.d_keys, state.d_values
        for layer in reversed(range(unit.layer_start, unit.layer_end)):
            assert state.backward_row[layer] == end, f"{unit} comes out of order at layer {layer}"
            above = layer + 1
            assert above == self.arch.num_layers or state.backward_row[above] == 0, f"{unit} needs layer {above} first"
            plan = self.enter(state, rows, layer)
            state.backward_row[layer] = start
            if plan.backward is None:
                continue
            if end == whole:
                state.d_keys_values.zero_()

            def external(number: int, storage: Storage, layer: int = layer) -> Tensor:
                if storage.place is Place.GRAD:
                    return state.grad_TD[start:end]
                if storage.place is Place.INPUT:
                    return state.hidden(layer)[start:end]
                return state.arena.storage(layer, number)[start:end]

            self.executor.execute(plan.backward, layer, rows, end - start, external)


