"""Inference alone on a CPU beside transformers.generate: output tokens per second. One run, one JSON.

    python bench/inference_cpu.py [--pairs 5] [--threads 2] [--batches 1,8,32] [--output bench/results/inference_cpu.json]

SmolLM2 in float32, random prompts of 128 tokens, 64 tokens out (no end of sequence), greedy. Runs of both alternate in one
process; medians are compared. coserve serves through its engine: chunked prefill, paged cache, policy inference-only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM

from coserve import EngineConfig, SamplingConfig, SchedulerConfig, load_model
from coserve.engine.engine import Engine
from coserve.machine import device_name
from coserve.scheduler.latency import LatencyModel


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "inference_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(None, device="cpu", dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32).eval()
    sampling = SamplingConfig(max_tokens=options.output_tokens, temperature=0, ignore_eos=True)
    results = []
    for batch in map(int, options.batches.split(",")):
        engine = Engine(
            model, EngineConfig(
                scheduler=SchedulerConfig(policy="inference-only", max_num_seqs=batch), memory_bytes=2 << 30,
                prefix_caching=False,
            ), latency=LatencyModel({}),
        )
        times: dict[str, list[float]] = {"coserve": [], "transformers": []}
        for pair in range(options.pairs + 1):  # the first is not counted
            ids = torch.randint(0, 49152, (batch, options.prompt_tokens), generator=torch.Generator().manual_seed(pair))

            def ours(ids: torch.Tensor = ids, engine: Engine = engine) -> None:
                engine.generate(ids.tolist(), sampling)

            def theirs(ids: torch.Tensor = ids) -> None:
                with torch.no_grad():
                    reference.generate(
                        ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.output_tokens,
                        min_new_tokens=options.output_tokens, do_sample=False, pad_token_id=0,
                    )

            taken = {"coserve": timed(ours), "transformers": timed(theirs)}
            if pair:
                for name, seconds in taken.items():
                    times[name].append(seconds)
        tokens = batch * options.output_tokens
        rates = {name: tokens / median(seconds) for name, seconds in times.items()}
        ratio = median(t / o for o, t in zip(times["coserve"], times["transformers"], strict=True))
        results.append({
            "experiment": "inference", "model": model.name, "batch": batch, "prompt_tokens": options.prompt_tokens,
            "output_tokens": options.output_tokens, "pairs": options.pairs, "tokens_per_s": rates, "ratio": ratio,
            "seconds": times,
        })
        print(f"batch {batch}: coserve {rates['coserve']:.1f}, transformers {rates['transformers']:.1f} output tokens/s; "
              f"median ratio {ratio:.2f}", flush=True)
    record = {
        "device": f"{device_name(torch.device('cpu'))}, {options.threads} threads",
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "command": " ".join(["python", "bench/inference_cpu.py", *sys.argv[1:]]),
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
