"""A choice's tokens in its text: what each is called, what it adds, where it begins.

    context  "Hi" | tokens   " the"  E2            9C            93            "<|im_end|>"
                    name     " the"  "bytes:\\xe2"  "bytes:\\x9c"  "bytes:\\x93"  "<|im_end|>"
                    offset   0       4             4             4             5

Owns: the words of log-probabilities. Does not own: how bytes become text (text/detokenizer.py), the shape of a response.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from typing import NamedTuple

from coserve.server.link.messages import LogprobEntry
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import ChatTokenizer


class Step(NamedTuple):
    """A token in the text. added: the bytes that it adds; none for a special token. offset: where it begins, in characters."""

    name: str
    added: bytes
    offset: int


class TokenWalk:
    """Follows one text token by token. context: the ids before it. offset: characters before it. by_id: whether tokens are
    called `token_id:7`. shown_ids: of special tokens that the text shows."""

    def __init__(
        self, tokenizer: ChatTokenizer, *, context: Sequence[int] = (), offset: int = 0, by_id: bool = False,
        shown_ids: Collection[int] = (),
    ) -> None:
        self._bytes, self._hidden_ids = tokenizer.token_bytes, tokenizer.special_ids.difference(shown_ids)
        self._detokenizer = IncrementalDetokenizer(tokenizer, context=context, shown_ids=shown_ids)
        self._offset, self._by_id = offset, by_id

    def step(self, token: int) -> Step:
        """Adds the next token."""
        self._detokenizer.push(token)
        added = self._detokenizer.added
        name = self._name(token)
        if added and added != self._bytes[token] and not self._by_id:
            name = added.decode()  # the first token of a whole text, without its space
        return Step(name, added, self._offset + self._detokenizer.start)

    def names(self, step: Step, entry: LogprobEntry) -> dict[int, str]:
        """{token id: name} of an entry's tokens. No two have the same name."""
        found = {token: self._name(token) for token, _ in entry.top}
        if step.name in found.values():
            found = {token: f"token_id:{token}" if name == step.name else name for token, name in found.items()}
        return {**found, entry.token: step.name}

    def spelled(self, token: int) -> bytes:
        """What a token would add to a text that has begun."""
        return b"" if token in self._hidden_ids else self._bytes[token]

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._by_id else self._bytes.name(token)


def prompt_offsets(tokenizer: ChatTokenizer, ids: Sequence[int], text: str) -> list[int]:
    """Where a prompt's tokens begin in its text, in characters. A special token takes place where the text writes it out."""
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces: list[str] = []
    offsets: list[int] = []
    written = 0  # characters of special tokens
    for token in ids:
        pieces.append(detokenizer.push(token))
        offsets.append(detokenizer.start + written)
        if token in tokenizer.special_ids:
            spelled = tokenizer.token_bytes[token].decode()
            if text.startswith(spelled, offsets[-1]):
                pieces.append(spelled)
                written += len(spelled)
    if "".join(pieces) == text:
        return offsets
    ends = tokenizer.ends(text, ids)  # the tokenizer has changed the text, by a normal form say
    return offsets if ends is None else _fitted(tokenizer, ids, text, ends)


def _fitted(tokenizer: ChatTokenizer, ids: Sequence[int], text: str, ends: Sequence[int]) -> list[int]:
    """Where tokens begin, in characters of the text, if they end at `ends`.

    A token's own text should stand right before its end: then the token begins where that text does. Otherwise it begins where
    the token before it ends. A token that only begins a character ends together with that character, and begins where the
    character does. A space that the tokenizer has put before the text takes no place.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offsets: list[int] = []
    before = 0
    for token, end in zip(ids, ends, strict=True):
        own = decoder.decode(tokenizer.token_bytes[token])
        end -= bool(own and decoder.getstate()[0])  # the character that it leaves unfinished
        if own.startswith(" ") and not text[:end].endswith(own):
            own = own[1:]
        start = end - len(own)
        offsets.append(start if own and start >= before and text[start:end] == own else before)
        before = max(before, end) if own else before
    return offsets
