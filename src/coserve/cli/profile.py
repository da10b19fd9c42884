"""`coserve profile`: what rows and units cost on this machine, and how far a roofline explains it.

Owns: arguments, the tables, the JSON. Does not own: measuring and fitting (profiling/), a device's law and its fit (devices/).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from coserve.cli.plan import check_output
from coserve.cli.planview import size_text
from coserve.cli.settings import QuantizationOption, RanksOption
from coserve.config.settings import EngineConfig
from coserve.core import Contents, PassCost, UnitCost
from coserve.devices.law import device_law, ridge_rows
from coserve.devices.refit import ALL, Agreement, agreement, mean_points, refit
from coserve.devices.table import Device, device_text
from coserve.engine.engine import Engine
from coserve.machine import device_name, versions
from coserve.profiling.fit import fit, sequence_length
from coserve.profiling.measure import machine_profile
from coserve.profiling.roofline import measured_device
from coserve.runtime.loaded import LoadedModel, dtype_name, load_model
from coserve.scheduler.latency import LatencyModel, kind_of

console = Console(highlight=False)
notes = Console(stderr=True, highlight=False)

BUSY = 0.5
"""Other work on more than this share of the cores makes measured times too long."""
FAILS = 0.25
"""A roofline fails for a kind of iteration whose median error is above this."""

LAWS = ("fit", "roofline", "refit")
"""fit: the law that the engine uses, fitted to the profile. roofline: with bandwidth, FLOP/s and their overlap measured, and
all other numbers as assumed for a GPU. refit: a roofline with all its numbers fitted to the profile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """Everything that is shown. busy_cores: the load average of a minute before the command, of num_cores. points: mean seconds
    of what was measured. devices: the roofline's and the refitted one, by name of the law."""

    model: LoadedModel
    busy_cores: float
    num_cores: int
    points: Mapping[Contents, float]
    laws: Mapping[str, LatencyModel]
    devices: Mapping[str, Device]

    @property
    def is_busy(self) -> bool:
        return self.busy_cores > BUSY * self.num_cores

    def agreements(self) -> dict[str, dict[str, Agreement]]:
        """{law: {kind: how it agrees with the points}}."""
        return {name: agreement(law, self.points) for name, law in self.laws.items()}


