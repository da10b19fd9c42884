"""The host's time per iteration outside kernels, with many requests over many adapters and a job beside. One run, one JSON.

    python bench/engine_overhead.py [--requests 256] [--adapters 100] [--iterations 300] [--runs 5] [--output ...json]

A real engine with a real runner plays CUDA's branches on a device that computes nothing (played_device.py), under the latency
law of Llama-3.1-8B on an H100. All requests decode; they draw with temperature in one half, some with top_p, and have stop
strings. Adapters have all linears. A step's time is cut into the phases of played_device.PHASES, in the process's own time, so
that others on the machine don't count. Iterations are reported by kind: replayed as a graph, eager, and eager with a window of
training rows, each with what units run behind the pass. A yardstick, a fixed loop, says how busy the machine was.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from played_device import CPU, PHASES, PlayedRunner, Timeline, played_device, played_model

import coserve.bench.paper
from coserve import EngineConfig, FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig, SchedulerConfig
from coserve.core import percentile
from coserve.devices.law import device_law
from coserve.devices.table import DEVICES
from coserve.engine.engine import Engine
from coserve.machine import device_name
from coserve.model.architecture import read_architecture
from coserve.peft.kinds import new_adapter
from coserve.runtime.loaded import find_model
from coserve.scheduler.latency import LatencyModel
from coserve.text.tokenizer import ChatTokenizer

MODELS = Path(coserve.bench.paper.__file__).parent / "models"
BLOCK = 16
TEXT = "The harbour was quiet in the morning, and boats came in one after another.\n\nNobody had said when they would. " * 8


class Load(NamedTuple):
    """What the engine has to do. job: whether a job trains beside the requests. graphs: whether decode passes are replayed.
    arithmetic: of the device (`law`). prompt: tokens of each request's."""

    requests: int
    adapters: int
    job: bool
    graphs: bool = True
    arithmetic: float = 1.0
    prompt: int = 512


class Measured(NamedTuple):
    """One iteration. kind: as reported. seconds: by phase. units: that ran behind the pass. yardstick: seconds of a fixed loop
    right behind it."""

    kind: str
    seconds: Mapping[str, float]
    units: int
    yardstick: float = 0.0


def yardstick() -> float:
    """CPU seconds of a fixed loop in Python: some 50 us on a core of its own, more where others share its caches."""
    began = time.thread_time()
    sum([number * number for number in range(1000)])
    return time.thread_time() - began


def law(arithmetic: float) -> LatencyModel:
    """The predicted times of Llama-3.1-8B on an H100 with `arithmetic` times its FLOP/s. More than 1 lets windows ride beside
    256 rows of requests, which an H100's arithmetic has no time for."""
    h100 = DEVICES["H100"]
    return device_law(read_architecture(MODELS / "Llama-3.1-8B"), replace(h100, peak_flops=arithmetic * h100.peak_flops))


def sampling_of(number: int, most: int) -> SamplingConfig:
    """Half of the requests draw, every fourth with top_p."""
    temperature = 0.8 if number % 2 else 0.0
    return SamplingConfig(
        max_tokens=most, ignore_eos=True, stop=("never said", "\n\nUser:"), temperature=temperature,
        top_p=0.9 if number % 4 == 1 else 1.0, seed=number,
    )


