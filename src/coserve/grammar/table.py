"""A vocabulary as llguidance reads it, and the limits within which grammars are compiled and followed.

The vocabulary has one token more than the model: the library wants a token for the end of a text, and a request's own end
tokens are no business of a grammar's. Special tokens are apart from all others: no pattern matches them, and a grammar can name
them.

Owns: the library's settings. Does not own: what becomes of a grammar (matcher.py, check.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.text.tokenizer import ChatTokenizer

FOOTER = '\n%llguidance {"no_forcing": true}\n'
"""Behind every grammar. Where a text is forced, the model chooses among its spellings in tokens, as it does elsewhere."""
LIMITS: Mapping[str, Any] = {"max_lexer_states": 50_000, "verbose_errors": False}
"""Of llguidance.LLParserLimits. A state takes 1 to 2 kB. The other limits are the library's own: they let the lexer spend some
15 ms on one token's mask, and the parser some 3 ms, unless the grammar is ambiguous."""
_END = b"<|end of text|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTable:
    """What the library knows of a tokenizer, by its own names. tokens: the bytes of each id, of a special one its name; nothing
    for ids without a text. eos_token_id: the library's own end of text, which is the last id."""

    tokens: Sequence[bytes]
    special_token_ids: Sequence[int]
    eos_token_id: int
    bos_token_id: int | None = None


def read_token_table(tokenizer: ChatTokenizer, size: int) -> TokenTable:
    """size: ids that the model can sample. Spells the whole vocabulary, which takes some 100 ms."""
    tokens = tokenizer.token_bytes.spell(size)
    special = {token: name.encode() for name, token in tokenizer.special_tokens.items() if token < size}
    for token, name in special.items():
        tokens[token] = name
    return TokenTable(tokens=[*tokens, _END], special_token_ids=[*sorted(special), size], eos_token_id=size)
