"""What rows cost, and throughput of decode, prefill and finetuning alone, each with a profile of the device's time.

Passes and units run as the engine's own profile runs them. Every time is a median without the first runs, in which kernels are
compiled and graphs captured. MFU is of the operations of the model's products; attention and recomputation are stated beside
it, as shares of the same peak.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from functools import cached_property
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_clock import device_of, known_ceilings, peak_bytes, synchronize
from gpu_model import BenchModel, Operations, forward_operations, make_model, num_linear_weights, training_operations
from gpu_profile import profiled
from gpu_rows import Item, release_memory

from coserve.config.settings import EngineConfig, FinetuneConfig, LoraConfig, OptimizerConfig, SchedulerConfig
from coserve.core import CapacityError, Contents, Example, Group, PassCost, UnitCost
from coserve.engine.engine import Engine
from coserve.model.architecture import Architecture
from coserve.profiling.measure import Profiler
from coserve.runtime.fused import PassExecutor
from coserve.scheduler.latency import LatencyModel
from coserve.training.trainer import AdapterTrainer


class Sizes(NamedTuple):
    """memory_bytes: of the engine's pool."""

    rows: tuple[int, ...]
    unit_rows: tuple[int, ...]
    unit_layers: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    """(requests, context)"""
    prefill: tuple[int, ...]
    example_tokens: int
    window_tokens: int
    steps: int
    memory_bytes: int


GIB = 1 << 30
FULL = Sizes(
    rows=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096), unit_rows=(128, 512, 1024, 2048, 4096), unit_layers=(1, 8),
    decode=((64, 1024), (1, 1024), (8, 1024), (32, 1024), (256, 512), (64, 4096)), prefill=(512, 2048, 4096),
    example_tokens=8192, window_tokens=2048, steps=3, memory_bytes=46 * GIB,
)
QUICK = Sizes(
    rows=(1, 4, 16), unit_rows=(16,), unit_layers=(1,), decode=((2, 24),), prefill=(16,), example_tokens=48, window_tokens=32,
    steps=1, memory_bytes=96 << 20,
)
TINY_LATENCY = LatencyModel({("iteration", "once", 0): 1e-3, ("inference", "rows", 1): 1e-4})
"""For engines that never schedule."""
LORA = LoraConfig(r=16, alpha=32)
WARMUP, REPEATS, LONG_S = 2, 5, 1.0
"""Runs of a point that don't count and that do; of those that take LONG_S seconds one counts."""
_NOTHING = PassCost(*[0] * 9)


def training_groups(model: BenchModel, tokens: int, count: int) -> list[Group]:
    """Random examples of one length, every token trained."""
    rng = np.random.default_rng(0)
    vocab = model.loaded.architecture.vocab_size
    return [
        Group(index=i, examples=(
            Example(index=i, token_ids=rng.integers(0, vocab, tokens), weights=np.ones(tokens, np.float32)),
        )) for i in range(count)
    ]


