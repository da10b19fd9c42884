"""What is seen while the demo runs: a live panel on a terminal, a line every few seconds elsewhere.

Owns: wording and layout. Does not own: figures (story.py gives them as a Board).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table

from coserve.bench.metrics import SloInMs
from coserve.demo.questions import Answer
from coserve.demo.report import DemoReport
from coserve.demo.traffic import Figures

LINE_S = 5.0
_LONGEST_BASE = 90


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """The state of both workloads. Rates are tokens per second of the last seconds."""

    elapsed_s: float
    step: int
    num_steps: int
    loss: float | None
    finetune_rate: float
    inference_rate: float
    num_running: int
    figures: Figures
    objectives: SloInMs


class Display:
    """Leaving it takes the live panel away."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Live | None = None
        self._shown_s = float("-inf")

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_board()

    def say(self, text: str, style: str = "") -> None:
        """One line; no markup is read in it."""
        self.console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def dim(self, text: str) -> None:
        """A line of the server's."""
        self.say(text, "dim")

    def step(self, number: int, text: str) -> None:
        """The headline of a part."""
        self.console.print(f"[bold]{number}.[/bold] {escape(text)}", highlight=False, soft_wrap=True)

    def update(self, board: Board) -> None:
        """Shows the newest state."""
        if not self.console.is_terminal:
            if board.elapsed_s - self._shown_s >= LINE_S:
                self._shown_s = board.elapsed_s
                self.say(f"   {describe(board)}")
            return
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(panel(board))

    def close_board(self) -> None:
        """Takes the live panel away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def describe(board: Board) -> str:
    """The board as one line."""
    loss = "" if board.loss is None else f", loss {board.loss:.3f}"
    figures = board.figures
    text = (
        f"{board.elapsed_s:4.0f} s  step {board.step}/{board.num_steps}{loss} | finetuning {board.finetune_rate:.0f} tokens/s "
        f"| chat {board.inference_rate:.0f} tokens/s, {figures.num_requests} requests"
    )
    if not figures.num_requests:
        return text
    failed = f", {figures.num_failed} failed" if figures.num_failed else ""
    return (
        f"{text}{failed}, ms per token p50 {_number(figures.tpot_ms_p50)} p99 {_number(figures.tpot_ms_p99)} "
        f"(objective {board.objectives.tpot_ms:.0f}), {_share(figures.attainment)} in time"
    )


def panel(board: Board) -> RenderableType:
    """The board for a terminal."""
    figures, objectives = board.figures, board.objectives
    table = Table.grid(padding=(0, 2))
    loss = "" if board.loss is None else f"loss {board.loss:.3f}"
    step = f"step {board.step}/{board.num_steps}"
    table.add_row("[bold]finetuning[/bold]", f"{board.finetune_rate:.0f} tokens/s", step, loss)
    failed = f", [red]{figures.num_failed} failed[/red]" if figures.num_failed else ""
    table.add_row(
        "[bold]chat[/bold]", f"{board.inference_rate:.0f} tokens/s", f"{figures.num_requests} requests{failed}",
        f"{board.num_running} running",
    )
    late = figures.tpot_ms_p99 is not None and figures.tpot_ms_p99 > objectives.tpot_ms
    table.add_row(
        "[bold]ms per token[/bold]", f"p50 {_number(figures.tpot_ms_p50)}",
        f"p99 [{'red' if late else 'green'}]{_number(figures.tpot_ms_p99)}[/] of {objectives.tpot_ms:.0f}",
        f"{_share(figures.attainment)} in time",
    )
    bar = ProgressBar(total=max(1, board.num_steps), completed=board.step)
    return Panel(Group(table, bar), title=f"one engine, two workloads, {board.elapsed_s:.0f} s", title_align="left")


def answers_table(answers: Sequence[Answer]) -> Table:
    """Questions with both answers; a tuned one is green if it is right."""
    table = Table("question", "base", "tuned", show_lines=True)
    for answer in answers:
        base, tuned = (" ".join(text.split()) for text in (answer.base, answer.tuned))
        style = "green" if answer.tuned_right else "red"
        short = base if len(base) <= _LONGEST_BASE else base[: _LONGEST_BASE - 3] + "..."
        table.add_row(escape(answer.question), f"[dim]{escape(short)}[/dim]", f"[{style}]{escape(tuned)}[/{style}]")
    return table


def summary_lines(report: DemoReport, objectives: SloInMs) -> list[str]:
    """The end's numbers."""
    figures, total = report.figures, len(report.answers)
    beside, alone = report.finetune_tokens_per_s, report.finetune_alone_tokens_per_s
    share = f", {beside / alone:.0%} of that" if alone and beside is not None else ""
    return [
        f"facts right   base {report.facts_right_base} of {total}, tuned {report.facts_right_tuned} of {total}; "
        f"loss {report.loss_first:.2f} -> {report.loss_last:.2f}",
        f"chat          {figures.num_requests} requests beside the training, {figures.num_failed} failed, "
        f"{_share(figures.attainment)} within {objectives.tpot_ms:.0f} ms per token and {objectives.ttft_ms / 1e3:g} s to the "
        f"first; ms per token: p50 {_number(figures.tpot_ms_p50)}, p99 {_number(figures.tpot_ms_p99)}",
        f"finetuning    {_number(alone)} tokens/s alone, {_number(beside)} beside that chat{share}",
        f"took          {report.duration_s:.0f} s",
    ]

