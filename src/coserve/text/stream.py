"""Text of one output as it grows: final pieces, cut at the first stop string.

Owns: what is held back because it may turn out to belong to a stop string. Does not own: how ids become characters
(`IncrementalDetokenizer`), stop token ids, the other reasons to end.

    stop "END"      tokens   "fri" "E" "N" "d" " the E" "ND"
                    pieces   "fri" ""  ""  "ENd" " the " ""      stopped = "END"
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import ChatTokenizer

_FIRST_SIGN, _NUM_SIGNS = 0xD800, 0x800
"""Signs: half surrogates, which no text holds, stand for special tokens in what is searched. The last one stands for all those
that no stop string writes out."""


class _Found(NamedTuple):
    """A stop string that is complete after `end` characters of what was fed last. num_chars: how many characters of the text it
    takes, which signs of special tokens don't."""

    end: int
    num_chars: int
    stop: str


class StopMatcher:
    """Looks for stop strings in a text that comes in pieces.

    Keeps the longest end of the text that begins a stop string, and nothing else of it. A character costs a few searches among
    the sorted stop strings, however much text there was. Beforehand they are only sorted and listed by their last characters:
    there is no automaton, whose size would grow with their lengths.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string ends every text"
        self._stops = sorted(set(stops))
        ends: dict[str, list[str]] = {}
        for stop in sorted(self._stops, key=len, reverse=True):
            ends.setdefault(stop[-1], []).append(stop)
        self._by_end = {character: tuple(found) for character, found in ends.items()}
        self._firsts = frozenset(stop[0] for stop in self._stops)
        self._begin = re.compile("|".join(map(re.escape, sorted(self._firsts))) or "(?!)")  # without stop strings nothing
        self.held = ""
        """The longest end of the text that is a proper prefix of a stop string."""

    def feed(self, new: str, *, may_stop: bool = True) -> _Found | None:
        """Goes on by `new`. Returns the stop string that is complete first, of several the longest; none unless may_stop."""
        end = 0
        while end < len(new):
            if not self.held:  # the next character that begins a stop string: most texts have few
                found = self._begin.search(new, end)
                if found is None:
                    return None
                end = found.start()
            character = new[end]
            text, end = self.held + character, end + 1
            ending = self._by_end.get(character, ())
            if may_stop and ending and text.endswith(ending):
                stop = next(stop for stop in ending if text.endswith(stop))
                return _Found(end, _num_shown(stop), stop)
            start = 0
            while start < len(text) and not (text[start] in self._firsts and self._begins(text[start:])):
                start += 1
            self.held = text[start:]
        return None

    def skips(self, new: str) -> bool:
        """Whether no stop string has begun and none begins in `new`, so that there is nothing to feed: most of any text."""
        return not self.held and self._firsts.isdisjoint(new)

    def _begins(self, text: str) -> bool:
        """Whether a stop string goes on after `text`."""
        place = bisect.bisect_right(self._stops, text)
        return place < len(self._stops) and self._stops[place].startswith(text)


class TextStream:
    """Turns ids into final text: never a part of a character, never a part of the stop string that ends it.

    The stop string that is complete first ends the text; of several that are complete at the same character, the one that
    starts first, so no part of the others is left over. How the text is cut into tokens makes no difference.

    A stop string is looked for in the text. One that writes out a special token, alone or among other characters, is also
    looked for in the text with all special tokens written out. There a special token that doesn't show matches as a whole or
    not at all.

    context: the prompt's ids. min_tokens: a stop string that is complete within the first so many ids doesn't end the text.
    shown_ids: of special tokens that the text shows.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), *, context: Sequence[int] = (), min_tokens: int = 0,
        shown_ids: Collection[int] = (),
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, context=context, shown_ids=shown_ids)
        self._matcher = StopMatcher(stop)
        self._special_ids, self._shown_ids = tokenizer.special_ids, frozenset(shown_ids)
        self._signs, self._written = _with_signs(tokenizer, stop)
        self._signed = StopMatcher(list(self._written)) if self._written else None
        self._left = min_tokens
        self._held = ""  # what a stop string may yet take
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, token_id: int) -> str:
        """The text that became final with this id; nothing after a stop string."""
        if self.stopped is not None:
            return ""
        self._left -= 1
        new = self._detokenizer.push(token_id)
        if self._signed is not None:
            return self._advance(new, "" if token_id in self._shown_ids else self._sign(token_id))
        return new if not self._held and self._matcher.skips(new) else self._advance(new, "")

    def finish(self, ending: int | None = None) -> str:
        """The rest, at the end of the output: what was held back, unless it ends in a stop string.

        ending: the id that ended the output and isn't part of its text; a special one may complete a stop string."""
        if self.stopped is not None:
            return ""
        self._left -= ending is not None
        piece = self._advance("", "" if ending is None else self._sign(ending))
        if self.stopped is None:
            piece += self._advance(self._detokenizer.finish(), "")
        rest, self._held = self._held, ""
        return piece + rest

    def _advance(self, new: str, sign: str) -> str:
        """The final part of what was held and `new`. sign: of a special token that came instead."""
        text, may_stop = self._held + new, self._left < 0
        first = self._matcher.feed(new, may_stop=may_stop)
        if self._signed is not None:
            other = self._signed.feed(new + sign, may_stop=may_stop)
            if first is None or (other is not None and _precedence(other) < _precedence(first)):
                first = other
        if first is None:
            end = len(text) - max(len(self._matcher.held), _num_shown(self._signed.held) if self._signed else 0)
            self._held = text[end:]
            return text[:end]
        seen = len(self._held) + min(first.end, len(new))  # a sign is no character of the text
        self.stopped, self._held = self._written.get(first.stop, first.stop), ""
        return text[: seen - first.num_chars]

    def _sign(self, token_id: int) -> str:
        """What stands for a special token that doesn't show; nothing for others."""
        return self._signs.get(token_id, chr(_FIRST_SIGN + _NUM_SIGNS - 1)) if token_id in self._special_ids else ""


def _precedence(found: _Found) -> tuple[int, int]:
    """Which of two stop strings ends a text: the one that is complete first, then the one that starts first."""
    return found.end, -found.num_chars


def _with_signs(tokenizer: ChatTokenizer, stops: Sequence[str]) -> tuple[dict[int, str], dict[str, str]]:
    """Signs of the special tokens that stop strings write out, by id; and those stop strings, by what they are with signs."""
    signs: dict[int, str] = {}

    def sign(found: re.Match[str]) -> str:
        token_id = tokenizer.special_tokens[found[0]]
        if token_id not in signs and len(signs) == _NUM_SIGNS - 1:
            return found[0]
        return signs.setdefault(token_id, chr(_FIRST_SIGN + len(signs)))

    longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
    if not stops or not longest_first:
        return {}, {}
    special = re.compile("|".join(map(re.escape, longest_first)))
    written = {special.sub(sign, stop): stop for stop in stops}
    return signs, {signed: stop for signed, stop in written.items() if signed != stop}


def _num_shown(text: str) -> int:
    """Characters that aren't signs."""
    return sum(not _FIRST_SIGN <= ord(character) < _FIRST_SIGN + _NUM_SIGNS for character in text)
