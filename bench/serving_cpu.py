"""coserve and vLLM over HTTP on a CPU, with the same client and the same load. One run, one JSON.

    python bench/serving_cpu.py [--vllm /path/to/venv] [--in-process] [--pairs 3] [--clients 1,8,32] [--dtypes float32,bfloat16]

SmolLM2, prompts of 128 random tokens, 64 tokens out, greedy, streamed with the usage in every chunk. First come closed loops of
1, 8 and 32 clients with a fixed number of requests each, then Poisson arrivals at half of the capacity. The capacity is the
requests per second of vLLM (without it, of coserve) with the most clients in the first pair of the dtype. Servers run with
their defaults; vLLM is told what it needs on a CPU. --in-process adds coserve.Engine without HTTP under the same load
(serving_engine.py).

A pair is one start of every system. Only one system runs at a time: the process groups of the others are halted (SIGSTOP). They
keep their memory and take no processor; if one of them used a processor all the same, the run ends with an error. So the
systems alternate cell by cell, and each pair has another order. The floor of a token is the time to read the weights once:
their bytes over the bandwidth at which all threads sum a large tensor, measured in each pair. serving_rows.py says what the
rows hold, and what first come, first served means.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from serving_engine import running_engine
from serving_rows import COSERVE, IN_PROCESS, VLLM, Cell, capacity, cell_summary, describe, describe_ratios, make_rows

from coserve.bench.arrivals import ArrivalConfig, make_arrivals
from coserve.bench.loads import CompletionClient, PromptLoad, run_load
from coserve.bench.metrics import RequestRecord
from coserve.bench.results import result_head
from coserve.bench.servers import ProcessGroup, busy_seconds, log_end, running_server, served_model
from coserve.bench.vllmserver import vllm_command, vllm_variables, vllm_versions
from coserve.bench.workload import prompts, word_ids
from coserve.core import ConfigError
from coserve.kernels.processor import bfloat16_products
from coserve.machine import device_name, versions
from coserve.model.checkpoint import Checkpoint
from coserve.model.locate import locate_model
from coserve.model.memory import weight_bytes
from coserve.text.tokenizer import ChatTokenizer

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
LOAD_OF_CAPACITY = 0.5
NUM_WARMUPS, WARMUP_TOKENS = 8, 8
"""Requests at once and their output tokens, after a start."""
NUM_PROBES = 5
"""Single prompts by which the time of a prefill is measured, before the cells of a pair."""
BANDWIDTH_BYTES = 1 << 30
SYSTEMS, DTYPES = (COSERVE, VLLM), ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class System:
    """A running system. run: sends it a load and waits for its end."""

    name: str
    group: ProcessGroup
    run: Callable[[PromptLoad], list[RequestRecord]]


class Prompts:
    """Random prompts of the default model's words. Equal keys give equal prompts: all systems of a pair get the same."""

    def __init__(self, directory: Path) -> None:
        self._words = word_ids(ChatTokenizer.load(directory))

    def __call__(self, count: int, *key: int) -> tuple[tuple[int, ...], ...]:
        source = prompts(self._words, key)
        return tuple(tuple(source(PROMPT_TOKENS)) for _ in range(count))


def requests_each(clients: int, quick: bool) -> int:
    """Requests of every client of a closed loop: a cell takes 15 to 40 s on two cores."""
    if quick:
        return 3 if clients == 1 else 1
    return 10 if clients < 4 else 6 if clients < 16 else 3


