"""coserve in bfloat16 beside itself in float32, on a CPU that multiplies bfloat16. One run, one JSON.

    python bench/bfloat16_cpu.py [--pairs 3] [--threads 2] [--parts inference,finetuning] [--batches 1,8,32] [--output FILE]

SmolLM2, the same weights rounded and not. Inference: random prompts of 128 tokens, 64 tokens out, greedy, through the engine
(policy inference-only). Finetuning: whole steps, LoRA r16 on all linears. Runs of both alternate in one process; medians are
compared. A row takes the place of the one that the file has of the same part and size.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from finetune_cpu import GSM8K, coserve_step, coserve_trainer, gsm8k_examples, long_example

from coserve import EngineConfig, LoadedModel, SamplingConfig, SchedulerConfig, load_model
from coserve.engine.engine import Engine
from coserve.kernels.processor import bfloat16_products
from coserve.scheduler.latency import LatencyModel

DTYPES = ("float32", "bfloat16")
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
POOL_BYTES = 1 << 30


def alternate(runs: dict[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Seconds of every run by name, after one of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for pair in range(pairs + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if pair:
                times[name].append(time.perf_counter() - started)
    return times


def compared(times: dict[str, list[float]], tokens: int, **facts: Any) -> dict[str, Any]:
    """A row: tokens per second by dtype, and the median ratio of the pairs."""
    rates = {name: tokens / median(seconds) for name, seconds in times.items()}
    ratio = median(a / b for a, b in zip(times["float32"], times["bfloat16"], strict=True))
    print(f"{facts}: {', '.join(f'{name} {rate:.1f}' for name, rate in rates.items())} tokens/s; ratio {ratio:.2f}", flush=True)
    return {**facts, "tokens_per_s": rates, "ratio": ratio, "seconds": times}


def inference(models: dict[str, LoadedModel], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    sampling = SamplingConfig(max_tokens=OUTPUT_TOKENS, temperature=0, ignore_eos=True)
    for batch in map(int, options.batches.split(",")):
        scheduler = SchedulerConfig(policy="inference-only", max_num_seqs=batch)
        config = EngineConfig(scheduler=scheduler, memory_bytes=POOL_BYTES, prefix_caching=False)
        engines = {name: Engine(model, config, latency=LatencyModel({})) for name, model in models.items()}
        ids = torch.randint(0, 49152, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch)).tolist()
        runs = {name: partial(engine.generate, ids, sampling) for name, engine in engines.items()}
        yield compared(alternate(runs, options.pairs), batch * OUTPUT_TOKENS, part="inference", size=f"{batch} requests")
        for engine in engines.values():
            engine.close()


def finetuning(models: dict[str, LoadedModel], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    some = next(iter(models.values()))
    for name, examples, microbatch in (
        ("one example of 1024 tokens", [long_example(some, 1024)], 1024),
        ("16 packed problems of GSM8K", gsm8k_examples(some, 16), 2048),
    ):
        trainers = {dtype: coserve_trainer(model, microbatch) for dtype, model in models.items()}
        runs = {dtype: partial(coserve_step, trainer, examples) for dtype, trainer in trainers.items()}
        tokens = sum(example.num_tokens for example in examples)
        yield compared(alternate(runs, options.pairs), tokens, part="finetuning", size=name)


PARTS = {"inference": inference, "finetuning": finetuning}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "bfloat16_cpu.json")
    options = parser.parse_args()
    products = bfloat16_products()
    if not products.supported:
        sys.exit(f"nothing to measure: {products.reason}")
    torch.set_num_threads(options.threads)
    models = {name: load_model(None, device="cpu", dtype=name) for name in DTYPES}
    rows = json.loads(options.output.read_text())["results"] if options.output.exists() else []
    results = {(row["part"], row["size"]): row for row in rows}
    for part in options.parts.split(","):
        results |= {(row["part"], row["size"]): row for row in PARTS[part](models, options)}
    record = {
        "device": f"{platform.machine()} CPU, {options.threads} threads; {products.reason}",
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "coserve")},
        "command": " ".join(["python", "bench/bfloat16_cpu.py", *sys.argv[1:]]),
        "model": "SmolLM2-135M-Instruct", "text": "GSM8K" if GSM8K.is_file() else "random tokens",
        "results": list(results.values()),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
