"""Text to token ids and back: chat template, encoding with loss weights.

Owns: what a conversation looks like in tokens and which of those tokens are trained. Does not own: file formats of
datasets, truncation, text as it comes (detokenizer.py), stop conditions. The tokenizer and its chat template are Hugging
Face's.

The trained part of an assistant turn is what a model has to produce after `encode_chat` of the messages before it:

    <s>user\\nHi<e>\\n<s>assistant\\nHello<e>\\n<s>user\\n ...
    |-- messages[:1] + generation prompt -|         |
    |-- messages[:2] -----------------------------------|
                                          |trained-|       up to the end-of-turn token, not the white space after it
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from coserve.core import InvalidRequest, NotFound
from coserve.tokenbytes import TokenBytes

Message = Mapping[str, Any]
"""A chat message: role, content, possibly name, and for an assistant possibly `weight` (0: not trained)."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
EXACT_KEY = "coserve_exact"
"""In tokenizer_config.json: tokenizer.json is the whole truth. For some families AutoTokenizer replaces parts of it."""
_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "coserve-probe"


def _is_exact(directory: Path) -> bool:
    config = directory / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get(EXACT_KEY))


class ChatTokenizer:
    """A Hugging Face fast tokenizer and its chat template."""

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises InvalidRequest if the tokenizer isn't a fast one: loss weights need character offsets."""
        if not hf_tokenizer.is_fast:
            raise InvalidRequest("the model's tokenizer has no fast version (tokenizer.json)", param="model")
        self._hf: Any = hf_tokenizer
        special = {index: token for index, token in self._hf.added_tokens_decoder.items() if token.special}
        self.special_ids: frozenset[int] = frozenset(special)
        self.marker_ids: frozenset[int] = frozenset(
            index for index, token in self._hf.added_tokens_decoder.items() if token.special or token.content.strip()
        )
        """Added tokens that aren't white space: what templates mark turns with, whether declared special or not."""
        self._special_texts = tuple(token.content for token in special.values() if token.content)
        self.special_tokens = {token.content: index for index, token in special.items() if token.content}
        self.token_bytes = TokenBytes(hf_tokenizer)
        bos = self._hf.bos_token_id
        self._bos = [bos] if bos is not None and self.encode("a", add_special_tokens=True)[:1] == [bos] else []
        alone = self.encode("a")
        self._adds_prefix_space = self.decode(alone + alone) == "a a"

    @classmethod
    def load(cls, directory: Path) -> ChatTokenizer:
        """Reads the tokenizer of a model directory; never the network.

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
            message = f"the tokenizer in {directory} can't be read: {_one_line(error)}"
            raise InvalidRequest(message, param="model") from error
        return cls(hf_tokenizer)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        return len(self._hf)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters that one token can stand for, at most; of tokenizers that drop characters, those that are left."""
        return max(len(token) for token in self._hf.get_vocab())

    def knows(self, token: str) -> bool:
        """Whether a text is one token of the vocabulary, added ones included."""
        return self._hf.backend_tokenizer.token_to_id(token) is not None

    @property
    def eos_token_id(self) -> int | None:
        return self._hf.eos_token_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja source, or None."""
        return self._hf.get_chat_template() if self._hf.chat_template else None

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

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

    def has_token(self, token_id: int) -> bool:
        """Whether the vocabulary has a token of this id."""
        return self._hf.convert_ids_to_tokens(token_id) is not None

    def ends(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """Where in `text` each of its ids ends, in characters, as the tokenizer says; None if these aren't the text's ids."""
        for special in (True, False):
            encoded = self._hf(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
            if encoded["input_ids"] == list(ids):
                return [end for _, end in encoded["offset_mapping"]]
        return None

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """The conversation as the chat template writes it.

        Raises InvalidRequest if there is no template, or the template refuses the conversation.
        """
        if not self.has_chat_template:
            raise InvalidRequest("the model's tokenizer has no chat template; give plain text", param="messages")
        try:
            return self._hf.apply_chat_template(
                _for_template(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is foreign code: whatever it raises is about these messages
            message = f"the model's chat template refuses the conversation: {_one_line(error)}"
            raise InvalidRequest(message, param="messages") from error

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A prompt for the next assistant turn: the conversation with the generation prompt."""
        return self.encode(self.render_chat(messages, add_generation_prompt=True))

    def encode_training(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """A conversation as token ids (int64 [n]) and loss weights (float32 [n]).

        The ids are those of the whole rendered conversation, tokenized once. Weights are 1 for tokens that hold a
        character of an assistant turn's content or of its end-of-turn token, else 0 (see the module's figure); turns
        with `weight: 0` get 0. If the template renders a turn differently inside the conversation than at its end,
        the template's own `{% generation %}` blocks decide instead.
        Raises InvalidRequest if that happens and the template has no such blocks.
        """
        text = self.render_chat(messages, add_generation_prompt=False)
        try:
            spans = self._trained_spans(messages, text)
        except InvalidRequest:
            if not _GENERATION_TAG.search(self.chat_template or ""):
                raise
            return self._encode_by_generation_tag(messages)
        encoded = self._hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.asarray(encoded["input_ids"], dtype=np.int64)
        starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        weights = np.zeros(len(ids), dtype=np.float32)
        for start, end in spans:
            weights[(starts < end) & (ends > start)] = 1.0  # byte-level: a lone space is empty, at its end
        return ids, weights

    def encode_completion(self, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64 [n]) and loss weights (float32 [n]) of a prompt (0) and its completion and EOS (1).

        Prompt and completion are tokenized apart, so the prompt's ids are those of a request with this prompt.
        Raises InvalidRequest if the tokenizer has no EOS token.
        """
        prompt_ids = self._with_bos(self.encode(prompt))
        completion_ids = self._with_eos(self._encode_continuation(completion))
        weights = np.ones(len(prompt_ids) + len(completion_ids), dtype=np.float32)
        weights[: len(prompt_ids)] = 0.0
        return np.asarray(prompt_ids + completion_ids, dtype=np.int64), weights

    def encode_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (int64 [n]) and loss weights (float32 [n]) of a text with EOS: all 1.

        BOS and EOS are not doubled where the text already writes them out. Raises InvalidRequest if the tokenizer has
        no EOS token.
        """
        ids = self._with_eos(self._with_bos(self.encode(text)))
        return np.asarray(ids, dtype=np.int64), np.ones(len(ids), dtype=np.float32)

    def _trained_spans(self, messages: Sequence[Message], text: str) -> list[tuple[int, int]]:
        """Character ranges [start, end) of `text`, the rendered conversation, that are trained."""
        spans = []
        for i in _trained_turns(messages):
            prompt = self._render_prompt(messages, i)
            turn = self.render_chat(messages[: i + 1], add_generation_prompt=False)
            if not text.startswith(turn):
                raise InvalidRequest(
                    f"messages[{i}]: the model's chat template renders this turn differently at the end of a "
                    "conversation than inside it (as templates do that strip earlier thinking), so what to train on is "
                    "undefined; give earlier assistant messages weight 0, or write one example per assistant turn",
                    param="messages",
                )
            if not turn.startswith(prompt) or turn == prompt:
                raise InvalidRequest(
                    f"messages[{i}]: the model's chat template does not start this turn as it starts a reply "
                    f"({prompt[-40:]!r}), so what to train on is undefined; give prompt and completion as strings",
                    param="messages",
                )
            end = len(turn)
            closed = turn.rstrip()
            if len(closed) > len(prompt) and closed.endswith(self._special_texts):
                end = len(closed)
            spans.append((len(prompt), end))
        return spans

    def _render_prompt(self, messages: Sequence[Message], i: int) -> str:
        """What is rendered before the content of assistant turn i."""
        if i > 0:
            return self.render_chat(messages[:i], add_generation_prompt=True)
        # Templates can't render an empty conversation: look where the content of this one goes.
        probe = self.render_chat([{**messages[0], "content": _PROBE}], add_generation_prompt=False)
        return probe.partition(_PROBE)[0]

    def _encode_by_generation_tag(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._hf.apply_chat_template(
            _for_template(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        weights = np.asarray(encoded["assistant_masks"], dtype=np.float32)
        edges = np.flatnonzero(np.diff(weights, prepend=0.0, append=0.0))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        trained = _trained_turns(messages)
        if len(edges) != 2 * len(turns):
            raise InvalidRequest(
                f"the chat template marks {len(edges) // 2} generated passages in a conversation of {len(turns)} "
                "assistant turns, so what to train on is undefined; write one example per assistant turn",
                param="messages",
            )
        for i, start, end in zip(turns, edges[::2], edges[1::2], strict=True):
            weights[start:end] = float(i in trained)
        return np.asarray(encoded["input_ids"], dtype=np.int64), weights

    def _encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows other text: without the space that SentencePiece puts before a first word."""
        if self._adds_prefix_space:
            before, both = self.encode("\n"), self.encode("\n" + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.encode(text)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == self._bos else self._bos + ids

    def _with_eos(self, ids: list[int]) -> list[int]:
        if self.eos_token_id is None:
            raise InvalidRequest("the model's tokenizer names no EOS token, which ends a training text", param="model")
        return ids if ids[-1:] == [self.eos_token_id] else [*ids, self.eos_token_id]


def _trained_turns(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and message.get("weight", 1)]


def _for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages without our own key."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _one_line(error: Exception) -> str:
    """An error's text on one line, at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