def read_bandwidth() -> float:
    """Bytes per second at which all threads read memory: the best of five sums of a large tensor."""
    values = torch.ones(BANDWIDTH_BYTES // 4)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    return BANDWIDTH_BYTES / best


@contextlib.contextmanager
def http_system(
    name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[System]:
    """A server, started and ended. Raises RuntimeError if it doesn't start, or answers no request of a load."""
    with running_server(command, log, environment) as server:
        client = CompletionClient(server.url, served_model(server.url))

        def run(load: PromptLoad) -> list[RequestRecord]:
            records = asyncio.run(run_load(client.send, load, time.monotonic))
            if not any(record.finished for record in records):
                raise RuntimeError(f"{name} answered none of {len(records)} requests:\n{log_end(log)}")
            return records

        yield System(name, server.group, run)


@contextlib.contextmanager
def in_process_system(dtype: str) -> Iterator[System]:
    """coserve.Engine without HTTP, started and ended. Raises RuntimeError if it doesn't start."""
    with running_engine(dtype) as child:
        yield System(IN_PROCESS, child.group, child.run)


class Starter:
    """Starts systems by name. vllm: its environment; directory: of logs and data."""

    def __init__(self, model: Path, vllm: Path | None, directory: Path) -> None:
        self._model, self._vllm, self._directory = model, vllm, directory

    def start(self, name: str, dtype: str, pair: int) -> contextlib.AbstractContextManager[System]:
        """The system, once it answers."""
        if name == IN_PROCESS:
            return in_process_system(dtype)
        log = self._directory / f"{name}-{dtype}-{pair}.log"
        if name == COSERVE:
            data = self._directory / f"data-{dtype}-{pair}"
            command = [sys.executable, "-m", "coserve", "serve", "--dtype", dtype, "--data-dir", str(data)]
            return http_system(name, command, log)
        assert self._vllm is not None
        cores = sorted(os.sched_getaffinity(0))
        return http_system(name, vllm_command(self._vllm, self._model, dtype), log, vllm_variables(cores))


class Pair(NamedTuple):
    """What is measured with one start of every system. rate: of the Poisson arrivals; None: half of the capacity that this
    pair finds."""

    dtype: str
    number: int
    rate: float | None


class Measurement:
    """The cells of one pair after another."""

    def __init__(
        self, options: argparse.Namespace, systems: Sequence[str], starter: Starter, prompts: Prompts, checkpoint: Checkpoint
    ) -> None:
        self._options, self._systems, self._starter = options, systems, starter
        self._prompts, self._checkpoint = prompts, checkpoint

    def measure(self, pair: Pair) -> tuple[list[Cell], float]:
        """A pair's cells, and the rate of its Poisson arrivals in requests per second."""
        options = self._options
        cells: list[Cell] = []
        with contextlib.ExitStack() as stack:
            systems = []
            for name in self._systems:
                say(f"pair {pair.number + 1}, {pair.dtype}: starting {name} ...")
                systems.append(stack.enter_context(self._starter.start(name, pair.dtype, pair.number)))
                systems[-1].run(self._closed(pair, NUM_WARMUPS, 1, WARMUP_TOKENS))
                systems[-1].group.halt()
            turn = pair.number % len(systems)
            systems = systems[turn:] + systems[:turn]
            itemsize = getattr(torch, pair.dtype).itemsize
            floor_s = weight_bytes(self._checkpoint.architecture, itemsize) / read_bandwidth()
            prefill_s = min(self._prefill_s(system, pair) for system in systems)
            say(f"pair {pair.number + 1}, {pair.dtype}: floor {floor_s * 1e3:.1f} ms per token, "
                f"{prefill_s * 1e3:.0f} ms to the first token of a single prompt")
            for clients in options.clients:
                load = self._closed(pair, clients, requests_each(clients, options.quick), OUTPUT_TOKENS)
                cells += [self._cell(system, load, pair, None, prefill_s, floor_s) for system in systems]
            rate = pair.rate or LOAD_OF_CAPACITY * capacity(cells)
            load = self._poisson(pair, rate)
            cells += [self._cell(system, load, pair, rate, prefill_s, floor_s) for system in systems]
        return cells, rate

    def _closed(self, pair: Pair, clients: int, each: int, output_tokens: int) -> PromptLoad:
        prompts = self._prompts(clients * each, pair.number, clients, output_tokens)
        return PromptLoad(prompts=prompts, output_tokens=output_tokens, clients=clients)

    def _poisson(self, pair: Pair, rate: float) -> PromptLoad:
        count = 8 if self._options.quick else 40
        arrivals = make_arrivals(ArrivalConfig(), rate, count, pair.number)
        return PromptLoad(prompts=self._prompts(count, pair.number, 0, OUTPUT_TOKENS), output_tokens=OUTPUT_TOKENS,
                    due_s=tuple(arrival.due_s for arrival in arrivals))

    def _prefill_s(self, system: System, pair: Pair) -> float:
        """The median time to the first token of single prompts."""
        with running(system):
            records = system.run(self._closed(pair, 1, NUM_PROBES, 1))
        return median(record.token_times[0] - record.due_s for record in records if record.finished)

    def _cell(
        self, system: System, load: PromptLoad, pair: Pair, rate: float | None, prefill_s: float, floor_s: float
    ) -> Cell:
        with running(system):
            system.run(self._closed(pair, 1, 1, 2))  # after a halt
            before, started = processor_use(system), time.monotonic()
            records = system.run(load)
            seconds = time.monotonic() - started
            client, server, other = ((b - a) / seconds for a, b in zip(before, processor_use(system), strict=True))
        cell = Cell(
            system=system.name, dtype=pair.dtype, pair=pair.number, clients=load.clients, rate=rate, records=tuple(records),
            prefill_s=prefill_s, floor_s=floor_s, client_cores=client, server_cores=server, other_cores=other,
        )
        say(f"pair {pair.number + 1}, {describe(cell)}")
        return cell


@contextlib.contextmanager
def running(system: System) -> Iterator[None]:
    """Lets a halted system run for a while."""
    system.group.resume()
    try:
        yield
    finally:
        system.group.halt()


def processor_use(system: System) -> tuple[float, float, float]:
    """Processor seconds so far of this process, which is the client, of the system, and of all others on the machine."""
    client, server = time.process_time(), system.group.processor_seconds()
    return client, server, busy_seconds() - client - server


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)


def default_dtypes() -> list[str]:
    """float32, and bfloat16 where the processor multiplies it."""
    return list(DTYPES if bfloat16_products().supported else DTYPES[:1])


def read_options() -> argparse.Namespace:
    """The command line; lists are lists. Exits where it asks for what can't be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vllm", type=Path, help="virtual environment with vLLM; without it there are no rows of vLLM")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="joined by commas")
    parser.add_argument("--in-process", action="store_true", help="also coserve.Engine without HTTP")
    parser.add_argument("--clients", help="of closed loops, joined by commas (1,8,32)")
    parser.add_argument("--dtypes", help="joined by commas (float32, and bfloat16 where the processor multiplies it)")
    parser.add_argument("--pairs", type=int, help="repeats of all systems (3)")
    parser.add_argument("--quick", action="store_true", help="one pair, few requests, 1 and 8 clients, float32")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "serving_cpu.json")
    options = parser.parse_args()
    try:
        options.clients = [int(number) for number in (options.clients or ("1,8" if options.quick else "1,8,32")).split(",")]
    except ValueError:
        parser.error(f"--clients: write numbers joined by commas, got {options.clients!r}")
    if options.pairs is None:
        options.pairs = 1 if options.quick else 3
    if min(options.clients) < 1 or options.pairs < 1:
        parser.error("--clients, --pairs: must be at least 1")
    options.dtypes = options.dtypes.split(",") if options.dtypes else ["float32"] if options.quick else default_dtypes()
    options.systems = options.systems.split(",")
    for name, known in (("systems", SYSTEMS), ("dtypes", DTYPES)):
        if unknown := set(getattr(options, name)) - set(known):
            parser.error(f"--{name}: must be of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return options


def main() -> None:
    options = read_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that halted servers are ended too
    systems, skipped = list(options.systems), []
    if VLLM in systems and options.vllm is None:
        systems.remove(VLLM)
        skipped.append(f"{VLLM}: no environment was given (--vllm /path/to/venv)")
        say(f"skipped {skipped[0]}")
    systems += [IN_PROCESS] if options.in_process else []
    if not systems:
        sys.exit("--systems: nothing is left to measure")
    try:
        of_vllm = vllm_versions(options.vllm) if VLLM in systems else {}
    except ConfigError as error:
        sys.exit(str(error))
    facts = {
        **result_head(device_name(torch.device("cpu")), {**versions(), **of_vllm}, "python bench/serving_cpu.py"),
        "skipped": skipped,
        "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "load_of_capacity": LOAD_OF_CAPACITY,
    }
    model = locate_model(None)
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["COSERVE_CACHE"] = name  # the engine's latency model is measured in this run
        measurement = Measurement(options, systems, Starter(model, options.vllm, Path(name)), Prompts(model), Checkpoint(model))
        for dtype in options.dtypes:
            rate = None
            for number in range(options.pairs):
                found, rate = measurement.measure(Pair(dtype, number, rate))
                cells += found  # and what there is so far is written, so that a run that is stopped is not lost
                result = {**facts, "results": make_rows(cells), "cells": [cell_summary(cell) for cell in cells]}
                options.output.write_text(json.dumps(result, indent=1) + "\n")
    for line in filter(None, map(describe_ratios, make_rows(cells))):
        say(line)


if __name__ == "__main__":
    main()
