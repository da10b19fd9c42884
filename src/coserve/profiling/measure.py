"""Measures what rows and units cost on this machine, once. The profile is cached under `profile_key`.

Every point runs as in an iteration, on memory that is borrowed from the engine's pool.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

from coserve.cachedir import cache_directory
from coserve.config.settings import LoraConfig, OptimizerConfig, SchedulerConfig
from coserve.core import CapacityError, Contents, Direction, Example, PassCost, Unit, UnitCost
from coserve.finetune.optimizer import FlatAdamW
from coserve.kernels.native import kernels_identity
from coserve.machine import device_name
from coserve.peft.adapter import Adapter
from coserve.peft.lora import LoraAdapter
from coserve.peft.share import shared_adapter, whole_view
from coserve.profiling.fit import (
    ProfilePoint,
    by_layer,
    fit,
    load_profile,
    needed_points,
    profile_points,
    row_layers,
    save_profile,
    sequence_length,
)
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.fused import PassExecutor, TrainWindow
from coserve.runtime.microbatch import InFlight, microbatch_layout, pack
from coserve.runtime.plans import training_plans
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from coserve.scheduler.blocks import ArenaBlocks, BlockPool
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefix import PrefixKey

SHORT_S, LONG_S = 0.05, 0.25
"""Seconds. Points below SHORT_S are run three times, of which the first doesn't count; from LONG_S on once; others twice."""
LIMIT_S = 20.0
"""Seconds after which only points that the fit needs are still measured."""
CHECK_POINTS = 3
STALE = 1.5
"""A cached profile that is this many times slower than the machine is now was measured on a busy machine, and is discarded. One
that is faster is kept: if the machine is busy now, the online correction handles that."""
_OWNER = "profile"
_KEY = PrefixKey("", None, -1)


def profile_key(passes: PassExecutor, fingerprint: str) -> str:
    """What a profile depends on: model, device, dtype, layout of the weights, kernels, threads, PyTorch's version."""
    weights = passes.weights
    kind = f"{weights.device.type} {device_name(weights.device)} {weights.dtype} {weights.layout}"
    if (kernels := kernels_identity(weights.norm)) is not None:
        kind += f" {kernels}"
    if weights.ranks.size > 1:
        kind += f" of {weights.ranks.size} ranks"
    return f"{fingerprint} {kind} {torch.get_num_threads()} {torch.__version__}"


def latency_model(
    profiler: Profiler, config: SchedulerConfig, fingerprint: str, report: Callable[[str], None]
) -> LatencyModel:
    """The latency model of this machine, fitted to its profile."""
    return fit(machine_profile(profiler, config, fingerprint, report), gpu=profiler.device.type == "cuda")


def machine_profile(
    profiler: Profiler, config: SchedulerConfig, fingerprint: str, report: Callable[[str], None], *, anew: bool = False
) -> list[ProfilePoint]:
    """The profile of this machine, from the cache or measured now. report: called with lines for the log. anew: whether it is
    measured whatever the cache holds."""
    key, rows = profile_key(profiler.passes, fingerprint), max(config.max_num_batched_tokens, config.max_window_tokens)
    if profiler.device.type == "cuda":
        key += f" {rows} rows"  # to which it is measured: a law from fewer is far off
    path = cache_directory() / "profiles" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    samples = None if anew else load_profile(path, key)
    if samples is not None and profiler.slowdown(samples) > STALE:
        report("the kept profile was measured on a busy machine")
        samples = None
    if samples is None:
        report("measuring what rows and units cost here, once ...")
        started = time.perf_counter()
        samples = profiler.measure(rows, max_seqs=config.max_num_seqs)
        report(f"measured {len(samples)} points in {time.perf_counter() - started:.1f} s")
        try:
            save_profile(path, key, samples)
        except OSError as error:
            report(f"the profile can't be kept in {path}: {error}")
    return samples


