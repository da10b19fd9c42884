"""Loads of the serving benchmark: closed loops, arrivals, the client against a fake server, an engine in process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from serving_engine import run_in_process

from coserve.bench.loads import CompletionClient, PromptLoad, Reply, run_load
from tests.tiny_engine import build_model, make_engine, prompt

PROMPTS = tuple((number, 1, 2) for number in range(6))
Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


class FakeSystem:
    """Answers after a while, and notes who was there at once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.running, self.most = 0, 0
        self.sent: list[tuple[int, ...]] = []

    async def send(self, prompt: Sequence[int], output_tokens: int) -> Reply:
        self.running += 1
        self.most = max(self.most, self.running)
        self.sent.append(tuple(prompt))
        await asyncio.sleep(self.seconds)
        self.running -= 1
        if prompt[0] == 5:
            return Reply((), "refused")
        return Reply((time.monotonic(),) * output_tokens)


def test_a_closed_loop_has_as_many_requests_as_clients(capsys: pytest.CaptureFixture[str]) -> None:
    system = FakeSystem(0.01)
    load = PromptLoad(prompts=PROMPTS, output_tokens=3, clients=2)
    records = asyncio.run(run_load(system.send, load, time.monotonic))
    assert system.most == 2 and sorted(system.sent) == sorted(PROMPTS)
    assert [record.finished for record in records] == [True] * 5 + [False], "the second client's last one was refused"
    for earlier, later in itertools.pairwise(records[:3]):
        assert earlier.token_times[-1] <= later.due_s, "a client sends the next one when the last one has ended"
    assert records[0].due_s < records[0].token_times[0] and len(records[0].token_times) == 3 and records[0].prompt_tokens == 3
    assert "request failed: refused" in capsys.readouterr().err


def test_arrivals_are_sent_when_due_whatever_is_running() -> None:
    system = FakeSystem(0.1)
    load = PromptLoad(prompts=PROMPTS[:4], output_tokens=1, due_s=(0.0, 0.001, 0.002, 0.3))
    records = asyncio.run(run_load(system.send, load, time.monotonic))
    assert system.most == 3 and [record.due_s for record in records] == [0.0, 0.001, 0.002, 0.3]
    assert records[3].token_times[0] >= 0.39 and all(record.ttft_ms >= 99 for record in records if record.ttft_ms)


def test_an_output_that_is_too_short_is_no_success() -> None:
    async def send(prompt: Sequence[int], output_tokens: int) -> Reply:
        return Reply((time.monotonic(),))

    (record,) = asyncio.run(run_load(send, PromptLoad(prompts=PROMPTS[:1], output_tokens=2, clients=1), time.monotonic))
    assert not record.finished


# --- the client against a fake server ---


@contextlib.asynccontextmanager
async def fake_server(answer: Answer, timeout_s: float) -> AsyncIterator[CompletionClient]:
    """A client of a server that answers each request by a function of its body."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("POST /v1/completions HTTP/1.1\r\n") and f"Host: 127.0.0.1:{port}\r\n" in head
        size = next(int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length"))
        await answer(json.loads(await reader.readexactly(size)), writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield CompletionClient(f"http://127.0.0.1:{port}", "m", timeout_s)


async def write_chunks(writer: asyncio.StreamWriter, *chunks: bytes, end: bool = True) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for chunk in chunks:
        writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)
    writer.write(b"0\r\n\r\n" if end else b"")


def event(tokens: int | None = None, **fields: Any) -> bytes:
    usage = None if tokens is None else {"completion_tokens": tokens}
    return b"data: " + json.dumps({"choices": [{"text": "a\n\nb"}], "usage": usage, **fields}).encode() + b"\n\n"


def ask(answer: Answer, timeout_s: float = 20.0) -> Reply:
    async def run() -> Reply:
        async with fake_server(answer, timeout_s) as client:
            return await client.send([5, 6], 4)

    return asyncio.run(run())


def test_the_client_times_tokens_by_usage() -> None:
    asked: list[dict[str, Any]] = []

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        asked.append(body)
        split = event(3)
        await write_chunks(
            writer, event(1), b": waiting\n\n", split[:9], split[9:] + event(), event(4), event(4, choices=[]),
            b"data: [DONE]\n\n",
        )

    reply = ask(answer)
    assert reply.error is None and len(reply.token_times) == 4
    first, second, third, fourth = reply.token_times
    assert first < second == third < fourth
    assert asked[0] == {
        "model": "m", "prompt": [5, 6], "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


async def refuse(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nfull")


async def answer_at_once(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")


async def fail_midway(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await write_chunks(writer, event(1), b'data: {"error": {"message": "gone"}}\n\n')


async def end_early(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await write_chunks(writer, event(1))


async def hang_up(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await write_chunks(writer, event(1), end=False)


async def hang(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    await write_chunks(writer, event(1), end=False)
    await asyncio.sleep(0.6)


@pytest.mark.parametrize(("answer", "said", "tokens"), [
    (refuse, "429 Too Many Requests: full", 0), (answer_at_once, "not sent in chunks", 0), (fail_midway, "gone", 1),
    (end_early, "ended before", 1), (hang_up, "IncompleteReadError", 1), (hang, "no end within", 1),
])
def test_a_failure_is_an_error_with_the_tokens_so_far(answer: Answer, said: str, tokens: int) -> None:
    reply = ask(answer, 0.5 if answer is hang else 20.0)
    assert reply.error is not None and said in reply.error
    assert len(reply.token_times) == tokens


def test_nobody_listens() -> None:
    reply = asyncio.run(CompletionClient("http://127.0.0.1:9", "m").send([1], 1))
    assert reply.token_times == () and "Refused" in (reply.error or "")


def test_an_engine_in_process_runs_the_same_loads(tmp_path: Path) -> None:
    engine = make_engine(build_model(tmp_path / "model"))
    prompts = tuple(tuple(prompt(20, seed)) for seed in range(5))
    with contextlib.closing(engine):
        closed = asyncio.run(run_in_process(engine, PromptLoad(prompts=prompts, output_tokens=6, clients=2)))
        due = asyncio.run(run_in_process(engine, PromptLoad(prompts=prompts[:2], output_tokens=6, due_s=(0.0, 0.05))))
        refused = asyncio.run(run_in_process(engine, PromptLoad(prompts=((10**6,),), output_tokens=6, clients=1)))
    assert all(record.finished and len(record.token_times) == 6 for record in closed + due)
    assert closed[0].token_times[-1] <= closed[1].due_s and due[1].token_times[0] >= 0.05
    assert not refused[0].finished


def test_an_engine_that_stops_ends_its_load(tmp_path: Path) -> None:
    engine = make_engine(build_model(tmp_path / "model"))

    class Broken:
        def run(self, *_: object) -> None:
            raise ZeroDivisionError

    engine.runner = Broken()  # type: ignore[assignment]
    with contextlib.closing(engine), pytest.raises(ExceptionGroup) as failure:
        asyncio.run(run_in_process(engine, PromptLoad(prompts=PROMPTS[:1], output_tokens=6, clients=1)))
    assert failure.value.subgroup(ZeroDivisionError) is not None
