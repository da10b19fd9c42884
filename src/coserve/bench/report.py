"""The page of `coserve bench sharing` and `coserve bench simulate`, from the result file's data alone.

Owns: what the page says and shows. Does not own: its frame, style and tables (pages.py), charts (charts.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from statistics import median
from typing import Any

from coserve.bench.burst import BACK_SHARE
from coserve.bench.charts import Bar, Line, bar_chart, line_chart, number
from coserve.bench.pages import burst_charts, make_sections_page, make_table
from coserve.bench.simulatedpage import NOTICE, simulated_method

Row = Mapping[str, Any]

def make_page(data: Mapping[str, Any]) -> str:
    """The page of one result file (results.py, plus device, date, versions, command)."""
    rows = [row for row in data["results"] if row["experiment"] in ("sharing", "simulation")]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    colors = {policy: f"var(--c{i % 8})" for i, policy in enumerate(p for p in policies if p != "finetune-only")}
    model = str(rows[0]["model"]) if rows else "a model"
    title, notice, method = f"One machine that serves and finetunes {model}", "", _method(data)
    if "simulation" in data:
        title, notice, method = f"Simulated: {model} on {data['simulation']['devices']}", NOTICE, simulated_method(data)
    return make_sections_page(title, [
        notice, _facts(data), _lead(rows), _overview(rows, data, colors), _bursts(data.get("bursts", [])), _table(rows), method,
    ])


def _facts(data: Mapping[str, Any]) -> str:
    objectives, capacity = data["objectives"], data["capacity"]
    versions = ", ".join(f"{name} {version}" for name, version in data.get("versions", {}).items())
    return (
        f'<p class="soft">{escape(str(data.get("device", "")))}, {escape(str(data.get("date", "")))}. {escape(versions)}</p>'
        f"<p>Objectives: first token within {objectives['ttft_ms']:.0f} ms of the time a request was due, then "
        f"{objectives['tpot_ms']:.1f} ms per token. Capacity: {capacity['rate']:.3g} requests/s.</p>"
    )


def _lead(rows: Sequence[Row]) -> str:
    """One sentence per load about coserve, where it was measured."""
    lines = []
    for row in rows:
        if row["policy"] == "coserve" and "finetune_share" in row and "slo_attainment" in row:
            bound = f", {row['bound_reached']:.0%} of the bound" if "bound_reached" in row else ""
            lines.append(
                f"At {row['load']:.0%} of capacity, coserve met the objectives of {row['slo_attainment']:.1%} of "
                f"{row['num_requests']} requests and kept {row['finetune_share']:.0%} of finetune-only's throughput{bound}."
            )
    return "".join(f'<p class="lead">{line}</p>' for line in lines)


def _bound_share(row: Row) -> float | None:
    """The bound's part that is finetuning: the bound less the inference part, which is the load."""
    return row["bound"] - row["load"] if "bound" in row else None


