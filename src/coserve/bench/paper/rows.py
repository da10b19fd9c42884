"""Rows of the simulated evaluation, from the runs of single pipelines.

Owns: how pipelines add up under each policy, the retained share, what stands beside a row from the paper, comparisons between
policies. Does not own: runs (cells.py), the paper's numbers (figures.py). A key that has no value is absent.

    coserve, layer-sliced, temporal:N, dynamic-temporal    four equal pipelines, each with a quarter of the requests
    separate:P      P percent of the pipelines serve, each with its part of the requests; the others train
    spatial         four pipelines, on each of which two processes have half of the devices: one serves, one trains
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from coserve.bench.paper.cells import PaperCell
from coserve.bench.paper.device import SPATIAL_SHARE
from coserve.bench.paper.figures import OVER_DYNAMIC, OVER_SEPARATE, reported
from coserve.bench.paper.models import MODELS, NUM_PIPELINES
from coserve.bench.sharing import SPATIAL
from coserve.bench.simulate import ALONE
from coserve.config.settings import parse_policy
from coserve.config.values import require

SEPARATE = "separate"
SPLITS = {"25": 1, "50": 2, "75": 3}
"""Percent of the pipelines that serve, and how many these are of four."""
INFERENCE = "inference-only"
SAME_ATTAINMENT = 0.005
"""A policy whose attainment is lower by no more than this is as good."""
_SCALED = ("goodput", "inference_tokens_per_s", "finetune_tokens_per_s", "bound_tokens_per_s")
"""Keys of which pipelines add up."""

Row = dict[str, Any]


def check_policy(name: str) -> None:
    """Raises ConfigError for a policy that the evaluation doesn't know."""
    kind, _, percent = name.partition(":")
    if kind == SEPARATE:
        require(percent in SPLITS, "policies", f"write separate:{', separate:'.join(SPLITS)}, got {name!r}")
    elif name != SPATIAL:
        parse_policy(name)


def cells_of(law: str, model: str, policy: str, rate: float) -> tuple[PaperCell, PaperCell | None]:
    """The runs that a row is made of: of a pipeline with requests, and of one that only trains, if there is any."""
    alone = PaperCell(law, model, 1.0, ALONE, 0.0)
    kind, _, percent = policy.partition(":")
    if kind == SEPARATE:
        return PaperCell(law, model, 1.0, INFERENCE, rate / SPLITS[percent]), alone
    if policy == SPATIAL:
        half = alone._replace(share=SPATIAL_SHARE)
        return half._replace(policy=INFERENCE, rate=rate / NUM_PIPELINES), half
    return PaperCell(law, model, 1.0, policy, rate / NUM_PIPELINES), None


def make_row(law: str, model: str, policy: str, rate: float, results: Mapping[PaperCell, Mapping[str, Any]]) -> Row:
    """One row: the four pipelines together. results: of at least the cells of this row, and of finetuning alone."""
    serving, training = cells_of(law, model, policy, rate)
    kind, _, percent = policy.partition(":")
    num_serving = SPLITS[percent] if kind == SEPARATE else NUM_PIPELINES
    num_training = NUM_PIPELINES - num_serving if kind == SEPARATE else NUM_PIPELINES
    found = {key: value for key, value in results[serving].items() if value is not None and key != "iterations"}
    row = {key: value * num_serving if key in _SCALED else value for key, value in found.items()}
    if training is not None:
        row["finetune_tokens_per_s"] = num_training * results[training]["finetune_tokens_per_s"]
        row.pop("fused_share", None)
    row.pop("bound_tokens_per_s", None)
    beside = results.get(PaperCell(law, model, 1.0, "coserve", rate / NUM_PIPELINES), {})
    if "bound_tokens_per_s" in beside:
        row["bound_tokens_per_s"] = NUM_PIPELINES * beside["bound_tokens_per_s"]
    alone = NUM_PIPELINES * results[PaperCell(law, model, 1.0, ALONE, 0.0)]["finetune_tokens_per_s"]
    facts = {
        "experiment": "paper", "law": law, "model": model, "policy": policy, "rate": rate, "num_pipelines": NUM_PIPELINES,
        "rate_per_pipeline": serving.rate, "tensor_parallel_size": MODELS[model].tensor_parallel_size,
        "tpot_slo_ms": MODELS[model].tpot_ms,
    }
    return {**facts, **row, "finetune_share": row["finetune_tokens_per_s"] / alone}


