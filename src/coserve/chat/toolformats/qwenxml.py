"""Qwen3-Coder's calls, which look like XML: a value is the text between two tags, whatever it is.

    <tool_call>
    <function=f>
    <parameter=city>
    Oslo
    </parameter>
    </function>
    </tool_call>            arguments: {"city": "Oslo"}

The arguments are made JSON as the values come, by the tool's parameters: a text stays a text, and what may be something else is
read as JSON or, where it is none, taken as a text. The first tag may be missing, and so may the ends of parameters before
another tag on a line of its own. An output that ends within a call leaves its JSON open.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from coserve.chat.toolformats.events import Steps
from coserve.chat.toolformats.marked import MarkedReader

CALL, END_CALL = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
_MAX_NAME = 256
_WORDS: Mapping[str, Any] = {"True": True, "False": False, "None": None}
"""As the template writes them, by Python's names."""


class QwenXmlReader(MarkedReader):
    """tools: the request's."""

    markers = (CALL, FUNCTION)

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._parameters = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        super().__init__()

    def _calls(self, marker: str, char: str) -> Steps:
        if marker != FUNCTION:
            marker, char = yield from self._match(char, (FUNCTION,))
        if not marker:
            return char
        name, char = yield from self._name(char)
        if not name:
            return char
        self._begin(name)
        tag, char = yield from self._arguments(name, char)
        if tag == END_FUNCTION:
            char = yield from self._skip(char)
            char = yield from self._close(char, (END_CALL,))
        return char

    def _name(self, char: str) -> Generator[None, str, tuple[str, str]]:
        """Takes a name up to the end of its tag. Returns it, "" if it is none, and the next character."""
        name = ""
        while char and char not in "<>\n" and len(name) < _MAX_NAME:
            name += char
            char = yield from self._hold(char)
        if char != ">":
            return "", char
        return name.strip().strip("\"'"), (yield from self._hold(char))

    def _arguments(self, function: str, char: str) -> Generator[None, str, tuple[str, str]]:
        """Takes the parameters of a call that has begun. Returns the tag that ends them, "" if there is none, and the next
        character."""
        self._argue("{")
        before, tag = "", ""
        tags = (PARAMETER, END_FUNCTION, END_CALL)
        while True:
            if not tag:
                char = yield from self._skip(char)
                tag, char = yield from self._match(char, tags)
            name = ""
            if tag == PARAMETER:
                name, char = yield from self._name(char)
            if tag or not char:
                self._held.clear()
            if not name:
                if tag or char:
                    self._argue("}")
                return ("" if tag == PARAMETER else tag), char
            self._argue(f"{before}{_json(name)}: ")
            tag, char = yield from self._parameter(self._kinds(function, name), char)
            before = ", "

    def _parameter(self, kinds: frozenset[str], char: str) -> Generator[None, str, tuple[str, str]]:
        """Takes a value and the end of its parameter. Returns the next tag where it came instead, and the next character."""
        if kinds == {"string"}:
            self._argue('"')
            tag, char = yield from self._until_tag(char, lambda text: self._argue(_json(text)[1:-1]))
            if tag:
                self._argue('"')
        else:
            pieces: list[str] = []
            tag, char = yield from self._until_tag(char, pieces.append)
            self._argue(_convert("".join(pieces), kinds))
        return ("" if tag == END_PARAMETER else tag), char

    def _until_tag(self, char: str, take: Callable[[str], None]) -> Generator[None, str, tuple[str, str]]:
        """Takes a value's text up to a tag that ends it. Returns that tag and the next character."""
        line_end = ""  # of a line end it isn't known yet whether it belongs to the tag
        if char == "\n":
            char = yield
        while char:
            if char == "<":
                tags = (END_PARAMETER, PARAMETER, END_FUNCTION) if line_end else (END_PARAMETER,)
                tag, char = yield from self._match(char, tags)
                if tag:
                    self._held.clear()
                    return tag, char
                take(line_end + "".join(self._held))
                self._held.clear()
                line_end = ""
                continue
            take(line_end)
            line_end = "\n" if char == "\n" else ""
            if not line_end:
                take(char)
            char = yield
        take(line_end)
        return "", char

    def _kinds(self, function: str, name: str) -> frozenset[str]:
        """The JSON types that a parameter may have by its schema; none if that isn't said."""
        properties = self._parameters.get(function, {}).get("properties")
        schema = properties.get(name) if isinstance(properties, Mapping) else None
        if not isinstance(schema, Mapping):
            return frozenset({"string"})
        found = schema.get("type")
        return frozenset(kind for kind in (found if isinstance(found, list) else [found]) if isinstance(kind, str))


def _convert(text: str, kinds: frozenset[str]) -> str:
    """A value as JSON. A text that is no JSON is one all the same."""
    if text in _WORDS and not (text == "None" and kinds and "null" not in kinds):
        return _json(_WORDS[text])
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _json(text)
    return _json(text) if isinstance(value, str) else text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
