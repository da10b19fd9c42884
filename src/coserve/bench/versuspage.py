"""The measured part of the page of `coserve bench paper`: what versus.py measured, from the result file's data alone.

Owns: what is said and shown of it. Does not own: charts (charts.py), the page around it and its tables (pages.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from coserve.bench.charts import Bar, bar_chart, number
from coserve.bench.pages import make_table
from coserve.bench.versusrows import HOLDS, describe_comparison, load_phrase

Row = Mapping[str, Any]
LATE = "var(--c7)"
"""Colour of what doesn't hold the objectives."""
ROOM = 1.15
"""A chart's width over its longest mark, so that this does not touch the text at the right."""


def versus_section(data: Mapping[str, Any]) -> str:
    """The section of one result file."""
    rows = data["results"]
    objectives, settings = data["objectives"], data["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    loads = list(dict.fromkeys(row["load"] for row in rows))
    colors = {name: f"var(--c{i % 7})" for i, name in enumerate(dict.fromkeys(row["configuration"] for row in rows))}
    lead = "".join(f'<p class="lead">{escape(describe_comparison(entry))}</p>' for entry in data["comparisons"])
    count = settings["repeats"]
    bars = f"medians of {count} repeats; marks over them: least and most" if count > 1 else "one run each"
    highest = max((rate for row in rows for rate in row.get("finetune_tokens_per_s_of_repeats", {}).values()), default=0.0)
    room = max(ROOM * highest, 1e-9)
    charts = "".join(_figure([row for row in rows if row["load"] == load], colors, room) for load in loads)
    table = make_table(rows, COLUMNS, key="configuration", title=lambda row: load_phrase(row["load"]).capitalize())
    return (
        "<h2>Measured here: one server for both, against vLLM and peft on the same processors</h2>"
        f'<p class="soft">{escape(data["device"])}, {escape(data["date"])}. {escape(versions)}</p>'
        f"<p>Objectives: first token within {objectives['ttft_ms']:g} ms of the time a request was due, then "
        f"{objectives['tpot_ms']:g} ms per token in the mean. A configuration holds a load if at least {HOLDS:.0%} of its "
        f"requests met both.</p>{lead}"
        "<h3>Trained tokens per second</h3>"
        f'<p class="soft">Bars: {bars}. Right: the tokens, and the share of requests in time. Grey and &ldquo;late&rdquo;: the '
        "load was not held.</p>"
        f'<div class="charts">{charts}</div>{_missing(rows)}'
        f"<h3>All figures</h3>{table}{_method(data)}"
    )


def _figure(rows: Sequence[Row], colors: Mapping[str, str], x_max: float) -> str:
    """Bars of one load. x_max: the same for all loads."""
    bars = []
    for row in rows:
        if "missing" in row:
            continue
        rates = row["finetune_tokens_per_s_of_repeats"].values()
        late = not row.get("holds", True)
        text = number(row["finetune_tokens_per_s"])
        if "slo_attainment" in row:
            text += f", {row['slo_attainment']:.0%}" if not late else ", late"
        bars.append(Bar(
            name=row["configuration"], color=LATE if late else colors[row["configuration"]], value=row["finetune_tokens_per_s"],
            low=min(rates), high=max(rates), text=text,
        ))
    if not bars:
        return ""
    title = load_phrase(rows[0]["load"]).capitalize()
    chart = bar_chart(bars, title=title, x_label="trained tokens/s", x_max=x_max)
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def _missing(rows: Sequence[Row]) -> str:
    """Which configurations weren't measured, and why, each once."""
    reasons = {row["configuration"]: row["missing"] for row in rows if "missing" in row}
    return "".join(f"<p>Not measured: {escape(name)}. {escape(str(reason))}</p>" for name, reason in reasons.items())


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("trained tokens/s", lambda r: f"{r['finetune_tokens_per_s']:.0f}"),
    ("by repeat", lambda r: ", ".join(f"{rate:.0f}" for rate in r["finetune_tokens_per_s_of_repeats"].values())),
    ("requests", lambda r: str(r["num_requests"])),
    ("in time", lambda r: f"{r['slo_attainment']:.1%}"),
    ("95% interval", lambda r: f"{r['slo_interval'][0]:.1%} to {r['slo_interval'][1]:.1%}"),
    ("goodput, req/s", lambda r: f"{r['goodput']:.2f}"),
    ("failed", lambda r: str(r["failures"])),
    ("TTFT p50 / p99, ms", lambda r: f"{r['ttft_ms']['p50']:.0f} / {r['ttft_ms']['p99']:.0f}"),
    ("TPOT p50 / p99, ms", lambda r: f"{r['tpot_ms']['p50']:.0f} / {r['tpot_ms']['p99']:.0f}"),
    ("processors: own, others", lambda r: f"{r['cores_used']['configuration']:.2f}, {r['cores_used']['others']:.2f}"),
)


def _method(data: Mapping[str, Any]) -> str:
    settings, common = data["settings"], data["common"]
    burst = settings["burst"]
    shape = "" if burst is None else (
        f" The burst: {burst['base_rate']:g} requests/s, {burst['burst_rate']:g} for {burst['burst_s']:g} s after "
        f"{burst['before_s']:g} s, then {burst['base_rate']:g} again for {burst['after_s']:g} s."
    )
    return (
        "<h3>How it was measured</h3>"
        f"<p>Programs as their users run them, asked over HTTP by one client process: prompts of {settings['prompt_tokens']} "
        f"random tokens, outputs of {settings['output_tokens']}, Poisson arrivals. Weights and training in "
        f"{escape(str(common['dtype']))} on all sides. A window lasts {settings['window_s']:g} s, after "
        f"{settings['warmup_s']:g} s of the same load, which isn't counted.{shape} Prompts, their times and the training data "
        "are the same for all configurations of a repeat. Only one configuration runs at a time; the others are halted. Failed "
        f"requests, and those that take longer than {common['timeout_s']:.0f} s, count as late.</p>"
        "<p>coserve: <code>coserve serve</code> with the objectives above, else with its defaults, and a job created through "
        "its API. What rows and units cost was measured at its start. Split M+N: vLLM tied to M processors and transformers + "
        f"peft to the other N. Side by side: vLLM and peft, each with a thread for each of the {common['cores']} processors. "
        f"All train LoRA of rank {common['rank']} on all linears, with examples of {common['finetune_tokens']} tokens in the "
        f"mean and {common['finetune_batch']} examples per optimizer step.</p>"
        "<p>Trained tokens are tokens of the data without padding. peft's are counted when the forward and backward pass of "
        "their micro-batch are done, and taken to advance evenly between two such times. coserve's job counts a token as half "
        "when its forward pass is done and half when its backward pass is.</p>"
        f"<p class=\"soft\">Command: <code>{escape(data['command'])}</code></p>"
    )