class Alone:
    """One kind of work at a time on one model, which is made at its first use."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, device_of(options)
        self.sizes = QUICK if options.quick else FULL
        self.ceilings = known_ceilings(options)

    @cached_property
    def model(self) -> BenchModel:
        return make_model(self.options.model, self.device)

    @property
    def arch(self) -> Architecture:
        return self.model.loaded.architecture

    def utilization(self, done: Operations, seconds: float) -> dict[str, Any]:
        """mfu: of the data sheet's peak where it is known, else of the measured product's rate."""
        peak = self.ceilings.get("peak_flops") or self.ceilings.get("matmul_flops")
        found = {"model_flops": done.model, "attention_flops": done.attention, "recomputation_flops": done.recomputation}
        if peak:
            found |= {
                "mfu": done.model / seconds / peak, "attention_share": done.attention / seconds / peak,
                "recomputation_share": done.recomputation / seconds / peak,
            }
        return found

    def _engine(self, *, graphs: bool = False) -> Engine:
        """An engine whose device is used without its scheduler. graphs: whether decode passes are captured first."""
        config = EngineConfig(
            memory_bytes=self.sizes.memory_bytes, scheduler=SchedulerConfig(max_num_seqs=256), cuda_graphs=graphs
        )
        return Engine(self.model.loaded, config, latency=TINY_LATENCY)

    def _profiler(self, engine: Engine, *, graphs: bool = False) -> Profiler:
        passes = engine.device.passes if graphs else PassExecutor(
            self.model.loaded.executor, engine.device.train, engine.device.pool, engine.adapters.slots
        )
        return Profiler(passes, engine.device.train, engine.blocks)

    @torch.no_grad()
    def timed(
        self, profiler: Profiler, contents: Contents, names: dict[str, Any], profile_as: str = ""
    ) -> Iterator[dict[str, Any]]:
        """A row with the median time, then one with the device's profile if `profile_as` names it; a row without a time where
        the pool is too small."""
        try:
            profiler.begin(contents)
            for _ in range(WARMUP):
                profiler.once()
            times = [profiler.once()]
            while len(times) < REPEATS and times[0] < LONG_S:
                times.append(profiler.once())
            yield {**names, "seconds": median(times), "slowest_s": max(times)}
            if profile_as:
                yield profiled(profiler.once, self.device, of=profile_as, layers=self.arch.num_layers, runs=3)
        except CapacityError:
            yield {**names, "note": "the pool is too small"}
        finally:
            profiler.end()

    def curve(self) -> Iterator[dict[str, Any]]:
        """Seconds of passes of so many rows (decode rows up to 256, one prompt beyond) and of units."""
        with contextlib.closing(self._engine()) as engine:
            profiler = self._profiler(engine)
            for rows in self.sizes.rows:
                if rows <= 256:
                    cost = _NOTHING._replace(rows=rows, head_rows=rows, decode_rows=rows, decode_context=64 * rows)
                else:
                    cost = _NOTHING._replace(rows=rows, head_rows=1, prefill_pairs=rows * (rows + 1) // 2)
                yield from self.timed(profiler, Contents(cost, (), 0), {"kind": "pass", "rows": rows})
            for rows in self.sizes.unit_rows:
                for layers in self.sizes.unit_layers:
                    for backward in (False, True):
                        unit = UnitCost(backward, rows, min(layers, self.arch.num_layers), rows * (rows + 1) // 2, 0)
                        names = {"kind": "backward" if backward else "forward", "rows": rows, "layers": unit.layers}
                        yield from self.timed(profiler, Contents(None, (unit,), 0), names)

    def decode(self) -> Iterator[dict[str, Any]]:
        """With and without graphs. The head's logits and their arg max are part of it."""
        with contextlib.closing(self._engine(graphs=True)) as engine:
            itemsize = self.model.loaded.weights.dtype.itemsize
            for graphs in (True, False) if self.device.type == "cuda" else (False,):
                profiler = self._profiler(engine, graphs=graphs)
                for number, (batch, context) in enumerate(self.sizes.decode):
                    cost = _NOTHING._replace(rows=batch, head_rows=batch, decode_rows=batch, decode_context=batch * context)
                    read = itemsize * (
                        num_linear_weights(self.arch) + self.arch.vocab_size * self.arch.hidden_size
                        + 2 * batch * context * self.arch.num_layers * self.arch.num_kv_heads * self.arch.head_dim
                    )
                    done = forward_operations(self.arch, batch, batch * context, batch)
                    names = {"kind": "decode", "requests": batch, "context": context, "cuda_graphs": graphs}
                    label = f"decode {batch} {'graph' if graphs else 'eager'}" if number == 0 else ""
                    for row in self.timed(profiler, Contents(cost, (), 0), names, label):
                        yield row if row["kind"] == "profile" else self._with_rates(
                            row, done, {"inference_tokens_per_s": batch, "bytes_per_s": read}
                        )

    def prefill(self) -> Iterator[dict[str, Any]]:
        """One prompt; the head's logits of its last row are part of it."""
        with contextlib.closing(self._engine()) as engine:
            profiler = self._profiler(engine)
            for number, rows in enumerate(self.sizes.prefill):
                pairs = rows * (rows + 1) // 2
                cost = _NOTHING._replace(rows=rows, head_rows=1, prefill_pairs=pairs)
                done = forward_operations(self.arch, rows, pairs, 1)
                names = {"kind": "prefill", "rows": rows}
                for row in self.timed(profiler, Contents(cost, (), 0), names, f"prefill {rows}" if number == 0 else ""):
                    yield row if row["kind"] == "profile" else self._with_rates(row, done, {"prefill_tokens_per_s": rows})

    def _with_rates(self, row: dict[str, Any], done: Operations, amounts: dict[str, float]) -> dict[str, Any]:
        if "seconds" not in row:
            return row
        rates = {name: amount / row["seconds"] for name, amount in amounts.items()}
        return {**row, **rates, **self.utilization(done, row["seconds"])}

    @torch.no_grad()
    def step(self) -> Iterator[dict[str, Any]]:
        """Whole steps of one example each: forward, backward, optimizer. The first doesn't count; one more is profiled."""
        tokens = self.sizes.example_tokens
        config = FinetuneConfig(
            lora=LORA, optimizer=OptimizerConfig(learning_rate=1e-4), batch_size=1, max_microbatch_tokens=tokens,
            window_tokens=self.sizes.window_tokens, max_steps=100,
        )
        trainer = AdapterTrainer(self.model.loaded, config)
        release_memory()
        groups = training_groups(self.model, tokens, self.sizes.steps + 2)
        losses = []

        def run(step: int) -> None:
            losses.append(trainer.forward_backward([groups[step]], step).loss)
            trainer.optim_step(1e-4)

        times = []
        for step in range(self.sizes.steps + 1):
            synchronize(self.device)
            begin = time.perf_counter()
            run(step)
            synchronize(self.device)
            times.append(time.perf_counter() - begin)
        taken = median(times[1:])
        done = training_operations(self.arch, tokens, tokens * (tokens + 1) // 2, tokens - 1, trainer.adapter.flat.numel())
        yield {"kind": "finetune", "example_tokens": tokens, "window_tokens": trainer.window, "seconds": taken,
               "first_s": times[0], "finetune_tokens_per_s": tokens / taken, "losses": losses,
               **self.utilization(done, taken), **peak_bytes(self.device)}
        yield profiled(lambda: run(len(groups) - 1), self.device, of=f"step of {tokens}", layers=self.arch.num_layers)


def items(options: argparse.Namespace) -> list[Item]:
    """Decode, prefill and a long example's step."""
    alone = Alone(options)
    return [Item("decode", alone.decode), Item("step", alone.step), Item("prefill", alone.prefill)]


def curve_items(options: argparse.Namespace) -> list[Item]:
    """The row-cost curve."""
    return [Item("curve", Alone(options).curve)]
