"""Every policy of sharing on the laws of two GPUs, by arithmetic: devices x objectives x rates x lengths of training examples.

    python bench/policy_grid.py [--devices a100 h100] [--tpot-ms 15 20 45 75] [--rates 1 5 10 20] [--examples 512 2048 8192]
        [--policies coserve layer-sliced temporal:16 temporal:64 dynamic-temporal] [--duration 60] [--workers 2]
        [--directory policy_grid] [--output bench/results/policy_grid.json]

Llama-3.1-8B in bfloat16 on one device, LoRA r16 on down_proj, eight examples per optimizer step. Requests are those of
`coserve bench simulate`: Poisson arrivals, log-normal lengths, `duration` simulated seconds, a TTFT objective of 5 s.
Predictions are exact, and memory is ample, so that only policies differ. The four cells in NAMED run with three seeds. They run
again with the device's own memory, where backward runs a part of forward again; and under a disturbance that the scheduler does
not know: noise of 5%, and one iteration in a hundred takes three times as long.

Finished cells are kept in `directory`. Prints a Markdown table with one line per cell. A policy is compared with coserve where
it has as many requests in time, to half a percentage point.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from coserve.bench.cells import CellStore
from coserve.bench.paper.cells import code_digest, finished, make_figures, training_machine
from coserve.bench.paper.models import TTFT_MS, read_shape
from coserve.bench.results import result_head
from coserve.bench.simulate import Simulation, SimulationConfig
from coserve.devices.table import find_device
from coserve.machine import versions
from coserve.simulation.disturbance import EXACT, Disturbance

MODEL = "Llama-3.1-8B"
COSERVE, SLICED = "coserve", "layer-sliced"
TOKENS = "finetune_tokens_per_s"
NAMED = (("h100", 15.0, 5.0, 8192), ("h100", 20.0, 5.0, 8192), ("h100", 20.0, 10.0, 8192), ("h100", 45.0, 5.0, 8192))
"""Device, TPOT objective in milliseconds, requests/s and tokens of an example of the cells that run with several seeds."""
SEEDS = (1, 2, 3)
EXACT_RUN, DISTURBED, OWN_MEMORY = "exact", "disturbed", "own memory"
"""Kinds of run."""
AMPLE = 4
"""Times the device's memory."""
EQUAL = 0.005
"""Two shares of requests in time that differ by less count as equal."""


class Place(NamedTuple):
    """What a cell of the grid is about: a device, an objective, a rate, the length of examples."""

    device: str
    tpot_ms: float
    rate: float
    example: int


class Case(NamedTuple):
    """One run."""

    place: Place
    policy: str
    seed: int
    kind: str


def cases(args: argparse.Namespace) -> list[Case]:
    """All runs; those of one machine follow one another."""
    grid = [
        Place(device, tpot_ms, rate, example)
        for device in args.devices for example in args.examples for tpot_ms in args.tpot_ms for rate in args.rates
    ]
    policies = dict.fromkeys((COSERVE, *args.policies))  # the others are compared with coserve
    found = [Case(place, policy, SEEDS[0], EXACT_RUN) for place in grid for policy in policies]
    for place in (Place(*place) for place in NAMED if Place(*place) in grid):
        found += [Case(place, policy, seed, kind) for kind in (EXACT_RUN, OWN_MEMORY) for policy in (COSERVE, SLICED)
                  for seed in SEEDS]
        found += [Case(place, COSERVE, seed, DISTURBED) for seed in SEEDS]
    return list(dict.fromkeys(found))


def run(case: Case, duration: float, directory: Path) -> dict[str, Any]:
    """The figures of a case, from its file or by simulation."""
    place = case.place
    settings = {**place._asdict(), "policy": case.policy, "seed": case.seed, "kind": case.kind, "duration": duration}
    store = CellStore(directory, {"code": code_digest()}, lambda label, stored: None)
    return {**settings, **store.get(f"{place.device}-{case.policy}", settings, lambda: simulate(case, duration))}


def simulate(case: Case, duration: float) -> dict[str, Any]:
    """One run on a fresh machine."""
    name, tpot_ms, rate, example = case.place
    device = find_device(name)
    if case.kind != OWN_MEMORY:
        device = replace(device, memory_bytes=AMPLE * device.memory_bytes)
    rough = Disturbance(noise=0.05, stall_share=0.01, stall_factor=3.0, seed=case.seed)
    machine = training_machine(read_shape(MODEL), device, 1, tpot_ms, example, rough if case.kind == DISTURBED else EXACT)
    simulation = Simulation(SimulationConfig(
        policies=(case.policy,), rates=(rate,), duration=duration, seed=case.seed, ttft_ms=TTFT_MS, tpot_ms=tpot_ms,
        capacity=rate,
    ), machine)
    began = time.perf_counter()
    found = make_figures(simulation.beside(case.policy, rate), simulation)
    return {**found, "bound_tokens_per_s": simulation.bound(rate), "wall_s": time.perf_counter() - began}


