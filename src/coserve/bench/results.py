"""Rows of results from finished runs.

Owns: pooling of repeats, shares, gain, the head of a result file. Does not own: the bound (machine.py). A key that was not
measured is absent. Requests of all repeats are pooled (attainment, its interval, latencies). Throughputs are medians over
repeats, and a finetuning share is the median of the ratios inside each repeat.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from coserve.bench.arrivals import parse_kind
from coserve.bench.burst import bin_series, read_burst
from coserve.bench.machine import MachineRecord, bound_keys, gain
from coserve.bench.metrics import meets, summarize
from coserve.bench.sharing import Cell, Measured, SharingConfig
from coserve.bench.simulate import SimulationConfig
from coserve.devices.bound import OfferedLoad


def result_head(device: str, versions: Mapping[str, str], program: str = "coserve") -> dict[str, Any]:
    """The keys with which a result file begins: where, when, with what, and the command. program: without its arguments."""
    now = datetime.datetime.now().astimezone().isoformat("T", "seconds")
    return {"device": device, "date": now, "versions": dict(versions), "command": f"{program} {shlex.join(sys.argv[1:])}"}


def make_results(measured: Measured, config: SharingConfig | SimulationConfig, model: str) -> dict[str, Any]:
    """The keys of the result file from `results` on: rows, and beside them what they were made from. A simulation's rows get
    their bound from what is simulated (simulate.py)."""
    machine = machine_of(measured)
    alone = {cell.repeat: cell.run.finetune_tokens_per_s for cell in measured.cells if cell.policy == "finetune-only"}
    groups: dict[tuple[float, str], list[Cell]] = {}
    for cell in measured.cells:
        groups.setdefault((cell.load, cell.policy), []).append(cell)
    kind, _, path = parse_kind(config.arrivals.kind)
    names = {"model": model, "trace": config.arrivals.kind if path is None else f"{kind}:{path.name}"}
    rows = [_row({"experiment": "sharing", **names}, cells, measured, alone) for cells in groups.values()]
    ratios = pass_ratios(measured.cells)
    if machine is not None:
        _add_bounds(rows, list(groups.values()), measured, alone, machine, ratios)
    rows += [_row({"experiment": "burst", **names, "trace": "burst"}, [cell], measured, {}) for cell in measured.bursts]
    data: dict[str, Any] = {
        "results": rows, "settings": asdict(config), "objectives": asdict(measured.objectives),
        "capacity": {"rate": measured.capacity, "tolerance": config.capacity_tolerance, "probes": [
            {"rate": p.rate, "num_requests": len(p.run.records), "gave_up": p.run.gave_up,
             "met": sum(meets(r, measured.objectives) for r in p.run.records)} for p in measured.probes
        ]},
        "repeats": [_repeat(cell, measured) for cell in measured.cells],
        "bursts": [_burst(cell, config) for cell in measured.bursts] if isinstance(config, SharingConfig) else [],
    }
    if measured.peer_ms is not None:
        data["peer_tpot_ms"] = measured.peer_ms
    if machine is not None:
        data |= {"machine": machine.to_dict(), "pass_ratios": ratios}
    return data


def machine_of(measured: Measured) -> MachineRecord | None:
    """The machine with a job on all of it, as the first run of finetuning alone has it; None where that isn't known."""
    found = (cell.run.machine for cell in measured.cells if cell.policy == "finetune-only")
    return next((machine for machine in found if machine is not None and machine.job is not None), None)


def pass_ratios(cells: Sequence[Cell]) -> dict[float, float]:
    """By load: how many times as long as the law says passes with requests only took, the median over runs."""
    found: dict[float, list[float]] = {}
    for cell in cells:
        if cell.run.machine is not None and cell.run.machine.pass_ratio is not None:
            found.setdefault(cell.load, []).append(cell.run.machine.pass_ratio)
    return {load: median(ratios) for load, ratios in found.items()}


