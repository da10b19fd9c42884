"""Control tokens that a user writes out in a text: kept plain text, while those that the chat template writes stay tokens.

    content         a<|end|>b                          what a user sent
    mark            aXb                                a mark, X, takes the control text's place before the template sees it
    render          <|user|>aXb<|end|>                 the template trims, splits and joins it like any other text
    settle          <|USER|>a<|end|>b<|END|>           control tokens of the template get other names; X becomes its text
    encode          by a copy of the tokenizer that knows control tokens by those other names only

The marks and the other names are random private-use characters, made once per tokenizer, so that no text can hold them. The
copy has the tokenizer's own settings with other names, so it treats what is around a token (white space to strip, prefix
spaces) as the tokenizer does. A text without marks never needs the copy.

Some control tokens are an assistant's own writing: those around thoughts and calls (`<think>`, `<tool_call>`). In an
assistant's text they stay tokens, as a model has written them there. In anybody else's text they are plain text as all others.

Owns: finding, marking, the copy. Does not own: which tokens are control tokens (text/tokenizer.py).
"""

from __future__ import annotations

import bisect
import json
import re
import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tokenizers import AddedToken, Encoding, Tokenizer, models

from coserve.chat.template import Message
from coserve.core import InvalidRequest

OWN_TEXTS = ("content", "reasoning_content")
"""What an assistant writes itself, of the fields of its message."""
_PRIVATE, _NUM_PRIVATE = 0x100000, 0xFFFE
"""The second plane of private-use characters."""
_NUMBERS = 0xF0000
"""The first plane: a mark's last character is the number of a control token from here on."""
_MARK_CHARS = 3


class _ControlText(NamedTuple):
    """A control text at [start, end) of a text."""

    start: int
    end: int
    name: str


class Settled(NamedTuple):
    """A rendered text, ready for tokenizing. copy: whether the copy of the tokenizer must read it; if so, num_own is the number
    of control tokens that the template wrote. place: turns a position in the rendered text into one in `text`."""

    text: str
    copy: bool
    num_own: int
    place: Callable[[int], int]


