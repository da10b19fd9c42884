"""Text to token ids and back: chat template, encoding with loss weights.

Owns: what a conversation looks like in tokens and which of those tokens are trained. Does not own: file formats of
datasets, truncation, text as it comes (detokenizer.py), stop conditions. The tokenizer and its chat template are Hugging
Face's.

The trained part of an assistant turn is what a model has to produce after `encode_chat` of the messages before it. Which
characters these are is found in chat/trained.py; here they become tokens, so that no token reaches from a prompt into a reply.

Control tokens that a message writes out (an end-of-turn marker in a user's text) are plain text, in requests and in training
alike, unless `TextRules.allow_control_tokens` says otherwise; see chat/control.py. An assistant's text, and a text outside of
any template, may hold those around thoughts and calls (`<think>`), which its author writes itself.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
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

from coserve.chat.control import OWN_TEXTS, ControlTexts, Settled
from coserve.chat.reasoning import THOUGHT_MARKERS
from coserve.chat.template import NO_EXTRAS, PROBE, ChatExtras, ChatTemplate, Message
from coserve.chat.toolprompt import ToolPrompt
from coserve.chat.trained import TrainedText, TrainedTurns, check_calls, lacks_thought, loses_thought, texts_in, trained_turns
from coserve.core import ContextExceeded, InvalidRequest, NotFound, one_line
from coserve.text.tokenbytes import TokenBytes

_NEAR = 16
"""Characters on each side of a place that are looked at for a token over it."""
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


@dataclass(slots=True, kw_only=True)
class Notes:
    """What a user should know about examples that were encoded, as counts.

    last_turn_only: conversations of which only the last trained turns are trained, because the template renders earlier ones
    differently inside a conversation than at its end. several: those that became several examples for the same reason.
    lost_thoughts: those with a thought that the template doesn't write. no_thoughts: those with an answer without a thought
    behind a prompt that opens one. control_texts: texts that write control tokens out, which were taken as plain text.
    """

    last_turn_only: int = 0
    several: int = 0
    lost_thoughts: int = 0
    no_thoughts: int = 0
    control_texts: int = 0


class _Chat(NamedTuple):
    """What a template renders, contents marked."""

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
        self._bos: list[int] = [bos] if bos is not None and self.encode("a", add_special_tokens=True)[:1] == [bos] else []
        self._making_controls = threading.Lock()
        self._made_controls: ControlTexts | None = None
        self._given_template: ChatTemplate | None = None
        self._original: ChatTokenizer | None = None
        alone = self.encode("a")
        self._adds_prefix_space = self.decode(alone + alone) == "a a"
        self._joins = functools.lru_cache(maxsize=4096)(self._find_join)

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

    def with_template(
        self, source: str, make: Callable[[str, Mapping[str, Any], str | None], ChatTemplate] = ChatTemplate
    ) -> ChatTokenizer:
        """The same tokenizer with another chat template. make: makes it, with the parameters of a ChatTemplate."""
        other = copy.copy(self)
        for name in ("template", "_farewell"):
            other.__dict__.pop(name, None)
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
            self._controls.prepare()

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
        rules: TextRules = TextRules(), extras: ChatExtras = NO_EXTRAS, continue_final: bool = False,
        max_chars: int | None = None,
    ) -> list[int]:
        """A prompt for the next assistant turn: the conversation with the generation prompt, or where continue_final says so,
        with the last message left open. max_chars: the most characters that the rendered conversation may have, roughly: a mark
        may be longer than the control text in whose place it stands. Raises InvalidRequest, ContextExceeded."""
        if continue_final and not isinstance(messages[-1]["content"], str):
            raise InvalidRequest("messages: the last one has no content to continue", param="messages")
        chat = self._marked(messages, extras, rules)
        most = None if max_chars is None else max_chars * _LONGEST_MARK
        text = self._render(chat, add_generation_prompt, rules, continue_final=continue_final, max_chars=most)
        settled = self._controls.settle(text)
        if settled.copy:
            return self._controls.encode(settled, add_special_tokens).ids
        return self.encode(settled.text, add_special_tokens)

    def encode_training(
        self, messages: Sequence[Message], rules: TextRules = TextRules(), notes: Notes | None = None,
        extras: ChatExtras = NO_EXTRAS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation as one example: token ids (int64 [n]) and loss weights (float32 [n]).

        The same as `encode_examples` where that gives one example. Where it gives several, this is the last of them, in which
        only the last trained turns are trained; `notes` counts that. Raises InvalidRequest as `encode_examples` does.
        """
        notes = Notes() if notes is None else notes
        texts = self._render_training(messages, rules, notes, extras)
        notes.last_turn_only += len(texts) > 1
        return self._encode_trained(texts[-1])

    def encode_examples(
        self, messages: Sequence[Message], rules: TextRules = TextRules(), notes: Notes | None = None,
        extras: ChatExtras = NO_EXTRAS,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """A conversation as examples, each token ids (int64 [n]) and loss weights (float32 [n]).

        The ids are those of the rendered conversation. Weights are 1 for tokens that hold a character of what an assistant's
        turn has behind its prompt, the end-of-turn token included, else 0 (see chat/trained.py); turns with `weight: 0` get 0.
        If the template renders a turn differently inside the conversation than at its end, the template's own
        `{% generation %}` blocks decide instead; without them there are several examples, each of which ends with a trained
        turn, and `notes` counts that. Raises InvalidRequest, naming the turn, if what to train on is undefined even so.
        """
        notes = Notes() if notes is None else notes
        texts = self._render_training(messages, rules, notes, extras)
        notes.several += len(texts) > 1
        return [self._encode_trained(text) for text in texts]

    def encode_completion(
        self, prompt: str, completion: str, rules: TextRules = TextRules(), notes: Notes | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64 [n]) and loss weights (float32 [n]) of a prompt (0) and its completion and EOS (1).

        Prompt and completion are tokenized apart. So the prompt's ids are those of a request with this prompt, unless it writes
        control tokens out. If the completion writes out an EOS token at its end, with or without white space behind it, no
        second one is added. Raises InvalidRequest if the tokenizer has no EOS token.
        """
        eos = self._require_eos()
        self._note_texts(notes, rules, self._without_bos(prompt), self._without_eos(completion))
        prompt_ids = self._bos + self._encode_text(self._without_bos(prompt), rules)
        completion_ids = [*self._encode_continuation(self._without_eos(completion), rules), eos]
        weights = np.ones(len(prompt_ids) + len(completion_ids), dtype=np.float32)
        weights[: len(prompt_ids)] = 0.0
        return np.asarray(prompt_ids + completion_ids, dtype=np.int64), weights

    def encode_text(
        self, text: str, rules: TextRules = TextRules(), notes: Notes | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64 [n]) and loss weights (float32 [n]) of a text with EOS: all 1.

        BOS and EOS are not doubled where the text already writes them out, the EOS with or without white space behind it.
        Raises InvalidRequest if the tokenizer has no EOS token.
        """
        eos = self._require_eos()
        body = self._without_eos(self._without_bos(text))
        self._note_texts(notes, rules, body)
        ids = [*self._bos, *self._encode_text(body, rules), eos]
        return np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.float32)

    # --- control tokens ---

    @property
    def _controls(self) -> ControlTexts:
        """Made once, also where two threads ask first: one of them could not read the other's marks."""
        with self._making_controls:
            if self._made_controls is None:
                names, own = self._control_names(), self._part_names()
                lent = None if self._original is None else self._original._controls  # its copy of the tokenizer is large
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

    def _marked(self, messages: Sequence[Message], extras: ChatExtras, rules: TextRules) -> _Chat:
        """What the template may see: control tokens in texts, inner ones and names included, cut unless they are allowed."""
        if rules.allow_control_tokens:
            return _Chat(messages, extras)
        tools, variables = self._controls.mark_all(extras.tools), self._controls.mark_all(extras.variables)
        return _Chat(self._controls.mark_messages(messages), ChatExtras(tools=tools, variables=variables))

    def _encode_text(self, text: str, rules: TextRules) -> list[int]:
        """Ids of a text that no template has written."""
        if rules.allow_control_tokens:
            return self.encode(text)
        settled = self._controls.settle(self._controls.mark(text, own=True))
        return self._controls.encode(settled, False).ids if settled.copy else self.encode(settled.text)

    def _note_texts(self, notes: Notes | None, rules: TextRules, *texts: str, own: bool = True) -> None:
        """own: whether they are an assistant's, or no template has written them."""
        if notes is not None and not rules.allow_control_tokens:
            notes.control_texts += sum(self._controls.holds(text, own=own) for text in texts)

    # --- conversations ---

    def _render(self, chat: _Chat, add_generation_prompt: bool, rules: TextRules, **more: Any) -> str:
        try:
            return self.render_chat(
                chat.messages, add_generation_prompt=add_generation_prompt, now=rules.now, extras=chat.extras, **more
            )
        except ContextExceeded:
            raise
        except InvalidRequest as error:
            raise InvalidRequest(self._controls.unmark(str(error)), param=error.param) from error

    def _render_training(
        self, messages: Sequence[Message], rules: TextRules, notes: Notes, extras: ChatExtras
    ) -> list[TrainedText]:
        """The texts in which a conversation is trained, contents marked; see `encode_examples`."""
        for message in messages:
            for name in message.keys() - {"role"}:
                own = message["role"] == "assistant" and name in OWN_TEXTS
                self._note_texts(notes, rules, *texts_in(message[name]), own=own)
        self._note_texts(notes, rules, *texts_in(extras.tools), own=False)
        chat = self._marked(messages, extras, rules)
        turns = TrainedTurns(
            render=lambda part, *, add_generation_prompt: self._render(
                chat._replace(messages=part), add_generation_prompt, rules
            ),
            farewell=self._farewell, end_tokens=self.special_tokens, unmark=self._controls.unmark,
        )
        try:
            texts = turns.texts(chat.messages)
        except InvalidRequest:
            if not self.template.has_generation_tags:
                raise
            texts = [self._render_by_generation_tag(chat, rules)]
        else:
            if len(texts) > 1 and self.template.has_generation_tags:
                with contextlib.suppress(InvalidRequest):  # tags that leave out a turn
                    texts = [self._render_by_generation_tag(chat, rules)]
        for text in texts:
            check_calls(text, chat.messages)
        notes.lost_thoughts += any(loses_thought(text, chat.messages) for text in texts)
        notes.no_thoughts += any(map(lacks_thought, texts))
        return texts

    @functools.cached_property
    def _farewell(self) -> str:
        """The EOS token that a template writes behind a conversation, though not behind each turn (Phi-3's); else nothing."""
        turns = [{"role": role, "content": PROBE} for role in ("user", "assistant", "user")]
        eos = self._hf.eos_token
        with contextlib.suppress(InvalidRequest):
            whole, inside = (self.render_chat(part, add_generation_prompt=False) for part in (turns[:2], turns))
            if eos and whole.endswith(eos) and not inside.startswith(whole) and inside.startswith(whole.removesuffix(eos)):
                return str(eos)
        return ""

    def _render_by_generation_tag(self, chat: _Chat, rules: TextRules) -> TrainedText:
        text, spans = self.template.render_generated(chat.messages, now=rules.now, extras=chat.extras)
        turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if len(spans) != len(turns):
            raise InvalidRequest(
                f"the chat template marks {len(spans)} generated passages in a conversation of {len(turns)} "
                "assistant turns, so what to train on is undefined; write one example per assistant turn",
                param="messages",
            )
        trained = trained_turns(chat.messages)
        return TrainedText(text, [span for i, span in zip(turns, spans, strict=True) if i in trained], trained)

    def _encode_trained(self, trained: TrainedText) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64 [n]) and loss weights (float32 [n]) of a rendered text."""
        settled = self._controls.settle(trained.text)
        spans = [(settled.place(start), settled.place(end)) for start, end in trained.spans]
        ids, starts, ends = self._with_offsets(settled, [start for start, _ in spans])
        weights = np.zeros(len(ids), dtype=np.float32)
        for start, end in spans:
            # Byte-level tokenizers may give a lone space an empty range at its end; so a space before the span doesn't count.
            weights[(starts < end) & (ends > start)] = 1.0
        return ids, weights

    def _with_offsets(self, settled: Settled, replies: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Token ids, and the characters [start, end) of each, int64 [n]. No token reaches over the start of one of `replies`,
        since a request's prompt ends there."""
        text = settled.text
        ids, ranges = self._with_ranges(settled, behind=False)
        cuts = [at for at in replies if self._reaches_over(at, text, ranges)]
        if cuts:
            parts = []
            for start, end in itertools.pairwise([0, *cuts, len(text)]):
                part, inside = self._with_ranges(settled._replace(text=text[start:end]), behind=start > 0)
                parts.append((part, inside + start))
            ids, ranges = (np.concatenate(same) for same in zip(*parts, strict=True))
        return ids, ranges[:, 0], ranges[:, 1]

    def _reaches_over(self, at: int, text: str, ranges: np.ndarray) -> bool:
        """Whether a token of the text reaches over a place in it, and the text behind that can be tokenized by itself."""
        if not 0 < at < len(text):
            return False
        # Some ranges leave out a token's first spaces: behind a space they don't tell where the token begins.
        told = not text[at - 1].isspace() or text[at - 1] == "\n"
        if told and not ((ranges[:, 0] < at) & (ranges[:, 1] > at)).any():
            return False
        return self._joins(text[max(0, at - _NEAR) : at], text[at : at + _NEAR])

    def _with_ranges(self, settled: Settled, behind: bool) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, int64 [n], and the characters of each, [n, 2]. behind: whether the text follows other text; see
        `_encode_continuation`."""
        if behind and self._adds_prefix_space:
            num_before = len(self.encode("\n"))
            both, ranges = self._with_ranges(settled._replace(text="\n" + settled.text), False)
            return both[num_before:], np.maximum(ranges[num_before:] - 1, 0)
        if settled.copy:
            encoding = self._controls.encode(settled, False)
            ids, offsets = encoding.ids, encoding.offsets
        else:
            encoded = self._hf(settled.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        return np.asarray(ids, dtype=np.int64), np.asarray(offsets, dtype=np.int64).reshape(-1, 2)

    def _find_join(self, before: str, behind: str) -> bool:
        """Whether some tokens differ if two texts are tokenized apart. If so, the second one can be tokenized by itself."""
        apart = [*self.encode(before), *self._encode_continuation(behind, TextRules(allow_control_tokens=True))]
        if self.encode(before + behind) == apart:
            return False
        line = self.encode("\n")
        return not self._adds_prefix_space or self.encode("\n" + behind)[: len(line)] == line

    # --- plain texts ---

    def _encode_continuation(self, text: str, rules: TextRules) -> list[int]:
        """Ids of a text that follows other text: without the space that SentencePiece puts before a first word."""
        if self._adds_prefix_space:
            before, both = self.encode("\n"), self._encode_text("\n" + text, rules)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode_text(text, rules)

    def _without_bos(self, text: str) -> str:
        """Without the BOS token at its start, where the tokenizer puts one there."""
        return text.removeprefix(self._hf.bos_token) if self._bos else text

    def _without_eos(self, text: str) -> str:
        """Without the EOS tokens at its end, and the white space behind them."""
        while (body := text.rstrip()).endswith(self._hf.eos_token):
            text = body.removesuffix(self._hf.eos_token)
        return text

    def _require_eos(self) -> int:
        if self.eos_token_id is None:
            raise InvalidRequest("the model's tokenizer names no EOS token, which ends a training text", param="model")
        return self.eos_token_id
