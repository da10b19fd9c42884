"""Chat as users make it: streamed requests at random times, each timed where it is received.

Owns: prompts, Poisson arrivals, what a request experienced. Does not own: the finetuning job beside it (watch.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coserve.bench.metrics import SloInMs
from coserve.core import percentile
from coserve.demo.client import Connection

if TYPE_CHECKING:
    from openai.types.chat import ChatCompletionChunk

PROMPTS = (
    "Name three uses for a lemon.", "How do I keep bread fresh?", "Explain rain to a child.", "Write two lines about autumn.",
    "What should I pack for a walk in the hills?", "Give me a name for a grey cat.", "How long do I boil an egg?",
    "Why is the sky blue?", "Suggest a quiet hobby.", "What is a good breakfast before a long drive?",
    "Tell me something about whales.", "How can I fall asleep sooner?", "What does a gardener do in March?",
    "Write a short note of thanks to a neighbour.", "How do magnets work?", "Which fruit goes well with cheese?",
    "Describe a market in the morning.", "How do I clean a wooden table?", "What makes a good teacher?",
    "Give me a riddle about the moon.",
)
OUTPUT_TOKENS = (16, 48)
"""Least and most that a request asks for."""
BURST = 8
"""Requests at once by which the machine is measured."""
SHARE = 1 / 3
"""Of what the machine can do: the rate of the demo's chat."""
_MIN_RATE, _MAX_RATE = 0.1, 8.0
"""Requests per second; the client is one process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """What one request experienced. Times are seconds of one clock; error: why it failed, or None."""

    sent_s: float
    first_s: float | None = None
    last_s: float | None = None
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft_ms(self) -> float | None:
        """From sending to the first text."""
        return None if self.first_s is None else (self.first_s - self.sent_s) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of an output token after the first; None for outputs of one token."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1) * 1e3

    def meets(self, objectives: SloInMs) -> bool:
        """A failed request meets none."""
        return self.error is None and objectives.met_by(self.ttft_ms, self.tpot_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of requests that have ended. A percentile or share without requests is None."""

    num_requests: int
    num_failed: int
    attainment: float | None
    tpot_ms_p50: float | None
    tpot_ms_p99: float | None


def summarize(chats: Sequence[Chat], objectives: SloInMs) -> Figures:
    """attainment: the share that met both objectives; failed ones miss."""
    times = [chat.tpot_ms for chat in chats if chat.error is None and chat.tpot_ms is not None]
    return Figures(
        num_requests=len(chats), num_failed=sum(chat.error is not None for chat in chats),
        attainment=sum(chat.meets(objectives) for chat in chats) / len(chats) if chats else None,
        tpot_ms_p50=percentile(times, 0.5) if times else None,
        tpot_ms_p99=percentile(times, 0.99) if times else None,
    )


async def chat_once(connection: Connection, model: str, prompt: str, max_tokens: int, seed: int) -> Chat:
    """One streamed request, timed as its pieces arrive. Never raises for what goes wrong with the request."""
    sent, first, last, tokens = time.perf_counter(), None, None, 0
    try:
        stream = await connection.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": prompt}], max_tokens=max_tokens, temperature=0.8, seed=seed,
            stream=True, stream_options={"include_usage": True},
        )
        async for chunk in stream:
            now = time.perf_counter()
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if _is_output(chunk):
                first, last = first or now, now
        error = None if tokens else "the stream ended early"
    except Exception as problem:  # the client passes on errors of its transport as they are
        error = " ".join(str(problem).split()) or type(problem).__name__
    return Chat(sent_s=sent, first_s=first, last_s=last, num_tokens=tokens, error=error)


def _is_output(chunk: ChatCompletionChunk) -> bool:
    """Whether it brings text, thoughts included, or the end: the first chunk may only name the role, the last one only the
    usage."""
    return any(
        choice.delta.content or getattr(choice.delta, "reasoning_content", None) or choice.finish_reason
        for choice in chunk.choices
    )


async def measure(connection: Connection, model: str) -> tuple[float, list[Chat]]:
    """What the machine can do: (requests per second, requests) of a burst of BURST chats, after one that warms up."""
    await chat_once(connection, model, PROMPTS[0], OUTPUT_TOKENS[0], 0)
    longest = OUTPUT_TOKENS[1]
    began = time.perf_counter()
    chats = await asyncio.gather(
        *(chat_once(connection, model, PROMPTS[i], longest, i) for i in range(1, BURST + 1))
    )
    return BURST / (time.perf_counter() - began), chats


def chat_rate(capacity: float) -> float:
    """Requests per second of the demo's chat, for a machine that can do `capacity`."""
    return min(_MAX_RATE, max(_MIN_RATE, capacity * SHARE))


class Traffic:
    """Poisson arrivals of one rate (requests per second) until it is stopped. Equal seeds send the same requests."""

    def __init__(self, connection: Connection, model: str, rate: float, seed: int) -> None:
        self._connection, self._model, self.rate = connection, model, rate
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self.chats: list[Chat] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    async def run(self) -> None:
        """Sends requests until it is cancelled; those that were sent go on."""
        due, number = time.perf_counter(), 0
        while True:
            due += self._random.expovariate(self.rate)
            await asyncio.sleep(due - time.perf_counter())
            prompt, most = self._random.choice(PROMPTS), self._random.randint(*OUTPUT_TOKENS)
            task = asyncio.create_task(self._send(prompt, most, number))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
            number += 1

    async def _send(self, prompt: str, max_tokens: int, seed: int) -> None:
        self.chats.append(await chat_once(self._connection, self._model, prompt, max_tokens, seed))

    async def drain(self) -> None:
        """Waits for requests that were sent."""
        if self._running:
            await asyncio.wait(list(self._running))

    def cancel(self) -> None:
        """Breaks off requests that were sent."""
        for task in self._running:
            task.cancel()
