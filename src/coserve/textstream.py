"""Text of one output as it grows: final pieces, cut at the first stop string.

Owns: what is held back because it may turn out to belong to a stop string. Does not own: how ids become characters
(`IncrementalDetokenizer`), stop token ids, the other reasons to end.

    stop "END"      tokens   "fri" "E" "N" "d" " the E" "ND"
                    pieces   "fri" ""  ""  "ENd" " the " ""      stopped = "END"
"""

from __future__ import annotations

from collections.abc import Sequence

from coserve.tokenizer import ChatTokenizer, IncrementalDetokenizer


class TextStream:
    """Turns ids into final text: never a part of a character, never a part of the stop string that ends it.

    The stop string that is complete first ends the text; of several that are complete at the same character, the one that
    starts first, so no part of the others is left over. How the text is cut into tokens makes no difference.
    """

    def __init__(self, tokenizer: ChatTokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        assert all(stop), "an empty stop string ends every text"
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = tuple(stop)
        self._held = ""  # a proper prefix of a stop string
        self._pieces: list[str] = []
        self._stopped: str | None = None

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stopped

    @property
    def text(self) -> str:
        """All pieces so far, joined."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """The text that became final with this id; nothing after a stop string."""
        if self._stopped is not None:
            return ""
        return self._emit(self._advance(self._detokenizer.push(token_id)))

    def finish(self) -> str:
        """The rest, at the end of the output: what was held back, unless it ends in a stop string."""
        if self._stopped is not None:
            return ""
        piece = self._advance(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return self._emit(piece + rest)

    def _advance(self, new: str) -> str:
        """The final part of what was held and `new`."""
        text = self._held + new
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            _, end, self._stopped = min(found)
            self._held = ""
        else:
            end = len(text) - self._num_undecided(text)
            self._held = text[end:]
        return text[:end]

    def _num_undecided(self, text: str) -> int:
        """Characters of the longest suffix that is a proper prefix of a stop string."""
        prefixes = (stop[:length] for stop in self._stop for length in range(1, min(len(stop), len(text) + 1)))
        return max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)

    def _emit(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
