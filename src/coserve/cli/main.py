"""The command `coserve`: serve, keys, deploy, finetune, data, chat, demo, plan, profile, bench.

Owns: arguments, progress display, exit codes. An error that the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import resource
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from coserve.cli.bench import bench_app
from coserve.cli.data import data_app
from coserve.cli.deploy import deploy
from coserve.cli.plan import PlanCommand, plan
from coserve.cli.profile import profile
from coserve.cli.serve import ServeCommand, keys_app, serve
from coserve.cli.settings import (
    QUANTIZATION_HELP,
    RANKS_FLAGS,
    RANKS_HELP,
    SHARDING_HELP,
    QuantizationOption,
    RanksOption,
    job_flags,
    read_settings,
    with_flags,
)
from coserve.config.settings import PAIRED, SamplingConfig
from coserve.config.values import require
from coserve.core import CoserveError, InvalidRequest, one_line
from coserve.demo.command import demo
from coserve.engine.generation import Generator
from coserve.finetune.defaults import not_used, unused_settings
from coserve.finetune.job import JobEvent
from coserve.model.memory import GIB
from coserve.peft.adapter import Adapter
from coserve.peft.described import described_adapter
from coserve.peft.format import bind_adapter
from coserve.peft.gate import read_adapter
from coserve.plots import loss_curve
from coserve.runtime.loaded import adapter_base, load_model
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import TextRules
from coserve.training.finetuning import finetune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])
app.add_typer(bench_app, name="bench")
app.command(cls=ServeCommand)(serve)
app.add_typer(keys_app, name="keys")
app.command()(deploy)
app.add_typer(data_app, name="data")
app.command(cls=PlanCommand)(plan)
app.command(cls=PlanCommand)(profile)
app.command()(demo)
console = Console()
notes = Console(stderr=True, quiet=not sys.stderr.isatty())
"""For lines that only people want. A result on standard output may go into a pipe."""

DEVICE_HELP = "auto, cpu or cuda."
DTYPE_HELP = "auto (bfloat16 on CUDA and on CPUs that multiply it, else float32), float32, bfloat16, float64."
DeviceOption = Annotated[str, typer.Option(help=DEVICE_HELP)]
DtypeOption = Annotated[str, typer.Option(help=DTYPE_HELP)]


class TrainingDisplay:
    """Shows events of a job: as a progress bar on a terminal, as lines elsewhere."""

    def __init__(self) -> None:
        self.progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} tokens/s  {task.fields[memory]:.2f} GiB peak"),
            TimeRemainingColumn(), console=console, disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: JobEvent) -> None:
        row = event.row
        if row is None:
            style = "yellow" if event.level == "warn" else "dim"
            console.print(event.message, style=style, highlight=False, markup=False, soft_wrap=True)
            return
        memory, rate = peak_memory_bytes() / GIB, row.tokens / row.seconds
        if not console.is_terminal:
            valid = "" if row.valid_loss is None else f", validation loss {row.valid_loss:.4f}"
            console.print(
                f"{event.message}, {rate:.0f} tokens/s, {memory:.2f} GiB peak{valid}, step {row.step} of {event.num_steps}",
                highlight=False, soft_wrap=True,
            )
            return
        if self.task is None:
            self.progress.start()
            self.task = self.progress.add_task("", total=event.num_steps, loss=row.train_loss, rate=rate, memory=memory)
        self.progress.update(self.task, completed=row.step, loss=row.train_loss, rate=rate, memory=memory)
        if row.valid_loss is not None:
            console.print(f"step {row.step}: validation loss {row.valid_loss:.4f}", highlight=False)


def peak_memory_bytes() -> int:
    """This process's peak resident memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@app.command("finetune")
