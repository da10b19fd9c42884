"""Parts (c) and (d): what rows cost, and throughput of decode, prefill and finetuning alone.

Passes and units run as the engine's profile runs them. MFU is of the operations of the model's products; attention and
recomputation are stated beside it, as shares of the same peak.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gpu_clock import peak_bytes, release, synchronize
from gpu_model import BenchModel, Operations, forward_operations, num_linear_weights, training_operations

from coserve.config.settings import EngineConfig, FinetuneConfig, LoraConfig, OptimizerConfig, SchedulerConfig
from coserve.core import Contents, Example, Group, PassCost, UnitCost
from coserve.engine.engine import Engine
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
    decode=((1, 1024), (8, 1024), (32, 1024), (64, 1024), (64, 4096)), prefill=(512, 2048, 4096), example_tokens=8192,
    window_tokens=2048, steps=3, memory_bytes=46 * GIB,
)
QUICK = Sizes(
    rows=(1, 4, 16), unit_rows=(16,), unit_layers=(1,), decode=((2, 24),), prefill=(16,), example_tokens=48, window_tokens=32,
    steps=1, memory_bytes=96 << 20,
)
TINY_LATENCY = LatencyModel({("iteration", "once", 0): 1e-3, ("inference", "rows", 1): 1e-4})
"""For engines that never schedule."""
LORA = LoraConfig(r=16, alpha=32)
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
    """One kind of work at a time on one model."""

    def __init__(self, model: BenchModel, sizes: Sizes, ceilings: dict[str, Any]) -> None:
        self.model, self.sizes, self.ceilings = model, sizes, ceilings
        self.arch, self.device = model.loaded.architecture, model.loaded.weights.device

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

    def _engine(self) -> Engine:
        config = EngineConfig(memory_bytes=self.sizes.memory_bytes, scheduler=SchedulerConfig())
        return Engine(self.model.loaded, config, latency=TINY_LATENCY)

    def _profiler(self, engine: Engine, *, graphs: bool = False) -> Profiler:
        passes = engine.device.passes if graphs else PassExecutor(
            self.model.loaded.executor, engine.device.train, engine.device.pool, engine.adapters.slots
        )
        return Profiler(passes, engine.device.train, engine.blocks)

    @torch.no_grad()
    def curve(self) -> Iterator[dict[str, Any]]:
        """Seconds of passes of so many rows (decode rows up to 256, one prompt beyond) and of units."""
        engine = self._engine()
        profiler = self._profiler(engine)
        for rows in self.sizes.rows:
            if rows <= 256:
                cost = _NOTHING._replace(rows=rows, head_rows=rows, decode_rows=rows, decode_context=64 * rows)
            else:
                cost = _NOTHING._replace(rows=rows, head_rows=1, prefill_pairs=rows * (rows + 1) // 2)
            yield from _timed(profiler, Contents(cost, (), 0), {"kind": "pass", "rows": rows})
        for rows in self.sizes.unit_rows:
            for layers in self.sizes.unit_layers:
                for backward in (False, True):
                    unit = UnitCost(backward, rows, min(layers, self.arch.num_layers), rows * (rows + 1) // 2, 0)
                    kind = "backward" if backward else "forward"
                    yield from _timed(profiler, Contents(None, (unit,), 0), {"kind": kind, "rows": rows, "layers": unit.layers})
        engine.close()

    @torch.no_grad()
    def inference(self) -> Iterator[dict[str, Any]]:
        """Decode with and without graphs, and prefill. The head's logits and their arg max are part of it."""
        engine = self._engine()
        itemsize = self.model.loaded.weights.dtype.itemsize
        for graphs in (True, False) if self.device.type == "cuda" else (False,):
            profiler = self._profiler(engine, graphs=graphs)
            for batch, context in self.sizes.decode:
                cost = _NOTHING._replace(rows=batch, head_rows=batch, decode_rows=batch, decode_context=batch * context)
                done = forward_operations(self.arch, batch, batch * context, batch)
                read = itemsize * (
                    num_linear_weights(self.arch) + self.arch.vocab_size * self.arch.hidden_size
                    + 2 * batch * context * self.arch.num_layers * self.arch.num_kv_heads * self.arch.head_dim
                )
                for row in _timed(profiler, Contents(cost, (), 0), {"kind": "decode", "requests": batch, "context": context}):
                    taken = row["seconds"]
                    yield {**row, "cuda_graphs": graphs, "inference_tokens_per_s": batch / taken, "bytes_per_s": read / taken,
                           **self.utilization(done, taken)}
        profiler = self._profiler(engine)
        for rows in self.sizes.prefill:
            pairs = rows * (rows + 1) // 2
            cost = _NOTHING._replace(rows=rows, head_rows=1, prefill_pairs=pairs)
            for row in _timed(profiler, Contents(cost, (), 0), {"kind": "prefill", "rows": rows}):
                yield {**row, "prefill_tokens_per_s": rows / row["seconds"],
                       **self.utilization(forward_operations(self.arch, rows, pairs, 1), row["seconds"])}
        engine.close()

    def finetune(self) -> dict[str, Any]:
        """Whole steps of one example each: forward, backward, optimizer."""
        release(self.device)
        tokens = self.sizes.example_tokens
        config = FinetuneConfig(
            lora=LORA, optimizer=OptimizerConfig(learning_rate=1e-4), batch_size=1, max_microbatch_tokens=tokens,
            window_tokens=self.sizes.window_tokens, max_steps=100,
        )
        trainer = AdapterTrainer(self.model.loaded, config)
        groups = training_groups(self.model, tokens, self.sizes.steps + 1)
        losses = []
        begin = 0.0
        with torch.no_grad():
            for step, group in enumerate(groups):
                if step == 1:  # the first step is not counted
                    synchronize(self.device)
                    begin = time.perf_counter()
                losses.append(trainer.forward_backward([group], step).loss)
                trainer.optim_step(1e-4)
        synchronize(self.device)
        taken = (time.perf_counter() - begin) / self.sizes.steps
        done = training_operations(self.arch, tokens, tokens * (tokens + 1) // 2, tokens - 1, trainer.adapter.flat.numel())
        return {"kind": "finetune", "example_tokens": tokens, "window_tokens": self.sizes.window_tokens, "seconds": taken,
                "finetune_tokens_per_s": tokens / taken, "losses": losses, **self.utilization(done, taken),
                **peak_bytes(self.device)}


def _timed(profiler: Profiler, contents: Contents, names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row with the least time; a row without one where the pool is too small."""
    times = [seconds for _, seconds in profiler._run(contents)]
    yield {**names, "seconds": min(times)} if times else {**names, "skipped": "the pool is too small"}
