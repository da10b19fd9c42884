"""The simulated part of the page of `coserve bench paper`, from the result file's data alone.

Owns: what is said and shown of it. Does not own: charts (charts.py), the page around it and its table of figures (pages.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from coserve.bench.charts import Bar, Line, bar_chart, line_chart, number
from coserve.bench.pages import burst_charts, make_table
from coserve.bench.paper.device import BY_LAW
from coserve.bench.paper.figures import STAGES
from coserve.bench.paper.rows import rate_words

Row = Mapping[str, Any]

HELD = 0.9
"""Least attainment with which a point is drawn in a chart of finetuning."""
NOT_CHARTED = ("temporal:64", "temporal:512", "separate:25")
"""Only the middle one of several numbers is drawn; the tables have all."""
NAMES = {
    "separate:75": "split 3+1", "separate:50": "split 2+2", "separate:25": "split 1+3",
    "spatial": "spatial, halves",
}
"""Policies in the reader's words, where their own name says little."""
LAW_NAMES = {"law": "By the law as it stands", "paper-speed": "At the speed that the paper measured"}
KIND_NAMES = {"lora": "LoRA", "bottleneck": "bottleneck adapter", "ia3": "IA3"}
STAGE_NAMES = dict(zip(STAGES, ("every value kept", "+ pruning", "+ rematerialization", "+ token windows"), strict=True))
OURS, THEIRS = "var(--c0)", "var(--c7)"


def simulated_section(data: Row) -> str:
    """The section of one result file."""
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    models = list(dict.fromkeys(row["model"] for row in data["results"]))
    return (
        f"<h2>By arithmetic: the paper's evaluation on a law of {escape(data['simulated_device']['name'])}</h2>"
        '<p class="lead"><strong>A bound by arithmetic, not a measurement.</strong> The scheduler and the pool of memory are '
        "coserve's own; there was no accelerator. Each iteration takes what a stated law gives for its rows. Numbers of the "
        f"paper ({escape(data['paper']['source'])}) stand beside ours and are marked as the paper's.</p>"
        f'<p class="soft">{escape(str(data["date"]))}. {escape(versions)}</p>{_lead(data, models)}'
        f"{''.join(_law(data, law, models) for law in data['settings']['laws'])}"
        f"{_bursts(data)}{_memory(data['memory'])}{_fit(data)}{_method(data)}{_table(data['results'])}"
    )


def policy_name(policy: str) -> str:
    """A policy as the page calls it."""
    return NAMES.get(policy, policy)


def _lead(data: Row, models: Sequence[str]) -> str:
    """One sentence per model about coserve by the law as it stands, and the paper's numbers."""
    lines = []
    for model in models:
        mine = [row for row in data["results"] if (row["law"], row["model"], row["policy"]) == (BY_LAW, model, "coserve")]
        if len(mine) < 2:
            continue
        first, last = mine[0], mine[-1]
        told = [f"{_thousands(row['paper']['finetune_tokens_per_s'])} at {row['rate']:g}"
                for row in (first, last) if "finetune_tokens_per_s" in row.get("paper", {})]
        paper = f" The paper reports {' and '.join(told)}." if told else ""
        lines.append(
            f"{escape(model)}: coserve trains {_thousands(first['finetune_tokens_per_s'])} tokens/s beside {first['rate']:g} "
            f"requests/s and {_thousands(last['finetune_tokens_per_s'])} beside {last['rate']:g}, where "
            f"{last['slo_attainment']:.1%} of the requests are in time.{paper}"
        )
    return "".join(f'<p class="lead">{line}</p>' for line in lines)


def _thousands(value: float) -> str:
    return f"{value / 1e3:.1f}k"


# --- a law ---


