"""`coserve data check`: what a file of training data holds, and which of its tokens a job would train.

Owns: arguments, how the result is printed, the exit status. Does not own: the reading (finetune/datacheck.py).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from coserve.cli.settings import job_flags, read_settings, with_flags
from coserve.config.data import read_toml
from coserve.config.settings import FinetuneConfig
from coserve.config.values import require
from coserve.core import NotFound
from coserve.finetune.datacheck import DataCheck, ShownExample, as_json, check_data, guess_objective
from coserve.model.architecture import read_architecture
from coserve.model.locate import DEFAULT_MODEL, locate_model
from coserve.text.tokenizer import ChatTokenizer
from coserve.training.request import max_example_tokens

data_app = typer.Typer(no_args_is_help=True, help="Look at training data.")
console = Console(highlight=False, soft_wrap=True)
notes = Console(stderr=True, highlight=False)

_SETTINGS = (
    "objective", "max_length", "too_long", "system_prompt", "allow_control_tokens", "template_date", "max_microbatch_tokens",
)
"""A job's settings on which the meaning of its data depends."""
_SLOW_BYTES = 1 << 20
"""Files from this size on get a progress bar."""
_TRAINED = "bold green underline"
_OPEN, _CLOSE = "[[", "]]"
"""Around trained text where it can't be coloured."""
_SHARES = 1000


@data_app.callback()
def data() -> None:
    """Look at training data."""


@data_app.command("check")
@with_flags([parameter for parameter in job_flags() if parameter.name in _SETTINGS])
def check_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON Lines file.")],
    model: Annotated[str | None, typer.Option(help="Model whose chat template and tokens count (SmolLM2).")] = None,
    show: Annotated[int, typer.Option(help="Lines to show with their trained tokens marked.")] = 2,
    problems: Annotated[int, typer.Option(help="Problems to list.")] = 20,
    config: Annotated[Path | None, typer.Option(help="TOML file of settings, as for finetune.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **given: Any,
) -> None:
    """Counts, lengths, problems by line, and what of it is trained. Exit status 1 if there are problems."""
    require(show >= 0, "show", f"must be at least 0, got {show}")
    require(problems >= 0, "problems", f"must be at least 0, got {problems}")
    settings = read_settings(config, given).config
    if not file.is_file():
        raise NotFound(f"no such file: {file}", param="file")
    if given["objective"] is None and (config is None or "objective" not in read_toml(config)):
        settings = dataclasses.replace(settings, objective=guess_objective(file))
    directory = locate_model(model, report=lambda line: notes.print(line, style="dim", markup=False))
    checked = _check(file, directory, settings, show, problems)
    if json_output:
        print(json.dumps({"file": str(file), "model": model or DEFAULT_MODEL, **as_json(checked)}))
    else:
        _print(file, model or DEFAULT_MODEL, checked)
    if checked.num_problems:
        raise typer.Exit(1)


def _check(file: Path, directory: Path, settings: FinetuneConfig, show: int, problems: int) -> DataCheck:
    limit = max_example_tokens(settings, read_architecture(directory))
    with _progress(file.stat().st_size >= _SLOW_BYTES) as on_line:
        return check_data(
            file, ChatTokenizer.load(directory), settings, max_length=limit, num_shown=show, max_problems=problems,
            on_line=on_line,
        )


@contextmanager
def _progress(slow: bool) -> Iterator[Callable[[float], None]]:
    """Shows how far a reading is, on a terminal."""
    if not slow or not notes.is_terminal:
        yield lambda _: None
        return
    with Progress(TextColumn("reading"), BarColumn(), TaskProgressColumn(), console=notes, transient=True) as progress:
        task, last = progress.add_task("", total=_SHARES), 0

        def on_line(share: float) -> None:
            nonlocal last
            if int(share * _SHARES) > last:
                last = int(share * _SHARES)
                progress.update(task, completed=last)

        yield on_line


def _print(file: Path, model: str, checked: DataCheck) -> None:
    _say(f"{file}: {checked.num_lines} lines, objective {checked.objective}, read for {model}")
    unit = "examples" if checked.objective == "sft" else "pairs"
    for layout, count in checked.layouts.items():
        _say(f"  layout {{{layout}}}: {count}")
    _say(f"  {unit} that a job would train on: {checked.num_usable}")
    if (lengths := checked.lengths) is not None:
        _say(f"  tokens of an example: {lengths.min} to {lengths.max}, median {lengths.median}, 95% at most {lengths.p95}")
        share = lengths.trained / max(1, lengths.total)
        _say(f"  tokens in all: {lengths.total}, trained {lengths.trained} ({share:.0%})")
    _say(f"  longer than max_length {checked.max_length}: {checked.num_too_long}")
    for warning in checked.warnings:
        _say(f"warning: {warning}", "yellow")
    for example in checked.shown:
        _show(example)
    if checked.shown:
        _say("Trained tokens are green and underlined." if console.is_terminal else f"Trained tokens are in {_OPEN} {_CLOSE}.",
             "dim")
    if checked.num_problems:
        _say(f"{checked.num_problems} problems, for which a job would be refused:", "bold red")
        for problem in checked.problems:
            _say(f"  {'' if problem.line is None else f'line {problem.line}: '}{problem.message}")
        if checked.num_problems > len(checked.problems):
            _say(f"  and {checked.num_problems - len(checked.problems)} more; --problems N lists more")


def _show(example: ShownExample) -> None:
    which = f", example {example.number} of {example.num_of_line}" if example.num_of_line > 1 else ""
    console.rule(
        Text(f"line {example.line}, {example.part}{which}: {example.num_tokens} tokens, {example.num_trained} trained"),
        align="left", characters="-",
    )
    text = Text()
    for piece in example.pieces:
        if console.is_terminal:
            text.append(_visible(piece.text), _TRAINED if piece.trained else "")
        else:
            text.append(f"{_OPEN}{_visible(piece.text)}{_CLOSE}" if piece.trained else _visible(piece.text))
    console.print(text, end="" if text.plain.endswith("\n") else "\n")


def _say(line: str, style: str = "") -> None:
    console.print(Text(_visible(line)), style=style)


def _visible(text: str) -> str:
    """The text with control characters replaced by their symbols: data must not steer the terminal."""
    return "".join(
        character if character.isprintable() or character in "\n\t" else _symbol(character) for character in text
    )


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"
