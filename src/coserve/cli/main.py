"""The command `coserve`: serve, keys, finetune, chat, demo, plan, bench.

Owns: arguments, progress display, exit codes. An error that the user can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import datetime
import resource
import sys
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from coserve.cli.bench import bench_app
from coserve.cli.plan import add_plan
from coserve.cli.serve import add_commands
from coserve.config.data import ADAPTERS, finetune_config_from_dict, setting_names
from coserve.config.settings import FinetuneConfig, OptimizerConfig, SamplingConfig
from coserve.config.values import AUTO, require
from coserve.core import ConfigError, CoserveError, InvalidRequest, one_line
from coserve.demo.command import demo
from coserve.engine.generation import Generator
from coserve.finetune.defaults import not_used, unused_settings
from coserve.finetune.job import JobEvent
from coserve.model.memory import GIB
from coserve.peft.described import described_adapter
from coserve.plots import loss_curve
from coserve.runtime.loaded import load_model
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import TextRules
from coserve.training.finetuning import finetune

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])
app.add_typer(bench_app, name="bench")
add_commands(app)
add_plan(app)
app.command()(demo)
console = Console()
notes = Console(stderr=True, quiet=not sys.stderr.isatty())
"""For lines that only people want, while a result may go into a pipe."""

DEVICE_HELP = "auto, cpu or cuda."
DTYPE_HELP = "auto (bfloat16 on CUDA and on CPUs that multiply it, else float32), float32, bfloat16, float64."
DeviceOption = Annotated[str, typer.Option(help=DEVICE_HELP)]
DtypeOption = Annotated[str, typer.Option(help=DTYPE_HELP)]


class TrainingDisplay:
    """Events of a job as a progress bar on a terminal, as lines elsewhere."""

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


def _rate_or_auto(text: str) -> float | str:
    return AUTO if text == AUTO else float(text)


def _count_or_auto(text: str) -> int | str:
    return AUTO if text == AUTO else int(text)


RATE: dict[str, Any] = {"parser": _rate_or_auto, "metavar": "FLOAT|auto"}
COUNT: dict[str, Any] = {"parser": _count_or_auto, "metavar": "INTEGER|auto"}


def _pattern(text: str | None, name: str, kind: Callable[[str], float]) -> dict[str, float] | None:
    """Reads 'q_proj=8,down_proj=32'; None of None."""
    if text is None:
        return None
    result = {}
    for item in text.split(","):
        if not item.strip():
            continue
        key, _, value = item.rpartition("=")
        try:
            result[key.strip()] = kind(value)
        except ValueError as error:
            raise ConfigError(f"{name}: write it as q_proj=8,down_proj=32, got {text!r}", param=name) from error
    return result


class Settings(NamedTuple):
    """What a settings file and flags ask for. config: the job's settings. adapter: those settings of the adapter that were
    given, by their fields' names, and its `kind` if that was given. options: the file's values of flags that aren't settings of
    a job (validation, adapter, resume, device, dtype)."""

    config: FinetuneConfig
    adapter: dict[str, Any]
    options: dict[str, Any]


def _settings(path: Path | None, given: dict[str, Any], kind: str | None = None) -> Settings:
    """Defaults, then the TOML file, then the command line. kind: the adapter's, from the command line. Raises ConfigError."""
    data = {} if path is None else _read_toml(path)
    loose = {name: data.pop(name) for name in list(data) if name not in _TABLES}
    options = {name: loose.pop(name) for name in _OPTIONS if name in loose}
    for name, value in options.items():
        kinds = "true or false" if name == "resume" else "a text"
        if isinstance(value, bool) != (name == "resume") or not isinstance(value, bool | str):
            raise ConfigError(f"{name}: must be {kinds} in {path}, got {value!r}", param=name)
    named = None if "kind" not in loose else str(loose.pop("kind"))
    chosen = _choose_adapter(data, kind or named)
    for name, value in loose.items():
        where = _home(data, name, chosen)
        if name in where and where[name] != value:
            word = _word(name)
            raise ConfigError(
                f"{word}: is {value!r} at the top level of {path} and {where[name]!r} in its table; leave one out", param=word
            )
        where[name] = value
    for name, value in given.items():
        if value is not None:
            _home(data, name, chosen)[name] = value
    adapter = dict(data.get(chosen, {}))
    if adapter.pop("use_dora", False):
        adapter["kind"] = "dora"
    if kind or named:
        adapter["kind"] = kind or named
    return Settings(finetune_config_from_dict(data), adapter, options)