class PlayedEngine:
    """An engine on the played device, with all requests of a load decoding."""

    def __init__(
        self, tokenizer: ChatTokenizer, load: Load, directory: Path, timeline: Timeline, *, most_tokens: int, layers: int
    ) -> None:
        """most_tokens: how many each request generates."""
        self.timeline = timeline
        self.model = played_model(tokenizer, layers=layers)
        self.runner = PlayedRunner(self.timeline)
        arch, blocks = self.model.architecture, load.requests * -(-(load.prompt + most_tokens) // BLOCK)
        size = arch.num_layers * 2 * arch.num_kv_heads * BLOCK * arch.head_dim * self.model.dtype.itemsize
        config = EngineConfig(
            scheduler=SchedulerConfig(
                max_num_seqs=load.requests, max_num_batched_tokens=1 << 15, tpot_ms=50.0, ttft_ms=60_000.0,
                policy="coserve" if load.job else "inference-only",
            ),
            memory_bytes=2 * blocks * size, inference_share=0.5, max_adapters=max(1, load.adapters), block_tokens=BLOCK,
            cuda_graphs=load.graphs,
        )
        self.engine = Engine(self.model, config, latency=law(load.arithmetic), clock=self.runner.clock)
        self.runner.attach(self.engine)
        for number in range(load.adapters):
            adapter = new_adapter(self.model.weights, LoraConfig(r=8), seed=number)
            self.engine.add_adapter(f"adapter-{number}", adapter)
        for number in range(load.requests):
            self.engine.submit(
                [number % 97, *range(1, load.prompt)], sampling_of(number, most_tokens), label=f"request-{number}",
                adapter=f"adapter-{number % load.adapters}" if load.adapters else None,
            )
        while not self._all_decode(load.requests):
            self.engine.step()
        if load.job:
            data = directory / "data.jsonl"
            data.write_text("".join(json.dumps({"text": "a quiet river " * 1300}) + "\n" for _ in range(16)))
            self.engine.finetune(data, directory / "job", FinetuneConfig(
                max_microbatch_tokens=8192, epochs=1000, batch_size=4, checkpoint_steps=0,
                optimizer=OptimizerConfig(learning_rate=2e-4),
            ))

    def _all_decode(self, count: int) -> bool:
        states = [request.state for request in self.engine.requests.live.values()]
        return len(states) == count and all(state.decoding for state in states)

    def step(self) -> Measured:
        """One iteration."""
        timeline = self.timeline
        timeline.ends.clear()
        before, began = timeline.replays, timeline.clock()
        self.engine.step()
        timeline.end("commit")
        seconds, last = {}, began
        for phase in PHASES:
            end = timeline.ends.get(phase, last)
            seconds[phase], last = end - last, end
        plan = self.runner.plan
        kind = "replayed" if timeline.replays > before else "eager" if plan.fused is None else "eager with a window"
        return Measured(kind, seconds, len(plan.units) - (plan.fused is not None) + len(plan.optimizer))


def summary(found: Sequence[Measured]) -> dict[str, object]:
    """Medians and 95th percentiles in milliseconds: of whole steps, of the part before the first launch, of each phase."""

    def row(values: Sequence[float]) -> dict[str, float]:
        return {"median_ms": round(1e3 * median(values), 3), "p95_ms": round(1e3 * percentile(values, 0.95), 3)}

    return {
        "iterations": len(found), "units_behind_the_pass": median(one.units for one in found),
        "yardstick_us": round(1e6 * median(one.yardstick for one in found), 1),
        "total": row([sum(one.seconds.values()) for one in found]),
        "before_first_launch": row([one.seconds["plan"] + one.seconds["rows"] for one in found]),
        **{phase: row([one.seconds[phase] for one in found]) for phase in PHASES},
    }


def measure(tokenizer: ChatTokenizer, load: Load, iterations: int) -> dict[str, list[Measured]]:
    """A run's iterations by kind, after some to warm up."""
    by_kind: dict[str, list[Measured]] = defaultdict(list)
    with engine_of(tokenizer, load, most_tokens=iterations + 200) as played:
        for _ in range(50):
            played.step()
        gc.collect()
        gc.freeze()
        for _ in range(iterations):
            one = played.step()
            by_kind[one.kind].append(one._replace(yardstick=yardstick()))
        gc.unfreeze()
    return by_kind


@contextmanager
def engine_of(
    tokenizer: ChatTokenizer, load: Load, *, most_tokens: int, layers: int = 32, clock: Callable[[], float] = time.thread_time
) -> Iterator[PlayedEngine]:
    """An engine on the played device, all of whose requests decode. The arguments are a PlayedEngine's."""
    timeline = Timeline(clock=clock, tokens=tokenizer.encode(TEXT))
    with tempfile.TemporaryDirectory() as directory, played_device(timeline):
        played = PlayedEngine(tokenizer, load, Path(directory), timeline, most_tokens=most_tokens, layers=layers)
        try:
            yield played
        finally:
            played.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--iterations", type=int, default=300, help="of each run")
    parser.add_argument("--runs", type=int, default=3, help="of each load, pooled")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "engine_overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = find_model(None, device="cpu").tokenizer
    results = []
    for load in (
        Load(options.requests, options.adapters, job=False), Load(options.requests, options.adapters, job=True),
        Load(options.requests, options.adapters, job=True, arithmetic=2.0), Load(options.requests, 0, job=False),
    ):
        pooled: dict[str, list[Measured]] = defaultdict(list)
        for _ in range(options.runs):
            for kind, found in measure(tokenizer, load, options.iterations).items():
                pooled[kind] += found
        for kind, found in sorted(pooled.items()):
            results.append({**load._asdict(), "kind": kind, **summary(found)})
            print(json.dumps(results[-1]), flush=True)
    record = {
        "device": f"{device_name(CPU)}, 1 thread; kernels and the GPU are played", "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "numpy")},
        "command": " ".join(["python", "bench/engine_overhead.py", *sys.argv[1:]]), "clock": "CPU time of the engine's thread",
        "results": results,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
