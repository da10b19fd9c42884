"""What a request says about thinking, and the thoughts in its outputs.

    chat_template_kwargs, reasoning_effort, thinking     ->  variables of the chat template
    include_reasoning, separate_reasoning, stream_reasoning, --reasoning-parser  ->  what of an output is shown, and where

Owns: these fields, thoughts as deltas, how many tokens they have. Does not own: which of a text is a thought
(coserve.chat.reasoning), rendering, the messages' own thoughts (prompts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from coserve.chat.reasoning import (
    END,
    START,
    STYLES,
    THOUGHT_MARKERS,
    Begin,
    ThoughtSplitter,
    ThoughtStyle,
    find_begin,
    style_of,
)
from coserve.chat.template import ChatTemplate
from coserve.chat.variables import SWITCHES, check_variables
from coserve.config.values import AUTO
from coserve.core import InvalidRequest
from coserve.grammar import after
from coserve.server.inference.deltas import Delta, OutputReader, ReasoningDelta
from coserve.text.detokenizer import IncrementalDetokenizer, whole_text
from coserve.text.tokenizer import ChatTokenizer

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
_TAIL_TOKENS = 64
"""Tokens of a prompt in which its last tag is looked for: it is followed by white space at most."""


class ThinkingFields(Protocol):
    """The fields of a chat request that say something about thinking, each None where it isn't given."""

    chat_template_kwargs: dict[str, Any] | None
    reasoning_effort: Effort | None
    include_reasoning: bool | None
    separate_reasoning: bool | None
    stream_reasoning: bool | None

    @property
    def asked_thinking(self) -> bool | None:
        """Whether `thinking` turns it on or off."""


def find_style(parser: str, tokenizer: ChatTokenizer) -> ThoughtStyle | None:
    """How a model thinks; None: its outputs are read as answers. parser: one of PARSERS."""
    if parser == AUTO:
        return style_of(tokenizer.template.written) if tokenizer.has_chat_template else None
    return STYLES.get(parser)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thoughts:
    """What one request gets. style: how the model thinks, None: its outputs are read as answers. special: the special tokens
    among the tags, {text: id}. variables: for the chat template. expected: whether an output may have thoughts. separate, show,
    stream: whether they are told apart, are shown, and come piece by piece."""

    style: ThoughtStyle | None = None
    special: Mapping[str, int] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)
    expected: bool = False
    separate: bool = True
    show: bool = True
    stream: bool = True

    @property
    def marker_ids(self) -> frozenset[int]:
        """Special tokens that the output's text must show for thoughts to be told apart."""
        return frozenset() if self.style is None else frozenset(self.special.values())

    def begin(self, tokenizer: ChatTokenizer, prompt_ids: Sequence[int], continued: str | None) -> Begin:
        """What an output begins with. continued: the last message's content, if the output continues it."""
        if self.style is None:
            return Begin.ANSWER
        return find_begin(whole_text(tokenizer, prompt_ids[-_TAIL_TOKENS:]), self.style, continued)

    def reader(self, begin: Begin, new_reader: Callable[[], OutputReader]) -> Callable[[], OutputReader]:
        """Makes readers of outputs with thoughts. new_reader: makes those of the answers behind them."""
        if self.style is None or not self.separate:
            return new_reader
        return lambda: ReasoningReader(ThoughtSplitter(begin), new_reader(), show=self.show, stream=self.stream)

    def compose(self, begin: Begin) -> Callable[[str | None], str | None] | None:
        """Makes the grammar of an output from that of its answer, which holds behind the thoughts, and from the
        beginning where there may be none and are none; None: they are the same."""
        if not self.expected or begin is Begin.ANSWER:
            return None
        marker = self.special.get(END, END)
        opening = self.special.get(START, START) if begin is Begin.MAYBE else None
        return lambda grammar: None if grammar is None else after(marker, grammar, begin=opening)