def profile(
    model: Annotated[str | None, typer.Argument(help="Model (SmolLM2).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    quantization: QuantizationOption = "none",
    tensor_parallel_size: RanksOption = 1,
    memory_bytes: Annotated[int | None, typer.Option(help="Of the pool that points run on, as in serve (a share).")] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even if there is a profile in the cache.")] = False,
    json_file: Annotated[
        str | None, typer.Option("--json", metavar="[FILE|-]", help="Write everything as JSON; - or nothing: standard output.")
    ] = None,
) -> None:
    """What rows and units cost on this machine, as `serve` measures it, beside a roofline of the device."""
    if json_file not in (None, "-"):
        check_output(Path(str(json_file)), "json")
    busy = os.getloadavg()[0]
    loaded = load_model(
        model, device=device, dtype=dtype, report=_note, tensor_parallel_size=tensor_parallel_size, quantization=quantization
    )
    profiled = make_profile(loaded, EngineConfig(memory_bytes=memory_bytes), busy_cores=busy, again=again, report=_note)
    if json_file == "-":
        print(to_json(profiled))
        return
    show(profiled)
    if json_file is not None:
        Path(json_file).write_text(to_json(profiled) + "\n")


def _note(line: str) -> None:
    notes.print(line, style="dim", soft_wrap=True)


def make_profile(
    model: LoadedModel, config: EngineConfig, *, busy_cores: float, again: bool, report: Callable[[str], None]
) -> Profiled:
    """Measures the machine, or reads its profile from the cache, and fits the laws. Raises ConfigError, CapacityError."""
    engine = Engine(model, config, latency=LatencyModel({}))  # nothing is predicted: no request comes
    try:
        samples = machine_profile(
            engine.device.make_profiler(engine.blocks), config.scheduler, model.fingerprint, report, anew=again
        )
    finally:
        engine.close()
    points, itemsize = mean_points(samples), model.dtype.itemsize
    measured = measured_device(model.weights)
    captured = model.device.type == "cuda" and config.cuda_graphs
    arch = model.weights.architecture  # what one of several ranks has; what they send is in no law
    devices = {"roofline": measured, "refit": refit(points, arch, measured, itemsize=itemsize, captured=captured)}
    laws = {name: device_law(arch, device, itemsize=itemsize, captured=captured) for name, device in devices.items()}
    laws["fit"] = fit(samples, gpu=model.device.type == "cuda")
    return Profiled(
        model=model, busy_cores=busy_cores, num_cores=os.cpu_count() or 1, points=points,
        laws={name: laws[name] for name in LAWS}, devices=devices,
    )


# --- words ---


def describe(contents: Contents) -> str:
    """What an iteration of a profile holds, such as '8 decoded after 512, 128 prefilled, 4 layers back over 256'."""
    parts = [] if contents.inference is None else _pass_words(contents.inference)
    parts += [_unit_words(unit) for unit in contents.units]
    if contents.optimizer_elements:
        parts.append(f"{contents.optimizer_elements} elements updated")
    return ", ".join(parts)


def _pass_words(cost: PassCost) -> list[str]:
    words = []
    if cost.decode_rows:
        words.append(f"{cost.decode_rows} decoded after {cost.decode_context // cost.decode_rows}")
    prefilled = cost.rows - cost.decode_rows - cost.fused_rows
    if prefilled:
        logits = " with logits" if cost.head_rows - cost.decode_rows > cost.prefill_spans else ""
        words.append(f"{_sequences(prefilled, cost.prefill_pairs)} prefilled{logits}")
    if cost.fused_rows:
        words.append(f"{_sequences(cost.fused_rows, cost.fused_pairs)} fused{' with labels' if cost.fused_labels else ''}")
    return words


def _unit_words(unit: UnitCost) -> str:
    layers = f"{unit.layers} layer{'s' if unit.layers > 1 else ''}"
    labels = " with labels" if unit.labels else ""
    return f"{layers} {'back' if unit.backward else 'forward'} over {_sequences(unit.rows, unit.pairs)}{labels}"


def _sequences(rows: int, pairs: int) -> str:
    """'512', or '8 x 64' for rows in several sequences."""
    length = sequence_length(rows, pairs)
    return f"{rows // length} x {length}" if 0 < length < rows else str(rows)


def failures(profiled: Profiled) -> list[str]:
    """Where the measured roofline is far off, a line for each kind of iteration."""
    return [
        f"{kind}: it predicts {found.ratio:.2f} of the measured time in the median, error {found.median:.0%}"
        for kind, found in profiled.agreements()["roofline"].items() if kind != ALL and found.median > FAILS
    ]


# --- JSON ---


def to_json(profiled: Profiled) -> str:
    """Everything. Times are in seconds, errors are shares of the measured time, `contents` is as core.Contents has it."""
    model = profiled.model
    return json.dumps({
        "model": model.name, "device": device_name(model.device), "dtype": dtype_name(model.dtype),
        "quantization": model.quantization, "threads": torch.get_num_threads(), "versions": versions(),
        "load_average": profiled.busy_cores, "cores": profiled.num_cores, "busy": profiled.is_busy,
        "points": [
            {"what": describe(contents), "kind": kind_of(contents), "contents": _contents_json(contents), "measured": seconds,
             **{name: law.seconds(contents) for name, law in profiled.laws.items()}}
            for contents, seconds in profiled.points.items()
        ],
        "agreement": {
            name: {kind: found._asdict() for kind, found in kinds.items()} for name, kinds in profiled.agreements().items()
        },
        "devices": {name: {**asdict(device), "text": device_text(device)} for name, device in profiled.devices.items()},
        "roofline_fails": failures(profiled),
    }, indent=1)


def _contents_json(contents: Contents) -> dict[str, Any]:
    return {
        "inference": None if contents.inference is None else contents.inference._asdict(),
        "units": [unit._asdict() for unit in contents.units], "optimizer_elements": contents.optimizer_elements,
    }


# --- the terminal ---


def show(profiled: Profiled) -> None:
    """Tables of points and of agreement, the device's numbers, and where a roofline fails."""
    model = profiled.model
    say(f"{model.name}, {dtype_name(model.dtype)}, {device_name(model.device)}, {torch.get_num_threads()} threads", bold=True)
    if profiled.is_busy:
        say(f"The machine was busy (load average {profiled.busy_cores:.1f} on {profiled.num_cores} cores): times are too long, "
            "and laws agree less. Measure again when it is idle, with --again.", style="yellow")
    console.print(_points_table(profiled))
    console.print(_agreement_table(profiled))
    roofline, fitted = profiled.devices["roofline"], profiled.devices["refit"]
    ridge = ridge_rows(roofline, itemsize=model.dtype.itemsize)
    say(f"roofline: {size_text(roofline.bandwidth)}/s and {roofline.flops / 1e9:.1f} GFLOP/s, measured on the model's "
        f"matrices; reading them takes as long as products of {ridge:.0f} rows, and {roofline.overlap:.0%} of one is hidden "
        "behind the other there; all other numbers are assumed")
    say(f"refit: {device_text(fitted)}")
    found = failures(profiled)
    if found:
        say(f"A roofline fails here by more than {FAILS:.0%}. It leaves out norms, adapters' products and copies of kept "
            "values, and its times of launches are a GPU's:", bold=True)
        for line in found:
            say(f"  {line}")


def say(text: str, *, bold: bool = False, style: str | None = None) -> None:
    console.print(text, style="bold" if bold else style, markup=False, soft_wrap=True)


def _points_table(profiled: Profiled) -> Table:
    """Measured milliseconds, and by how much each law is off."""
    table = _table("what an iteration holds", "measured", *LAWS)
    for contents, seconds in profiled.points.items():
        off = (f"{profiled.laws[name].seconds(contents) / seconds - 1:+.0%}" for name in LAWS)
        table.add_row(describe(contents), f"{seconds * 1e3:.1f} ms", *off)
    return table


def _agreement_table(profiled: Profiled) -> Table:
    """Median and 95th percentile of absolute errors by kind."""
    table = _table("kind", "points", *(f"{name} median, p95" for name in LAWS))
    agreements = profiled.agreements()
    for kind, first in agreements["fit"].items():
        table.add_row(
            kind, str(first.points),
            *(f"{agreements[name][kind].median:.0%}, {agreements[name][kind].p95:.0%}" for name in LAWS),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table
