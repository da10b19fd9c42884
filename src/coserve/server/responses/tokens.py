"""Which of an output's tokens have written a text that a reader has taken out of it.

    tokens   "<think>" "Hm" "</think>" "\\n\\n" "Ye" "s" "<tool"     a text "Yes": "Ye", "s"

Owns: finding a text among the bytes of the tokens that no text was found in yet. Does not own: what tokens are called
(inference/walk.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class WritingTokens:
    """Tokens in their order, as a chat's log-probabilities describe them: `bytes` is what a token adds to the output."""

    def __init__(self) -> None:
        self._waiting: list[tuple[dict[str, Any] | None, bytes]] = []
        """Tokens, and their bytes that were in no text yet. None: the token was given out with the text of its first bytes."""

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """The next tokens."""
        self._waiting += [(entry, bytes(entry["bytes"])) for entry in entries]

    def take(self, text: str, *, follows: bool) -> list[dict[str, Any]]:
        """The tokens that begin in the text, and those in which it begins. Tokens before it are dropped: they have written what
        is in no text, such as marks around reasoning. follows: whether the text goes on where the one before it ended."""
        wanted, there = text.encode(), b"".join(data for _, data in self._waiting)
        start = 0 if follows and there.startswith(wanted) else there.rfind(wanted)
        if start < 0:  # the text has characters in the place of bytes that are none
            start, wanted = 0, there
        end, place = start + len(wanted), 0
        found, rest = list[dict[str, Any]](), list[tuple[dict[str, Any] | None, bytes]]()
        for entry, data in self._waiting:
            first, place = place, place + len(data)
            inside = bool(data) and first < end and place > start  # a special token is in no text
            if inside and entry is not None:
                found.append(entry)
            if place > end:
                rest.append((None, data[end - first :]) if inside else (entry, data))
            elif first >= end:
                rest.append((entry, data))
        self._waiting = rest
        return found
