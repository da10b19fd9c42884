"""Responses and chunks of the inference routes, in OpenAI's shapes.

Owns: what a finished or growing output looks like. Does not own: where tokens come from (answers.py), what they are
called and where they stand (walk.py), framing (sse.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coserve.server.inference.deltas import CallDelta, Delta, OutputReader, delta_fields, make_message
from coserve.server.inference.prompts import Prompt
from coserve.server.inference.protocol import ChatRequest, CompletionRequest, GenerationRequest
from coserve.server.inference.thoughts import ReasoningCounter
from coserve.server.inference.toolfields import ToolUse
from coserve.server.inference.walk import TokenWalk, prompt_offsets
from coserve.server.link.messages import LogprobEntry, Tokens
from coserve.text.tokenizer import ChatTokenizer

_LEAST_LOGPROB = -9999.0
"""Written for a log-probability of minus infinity, which JSON can't express."""


@dataclass(slots=True)
class PartialChoice:
    """One choice of the response: what has been generated of it so far."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)


class Tally:
    """A request's outputs so far, n for each of its prompts, and its usage."""

    def __init__(
        self, num_prompt_tokens: Sequence[int], n: int, new_counter: Callable[[], ReasoningCounter] | None = None
    ) -> None:
        """new_counter: makes a counter of an output's thoughts; None: they aren't counted."""
        self.num_prompt_tokens, self.n = num_prompt_tokens, n
        self._counters = [] if new_counter is None else [new_counter() for _ in range(n * len(num_prompt_tokens))]
        self.outputs = [PartialChoice() for _ in range(n * len(num_prompt_tokens))]
        self.cached_tokens: dict[int, int] = {}
        self.prompt_logprobs: dict[int, list[LogprobEntry]] = {}

    def add(self, prompt: int, tokens: Tokens) -> int:
        """Adds new tokens of a prompt's output. Returns the number of the choice."""
        choice = prompt * self.n + tokens.index
        output = self.outputs[choice]
        output.pieces.append(tokens.text)
        output.token_ids += tokens.token_ids
        if self._counters:
            self._counters[choice].push(tokens.token_ids)
        output.logprobs += tokens.logprobs
        output.finish_reason = tokens.finish_reason
        self.cached_tokens[prompt] = max(tokens.cached_tokens, self.cached_tokens.get(prompt, 0))
        if tokens.prompt_logprobs:
            self.prompt_logprobs[prompt] = tokens.prompt_logprobs
        return choice

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and outputs so far."""
        prompt, output = sum(self.num_prompt_tokens), sum(len(output.token_ids) for output in self.outputs)
        usage: dict[str, Any] = {
            "prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens.values())},
        }
        if self._counters:
            usage["completion_tokens_details"] = {"reasoning_tokens": sum(counter.count for counter in self._counters)}
        return usage


# --- chat ---


def chat_response(
    head: Mapping[str, Any], tally: Tally, body: ChatRequest, prompt_ids: Sequence[int], *, tokenizer: ChatTokenizer,
    new_reader: Callable[[], OutputReader], shown_ids: Collection[int] = (),
) -> dict[str, Any]:
    """The whole chat.completion. head: id, created, model, system_fingerprint. new_reader: makes a reader for an output.
    shown_ids: of special tokens that the outputs' texts show."""
    choices = []
    for index, output in enumerate(tally.outputs):
        walk = TokenWalk(tokenizer, context=prompt_ids, by_id=body.by_id, shown_ids=shown_ids)
        reader = new_reader()
        deltas = [*reader.push(output.text), *reader.finish()]
        choice = {
            "index": index, "message": make_message(deltas, old=body.tool_use.old),
            "logprobs": None if body.num_logprobs is None else chat_logprobs(output.logprobs, walk),
            "finish_reason": chat_finish_reason(output.finish_reason, deltas, body.tool_use),
        }
        choices.append({**choice, "token_ids": output.token_ids} if body.return_token_ids else choice)
    response = {**head, "object": "chat.completion", "choices": choices, "usage": tally.usage()}
    if body.prompt_logprobs is not None:
        response["prompt_logprobs"] = vllm_prompt_logprobs(prompt_ids, tally.prompt_logprobs.get(0, []), tokenizer, body)
    if body.return_token_ids:
        response["prompt_token_ids"] = prompt_ids
    return response