def read_thoughts(body: ThinkingFields, tokenizer: ChatTokenizer, style: ThoughtStyle | None) -> Thoughts:
    """Checks a request's fields. style: how the model thinks. Raises InvalidRequest."""
    variables, asked = read_variables(body.chat_template_kwargs, tokenizer, style), _asked(body)
    template = _template(tokenizer)
    if asked is not None:
        field, wanted = asked
        known = [name for name in SWITCHES if name in template.reads]
        graded = "reasoning_effort" in template.reads and body.reasoning_effort is not None
        if not known and not graded and wanted is not (style is not None):
            raise InvalidRequest(
                f"{field}: this model may think, and its chat template has no variable that turns it off; leave it out" if style
                else f"{field}: this model doesn't think, as far as its chat template says; leave it out", param=field,
            )
        variables = {**dict.fromkeys(known, wanted), **variables}
        if graded:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
    off = any(variables.get(name) is False for name in SWITCHES)
    return Thoughts(
        style=style, special={tag: tokenizer.special_tokens[tag] for tag in THOUGHT_MARKERS if tag in tokenizer.special_tokens},
        variables=variables, expected=style is not None and not off, separate=body.separate_reasoning is not False,
        show=body.include_reasoning is not False, stream=body.stream_reasoning is not False,
    )


def read_variables(given: Mapping[str, Any] | None, tokenizer: ChatTokenizer, style: ThoughtStyle | None) -> dict[str, Any]:
    """The variables of chat_template_kwargs that the template reads. style: how the model thinks. Raises InvalidRequest for all
    others, but for a switch that asks for what happens anyway."""
    return check_variables(given, _template(tokenizer), style)


def _template(tokenizer: ChatTokenizer) -> ChatTemplate:
    """The tokenizer's, or an empty one."""
    return tokenizer.template if tokenizer.has_chat_template else ChatTemplate("", {})


def _asked(body: ThinkingFields) -> tuple[str, bool] | None:
    """Whether the request asks for thoughts or for none, and the field that says so."""
    effort = None if body.reasoning_effort is None else body.reasoning_effort != "none"
    if None not in (effort, body.asked_thinking) and effort is not body.asked_thinking:
        raise InvalidRequest("thinking: says something else than reasoning_effort; leave one of them out", param="thinking")
    if effort is not None:
        return "reasoning_effort", effort
    return None if body.asked_thinking is None else ("thinking", body.asked_thinking)


class ReasoningReader:
    """Reads an output with thoughts. inner: reads the answer behind them. show: whether thoughts are shown. stream: whether
    they come piece by piece; if not, they come as a whole, before the answer."""

    def __init__(self, splitter: ThoughtSplitter, inner: OutputReader, *, show: bool = True, stream: bool = True) -> None:
        self._splitter, self._inner, self._show, self._stream = splitter, inner, show, stream
        self._kept: list[str] = []

    def push(self, text: str) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in self._splitter.push(text):
            deltas += self._thought(piece.text) if piece.is_thought else [*self._release(), *self._inner.push(piece.text)]
        return deltas

    def finish(self) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in self._splitter.finish():
            deltas += self._thought(piece.text) if piece.is_thought else self._inner.push(piece.text)
        return [*deltas, *self._release(), *self._inner.finish()]

    def _thought(self, text: str) -> list[Delta]:
        if self._show and self._stream:
            return [ReasoningDelta(text)]
        self._kept += [text] if self._show else []
        return []

    def _release(self) -> list[Delta]:
        """The thoughts that were kept until their end."""
        kept, self._kept = "".join(self._kept), []
        return [ReasoningDelta(kept)] if kept else []


class ReasoningCounter:
    """Counts an output's tokens up to the end of its thoughts, tags included. prompt_ids: what comes before it. shown_ids: of
    special tokens that its text shows."""

    def __init__(
        self, tokenizer: ChatTokenizer, prompt_ids: Sequence[int], begin: Begin, shown_ids: Collection[int] = ()
    ) -> None:
        self._detokenizer = IncrementalDetokenizer(tokenizer, context=prompt_ids, shown_ids=shown_ids)
        self._splitter = ThoughtSplitter(begin)
        self._seen = 0
        self.count = 0
        """Tokens of thoughts so far."""

    def push(self, token_ids: Sequence[int]) -> None:
        """Goes on by these ids."""
        for token_id in token_ids:
            self._seen += 1
            was_thinking = self._splitter.is_thinking
            self._splitter.push(self._detokenizer.push(token_id))
            if was_thinking or self._splitter.is_thinking:
                self.count = self._seen
