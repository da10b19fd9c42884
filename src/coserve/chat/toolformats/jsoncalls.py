"""Calls that are JSON objects of a name and arguments, alone or in a list: Hermes', Granite's, Llama's and Mistral's.

    <tool_call>                               <|tool_call|>[            {"name": "f", "parameters": {...}}; {...}
    {"name": "f", "arguments": {...}}         {"name": ...}, ...]
    </tool_call>

A call is certain where its name is known and its arguments begin. From there on they are passed on as they are written, up to
the bracket that ends them, whatever is wrong inside. Arguments before the name, or as JSON inside a text, come at once. An
object with other names than these is no call.

Calls without a marker are known at the beginning of an output only, and only those of the request's tools, since the output may
be JSON that somebody asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence

from coserve.chat.toolformats.events import Steps
from coserve.chat.toolformats.marked import MarkedReader

_NAME, _ARGUMENTS, _OTHERS = "name", ("arguments", "parameters"), ("id", "type")
_MAX_NAME = 256
"""Characters of a name, as JSON. Longer ones aren't waited for."""
_NO_ARGUMENTS = "{}"


class JsonCallReader(MarkedReader):
    """known: names of the request's tools."""

    def __init__(self, known: Collection[str], markers: Sequence[str], ends: Sequence[str] = ()) -> None:
        self.markers, self.ends = markers, ends
        self._known = frozenset(known)
        self._ended = False  # whether an end was found inside of arguments
        super().__init__()

    def _begins_bare(self, char: str) -> bool:
        return char in "{["

    def _calls(self, marker: str, char: str) -> Steps:
        self._ended = False
        listed = char == "["
        if listed:
            char = yield from self._hold(char)
            char = yield from self._skip(char)
        before = self._num_calls
        while char == "{" and not self._ended:
            num_calls = self._num_calls
            char = yield from self._object(char, bare=not marker)
            if self._num_calls == num_calls:
                return char
            char = yield from self._skip(char)
            if char and char in ",;":
                char = yield from self._hold(char)
                char = yield from self._skip(char)
        if self._num_calls == before:
            return char
        if listed and char == "]":
            self._held.clear()
            char = yield
        return char if self._ended else (yield from self._end(char))

    def _object(self, char: str, *, bare: bool) -> Steps:
        """Takes one object."""
        name: str | None = None
        arguments: str | None = None  # if they came before the name
        begun = False
        char = yield from self._hold(char)
        char = yield from self._skip(char)
        while char == '"':
            start = len(self._held)
            char = yield from self._string(char, self._held.append, most=_MAX_NAME)
            key = _read("".join(self._held[start:]))
            char = yield from self._skip(char)
            if char != ":" or not (begun or key in (_NAME, *_ARGUMENTS, *_OTHERS)):
                break
            char = yield from self._hold(char)
            char = yield from self._skip(char)
            start = len(self._held)
            if key in _ARGUMENTS and name is not None and not begun and char and char in "{[":
                begun = True
                self._begin(name)
                char = yield from self._value(char, self._argue)
            else:
                most = _MAX_NAME if key == _NAME and not begun else None
                char = yield from self._value(char, self._held.append, most=most)
                value = "".join(self._held[start:])
                if key == _NAME and not begun:
                    name = self._name(value, bare)
                    if name is None:
                        break
                elif key in _ARGUMENTS and not begun and char:
                    arguments = value
            if self._ended:
                return char
            char = yield from self._skip(char)
            if char == ",":
                char = yield from self._hold(char)
                char = yield from self._skip(char)
        if name is not None and not begun and (arguments is not None or (char == "}" and not bare)):
            begun = True
            self._begin(name)
            self._argue(_as_text(arguments))
        if char == "}":
            char = yield from self._hold(char)
            if begun:
                self._held.clear()
        return char

    def _name(self, value: str, bare: bool) -> str | None:
        """The name that a JSON text is, if it can be a tool's."""
        name = _read(value)
        return name if isinstance(name, str) and name.strip() and (not bare or name in self._known) else None

    def _value(self, char: str, take: Callable[[str], None], *, most: int | None = None) -> Steps:
        """Takes a value, valid or not, up to the bracket that closes it, or to an end of calls if it is a call's arguments.
        take: is given all of it. most: as for `_string`."""
        if char == '"':
            return (yield from self._string(char, take, most=most))
        depth = 0
        while char and (depth or not (char.isspace() or char in ",;]}")):
            if char == '"':
                char = yield from self._string(char, take)
                continue
            if take == self._argue and any(end[0] == char for end in self.ends):
                held = len(self._held)
                marker, char = yield from self._match(char, self.ends)
                taken = self._held[held:]
                del self._held[held:]
                if marker:
                    self._ended = True
                    return char
                for part in taken:
                    take(part)
                continue
            take(char)
            depth += (char in "[{") - (char in "]}")
            if not depth and char in "]}":
                return (yield)
            char = yield
        return char

    def _string(self, char: str, take: Callable[[str], None], *, most: int | None = None) -> Steps:
        """Takes a JSON text, from quote to quote; of a longer one than `most` characters only the beginning."""
        count = 0
        take(char)
        char = yield
        while char and count != most:
            count += 1
            take(char)
            if char == '"':
                return (yield)
            if char == "\\":
                char = yield
                if not char:
                    break
                take(char)
            char = yield
        return char


def _read(text: str) -> object:
    """A JSON text's value; None if it isn't JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _as_text(value: str | None) -> str:
    """Arguments that came as a whole: an object's text, a text that holds JSON, or nothing."""
    if value is None:
        return _NO_ARGUMENTS
    inner = _read(value) if value.startswith('"') else value
    return inner if isinstance(inner, str) and inner.strip() not in ("", "null") else _NO_ARGUMENTS