def _overview(rows: Sequence[Row], data: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    loaded = [row for row in rows if row.get("num_requests")]
    loads = sorted({row["load"] for row in loaded})
    if not loads:
        return ""
    alone = next((row["finetune_tokens_per_s"] for row in rows if row["policy"] == "finetune-only"), None)
    spread = _spread(data.get("repeats", []))
    draw = _bars if len(loads) == 1 else _lines
    attainment, throughput = draw(loaded, loads, alone, spread, colors)
    key = "".join(f'<li><i style="background:{color}"></i>{escape(policy)}</li>' for policy, color in colors.items())
    dashed = "<li>dashed: the bound</li>" if _bounds(loaded, alone) else ""
    where = f" at {loads[0]:.0%} of capacity" if len(loads) == 1 else " against load"
    repeated = "" if "simulation" in data else ", least and most of the repeats for throughput"
    return (
        f'<h2>Attainment and finetuning{where}</h2><ul class="key">{key}{dashed}</ul><div class="charts">'
        f"<figure><figcaption>Requests within their objectives</figcaption>{attainment}</figure>"
        f"<figure><figcaption>Finetuning throughput, tokens/s</figcaption>{throughput}</figure></div>"
        f'<p class="soft">Marks over the points: 95% Wilson interval for attainment{repeated}.</p>'
    )


def _spread(repeats: Sequence[Row]) -> dict[tuple[str, float], tuple[float, float]]:
    """(least, most) finetuning throughput of a policy at a load."""
    found: dict[tuple[str, float], list[float]] = {}
    for entry in repeats:
        if "finetune_tokens_per_s" in entry:
            found.setdefault((entry["policy"], entry["load"]), []).append(entry["finetune_tokens_per_s"])
    return {key: (min(values), max(values)) for key, values in found.items()}


def _lines(
    rows: Sequence[Row], loads: Sequence[float], alone: float | None, spread: Mapping[tuple[str, float], tuple[float, float]],
    colors: Mapping[str, str],
) -> tuple[str, str]:
    attainment, throughput = [], []
    shift = (loads[-1] - loads[0]) * 0.008
    for i, (policy, color) in enumerate(colors.items()):
        mine = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["load"])
        x = {row["load"]: row["load"] + shift * (i - len(colors) / 2) for row in mine}  # so that equal points stay visible
        attainment.append(Line(
            name=policy, color=color, points=[(x[r["load"]], r["slo_attainment"]) for r in mine],
            intervals=[(x[r["load"]], *r["slo_interval"]) for r in mine],
        ))
        tuned = [row for row in mine if "finetune_tokens_per_s" in row]
        if tuned:
            throughput.append(Line(
                name=policy, color=color, points=[(x[r["load"]], r["finetune_tokens_per_s"]) for r in tuned],
                intervals=[(x[r["load"]], *spread[policy, r["load"]]) for r in tuned if (policy, r["load"]) in spread],
            ))
    bound = _bounds(rows, alone)
    if bound:
        throughput.append(Line(name="bound", color="var(--ink)", points=sorted(bound.items()), dashed=True))
    lowest = min(row["slo_interval"][0] for row in rows)
    floor = max(0.0, int(lowest * 10) / 10)
    shared: Any = {"x_label": "load, share of capacity", "x_ticks": loads}
    return (
        line_chart(attainment, title="SLO attainment against load", y_label="attainment", y_range=(floor, 1.0), percent=True,
                   **shared),
        line_chart(throughput, title="Finetuning throughput against load", y_label="tokens/s", **shared),
    )


def _bounds(rows: Sequence[Row], alone: float | None) -> dict[float, float]:
    """Bound of finetuning throughput by load: the policies' median, whose loads differ by unfinished requests only."""
    shares: dict[float, list[float]] = {}
    for row in rows:
        share = _bound_share(row)
        if share is not None:
            shares.setdefault(row["load"], []).append(share)
    return {} if alone is None else {load: alone * median(found) for load, found in shares.items()}


def _bars(
    rows: Sequence[Row], loads: Sequence[float], alone: float | None, spread: Mapping[tuple[str, float], tuple[float, float]],
    colors: Mapping[str, str],
) -> tuple[str, str]:
    attainment, throughput = [], []
    for row in rows:
        policy, (low, high) = row["policy"], row["slo_interval"]
        share = row["slo_attainment"]
        attainment.append(Bar(name=policy, color=colors[policy], value=share, low=low, high=high, text=f"{share:.1%}"))
        if "finetune_tokens_per_s" in row:
            rate = row["finetune_tokens_per_s"]
            least, most = spread.get((policy, row["load"]), (rate, rate))
            throughput.append(Bar(name=policy, color=colors[policy], value=rate, low=least, high=most, text=number(rate)))
    bound = _bounds(rows, alone).get(loads[0])
    highest = max([bar.high for bar in throughput] + [bar.value for bar in throughput] + [bound or 0.0, 1e-9])
    return (
        bar_chart(attainment, title="SLO attainment", x_label="share of requests", x_max=1.0),
        bar_chart(throughput, title="Finetuning throughput", x_label="tokens/s", x_max=highest, mark=bound),
    )


def _bursts(bursts: Sequence[Row]) -> str:
    if not bursts:
        return ""
    parts = []
    for burst in bursts:
        caption, what = f"{escape(burst['policy'])}: {_recovery(burst)}", f"under {burst['policy']}"
        parts.append(f"<figure><figcaption>{caption}</figcaption>{burst_charts(burst, what)}</figure>")
    return (
        '<h2>A burst of requests</h2><ul class="key"><li><i style="background:var(--c1)"></i>finetuning</li>'
        '<li><i style="background:var(--c0)"></i>inference</li><li><i style="background:var(--c3)"></i>requests waiting for '
        'their first token</li><li>shaded: the burst</li></ul>'
        f'<div class="charts">{"".join(parts)}</div>'
    )


