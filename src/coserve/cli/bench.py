"""`coserve bench`: arguments, progress display, and the files of results."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from coserve.bench.arrivals import ArrivalConfig, make_arrivals
from coserve.bench.cells import CellStore
from coserve.bench.engines import EngineMaker, ModelChoice
from coserve.bench.narrate import describe, introduction
from coserve.bench.peer import transformers_tpot_ms
from coserve.bench.report import make_page
from coserve.bench.results import make_results, result_head
from coserve.bench.sharing import BurstConfig, Sharing, SharingConfig, SharingSetup
from coserve.bench.workload import endless_job, prompts, word_ids, write_training_file
from coserve.cli.paper import paper
from coserve.cli.replay import replay
from coserve.cli.settings import QuantizationOption, RanksOption, read_numbers
from coserve.cli.simulate import simulate
from coserve.config.settings import POLICIES
from coserve.config.values import require
from coserve.machine import device_name, versions
from coserve.runtime.loaded import LoadedModel, dtype_name, load_model

bench_app = typer.Typer(no_args_is_help=True, help="Measure co-serving on this machine.")
bench_app.command()(simulate)
bench_app.command()(replay)
console = Console()

QUICK_POLICIES = ("coserve", "temporal:16", "dynamic-temporal")
TRAINING_EXAMPLES = 256


@bench_app.callback()
def bench() -> None:
    """Measure co-serving on this machine."""


bench_app.command()(paper)


@bench_app.command()
def sharing(
    model: Annotated[str | None, typer.Argument(help="Model (default SmolLM2).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory; finished cells in it are kept.")] = Path("sharing"),
    policies: Annotated[str | None, typer.Option(help=f"Joined by commas: {', '.join(POLICIES)}, spatial.")] = None,
    loads: Annotated[str | None, typer.Option(help="Shares of capacity (0.25,0.5,0.75).")] = None,
    requests: Annotated[int | None, typer.Option(help="Counted requests per cell (150).")] = None,
    pairs: Annotated[int | None, typer.Option(help="Interleaved repeats (5).")] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, gamma:CV or trace:FILE.")] = "poisson",
    prompt_tokens: Annotated[int, typer.Option(help="Length of prompts.")] = 128,
    output_tokens: Annotated[int, typer.Option(help="Length of outputs.")] = 64,
    length_scale: Annotated[float | None, typer.Option(help="A trace's own lengths times this, not the fixed ones.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Objective (1.25 x transformers.generate at batch 8).")] = None,
    ttft_ms: Annotated[float, typer.Option(help="Objective.")] = 3000.0,
    capacity: Annotated[float | None, typer.Option(help="Requests/s that inference-only holds (measured).")] = None,
    finetune_tokens: Annotated[int, typer.Option(help="Mean tokens of a training example.")] = 512,
    finetune_batch: Annotated[int, typer.Option(help="Training examples per optimizer step.")] = 8,
    max_microbatch_tokens: Annotated[int, typer.Option(help="Training tokens packed together.")] = 2048,
    burst: Annotated[bool, typer.Option("--burst", help="Also a burst to 3x from 20% of capacity.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Three policies at half of capacity, one repeat; ten minutes or so.")
    ] = False,
    log: Annotated[
        bool, typer.Option("--log", help="Keep a log of each run beside its cell, for coserve bench replay.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and training data.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads (all cores).")] = None,
    spatial_threads: Annotated[str | None, typer.Option(help="Threads of serving,training under spatial (half each).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: QuantizationOption = "none",
    tensor_parallel_size: RanksOption = 1,
) -> None:
    """Inference and finetuning under every policy of sharing, at shares of this machine's capacity."""
    base = SharingConfig()
    if quick:
        base = replace(base, policies=QUICK_POLICIES, loads=(0.5,), requests=60, pairs=1, capacity_requests=40,
                       capacity_tolerance=0.15, alone_s=30.0, drain_s=30.0)
    config = replace(
        base,
        policies=base.policies if policies is None else tuple(name.strip() for name in policies.split(",")),
        loads=base.loads if loads is None else read_numbers(loads, "loads", float),
        requests=base.requests if requests is None else requests, pairs=base.pairs if pairs is None else pairs,
        arrivals=ArrivalConfig(
            kind=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens, length_scale=length_scale),
        seed=seed, ttft_ms=ttft_ms, tpot_ms=tpot_ms, capacity=capacity, burst=BurstConfig() if burst else None,
    )
    count = threads or os.cpu_count() or 1
    halves = (max(1, count - count // 2), max(1, count // 2))
    shares = halves if spatial_threads is None else read_numbers(spatial_threads, "spatial_threads", int)
    require(len(shares) == 2 and min(shares) >= 1, "spatial_threads", f"write two counts as 1,1, got {spatial_threads!r}")
    make_arrivals(config.arrivals, 1.0, config.requests, seed)  # a trace that can't be used is refused before the model loads
    torch.set_num_threads(count)
    loaded = load_model(
        model, device=device, dtype=dtype, report=lambda line: console.print(line, style="dim"),
        tensor_parallel_size=tensor_parallel_size, quantization=quantization,
    )
    words = word_ids(loaded.tokenizer)
    data = output / f"training-{finetune_tokens}-{seed}.jsonl"
    write_training_file(
        data, loaded.tokenizer, words, mean_tokens=finetune_tokens, count=TRAINING_EXAMPLES, seed=seed)
    job = endless_job(finetune_batch, max_microbatch_tokens)
    setup = SharingSetup(
        make_engine=EngineMaker(
            loaded,
            ModelChoice(
                name=model, device=device, dtype=dtype_name(loaded.weights.dtype), threads=count,
                tensor_parallel_size=tensor_parallel_size, quantization=quantization,
            ),
            (shares[0], shares[1])),
        prompts=lambda source: prompts(words, source),
        measure_peer_ms=lambda: transformers_tpot_ms(
            loaded.directory, dtype=loaded.weights.dtype, device=loaded.weights.device),
        training_file=data, finetune=job, directory=output, sleep=time.sleep, log=log,
    )
    common = {
        "model": loaded.fingerprint, "device": device_name(loaded.weights.device), "dtype": str(loaded.weights.dtype),
        "quantization": quantization,
        "threads": count, "tensor_parallel_size": tensor_parallel_size, "spatial_threads": list(shares), "seed": seed,
        "finetune_tokens": finetune_tokens,
        "finetune_batch": finetune_batch, "max_microbatch_tokens": max_microbatch_tokens, "versions": versions(),
    }
    result = _measure(config, setup, common, loaded)
    output.mkdir(parents=True, exist_ok=True)
    (output / "sharing.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "sharing.html").write_text(make_page(result), encoding="utf-8")
    for row in result["results"]:
        console.print(summary_line(row), highlight=False, markup=False)
    print(f"results in {output / 'sharing.json'}, page in {output / 'sharing.html'}")


def _measure(config: SharingConfig, setup: SharingSetup, common: dict[str, Any], loaded: LoadedModel) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("start")
        search = {"peer", "capacity"}
        started = False

        def listen(label: str, stored: bool) -> None:
            """Tells which cell comes next. The one before it is done."""
            nonlocal started
            console.print(describe(label, stored, store.expected_s), highlight=False, markup=False)
            counted = label.split("-")[0] not in search
            progress.update(task, description=label, advance=1 if counted and started else 0)
            started = started or counted

        store = CellStore(setup.directory, common, listen)
        bench = Sharing(config, setup, store)
        for line in introduction(config, bench.num_cells()):
            console.print(line, style="dim", highlight=False, markup=False)
        progress.update(task, total=bench.num_cells())
        measured = bench.measure()
        progress.update(task, completed=bench.num_cells())
    device, found = device_name(loaded.weights.device), make_results(measured, config, loaded.name)
    for row in found["results"]:
        row["device"] = device
    return {
        **result_head(device, common["versions"]), **found,
        "common": {key: value for key, value in common.items() if key not in ("device", "versions")},
    }


def summary_line(row: dict[str, Any]) -> str:
    """A row of results for the terminal."""
    parts = [f"{row['experiment']} {row['policy']}" + (f" at {row['load']:.0%} of capacity" if row["load"] else "")]
    if "slo_attainment" in row:
        low, high = row["slo_interval"]
        parts.append(f"{row['slo_attainment']:.1%} of {row['num_requests']} in time ({low:.1%} to {high:.1%})")
    if "finetune_tokens_per_s" in row:
        parts.append(f"{row['finetune_tokens_per_s']:.0f} finetuning tokens/s")
    if "bound_reached" in row:
        parts[-1] += f", {row['bound_reached']:.0%} of the bound"
    if "gain" in row:
        parts.append(f"gain {row['gain']:.2f}" + (f", bound {row['bound']:.2f}" if "bound" in row else ""))
    return "; ".join(parts)
