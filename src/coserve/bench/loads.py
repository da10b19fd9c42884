"""Loads of completions, closed loop or at given times, and a light client that sends them to a server.

The client shares the processors with the server that it measures: one process, sockets of asyncio, one JSON object read per
event and nothing else. A load is sent through a `Send`, so that the same load also runs through an engine in process.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import urlsplit

from coserve.bench.metrics import RequestRecord

TIMEOUT_S = 300.0
"""Longest life of a request; one that takes longer has failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLoad:
    """Prompts (token ids) with greedy outputs of `output_tokens` tokens, whatever the tokens are.

    clients: a closed loop of so many, each of which sends every clients-th prompt, the next one when the last one has ended;
    due_s: instead, when each prompt is sent, in seconds from the start, rising. One of the two is given.
    """

    prompts: tuple[tuple[int, ...], ...]
    output_tokens: int
    clients: int | None = None
    due_s: tuple[float, ...] | None = None


class Reply(NamedTuple):
    """What a request got. token_times: when each output token came, in seconds of the sender's clock; error: why it failed."""

    token_times: tuple[float, ...]
    error: str | None = None


Send = Callable[[Sequence[int], int], Awaitable[Reply]]
"""Sends a prompt (token ids) for so many output tokens, and waits for the last one."""


async def run_load(send: Send, load: PromptLoad, now: Callable[[], float]) -> list[RequestRecord]:
    """Sends a load; the records' times are seconds from its start. now: the clock of the replies' times."""
    origin = now()

    async def request(prompt: Sequence[int], due_s: float) -> RequestRecord:
        reply = await send(prompt, load.output_tokens)
        if reply.error is not None:
            print(f"request failed: {reply.error}", file=sys.stderr, flush=True)
        return RequestRecord(
            due_s=due_s, prompt_tokens=len(prompt), token_times=tuple(at - origin for at in reply.token_times),
            finished=reply.error is None and len(reply.token_times) == load.output_tokens,
        )

    async def client(prompts: Sequence[Sequence[int]]) -> list[RequestRecord]:
        return [await request(prompt, now() - origin) for prompt in prompts]

    async def arrival(prompt: Sequence[int], due_s: float) -> list[RequestRecord]:
        await asyncio.sleep(max(0.0, due_s - (now() - origin)))
        return [await request(prompt, due_s)]

    if load.due_s is None:
        assert load.clients is not None
        tasks = [client(load.prompts[number :: load.clients]) for number in range(load.clients)]
    else:
        tasks = [arrival(prompt, due_s) for prompt, due_s in zip(load.prompts, load.due_s, strict=True)]
    return [record for records in await asyncio.gather(*tasks) for record in records]


class CompletionClient:
    """A `Send` over HTTP: streamed completions with the usage in every chunk, a connection per request.

    url: http://HOST:PORT. The times of replies are time.monotonic's, when a chunk was read.
    """

    def __init__(self, url: str, model: str, timeout_s: float = TIMEOUT_S) -> None:
        self._model, self._timeout_s = model, timeout_s
        address = urlsplit(url)
        assert address.hostname is not None and address.port is not None
        self._host, self._port = address.hostname, address.port

    async def send(self, prompt: Sequence[int], output_tokens: int) -> Reply:
        """One request. A failure is a Reply with an error, never an exception."""
        times: list[float] = []
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(prompt, output_tokens, times)
        except TimeoutError:
            return Reply(tuple(times), f"no end within {self._timeout_s:.0f} s")
        except (OSError, EOFError, ValueError) as error:
            return Reply(tuple(times), f"{type(error).__name__}: {error}")
        return Reply(tuple(times))

    async def _send(self, prompt: Sequence[int], output_tokens: int, times: list[float]) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(self._request(prompt, output_tokens))
            async for event in _events(reader):
                chunk = json.loads(event)
                if "error" in chunk:
                    raise ValueError(f"the server sent {event.decode(errors='replace')}")
                usage = chunk.get("usage")
                if usage:
                    times += [time.monotonic()] * (usage["completion_tokens"] - len(times))
        finally:
            writer.close()

    def _request(self, prompt: Sequence[int], output_tokens: int) -> bytes:
        body = json.dumps({
            "model": self._model, "prompt": list(prompt), "max_tokens": output_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + body


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of a response's server-sent events, until [DONE]. Raises ValueError, EOFError."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.lower().splitlines()
    if lines[0].split()[1] != "200":
        raise ValueError(f"the server answered {head.splitlines()[0]}: {(await reader.read(1000)).decode(errors='replace')}")
    if not any(line.startswith("transfer-encoding:") and "chunked" in line for line in lines):
        raise ValueError("the server's answer is no stream: it is not sent in chunks")
    rest = b""
    while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
        rest += (await reader.readexactly(size + 2))[:-2]
        *events, rest = rest.split(b"\n\n")
        for event in events:
            data = event.removeprefix(b"data: ")
            if data == b"[DONE]":
                return
            if data != event:  # the others are comments
                yield data
    raise EOFError("the stream ended before [DONE]")
