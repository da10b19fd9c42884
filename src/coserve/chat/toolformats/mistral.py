"""Mistral's calls: a list of objects behind one marker, or a marker for each call with its name as it is.

    [TOOL_CALLS] [{"name": "f", "arguments": {...}, "id": "abcdefgh9"}, ...]
    [TOOL_CALLS]f[ARGS]{...}[TOOL_CALLS]g[CALL_ID]abcdefgh9[ARGS]{...}
"""

from __future__ import annotations

from collections.abc import Collection

from coserve.chat.toolformats.events import Steps
from coserve.chat.toolformats.jsoncalls import JsonCallReader

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_MAX_NAME = 128
"""Characters of a name, and of an id."""


class MistralReader(JsonCallReader):
    """Reads both ways of writing."""

    def __init__(self, known: Collection[str]) -> None:
        super().__init__(known, (CALLS,))

    def _begins_bare(self, char: str) -> bool:
        return char == "{"  # the marker itself begins with a bracket

    def _calls(self, marker: str, char: str) -> Steps:
        if not marker or (char and char in "[{"):
            return (yield from super()._calls(marker, char))
        name, char = "", char
        while char and char not in "[{" and len(name) < _MAX_NAME:
            name += char
            char = yield from self._hold(char)
        between = ""
        if char == "[":
            between, char = yield from self._match(char, (CALL_ID, ARGS))
        if between == CALL_ID:
            for _ in range(_MAX_NAME):
                if not char or char == "[":
                    break
                char = yield from self._hold(char)
            between, char = yield from self._match(char, (ARGS,))
        char = yield from self._skip(char)
        if char != "{" or not name.strip() or "\n" in name.strip():
            return char
        self._begin(name.strip())
        return (yield from self._value(char, self._argue))
