"""Names of modules against the patterns that users write: time linear in the pattern, whatever the pattern is.

A key of rank_pattern and alpha_pattern means what it means in PEFT: a regular expression for the module's full name, or for
what follows any of its dots. Matching is RE2's, which never backtracks; it has no lookaheads and no backreferences.
Owns: what a pattern matches. Does not own: which fields hold patterns (fields.py, lora.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import re2

from coserve.config.values import shown
from coserve.core import ConfigError

V = TypeVar("V")

MAX_PATTERN_LENGTH = 1000
_MAX_PROGRAM = 50_000
"""Of all expressions of a field together, in RE2's instructions: matching takes at most this times the names' length."""
_LITERAL = re.compile(r"[A-Za-z0-9_.]+")
"""Keys that are plain names; a dot in one stands for any character, but there are no modules that differ in that alone."""


def compile_pattern(expression: str, field: str, shown_as: str | None = None) -> Any:
    """RE2's object. Raises ConfigError that names the field for what RE2 doesn't take."""
    quoted = shown(expression if shown_as is None else shown_as)
    if len(expression) > MAX_PATTERN_LENGTH:
        raise ConfigError(f"{field}: {quoted} is longer than {MAX_PATTERN_LENGTH} characters", param=field)
    options = re2.Options()
    options.log_errors, options.max_mem = False, 1 << 20
    try:
        return re2.compile(expression, options)
    except (re2.error, UnicodeError) as error:
        reason = error.args[0] if error.args else error
        reason = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        raise ConfigError(
            f"{field}: {quoted} is no module name or regular expression that can be used here ({reason[:200]}); lookaheads and "
            "backreferences are not supported", param=field,
        ) from error


def by_pattern(patterns: Mapping[str, V], names: Sequence[str], field: str) -> tuple[dict[str, V], list[str]]:
    """({name: the value of the first key that matches it}, keys that match none of the names). Raises ConfigError."""
    found: dict[str, V] = {}
    unmatched: list[str] = []
    known, program = frozenset(names), 0
    for key, value in patterns.items():
        if key in known and _LITERAL.fullmatch(key):
            found.setdefault(key, value)
            continue
        pattern = compile_pattern(rf"(.*\.)?({key})$", field, key)
        program += pattern.programsize
        if program > _MAX_PROGRAM:
            raise ConfigError(f"{field}: the patterns are too large together; name modules instead", param=field)
        matched = [name for name in names if pattern.match(name)]
        for name in matched:
            found.setdefault(name, value)
        if not matched:
            unmatched.append(key)
    return found, unmatched


def require_matches(unmatched: Collection[str], names: Sequence[str], field: str) -> None:
    """Refuses keys that match no module. Raises ConfigError that says which modules there are."""
    if unmatched:
        last = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
        keys = ", ".join(shown(key) for key in list(unmatched)[:5])
        raise ConfigError(
            f"{field}: {keys} matches no module that the adapter has; there are {', '.join(last)}, as in "
            f"{names[0] if names else 'none'}", param=field,
        )
