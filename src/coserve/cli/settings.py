"""Flags made from settings; for `coserve finetune`, the TOML file under them too.

Owns: how settings are written in flags and files. Does not own: which settings there are (config/settings.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from coserve.config.data import ADAPTERS, KNOBS, NAMES, finetune_config_from_dict, read_toml
from coserve.config.settings import ADAPTER_TABLES, FinetuneConfig
from coserve.config.values import AUTO, Auto, field_types, require
from coserve.core import ConfigError

_TABLES = (*ADAPTER_TABLES, "optimizer")
"""Tables of a settings file."""
_OPTIONS: Mapping[str, tuple[type, str]] = {
    **dict.fromkeys(("validation", "adapter", "device", "dtype", "quantization", "adapter_sharding"), (str, "a text")),
    "resume": (bool, "true or false"), "tensor_parallel_size": (int, "a whole number"),
}
"""Flags of `coserve finetune` that a settings file may hold too, but aren't settings of a job; with the type of their
values."""


QUANTIZATION_HELP = "none, or fp8: the layers' matrices in 8-bit floats."
QuantizationOption = Annotated[str, typer.Option("--quantization", "-q", help=QUANTIZATION_HELP)]
"""How the layers' matrices are stored, for commands that load a model."""
RANKS_HELP = "Processes that share the model, a GPU each (1)."
SHARDING_HELP = "Where parameters must lie on them: q_proj.lora_A=whole,q_proj.lora_B=out (the cheapest)."
RANKS_FLAGS = ("--tensor-parallel-size", "-tp")
RanksOption = Annotated[int, typer.Option(*RANKS_FLAGS, help=RANKS_HELP)]
"""How many ranks share the model, for commands that load one."""


class Settings(NamedTuple):
    """What a settings file and flags ask for. config: the job's settings. adapter: those settings of the adapter that were
    given, by their fields' names, and its `kind` if that was given. options: the file's values of flags that aren't settings of
    a job (_OPTIONS)."""

    config: FinetuneConfig
    adapter: dict[str, Any]
    options: dict[str, Any]