def _read_toml(path: Path) -> dict[str, Any]:
    """A settings file as {field's name: value} and its tables. Names of flags at its top level become fields' names."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} can't be read as TOML ({error})", param="config") from error
    found: dict[str, Any] = {}
    for key, value in data.items():
        name = {"rank": "r"}.get(key.replace("-", "_"), key.replace("-", "_"))
        if name in _TABLES and not isinstance(value, dict):
            raise ConfigError(f"{name}: must be a table, [{name}], in {path}", param=name)
        if name in found:
            raise ConfigError(f"{_word(name)}: is given twice in {path}", param=_word(name))
        if name in ("output", "config", "model", "data"):
            raise ConfigError(f"{name}: give it on the command line, not in {path}", param=name)
        if isinstance(value, str) and name in ("target_modules", "feedforward_modules"):
            value = _targets(value)
        elif isinstance(value, str) and name in _PATTERNS:
            value = _pattern(value, name, _PATTERNS[name])
        elif type(value) is datetime.date and name == "template_date":
            value = value.isoformat()
        found[name] = value
    return found


def _home(data: dict[str, Any], name: str, chosen: str) -> dict[str, Any]:
    """The table that a setting belongs to. chosen: the adapter's."""
    owners = [section for section, names in _ADAPTERS.items() if name in names]
    if owners and chosen not in owners:
        word = _word(name)
        raise ConfigError(f"{word}: {chosen} adapters have no such setting, {' and '.join(owners)} do", param=word)
    if owners or name in setting_names(OptimizerConfig):
        table: dict[str, Any] = data.setdefault(chosen if owners else "optimizer", {})
        return table
    return data


def _word(name: str) -> str:
    """The name of a field's flag."""
    return {"r": "rank"}.get(name, name)


_ADAPTERS = {section: setting_names(config) for section, config in ADAPTERS.values()}
"""{table of a TOML file: its settings}."""
_TABLES = (*_ADAPTERS, "optimizer")
_OPTIONS = ("validation", "adapter", "resume", "device", "dtype")
"""Flags of `coserve finetune` that a settings file may hold too, but aren't settings of a job."""
_PATTERNS: dict[str, Callable[[str], float]] = {"rank_pattern": int, "alpha_pattern": float}


def _choose_adapter(data: dict[str, Any], kind: str | None) -> str:
    """The table of the kind of adapter that is asked for, by `kind` or by the table itself; it is there afterwards."""
    others = [name for name in _ADAPTERS if name != "lora" and name in data]
    if kind is None:
        if others and "lora" in data:
            raise ConfigError(f"lora: the settings file has a table [{others[0]}] too; leave one out", param="lora")
        return others[0] if others else "lora"
    if kind not in ADAPTERS:
        raise ConfigError(f"kind: must be one of {', '.join(ADAPTERS)}, got {kind!r}", param="kind")
    chosen, _ = ADAPTERS[kind]
    for name in others:
        if name != chosen:
            raise ConfigError(f"kind: it is {kind}, but the settings file has a table [{name}]; leave one out", param="kind")
    if chosen != "lora" and "lora" in data:
        raise ConfigError(f"kind: it is {kind}, but the settings file has a table [lora]; leave one out", param="kind")
    data.setdefault(chosen, {})
    if kind in ("lora", "dora"):
        data["lora"]["use_dora"] = kind == "dora"
    return chosen


def _targets(text: str | None) -> Any:
    return text if text is None or text == "all-linear" else [name.strip() for name in text.split(",") if name.strip()]