def _law(data: Row, law: str, models: Sequence[str]) -> str:
    rows = [row for row in data["results"] if row["law"] == law]
    policies = [policy for policy in dict.fromkeys(row["policy"] for row in rows) if policy not in NOT_CHARTED]
    colors = {policy: f"var(--c{i % 7})" for i, policy in enumerate(policies)}
    key = "".join(f'<li><i style="background:{color}"></i>{escape(policy_name(name))}</li>' for name, color in colors.items())
    figures = "".join(_figures([row for row in rows if row["model"] == model], model, colors) for model in models)
    return (
        f"<h3>{LAW_NAMES[law]}</h3>{_law_words(data, law)}"
        f'<ul class="key">{key}<li>dashed: the most that any scheduler could train</li>'
        f'<li>dashed, grey: the paper\'s own result</li></ul><div class="charts">{figures}</div>{_overview(rows, models)}'
        f"{_comparisons(data, law)}"
    )


def _law_words(data: Row, law: str) -> str:
    device, fit = data["simulated_device"], data["fit"]
    if law == BY_LAW:
        return (
            f"<p>Products with weights reach {device['efficiency']:.0%} of the device's peak, or its memory's speed if that is "
            "the limit. This is what a good implementation can come near to.</p>"
        )
    return (
        f"<p>The same law with {fit['efficiency']:.0%} of the peak, {fit['overlap']:.0%} instead of all of the shorter one of "
        "reading and arithmetic hidden behind the longer, and "
        f"{fit['launch_s'] / fit['num_layers'] * 1e3:.2f} ms of launches per layer and pass. With these numbers it meets the "
        "latencies that the paper's authors measured of their program with a 70B model (table below). Where the grey line lies "
        "above the bound, the paper reports more than this law allows: latencies of one large model then say too little about "
        "that model.</p>"
    )


def _comparisons(data: Row, law: str) -> str:
    """coserve beside other policies: the ratios of which the paper has some, and where another one trains more."""
    lines = []
    for entry in (entry for entry in data["comparisons"] if entry["law"] == law):
        least, most = entry["paper"]
        own = " to ".join(dict.fromkeys(f"{entry[end]:.1f}" for end in ("least", "most")))
        lines.append(
            f"At {rate_words(entry['rates'])} requests/s coserve trains {own} times the tokens of "
            f"{policy_name(entry['against'])}. The paper: {least:g} to {most:g}."
        )
    better: dict[str, list[str]] = {}
    for entry in (entry for entry in data["better_than_coserve"] if entry["law"] == law):
        place = f"{entry['model']} at {entry['rate']:g} requests/s ({entry['ratio']:.2f} times)"
        better.setdefault(policy_name(entry["policy"]), []).append(place)
    for policy, places in better.items():
        lines.append(f"With as many requests in time, {policy} trains more than coserve in {', '.join(places)}.")
    if not better:
        lines.append("No other policy trains more tokens with as many requests in time.")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _figures(rows: Sequence[Row], model: str, colors: Mapping[str, str]) -> str:
    """Finetuning and attainment of one model against the rate."""
    rates = sorted({row["rate"] for row in rows})
    shift = (rates[-1] - rates[0]) * 0.006
    trained, in_time = [], []
    for i, (policy, color) in enumerate(colors.items()):
        mine = [row for row in rows if row["policy"] == policy]
        name, offset = policy_name(policy), shift * (i - len(colors) / 2)  # so that equal points stay visible
        held = [(row["rate"], row["finetune_tokens_per_s"]) for row in mine if row["slo_attainment"] >= HELD]
        if held:
            trained.append(Line(name=name, color=color, points=held))
        in_time.append(Line(name=name, color=color, points=[(row["rate"] + offset, row["slo_attainment"]) for row in mine]))
    own = [row for row in rows if row["policy"] == "coserve"]
    if own:
        bound = [(row["rate"], row["bound_tokens_per_s"]) for row in own]
        trained.append(Line(name="the most", color="var(--ink)", points=bound, dashed=True))
    for lines, quantity in ((trained, "finetune_tokens_per_s"), (in_time, "slo_attainment")):
        paper = [(row["rate"], row["paper"][quantity]) for row in own if quantity in row.get("paper", {})]
        if paper:
            lines.append(Line(name="the paper", color=THEIRS, points=paper, dashed=True))
    axis: Any = {"y_range": _range(min(y for line in in_time for _, y in line.points))}
    shared: Any = {"x_label": "requests/s, four pipelines", "x_ticks": rates}
    return (
        f"<figure><figcaption>{escape(model)}: finetuning</figcaption>"
        f"{line_chart(trained, title=f'Finetuning of {model}', y_label='tokens/s', **shared)}"
        f'<p class="soft">Higher is better. A point is missing where fewer than {HELD:.0%} of the requests were in time.</p>'
        f"</figure><figure><figcaption>{escape(model)}: requests in time</figcaption>"
        f"{line_chart(in_time, title=f'Attainment of {model}', y_label='in time', percent=True, **shared, **axis)}"
        f'<p class="soft">At the top no request is late. Lines that fall pay for training with waiting users.</p></figure>'
    )


