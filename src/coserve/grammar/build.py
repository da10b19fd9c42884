"""Grammars as texts: what an output may be, in llguidance's variant of Lark.

    start: %json {"type": "object"}

Every builder gives a whole grammar, with a `start` rule. `nested` puts one whole grammar into another, whatever their rules are
called, so grammars can be composed as texts:

    start: "<tool_call>" call "</tool_call>"
    call: %lark {
    start: %json {...}
    }

Owns: how schemas, patterns and choices are written, and the white space of JSON. Does not own: whether a grammar can be used
(`matcher.py`). Source of the syntax: llguidance, docs/syntax.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coserve.chat.schemas import closed
from coserve.config.values import shown
from coserve.core import invalid_field

MAX_CHARACTERS = 1 << 19
"""Of a grammar. A schema of so many takes about a second to compile."""
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}
"""JSON in one line, with at most one space behind a comma or colon. Small models otherwise write white space without end."""
_NO_SPACES = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
_GAP = r"[ \n\r\t]{0,8}"


def json_schema(
    schema: Mapping[str, Any] | bool | str, *, field: str = "schema", compact: bool = False,
    whitespace_pattern: str | None = None, listed_only: bool = False,
) -> str:
    """JSON that a schema allows. The schema may be given as JSON text.

    The JSON is one line, with at most one space behind each comma and colon. compact: no space either. whitespace_pattern: a
    regular expression for the white space at every place where JSON may have some, instead. A schema's own `x-guidance`
    (llguidance's options) goes before these. listed_only: an object that lists properties and says nothing of others has no
    others (`chat.schemas.closed`). field: is named in errors. Raises InvalidRequest if it is no JSON.
    """
    if isinstance(schema, str):
        check_text(schema, field)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise invalid_field(field, f"isn't JSON: {error}") from None
    if isinstance(schema, Mapping):
        _check_characters(schema, field)
        style: dict[str, Any] = dict(_NO_SPACES if compact else _ONE_LINE)
        if whitespace_pattern is not None:
            style = {"whitespace_pattern": whitespace_pattern}
        own = schema.get("x-guidance")
        schema = closed(schema) if listed_only else schema
        schema = {**schema, "x-guidance": style if own is None else {**style, **own} if isinstance(own, Mapping) else own}
    elif not isinstance(schema, bool):
        raise invalid_field(field, f"must be a JSON schema, which is an object or true or false, got {shown(schema)}")
    try:
        return f"start: %json {json.dumps(schema, allow_nan=False)}\n"
    except (ValueError, TypeError, RecursionError) as error:
        raise invalid_field(field, f"can't be written as JSON: {error}") from None


def json_object(*, field: str = "json_object", compact: bool = False, whitespace_pattern: str | None = None) -> str:
    """Any JSON object. Settings as for `json_schema`."""
    return json_schema({"type": "object"}, field=field, compact=compact, whitespace_pattern=whitespace_pattern)


def regex(pattern: str, *, field: str = "regex") -> str:
    """Texts that a regular expression matches as a whole, in the syntax of Rust's `regex` crate, where \\d is 0 to 9.

    field: is named in errors. Raises InvalidRequest if there is no pattern.
    """
    if not pattern:
        raise invalid_field(field, "is empty; give a regular expression")
    check_text(pattern, field)
    return f"start: /{_in_slashes(pattern)}/\n"


def choice(options: Sequence[str], *, field: str = "choice") -> str:
    """One of some texts. field: is named in errors. Raises InvalidRequest for an empty text, and where there is none."""
    if not options:
        raise invalid_field(field, "is empty; give at least one text")
    for number, option in enumerate(options):
        if not option:
            raise invalid_field(f"{field}[{number}]", "is empty; give a text")
    _check_characters(options, field)
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, options))}\n"


def ebnf(text: str, *, field: str = "grammar") -> str:
    """A grammar in GBNF, llama.cpp's variant of EBNF (`root ::= ...`), as Lark; one that is Lark already stays as it is.

    field: is named in errors. Raises InvalidRequest if it is neither.
    """
    from llguidance.gbnf_to_lark import any_to_lark

    check_text(text, field)
    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises plain Exception for a grammar that is wrong
        raise invalid_field(field, f"is neither Lark (start: ...) nor GBNF (root ::= ...): {error}") from None


def after(marker: str | int, grammar: str, *, begin: str | int | None = None) -> str:
    """Any text up to and including a marker, then what `grammar` allows: a model's reasoning before an answer, for example.

    marker: a text, which may be an added token that texts show; or the id of a special token, which texts don't show. White
    space of up to 8 characters may stand between the marker and the rest. The text before the marker has no special tokens, so
    that the output can't end there. begin: a text or id that the text before the marker begins with; then that text and the
    marker may also be missing, so an output that begins otherwise is what `grammar` allows.
    """
    opening = "" if begin is None else f"{_mark(begin)} "
    if isinstance(marker, str):
        assert marker, "an empty marker is found before any text"
    # a text ends at its first marker only in one lazy terminal, which can't have a special token in it
    lazy = f"TEXT {_mark(marker)}" if isinstance(marker, int) or isinstance(begin, int) else f"{opening}TEXT {_mark(marker)}"
    rules = [f"head{'[lazy]' if isinstance(marker, str) else ''}: {lazy}"]
    head = "head"
    if opening and lazy.startswith("TEXT"):
        rules.append(f"opened: {opening}head")
        head = "opened"
    start = f"{head} GAP body" if begin is None else f"{head} GAP body | body"
    return f"start: {start}\n" + "\n".join(rules) + f"\nTEXT: /(.|\\n)*/\nGAP: /{_GAP}/\nbody: {nested(grammar)}\n"


def _mark(marker: str | int) -> str:
    """A marker in a rule."""
    return json.dumps(marker) if isinstance(marker, str) else f"<[{marker}]>"


def nested(grammar: str) -> str:
    """A whole grammar as a part of another grammar's rule. The names of its rules are its own."""
    return f"%lark {{\n{grammar}\n}}"


def check_text(grammar: str, field: str) -> None:
    """Raises InvalidRequest for what is too long, or no text."""
    if len(grammar) > MAX_CHARACTERS:
        raise invalid_field(field, f"the grammar has {len(grammar)} characters; at most {MAX_CHARACTERS} are taken")
    try:
        grammar.encode()
    except UnicodeEncodeError:
        raise invalid_field(field, "has half a surrogate pair, which is no character") from None


def _check_characters(value: Any, field: str) -> None:
    """Raises InvalidRequest for what would be too long as JSON, before it is written: that keeps Python's lock for a while."""
    left, pending = MAX_CHARACTERS, [value]
    while pending:
        item = pending.pop()
        left -= len(item) if isinstance(item, str) else 1
        if left < 0:
            raise invalid_field(field, f"has more than {MAX_CHARACTERS} characters")
        if isinstance(item, Mapping):
            pending += item.keys()
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item


def _in_slashes(pattern: str) -> str:
    """A pattern as Lark writes it between slashes."""
    written, place = [], 0
    while place < len(pattern):
        part = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(part)
        written.append({"/": "\\/", "\n": "\\n", "\\\n": "\\n", "\\d": "[0-9]", "\\D": "[^0-9]"}.get(part, part))
    return "".join(written)