def chat_finish_reason(reason: str | None, deltas: Sequence[Delta], use: ToolUse) -> str | None:
    """How OpenAI calls the end of a chat's choice that these deltas are the answer of: by the calls in it, unless the request
    has named the tool that is called."""
    if reason != "stop" or use.named or not any(isinstance(delta, CallDelta) for delta in deltas):
        return reason
    return "function_call" if use.old else "tool_calls"


class ChatChoiceStream:
    """One choice of a chat's stream: turns its tokens into the choices of chunks."""

    def __init__(self, index: int, walk: TokenWalk, body: ChatRequest, reader: OutputReader) -> None:
        self._index, self._walk, self._body, self._reader = index, walk, body, reader
        self._begun = False
        self._called: list[Delta] = []  # the first call, if there is one

    def parts(self, tokens: Tokens) -> Iterator[dict[str, Any]]:
        """The choices to send for new tokens, one per chunk. The first one of all has the role. Tokens that change nothing that
        a client sees give none."""
        if not self._begun:
            self._begun = True
            yield self._choice({"role": "assistant", "content": ""})
        deltas = self._reader.push(tokens.text)
        if tokens.finish_reason:
            deltas += self._reader.finish()
        if not self._called:
            self._called += [delta for delta in deltas if isinstance(delta, CallDelta)][:1]
        body = self._body
        logprobs = chat_logprobs(tokens.logprobs, self._walk) if body.num_logprobs is not None and tokens.logprobs else None
        ids = tokens.token_ids if body.return_token_ids else []
        fields = [delta_fields(delta, old=body.tool_use.old) for delta in deltas]
        if not fields and (tokens.finish_reason or logprobs or ids):
            fields = [{}]
        for number, delta in enumerate(fields):
            last = number == len(fields) - 1
            reason = chat_finish_reason(tokens.finish_reason, self._called, body.tool_use) if last else None
            choice = self._choice(delta, None if number else logprobs, reason)
            yield {**choice, "token_ids": [] if number else ids} if body.return_token_ids else choice

    def _choice(self, delta: Any, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_logprobs(entries: Sequence[LogprobEntry], walk: TokenWalk) -> dict[str, Any]:
    """Log-probabilities of a chat choice. `bytes` is what a token adds to the text: joined, they are the text. A special
    token adds nothing."""
    content = []
    for entry in entries:
        step = walk.step(entry.token)
        names = walk.names(step, entry)
        content.append({
            "token": step.name, "logprob": _number(entry.logprob), "bytes": list(step.added),
            "top_logprobs": [
                {"token": names[token], "logprob": _number(logprob),
                 "bytes": list(step.added if token == entry.token else walk.spelled(token))}
                for token, logprob in entry.top
            ],
        })
    return {"content": content, "refusal": None}


# --- completions ---


def completion_response(
    head: Mapping[str, Any], tally: Tally, body: CompletionRequest, prompts: Sequence[Prompt], *, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """The whole text_completion."""
    choices = []
    for index, output in enumerate(tally.outputs):
        prompt, scores = prompts[index // tally.n], tally.prompt_logprobs.get(index // tally.n, [])
        before = prompt.text if body.echo else ""
        logprobs = None
        if body.num_logprobs is not None:
            walk = TokenWalk(
                tokenizer, context=prompt.ids, offset=len(before), by_id=body.by_id, shown_ids=body.shown_ids(tokenizer)
            )
            logprobs = completion_logprobs(output.logprobs, walk)
            if body.echo:
                columns = prompt_logprobs(prompt, scores, tokenizer, body)
                logprobs = {name: columns[name] + logprobs[name] for name in columns}
        choice = {
            "index": index, "text": before + output.text, "logprobs": logprobs, "finish_reason": output.finish_reason,
        }
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = vllm_prompt_logprobs(prompt.ids, scores, tokenizer, body)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": prompt.ids, "token_ids": output.token_ids}
        choices.append(choice)
    return {**head, "object": "text_completion", "choices": choices, "usage": tally.usage()}


def completion_choices(
    index: int, tokens: Tokens, walk: TokenWalk, body: GenerationRequest, *, echo: str | None
) -> Iterator[dict[str, Any]]:
    """The choices to send for new tokens, one per chunk. echo: a text to send before the first token."""
    if echo:
        yield {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
    logprobs = completion_logprobs(tokens.logprobs, walk) if body.num_logprobs is not None and tokens.logprobs else None
    if tokens.text or tokens.finish_reason or logprobs or (body.return_token_ids and tokens.token_ids):
        choice = {"index": index, "text": tokens.text, "logprobs": logprobs, "finish_reason": tokens.finish_reason}
        yield {**choice, "token_ids": tokens.token_ids} if body.return_token_ids else choice


def completion_logprobs(entries: Sequence[LogprobEntry], walk: TokenWalk) -> dict[str, list[Any]]:
    """Log-probabilities of a completion's choice. In top_logprobs the sampled token comes first."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        step = walk.step(entry.token)
        names = walk.names(step, entry)
        top = {step.name: _number(entry.logprob)}
        for token, logprob in entry.top:
            top.setdefault(names[token], _number(logprob))
        columns["tokens"].append(step.name)
        columns["token_logprobs"].append(_number(entry.logprob))
        columns["top_logprobs"].append(top)
        columns["text_offset"].append(step.offset)
    return columns


def prompt_logprobs(
    prompt: Prompt, scores: Sequence[LogprobEntry], tokenizer: ChatTokenizer, body: GenerationRequest
) -> dict[str, list[Any]]:
    """`completion_logprobs` of an echoed prompt. scores: of its second token and all later ones; the first token has none."""
    first = LogprobEntry(token=prompt.ids[0], logprob=0.0, top=[])
    columns = completion_logprobs([first, *_cut(scores, body.num_logprobs or 0)], TokenWalk(tokenizer, by_id=body.by_id))
    columns["token_logprobs"][0] = columns["top_logprobs"][0] = None
    columns["text_offset"] = prompt_offsets(tokenizer, prompt.ids, prompt.text)
    return columns


def vllm_prompt_logprobs(
    prompt_ids: Sequence[int], scores: Sequence[LogprobEntry], tokenizer: ChatTokenizer, body: GenerationRequest
) -> list[dict[str, Any] | None]:
    """In vLLM's shape: for each token of the prompt a table by token id; None for the first token. An unknown rank is None."""
    found: list[dict[str, Any] | None] = [None]
    walk = TokenWalk(tokenizer, by_id=body.by_id)
    walk.step(prompt_ids[0])
    for entry in _cut(scores, body.prompt_logprobs or 0):
        names = walk.names(walk.step(entry.token), entry)
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, start=1)}
        ranked.setdefault(entry.token, (entry.logprob, 0))
        found.append({
            str(token): {"logprob": _number(logprob), "rank": rank or None, "decoded_token": names[token]}
            for token, (logprob, rank) in ranked.items()
        })
    return found


def _cut(entries: Sequence[LogprobEntry], count: int) -> list[LogprobEntry]:
    """The entries with at most `count` of the likeliest tokens: echo and prompt_logprobs may ask for different numbers."""
    return [LogprobEntry(token=entry.token, logprob=entry.logprob, top=entry.top[:count]) for entry in entries]


def _number(logprob: float) -> float:
    return logprob if logprob > _LEAST_LOGPROB else _LEAST_LOGPROB