def make_rows(
    laws: Sequence[str], models: Sequence[str], policies: Sequence[str], rates: Sequence[float],
    results: Mapping[PaperCell, Mapping[str, Any]],
) -> list[Row]:
    """All rows, by law, model, policy and rate. The row of the highest rate has the share of finetuning that is retained from
    the lowest one."""
    rows = []
    for law in laws:
        for model in models:
            for policy in policies:
                mine = [make_row(law, model, policy, rate, results) for rate in sorted(rates)]
                first, last = mine[0], mine[-1]
                if len(mine) > 1 and first["finetune_tokens_per_s"] > 0:
                    last["retained_share"] = last["finetune_tokens_per_s"] / first["finetune_tokens_per_s"]
                rows += mine
    for row in rows:
        paper = reported(row["model"], row["rate"]) if row["policy"] == "coserve" else {}
        if paper:
            row["paper"] = paper
    return rows


def find_better(rows: Iterable[Row]) -> Iterator[Row]:
    """Where another policy trains more than coserve, and no fewer requests are in time. ratio: of its tokens to coserve's."""
    rows = list(rows)
    own = {(row["law"], row["model"], row["rate"]): row for row in rows if row["policy"] == "coserve"}
    for row in rows:
        mine = own.get((row["law"], row["model"], row["rate"]))
        if mine is None or row is mine or row["slo_attainment"] < mine["slo_attainment"] - SAME_ATTAINMENT:
            continue
        if row["finetune_tokens_per_s"] > mine["finetune_tokens_per_s"]:
            names = {key: row[key] for key in ("law", "model", "rate", "policy")}
            yield {**names, "ratio": row["finetune_tokens_per_s"] / mine["finetune_tokens_per_s"],
                   "slo_attainment": row["slo_attainment"], "coserve_attainment": mine["slo_attainment"]}


def compare(rows: Sequence[Row]) -> list[Row]:
    """coserve's finetuning over that of policies of which the paper gives ratios: least and most over models and `rates`, where
    the other trained anything."""
    rates = sorted({row["rate"] for row in rows})
    asked = [("separate:75", [rate], OVER_SEPARATE[rate]) for rate in rates if rate in OVER_SEPARATE]
    asked.append(("dynamic-temporal", rates, OVER_DYNAMIC))
    found = []
    for law in dict.fromkeys(row["law"] for row in rows):
        mine = [row for row in rows if row["law"] == law]
        amounts = {(row["policy"], row["model"], row["rate"]): row["finetune_tokens_per_s"] for row in mine}
        for policy, at, paper in asked:
            ratios = [
                amounts["coserve", model, rate] / amounts[policy, model, rate] for model in MODELS for rate in at
                if ("coserve", model, rate) in amounts and amounts.get((policy, model, rate))
            ]
            if ratios:
                found.append({"law": law, "against": policy, "rates": at, "least": min(ratios), "most": max(ratios),
                              "paper": list(paper)})
    return found


def describe_simulated(data: Mapping[str, Any]) -> Iterator[str]:
    """The result file's data for the terminal, in lines."""
    for row in data["results"]:
        if row["policy"] == "coserve":
            paper = row.get("paper", {}).get("finetune_tokens_per_s")
            beside = "" if paper is None else f"; the paper's: {paper:.0f}"
            yield (
                f"{row['law']}, {row['model']} at {row['rate']:g} requests/s: coserve trains "
                f"{row['finetune_tokens_per_s']:.0f} tokens/s, {row['slo_attainment']:.1%} of the requests in time{beside}"
            )
    for entry in data["comparisons"]:
        yield (
            f"{entry['law']}, at {rate_words(entry['rates'])} requests/s: coserve trains {entry['least']:.2f} to "
            f"{entry['most']:.2f} times the tokens of {entry['against']}; the paper's: {entry['paper'][0]:g} to "
            f"{entry['paper'][1]:g}"
        )
    for entry in data["better_than_coserve"]:
        yield (
            f"{entry['law']}, {entry['model']} at {entry['rate']:g} requests/s: {entry['policy']} trains {entry['ratio']:.3f} "
            f"times coserve's tokens with {entry['slo_attainment']:.1%} in time (coserve {entry['coserve_attainment']:.1%})"
        )


def rate_words(rates: Sequence[float]) -> str:
    """One rate, or the first and the last of several."""
    return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
