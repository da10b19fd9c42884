"""A request in the engine: from a prompt to final text, with a handle for its caller.

The engine's thread adds tokens; any thread may read the handle. Times are seconds of the engine's clock.

An output may go on behind tokens that another engine has sampled (`OutputStart`). What they do to its text, its grammar and its
count of tokens is done as for sampled ones, and nobody is told.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from coserve.config.settings import SamplingConfig
from coserve.core import CoserveError, Sampled, TokenLogprob
from coserve.engine.adapters import AdapterVersion
from coserve.grammar.matcher import GrammarMatcher
from coserve.runtime.sampler import Draws, draws_of
from coserve.scheduler.requests import RequestState
from coserve.text.stream import TextStream


class Chunk(NamedTuple):
    """What one iteration added to one output. text: new characters that won't change any more; may be empty. finish_reason: in
    an output's last chunk: stop, length, cancelled or error. It is a tuple because one is made for every token."""

    index: int  # type: ignore[assignment]  # which tuples have as a method
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(slots=True)
class Output:
    """One of a request's n outputs, so far. logprobs: one per token, if asked for. token_times: one per token, in seconds."""

    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish_reason: str | None = None


class RequestHandle:
    """A submitted request. outputs: n of them, without what the request came with. prompt_logprobs: of the prompt's tokens from
    the second on, if asked for.

    cached_tokens: how many of the prompt's tokens the prefix cache had. begun_s: when the prompt's computation began. Both are
    set with the first output token. label: the request's name for a Watcher.
    """

    def __init__(
        self, prompt_ids: Sequence[int], sampling: SamplingConfig, arrival_s: float, cancel: Callable[[], None]
    ) -> None:
        self.prompt_ids, self.sampling, self.arrival_s = list(prompt_ids), sampling, arrival_s
        self.outputs = [Output(index) for index in range(sampling.n)]
        self.prompt_logprobs: list[TokenLogprob] = []
        self.cached_tokens = 0
        self.begun_s: float | None = None
        self.label = ""
        self.error: CoserveError | None = None
        self._cancel = cancel
        self._done = threading.Event()
        self._listeners: list[Callable[[Chunk], None]] = []
        self._lock = threading.Lock()

    # The usual case is one output.

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_times(self) -> list[float]:
        return self.outputs[0].token_times

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def finished(self) -> bool:
        return self._done.is_set()

    def cancel(self) -> None:
        """Ends the request. Its outputs so far stay."""
        if not self.finished:
            self._cancel()

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until all outputs have ended; False after `timeout` seconds. The engine needs a thread of its own."""
        return self._done.wait(timeout)

    def listen(self, listener: Callable[[Chunk], None]) -> None:
        """Calls `listener` with the past as one chunk per output, then with each new chunk, from the engine's thread."""
        with self._lock:
            for output in self.outputs:
                if output.token_ids or output.finish_reason:
                    listener(Chunk(index=output.index, text=output.text, token_ids=tuple(output.token_ids),
                                   logprobs=tuple(output.logprobs), finish_reason=output.finish_reason))
            self._listeners.append(listener)

    def chunks(self, drive: Callable[[], object] | None = None) -> Iterator[Chunk]:
        """Yields chunks to the end. drive: called until one comes, if the engine has no thread. Raises the request's error."""
        inbox: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        self.listen(inbox.put)
        left = len(self.outputs)
        while left:
            while drive is not None and inbox.empty():
                drive()
            chunk = inbox.get()
            left -= chunk.finish_reason is not None
            yield chunk
        if self.error is not None:
            raise self.error

    def push(self, chunk: Chunk, now: float) -> None:
        """Adds a chunk to its output. The engine's thread calls this."""
        output, ids = self.outputs[chunk.index], chunk.token_ids
        with self._lock:
            output.token_ids += ids
            output.token_times += [now] * len(ids)
            if chunk.logprobs:
                output.logprobs += chunk.logprobs
            output.text += chunk.text
            output.finish_reason = chunk.finish_reason
            listeners = self._listeners.copy()
        if chunk.finish_reason and all(o.finish_reason for o in self.outputs):
            self._done.set()
        for listener in listeners:
            listener(chunk)


class OutputStart(NamedTuple):
    """Where an output begins: behind the tokens that it came with, mostly none. stream and matcher have seen all of those but
    the last, which may be the one that ended it (`LiveRequest.resume`)."""

    stream: TextStream
    matcher: GrammarMatcher | None = None
    emitted: tuple[int, ...] = ()

    @classmethod
    def after(cls, emitted: Sequence[int], stream: TextStream, matcher: GrammarMatcher | None) -> OutputStart:
        """Shows a new output's stream and matcher what it came with."""
        for token in emitted[:-1]:
            stream.push(token)
            if matcher is not None:
                matcher.accept(token)
        return cls(stream, matcher, tuple(emitted))


@dataclass(slots=True, kw_only=True)
class LiveRequest:
    """One output under way. ending: token ids that end it. slot: its adapter's slot while it runs, else -1. matcher: of its
    grammar, if it has one. num_tokens: of the output so far, with those it came with. siblings: the other outputs of the
    request; they start when this one's prompt is computed, and share the prompt's blocks."""

    handle: RequestHandle
    index: int
    state: RequestState
    sampling: SamplingConfig
    stream: TextStream
    ending: frozenset[int]
    version: AdapterVersion | None
    slot: int
    matcher: GrammarMatcher | None = None
    num_tokens: int = 0
    siblings: list[LiveRequest] = field(default_factory=list)
    seed: int = field(init=False)
    draws: Draws = field(init=False)
    """What is the same for all its tokens."""

    def __post_init__(self) -> None:
        self.seed = self.sampling.seed + self.index
        self.draws = draws_of(self.sampling, self.seed)

    @property
    def failed(self) -> CoserveError | None:
        """Why its grammar lets it go no further."""
        return None if self.matcher is None else self.matcher.error

    def accept(self, tokens: Sequence[Sampled], now: float) -> bool:
        """Adds sampled tokens; True if the output has ended. Tokens after its end are dropped. An output with a grammar also
        ends where nothing can follow, and at any end token that the grammar has let through."""
        if not self.sampling.max_tokens:
            self.end("length", now)
            return True
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        text, reason = "", None
        for token, logprob in tokens:
            ids.append(token)
            if logprob is not None:
                logprobs.append(logprob)
            piece, reason = self._take(token)
            text += piece
            if reason is not None:
                break
        self.handle.push(Chunk(self.index, text, tuple(ids), tuple(logprobs), reason), now)
        return reason is not None

    def resume(self) -> str | None:
        """Goes behind the tokens that the output came with. Returns the reason if it has ended by them."""
        if not self.state.output:
            return None
        self.num_tokens = len(self.state.output) - 1
        return self._take(self.state.output[-1])[1]

    def _take(self, token: int) -> tuple[str, str | None]:
        """The text that becomes final with a token, and the reason if the output ends with it."""
        self.num_tokens += 1
        stream, matcher = self.stream, self.matcher
        if token in self.ending and (self.num_tokens > self.sampling.min_tokens or matcher is not None):
            return stream.finish(token), "stop"
        text = stream.push(token)
        complete = matcher is not None and matcher.accept(token)
        if complete or stream.stopped is not None:
            return text + stream.finish(), "stop"
        if self.num_tokens >= self.sampling.max_tokens:
            return text + stream.finish(), "length"
        return text, None

    def end(self, reason: str, now: float) -> None:
        """Ends the output without another token. reason: cancelled, error, or length for a request of 0 tokens."""
        self.handle.push(Chunk(index=self.index, text=self.stream.finish(), finish_reason=reason), now)