def with_flags(flags: Sequence[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command these flags in place of its `**given`, in which their values come; None: not given. Its keyword-only
    parameters are shown behind them."""
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())
        before = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
        behind = [p for p in own if p.kind is p.KEYWORD_ONLY]
        command.__signature__ = inspect.Signature([*before, *flags, *behind])  # type: ignore[attr-defined]
        return command

    return decorate


def flag(word: str, kind: Any, metadata: Mapping[str, Any]) -> inspect.Parameter:
    """A flag for a setting. word: what users call it; kind: type of its values; metadata: what `knob` was given."""
    more = {"metavar": metadata["metavar"]} if metadata.get("metavar") else dict[str, Any]()
    for number, shown in ((float, "FLOAT|auto"), (int, "INTEGER|auto")):
        if kind == number | Auto:
            more = {"parser": lambda text, number=number: text if text == AUTO else number(text), "metavar": shown}
    parsed: Any = kind if kind in (int, float, bool, Path) else str
    if typing.get_origin(kind) is tuple:
        parsed = list[str]
    names = [f"--{word.replace('_', '-')}", *([metadata["short"]] if metadata.get("short") else [])]
    option = typer.Option(*names, help=metadata["help"], **more)
    parsed = Any if "parser" in more else parsed | None
    return inspect.Parameter(word, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[parsed, option])


def config_flags(config: type) -> list[inspect.Parameter]:
    """Flags of a dataclass of settings."""
    types = field_types(config)
    return [flag(f.name, types[f.name], f.metadata) for f in dataclasses.fields(config) if f.metadata.get("help")]


def job_flags() -> list[inspect.Parameter]:
    """Flags of a job's settings. The kind of adapter comes before what the kinds have."""
    known = [knob for knob in KNOBS.values() if knob.metadata.get("help")]
    flags = [flag(knob.word, str if typing.get_origin(knob.type) is tuple else knob.type, knob.metadata) for knob in known]
    place = next(number for number, knob in enumerate(known) if knob.of_adapter)
    kind = flag("kind", str, {"help": f"Kind of adapter: {', '.join(ADAPTERS)} (lora)."})
    return [*flags[:place], kind, *flags[place:]]


def read_settings(path: Path | None, given: Mapping[str, Any], kind: str | None = None) -> Settings:
    """Defaults, then the TOML file, then flags. given: the flags' values by the users' names; None: not given. kind: the
    adapter's, from the command line. Raises ConfigError."""
    data = {} if path is None else _read_toml(path)
    loose = {name: data.pop(name) for name in list(data) if name not in _TABLES}
    options = {name: loose.pop(name) for name in _OPTIONS if name in loose}
    for name, value in options.items():
        kind_of_option, text = _OPTIONS[name]
        require(type(value) is kind_of_option, name, f"must be {text} in {path}, got {value!r}")
    named = None if "kind" not in loose else str(loose.pop("kind"))
    chosen = _choose_adapter(data, kind or named)
    for name, value in loose.items():
        where = _home(data, name, chosen)
        other = where.get(name, value)
        require(other is value or other == value, _word(name),  # nan equals nothing
                f"is {value!r} at the top level of {path} and {other!r} in its table; leave one out")
        where[name] = value
    for word, value in given.items():
        if value is not None:
            _home(data, NAMES.get(word, word), chosen)[NAMES.get(word, word)] = _read(NAMES.get(word, word), value)
    adapter = dict(data.get(chosen, {}))
    if adapter.pop("use_dora", False):
        adapter["kind"] = "dora"
    if kind or named:
        adapter["kind"] = kind or named
    return Settings(finetune_config_from_dict(data), adapter, options)


def _read_toml(path: Path) -> dict[str, Any]:
    """A settings file as {field's name: value} and its tables. Names of flags at its top level become fields' names."""
    found: dict[str, Any] = {}
    for key, value in read_toml(path).items():
        name = NAMES.get(key.replace("-", "_"), key.replace("-", "_"))
        require(name not in _TABLES or isinstance(value, dict), name, f"must be a table, [{name}], in {path}")
        require(name not in found, _word(name), f"is given twice in {path}")
        require(name not in ("output", "config", "model", "data"), name, f"give it on the command line, not in {path}")
        found[name] = _read(name, value)
    return found


def _read(name: str, value: Any) -> Any:
    """A setting's value from how it is written: a list of names or a pattern may be one text, a date may be TOML's."""
    knob = KNOBS.get(name)
    if knob is None or not isinstance(value, str):
        return value.isoformat() if name == "template_date" and type(value) is datetime.date else value
    if typing.get_origin(knob.type) is Mapping:
        return _pattern(value, name, typing.get_args(knob.type)[1])
    names = tuple[str, ...]
    if knob.type != names and names not in typing.get_args(knob.type):
        return value
    return value if value == "all-linear" else [part.strip() for part in value.split(",") if part.strip()]


def _pattern(text: str, name: str, kind: Callable[[str], float]) -> dict[str, float]:
    """Reads 'q_proj=8,down_proj=32'."""
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


def _home(data: dict[str, Any], name: str, chosen: str) -> dict[str, Any]:
    """The table that a setting belongs to. chosen: the adapter's."""
    sections = KNOBS[name].sections if name in KNOBS else ("",)
    fits = name not in KNOBS or not KNOBS[name].of_adapter or chosen in sections
    require(fits, _word(name), f"{chosen} adapters have no such setting, {' and '.join(sections)} do")
    section = chosen if chosen in sections else sections[0]
    table: dict[str, Any] = data.setdefault(section, {}) if section else data
    return table


def _word(name: str) -> str:
    """What users call a field."""
    return KNOBS[name].word if name in KNOBS else name


def _choose_adapter(data: dict[str, Any], kind: str | None) -> str:
    """The table of the kind of adapter that is asked for, by `kind` or by the table itself; it is there afterwards."""
    others = [name for name in _TABLES if name not in ("lora", "optimizer") and name in data]
    if kind is None:
        found = others[0] if others else "lora"
        require(not others or "lora" not in data, "lora", f"the settings file has a table [{found}] too; leave one out")
        return found
    require(kind in ADAPTERS, "kind", f"must be one of {', '.join(ADAPTERS)}, got {kind!r}")
    chosen = ADAPTERS[kind]
    for name in (*others, "lora"):
        beside = name in data and name != chosen
        require(not beside, "kind", f"it is {kind}, but the settings file has a table [{name}]; leave one out")
    data.setdefault(chosen, {})
    if kind in ("lora", "dora"):
        data["lora"]["use_dora"] = kind == "dora"
    return chosen


def read_numbers(text: str, name: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Reads numbers joined by commas."""
    try:
        return tuple(kind(item) for item in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{name}: write numbers joined by commas, got {text!r}", param=name) from error
