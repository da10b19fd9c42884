"""From token ids to text as they come, after whatever came before: the one decoder behind texts, offsets and bytes.

Owns: where characters begin and end among tokens. Does not own: the bytes of a token (tokenbytes.py), stop strings
(stream.py).

    context  "in" | tokens   " the"  E2  9C  93   "<|im_end|>" hidden
                    push     " the"  ""  ""  "✓"  ""
                    start    0       4   4   4    5
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence

from coserve.text.tokenizer import ChatTokenizer

_CHARACTER_BYTES = 4
"""At most, in UTF-8."""


class IncrementalDetokenizer:
    """Turns ids into text as they come: what `push` returns is final.

    skip_special_tokens: whether special tokens don't show, except for those with ids in shown_ids.
    context: the tokens before the first id, such as a prompt's. Behind such a context the output keeps its first space, which
    SentencePiece's decoders leave out at the start of a whole text. A character that the context has begun is finished as the
    first one of the output. `push` and `finish` together give the tokens' bytes as UTF-8, with U+FFFD for what isn't UTF-8. The
    work per id depends on neither the number of ids nor the length of the text.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, *, skip_special_tokens: bool = True, context: Sequence[int] = (),
        shown_ids: Collection[int] = (),
    ) -> None:
        self._bytes = tokenizer.token_bytes
        self._hidden = tokenizer.special_ids.difference(shown_ids) if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False  # whether there is any token that shows
        self._unfinished = False  # whether the decoder may hold bytes of a character
        self._num_chars = 0
        self.start = 0
        """Characters of the text before the last id's own."""
        self.added = b""
        """What the last id added to the text, in bytes; nothing if it is hidden."""
        self._take_context(context)

    def push(self, token_id: int) -> str:
        """The text that became final with this id: possibly none, never the start of an unfinished character."""
        token_id = int(token_id)
        added = b"" if token_id in self._hidden else self._bytes[token_id]
        if added and not self._begun:
            self._begun, added = True, self._bytes.at_start(token_id)
        self.added = added
        if not self._unfinished and added.isascii():
            self.start = self._num_chars
            self._num_chars += len(added)
            return added.decode("ascii")
        broken = ""
        if added and not 0x80 <= added[0] < 0xC0:  # a new character begins, and the one before stays unfinished
            broken, self._unfinished = self._decoder.decode(b"", final=True), False
        self.start = self._num_chars + len(broken)
        text = broken + self._decoder.decode(added)
        self._unfinished = self._unfinished or not added.isascii()
        self._num_chars += len(text)
        return text

    def finish(self) -> str:
        """The rest: U+FFFD for a character whose last bytes never came, else nothing."""
        return self._decoder.decode(b"", final=True)

    def _take_context(self, context: Sequence[int]) -> None:
        """Remembers whether the context shows anything, and the character that it leaves unfinished."""
        last: list[bytes] = []
        for token_id in reversed(context):
            added = b"" if token_id in self._hidden else self._bytes[int(token_id)]
            if added:
                last.append(added)
                if sum(map(len, last)) >= _CHARACTER_BYTES:
                    break
        self._begun = self._unfinished = bool(last)
        self._decoder.decode(b"".join(reversed(last)))


def whole_text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    """The text of ids with special tokens written out."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    return "".join(map(detokenizer.push, ids)) + detokenizer.finish()


def shown_text(tokenizer: ChatTokenizer, ids: Sequence[int]) -> str:
    """The text of a prompt's ids, without special tokens. A character that the last ids only begin is left out, since it is the
    first character of what follows."""
    spelled, hidden = tokenizer.token_bytes, tokenizer.special_ids
    shown = [token_id for token_id in ids if token_id not in hidden and spelled[token_id]]
    parts = [spelled.at_start(token_id) for token_id in shown[:1]] + [spelled[token_id] for token_id in shown[1:]]
    return codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(parts))