def _add_bounds(
    rows: Sequence[dict[str, Any]], groups: Sequence[Sequence[Cell]], measured: Measured, alone: Mapping[int, float],
    machine: MachineRecord, ratios: Mapping[float, float],
) -> None:
    """Adds their bound to rows with requests. groups: each row's cells. ratios: of passes, by load."""
    for row, cells in zip(rows, groups, strict=True):
        records = [record for cell in cells for record in cell.run.records]
        if not records or not all(alone.get(cell.repeat) for cell in cells):
            continue
        load = OfferedLoad.of(row["rate"], [(record.prompt_tokens, len(record.token_times)) for record in records])
        alone_tokens = median(alone[cell.repeat] for cell in cells)
        bound = machine.bound(load, measured.objectives.tpot_ms / 1e3, alone_tokens, ratios.get(row["load"], 1.0))
        row |= bound_keys(row["rate"], measured.capacity, bound, alone_tokens, row.get("finetune_tokens_per_s"))


def _row(
    names: Mapping[str, str], cells: Sequence[Cell], measured: Measured, alone: Mapping[int, float]
) -> dict[str, Any]:
    first, slo = cells[0], measured.objectives
    row: dict[str, Any] = {**names, "policy": first.policy, "load": first.load}
    row |= {"tpot_slo_ms": slo.tpot_ms, "ttft_slo_ms": slo.ttft_ms}
    row |= {"rate": first.rate} if first.rate else {}
    records = [record for cell in cells for record in cell.run.records]
    row |= summarize(records, measured.objectives, sum(cell.run.window_s for cell in cells))
    if records:
        row["inference_tokens_per_s"] = median(cell.run.inference_tokens / cell.run.window_s for cell in cells)
    if first.policy != "inference-only":
        row["finetune_tokens_per_s"] = median(cell.run.finetune_tokens_per_s for cell in cells)
    share = 0.0 if first.policy == "inference-only" else None
    if first.policy != "inference-only" and all(alone.get(cell.repeat) for cell in cells):
        share = row["finetune_share"] = median(cell.run.finetune_tokens_per_s / alone[cell.repeat] for cell in cells)
    if share is not None and alone:
        row["gain"] = gain(row.get("goodput", 0.0), measured.capacity, share)
    riding = [cell.run.fused_share for cell in cells if cell.run.fused_share is not None]
    row |= {"fused_share": median(riding)} if riding else {}
    errors = prediction_errors([cell.run.prediction_errors for cell in cells])
    row |= {"prediction_errors": errors} if errors else {}
    peaks = [cell.run.peak_memory_bytes for cell in cells if cell.run.peak_memory_bytes is not None]
    return row | ({"peak_memory_bytes": max(peaks)} if peaks else {})


def prediction_errors(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """By kind of iteration: iterations of all runs, and the medians over runs of their median and p95 (relative errors)."""
    kinds = sorted({kind for run in runs for kind in run})
    return {
        kind: {
            "iterations": sum(run[kind]["iterations"] for run in runs if kind in run),
            **{name: median(run[kind][name] for run in runs if kind in run) for name in ("median", "p95")},
        }
        for kind in kinds
    }


def _repeat(cell: Cell, measured: Measured) -> dict[str, Any]:
    """One cell, for who wants to see the spread."""
    entry: dict[str, Any] = {"policy": cell.policy, "load": cell.load, "repeat": cell.repeat}
    if cell.policy != "inference-only":
        entry["finetune_tokens_per_s"] = cell.run.finetune_tokens_per_s
    if cell.run.records:
        entry["num_requests"] = len(cell.run.records)
        entry["met"] = sum(meets(record, measured.objectives) for record in cell.run.records)
    return entry


def _burst(cell: Cell, config: SharingConfig) -> dict[str, Any]:
    assert config.burst is not None
    series = bin_series(cell.run)
    start, end = config.burst.before_s, config.burst.before_s + config.burst.burst_s
    reading = read_burst(series, cell.run.records, start, end)
    found = {key: value for key, value in asdict(reading).items() if value is not None}
    place = {"policy": cell.policy, "rate": cell.rate, "burst_start_s": start, "burst_end_s": end}
    return {**place, **found, "series": asdict(series)}
