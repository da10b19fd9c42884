"""Serving cells: requests at a rate beside a job on long examples, under a policy. Each cell is a process of its own.

A cell is short: its figures show what a policy does, not a percentile's third digit. Of its requests half are greedy; the
others are drawn with a temperature, every second of them with top-p too. A cell ends without closing its engine: the process
ends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_clock import device_of, peak_bytes
from gpu_model import make_model
from gpu_passes import LORA
from gpu_rows import Item

from coserve.bench.arrivals import Arrival, ArrivalConfig, make_arrivals
from coserve.bench.driver import Handle, LoadEngine, Run, RunConfig, run_load
from coserve.bench.metrics import SloInMs, summarize
from coserve.config.settings import EngineConfig, FinetuneConfig, OptimizerConfig, SamplingConfig, SchedulerConfig
from coserve.engine.engine import Engine
from coserve.engine.jobhandle import JobHandle


class Load(NamedTuple):
    """What every cell has in common. seconds: of its window. objectives: TPOT and TTFT."""

    prompt_tokens: int
    output_tokens: int
    example_tokens: int
    batch_size: int
    tpot_ms: float
    ttft_ms: float
    seconds: float
    memory_bytes: int
    rate_factor: float

    @property
    def settle_s(self) -> float:
        """Before the window, with requests and the job: until as many requests leave as come, if each just meets its TPOT."""
        return 1.25 * self.output_tokens * self.tpot_ms * 1e-3

    @property
    def drain_s(self) -> float:
        """After the window, at most: whoever is then unfinished has missed its objectives, since the last may arrive at the
        window's end, wait for its first token as long as the TTFT allows, and take the TPOT for each other."""
        return (self.ttft_ms + self.output_tokens * self.tpot_ms) * 1e-3


FULL = Load(
    prompt_tokens=256, output_tokens=128, example_tokens=8192, batch_size=8, tpot_ms=50.0, ttft_ms=3000.0, seconds=12.0,
    memory_bytes=46 << 30, rate_factor=1.0,
)
QUICK = Load(
    prompt_tokens=16, output_tokens=4, example_tokens=48, batch_size=2, tpot_ms=300.0, ttft_ms=2000.0, seconds=1.0,
    memory_bytes=96 << 20, rate_factor=0.25,
)
ALONE_SETTLE_S = 3.0
"""Without requests: kernels are compiled and weights laid out before the window."""
WARMUP_REQUESTS = 4
LEAST_WINDOW = 0.4
"""Share of the window's seconds: where a slow start leaves less, the cell is skipped."""


class Cell(NamedTuple):
    """rate: requests per second."""

    policy: str
    rate: float


CELLS: Mapping[str, Cell] = {
    "finetune-only": Cell("finetune-only", 0.0), "20-inference-only": Cell("inference-only", 20.0),
    "20-coserve": Cell("coserve", 20.0), "20-layer-sliced": Cell("layer-sliced", 20.0),
    "20-coserve-again": Cell("coserve", 20.0), "20-dynamic-temporal": Cell("dynamic-temporal", 20.0),
    "5-coserve": Cell("coserve", 5.0),
}


class Mixed:
    """An engine whose requests are in turn greedy and drawn with a temperature, of the latter every second with top-p."""

    def __init__(self, engine: LoadEngine) -> None:
        self._engine, self._count = engine, 0

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Handle:
        self._count += 1
        if self._count % 2 == 0:
            top_p = 0.95 if self._count % 4 == 0 else 1.0
            sampling = replace(sampling, temperature=1.0, top_p=top_p, seed=self._count)
        return self._engine.submit(prompt_ids, sampling)

    def step(self) -> bool:
        return self._engine.step()

    def now(self) -> float:
        return self._engine.now()

    def metrics(self) -> Mapping[str, Any]:
        return self._engine.metrics()


