"""Responses and chunks of the inference routes, in OpenAI's shapes.

Owns: what a finished or growing output looks like. Does not own: where tokens come from (answers.py), framing (sse.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coserve.server.link.messages import LogprobEntry, Tokens
from coserve.tokenizer import ChatTokenizer

_LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for."""
_CUT = "\ufffd"


class TokenTexts:
    """Texts of single tokens, each decoded once."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]


@dataclass(slots=True)
class Output:
    """A choice as far as it is made."""

    pieces: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, tokens: Tokens) -> None:
        """Takes what came."""
        self.pieces.append(tokens.text)
        self.num_tokens += len(tokens.token_ids)
        self.logprobs += tokens.logprobs
        self.finish_reason = tokens.finish_reason

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self.pieces)


@dataclass(slots=True)
class Tally:
    """A request's outputs, n for each of its prompts, and what they took."""

    num_prompt_tokens: Sequence[int]
    n: int
    outputs: list[Output] = field(init=False)
    cached_tokens: dict[int, int] = field(default_factory=dict)
    prompt_logprobs: dict[int, list[LogprobEntry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = [Output() for _ in range(self.n * len(self.num_prompt_tokens))]

    def add(self, prompt: int, tokens: Tokens) -> int:
        """Takes what came for a prompt; gives the choice's number."""
        choice = prompt * self.n + tokens.index
        self.outputs[choice].add(tokens)
        self.cached_tokens[prompt] = max(tokens.cached_tokens, self.cached_tokens.get(prompt, 0))
        if tokens.prompt_logprobs:
            self.prompt_logprobs[prompt] = tokens.prompt_logprobs
        return choice

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and outputs so far."""
        prompt, output = sum(self.num_prompt_tokens), sum(output.num_tokens for output in self.outputs)
        return {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }


# --- chat ---


def chat_response(
    head: Mapping[str, Any], tally: Tally, texts: TokenTexts, *, logprobs: bool, prompt_logprobs: bool
) -> dict[str, Any]:
    """A chat.completion. head: id, created, model, system_fingerprint."""
    choices = [
        {
            "index": index, "message": {"role": "assistant", "content": output.text, "refusal": None},
            "logprobs": chat_logprobs(output.logprobs, texts) if logprobs else None, "finish_reason": output.finish_reason,
        }
        for index, output in enumerate(tally.outputs)
    ]
    body = {**head, "object": "chat.completion", "choices": choices, "usage": tally.usage()}
    if prompt_logprobs:
        body["prompt_logprobs"] = vllm_prompt_logprobs(tally.prompt_logprobs.get(0, []), texts)
    return body


def chat_choices(index: int, tokens: Tokens, texts: TokenTexts, *, first: bool, logprobs: bool) -> Iterator[dict[str, Any]]:
    """Choices of the chunks for tokens that came: the role before the first, nothing where no text came."""
    if first:
        yield {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    if tokens.text or tokens.finish_reason or (logprobs and tokens.logprobs):
        yield {
            "index": index, "delta": {"content": tokens.text} if tokens.text else {},
            "logprobs": chat_logprobs(tokens.logprobs, texts) if logprobs and tokens.logprobs else None,
            "finish_reason": tokens.finish_reason,
        }


def chat_logprobs(entries: Sequence[LogprobEntry], texts: TokenTexts) -> dict[str, Any]:
    """Of a chat choice."""
    content = [
        {**_chat_token(entry.token, entry.logprob, texts),
         "top_logprobs": [_chat_token(token, logprob, texts) for token, logprob in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    """bytes: None for a part of a character, whose text isn't its bytes."""
    text = texts[token]
    return {"token": text, "logprob": _number(logprob), "bytes": None if _CUT in text else list(text.encode())}


# --- completions ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """A prompt that is written before its outputs."""

    ids: Sequence[int]
    text: str


def completion_response(
    head: Mapping[str, Any], tally: Tally, texts: TokenTexts, *, logprobs: bool, prompt_logprobs: bool,
    echoes: Sequence[Echo] | None,
) -> dict[str, Any]:
    """A text_completion. echoes: of the prompts, None if they weren't asked for."""
    choices = []
    for index, output in enumerate(tally.outputs):
        prompt = index // tally.n
        echo = echoes[prompt] if echoes else None
        shown = None
        if logprobs:
            before = None if echo is None else (echo.ids[0], tally.prompt_logprobs.get(prompt, []))
            shown = completion_logprobs(output.logprobs, texts, 0, before)
        choice = {
            "index": index, "text": (echo.text if echo else "") + output.text, "logprobs": shown,
            "finish_reason": output.finish_reason,
        }
        if prompt_logprobs:
            choice["prompt_logprobs"] = vllm_prompt_logprobs(tally.prompt_logprobs.get(prompt, []), texts)
        choices.append(choice)
    return {**head, "object": "text_completion", "choices": choices, "usage": tally.usage()}


def completion_choices(
    index: int, tokens: Tokens, texts: TokenTexts, *, echo: str | None, logprobs: bool, offset: int
) -> Iterator[dict[str, Any]]:
    """Choices of the chunks for tokens that came. echo: the prompt, before the first; offset: characters of text before."""
    if echo:
        yield {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
    if tokens.text or tokens.finish_reason or (logprobs and tokens.logprobs):
        yield {
            "index": index, "text": tokens.text,
            "logprobs": completion_logprobs(tokens.logprobs, texts, offset) if logprobs and tokens.logprobs else None,
            "finish_reason": tokens.finish_reason,
        }


def completion_logprobs(
    entries: Sequence[LogprobEntry], texts: TokenTexts, offset: int, echo: tuple[int, Sequence[LogprobEntry]] | None = None
) -> dict[str, Any]:
    """Of a completion's choice. offset: where its text starts; echo: the prompt's first token, and the rest of the prompt."""
    tokens: list[str] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    if echo is not None:
        tokens, values, tops = [texts[echo[0]]], [None], [None]
        entries = [*echo[1], *entries]
    for entry in entries:
        tokens.append(texts[entry.token])
        values.append(_number(entry.logprob))
        top = {texts[entry.token]: _number(entry.logprob)}
        for token, logprob in entry.top:
            top.setdefault(texts[token], _number(logprob))
        tops.append(top)
    offsets = []
    for token_text in tokens:
        offsets.append(offset)
        offset += len(token_text)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def vllm_prompt_logprobs(entries: Sequence[LogprobEntry], texts: TokenTexts) -> list[dict[str, Any] | None]:
    """In vLLM's shape: for each prompt token those of its place by token id, for the first None. rank: None if unknown."""
    found: list[dict[str, Any] | None] = [None]
    for entry in entries:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1)}
        ranked.setdefault(entry.token, (entry.logprob, 0))
        found.append({
            str(token): {"logprob": _number(logprob), "rank": rank or None, "decoded_token": texts[token]}
            for token, (logprob, rank) in ranked.items()
        })
    return found


def _number(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
