"""What each token of a vocabulary is by itself: its bytes, and a name that no other token has.

Owns: how a vocabulary's entries are spelled in bytes. Does not own: text of several tokens (detokenizer.py), encoding.

    byte-level BPE      the letters of an entry stand for bytes, "Ġhi" for " hi"; an entry may hold a part of a character
    byte fallback       "<0xE2>" is one byte, the other entries are text, "▁hi" is " hi"
    anything else       what the tokenizer's decoder adds to a text for the entry

An output's text is the bytes of its tokens, joined and decoded as UTF-8. The only exception is the start of a whole text, where
decoders of SentencePiece's kind leave a space out.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BATCH = 1 << 14
"""Entries that one call of the decoder spells."""


class TokenBytes:
    """Bytes and names of a tokenizer's tokens, by id. Ids outside the vocabulary have no bytes."""

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase) -> None:
        self._hf: Any = hf_tokenizer
        kinds = _decoder_kinds(self._hf.backend_tokenizer.decoder)
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds
        self._anchor: list[int] = self._hf.encode("a", add_special_tokens=False)
        self._anchor_text = self._decode(self._anchor)
        self._added: dict[int, str] = {index: token.content for index, token in self._hf.added_tokens_decoder.items()}
        self._known: dict[int, bytes] = {}
        self._first: dict[int, bytes] = {}
        self._names: dict[int, str] = {}

    def __getitem__(self, token: int) -> bytes:
        """The bytes that a token adds to a text that has begun."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._spell(token)
        return found

    def at_start(self, token: int) -> bytes:
        """The bytes of a text's first token: where the tokenizer leaves a first space out, without it."""
        if self._byte_level:
            return self[token]
        found = self._first.get(token)
        if found is None:
            own = self[token]
            text = self._decode([token]).encode() if own else own
            found = self._first[token] = text if own.endswith(text) else own  # a part of a character decodes to U+FFFD
        return found

    def spell(self, count: int) -> list[bytes]:
        """The bytes of the first `count` ids, as `__getitem__` gives them."""
        self._spell_all(self._hf.get_vocab())
        return [self[token] for token in range(count)]

    def name(self, token: int) -> str:
        """How log-probabilities call a token: its text, or its bytes as `bytes:\\xe2\\x9c` if they are no text. Of several
        tokens with the same text one has it as its name; the others, and those without text, are called `token_id:7`.

        The first call spells the whole vocabulary, which takes some 100 ms.
        """
        found = self._names.get(token)
        if found is None:
            found = self._names[token] = self._other_names.get(token) or _shown(self[token]) or _numbered(token)
        return found

    @functools.cached_property
    def _other_names(self) -> dict[int, str]:
        """Names of the tokens whose text is another token's name."""
        vocabulary: dict[str, int] = self._hf.get_vocab()
        self._spell_all(vocabulary)
        taken: dict[str, int] = {}
        others: dict[int, str] = {}

        def rank(item: tuple[str, int]) -> tuple[bool, bool, int]:
            piece, token = item
            return self._is_byte(piece), token in self._added, token

        for piece, token in sorted(vocabulary.items(), key=rank):
            name = _shown(self[token]) or _numbered(token)
            if taken.setdefault(name, token) != token:
                name = _escaped(self[token]) if self._is_byte(piece) else _numbered(token)
                if taken.setdefault(name, token) != token:
                    name = _numbered(token)
                others[token] = name
        return others

    def _spell_all(self, vocabulary: dict[str, int]) -> None:
        left = [token for piece, token in vocabulary.items() if self._fixed(piece, token) is None]
        for start in range(0, len(left), _BATCH):
            part = left[start : start + _BATCH]
            anchored = [[*self._anchor, token] for token in part]
            texts = self._hf.backend_tokenizer.decode_batch(anchored, skip_special_tokens=False)
            for token, text in zip(part, texts, strict=True):
                self._known[token] = text[len(self._anchor_text) :].encode()

    def _spell(self, token: int) -> bytes:
        piece = self._hf.convert_ids_to_tokens(token)
        if piece is None:
            return b""
        fixed = self._fixed(piece, token)
        return self._decode([*self._anchor, token])[len(self._anchor_text) :].encode() if fixed is None else fixed

    def _fixed(self, piece: str, token: int) -> bytes | None:
        """The bytes of an entry that are known without asking the decoder. Among byte-level entries an added token is plain
        text, where the decoder would take its letters for bytes."""
        if self._byte_level:
            if token in self._added:
                return self._added[token].encode()
            try:
                return bytes([_LETTERS[letter] for letter in piece])
            except KeyError:  # an entry in plain text, as the decoder takes it too
                return piece.encode()
        return bytes([int(piece[3:5], 16)]) if self._is_byte(piece) else None

    def _is_byte(self, piece: str) -> bool:
        return self._byte_fallback and _BYTE_PIECE.fullmatch(piece) is not None

    def _decode(self, ids: list[int]) -> str:
        return self._hf.backend_tokenizer.decode(ids, skip_special_tokens=False)


def _shown(spelled: bytes) -> str:
    """Bytes as text where they are text; nothing for nothing."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return _escaped(spelled)


def _escaped(spelled: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _numbered(token: int) -> str:
    return f"token_id:{token}"


def _decoder_kinds(decoder: Any) -> frozenset[str]:
    """Names of a decoder's steps."""
    if decoder is None:
        return frozenset()
    described = json.loads(decoder.__getstate__())
    return frozenset(step["type"] for step in (described, *described.get("decoders", ())))


def _byte_letters() -> dict[str, int]:
    """The printable letters that stand for bytes in byte-level vocabularies, as GPT-2 assigned them."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_LETTERS = _byte_letters()