@with_flags(job_flags())
def finetune_command(
    paths: Annotated[list[str], typer.Argument(metavar="[MODEL] DATA.jsonl", help="Model (default SmolLM2) and data.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the adapter, metrics and checkpoints.")],
    validation: Annotated[Path | None, typer.Option(help="JSON Lines file for validation loss.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory to continue from.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the job in --output.")] = False,
    *,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
    quantization: Annotated[str | None, typer.Option("--quantization", "-q", help=QUANTIZATION_HELP)] = None,
    ranks: Annotated[int | None, typer.Option(*RANKS_FLAGS, help=RANKS_HELP)] = None,
    adapter_sharding: Annotated[str | None, typer.Option(help=SHARDING_HELP)] = None,
    **given: Any,
) -> None:
    """Finetune an adapter on a JSON Lines file. What isn't given is chosen from the data and shown at the start."""
    require(len(paths) <= 2, "data", f"give [MODEL] DATA.jsonl, got {len(paths)} arguments: {' '.join(paths)}")
    asked = read_settings(config, given, given.pop("kind"))
    settings, options = asked.config, asked.options
    start = adapter if adapter is not None else options.get("adapter")
    with TrainingDisplay() as display:
        if start is not None:
            unused = unused_settings(asked.adapter, described_adapter(Path(start)))
            if unused:
                display(JobEvent(level="warn", message=not_used(str(start), unused)))
            settings = settings.with_adapter(None)
        result = finetune(
            paths[-1], output, model=paths[0] if len(paths) == 2 else None, config=settings, start=start,
            validation=validation if validation is not None else options.get("validation"),
            resume=resume or bool(options.get("resume")), device=device or options.get("device", "auto"),
            dtype=dtype or options.get("dtype", "auto"), quantization=quantization or options.get("quantization"),
            tensor_parallel_size=options.get("tensor_parallel_size", 1) if ranks is None else ranks,
            adapter_sharding=adapter_sharding or options.get("adapter_sharding", ""), listen=display,
        )
    paired = settings.objective in PAIRED
    unit = f"{settings.objective.upper()} loss per pair (nats)" if paired else "cross-entropy per label token (nats)"
    loss_curve(result.rows, output / "loss.png", title=f"{result.model.name} on {Path(paths[-1]).name}", unit=unit)
    print(f"adapter in {output} (PEFT's format), curve in {output / 'loss.png'}")
    model = f"{paths[0]} " if len(paths) == 2 else ""
    print(f"talk to it: coserve chat {model}--adapter {output}")


@app.command()
def chat(
    model: Annotated[str | None, typer.Argument(help="Model (default SmolLM2).")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory in PEFT's format.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    allow_control_tokens: Annotated[
        bool, typer.Option("--allow-control-tokens", help="Control tokens written out in what you type count.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = "none",
    tensor_parallel_size: RanksOption = 1,
) -> None:
    """Talk to a model, with or without an adapter. Ends with Ctrl-D."""
    require(max_tokens >= 1, "max_tokens", f"must be at least 1, got {max_tokens}")
    sampling = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded = load_model(
        model, device=device, dtype=dtype, report=lambda line: notes.print(line, style="dim"),
        tensor_parallel_size=tensor_parallel_size, quantization=quantization,
    )
    passed = None if adapter is None else read_adapter(adapter, adapter_base(loaded))
    ends = loaded.end_token_ids.union(() if passed is None else passed.end_tokens)
    tuned: Adapter | Path | None = adapter
    if passed is not None:
        for warning in passed.warnings:
            _warn(warning)
        if tensor_parallel_size == 1:  # else each rank takes its part, which the generator sees to
            tuned = bind_adapter(passed, loaded.weights)
    generator = Generator(loaded, tuned)
    start = [{"role": "system", "content": system}] if system else []
    messages, rules = list(start), TextRules(allow_control_tokens=allow_control_tokens)
    while True:
        try:
            line = console.input("[bold]> [/bold]") if console.is_terminal else input()
        except (EOFError, KeyboardInterrupt):
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            prompt = loaded.tokenizer.encode_chat(messages, rules=rules)
            stream = IncrementalDetokenizer(loaded.tokenizer, context=prompt)

            def show(_: int, token: int, stream: IncrementalDetokenizer = stream, pieces: list[str] = pieces) -> None:
                if token not in ends:
                    pieces.append(stream.push(token))
                    print(pieces[-1], end="", flush=True)

            generator.generate([prompt], sampling, on_token=show)
        except InvalidRequest as error:
            console.print(f"{error}; the conversation starts again", style="yellow")
            messages = list(start)
            continue
        pieces.append(stream.finish())
        print(pieces[-1], flush=True)
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _warn(message: str) -> None:
    console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Writes a warning for users as one line. Other warnings keep Python's form, with the place in the code."""
    if category is UserWarning:
        return f"warning: {message}\n"
    return _python_format(message, category, filename, lineno, line)


_python_format = warnings.formatwarning


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit code 2."""
    warnings.formatwarning = _format_warning
    try:
        app()
    except (CoserveError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
