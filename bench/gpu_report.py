"""What bench/gpu.sh tells: a short table after each part, and one summary. Standard library only."""

from __future__ import annotations

import datetime
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpu_course import Course, Outcome

WIDTH = 120
MAX_REASONS = 4
"""Of a failed part, shown in the table."""
MAX_TABLE = 8000
"""Characters of a table, so that the last one is whole in an excerpt of 12,000."""

Row = Mapping[str, Any]


def number(value: float) -> str:
    """Three digits, with the unit prefix that fits."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def milliseconds(row: Row) -> str:
    return f"{1e3 * row['seconds']:.3g} ms"


def _environment(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "device" in row:
            versions = row.get("versions", {})
            lines.append(f"{row['device']}, " + ", ".join(f"{name} {versions[name]}" for name in versions))
        if "matmul_flops" in row:
            launch = f", {1e6 * row['launch_s']:.1f} us per launch" if "launch_s" in row else ""
            lines.append(f"products {number(row['matmul_flops'])}FLOP/s, copies {number(row['copy_bytes_per_s'])}B/s{launch}")
    return lines


def _kernels(rows: Sequence[Row]) -> list[str]:
    parts = []
    for row in rows:
        if "kernel" not in row:
            continue
        rate = ""
        if "bytes_per_s" in row:
            rate = f" {number(row['bytes_per_s'])}B/s"
        elif "flops_per_s" in row:
            rate = f" {number(row['flops_per_s'])}FLOP/s"
        size = f" [{row['rows']}]" if "rows" in row else ""
        error = f" err {row['relative_error']:.1e}" if "relative_error" in row else ""
        taken = f" {1e6 * row['seconds']:.0f} us" if "seconds" in row else ""
        parts.append(f"{row['kernel']}{size}{taken}{rate}{error}")
    return parts


def _checks(rows: Sequence[Row]) -> list[str]:
    return [f"{row['check']}: {row['shown']}" for row in rows if "check" in row]


def _passes(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        name = row.get("kind")
        if name == "decode" and "seconds" in row:
            how = "graph" if row["cuda_graphs"] else "eager"
            lines.append(f"decode {row['requests']}x{row['context']} {how} {milliseconds(row)}")
        elif name == "prefill" and "seconds" in row:
            lines.append(f"prefill {row['rows']} {milliseconds(row)}" + (f" mfu {row['mfu']:.2f}" if "mfu" in row else ""))
        elif name == "finetune":
            mfu = f", mfu {row['mfu']:.2f}" if "mfu" in row else ""
            lines.append(f"step of {row['example_tokens']} {row['finetune_tokens_per_s']:.0f} tokens/s{mfu}")
        elif name == "profile":
            share = "?" if row["busy_share"] is None else f"{row['busy_share']:.0%}"
            lines.append(f"[{row['of']}: device busy {share}, {row['kernels_per_layer']:.1f} kernels per layer, "
                         f"{row['launches']} launches]")
    return lines


def _peer(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "gradient_checkpointing" in row:
            how = "with" if row["gradient_checkpointing"] else "without"
            got = row.get("note", "failed")
            if "finetune_tokens_per_s" in row:
                got = f"{row['finetune_tokens_per_s']:.0f} tokens/s"
            lines.append(f"{how} checkpointing {got}")
    return lines


def _serving(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "policy" not in row or "window_s" not in row:
            continue
        said = [f"{row['finetune_tokens_per_s']:.0f} trained/s"] if "finetune_tokens_per_s" in row else []
        if "slo_attainment" in row:
            said.append(f"{row['slo_attainment']:.0%} of {row['num_requests']} in time")
            said.append(f"{row['inference_tokens_per_s']:.0f} tokens/s")
        for key in ("tpot_ms", "ttft_ms"):
            if key in row:
                said.append(f"{key.removesuffix('_ms')} {row[key]['p50']:.0f}/{row[key]['p99']:.0f} ms")
        if row.get("busy_share") is not None:
            said.append(f"in iterations {row['busy_share']:.0%}")
        if row.get("fused_share") is not None:
            said.append(f"rode {row['fused_share']:.0%}")
        lines.append(", ".join(said))
    return lines


def _tests(rows: Sequence[Row]) -> list[str]:
    counts = [row for row in rows if "passed" in row]
    return [f"{row['passed']} passed, {row['num_failed']} failed, {row['num_skipped']} skipped, {row['collected']} collected"
            for row in counts[-1:]]


def _layers(row: Row) -> str:
    return f"x{row['layers']}" if "layers" in row else ""


def _curve(rows: Sequence[Row]) -> list[str]:
    return [f"{row['kind']} {row['rows']}{_layers(row)} {milliseconds(row)}"
            for row in rows if "kind" in row and "seconds" in row]


SAYS: Mapping[str, Callable[[Sequence[Row]], list[str]]] = {
    "environment": _environment, "kernels": _kernels, "engine": _checks, "passes": _passes, "peer": _peer, "tests": _tests,
    "row-cost": _curve,
}
"""What the table says of a part's rows. Any other part is a serving cell."""