def _recovery(burst: Row) -> str:
    if "recovery_s" not in burst:
        return "finetuning did not come back in the time shown"
    return f"back at {BACK_SHARE:.0%} of its rate {burst['recovery_s']:.2g} s after the queue was empty"


COLUMNS = (
    ("requests", lambda r: str(r["num_requests"])),
    ("attainment", lambda r: f"{r['slo_attainment']:.1%}"),
    ("95% interval", lambda r: f"{r['slo_interval'][0]:.1%} to {r['slo_interval'][1]:.1%}"),
    ("goodput, req/s", lambda r: f"{r['goodput']:.2f}"),
    ("TTFT p50 / p99, ms", lambda r: f"{r['ttft_ms']['p50']:.0f} / {r['ttft_ms']['p99']:.0f}"),
    ("TPOT p50 / p99, ms", lambda r: f"{r['tpot_ms']['p50']:.1f} / {r['tpot_ms']['p99']:.1f}"),
    ("ITL p99, ms", lambda r: f"{r['itl_ms']['p99']:.0f}"),
    ("output tokens/s", lambda r: f"{r['inference_tokens_per_s']:.0f}"),
    ("finetuning tokens/s", lambda r: f"{r['finetune_tokens_per_s']:.0f}"),
    ("of finetune-only", lambda r: f"{r['finetune_share']:.1%}"),
    ("its bound", lambda r: f"{r['bound_tokens_per_s']:.0f}"),
    ("of its bound", lambda r: f"{r['bound_reached']:.0%}"),
    ("forward rows in a pass", lambda r: f"{r['fused_share']:.1%}"),
    ("gain", lambda r: f"{r['gain']:.2f}"),
    ("bound", lambda r: f"{r['bound']:.2f}"),
)


def _table(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: row["load"])
    return f"<h2>All figures</h2>{make_table(ordered, COLUMNS, key='policy', title=_load_title)}"


def _load_title(row: Row) -> str:
    title = f"{row['load']:.0%} of capacity, {row['rate']:.3g} requests/s" if row["load"] else "no requests"
    return title + (", beyond capacity" if row.get("beyond_capacity") else "")


def _pass_ratio(data: Mapping[str, Any]) -> str:
    """How long passes took beside what the law says."""
    ratios = data.get("pass_ratios", {})
    said = ", ".join(f"{ratio:.2f} at {float(load):.0%} of capacity" for load, ratio in ratios.items())
    return f" They took this many times as long: {said}." if said else ""


def _method(data: Mapping[str, Any]) -> str:
    settings = data.get("settings", {})
    arrivals = settings.get("arrivals", {})
    return (
        "<h2>How it was measured</h2>"
        f"<p>Arrivals: {escape(str(arrivals.get('kind', 'poisson')))}; {settings.get('requests', '?')} counted requests "
        f"per run, {settings.get('pairs', '?')} interleaved repeats. Requests of all repeats are pooled; throughputs are "
        "medians over repeats. A job trains throughout each run except inference-only's. Failed and unfinished requests count "
        "as missed. "
        "Finetuning tokens are forward-token equivalents: a token counts as half when its forward pass is done and half when "
        "its backward pass is.</p>"
        "<p>Gain: goodput over capacity, plus finetuning throughput over finetune-only's in the same repeat. Its bound: the "
        "load, plus the bound of finetuning over finetune-only's throughput.</p>"
        "<p>The bound of finetuning is the most tokens that any scheduler could train beside these requests while it keeps "
        "their objectives: <i>A &times; F(load) / F(no load)</i>. <i>A</i> is finetune-only's throughput, as measured. "
        "<i>F</i> is by arithmetic, under the latency law that was fitted to the machine's profile and with which the "
        "scheduler began: while requests run, each iteration lasts for the TPOT objective, and holds the requests' rows and "
        "as much training as fits, the best part of it in the pass. How many requests run is Poisson distributed. Passes are "
        "taken to be as much slower than the law says as passes with requests only were in these runs (the median). Prompts "
        f"are spread evenly, which no real scheduler can do.{_pass_ratio(data)}</p>"
        f"<p class=\"soft\">Command: <code>{escape(str(data.get('command', '')))}</code></p>"
    )
