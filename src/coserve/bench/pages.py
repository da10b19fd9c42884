"""What the pages of results have in common: the frame with its style, tables of figures, the charts of a burst.

Does not own: what a page says (report.py, versuspage.py, paper/page.py), how a chart is drawn (charts.py). A page fits a phone,
follows the reader's light or dark setting, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from coserve.bench.charts import Line, line_chart

Row = Mapping[str, Any]
Show = Callable[[Row], str]
"""The text of a row's figure. Raises KeyError where it was not measured."""

STYLE = """
:root{--paper:#fbfaf7;--ink:#1d232b;--soft:#5d6671;--rule:#d9d8d2;--band:#ecebe4;
--c0:#1f5fa8;--c1:#c8501e;--c2:#2d7d46;--c3:#8a4fa3;--c4:#9a7400;--c5:#0f7f8c;--c6:#b3345e;--c7:#5d6671;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e7e6e1;--soft:#9da5af;--rule:#343a42;--band:#22272e;
--c0:#6aa9f0;--c1:#f08a55;--c2:#6cc287;--c3:#c290dc;--c4:#d8b23f;--c5:#55c3cf;--c6:#ee7ba0;--c7:#9da5af}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:28px 18px 60px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:0 0 6px}h2{font-size:1.15rem;margin:40px 0 6px}p{margin:6px 0;max-width:72ch}
.soft,figcaption{color:var(--soft);font-size:.9rem}.lead{font-size:1.08rem;margin:14px 0}
.charts{display:grid;gap:22px;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));margin-top:12px}
figure{margin:0}figcaption{margin-bottom:4px;font-weight:600;color:var(--ink)}
svg{display:block;width:100%;max-width:720px;height:auto;font:13px system-ui,sans-serif}svg text{fill:var(--soft)}
.grid{stroke:var(--rule);stroke-width:1}.band{fill:var(--band)}.whisker{stroke:var(--ink);stroke-width:1.6}
.mark{stroke:var(--ink);stroke-width:1.4;stroke-dasharray:6 5}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.9rem;margin:10px 0 0;padding:0;list-style:none}
.key i{display:inline-block;width:14px;height:3px;vertical-align:middle;margin-right:6px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;white-space:nowrap}
th,td{padding:5px 14px 5px 0;text-align:right;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:600;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}tr.load td{border-bottom:2px solid var(--soft);padding-top:14px;font-weight:600}
code{font-size:.86rem;overflow-wrap:anywhere}
"""


def make_sections_page(title: str, sections: Sequence[str]) -> str:
    """A page of its own from sections (HTML)."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>'
        f"{''.join(sections)}</body></html>\n"
    )


def make_table(
    rows: Sequence[Row], columns: Sequence[tuple[str, Show]], *, key: str, name: Callable[[str], str] = str, title: Show
) -> str:
    """A table (HTML) of rows in their order.

    columns: heading and text of each; one without any figure is left out. key: of the value that heads each row, as `name`
    writes it. title: a line of its own above the rows for which it is equal.
    """
    shown = [(heading, show) for heading, show in columns if any(_cell(row, show) for row in rows)]
    head = "".join(f"<th>{escape(heading)}</th>" for heading in (key, *(heading for heading, _ in shown)))
    body, group = [], None
    for row in rows:
        if title(row) != group:
            group = title(row)
            body.append(f'<tr class="load"><td colspan="{len(shown) + 1}">{escape(group)}</td></tr>')
        cells = "".join(f"<td>{_cell(row, show)}</td>" for _, show in shown)
        body.append(f"<tr><td>{escape(name(row[key]))}</td>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _cell(row: Row, show: Show) -> str:
    try:
        return escape(show(row))
    except KeyError:  # not measured
        return ""


def burst_charts(burst: Row, what: str) -> str:
    """Tokens per second and the queue against time, one chart below the other. what: the end of their titles."""
    series, times = burst["series"], burst["series"]["time_s"]
    shared: Any = {"x_label": "seconds", "band": (burst["burst_start_s"], burst["burst_end_s"]), "markers": False}
    tokens = line_chart(
        [Line(name="finetuning", color="var(--c1)", points=list(zip(times, series["finetune_tokens_per_s"], strict=True))),
         Line(name="inference", color="var(--c0)", points=list(zip(times, series["inference_tokens_per_s"], strict=True)))],
        title=f"Burst {what}", y_label="tokens/s", **shared,
    )
    queue = line_chart(
        [Line(name="queue", color="var(--c3)", points=list(zip(times, series["queue"], strict=True)))],
        title=f"Queue {what}", y_label="requests", height=150, y_range=(0.0, max(*series["queue"], 4) * 1.08), **shared,
    )
    return tokens + queue
