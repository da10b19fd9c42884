"""Text to token ids and back, and the chat template's conversations as prompts.

Owns: what a conversation looks like in tokens, and control tokens in its texts. Does not own: which tokens are trained
(examples.py), text as it comes (detokenizer.py), stop conditions. The tokenizer and its chat template are Hugging Face's.

Control tokens that a message writes out (an end-of-turn marker in a user's text) are plain text, in requests and in training
alike, unless `TextRules.allow_control_tokens` says otherwise; see chat/control.py. An assistant's text, and a text outside of
any template, may hold those around thoughts and calls (`<think>`), which its author writes itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coserve.chat.control import ControlTexts, Settled
from coserve.chat.reasoning import THOUGHT_MARKERS
from coserve.chat.template import NO_EXTRAS, PROBE, ChatExtras, ChatTemplate, Message
from coserve.chat.toolprompt import ToolPrompt
from coserve.core import ContextExceeded, InvalidRequest, NotFound, one_line
from coserve.text.tokenbytes import TokenBytes

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_MARKER = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
"""A name between other characters, as <tool_call> and [TOOL_CALLS] are: no word, and no mere punctuation."""
_LONGEST_MARK = 4
"""Characters of a mark for one of a text."""
EXACT_KEY = "coserve_exact"
"""In tokenizer_config.json: tokenizer.json is the whole truth. For some families AutoTokenizer replaces parts of it."""


def _is_exact(directory: Path) -> bool:
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get(EXACT_KEY))


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """How texts are read. allow_control_tokens: whether a control token that a text writes out is one. now: the time for chat
    templates that write today's date; None: the machine's clock."""

    allow_control_tokens: bool = False
    now: datetime | None = None


PLAIN_RULES = TextRules()


class MarkedChat(NamedTuple):
    """What a template renders, contents marked (see chat/control.py)."""

    messages: Sequence[Message]
    extras: ChatExtras


class ChatTokenizer:
    """A Hugging Face fast tokenizer and its chat template."""

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase, call_format: str | None = None) -> None:
        """call_format: how the model writes calls of tools, as for ChatTemplate. Raises InvalidRequest if the tokenizer isn't a
        fast one: loss weights need character offsets."""
        if not hf_tokenizer.is_fast:
            raise InvalidRequest("the model's tokenizer has no fast version (tokenizer.json)", param="model")
        self._hf: Any = hf_tokenizer
        self._call_format = call_format
        special = {index: token for index, token in self._hf.added_tokens_decoder.items() if token.special}
        self.special_ids: frozenset[int] = frozenset(special)
        self.marker_ids: frozenset[int] = frozenset(
            index for index, token in self._hf.added_tokens_decoder.items() if token.special or token.content.strip()
        )
        """Added tokens that aren't white space: what templates mark turns with, whether declared special or not."""
        self.special_tokens = {token.content: index for index, token in special.items() if token.content}
        self.token_bytes = TokenBytes(hf_tokenizer)
        bos = self._hf.bos_token_id
        self.bos_ids: list[int] = [bos] if bos is not None and self.encode("a", add_special_tokens=True)[:1] == [bos] else []
        self._making_controls = threading.Lock()
        self._made_controls: ControlTexts | None = None
        self._given_template: ChatTemplate | None = None
        self._original: ChatTokenizer | None = None
        """What it puts before a text: the BOS token or nothing."""
        alone = self.encode("a")
        self.adds_prefix_space = self.decode(alone + alone) == "a a"
        """Whether a text's first word gets a space, as SentencePiece does."""

    @classmethod
    def load(cls, directory: Path, call_format: str | None = None) -> ChatTokenizer:
        """Reads the tokenizer of a model directory; never the network. call_format: as for the class.

        Raises NotFound if there is no such directory or no tokenizer in it, InvalidRequest if it can't be read.
        """
        if not directory.is_dir():
            raise NotFound(f"no such model directory: {directory}", param="model")
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            raise NotFound(f"no tokenizer in {directory}: expected {' or '.join(_TOKENIZER_FILES)}", param="model")
        try:
            reader = PreTrainedTokenizerFast if _is_exact(directory) else AutoTokenizer
            hf_tokenizer = reader.from_pretrained(directory, local_files_only=True)
        except Exception as error:  # the libraries below raise plain Exception for a damaged file
            message = f"the tokenizer in {directory} can't be read: {one_line(error, 300)}"
            raise InvalidRequest(message, param="model") from error
        return cls(hf_tokenizer, call_format)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return len(self._hf)

    @functools.cached_property
    def longest_token(self) -> int:
        """The most characters that one token can stand for. Characters that the tokenizer drops from a text are not counted."""
        return max(len(token) for token in self._hf.get_vocab())

    def knows(self, token: str) -> bool:
        """Whether a text is one token of the vocabulary, added ones included."""
        return self._hf.backend_tokenizer.token_to_id(token) is not None

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def eos_token(self) -> str | None:
        """The text of that token."""
        return self._hf.eos_token

    @property
    def bos_token(self) -> str | None:
        """The text of the BOS token, which isn't always one that the tokenizer adds: see `bos_ids`."""
        return self._hf.bos_token

    def with_template(
        self, source: str, make: Callable[[str, Mapping[str, Any], str | None], ChatTemplate] = ChatTemplate
    ) -> ChatTokenizer:
        """The same tokenizer with another chat template. make: makes it, with the parameters of a ChatTemplate."""
        other = copy.copy(self)
        other.__dict__.pop("template", None)
        other._making_controls, other._made_controls = threading.Lock(), None
        other._given_template, other._original = make(source, self._hf.special_tokens_map, self._call_format), self
        return other

    def or_template(self, source: str | None) -> ChatTokenizer:
        """The same tokenizer with another chat template, if there is one."""
        return self if source is None else self.with_template(source)

    def use_template(self, source: str) -> None:
        """Takes another chat template from now on. For a tokenizer that nobody has used yet."""
        self.__dict__ |= vars(self.with_template(source)) | {"_original": None}

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, or None."""
        if self._given_template is not None:
            return self._given_template.source
        return self._hf.get_chat_template() if self._hf.chat_template else None

    @property
    def has_chat_template(self) -> bool:
        return self._given_template is not None or bool(self._hf.chat_template)

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """Raises InvalidRequest if there is none."""
        source = self.chat_template
        if source is None:
            raise InvalidRequest("the model's tokenizer has no chat template; give plain text", param="messages")
        return self._given_template or ChatTemplate(source, self._hf.special_tokens_map, self._call_format)

    @property
    def knows_developer(self) -> bool:
        """Whether the chat template has a developer role of its own; else such messages are given as the system's."""
        return self.has_chat_template and self.template.knows_developer

    @property
    def takes_system(self) -> bool:
        """Whether the chat template renders system messages."""
        return self.has_chat_template and self.template.takes_system

    @property
    def tool_prompt(self) -> ToolPrompt:
        """How tools are told to the model. Raises InvalidRequest if there is no chat template."""
        return self.template.tool_prompt

    def prepare_control_texts(self) -> None:
        """Does ahead of time what the first message with a control token written out needs. For a tokenizer of 150,000 tokens
        that takes about a second."""
        with contextlib.suppress(InvalidRequest):  # such messages will be refused, others not
            self.controls.prepare()

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Special tokens written out in `text` become special tokens."""
        return self._hf.encode(text, add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids beyond the vocabulary decode to nothing; bytes that aren't UTF-8 to U+FFFD."""
        return self._hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def is_white_space(self, token_id: int) -> bool:
        """Whether a token stands for white space only, behind other text."""
        before = self.encode("a")  # decoders drop a first space
        text = self.decode([*before, token_id], skip_special_tokens=False)[len(self.decode(before)) :]
        return bool(text) and not text.strip()

    def ends(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """Where in `text` each of its ids ends, in characters, as the tokenizer says; None if these aren't the text's ids."""
        for special in (True, False):
            encoded = self._hf(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            if encoded["input_ids"] == list(ids):
                return [end for _, end in encoded["offset_mapping"]]
        return None

    def render_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, now: datetime | None = None,
        extras: ChatExtras = NO_EXTRAS, continue_final: bool = False, max_chars: int | None = None,
    ) -> str:
        """The conversation as the chat template writes it. continue_final, max_chars: as in ChatTemplate.render.

        Raises InvalidRequest if there is no template, or the template refuses the conversation.
        """
        return self.template.render(
            messages, add_generation_prompt=add_generation_prompt, now=now, extras=extras, continue_final=continue_final,
            max_chars=max_chars,
        )

    def encode_chat(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, add_special_tokens: bool = False,
        rules: TextRules = PLAIN_RULES, extras: ChatExtras = NO_EXTRAS, continue_final: bool = False,
        max_chars: int | None = None,
    ) -> list[int]:
        """A prompt for the next assistant turn: the conversation with the generation prompt, or where continue_final says so,
        with the last message left open. max_chars: the most characters that the rendered conversation may have, roughly: a mark
        may be longer than the control text in whose place it stands. Raises InvalidRequest, ContextExceeded."""
        if continue_final and not isinstance(messages[-1]["content"], str):
            raise InvalidRequest("messages: the last one has no content to continue", param="messages")
        chat = self.marked(messages, extras, rules)
        most = None if max_chars is None else max_chars * _LONGEST_MARK
        text = self.render_marked(chat, add_generation_prompt, rules, continue_final=continue_final, max_chars=most)
        settled = self.controls.settle(text)
        return self._encode_settled(settled, add_special_tokens)

    # --- control tokens ---

    @property
    def controls(self) -> ControlTexts:
        """Made once, also where two threads ask first: one of them could not read the other's marks."""
        with self._making_controls:
            if self._made_controls is None:
                names, own = self._control_names(), self._part_names()
                lent = None if self._original is None else self._original.controls  # its copy of the tokenizer is large
                if lent is None or not lent.has_names(names, own):
                    lent = ControlTexts(self._hf.backend_tokenizer, names, self._hf.unk_token, own=own)
                self._made_controls = lent
            return self._made_controls

    def _control_names(self) -> set[str]:
        """Special tokens, and added tokens that the template writes around turns though they aren't called special."""
        names = {*self.special_tokens, *self._hf.all_special_tokens, *(getattr(self._hf, "chat_control_tokens", None) or ())}
        turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
        if self.has_chat_template:
            with contextlib.suppress(InvalidRequest):
                written = self.render_chat(turns, add_generation_prompt=False)
                added = {index: token.content for index, token in self._hf.added_tokens_decoder.items()}
                tokens = {added[index] for index in self.encode(written) if index in added}
                names |= {name for name in tokens if name in self.special_tokens or name not in THOUGHT_MARKERS}
        return {name for name in names if name}

    def _part_names(self) -> set[str]:
        """Added tokens that the template's source writes out, where they look like marks: of thoughts, calls and results."""
        written = self.template.written if self.has_chat_template else ""
        added = {token.content for token in self._hf.added_tokens_decoder.values()}
        return {name for name in added if _MARKER.fullmatch(name) and name in written}

    def marked(self, messages: Sequence[Message], extras: ChatExtras, rules: TextRules) -> MarkedChat:
        """What the template may see: control tokens in texts, inner ones and names included, are marked unless they are
        allowed."""
        if rules.allow_control_tokens:
            return MarkedChat(messages, extras)
        tools, variables = self.controls.mark_all(extras.tools), self.controls.mark_all(extras.variables)
        return MarkedChat(self.controls.mark_messages(messages), ChatExtras(tools=tools, variables=variables))

    def encode_plain(self, text: str, rules: TextRules) -> list[int]:
        """Ids of a text that no template has written."""
        if rules.allow_control_tokens:
            return self.encode(text)
        return self._encode_settled(self.controls.settle(self.controls.mark(text, own=True)))

    def _encode_settled(self, settled: Settled, add_special_tokens: bool = False) -> list[int]:
        if settled.copy:
            return self.controls.encode(settled, add_special_tokens).ids
        return self.encode(settled.text, add_special_tokens)

    def encode_ranges(self, settled: Settled) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int64 [n], and the characters [start, end) of each, int64 [n, 2]."""
        if settled.copy:
            encoding = self.controls.encode(settled, False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            encoded = self._hf(settled.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        return np.asarray(ids, dtype=np.int64), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    def render_marked(self, chat: MarkedChat, add_generation_prompt: bool, rules: TextRules, **more: Any) -> str:
        """The conversation as the chat template writes it, marks included. more: as for `render_chat`. Raises InvalidRequest,
        whose message has no marks, and ContextExceeded."""
        try:
            return self.render_chat(
                chat.messages, add_generation_prompt=add_generation_prompt, now=rules.now, extras=chat.extras, **more
            )
        except ContextExceeded:
            raise
        except InvalidRequest as error:
            raise InvalidRequest(self.controls.unmark(str(error)), param=error.param) from error
