"""Part (e): requests at a rate beside a job on long examples, under each policy, by one engine per policy.

A cell is short: its figures show what a policy does, not a percentile's third digit. Cells that the time budget has no room for
are skipped, and their rows say so.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_clock import peak_bytes, release
from gpu_model import BenchModel
from gpu_passes import LORA

from coserve.bench.arrivals import ArrivalConfig, make_arrivals
from coserve.bench.driver import Run, RunConfig, run_load
from coserve.bench.metrics import SloInMs, summarize
from coserve.config.settings import EngineConfig, FinetuneConfig, OptimizerConfig, SchedulerConfig
from coserve.engine.engine import Engine
from coserve.scheduler.latency import LatencyModel


class Cells(NamedTuple):
    """seconds: of a cell's window; settle_s before it, with requests and the job; drain_s: longest wait after it."""

    policies: tuple[str, ...]
    rates: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    example_tokens: int
    tpot_ms: float
    ttft_ms: float
    seconds: float
    settle_s: float
    drain_s: float
    memory_bytes: int


FULL = Cells(
    policies=("inference-only", "coserve", "finetune-only", "dynamic-temporal", "temporal:16", "layer-sliced"),
    rates=(5.0, 10.0, 20.0), prompt_tokens=256, output_tokens=128, example_tokens=8192, tpot_ms=50.0, ttft_ms=3000.0,
    seconds=12.0, settle_s=3.0, drain_s=4.0, memory_bytes=46 << 30,
)
QUICK = Cells(
    policies=("coserve", "inference-only"), rates=(2.0,), prompt_tokens=16, output_tokens=4, example_tokens=48, tpot_ms=2000.0,
    ttft_ms=10000.0, seconds=2.0, settle_s=0.5, drain_s=5.0, memory_bytes=96 << 20,
)


class Sharing:
    """left: seconds of the budget that are left."""

    def __init__(self, model: BenchModel, cells: Cells, left: Callable[[], float]) -> None:
        self.model, self.cells, self.left = model, cells, left
        self.device = model.loaded.weights.device
        self._latency: LatencyModel | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One per policy and rate; finetune-only has one, at no rate."""
        cells = self.cells
        needed = cells.seconds + cells.settle_s + cells.drain_s
        with tempfile.TemporaryDirectory() as folder:
            data = self._data(Path(folder))
            for policy in cells.policies:
                rates = (0.0,) if policy == "finetune-only" else cells.rates
                if self.left() < needed:
                    yield from ({"policy": policy, "rate": rate, "skipped": "no time left"} for rate in rates)
                    continue
                try:
                    yield from self._policy(policy, rates, data, Path(folder) / policy.replace(":", "-"), needed)
                except Exception as error:  # the other policies go on
                    yield {"policy": policy, "failed": f"{type(error).__name__}: {error}"}
                release(self.device)

    def _data(self, folder: Path) -> Path:
        rng = np.random.default_rng(1)
        vocab = self.model.loaded.architecture.vocab_size
        path = folder / "examples.jsonl"
        lines = (" ".join(map(str, rng.integers(0, vocab, self.cells.example_tokens))) for _ in range(16))
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        return path

    def _policy(
        self, policy: str, rates: Sequence[float], data: Path, output: Path, needed: float
    ) -> Iterator[dict[str, Any]]:
        cells = self.cells
        scheduler = SchedulerConfig(
            policy=policy, tpot_ms=cells.tpot_ms, ttft_ms=cells.ttft_ms, max_num_seqs=256,
            max_window_tokens=min(2048, cells.example_tokens),
        )
        engine = Engine(
            self.model.loaded, EngineConfig(memory_bytes=cells.memory_bytes, scheduler=scheduler), latency=self._latency
        )
        job = None
        try:
            if policy != "inference-only":
                job = engine.finetune(data, output, FinetuneConfig(
                    lora=LORA, optimizer=OptimizerConfig(learning_rate=1e-5), batch_size=2, max_steps=10_000,
                    checkpoint_steps=0,
                    max_microbatch_tokens=cells.example_tokens, window_tokens=min(2048, cells.example_tokens),
                ), name="job")
            for rate in rates:
                if self.left() < needed:
                    yield {"policy": policy, "rate": rate, "skipped": "no time left"}
                    continue
                run = self._run(engine, rate, job)
                yield self._row(policy, rate, run, engine)
            self._latency = self._latency or engine.scheduler.latency
        finally:
            engine.close()

    def _run(self, engine: Engine, rate: float, job: Any) -> Run:
        cells = self.cells
        end = cells.settle_s + cells.seconds
        arrivals = []
        if rate:
            config = ArrivalConfig(prompt_tokens=cells.prompt_tokens, output_tokens=cells.output_tokens)
            arrivals = [a for a in make_arrivals(config, rate, int(2 * rate * end) + 8, seed=0) if a.due_s < end]
        rng = np.random.default_rng(int(rate))
        vocab = self.model.loaded.architecture.vocab_size
        plan = RunConfig(window_start_s=cells.settle_s, window_end_s=end, drain_s=cells.drain_s)
        return run_load(
            engine, arrivals, lambda tokens: rng.integers(0, vocab, tokens).tolist(), plan, sleep=time.sleep, job=job
        )

    def _row(self, policy: str, rate: float, run: Run, engine: Engine) -> dict[str, Any]:
        objectives = SloInMs(ttft_ms=self.cells.ttft_ms, tpot_ms=self.cells.tpot_ms)
        row: dict[str, Any] = {"policy": policy, "rate": rate, **summarize(run.records, objectives, run.window_s)}
        if rate:
            row["inference_tokens_per_s"] = run.inference_tokens / run.window_s
        if policy != "inference-only":
            row["finetune_tokens_per_s"] = run.finetune_tokens_per_s
        metrics = engine.metrics()
        return row | {
            "objectives": {"tpot_ms": objectives.tpot_ms, "ttft_ms": objectives.ttft_ms}, "window_s": run.window_s,
            "prediction_errors": metrics["prediction_errors"], "reserve": metrics["reserve"], **peak_bytes(self.device),
        }
