"""Outputs of plain text with calls in it that begin with a marker: what all formats share.

    text          "Let me look.\\n<tool_call>\\n{"name": "f", "arguments": {"x": 1}}\\n</tool_call>"
    held                       |------------------------------------|
    events        Text("Let me look.")                     Call("f"), Arguments("{"), ("\\"x\\": 1}")

What only looked like a call is text, and nothing of it is lost. White space around calls belongs to neither. A marker that ends
a call may be missing, or cut off by the end of the output.

Owns: markers, the text between calls. Does not own: what is behind a marker (jsoncalls.py, mistral.py, qwenxml.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from coserve.chat.toolformats.events import ArgumentsEvent, CallEvent, SteppedReader, Steps, TextEvent


class MarkedReader(SteppedReader):
    """A class below reads what is behind a marker.

    markers: each begins one or more calls. ends: each may end them. The first character of each is nowhere else in it.
    """

    markers: Sequence[str] = ()
    ends: Sequence[str] = ()

    def __init__(self) -> None:
        self._held: list[str] = []
        """What was taken and is text, unless a call comes of it."""
        self._num_calls = 0
        self._any_text = False
        self._after_call = False  # nothing but white space since the last one
        self._found = ""  # a marker that was taken where an end was looked for
        super().__init__()

    # --- for classes below ---

    def _calls(self, marker: str, char: str) -> Steps:
        """Takes calls from `char` on, the first character behind a marker and white space; without a marker where
        `_begins_bare` says so. Whatever it takes it adds to `_held`. Nothing came of it unless it said so by `_begin`."""
        raise NotImplementedError

    def _begins_bare(self, char: str) -> bool:
        """Whether calls may begin with this first character of an output, without a marker."""
        return False

    def _begin(self, name: str) -> None:
        """Says that a call begins. What was held belongs to it."""
        self._held.clear()
        self._num_calls += 1
        self._after_call = True
        self._say(CallEvent(name))

    def _argue(self, text: str) -> None:
        self._say(ArgumentsEvent(text))

    def _hold(self, char: str) -> Steps:
        """Takes a character. Returns the next one, as all steps do."""
        self._held.append(char)
        return (yield)

    def _skip(self, char: str) -> Steps:
        """Takes white space."""
        while char.isspace():
            char = yield from self._hold(char)
        return char

    def _match(self, char: str, literals: Sequence[str]) -> Generator[None, str, tuple[str, str]]:
        """Takes one of the literals, or as much as begins one. Returns it, "" if it isn't there as a whole, and the next
        character."""
        taken = ""
        while char and any(literal.startswith(taken + char) for literal in literals):
            taken += char
            char = yield from self._hold(char)
            if taken in literals:
                return taken, char
        return "", char

    def _end(self, char: str) -> Steps:
        """Takes what ends calls, with brackets too many before it, if it is there."""
        if not self.ends:
            return char
        while char and (char.isspace() or char in "]}"):
            char = yield from self._hold(char)
        if not char:
            self._held.clear()
        return (yield from self._close(char, self.ends))

    def _close(self, char: str, ends: Sequence[str]) -> Steps:
        """Takes one of the ends, or the marker of further calls, if there is one."""
        held = len(self._held)
        literal, char = yield from self._match(char, (*ends, *self.markers))
        if literal in ends or (not char and len(self._held) > held):
            self._held.clear()
        elif literal:
            self._found = literal
        return char

    # --- text ---

    def _steps(self) -> Steps:
        char = yield
        while char or self._found:
            num_calls, num_held = self._num_calls, len(self._held)
            if self._found:
                marker, self._found = self._found, ""
                char = yield from self._skip(char)
                char = yield from self._calls(marker, char)
            elif char.isspace():
                char = yield from self._hold(char)
                continue
            elif not self._any_text and not num_calls and self._begins_bare(char):
                char = yield from self._calls("", char)
            else:
                marker, char = yield from self._match(char, self.markers)
                if marker:
                    char = yield from self._skip(char)
                    char = yield from self._calls(marker, char)
                elif len(self._held) == num_held:  # an ordinary character
                    self._release()
                    self._say(TextEvent(char))
                    self._any_text, self._after_call = True, False
                    char = yield
                    continue
            if not self._found and (self._num_calls == num_calls or "".join(self._held).strip()):
                self._release()
        if "".join(self._held).strip() or not self._after_call:
            self._release()
        return char

    def _release(self) -> None:
        """Says what is held as text."""
        text = "".join(self._held)
        self._held.clear()
        if self._after_call and not self._any_text:
            text = text.lstrip()
        if text:
            self._say(TextEvent(text))
            self._any_text, self._after_call = True, False