class Profiler:
    """Times profile points on the device."""

    def __init__(self, passes: PassExecutor, train: TrainExecutor, blocks: BlockPool) -> None:
        self.passes, self.train, self.blocks = passes, train, blocks
        self.arch, self.device = passes.arch, passes.weights.device
        weights, group = passes.weights, passes.ranks
        if group is None:
            whole: Adapter = LoraAdapter.create(self.arch, LoraConfig(), dtype=weights.dtype, device=self.device, seed=0)
            adapter = whole
        else:
            adapter, layout = shared_adapter(weights, LoraConfig(), group.fixed, seed=0)
            whole = whole_view(adapter, layout, weights)
        self.adapter = adapter.trainable()
        self.plan = training_plans(passes.whole_arch, whole, itemsize=weights.dtype.itemsize, ranks=group).plan()
        self._actions: list[Callable[[], object]] = []
        self._arenas: list[ArenaBlocks] = []

    @torch.no_grad()
    def measure(self, max_rows: int, limit_s: float = LIMIT_S, max_seqs: int = 1) -> list[ProfilePoint]:
        """Measures the points for which the pool has room: those that a fit needs, then others while they should end within
        `limit_s` seconds. Long passes that are left out are estimated from one layer (`by_layer`). max_seqs: requests that a
        GPU decodes at once, for the largest of its points."""
        layers, gpu_seqs = self.arch.num_layers, max_seqs if self.device.type == "cuda" else 0
        rows = min(max_rows, self.arch.max_position_embeddings)
        self.prepare()
        self._run(Contents(PassCost(1, 1, 1, 1, 0, 0, 0, 0, 0), (), 0))  # the output head is laid out at its first use
        started = time.perf_counter()
        needed = needed_points(layers, rows)
        samples = [sample for point in needed for sample in self._run(self._without_adapters(point))]
        more = [point for point in profile_points(layers, rows, gpu_seqs=gpu_seqs) if point not in needed]
        more.sort(key=lambda point: row_layers(point, layers), reverse=True)
        while more and time.perf_counter() - started + self._expected(more[-1], samples) <= limit_s:
            samples += self._run(self._without_adapters(more.pop()))
        left = [by_layer(self._without_adapters(point), samples, layers) for point in more]
        return samples + [sample for sample in left if sample is not None]

    @torch.no_grad()
    def run_once(self, points: Sequence[Contents]) -> bool:
        """Runs points, once each. False if the pool has no room for one of them; others are run all the same."""
        self.prepare()
        all_run = True
        for point in points:
            try:
                self.begin(point)
                self.once()
            except CapacityError:
                all_run = False
            finally:
                self.end()
        return all_run

    def prepare(self) -> None:
        """Lays weights out for the points' units."""
        self.train.prepare(self.plan)

    def _expected(self, point: Contents, samples: Sequence[ProfilePoint]) -> float:
        """An upper estimate of a point's seconds, from the samples at least half as large, or else from the largest."""
        layers = self.arch.num_layers
        size = row_layers(point, layers)
        like = [(row_layers(contents, layers), seconds) for contents, seconds in samples]
        least = min(size / 2, max((held for held, _ in like), default=0))
        return max((seconds * size / held for held, seconds in like if held >= least > 0), default=0.0)

    @torch.no_grad()
    def slowdown(self, samples: Sequence[ProfilePoint]) -> float:
        """How many times slower the samples are than the machine now, measured on a few inference passes; 1 if none can run."""
        kept: dict[Contents, float] = {}
        for point, seconds in samples:
            cost = point.inference
            if cost is not None and not (cost.fused_rows or point.units or point.optimizer_elements) and seconds < LONG_S:
                kept[point] = min(seconds, kept.get(point, seconds))
        chosen = sorted(kept, key=kept.__getitem__)[-CHECK_POINTS:]
        for point in chosen:
            self._run(point)  # weights are laid out at first use
        measured = {point: min(times) for point in chosen if (times := [seconds for _, seconds in self._run(point)])}
        return sum(kept[point] for point in measured) / sum(measured.values()) if measured else 1.0

    @staticmethod
    def _without_adapters(point: Contents) -> Contents:
        """A point without request adapters, which are not measured: the online correction covers their cost."""
        if point.inference is None:
            return point
        return point._replace(inference=point.inference._replace(adapter_segments=0))

    def _run(self, point: Contents) -> list[ProfilePoint]:
        try:
            self.begin(point)
            times = [self.once()]
            if self.device.type == "cuda":  # kernels were compiled, or a graph was captured
                times = [self.once()]
            if times[0] < LONG_S:
                times.append(self.once())
            if times[0] < SHORT_S:
                times = [times[1], self.once()]
            return [(point, seconds) for seconds in times]
        except CapacityError:
            return []  # the pool is too small for this point, so no iteration will be like it
        finally:
            self.end()

    def begin(self, point: Contents) -> None:
        """Takes the memory for a point. Raises CapacityError if the pool has too little. `end` gives it back in any case."""
        if point.inference is not None:
            self._actions.append(self._pass(point.inference, self._arenas))
        self._actions += [self._unit(unit, self._arenas) for unit in point.units]
        if point.optimizer_elements:
            self._actions.append(self._optimizer(point.optimizer_elements))

    def once(self) -> float:
        """Runs the point, and returns the seconds that it took."""
        started = time.perf_counter()
        for action in self._actions:
            action()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - started

    def end(self) -> None:
        """Gives a point's memory back."""
        for arena in self._arenas:
            self.blocks.release_arena(arena)
        self._actions.clear()
        self._arenas.clear()

    def _arena(self, num_bytes: int, arenas: list[ArenaBlocks]) -> torch.Tensor:
        arena, moves = self.blocks.reserve_arena(-(-num_bytes // self.passes.pool.block_bytes))
        assert not moves
        arenas.append(arena)
        return self.passes.pool.arena(arena.first, arena.end)

    def _flight(self, rows: int, pairs: int, labels: int, arenas: list[ArenaBlocks]) -> InFlight:
        """A micro-batch of whole sequences with `rows` rows, `pairs` query-key pairs and `labels` labels in all."""
        length = max(2, sequence_length(rows, pairs))
        rng = np.random.default_rng(0)
        examples, left = [], labels
        for index, start in enumerate(range(0, rows, length)):
            count = min(length, rows - start)
            weights = np.zeros(count, np.float32)
            marked = min(left, count - 1)
            weights[1 : 1 + marked] = 1
            left -= marked
            examples.append(Example(index=index, token_ids=rng.integers(0, self.arch.vocab_size, count), weights=weights))
        batch = pack(examples, device=self.device)
        itemsize = self.passes.weights.dtype.itemsize
        layout = microbatch_layout(self.plan, batch.num_tokens, self.arch, itemsize, forward_only=False)
        return self.train.begin(batch, self.plan, buffer=self._arena(layout.total, arenas))

    def _unit(self, cost: UnitCost, arenas: list[ArenaBlocks]) -> Callable[[], object]:
        state, layers = self._flight(cost.rows, cost.pairs, cost.labels, arenas), self.arch.num_layers
        rows, first = state.batch.num_tokens, layers - cost.layers if cost.backward or cost.labels else 0
        direction = Direction.BACKWARD if cost.backward else Direction.FORWARD
        unit = Unit(direction, first, first + cost.layers, 0, rows)
        state.coefficients_set = cost.backward

        def run() -> None:
            if cost.backward:
                state.backward_row = [rows] * layers
            else:
                state.forward_rows = [rows] * first + [0] * (layers - first)
            self.train.run(state, unit, self.adapter)

        return run

    def _optimizer(self, elements: int) -> Callable[[], object]:
        flat = torch.zeros(elements, dtype=self.passes.weights.dtype, device=self.device)
        wide = torch.promote_types(flat.dtype, torch.float32)
        optimizer = FlatAdamW(OptimizerConfig(), flat, torch.zeros(elements, dtype=wide, device=self.device))
        return lambda: optimizer.update(0, elements, 1e-4)

    def _pass(self, cost: PassCost, arenas: list[ArenaBlocks]) -> Callable[[], object]:
        window = None
        if cost.fused_rows:
            state = self._flight(cost.fused_rows, cost.fused_pairs, cost.fused_labels, arenas)
            window = TrainWindow(
                state, Unit(Direction.FORWARD, 0, self.arch.num_layers, 0, state.batch.num_tokens), self.adapter
            )
        prefill_rows = cost.rows - cost.decode_rows - cost.fused_rows
        lengths: list[int] = []
        if prefill_rows:
            length = sequence_length(prefill_rows, cost.prefill_pairs)
            lengths = [min(length, prefill_rows - start) for start in range(0, prefill_rows, length)]
        context = max(1, cost.decode_context // max(1, cost.decode_rows))
        sizes = [*([context] * cost.decode_rows), *lengths]
        tables: list[list[int]] = []
        self.blocks.acquire(_OWNER, _KEY, [])
        try:
            self.blocks.allocate(_OWNER, sum(-(-size // self.blocks.block_tokens) * self.blocks.block_tokens for size in sizes))
            table = list(self.blocks.table(_OWNER))
        finally:
            self.blocks.free(_OWNER)
        for size in sizes:
            used = -(-size // self.blocks.block_tokens)
            tables.append(table[:used])
            table = table[used:]
        decode = [RowSpan(context - 1, context, table, NO_ADAPTER) for table in tables[: cost.decode_rows]]
        prefill = [
            RowSpan(0, size, table, NO_ADAPTER) for size, table in zip(lengths, tables[cost.decode_rows :], strict=True)
        ]
        ids = torch.zeros(cost.decode_rows + prefill_rows, dtype=torch.int64, device=self.device)

        def run() -> None:
            if window is not None:
                window.state.forward_rows = [0] * self.arch.num_layers
            hidden = self.passes.run(ids, decode, prefill, window)
            if cost.head_rows:
                self.passes.logits(hidden[: cost.head_rows]).float().argmax(-1).tolist()

        return run