def _range(lowest: float) -> tuple[float, float]:
    """Attainment's axis: from a tenth below the lowest."""
    return min(max(0.0, int(lowest * 10 - 1e-9) / 10), 0.9), 1.01


def _overview(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Finetuning and attainment in a table: a line per policy, a column per rate."""
    rates = sorted({row["rate"] for row in rows})
    head = "<th>policy</th>" + "".join(f"<th>{rate:g} requests/s</th>" for rate in rates) + "<th>retained</th>"
    body = []
    for model in models:
        body.append(f'<tr class="load"><td colspan="{len(rates) + 2}">{escape(model)}</td></tr>')
        mine = [row for row in rows if row["model"] == model]
        for policy in dict.fromkeys(row["policy"] for row in mine):
            cells = {row["rate"]: row for row in mine if row["policy"] == policy}
            shown = "".join(f"<td>{_cell_text(cells[rate])}</td>" for rate in rates)
            body.append(f"<tr><td>{escape(policy_name(policy))}</td>{shown}<td>{_percent(cells[rates[-1]])}</td></tr>")
        papers = {row["rate"]: row["paper"] for row in mine if "paper" in row}
        if papers:
            shown = "".join(f"<td>{_paper_text(papers.get(rate, {}))}</td>" for rate in rates)
            retained = papers.get(rates[-1], {}).get("retained_share")
            kept = "" if retained is None else f"{retained:.0%}"
            body.append(f'<tr class="soft"><td>the paper: co-serving</td>{shown}<td>{kept}</td></tr>')
    return (
        '<p class="soft">Finetuning tokens/s of four pipelines, and the share of requests in time. Retained: at the highest '
        "rate, of the lowest one's.</p>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _cell_text(row: Row) -> str:
    return f"{row['finetune_tokens_per_s']:.0f}, {row['slo_attainment']:.1%}"


def _percent(row: Row) -> str:
    return f"{row['retained_share']:.0%}" if "retained_share" in row else ""


def _paper_text(paper: Row) -> str:
    parts = [f"{paper['finetune_tokens_per_s']:.0f}"] if "finetune_tokens_per_s" in paper else []
    return ", ".join(parts + ([f"{paper['slo_attainment']:.1%}"] if "slo_attainment" in paper else []))


# --- burst and memory ---


def _bursts(data: Row) -> str:
    parts = []
    for burst in data["bursts"]:
        caption = f"{burst['model']}, {LAW_NAMES[burst['law']][0].lower()}{LAW_NAMES[burst['law']][1:]}"
        charts = burst_charts(burst, f"under coserve, {LAW_NAMES[burst['law']].lower()}")
        parts.append(
            f"<figure><figcaption>{escape(caption)}</figcaption>{charts}<p class=\"soft\">Finetuning: "
            f"{number(burst['base_rate'])} tokens/s before the burst, at least {number(burst['lowest_rate'])} in any second of "
            f"it{_back(burst)}. {burst['slo_attainment']:.1%} of the requests were in time.</p></figure>"
        )
    shape = data["burst_shape"]
    return (
        "<h3>A burst of requests</h3>"
        f"<p>One pipeline under coserve, with {shape['base_load']:g} request/s, and {shape['base_load'] * shape['factor']:g} "
        f"for {shape['burst_s']:g} s. Finetuning should give way at once when requests come, and be back when they are "
        "served. The waves are the forward and the backward pass of an example, which differ in cost. "
        "Tokens of requests that came before the picture begins are not drawn.</p>"
        '<ul class="key"><li><i style="background:var(--c1)"></i>finetuning</li><li><i style="background:var(--c0)"></i>'
        'inference, output tokens</li><li><i style="background:var(--c3)"></i>requests that wait for their first token</li>'
        f'<li>shaded: the burst</li></ul><div class="charts">{"".join(parts)}</div>'
    )


def _back(burst: Row) -> str:
    seconds = burst["recovery_s"]
    if seconds is None:
        return ""
    return f", back {seconds:.2g} s after the queue was empty" if seconds else ", back before the queue was empty"


def _memory(rows: Sequence[Row]) -> str:
    figures = []
    highest = 1.15 * max(max(row["bytes"] / 1e9, row["paper_gb"]) for row in rows)
    for kind in dict.fromkeys(row["adapter"] for row in rows):
        bars = []
        for row in (row for row in rows if row["adapter"] == kind):
            ours, theirs, name = row["bytes"] / 1e9, row["paper_gb"], STAGE_NAMES[row["stage"]]
            bars += [
                Bar(name=name, color=OURS, value=ours, low=ours, high=ours, text=f"{ours:.1f}"),
                Bar(name="", color=THEIRS, value=theirs, low=theirs, high=theirs, text=f"{theirs:.1f}"),
            ]
        chart = bar_chart(bars, title=f"Memory of {kind}", x_label="GB", x_max=highest)
        figures.append(f"<figure><figcaption>{escape(KIND_NAMES[kind])}</figcaption>{chart}</figure>")
    model = escape(rows[0]["model"])
    return (
        f"<h3>Memory for one example of 1,024 tokens, {model}</h3>"
        f'<ul class="key"><li><i style="background:{OURS}"></i>coserve\'s compiler, computed</li><li><i style="background:'
        f'{THEIRS}"></i>the paper, read off its figure</li></ul>'
        "<p>Shorter is better. Each stage has those above it too. Ours counts kept values, gradients, workspace and the loss, "
        "as <code>coserve plan</code> does, in bfloat16. Before any stage ours is already less, since attention's scores are "
        f'never kept as a matrix.</p><div class="charts">{"".join(figures)}</div>'
    )


# --- how ---


def _fit(data: Row) -> str:
    fit = data["fit"]
    body = "".join(
        f"<tr><td>{escape(point['what'])}</td><td>{point['paper_ms']:.0f}</td><td>{point['law_ms']:.0f}</td>"
        f"<td>{point['fitted_ms']:.0f}</td></tr>" for point in fit["points"]
    )
    return (
        "<h3>How the paper's speed was found</h3>"
        "<p>Four numbers of the device were fitted to the latencies that the paper's authors stored of a 70B model on four "
        f"A100: efficiency {fit['efficiency']:.3f}, overlap {fit['overlap']:.3f}, launches of a pass "
        f"{fit['launch_s'] * 1e3:.1f} ms for {fit['num_layers']} layers, products of a backward row "
        f"{fit['backward_rows']:.2f}. The contexts of the decode rows aren't known and were taken for 512 tokens. Other models "
        "have launches in proportion to their layers. How well numbers of one model on four devices hold for others isn't "
        "known.</p>"
        '<div class="wide"><table><thead><tr><th>iteration</th><th>the paper, ms</th><th>law as it stands, ms</th><th>fitted, '
        f"ms</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def _method(data: Row) -> str:
    settings, training = data["settings"], data["training"]
    arrivals, share = settings["arrivals"], data["spatial_share"]
    tpot = ", ".join(f"{name} {ms:g}" for name, ms in data["objectives"]["tpot_ms"].items())
    return (
        "<h3>What was simulated</h3>"
        "<p>One pipeline is simulated and multiplied by four, as in the paper. One pipeline of the 8B model is one device, of "
        "the 14B model two and of the 32B model four, with NVLink. "
        f"Arrivals: {escape(str(arrivals['kind']))}; prompts of {arrivals['prompt_tokens']} and outputs of "
        f"{arrivals['output_tokens']} tokens in the mean, log-normal, together at most {arrivals['max_tokens']}. Requests of "
        f"{settings['duration']:g} s are counted, after a warm-up. Objectives: first token within "
        f"{data['objectives']['ttft_ms'] / 1e3:g} s, then per token in the mean, in ms: {escape(tpot)}. Training: LoRA of rank "
        f"{training['rank']} on {training['target']}, examples of {training['example_tokens']} tokens, "
        f"{training['accumulation']} per optimizer step.</p>"
        "<p>coserve: units of training in the time that objectives leave, and in the passes of requests. layer-sliced: the "
        "same, never in a pass. temporal:N: one example after every N iterations of inference. dynamic-temporal: one example "
        "when all requests can wait for it. Split M+N: M whole pipelines serve, each its part of all requests, and N train. "
        f"spatial: two processes on each device, one that serves and one that trains, each with {share:.0%} of its bandwidth, "
        "FLOP/s, link and memory at all times, as MIG gives. (Under MPS a process may use what the other leaves, which is "
        "better for spatial; how much is no matter of arithmetic.)</p>"
        "<p>Finetuning tokens are tokens of the data: half when their forward pass is done and half when their backward pass "
        "is. The most that any scheduler could train: in every iteration as much training as fits into the objective beside "
        "the requests, the best part of it in the pass.</p>"
        f'<p class="soft">Command: <code>{escape(str(data["command"]))}</code></p>'
    )


COLUMNS = (
    ("in time", lambda r: f"{r['slo_attainment']:.1%}"),
    ("goodput, req/s", lambda r: f"{r['goodput']:.2f}"),
    ("finetuning tokens/s", lambda r: f"{r['finetune_tokens_per_s']:.0f}"),
    ("of alone", lambda r: f"{r['finetune_share']:.1%}"),
    ("the most", lambda r: f"{r['bound_tokens_per_s']:.0f}"),
    ("forward rows in a pass", lambda r: f"{r['fused_share']:.0%}"),
    ("output tokens/s", lambda r: f"{r['inference_tokens_per_s']:.0f}"),
    ("TPOT mean / p50 / p99, ms", lambda r: " / ".join(f"{r['tpot_ms'][key]:.1f}" for key in ("mean", "p50", "p99"))),
    ("TTFT mean / p50 / p99, ms", lambda r: " / ".join(f"{r['ttft_ms'][key]:.0f}" for key in ("mean", "p50", "p99"))),
    ("the paper: finetuning, in time", lambda r: _paper_text(r["paper"])),
    ("the paper: output tokens/s", lambda r: f"{r['paper']['inference_tokens_per_s']:.0f}"),
    ("the paper: TPOT mean / p99, TTFT mean, ms", lambda r: (
        f"{r['paper']['tpot_mean_ms']:.1f} / {r['paper']['tpot_p99_ms']:.1f}, {r['paper']['ttft_mean_ms']:.0f}")),
)


def _table(rows: Sequence[Row]) -> str:
    ordered = sorted(rows, key=lambda row: (row["law"], row["model"], row["rate"]))
    table = make_table(ordered, COLUMNS, key="policy", name=policy_name, title=_table_title)
    return f"<details><summary>All simulated figures</summary>{table}</details>"


def _table_title(row: Row) -> str:
    return f"{row['model']}, {row['rate']:g} requests/s, {LAW_NAMES[row['law']].lower()}"
