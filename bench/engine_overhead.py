"""Python time per iteration outside kernels: scheduling, commit, texts, and building a batch's rows. One run, one JSON.

    python bench/engine_overhead.py [--iterations 200] [--output bench/results/engine_overhead.json]

The engine runs with a runner that returns tokens at once, beside a job, at 64 running requests and at 256 with 100 adapters;
what a step takes then is the engine's own. Rows are built for decode batches of the same sizes, without running them.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from coserve import (
    EngineConfig,
    FinetuneConfig,
    LoraConfig,
    OptimizerConfig,
    SamplingConfig,
    SchedulerConfig,
    load_model,
)
from coserve.core import MeasuredStep, Sampled, StepPlan, StepResult, percentile
from coserve.engine.engine import Engine
from coserve.engine.step import Lookup
from coserve.machine import device_name
from coserve.peft.lora import LoraAdapter
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.spans import NO_ADAPTER, RowSpan, SpanRows
from coserve.scheduler.latency import LatencyModel

LAW = {
    ("inference", "once", 0): 0.04, ("inference", "rows", 1): 1e-3, ("optimizer", "elements", 0): 1e-9,
    ("forward", "layers", 0): 1e-3, ("forward", "rows", 0): 4e-5,
    ("backward", "layers", 0): 2e-3, ("backward", "rows", 0): 8e-5,
}


class InstantRunner:
    """Gives a token to every span that samples, and marks nothing as run: units are the scheduler's affair alone here."""

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        tokens = {span.request: [Sampled(7 + plan.number % 90)] for span in plan.spans if span.samples}
        return StepResult(
            tokens=tokens, prompt_logprobs={}, ended=(MeasuredStep(plan, plan.predicted_s),), waited_s=0.0
        )


def steps(model: LoadedModel, requests: int, adapters: int, iterations: int) -> list[float]:
    """Seconds of each step with so many requests decoding."""
    config = EngineConfig(
        scheduler=SchedulerConfig(max_num_seqs=requests, max_num_batched_tokens=1 << 15, tpot_ms=500.0), memory_bytes=4 << 30,
        inference_share=0.8,
    )
    engine = Engine(model, config, latency=LatencyModel(LAW), runner=InstantRunner())
    for number in range(adapters):
        adapter = LoraAdapter.create(
            model.architecture, LoraConfig(r=8, target_modules=("q_proj",)), dtype=torch.float32, device=torch.device("cpu"),
            seed=number,
        )
        engine.add_adapter(f"adapter-{number}", adapter)
    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "data.jsonl"
        data.write_text("".join(json.dumps({"text": "a quiet river " * 60}) + "\n" for _ in range(64)))
        engine.finetune(data, Path(directory) / "job", FinetuneConfig(
            max_microbatch_tokens=1024, epochs=3, batch_size=8, checkpoint_steps=0,
            optimizer=OptimizerConfig(learning_rate=2e-4),
        ))
        sampling = SamplingConfig(max_tokens=iterations + 200, ignore_eos=True, stop=("never said",))
        for number in range(requests):
            name = f"adapter-{number % adapters}" if adapters else None
            engine.submit([number % 1000] * 64, sampling, adapter=name)
        while engine.scheduler.num_running < requests or any(not r.state.decoding for r in engine.requests.live.values()):
            engine.step()
        times = []
        for _ in range(iterations):
            started = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - started)
        engine.close()
    return times


def rows(model: LoadedModel, requests: int, iterations: int) -> list[float]:
    """Seconds to build the rows of a decode batch."""
    engine = Engine(model, EngineConfig(memory_bytes=4 << 30), latency=LatencyModel({}))
    spans = [RowSpan(159, 160, list(range(10 * i, 10 * i + 10)), NO_ADAPTER) for i in range(requests)]
    times = []
    for _ in range(iterations):
        started = time.perf_counter()
        SpanRows(spans, [], engine.device.pool, model.architecture, engine.device.passes.adapters)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "engine_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(None, device="cpu", dtype="float32")
    results = []
    for requests, adapters in ((64, 0), (256, 100)):
        for experiment, times in (
            ("step", steps(model, requests, adapters, options.iterations)), ("rows", rows(model, requests, options.iterations)),
        ):
            row = {"experiment": experiment, "requests": requests, "adapters": adapters if experiment == "step" else 0,
                   "median_ms": 1e3 * median(times), "p95_ms": 1e3 * percentile(times, 0.95)}
            results.append(row)
            print(f"{experiment}, {requests} requests, {row['adapters']} adapters: median {row['median_ms']:.2f} ms, "
                  f"p95 {row['p95_ms']:.2f} ms", flush=True)
    record = {
        "device": f"{device_name(torch.device('cpu'))}, 1 thread", "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch",)},
        "command": " ".join(["python", "bench/engine_overhead.py", *sys.argv[1:]]), "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