@app.command("finetune")
def finetune_command(
    paths: Annotated[list[str], typer.Argument(metavar="[MODEL] DATA.jsonl", help="Model (default SmolLM2) and data.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New directory for the adapter, metrics and checkpoints.")],
    validation: Annotated[Path | None, typer.Option(help="JSON Lines file for validation loss.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Adapter directory to continue from.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the job in --output.")] = False,
    objective: Annotated[str | None, typer.Option(help="sft or dpo.")] = None,
    dpo_beta: Annotated[float | None, typer.Option(help="DPO's inverse temperature.")] = None,
    epochs: Annotated[Any, typer.Option(**RATE, help="Passes over the data (3, more of few examples).")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, over --epochs.")] = None,
    batch_size: Annotated[Any, typer.Option(**COUNT, help="Examples per optimizer step (1 to 16, by the data).")] = None,
    max_microbatch_tokens: Annotated[int | None, typer.Option(help="Tokens packed together (2048).")] = None,
    window_tokens: Annotated[int | None, typer.Option(help="Tokens per unit (1024).")] = None,
    activation_memory: Annotated[
        str | None, typer.Option(help="Of a micro-batch: bytes (12.5GB), a share below 1 of the fastest plan's, or auto.")
    ] = None,
    activation_compression: Annotated[
        str | None, typer.Option(help="Of what is kept: lossless, fp8 (changes gradients a little) or none (lossless).")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example in tokens.")] = None,
    too_long: Annotated[str | None, typer.Option(help="Longer examples: error, drop or truncate.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="keep, or merge: put into the first user turn (keep).")] = None,
    allow_control_tokens: Annotated[
        bool | None, typer.Option("--allow-control-tokens", help="Control tokens written out in the data count.")
    ] = None,
    template_date: Annotated[str | None, typer.Option(help="Today for chat templates, YYYY-MM-DD (the start's day).")] = None,
    learning_rate: Annotated[Any, typer.Option(**RATE, help="Peak learning rate (auto: by the model's width).")] = None,
    schedule: Annotated[str | None, typer.Option(help="constant, linear or cosine.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    warmup_ratio: Annotated[float | None, typer.Option(help="The same as a share of all steps.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help="Gradient clipping; 0 turns it off (1.0).")] = None,
    kind: Annotated[str | None, typer.Option(help=f"Kind of adapter: {', '.join(ADAPTERS)} (lora).")] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="LoRA rank (16).")] = None,
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha (32).")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout (0).")] = None,
    target_modules: Annotated[str | None, typer.Option(help="all-linear, or names joined by commas.")] = None,
    use_rslora: Annotated[bool | None, typer.Option("--use-rslora", help="Scale by alpha / sqrt(r).")] = None,
    rank_pattern: Annotated[str | None, typer.Option(help="Ranks by module: q_proj=8,down_proj=32.")] = None,
    alpha_pattern: Annotated[str | None, typer.Option(help="Alphas by module: q_proj=16.")] = None,
    feedforward_modules: Annotated[str | None, typer.Option(help="IA3: modules whose input is scaled (down_proj).")] = None,
    size: Annotated[int | None, typer.Option(help="Width of a bottleneck (64).")] = None,
    placement: Annotated[str | None, typer.Option(help="Bottlenecks: pfeiffer or houlsby.")] = None,
    activation: Annotated[str | None, typer.Option(help="Bottlenecks: relu or gelu.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of order, dropout and A's start (0).")] = None,
    checkpoint_steps: Annotated[Any, typer.Option(**COUNT, help="Steps between checkpoints (0: at the end).")] = None,
    validation_steps: Annotated[int | None, typer.Option(help="Steps between validations (0: each epoch).")] = None,
    deterministic: Annotated[bool | None, typer.Option("--deterministic", help="Bit-identical after a resume.")] = None,
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    dtype: Annotated[str | None, typer.Option(help=DTYPE_HELP)] = None,
) -> None:
    """Finetune an adapter on a JSON Lines file. What isn't given is chosen from the data and shown at the start."""
    if len(paths) > 2:
        raise ConfigError(f"data: give [MODEL] DATA.jsonl, got {len(paths)} arguments: {' '.join(paths)}", param="data")
    asked = _settings(config, {
        "objective": objective, "dpo_beta": dpo_beta, "epochs": epochs, "max_steps": max_steps, "batch_size": batch_size,
        "max_microbatch_tokens": max_microbatch_tokens, "window_tokens": window_tokens, "activation_memory": activation_memory,
        "activation_compression": activation_compression, "max_length": max_length, "too_long": too_long,
        "system_prompt": system_prompt, "allow_control_tokens": allow_control_tokens, "template_date": template_date,
        "learning_rate": learning_rate, "schedule": schedule, "warmup_steps": warmup_steps, "warmup_ratio": warmup_ratio,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm, "r": rank, "alpha": alpha, "dropout": dropout,
        "target_modules": _targets(target_modules), "use_rslora": use_rslora, "seed": seed,
        "feedforward_modules": _targets(feedforward_modules), "size": size, "placement": placement, "activation": activation,
        "rank_pattern": _pattern(rank_pattern, "rank_pattern", int),
        "alpha_pattern": _pattern(alpha_pattern, "alpha_pattern", float),
        "checkpoint_steps": checkpoint_steps, "validation_steps": validation_steps, "deterministic": deterministic,
    }, kind)
    settings, options = asked.config, asked.options
    start = adapter if adapter is not None else options.get("adapter")
    with TrainingDisplay() as display:
        if start is not None:
            unused = unused_settings(asked.adapter, described_adapter(Path(start)))
            if unused:
                display(JobEvent(level="warn", message=not_used(str(start), unused)))
            settings = replace(settings, lora=None, ia3=None, bottleneck=None)
        result = finetune(
            paths[-1], output, model=paths[0] if len(paths) == 2 else None, config=settings, start=start,
            validation=validation if validation is not None else options.get("validation"),
            resume=resume or bool(options.get("resume")), device=device or options.get("device", "auto"),
            dtype=dtype or options.get("dtype", "auto"), listen=display,
        )
    unit = "DPO loss per pair (nats)" if settings.objective == "dpo" else "cross-entropy per label token (nats)"
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
) -> None:
    """Talk to a model, with or without an adapter. Ends with Ctrl-D."""
    require(max_tokens >= 1, "max_tokens", f"must be at least 1, got {max_tokens}")
    sampling = SamplingConfig(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded = load_model(model, device=device, dtype=dtype, report=lambda line: notes.print(line, style="dim"))
    tuned = loaded.load_adapter(adapter, warn=_warn) if adapter is not None else None
    generator, ends = Generator(loaded, tuned), loaded.end_token_ids.union(() if tuned is None else tuned.end_token_ids)
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
    """A warning for users is one line; others keep Python's form, with the place in the code."""
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
