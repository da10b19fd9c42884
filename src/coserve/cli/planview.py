"""A plan for people and for programs: the tables on the terminal, and the JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from coserve.cli.planned import Planned, rank_of, targets_of
from coserve.compiler import baselines
from coserve.compiler.parallelize import axis_name
from coserve.compiler.report import LayerReport, RanksReport, SharedLayers
from coserve.config.data import to_dict
from coserve.model.architecture import Architecture
from coserve.planning.estimate import PARTS, Shape
from coserve.runtime.cache import block_bytes

console = Console(highlight=False)


def title(planned: Planned) -> str:
    """The training in one line."""
    settings, shape = planned.settings, planned.shape
    targets = targets_of(settings)
    sites = targets if isinstance(targets, str) else ", ".join(targets)
    size = f" r{rank_of(settings)}" if rank_of(settings) else ""
    stored = ", kept values in fp8" if planned.compression == "fp8" else ""
    coded = "" if planned.quantization == "none" else f" with matrices in {planned.quantization}"
    among = f", one of {shape.ranks.size} ranks" if shape.ranks is not None else ""
    return (
        f"{planned.model}: {planned.kind}{size}{f' on {sites}' if sites else ''}, {planned.dtype}{coded}, micro-batch of "
        f"{shape.num_tokens} tokens, windows of {shape.window_tokens}{stored}{among}"
    )


# --- JSON ---


def to_json(planned: Planned) -> str:
    """The whole plan. Sizes are in bytes. Ratios compare matrix FLOPs that run again with those of forward and backward.
    kv_cache: what serving keeps for a token of a request."""
    result, shape, beside = planned.estimate, planned.shape, planned.baselines
    return json.dumps({
        "model": planned.model,
        "adapter": {"kind": planned.kind, "num_parameters": planned.num_parameters, **to_dict(planned.settings)},
        "sequence_length": shape.sequence_length, "max_microbatch_tokens": shape.num_tokens,
        "window_tokens": shape.window_tokens, "dtype": planned.dtype, "quantization": planned.quantization,
        "limit": planned.limit,
        "activation_compression": planned.compression,
        "stages": [
            {"name": stage.name, "bytes_per_token": stage.bytes_per_token, "total_bytes": stage.total_bytes,
             "extra_flops_ratio": stage.extra_flops_ratio, "parts": stage.parts, "note": stage.note}
            for stage in result.stages
        ],
        "kept": [asdict(entry) for entry in planned.kept],
        "curve": [asdict(point) for point in result.curve],
        "baselines": _baselines_json(planned) if beside.reason is None else {"absent": beside.reason},
        "activation_memory": result.in_flight_bytes,
        "tensor_parallel_size": 1 if planned.ranks is None else planned.ranks.size,
        "ranks": None if planned.ranks is None else _ranks_json(planned.ranks),
        "kv_cache": {
            "bytes_per_token": kv_bytes(shape.arch, shape.itemsize),
            "bytes_per_token_per_rank": {str(ranks): size for ranks, size in kv_bytes_by_ranks(shape).items()},
        },
        "beside_every_total": result.apart,
        "seconds": {"plan": planned.seconds, "baselines": beside.seconds},
    }, indent=1)


def _ranks_json(ranks: RanksReport) -> dict[str, Any]:
    """parameters: where each lies. candidates: by site, the chosen one first. transfers: what each rank sends per token."""
    return {
        "num_parameters_per_rank": ranks.num_parameters,
        "bytes_sent_per_optimizer_step": ranks.step_bytes,
        "bytes_sent_per_token_for_embeddings": ranks.embedding_bytes,
        "bytes_sent_per_label": ranks.label_bytes,
        "layers": [
            {
                "layers": shared.layers,
                "parameters": {
                    name: {"axis": axis_name(sharding.axis), "parts": sharding.parts, "gradient_summed": sharding.summed}
                    for name, sharding in shared.shardings.items()
                },
                "candidates": {
                    site: [
                        {"parameters": {name: axis_name(axis) for name, axis in candidate.axes.items()},
                         "seconds_per_window": candidate.seconds}
                        for candidate in candidates
                    ]
                    for site, candidates in shared.candidates.items()
                },
            }
            for shared in ranks.layers
        ],
        "transfers": [asdict(entry) for entry in ranks.transfers],
    }


def _baselines_json(planned: Planned) -> dict[str, Any]:
    beside = planned.baselines
    assert beside.peft is not None and beside.checkpointing is not None
    ratio = planned.estimate.checkpointing_flops_ratio
    common = {"method": baselines.METHOD, "attention_path": baselines.ATTENTION_PATH}
    return {
        "peft": {**asdict(beside.peft), "extra_flops_ratio": 0.0, **common},
        "checkpointing": {**asdict(beside.checkpointing), "extra_flops_ratio": ratio, **common},
    }


def kv_bytes(arch: Architecture, itemsize: int) -> int:
    """K and V of one token in all layers."""
    return block_bytes(arch, 1, itemsize)


def kv_bytes_by_ranks(shape: Shape) -> dict[int, int]:
    """{ranks: bytes of a token on each of them}, for every number of ranks among which the key-value heads can be shared out
    evenly, as tensor parallelism does. coserve serves on one."""
    arch, heads = shape.arch, shape.arch.num_kv_heads
    return {ranks: kv_bytes(arch, shape.itemsize) // ranks for ranks in range(1, heads + 1) if heads % ranks == 0}


# --- the terminal ---


def size_text(num_bytes: float) -> str:
    """15.34 GB, 721.3 MB, 480 kB."""
    if num_bytes >= 1e9:
        return f"{num_bytes / 1e9:.2f} GB"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:.0f} kB"


def say(*clauses: str, head: str = "", style: str | None = None) -> None:
    """Prints clauses in one line behind a bold head. If the line is too wide for the terminal, it is broken between two clauses
    and continued with an indent; only a clause that is itself too wide is broken inside. Clauses bring their own commas."""
    rows, width = [head], console.width
    for clause in clauses:
        joined = f"{rows[-1]} {clause}" if rows[-1] else clause
        if len(joined) <= width:
            rows[-1] = joined
        else:
            rows += textwrap.wrap(clause, width, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    for row in rows:
        bold = head if row.startswith(head) else ""
        console.print(f"[bold]{bold}[/bold]{row[len(bold):]}" if bold else row, style=style, soft_wrap=True)


def listed(items: Sequence[str]) -> list[str]:
    """The items, with a comma behind each but the last."""
    return [f"{item}," for item in items[:-1]] + list(items[-1:])


def show(planned: Planned) -> None:
    """Tables of what is kept, of stages and baselines, and the curve."""
    result = planned.estimate
    say(*listed(title(planned).split(", ")), style="bold")
    if planned.ranks is not None:
        _show_ranks(planned, planned.ranks)
    for entry in planned.kept:
        _show_kept(entry)
    table = Table("stage", "kept", *PARTS[1:], "total", "FLOPs", box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for stage in result.stages:
        sizes = (size_text(size) for size in (*(stage.parts[name] for name in PARTS), stage.total_bytes))
        table.add_row(stage.name, *sizes, f"+{stage.extra_flops_ratio:.1%}")
    console.print(table)
    for stage in result.stages:
        say(f"{stage.note};", f"{stage.bytes_per_token} bytes kept per token", head=f"{stage.name}:")
    say(*listed([f"{name} {size_text(size)}" for name, size in result.apart.items()]), head="beside every total:")
    _show_curve(planned)
    _show_baselines(planned)
    say(f"{result.plan.arena_bytes} bytes kept per token,", f"{result.plan.work_bytes} bytes of workspace per row of a window",
        head="whole model:")
    shared = [f"{size} on each of {ranks} ranks" for ranks, size in kv_bytes_by_ranks(planned.shape).items() if ranks > 1]
    cache = [f"{kv_bytes(planned.shape.arch, planned.shape.itemsize)} bytes per token of a request", *shared]
    say(*listed(cache), head="KV cache:")
    say(f"a job with activation_memory = {result.in_flight_bytes} gets this plan;", f"planned in {planned.seconds:.1f} s")


def _show_ranks(planned: Planned, ranks: RanksReport) -> None:
    """Where parameters lie and why, what is sent, and what each rank has."""
    for shared in ranks.layers:
        _show_candidates(shared)
    for entry in ranks.transfers:
        table = Table("direction", "collective", "of", "bytes/token sent", "us/window")
        for each in entry.transfers:
            table.add_row(each.direction, each.op, each.value, str(each.num_bytes), f"{1e6 * each.seconds:.1f}")
        console.print(f"[bold]{_layers_text(entry.layers)}[/bold], what each rank sends")
        console.print(table)
    say(f"{ranks.embedding_bytes} bytes per token for embeddings,", f"{ranks.label_bytes} per label for the loss",
        head="each rank also sends:")
    say(f"{ranks.num_parameters} of {planned.num_parameters} parameters,",
        f"{size_text(ranks.step_bytes)} of gradients sent per optimizer step;",
        "bytes below are those of one rank", head="each rank's adapter:")


def _show_candidates(shared: SharedLayers) -> None:
    """One line per site and candidate, the chosen one first."""
    console.print(f"[bold]{_layers_text(shared.layers)}[/bold], where parameters lie on the ranks")
    table = Table("site", "parameters", "us/window", "")
    for site, candidates in shared.candidates.items():
        for number, candidate in enumerate(candidates):
            lie = ", ".join(f"{name.rsplit('.', 1)[1]} {axis_name(axis)}" for name, axis in candidate.axes.items())
            table.add_row(site if number == 0 else "", lie, f"{1e6 * candidate.seconds:.1f}", "chosen" if number == 0 else "")
    console.print(table)
    summed = [name for name, sharding in shared.shardings.items() if sharding.summed]
    say(*(listed(summed) or ["none"]), head="gradients summed over ranks at each optimizer step:")


def _layers_text(layers: Sequence[int]) -> str:
    """'layer 3', 'layers 0 to 5', 'layers 0 to 5, 3 of them'."""
    first, last = layers[0], layers[-1]
    apart = "" if len(layers) == last - first + 1 else f", {len(layers)} of them"
    return f"layers {first} to {last}{apart}" if last > first else f"layer {first}"


def _show_curve(planned: Planned) -> None:
    """Four columns, the cheapest plan first; --json has every byte."""
    points = [(size_text(point.total_bytes), f"+{point.extra_flops_ratio:.1%}") for point in planned.estimate.curve]
    rows = -(-len(points) // 4)
    say("total and matrix FLOPs run again, each column downwards", head="curve:")
    grid = Table(*("", "") * (-(-len(points) // rows)), box=None, show_header=False, pad_edge=True)
    for row in range(rows):
        grid.add_row(*(cell for point in points[row::rows] for cell in point))
    console.print(grid)


def _show_kept(entry: LayerReport) -> None:
    console.print(f"[bold]{_layers_text(entry.layers)}[/bold]")
    table = Table("kept value", "elements", "bytes/token", "why")
    for value in entry.kept:
        table.add_row(value.name, str(value.width), str(value.num_bytes), value.reason)
    console.print(table)
    say(*(listed(entry.recomputed) or ["nothing"]), head="made again:")
    say(*(listed(entry.products) or ["none"]), head="matrix products run again:")
    say(f"{entry.all_bytes} for every forward value,", f"{entry.read_bytes} read by the pruned backward,",
        f"{entry.arena_bytes} kept", head="bytes per token and layer:")


def _show_baselines(planned: Planned) -> None:
    beside = planned.baselines
    if beside.peft is None or beside.checkpointing is None:
        say(str(beside.reason), head="baselines:")
        return
    theirs, extra = beside.checkpointing, planned.estimate.checkpointing_flops_ratio
    say(f"saves {size_text(beside.peft.total_bytes)} at no extra FLOPs,",
        f"with gradient checkpointing {size_text(theirs.total_bytes)} at {extra:.1%};", f"took {beside.seconds:.1f} s",
        head="peft" if planned.ranks is None else "peft, on one device,")
    say(f"{baselines.METHOD};", head="method:")
    say(baselines.ATTENTION_PATH, head="attention:")
