"""Where the time of an iteration goes on a CPU: products, attention and everything else, at 1, 8 and 32 requests. One JSON.

    python bench/iteration_cpu.py [--dtype bfloat16] [--requests 1,8,32] [--output bench/results/iteration_cpu.json]

SmolLM2 in process, prompts of 128 random tokens. Decoding: iterations that give each of so many requests a token, between the
16th and the 64th. Prompts: one pass over so many prompts, four at most. Times are means, in milliseconds, by the clock around
each call; `rest` is what lies between the calls. products_share_of_best: the FLOP/s of the weights' products over those of one
product with 2048 rows.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coserve import Engine, EngineConfig, SamplingConfig, SchedulerConfig, load_model
from coserve.engine import step as step_module
from coserve.kernels.native import RowKernels
from coserve.machine import device_name, versions
from coserve.model import linear as linear_module
from coserve.model.decoder import linear_shapes
from coserve.model.linear import PackedHead, PackedLinear
from coserve.runtime.cache import KeyValuePool

PROMPT_TOKENS, FIRST, LAST = 128, 16, 64
MOST_PROMPTS = 4
BEST_ROWS = 2048


class Clocks:
    """Seconds inside functions, by part. A function that another measured one calls counts for the outer one."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = False

    def time(self, owner: Any, name: str, part: str) -> None:
        """Measures a function from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            if self._inside:
                return function(*args, **options)
            self._inside, started = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started
                self._inside = False

        setattr(owner, name, timed)


def measured(engine: Engine, clocks: Clocks, count: int, after: int, until: int) -> dict[str, float]:
    """Mean milliseconds of an iteration by part. The counted ones come after the first `after`, and are `until` - `after`."""
    ids = torch.randint(0, engine.model.architecture.vocab_size, (count, PROMPT_TOKENS)).tolist()
    sampling = SamplingConfig(max_tokens=LAST + 8, temperature=0, ignore_eos=True)
    handles = [engine.submit(prompt, sampling) for prompt in ids]
    while after and min(len(handle.token_ids) for handle in handles) < after:
        engine.step()
    clocks.seconds.clear()
    started = time.perf_counter()
    for _ in range(until - after):
        engine.step()
    whole = time.perf_counter() - started
    parts = {part: 1e3 * seconds / (until - after) for part, seconds in clocks.seconds.items()}
    for handle in handles:
        handle.cancel()
    while engine.step():
        pass
    total = 1e3 * whole / (until - after)
    return {**parts, "rest": total - sum(parts.values()), "iteration": total}


def best_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large product, the best of ten."""
    linear, x = PackedLinear.of(torch.randn(3072, 576).to(dtype), None), torch.randn(BEST_ROWS, 576).to(dtype)
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        linear.product(x)
        best = min(best, time.perf_counter() - started)
    return 2 * BEST_ROWS * 3072 * 576 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "iteration_cpu.json")
    options = parser.parse_args()
    clocks = Clocks()
    clocks.time(PackedHead, "logits", "head")
    clocks.time(linear_module, "_product", "products")
    for name, part in (("paged_attention", "attention"), ("rmsnorm", "norms"), ("rope", "rotary"), ("silu_mul", "activation"),
                       ("add", "sums"), ("write_cache", "cache writes")):
        clocks.time(RowKernels, name, part)
    clocks.time(KeyValuePool, "clear", "clearing blocks")
    clocks.time(step_module, "sample_rows", "sampling")
    model = load_model(device="cpu", dtype=options.dtype)
    relaxed = SchedulerConfig(tpot_ms=60_000, ttft_ms=600_000, preemption_quantum_ms=60_000)
    engine = Engine(model, EngineConfig(scheduler=relaxed, prefix_caching=False))
    clocks.time(engine.scheduler, "schedule", "scheduling")
    clocks.time(engine, "_commit", "commit and texts")
    arch = model.architecture
    flops = 2 * arch.num_layers * sum(out * features for out, features in linear_shapes(arch).values())
    best = best_rate(model.weights.dtype)
    rows = []
    for count in map(int, options.requests.split(",")):
        decode = measured(engine, clocks, count, FIRST, LAST)
        prompts = min(count, MOST_PROMPTS)
        prefill = measured(engine, clocks, prompts, 0, 1)
        kinds = (("decode", count, count, decode), ("prompts", prompts, prompts * PROMPT_TOKENS, prefill))
        for kind, number, tokens, times in kinds:
            share = flops * tokens / (times["products"] / 1e3) / best
            rows.append({"iteration": kind, "requests": number, "ms": times, "products_share_of_best": share})
            parts = ", ".join(f"{part} {ms:.1f}" for part, ms in sorted(times.items(), key=lambda item: -item[1]))
            print(f"{kind}, {number}: {parts} ms; products at {share:.0%} of the best rate", flush=True)
    engine.close()
    record = {
        "device": device_name(torch.device("cpu")), "date": datetime.date.today().isoformat(), "versions": versions(),
        "command": " ".join(["python", "bench/iteration_cpu.py", *sys.argv[1:]]), "dtype": options.dtype,
        "best_gflops_per_s": best / 1e9, "results": rows,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
