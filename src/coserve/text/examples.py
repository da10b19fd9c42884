"""Texts as training examples: token ids, and the loss weight of each.

    conversation        one example, or several where the template rewrites earlier turns: what assistants write is trained
    prompt, completion  the completion and EOS are trained
    text                all of it is trained

The trained part of an assistant turn is what a model has to produce after `ChatTokenizer.encode_chat` of the messages before
it. Which characters these are is found in chat/trained.py. Here they become tokens, none of which reaches from a prompt into a
reply.

Owns: this, and what a user should know about it (`Notes`). Does not own: file formats of datasets, truncation, prompts
(tokenizer.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coserve.chat.control import OWN_TEXTS, ControlTexts, Settled
from coserve.chat.template import NO_EXTRAS, PROBE, ChatExtras, Message
from coserve.chat.trained import TrainedText, TrainedTurns, check_calls, lacks_thought, loses_thought, texts_in, trained_turns
from coserve.core import InvalidRequest
from coserve.text.tokenizer import PLAIN_RULES, ChatTokenizer, MarkedChat, TextRules

_NEAR = 16
"""Characters on each side of a place that are looked at for a token over it."""
_MOST_JOINS = 4096
"""Places between a prompt and a reply whose tokens are remembered."""


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


class ExampleEncoder:
    """Encodes for one tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self._joins = functools.lru_cache(maxsize=_MOST_JOINS)(self._find_join)

    def encode_training(
        self, messages: Sequence[Message], rules: TextRules = PLAIN_RULES, notes: Notes | None = None,
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
        self, messages: Sequence[Message], rules: TextRules = PLAIN_RULES, notes: Notes | None = None,
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
        self, prompt: str, completion: str, rules: TextRules = PLAIN_RULES, notes: Notes | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64 [n]) and loss weights (float32 [n]) of a prompt (0) and its completion and EOS (1).

        Prompt and completion are tokenized apart. So the prompt's ids are those of a request with this prompt, unless it writes
        control tokens out. If the completion writes out an EOS token at its end, with or without white space behind it, no
        second one is added. Raises InvalidRequest if the tokenizer has no EOS token.
        """
        eos = self._require_eos()
        self._note_texts(notes, rules, self._without_bos(prompt), self._without_eos(completion))
        prompt_ids = self.tokenizer.bos_ids + self.tokenizer.encode_plain(self._without_bos(prompt), rules)
        completion_ids = [*self._encode_continuation(self._without_eos(completion), rules), eos]
        weights = np.ones(len(prompt_ids) + len(completion_ids), dtype=np.float32)
        weights[: len(prompt_ids)] = 0.0
        return np.asarray(prompt_ids + completion_ids, dtype=np.int64), weights

    def encode_text(
        self, text: str, rules: TextRules = PLAIN_RULES, notes: Notes | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64 [n]) and loss weights (float32 [n]) of a text with EOS: all 1.

        BOS and EOS are not doubled where the text already writes them out, the EOS with or without white space behind it.
        Raises InvalidRequest if the tokenizer has no EOS token.
        """
        eos = self._require_eos()
        body = self._without_eos(self._without_bos(text))
        self._note_texts(notes, rules, body)
        ids = [*self.tokenizer.bos_ids, *self.tokenizer.encode_plain(body, rules), eos]
        return np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.float32)

    def _note_texts(self, notes: Notes | None, rules: TextRules, *texts: str, own: bool = True) -> None:
        """own: whether they are an assistant's, or no template has written them."""
        if notes is not None and not rules.allow_control_tokens:
            notes.control_texts += sum(self._controls.holds(text, own=own) for text in texts)

    def _render_training(
        self, messages: Sequence[Message], rules: TextRules, notes: Notes, extras: ChatExtras
    ) -> list[TrainedText]:
        """The texts in which a conversation is trained, contents marked; see `encode_examples`."""
        for message in messages:
            for name in message.keys() - {"role"}:
                own = message["role"] == "assistant" and name in OWN_TEXTS
                self._note_texts(notes, rules, *texts_in(message[name]), own=own)
        self._note_texts(notes, rules, *texts_in(extras.tools), own=False)
        chat = self.tokenizer.marked(messages, extras, rules)
        turns = TrainedTurns(
            render=lambda part, *, add_generation_prompt: self.tokenizer.render_marked(
                chat._replace(messages=part), add_generation_prompt, rules
            ),
            farewell=self._farewell, end_tokens=self.tokenizer.special_tokens, unmark=self._controls.unmark,
        )
        try:
            texts = turns.texts(chat.messages)
        except InvalidRequest:
            if not self.tokenizer.template.has_generation_tags:
                raise
            texts = [self._render_by_generation_tag(chat, rules)]
        else:
            if len(texts) > 1 and self.tokenizer.template.has_generation_tags:
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
        eos = self.tokenizer.eos_token
        with contextlib.suppress(InvalidRequest):
            whole, inside = (self.tokenizer.render_chat(part, add_generation_prompt=False) for part in (turns[:2], turns))
            if eos and whole.endswith(eos) and not inside.startswith(whole) and inside.startswith(whole.removesuffix(eos)):
                return str(eos)
        return ""

    def _render_by_generation_tag(self, chat: MarkedChat, rules: TextRules) -> TrainedText:
        text, spans = self.tokenizer.template.render_generated(chat.messages, now=rules.now, extras=chat.extras)
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
        if behind and self.tokenizer.adds_prefix_space:
            num_before = len(self.tokenizer.encode("\n"))
            both, ranges = self._with_ranges(settled._replace(text="\n" + settled.text), False)
            return both[num_before:], np.maximum(ranges[num_before:] - 1, 0)
        return self.tokenizer.encode_ranges(settled)

    def _find_join(self, before: str, behind: str) -> bool:
        """Whether some tokens differ if two texts are tokenized apart. If so, the second one can be tokenized by itself."""
        apart = [*self.tokenizer.encode(before), *self._encode_continuation(behind, TextRules(allow_control_tokens=True))]
        if self.tokenizer.encode(before + behind) == apart:
            return False
        line = self.tokenizer.encode("\n")
        return not self.tokenizer.adds_prefix_space or self.tokenizer.encode("\n" + behind)[: len(line)] == line

    def _encode_continuation(self, text: str, rules: TextRules) -> list[int]:
        """Ids of a text that follows other text: without the space that SentencePiece puts before a first word."""
        if self.tokenizer.adds_prefix_space:
            before, both = self.tokenizer.encode("\n"), self.tokenizer.encode_plain("\n" + text, rules)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.tokenizer.encode_plain(text, rules)

    def _without_bos(self, text: str) -> str:
        """Without the BOS token at its start, where the tokenizer puts one there."""
        return text.removeprefix(self.tokenizer.bos_token or "") if self.tokenizer.bos_ids else text

    def _without_eos(self, text: str) -> str:
        """Without the EOS tokens at its end, and the white space behind them."""
        eos = self.tokenizer.eos_token
        while eos and (body := text.rstrip()).endswith(eos):
            text = body.removesuffix(eos)
        return text

    def _require_eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise InvalidRequest("the model's tokenizer names no EOS token, which ends a training text", param="model")
        return self.tokenizer.eos_token_id

    @property
    def _controls(self) -> ControlTexts:
        return self.tokenizer.controls
