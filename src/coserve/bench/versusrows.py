"""From the cells of versus.py to the rows of its results.

A row is a configuration at a load: requests of all repeats are pooled (attainment, its interval, latencies), and the training
throughput is the median over repeats. A configuration holds a load if at least HOLDS of the requests met both objectives. A
comparison sets coserve against the configuration with vLLM that trains most among those that hold the load. Ratios are formed
inside each repeat, whose cells were measured one right after another, and their median is the comparison's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from coserve.bench.metrics import SloInMs, summarize
from coserve.bench.rivals import COSERVE
from coserve.bench.versus import ALONE, BURST, ObservedCell

HOLDS = 0.99
"""Least attainment."""
Row = Mapping[str, Any]


def make_versus_rows(cells: Sequence[ObservedCell], objectives: SloInMs) -> list[dict[str, Any]]:
    """A row per load and configuration, in the order of the cells. Without cells a row has `missing`, which says why."""
    groups: dict[tuple[str, str], list[ObservedCell]] = {}
    for cell in cells:
        groups.setdefault((cell.demand.name, cell.configuration), []).append(cell)
    return [_row(mine, objectives) for mine in groups.values()]


def make_comparisons(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One per load at which coserve and a configuration with vLLM were measured beside requests. `against`: the best such
    configuration, absent if none holds the load."""
    found = []
    for load in dict.fromkeys(row["load"] for row in rows if row.get("num_requests")):
        mine = {row["configuration"]: row for row in rows if row["load"] == load and "missing" not in row}
        own = mine.pop(COSERVE, None)
        if own is None or not mine:
            continue
        entry: dict[str, Any] = {"experiment": "comparison", "load": load, "coserve_holds": own["holds"]}
        holding = [row for row in mine.values() if row["holds"]]
        if holding:
            best = max(holding, key=lambda row: row["finetune_tokens_per_s"])
            entry |= {"against": best["configuration"], **_ratio(own, best)}
        found.append(entry)
    return found


def _row(cells: Sequence[ObservedCell], objectives: SloInMs) -> dict[str, Any]:
    first = cells[0]
    row: dict[str, Any] = {"experiment": "versus", "configuration": first.configuration, "load": first.demand.name,
                           "rate": first.demand.rate}
    done = [cell for cell in cells if cell.observed is not None]
    if not done:
        return row | {"missing": first.missing}
    observed = [cell.observed for cell in done if cell.observed is not None]
    row |= {"repeats": len(done), "window_s": observed[0].window_s}
    row |= summarize([record for run in observed for record in run.records], objectives, sum(run.window_s for run in observed))
    if "slo_attainment" in row:
        row["holds"] = row["slo_attainment"] >= HOLDS
        row["failures"] = sum(not record.finished for run in observed for record in run.records)
    rates = {str(cell.repeat): run.finetune_tokens_per_s for cell, run in zip(done, observed, strict=True)}
    row |= {"finetune_tokens_per_s": median(rates.values()), "finetune_tokens_per_s_of_repeats": rates}
    used = [cell.cores_used for cell in done if cell.cores_used is not None]
    return row | {"cores_used": {name: median(cell[name] for cell in used) for name in used[0]}}


def _ratio(own: Row, other: Row) -> dict[str, Any]:
    """coserve's training throughput over another's, by repeats that both have; nothing where the other trained nothing."""
    mine, theirs = own["finetune_tokens_per_s_of_repeats"], other["finetune_tokens_per_s_of_repeats"]
    ratios = [mine[repeat] / theirs[repeat] for repeat in mine if theirs.get(repeat)]
    if not ratios:
        return {}
    return {"ratio": median(ratios), "ratio_least": min(ratios), "ratio_greatest": max(ratios), "ratio_of_repeats": ratios}


def describe_row(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row['configuration']} {load_phrase(row['load'])}: "
    if "missing" in row:
        return f"{head}missing, {row['missing']}"
    parts = [f"{row['finetune_tokens_per_s']:.0f} trained tokens/s"]
    if "slo_attainment" in row:
        low, high = row["slo_interval"]
        parts.append(f"{row['slo_attainment']:.1%} of {row['num_requests']} requests in time ({low:.1%} to {high:.1%})")
    if "tpot_ms" in row:
        parts.append(f"TPOT p50 {row['tpot_ms']['p50']:.0f} ms, TTFT p99 {row['ttft_ms']['p99']:.0f} ms")
    return head + "; ".join(parts)


def describe_comparison(entry: Row) -> str:
    """A comparison for the terminal and the page."""
    at = f"{load_phrase(entry['load']).capitalize()}, "
    if "against" not in entry:
        held = "and coserve did" if entry["coserve_holds"] else "nor did coserve"
        return f"{at}no configuration with vLLM held the objectives, {held}."
    late = "" if entry["coserve_holds"] else ", but did not hold the objectives"
    if "ratio" not in entry:
        return f"{at}{entry['against']} held the objectives and trained nothing; coserve trained{late}."
    return (f"{at}coserve trained {entry['ratio']:.2f} times the tokens of {entry['against']} ({entry['ratio_least']:.2f} to "
            f"{entry['ratio_greatest']:.2f} by repeat){late}.")


def load_phrase(load: str) -> str:
    """A load by its name in results, in words."""
    return {BURST: "in a burst", ALONE: "without requests"}.get(load, f"at {load} requests/s")
