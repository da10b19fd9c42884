"""Values that settings may have: their types, their limits, how they are read and what is said of wrong ones.

Owns: checks of single values. Does not own: which settings there are (settings.py).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import operator
import re
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeGuard, TypeVar

from coserve.core import ConfigError

Auto = Literal["auto"]
AUTO: Auto = "auto"
"""The value of a setting that is to be chosen from the job's data, adapter and model (finetune/defaults.py)."""
Memory = float | str
"""Bytes (12.5e9, '12.5GB', '800MiB'), a share below 1 (0.5, '0.5') of what the setting says, or 'auto'; see `read_memory`."""
BestEffort = Literal["none"]
BEST_EFFORT: BestEffort = "none"
"""Of a latency objective: nothing is promised."""
SloMs = float | BestEffort
"""A latency objective in milliseconds, or best effort."""
Quantization = Literal["none", "fp8"]
"""How the matrices of the decoder layers are stored: in the model's dtype, or in 8-bit floats (model/fp8.py)."""
QUANTIZATIONS: tuple[Quantization, ...] = typing.get_args(Quantization)
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
MAX_RANK = 1 << 14
"""Largest rank of an adapter, and largest size of a bottleneck: wider than the layers of most models."""
MAX_SETTING = 1e9
"""Largest alpha, learning rate and the like: far beyond what is of use, far below what overflows in a product."""
MAX_PATTERNS = 10_000
"""Most entries of a rank_pattern or alpha_pattern: more than there are linears in the largest models."""


def knob(default: Any, help: str = "", *, word: str = "", short: str = "", metavar: str = "", api: bool = True) -> Any:
    """A setting that users can give, as a dataclass field. A settings file takes every field.

    default: its value, or a function that makes one. help: of its flag on the command line; empty: it has no flag. word: what
    users call it, if not by the field's name. short: a second flag, of one letter. metavar: what stands for the value in the
    help. api: of a job's settings, whether the body that creates a job has it too.
    """
    metadata = {"help": help, "word": word, "short": short, "metavar": metavar, "api": api}
    return field(default_factory=default, metadata=metadata) if callable(default) else field(default=default, metadata=metadata)


def require(condition: bool, name: str, message: str) -> None:
    """Raises ConfigError about a setting unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name}: {message}", param=name)


def read_quantization(value: str) -> Quantization:
    """A quantization by its name. Raises ConfigError for one that is not known."""
    found = next((known for known in QUANTIZATIONS if known == value), None)
    if found is None:
        raise ConfigError(f"quantization: must be {' or '.join(QUANTIZATIONS)}, got {value!r}", param="quantization")
    return found


def require_least(config: Any, least: int, *names: str) -> None:
    """Raises ConfigError for the first of these settings that is below `least`. None and 'auto' pass."""
    for name in names:
        value = getattr(config, name)
        passes = value is None or value == AUTO or value >= least
        require(passes, name, f"must be {f'at least {least}' if least else '0 or more'}, got {value}")


def require_most(config: Any, most: float, *names: str) -> None:
    """Raises ConfigError for the first of these settings that is above `most`. None and 'auto' pass."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value == AUTO or value <= most, name, f"must be at most {most:g}, got {shown(value)}")