class Serving:
    """One cell."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, device_of(options)
        self.cell, self.load = CELLS[options.part], QUICK if options.quick else FULL

    def run(self) -> Iterator[dict[str, Any]]:
        """A row about the start, and the cell's."""
        begin = time.perf_counter()
        model = make_model(self.options.model, self.device)
        loaded = time.perf_counter()
        load, notes = self.load, list[str]()
        scheduler = SchedulerConfig(
            policy=self.cell.policy, tpot_ms=load.tpot_ms, ttft_ms=load.ttft_ms, max_num_seqs=256,
            max_window_tokens=min(2048, load.example_tokens),
        )
        engine = Engine(model.loaded, EngineConfig(memory_bytes=load.memory_bytes, scheduler=scheduler), report=notes.append)
        vocab = model.loaded.architecture.vocab_size
        folder = Path(tempfile.mkdtemp())
        job = None
        if self.cell.policy != "inference-only":
            job = engine.finetune(self._data(folder, vocab), folder / "job", FinetuneConfig(
                lora=LORA, optimizer=OptimizerConfig(learning_rate=1e-5), batch_size=load.batch_size, max_steps=10_000,
                checkpoint_steps=0, max_microbatch_tokens=load.example_tokens, window_tokens=min(2048, load.example_tokens),
            ), name="job")
        if self.cell.rate:
            self._warm(engine, vocab)
        yield {"model_s": loaded - begin, "ready_s": time.perf_counter() - begin, "notes": notes}
        window_s = self._window(self.options.deadline - time.monotonic())
        if window_s < LEAST_WINDOW * load.seconds:
            yield {"skipped": f"no time left: the cell was ready after {time.perf_counter() - begin:.0f} s"}
        else:
            yield self._row(*self._run(engine, vocab, job, window_s), engine, job)

    def _window(self, left_s: float) -> float:
        """Seconds of the window, where so many are left of the part."""
        return min(self.load.seconds, left_s - self._settle_s - self.load.drain_s)

    @property
    def _settle_s(self) -> float:
        return self.load.settle_s if self.cell.rate else min(ALONE_SETTLE_S, self.load.settle_s)

    def _data(self, folder: Path, vocab: int) -> Path:
        rng = np.random.default_rng(1)
        path = folder / "examples.jsonl"
        words = self.load.example_tokens - 1  # EOS follows them; it is the last token, and not one of them
        lines = (" ".join(map(str, rng.integers(0, vocab - 1, words))) for _ in range(16))
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        return path

    def _warm(self, engine: Engine, vocab: int) -> None:
        """A few requests that don't count: kernels of prompts, decoding and each way of sampling are compiled."""
        rng = np.random.default_rng(2)
        sampling = SamplingConfig(max_tokens=4, ignore_eos=True, temperature=0.0)
        mixed = Mixed(engine)
        prompts = rng.integers(0, vocab, (WARMUP_REQUESTS, self.load.prompt_tokens)).tolist()
        handles = [mixed.submit(prompt, sampling) for prompt in prompts]
        while not all(handle.finished for handle in handles):
            engine.step()

    def _run(self, engine: Engine, vocab: int, job: JobHandle | None, window_s: float) -> tuple[Run, float]:
        """The run, and its seconds."""
        load, rate = self.load, self.cell.rate * self.load.rate_factor
        end = self._settle_s + window_s
        arrivals: list[Arrival] = []
        if rate:
            config = ArrivalConfig(prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens)
            arrivals = [a for a in make_arrivals(config, rate, int(2 * rate * end) + 8, seed=0) if a.due_s < end]
        rng = np.random.default_rng(int(rate))
        plan = RunConfig(window_start_s=self._settle_s, window_end_s=end, drain_s=load.drain_s)
        begin = time.perf_counter()
        run = run_load(
            Mixed(engine), arrivals, lambda tokens: rng.integers(0, vocab, tokens).tolist(), plan, sleep=time.sleep, job=job
        )
        return run, time.perf_counter() - begin

    @staticmethod
    def _most_frequent(shapes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(shapes, key=lambda shape: -shape["count"])[:8]

    def _row(self, run: Run, taken_s: float, engine: Engine, job: JobHandle | None) -> dict[str, Any]:
        policy, rate, load = *self.cell, self.load
        objectives = SloInMs(ttft_ms=load.ttft_ms, tpot_ms=load.tpot_ms)
        row: dict[str, Any] = {
            "policy": policy, "rate": rate * load.rate_factor, **summarize(run.records, objectives, run.window_s),
            "window_s": run.window_s, "run_s": taken_s, "busy_share": run.busy_s / taken_s, "iterations": run.iterations,
            "outside_ms_per_iteration": 1e3 * (taken_s - run.busy_s) / max(1, run.iterations), "fused_share": run.fused_share,
        }
        if rate:
            row["inference_tokens_per_s"] = run.inference_tokens / run.window_s
            row["unfinished"] = sum(not record.finished for record in run.records)
        if policy != "inference-only":
            row["finetune_tokens_per_s"] = run.finetune_tokens_per_s
        metrics = engine.metrics()
        return row | {
            "objectives": {"tpot_ms": load.tpot_ms, "ttft_ms": load.ttft_ms},
            "prediction_errors": metrics["prediction_errors"], "reserve": metrics["reserve"],
            "preemptions": metrics["preemptions"], "host_s": metrics.get("host_s"),
            "unit_shapes": self._most_frequent(metrics["unit_shapes"]),
            "job_says": [event.message for event in job.events[:8]] if job is not None else [], **peak_bytes(self.device),
        }


def items(options: argparse.Namespace) -> list[Item]:
    """The cell that the part is named after."""
    return [Item("cell", Serving(options).run)]