def headline(outcome: Outcome) -> list[str]:
    """What a part's rows come to. Rows of an unexpected form are told as such: a table must not end a benchmark."""
    try:
        return SAYS.get(outcome.name, _serving)(outcome.rows)
    except (KeyError, TypeError, ValueError) as error:
        return [f"rows that can't be shown: {error!r}"]


def wrapped(pieces: Sequence[str], indent: str) -> list[str]:
    """Joins pieces with '; ' into lines of at most WIDTH characters; a longer piece is cut."""
    lines: list[str] = []
    for piece in pieces:
        piece = " ".join(piece.split())[: WIDTH - len(indent)]
        if lines and len(lines[-1]) + 2 + len(piece) <= WIDTH:
            lines[-1] += f"; {piece}"
        else:
            lines.append(indent + piece)
    return lines


def table(course: Course) -> str:
    """All parts so far: status, seconds, what came of them, and of failed ones why."""
    lines = [f"{'part':<20} {'status':<8} {'s':>5} {'plan':>5}"]
    for outcome in course.outcomes:
        if not outcome.attempts and outcome.status == "skipped" and not outcome.reasons:
            state = "running" if course.running == outcome.name else "-"
            lines.append(f"{outcome.name:<20} {state:<8}")
            continue
        done = sum(state == "ok" for state in outcome.items.values())
        items = f"  {done} of {len(outcome.items)} items" if outcome.items else ""
        lines.append(f"{outcome.name:<20} {outcome.status:<8} {outcome.seconds:>5.0f} {outcome.planned_s:>5.0f}{items}")
        lines += wrapped(headline(outcome), "    ")
        lines += wrapped(outcome.reasons[:MAX_REASONS], "  ! ")
    text = "\n".join(lines)
    if len(text) > MAX_TABLE:
        text = text[: MAX_TABLE // 2] + "\n...\n" + text[-MAX_TABLE // 2 :]
    return text + f"\n{course.seconds:.0f} s of {course.budget_s:.0f}; rows in {course.rows_path}\n"


def summary(course: Course, facts: Row) -> dict[str, Any]:
    """The summary: where it ran, what was asked for, and what became of each part. facts: more of the first."""
    environment = [row for outcome in course.outcomes for row in outcome.rows if "device" in row and "versions" in row]
    where = environment[0] if environment else {"device": "unknown", "versions": {"python": platform.python_version()}}
    ceilings = [row for outcome in course.outcomes for row in outcome.rows if "matmul_flops" in row]
    return {
        "device": where["device"], "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": where["versions"], "command": "bench/gpu.sh " + " ".join(sys.argv[1:]), **facts,
        "budget_s": course.budget_s, "seconds": round(course.seconds, 1), "ceilings": ceilings[0] if ceilings else {},
        "ok": all(outcome.status == "ok" for outcome in course.outcomes),
        "failed": [outcome.name for outcome in course.outcomes if outcome.status == "failed"],
        "skipped": [outcome.name for outcome in course.outcomes if outcome.status == "skipped"],
        "parts": [
            {
                "name": outcome.name, "status": outcome.status, "seconds": round(outcome.seconds, 1),
                "planned_s": outcome.planned_s, "attempts": outcome.attempts, "items": outcome.items,
                "num_rows": len(outcome.rows), "says": headline(outcome), "reasons": outcome.reasons,
                **({"tail": outcome.tail} if outcome.status == "failed" else {}),
            } for outcome in course.outcomes
        ],
    }


def write(course: Course, facts: Row) -> str:
    """Writes the summary and the table, each whole at any moment; returns the table."""
    text = table(course)
    for name, content in (("gpu_summary.json", json.dumps(summary(course, facts), indent=1) + "\n"), ("gpu_table.txt", text)):
        place, new = course.folder / name, course.folder / f"{name}.new"
        new.write_text(content)
        new.replace(place)
    return text


def failure(outcome: Outcome) -> str:
    """The end of what a failed part printed, for the terminal."""
    return f"--- the end of what {outcome.name} printed:\n{outcome.tail[-1500:].rstrip()}\n---\n" if outcome.tail else ""