class ControlTexts:
    """The control tokens of one tokenizer as texts. Any thread may use it."""

    def __init__(
        self, backend: Tokenizer, names: Collection[str], unknown: str | None, *, own: Collection[str] = ()
    ) -> None:
        """names: of the control tokens. unknown: the name of the token for what the vocabulary can't write, which plain text
        may hold; None if there is none. own: names of further control tokens, which an assistant's own text may hold."""
        self._backend = backend
        self._own = frozenset(own) - frozenset(names)
        self._names = frozenset(name for name in {*names, *own} if not name.isspace())
        self._unknown = unknown
        self._listed = sorted(self._names)
        self._numbers = {name: number for number, name in enumerate(self._listed)}
        self._mark, self._cut, self._rename = _private(), _private(), _private()
        last = chr(_NUMBERS + max(0, len(self._listed) - 1))
        self._marks = re.compile(f"{self._mark}([{chr(_NUMBERS)}-{last}])|{self._cut}")
        self._starts = frozenset(name[:n] for name in self._names for n in range(1, len(name)))
        self._longest = max(map(len, self._names), default=0)
        self._finder, self._by_id = _build_finder(backend)
        self._copy: Tokenizer | None = None
        self._building = threading.Lock()

    def has_names(self, names: Collection[str], own: Collection[str]) -> bool:
        """Whether these are its control tokens' names."""
        spaceless = frozenset(name for name in {*names, *own} if not name.isspace())
        return (spaceless, frozenset(own) - frozenset(names)) == (self._names, self._own)

    def holds(self, text: str, *, own: bool = False) -> bool:
        """Whether the tokenizer would read a control token in the text. own: it is an assistant's text, see above."""
        return bool(self._foreign(text, own))

    def mark(self, text: str, *, own: bool = False) -> str:
        """The text with marks for its control texts, for the template. own: it is an assistant's text, see above. Raises
        InvalidRequest if it holds control texts even so."""
        found = self._foreign(text, own)
        if found:
            text = _edit(text, [(item.start, item.end, self._placeholder(text[item.start : item.end])) for item in found])
            if self._foreign(text, own):
                raise _not_copied()
        body = text.rstrip()  # a control text that only begins here might end in what the template puts behind
        if any(body[-n:] in self._starts for n in range(1, min(self._longest, len(body) + 1))):
            return body + self._cut + text[len(body) :]
        return text

    def mark_messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with marks in all their texts, names and inner ones included. Raises InvalidRequest as `mark`, and for
        values that are nested too deeply."""
        return [
            {self.mark(name): self.mark_all(value, own=message["role"] == "assistant" and name in OWN_TEXTS)
             for name, value in message.items()}
            for message in messages
        ]

    def mark_all(self, value: Any, *, own: bool = False) -> Any:
        """A value with marks in all its texts. own: as in `mark`. Raises InvalidRequest as `mark_messages`."""
        try:
            return self._mark_inside(value, own)
        except RecursionError:
            raise InvalidRequest("messages: a value in them, or beside them, is nested too deeply", param="messages") from None

    def _mark_inside(self, value: Any, own: bool) -> Any:
        if isinstance(value, str):
            return self.mark(value, own=own)
        if isinstance(value, Mapping):
            return {self.mark(name): self._mark_inside(item, own) for name, item in value.items()}
        return [self._mark_inside(item, own) for item in value] if isinstance(value, list | tuple) else value

    def _placeholder(self, surface: str) -> str:
        """surface: a control text; it isn't its token's name where the tokenizer normalizes texts."""
        number = self._numbers.get(surface)
        return self._cut.join([*surface, ""]) if number is None else self._mark + chr(_NUMBERS + number)

    def unmark(self, text: str) -> str:
        """The text as it was before `mark`."""
        return self._marks.sub(lambda match: self._restored(match[1]), text)

    def _restored(self, number: str | None) -> str:
        """What a mark stands for; nothing for a cut."""
        return "" if number is None else self._listed[ord(number) - _NUMBERS]

    def settle(self, rendered: str) -> Settled:
        """What to tokenize, of a text rendered from marked content."""
        edits = [(match.start(), match.end(), self._restored(match[1])) for match in self._marks.finditer(rendered)]
        if not edits:
            return Settled(rendered, False, 0, lambda position: position)
        own, clean, place = self._find(rendered), _edit(rendered, edits), _mover(edits)
        if [(place(found.start), place(found.end)) for found in own] == [found[:2] for found in self._find(clean)]:
            return Settled(clean, False, 0, place)
        edits = sorted([*edits, *((found.start, found.end, self._renamed(found.name)) for found in own)])
        return Settled(_edit(rendered, edits), True, len(own), _mover(edits))

    def encode(self, settled: Settled, add_special_tokens: bool) -> Encoding:
        """Tokens of a settled text that is for the copy. Raises InvalidRequest if the tokenizer's kind can't be copied."""
        copy = self.prepare()
        encoding = copy.encode(settled.text, add_special_tokens=add_special_tokens)
        expected = settled.num_own + (copy.num_special_tokens_to_add(False) if add_special_tokens else 0)
        control = {self._backend.token_to_id(name) for name in self._names - {self._unknown}}
        own_unknown = settled.text.count(self._renamed(self._unknown)) if self._unknown in self._names else 0
        if sum(id in control for id in encoding.ids) > expected - own_unknown:
            raise _not_copied()
        return encoding

    def prepare(self) -> Tokenizer:
        """Makes the copy (about a second for 150,000 tokens) unless it is there. Raises InvalidRequest."""
        with self._building:
            if self._copy is None:
                self._copy = self._build_copy()
            return self._copy

    def _renamed(self, name: str | None) -> str:
        return f"{self._rename}{name}{self._rename}"

    def _foreign(self, text: str, own: bool) -> list[_ControlText]:
        """Control texts that must not count where they are. own: whether it is an assistant's text."""
        return [item for item in self._find(text) if not (own and item.name in self._own)]

    def _find(self, text: str) -> list[_ControlText]:
        encoding = self._finder.encode(text, add_special_tokens=False)
        found = [
            _ControlText(start, end, self._by_id[id])
            for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True) if id in self._by_id
        ]
        return [item for item in found if item.name in self._names]

    def _build_copy(self) -> Tokenizer:
        data = json.loads(self._backend.to_str())
        data["truncation"] = data["padding"] = None
        for added in data["added_tokens"]:
            added["content"] = self._new_name(added["content"])
        model = data["model"]
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model["vocab"] = {self._new_name(name): id for name, id in vocab.items()}
        else:
            model["vocab"] = [[self._new_name(name), score] for name, score in vocab]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not self._makes_control(merge)]
        if model.get("unk_token") is not None:
            model["unk_token"] = self._new_name(model["unk_token"])
        try:
            copy = Tokenizer.from_str(json.dumps(data))
        except Exception as error:  # the library raises plain Exception
            raise _not_copied() from error
        for name in self._names:
            if copy.token_to_id(self._renamed(name)) != self._backend.token_to_id(name):
                raise _not_copied()
        return copy

    def _new_name(self, name: str) -> str:
        return self._renamed(name) if name in self._names else name

    def _makes_control(self, merge: Any) -> bool:
        """Whether a merge of the model reads or gives a control text as a whole."""
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        return bool({first, second, first + second} & self._names)


def _private() -> str:
    return "".join(chr(_PRIVATE + secrets.randbelow(_NUM_PRIVATE)) for _ in range(_MARK_CHARS))


def _build_finder(backend: Tokenizer) -> tuple[Tokenizer, dict[int | None, str]]:
    """A tokenizer of added tokens alone, found where `backend` finds them, and their names by its ids."""
    finder = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    if backend.normalizer is not None:
        finder.normalizer = backend.normalizer
    added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    finder.add_tokens([
        AddedToken(token.content, single_word=token.single_word, normalized=token.normalized, special=token.special)
        for token in added
    ])
    return finder, {finder.token_to_id(token.content): token.content for token in added}


def _edit(text: str, edits: list[tuple[int, int, str]]) -> str:
    """The text with each [start, end) replaced; the edits are sorted and apart."""
    pieces, last = [], 0
    for start, end, new in edits:
        pieces += [text[last:start], new]
        last = end
    return "".join([*pieces, text[last:]])


def _mover(edits: list[tuple[int, int, str]]) -> Callable[[int], int]:
    """From a position before the edits to the one after them."""
    ends, moves, total = [], [0], 0
    for start, end, new in edits:
        total += len(new) - (end - start)
        ends.append(end)
        moves.append(total)
    return lambda position: position + moves[bisect.bisect_right(ends, position)]


def _not_copied() -> InvalidRequest:
    return InvalidRequest(
        "the text holds control tokens written out, which this model's tokenizer can't read as plain text; leave them out, or "
        "allow control tokens", param="messages",
    )