def require_positive(config: Any, *names: str) -> None:
    """Raises ConfigError for the first of these settings that isn't above 0. None and 'auto' pass."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value == AUTO or value > 0, name, f"must be positive, got {value}")


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number that 64 bits hold. True and False are no numbers here."""
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value is a finite number. A whole number must fit into 64 bits, so that a float holds it too."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def shown(value: Any, most: int = 80) -> str:
    """A value as error messages quote it: on one line, and cut where it is long."""
    if isinstance(value, int) and not is_whole(value):
        return "a whole number of more than 64 bits" if not isinstance(value, bool) else repr(value)
    if isinstance(value, list | tuple | Mapping) and len(value) > most:
        return f"a {'table' if isinstance(value, Mapping) else 'list'} of {len(value)} entries"
    try:
        text = repr(value[: most + 1] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested too deeply, or a number of too many digits inside
        return f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


@functools.cache
def field_types(config: type) -> dict[str, Any]:
    """The types of a class's fields, without None."""
    found = typing.get_type_hints(config)
    for name, hint in found.items():
        if type(None) in typing.get_args(hint):
            found[name] = functools.reduce(operator.or_, (part for part in typing.get_args(hint) if part is not type(None)))
    return found


def check_types(config: Any) -> None:
    """Raises ConfigError for a field whose value isn't of its type: a whole number, a finite number, true or false, or one of
    a few words. Fields of other types are not looked at."""
    cls: type = type(config)
    hints = field_types(cls)
    for f in dataclasses.fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        optional, chosen = kind.endswith("| None"), kind.endswith("| Auto")
        if (optional and value is None) or (chosen and value == AUTO):
            continue
        hint = " or 'auto'" if chosen else ""
        if kind.startswith("int"):
            require(is_whole(value), f.name, f"must be a whole number{hint}, got {shown(value)}")
        elif kind.startswith("float"):
            require(is_number(value), f.name, f"must be a finite number{hint}, got {shown(value)}")
        elif kind == "bool":
            require(isinstance(value, bool), f.name, f"must be true or false, got {shown(value)}")
        elif typing.get_origin(hints[f.name]) is Literal:
            *words, last = typing.get_args(hints[f.name])
            require(value in (*words, last), f.name, f"must be {', '.join(words)} or {last}, got {value!r}")


def check_objective(name: str, value: Any) -> None:
    """Refuses a latency objective that is neither None nor a SloMs. Raises ConfigError."""
    good = value is None or (isinstance(value, str) and value == BEST_EFFORT) or (is_number(value) and value > 0)
    require(good, name, f'must be a positive number of milliseconds or "none" (best effort), got {shown(value)}')


def objective_seconds(value: SloMs | None, default_s: float) -> float:
    """A latency objective in seconds; math.inf: best effort. default_s: what None means."""
    if isinstance(value, str):
        return math.inf
    return default_s if value is None else value / 1e3


_N = TypeVar("_N", int, float)


def settled(value: _N | Auto) -> _N:
    """The number of a setting that was perhaps 'auto', once `resolve_settings` has replaced that."""
    assert not isinstance(value, str), "resolve_settings comes first"
    return value


def read_memory(value: Memory) -> float | None:
    """Returns bytes, a share as a number below 1, or None for 'auto'. Raises ConfigError that says what to write."""
    text = str(value).strip().lower()
    if text == AUTO:
        return None
    found = re.fullmatch(r"([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([kmg]i?b)?", text)
    number = 0.0 if found is None else float(found[1]) * _UNITS[found[2] or ""]
    whole = found is not None and (found[2] is None or number >= 1)
    require(whole and 0 < number < math.inf, "activation_memory",
            f"write bytes (12500000000, 12.5GB, 800MiB), a share below 1, or auto, got {value!r}")
    return number


def check_pattern(field: str, pattern: Any) -> None:
    """Refuses a rank_pattern or alpha_pattern that is no table of module names and ranks or alphas. Raises ConfigError."""
    require(isinstance(pattern, Mapping), field, f"must be a table of module names and numbers, got {shown(pattern)}")
    require(len(pattern) <= MAX_PATTERNS, field, f"must have at most {MAX_PATTERNS} entries, got {len(pattern)}")
    for name, value in pattern.items():
        require(isinstance(name, str) and bool(name), field, f"must have module names as keys, got {shown(name)}")
        if field == "rank_pattern":
            good = is_whole(value) and 1 <= value <= MAX_RANK
            require(good, field, f"rank of {shown(name)} must be a whole number from 1 to {MAX_RANK}, got {shown(value)}")
        else:
            good = is_number(value) and 0 < value <= MAX_SETTING
            require(good, field, f"alpha of {shown(name)} must be positive and at most {MAX_SETTING:g}, got {shown(value)}")


def is_nested_deeper(value: Any, most: int) -> bool:
    """Whether a JSON value has more than `most` lists and objects within each other, itself included: more than code that calls
    itself should meet."""
    level = [value]
    for _ in range(most + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return True


def are_names(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(name, str) and name for name in value)


def check_targets(value: object) -> None:
    require(bool(value), "target_modules", "name at least one module, or 'all-linear'")
    require(value == "all-linear" or are_names(value), "target_modules",
            f"must be a list of names, or 'all-linear', got {shown(value)}")


def is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False
