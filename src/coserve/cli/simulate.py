"""`coserve bench simulate`: arguments, progress display, and the files of results.

Owns: how a simulation is written in flags. Does not own: what is simulated (bench/simulate.py), the devices (devices/).
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from coserve.bench.arrivals import ArrivalConfig
from coserve.bench.report import make_page
from coserve.bench.results import make_results, result_head
from coserve.bench.simulate import ALONE, Simulation, SimulationConfig, machine_facts
from coserve.bench.simulated import SimulatedMachine, make_machine
from coserve.bench.workload import endless_job
from coserve.cli.planned import Asked
from coserve.cli.settings import read_numbers
from coserve.config.data import ADAPTERS
from coserve.config.settings import POLICIES, EngineConfig, FinetuneConfig, SchedulerConfig
from coserve.config.values import AUTO, require
from coserve.devices.table import DEVICES, Device, find_device
from coserve.machine import versions
from coserve.model.architecture import read_architecture
from coserve.model.locate import locate_model
from coserve.simulation.disturbance import Disturbance

console = Console(highlight=False)

LARGEST_MODEL_LEN = 8192
"""Most tokens of a prompt and its output together."""
_BASE = SimulationConfig()


def simulate(
    model: Annotated[str, typer.Argument(help="Model: a directory, a hub id, or a config.json, which is all that is read.")],
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)}; with other numbers: h100,efficiency=0.4; or numbers.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for results and their page.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    tpot_ms: Annotated[float, typer.Option(help="Objective: milliseconds per token.")] = _BASE.tpot_ms,
    ttft_ms: Annotated[float, typer.Option(help="Objective: milliseconds to the first token.")] = _BASE.ttft_ms,
    rates: Annotated[str, typer.Option(help="Requests per second, joined by commas.")] = "1,5,10,20",
    policies: Annotated[str, typer.Option(help=f"Joined by commas: {', '.join(POLICIES)}.")] = ",".join(_BASE.policies),
    duration: Annotated[float, typer.Option(help="Simulated seconds over which the counted requests come.")] = _BASE.duration,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths, noise and stalls.")] = 0,
    arrivals: Annotated[str, typer.Option(help="poisson, gamma:CV or trace:FILE.")] = "poisson",
    prompt_tokens: Annotated[int, typer.Option(help="Mean length of prompts.")] = _BASE.arrivals.prompt_tokens,
    output_tokens: Annotated[int, typer.Option(help="Mean length of outputs.")] = _BASE.arrivals.output_tokens,
    length_spread: Annotated[
        float, typer.Option(help="Standard deviation of the logarithm of lengths; 0: all are equal.")
    ] = _BASE.arrivals.length_spread,
    length_scale: Annotated[float | None, typer.Option(help="A trace's own lengths times this, not those above.")] = None,
    capacity: Annotated[float | None, typer.Option(help="Requests/s that inference alone holds (searched for).")] = None,
    finetune_tokens: Annotated[int, typer.Option(help="Tokens of a training example.")] = 8192,
    finetune_batch: Annotated[int, typer.Option(help="Training examples per optimizer step.")] = 8,
    max_microbatch_tokens: Annotated[
        int | None, typer.Option(help="Training tokens packed together (--finetune-tokens).")
    ] = None,
    activation_memory: Annotated[
        str, typer.Option(help="Of a micro-batch: bytes (12.5GB), a share of the most, or auto: as much as fits.")
    ] = AUTO,
    adapter: Annotated[str, typer.Option(help=f"Kind of adapter: {', '.join(ADAPTERS)}.")] = "lora",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank (16), or width of a bottleneck (64).")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="all-linear, or names joined by commas (LoRA: down_proj; others: the kind's own).")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Requests that run at once.")] = 512,
    max_microbatches: Annotated[
        int | None, typer.Option(help="Micro-batches in flight at once, memory permitting (as many as save time).")
    ] = None,
    cuda_graphs: Annotated[
        bool, typer.Option("--cuda-graphs", help="Iterations that only decode are CUDA graphs: 0.3 ms to start, not 1.5.")
    ] = False,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of a device's memory that is used.")] = 0.9,
    efficiency: Annotated[float | None, typer.Option(help="Share of peak FLOP/s that products reach (the device's).")] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of iterations' relative error.")] = 0.0,
    stalls: Annotated[float, typer.Option(help="Share of iterations that stall.")] = 0.0,
    stall_factor: Annotated[float, typer.Option(help="How many times as long those take.")] = 10.0,
    slope: Annotated[float, typer.Option(help="True cost of rows, as a multiple of what the scheduler believes.")] = 1.0,
    host_ms: Annotated[float, typer.Option(help="Milliseconds that the host adds to each iteration, unknown to it too.")] = 0.0,
    explain: Annotated[
        int | None, typer.Option(metavar="N", help="Print the decision of iteration N of the first policy and rate, no more.")
    ] = None,
) -> None:
    """Inference and finetuning on a device that is not at hand: the real scheduler on a virtual clock, under the device's law.

    A simulation by arithmetic on a stated law, not a measurement.
    """
    config = SimulationConfig(
        policies=_names(policies), rates=read_numbers(rates, "rates", float), duration=duration, seed=seed,
        arrivals=ArrivalConfig(
            kind=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens, length_scale=length_scale,
            length_spread=0.0 if length_scale is not None else length_spread, max_tokens=LARGEST_MODEL_LEN,
        ),
        ttft_ms=ttft_ms, tpot_ms=tpot_ms, capacity=capacity,
    )
    require(finetune_tokens >= 1, "finetune_tokens", f"must be at least 1, got {finetune_tokens}")
    require(finetune_batch >= 1, "finetune_batch", f"must be at least 1, got {finetune_batch}")
    require(explain is None or explain >= 0, "explain", f"must be the number of an iteration, from 0, got {explain}")
    found = find_device(device)
    if efficiency is not None:
        found = replace(found, efficiency=efficiency)
    directory = _model_directory(model)
    machine = make_machine(
        read_architecture(directory), found, tensor_parallel_size,
        _job(finetune_batch, max_microbatch_tokens or finetune_tokens, activation_memory, adapter, rank, target_modules),
        EngineConfig(scheduler=SchedulerConfig(
            tpot_ms=tpot_ms, ttft_ms=ttft_ms, max_num_seqs=max_num_seqs, max_microbatches=max_microbatches)),
        Disturbance(noise=noise, stall_share=stalls, stall_factor=stall_factor, slope=slope, host_s=host_ms / 1e3, seed=seed),
        [finetune_tokens] * finetune_batch, gpu_memory_utilization, captured=cuda_graphs,
    )
    if explain is not None:
        for line in Simulation(config, machine).explain(config.policies[0], config.rates[0], explain):
            console.print(line, markup=False, soft_wrap=True)
        return
    console.print(f"{directory.name} on {_devices(found, tensor_parallel_size)}: {machine.planned().plan}", markup=False,
                  soft_wrap=True, style="dim")
    result = {
        **result_head(f"{_devices(found, tensor_parallel_size)} (simulated)", versions()),
        **_results(config, machine, directory.name),
        "simulation": {
            "devices": _devices(found, tensor_parallel_size), "device": asdict(found), **machine_facts(machine),
        },
    }
    for row in result["results"]:
        row["device"] = found.name
        console.print(summary_line(row), markup=False, soft_wrap=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "simulate.json").write_text(json.dumps(result, indent=1) + "\n")
        (output / "simulate.html").write_text(make_page(result), encoding="utf-8")
        print(f"results in {output / 'simulate.json'}, page in {output / 'simulate.html'}")


# --- from flags ---


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _model_directory(model: str) -> Path:
    """The directory of a model. A path to its config.json is taken too."""
    path = Path(model).expanduser()
    return path.absolute().parent if path.name == "config.json" and path.is_file() else locate_model(model)


def _job(
    batch_size: int, max_microbatch_tokens: int, activation_memory: str, kind: str, rank: int | None, targets: str | None
) -> FinetuneConfig:
    names: tuple[str, ...] | str | None = targets
    if targets is not None and targets != "all-linear":
        names = _names(targets)
    elif targets is None and kind == "lora":
        names = ("down_proj",)
    settings = Asked(kind=kind, rank=rank, targets=names, dropout=None).settings()
    job = endless_job(batch_size, max_microbatch_tokens).with_adapter(settings)
    return replace(job, activation_memory=activation_memory)


# --- results ---


def _results(config: SimulationConfig, machine: SimulatedMachine, model: str) -> dict[str, Any]:
    """All runs, with a bar per run on a terminal and a line elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def listen(label: str, done: float) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=1.0)
                if not console.is_terminal:
                    console.print(f"simulates {label}", markup=False, style="dim")
            progress.update(tasks[label], completed=done)

        simulation = Simulation(config, machine, listen)
        measured = simulation.measure()
    result = make_results(measured, config, model)
    simulation.add_to_rows(result["results"], measured)
    return result


def _devices(device: Device, size: int) -> str:
    return device.name if size == 1 else f"{size} x {device.name}"


def summary_line(row: dict[str, Any]) -> str:
    """A row of results for the terminal."""
    if row["policy"] == ALONE:
        return f"finetuning alone: {row['finetune_tokens_per_s']:.0f} tokens/s"
    parts = [f"{row['policy']} at {row['rate']:g} requests/s ({row['load']:.0%} of capacity)"]
    if row.get("beyond_capacity"):
        parts[0] += ", beyond capacity"
    if "slo_attainment" in row:
        parts.append(f"{row['slo_attainment']:.1%} of {row['num_requests']} requests in time")
    if "finetune_tokens_per_s" in row:
        bound = row["bound_tokens_per_s"]
        of_bound = f", {row['finetune_tokens_per_s'] / bound:.0%} of the bound" if bound >= 1 else ""
        parts.append(f"{row['finetune_tokens_per_s']:.0f} finetuning tokens/s{of_bound}")
    if "fused_share" in row:
        parts.append(f"{row['fused_share']:.0%} of forward rows rode in a pass")
    return "; ".join(parts)