def run_all(todo: Sequence[Case], duration: float, directory: Path, workers: int) -> dict[Case, dict[str, Any]]:
    """All cases, in as many processes as `workers`."""
    rows: dict[Case, dict[str, Any]] = {}
    for case, row in finished(todo, functools.partial(run, duration=duration, directory=directory), workers):
        rows[case] = row
        print(f"{len(rows)} of {len(todo)}: {describe(case, row)}", flush=True)
    return {case: rows[case] for case in todo}


def describe(case: Case, row: dict[str, Any]) -> str:
    place = case.place
    return (
        f"{place.device}, {place.tpot_ms:g} ms, {place.rate:g}/s, examples of {place.example}, {case.policy}, "
        f"seed {case.seed}, {case.kind}: {row[TOKENS]:.0f} tokens/s, "
        f"{row['slo_attainment']:.1%} in time"
    )


def compare(rows: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per place, of its undisturbed runs with the first seed."""
    lines = []
    for place in dict.fromkeys(case.place for case in rows):
        by_policy = {case.policy: row for case, row in rows.items()
                     if case.place == place and case.seed == SEEDS[0] and case.kind == EXACT_RUN}
        own, sliced = by_policy[COSERVE], by_policy.get(SLICED)
        tokens, attained = own[TOKENS], own["slo_attainment"]
        rivals = {policy: row[TOKENS] for policy, row in by_policy.items()
                  if policy != COSERVE and row["slo_attainment"] >= attained - EQUAL}
        best = max(rivals, key=rivals.__getitem__, default=None)
        lines.append({
            **place._asdict(), "slo_attainment": attained, TOKENS: tokens,
            "of_bound": ratio(tokens, own["bound_tokens_per_s"]),
            "over_layer_sliced": None if sliced is None else ratio(tokens, sliced[TOKENS]),
            "best_rival": best, "over_best_rival": None if best is None else ratio(tokens, rivals[best]),
            "fused_share": own.get("fused_share"),
        })
    return lines


def ratio(over: float, under: float) -> float | None:
    return over / under if under >= 1 else None


def seeds_of(rows: dict[Case, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per place that ran with several seeds: means over them, ratios of each, the least shares in time."""
    lines = []
    for place in dict.fromkeys(case.place for case in rows if case.kind == DISTURBED):

        def figure(name: str, kind: str, policy: str = COSERVE, place: Place = place) -> list[float]:
            return [rows[Case(place, policy, seed, kind)][name] for seed in SEEDS]

        def over_sliced(kind: str) -> list[float]:
            pairs = zip(figure(TOKENS, kind), figure(TOKENS, kind, SLICED), strict=True)
            return [own / sliced for own, sliced in pairs]

        lines.append({
            **place._asdict(), "over_layer_sliced": over_sliced(EXACT_RUN),
            "over_layer_sliced_in_own_memory": over_sliced(OWN_MEMORY),
            **{f"{TOKENS}, {kind}": mean(figure(TOKENS, kind)) for kind in (EXACT_RUN, OWN_MEMORY, DISTURBED)},
            **{f"slo_attainment, {kind}": min(figure("slo_attainment", kind)) for kind in (EXACT_RUN, OWN_MEMORY, DISTURBED)},
            "of_bound": mean(figure(TOKENS, EXACT_RUN)) / mean(figure("bound_tokens_per_s", EXACT_RUN)),
            "disturbed_over_exact": mean(figure(TOKENS, DISTURBED)) / mean(figure(TOKENS, EXACT_RUN)),
        })
    return lines


def table(lines: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""

    def show(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    names = (
        "device", "objective, requests/s, example", "in time", "tokens/s", "of the bound", "/ layer-sliced", "/ best other"
    )
    rows: list[Sequence[str]] = [names, ["---"] * len(names)]
    for line in lines:
        place = f"{line['tpot_ms']:g} ms, {line['rate']:g}/s, {line['example']:,}"
        rival = f"{show(line['over_best_rival'], '.3f')} ({line['best_rival'] or 'none'})"
        rows.append([
            line["device"], place, f"{line['slo_attainment']:.1%}", f"{line[TOKENS]:,.0f}",
            show(line["of_bound"], ".0%"), show(line["over_layer_sliced"], ".3f"), rival,
        ])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--devices", nargs="+", default=["a100", "h100"])
    parser.add_argument("--tpot-ms", nargs="+", type=float, default=[15.0, 20.0, 45.0, 75.0])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 5.0, 10.0, 20.0])
    parser.add_argument("--examples", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--policies", nargs="+", default=[COSERVE, SLICED, "temporal:16", "temporal:64", "dynamic-temporal"])
    parser.add_argument("--duration", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=Path("policy_grid"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "policy_grid.json")
    args = parser.parse_args()
    began = time.perf_counter()
    rows = run_all(cases(args), args.duration, args.directory, args.workers)
    lines, seeds = compare(rows), seeds_of(rows)
    print(table(lines))
    for line in seeds:
        print(json.dumps(line))
    args.output.write_text(json.dumps({
        **result_head(f"{', '.join(args.devices)} (simulated)", versions(), "python bench/policy_grid.py"),
        "experiment": "policy grid", "model": MODEL, "duration": args.duration,
        "wall_s": time.perf_counter() - began, "cells": lines, "seeds": seeds, "results": list(rows.values()),
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
