"""`coserve plan`: what training keeps and why, its peak memory stage by stage, the curve and the baselines.

Owns: arguments, the table, the JSON. Does not own: the figures (planning/estimate.py, compiler/baselines.py) or the picture
(plots.py).
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from coserve.compiler import baselines
from coserve.compiler.baselines import Baselines
from coserve.compiler.parallelize import Axes, TensorParallel, axis_name
from coserve.compiler.report import (
    LayerReport,
    RankAdapter,
    RanksReport,
    SharedLayers,
    adapter_on_ranks,
    embedding_bytes,
    label_bytes,
    layer_transfers,
    report,
    share_layers,
)
from coserve.config.data import ADAPTERS, adapter_of_kind, finetune_config_from_dict, size_field, to_dict
from coserve.config.settings import AdapterConfig, Compression
from coserve.config.values import AUTO, read_memory, require
from coserve.devices.prices import parallel_prices
from coserve.devices.table import DEVICES, find_device
from coserve.model.architecture import Architecture, read_architecture
from coserve.model.decoder import rank_architecture
from coserve.model.locate import locate_model
from coserve.peft.adapter import Adapter
from coserve.planning.budget import shape_adapter
from coserve.planning.estimate import PARTS, Estimate, Shape, estimate
from coserve.plots import memory_plan
from coserve.runtime.cache import block_bytes
from coserve.runtime.plans import layer_bypasses

console = Console(highlight=False)

PLOT_SUFFIXES = (".png", ".svg", ".pdf")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is to be trained; None is the default of the kind. rank: for a bottleneck its width. targets: modules' names, or
    "all-linear"."""

    kind: str
    rank: int | None
    targets: tuple[str, ...] | str | None
    dropout: float | None

    def settings(self) -> AdapterConfig:
        """The adapter's settings. Raises ConfigError, also for a setting that the kind doesn't have."""
        asked = {"rank": self.rank, "target_modules": self.targets, "dropout": self.dropout}
        words = {name: name for name in asked} | {"rank": size_field(adapter_of_kind(self.kind, {}, {})) or "r"}
        return adapter_of_kind(self.kind, {word: value for word, value in asked.items() if value is not None}, words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """Everything that is shown. num_parameters: of the whole adapter. limit: of the total, as it was asked for. seconds: that
    planning took, without baselines."""

    model: str
    shape: Shape
    num_parameters: int
    kind: str
    settings: AdapterConfig
    dtype: str
    limit: str
    compression: Compression
    estimate: Estimate
    kept: tuple[LayerReport, ...]
    ranks: RanksReport | None
    baselines: Baselines
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRanks:
    """How many devices share the model, which ones (`find_device`), and where parameters of the adapter must lie
    (`read_axes`)."""

    size: int = 1
    device: str = "H100"
    adapter: str = ""


AXES = {axis_name(axis): axis for axis in (None, 0, 1)}
"""Where a parameter may lie, by name: on every rank, or split along its outputs or its inputs."""


def read_axes(text: str) -> Axes:
    """Placements written as PARAMETER=whole, out or in, joined by commas. Raises ConfigError."""
    read: dict[str, int | None] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, sign, axis = (piece.strip() for piece in part.partition("="))
        require(bool(sign) and axis in AXES, "adapter_sharding",
                f"{part!r} is not PARAMETER={' or '.join(AXES)}, as in q_proj.lora_A=whole")
        require(name not in read, "adapter_sharding", f"{name} is given twice")
        read[name] = AXES[axis]
    return read


class PlanCommand(TyperCommand):
    """Lets `--json` without a value mean standard output."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if "--json" in args:
            after = args.index("--json") + 1
            if after == len(args) or (args[after].startswith("-") and args[after] != "-"):
                args = [*args[:after], "-", *args[after:]]
        return super().parse_args(ctx, args)


def plan(
    model: Annotated[str | None, typer.Argument(help="Model (SmolLM2); config.json is enough.")] = None,
    adapter: Annotated[str, typer.Option(help=f"Kind of adapter: {', '.join(ADAPTERS)}.")] = "lora",
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="Rank (16), or width of a bottleneck (64).")] = None,
    target_modules: Annotated[str | None, typer.Option(help="all-linear, or names joined by commas (the kind's own).")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens of an example.")] = 1024,
    max_microbatch_tokens: Annotated[int | None, typer.Option(help="Tokens packed together (--sequence-length).")] = None,
    window_tokens: Annotated[int, typer.Option(help="Tokens per unit in the last stage and the curve.")] = 256,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}: bytes per element.")] = "float32",
    activation_memory: Annotated[
        str, typer.Option(help="Limit of the total: bytes (12.5GB), a share below 1 of the fastest plan's, or auto: none.")
    ] = AUTO,
    activation_compression: Annotated[
        str, typer.Option(help="none, lossless (sign bits) or fp8, which changes gradients a little.")
    ] = "lossless",
    tensor_parallel_size: Annotated[int, typer.Option(help="Devices that share the model.")] = 1,
    device: Annotated[
        str, typer.Option(help=f"What they are, for the choice of placements: {', '.join(DEVICES)}; or numbers; link=pcie4.")
    ] = "H100",
    adapter_sharding: Annotated[
        str, typer.Option(help="Where parameters must lie: q_proj.lora_A=whole,q_proj.lora_B=out (the cheapest).")
    ] = "",
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Leave transformers + peft out.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="[FILE|-]", help="Write the plan as JSON; - or nothing: standard output.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw stages and curve into this picture.")] = None,
) -> None:
    """What finetuning keeps from forward to backward, why, and how much memory it takes at which cost."""
    if plot is not None:
        check_output(plot, "plot", PLOT_SUFFIXES)
    if json_file not in (None, "-"):
        check_output(Path(str(json_file)), "json")
    targets: tuple[str, ...] | str | None = target_modules
    if target_modules is not None and target_modules != "all-linear":
        targets = tuple(name.strip() for name in target_modules.split(",") if name.strip())
    planned = make_plan(
        locate_model(model), Asked(kind=adapter, rank=rank, targets=targets, dropout=dropout), dtype=dtype,
        sequence_length=sequence_length, num_tokens=max_microbatch_tokens or sequence_length, window_tokens=window_tokens,
        limit=activation_memory, compression=activation_compression, with_baselines=not no_baselines,
        among=AskedRanks(size=tensor_parallel_size, device=device, adapter=adapter_sharding),
    )
    if json_file == "-":
        print(to_json(planned))
    else:
        show(planned)
    if json_file is not None and json_file != "-":
        Path(json_file).write_text(to_json(planned) + "\n")
    if plot is not None:
        picture = planned.baselines
        points = {"peft": picture.peft, "gradient checkpointing": picture.checkpointing}
        ratios = {"peft": 0.0, "gradient checkpointing": planned.estimate.checkpointing_flops_ratio}
        memory_plan(
            [(stage.name, stage.parts) for stage in planned.estimate.stages],
            [(point.total_bytes, point.extra_flops_ratio) for point in planned.estimate.curve],
            {name: (point.total_bytes, ratios[name]) for name, point in points.items() if point is not None},
            plot, title=title(planned),
        )


def check_output(path: Path, name: str, suffixes: Sequence[str] = ()) -> None:
    """Raises ConfigError for a file that can't be written, before anything is computed."""
    require(not suffixes or path.suffix in suffixes, name, f"the file's name must end in {', '.join(suffixes)}, got {path}")
    require(not path.is_dir(), name, f"{path} is a directory")
    require(path.parent.is_dir(), name, f"{path} can't be made, as there is no directory {path.parent}")


def make_plan(
    directory: Path, adapter: Asked, *, dtype: str, sequence_length: int, num_tokens: int, window_tokens: int, limit: str,
    compression: str = "lossless", with_baselines: bool, among: AskedRanks = AskedRanks(),
) -> Planned:
    """Plans training for a model directory. limit: of the total, for `read_memory`; compression: as
    FinetuneConfig.activation_compression. among: how many devices share the model. Raises ConfigError, CapacityError."""
    settings = adapter.settings()
    require(dtype in DTYPES, "dtype", f"must be {', '.join(DTYPES)}, got {dtype!r}")
    for name, value in (("sequence_length", sequence_length), ("window_tokens", window_tokens)):
        require(value >= 1, name, f"must be at least 1, got {value}")
    require(num_tokens >= sequence_length, "max_microbatch_tokens",
            f"{num_tokens} is less than one sequence of {sequence_length} tokens")
    start = time.perf_counter()
    arch = read_architecture(directory)
    empty = shape_adapter(arch, settings)
    bypasses = layer_bypasses(arch, empty, dropout=empty.dropout)
    window_tokens = min(window_tokens, num_tokens)
    ranks = _ranks(arch, among, empty, DTYPES[dtype].itemsize, window_tokens, num_tokens)
    layers = () if ranks is None else share_layers(ranks, arch, bypasses)
    elements = {(p.layer, p.name): p.shape[0] * p.shape[1] for p in empty.parameters}
    own = RankAdapter(empty.flat.numel(), 0) if ranks is None else adapter_on_ranks(ranks.size, layers, elements)
    shape = Shape(
        arch=arch, itemsize=DTYPES[dtype].itemsize, num_tokens=num_tokens, sequence_length=sequence_length,
        window_tokens=window_tokens, num_parameters=own.num_parameters, ranks=ranks,
    )
    stored = finetune_config_from_dict({"activation_compression": compression}).activation_compression
    result = estimate(shape, bypasses, read_memory(limit), compression=stored)
    kept = report(result.plan, itemsize=shape.itemsize)
    shared = None
    if ranks is not None:
        shared = RanksReport(
            size=ranks.size, layers=layers, transfers=layer_transfers(ranks, result.plan), adapter=own,
            embedding_bytes=embedding_bytes(ranks, arch), label_bytes=label_bytes(ranks, arch),
        )
    seconds = time.perf_counter() - start
    beside = Baselines(peft=None, checkpointing=None, reason="left out (--no-baselines)")
    if with_baselines:
        beside = baselines.measure(
            directory, adapter=adapter.kind, rank=_rank(settings), targets=_targets(settings), dtype=DTYPES[dtype],
            sequence_length=sequence_length, num_tokens=num_tokens, dropout=getattr(settings, "dropout", 0.0),
        )
    return Planned(
        model=directory.name, shape=shape, num_parameters=empty.flat.numel(), kind=adapter.kind, settings=settings,
        dtype=dtype, limit=limit,
        compression=stored, estimate=result, kept=kept, ranks=shared, baselines=beside, seconds=seconds,
    )


def _ranks(
    arch: Architecture, asked: AskedRanks, adapter: Adapter, itemsize: int, window_tokens: int, num_tokens: int
) -> TensorParallel | None:
    """The group that shares the model, if several devices do. Raises ConfigError."""
    forced = read_axes(asked.adapter)
    if asked.size == 1:
        require(not forced, "adapter_sharding", "needs a tensor_parallel_size above 1")
        return None
    rank_architecture(arch, asked.size)
    known = dict.fromkeys(p.name for p in adapter.parameters)
    for name in forced:
        require(name in known, "adapter_sharding", f"no parameter is called {name!r}; these exist: {', '.join(known)}")
    prices = parallel_prices(
        find_device(asked.device), itemsize=itemsize, window_tokens=window_tokens,
        step_tokens=num_tokens,
    )
    return TensorParallel(size=asked.size, kv_heads=arch.num_kv_heads, prices=prices, forced=forced)


def _rank(settings: AdapterConfig) -> int:
    """An adapter's rank, or a bottleneck's width; 0 for a kind that has neither."""
    field = size_field(settings)
    return 0 if field is None else getattr(settings, field)


def _targets(settings: AdapterConfig) -> tuple[str, ...] | str:
    return getattr(settings, "target_modules", ())


def title(planned: Planned) -> str:
    """The training in one line."""
    settings, shape = planned.settings, planned.shape
    targets = _targets(settings)
    sites = targets if isinstance(targets, str) else ", ".join(targets)
    size = f" r{_rank(settings)}" if _rank(settings) else ""
    stored = ", kept values in fp8" if planned.compression == "fp8" else ""
    among = f", one of {shape.ranks.size} ranks" if shape.ranks is not None else ""
    return (
        f"{planned.model}: {planned.kind}{size}{f' on {sites}' if sites else ''}, {planned.dtype}, micro-batch of "
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
        "window_tokens": shape.window_tokens, "dtype": planned.dtype, "limit": planned.limit,
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
        "num_parameters_per_rank": ranks.adapter.num_parameters,
        "bytes_sent_per_optimizer_step": ranks.adapter.step_bytes,
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
    evenly, as tensor parallelism does. coserve runs on one."""
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
    say(f"{ranks.adapter.num_parameters} of {planned.num_parameters} parameters,",
        f"{size_text(ranks.adapter.step_bytes)} of gradients sent per optimizer step;",
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
