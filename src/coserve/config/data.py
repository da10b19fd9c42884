"""Settings as plain data: the tables of JSON and TOML, and adapters by the name of their kind.

Owns: how settings are written and read back, the kinds' names, what users call a job's settings (`KNOBS`, from which flags of
the command line, keys of settings files and fields of bodies are made). Does not own: what settings there are (settings.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from coserve.config.settings import ADAPTER_TABLES, AdapterConfig, AdapterKind, FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.config.values import field_types, require
from coserve.core import ConfigError


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON types; `finetune_config_from_dict` reads a FinetuneConfig back."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def finetune_config_from_dict(data: Mapping[str, Any]) -> FinetuneConfig:
    """Reads what `to_dict` wrote. Raises ConfigError on a key that does not exist."""
    values = dict(data)
    sections: dict[str, Any] = {}
    for name, cls in _SECTIONS.items():
        given = values.pop(name, None)
        if given is None:
            continue
        require(isinstance(given, Mapping), name, f"must be a table of {cls.__name__}'s settings, got {given!r}")
        tuples = {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
        _check_known(cls, given)
        sections[name] = cls(**{**given, **tuples})
    if sections.get("lora") == LoraConfig() and len(sections.keys() & ADAPTER_TABLES.keys()) > 1:
        del sections["lora"]  # earlier versions wrote the default LoRA settings beside those of another kind
    _check_known(FinetuneConfig, values)
    return FinetuneConfig(**sections, **values)


_SECTIONS: Mapping[str, type] = {"optimizer": OptimizerConfig, **ADAPTER_TABLES}


def read_toml(path: Path) -> dict[str, Any]:
    """What a settings file holds. Raises ConfigError."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} can't be read as TOML ({error})", param="config") from error


class Knob(NamedTuple):
    """A setting of a finetuning job, for all who take settings from users.

    name: of its field. word: what users call it. sections: the tables of a settings file that may hold it, "" for the top
    level; several kinds of adapter can have the same setting. type: of its values, without None. metadata: what `knob` got.
    """

    name: str
    word: str
    sections: tuple[str, ...]
    type: Any
    metadata: Mapping[str, Any]

    @property
    def of_adapter(self) -> bool:
        return not {"", "optimizer"} & {*self.sections}


def _knobs(cls: type = FinetuneConfig, section: str = "") -> Iterator[Knob]:
    """A knob for each field, in order. A section's fields come in its place."""
    for f in dataclasses.fields(cls):
        if f.name in _SECTIONS:
            yield from _knobs(_SECTIONS[f.name], f.name)
        else:
            yield Knob(f.name, f.metadata.get("word") or f.name, (section,), field_types(cls)[f.name], f.metadata)


def _by_name() -> dict[str, Knob]:
    found: dict[str, Knob] = {}
    for knob in _knobs():
        first = found.get(knob.name)
        found[knob.name] = knob if first is None else first._replace(sections=first.sections + knob.sections)
    return found


KNOBS: Mapping[str, Knob] = _by_name()
"""By the names of their fields."""
NAMES: Mapping[str, str] = {knob.word: knob.name for knob in KNOBS.values()}
"""What users call a setting -> the name of its field."""


def _check_known(cls: type, given: Mapping[str, Any]) -> None:
    known = {f.name for f in dataclasses.fields(cls)}
    for key in given:
        require(key in known, key, f"unknown setting of {cls.__name__}; {_hint(key, known)}known: {', '.join(sorted(known))}")


def _hint(key: str, known: Collection[str]) -> str:
    """For a setting that the table doesn't have: where it belongs, or which setting of the table is likely meant."""
    name = NAMES.get(key, key)
    if name in known:
        return f"here it is called {name}; "
    if name in KNOBS:
        homes = [f"in {section}" if section else "at the top level" for section in KNOBS[name].sections]
        return f"it belongs {' or '.join(homes)}; "
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return f"did you mean {near[0]}? " if near else ""


ADAPTERS: Mapping[str, str] = {kind: "lora" if kind == "dora" else kind for kind in get_args(AdapterKind)}
"""Kind -> the field of FinetuneConfig with its settings."""


def kind_of(adapter: AdapterConfig) -> str:
    """The name of an adapter's kind."""
    if isinstance(adapter, LoraConfig) and adapter.use_dora:
        return "dora"
    return next(name for name, cls in ADAPTER_TABLES.items() if isinstance(adapter, cls))


def size_field(adapter: AdapterConfig) -> str | None:
    """The field that --max-lora-rank limits: a rank or a width; None for a kind that has neither."""
    return next((name for name in ("r", "size") if hasattr(adapter, name)), None)


def adapter_of_kind(kind: str, given: Mapping[str, Any], words: Mapping[str, str]) -> AdapterConfig:
    """An adapter's settings. given: {word: value}, in the caller's words. words: {word: field} for the settings of all kinds.
    Raises ConfigError, also for a setting that the kind doesn't have."""
    require(kind in ADAPTERS, "adapter", f"must be one of {', '.join(ADAPTERS)}, got {kind!r}")
    section = ADAPTERS[kind]
    fields = {f.name for f in dataclasses.fields(ADAPTER_TABLES[section])}
    own = [word for word, name in words.items() if name in fields]
    for word in given:
        require(word in own, word, f"{kind} adapters have no such setting; they have {', '.join(own)}")
    values = {words[word]: value for word, value in given.items()}
    return finetune_config_from_dict({section: values | ({"use_dora": True} if kind == "dora" else {})}).adapter
