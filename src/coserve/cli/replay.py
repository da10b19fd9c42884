"""`coserve bench replay`: a logged run again on the virtual clock, and what each part of the machine's behaviour cost it.

Owns: arguments, the tables. Does not own: the log (bench/runlog.py), the replay (bench/replay.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from coserve.bench.replay import STALL, Replayed, ablation, bound, by_chance, figures, kinds
from coserve.bench.results import prediction_errors
from coserve.bench.runlog import RunLog, read_log
from coserve.config.values import require
from coserve.core import percentile

console = Console(highlight=False)


def replay(
    log: Annotated[Path, typer.Argument(help="A log of coserve bench sharing --log, or the cell beside it.")],
    seeds: Annotated[int, typer.Option(help="Replays of each case in which chance plays a part.")] = 3,
) -> None:
    """A measured run again on the virtual clock, under the law of its own iterations, and without parts of their disorder.

    It says whether the simulation meets the run, and which part keeps finetuning below its bound.
    """
    require(seeds >= 1, "seeds", f"must be at least 1, got {seeds}")
    found = read_log(log)
    replayed = list(ablation(found, seeds))
    for line in _facts(found, replayed[0]):
        console.print(line, markup=False, soft_wrap=True)
    console.print(_cases(found, replayed))
    console.print(_errors(found, replayed[0]))


def _facts(log: RunLog, whole: Replayed) -> list[str]:
    """What was measured of the run, and the truth that was read off it."""
    gaps, said, run = log.gaps(), by_chance(whole.case.disturbance), log.run
    lines = [
        f"{log.scheduler.policy}: {len(run.records)} requests in {run.window_s:.1f} s, {len(log.iterations)} iterations",
        f"its iterations differ from the law refitted to them by {said.noise:.1%} (standard deviation); beside these "
        f"{said.stall_share:.2%} of them took more than {1 + STALL:.3g} times as long ({said.stall_factor:.1f} in the mean)",
    ]
    if gaps:
        total = sum(gaps) + sum(done.seconds for done in log.iterations)
        lines.append(
            f"between iterations: {1e3 * said.between_s:.2f} ms in the mean, {1e3 * percentile(gaps, 0.5):.2f} in the median, "
            f"{1e3 * max(gaps):.1f} at most; {sum(gaps) / total:.1%} of the time"
        )
    most = bound(log, whole.case.truth)
    if most is not None:
        lines.append(f"bound of finetuning under the refitted law: {most:.0f} tokens/s")
    return lines


def _cases(log: RunLog, replayed: list[Replayed]) -> Table:
    table = Table("", "in time", "TTFT p50 / p99, ms", "TPOT p50 / p99, ms", "finetuning tokens/s", "of the bound",
                  "iterations", box=box.SIMPLE)
    table.columns[0].no_wrap = True
    most = bound(log, replayed[0].case.truth)
    table.add_row("measured", *_cells(figures(log, [log.run]), most))
    for item in replayed:
        table.add_row(item.case.name, *_cells(figures(log, item.runs), most, [run.finetune_tokens_per_s for run in item.runs]))
    return table


def _cells(row: Mapping[str, Any], most: float | None, spread: Sequence[float] = ()) -> list[str]:
    """A row of the table. spread: finetuning throughputs of several replays of one case."""

    def two(name: str, digits: int) -> str:
        return f"{row[name]['p50']:.{digits}f} / {row[name]['p99']:.{digits}f}" if name in row else "-"

    tokens = row["finetune_tokens_per_s"]
    return [
        f"{row['slo_attainment']:.1%}" if "slo_attainment" in row else "-", two("ttft_ms", 0), two("tpot_ms", 1),
        f"{tokens:.1f}" + (f" ({min(spread):.1f} to {max(spread):.1f})" if len(spread) > 1 else ""),
        f"{tokens / most:.0%}" if most and most >= 1 else "-", f"{row['iterations']:.0f}",
    ]


def _errors(log: RunLog, whole: Replayed) -> Table:
    """Errors of predictions by kind of iteration, measured and replayed."""
    table = Table("predictions of", "measured: number", "median", "p95", "replayed: number", "median", "p95", box=box.SIMPLE)
    pooled = [prediction_errors([log.run.prediction_errors]), prediction_errors([run.prediction_errors for run in whole.runs])]
    for kind in kinds([log.run, *whole.runs]):
        cells = []
        for errors, runs in zip(pooled, (1, len(whole.runs)), strict=True):
            found = errors.get(kind)
            cells += ["-", "-", "-"] if found is None else [
                f"{found['iterations'] / runs:.0f}", f"{found['median']:.1%}", f"{found['p95']:.1%}"]
        table.add_row(kind, *cells)
    return table
