"""Inference where something goes wrong: errors before and inside streams, clients that leave or read slowly, silence."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest

from coserve.core import CapacityError, CoserveError
from coserve.server.errors import EngineUnavailable
from coserve.server.inference import sse
from tests.server.fakes import ANSWER, MODEL, Script, send, wait_for
from tests.server.sites import CHAT_PATH, HI, TEXT_PATH, Site, post


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "rejection"), [
    (CapacityError("5000 requests are running or waiting; try again later"), 429, ["capacity"]),
    (EngineUnavailable("the engine died"), 503, []),
    (CoserveError("the engine stopped"), 500, []),
])
def test_errors_before_the_first_token(
    site: Site, error: CoserveError, status: int, rejection: list[str], stream: bool
) -> None:
    site.engine.script = Script(error=error)
    for path, body in ((CHAT_PATH, {"messages": HI}), (TEXT_PATH, {"prompt": ["a", "b"]})):
        reply = send(site.port, path, {**body, "stream": stream})
        assert (reply.status, reply.error["message"]) == (status, str(error))
        assert ("retry-after" in reply.headers) == (status in (429, 503))
    assert {meter.ends[0] for meter in site.metrics.meters} <= {"error", "cancelled"}
    assert set(site.metrics.rejections) == set(rejection)


def test_the_client_sees_the_status_it_retries_on(site: Site) -> None:
    site.engine.script = Script(error=CapacityError("too many"))
    with pytest.raises(openai.RateLimitError):
        site.client.chat.completions.create(model=MODEL, messages=HI, stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_is_down(site: Site, stream: bool) -> None:
    site.engine.ready = False
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": stream})
    assert (reply.status, reply.error["code"], reply.headers["retry-after"]) == (503, "engine_unavailable", "1")
    site.assert_counted("error")
    assert site.metrics.rejections == ["unavailable"]


def test_an_error_inside_a_stream_is_an_event(site: Site) -> None:
    site.engine.script = Script(error=EngineUnavailable("the engine process died"), error_at=4)
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.status == 200
    last = json.loads(reply.events[-1])
    assert last["error"]["code"] == "engine_unavailable"
    assert "[DONE]" not in reply.events
    text = "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in reply.events[:-1])
    assert text
    assert ANSWER.startswith(text)
    with pytest.raises(openai.APIError, match="the engine process died"):
        list(site.client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    site.assert_counted("error", "error")


def test_an_error_of_one_prompt_ends_all(site: Site) -> None:
    site.engine.script = Script(error=EngineUnavailable("the engine process died"), error_at=2, interval_s=0.01)
    reply = send(site.port, TEXT_PATH, {"prompt": ["a", "b", "c"]})
    assert reply.status == 503
    assert len(site.engine.asked) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_output_cancelled_by_the_server_is_an_error(site: Site, stream: bool) -> None:
    site.engine.script = Script(cancel_at=2)
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": stream})
    if stream:
        assert json.loads(reply.events[-1])["error"]["code"] == "engine_unavailable"
    else:
        assert reply.status == 503
    site.assert_counted("error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [
    (CHAT_PATH, {"messages": HI}), (TEXT_PATH, {"prompt": ["a", "b"], "max_tokens": 64}),
])
def test_clients_that_leave_cancel(site: Site, path: str, body: dict[str, Any], stream: bool) -> None:
    site.engine.script = Script(interval_s=0.2)
    connection = post(site.port, path, {**body, "stream": stream})
    wait_for(lambda: bool(site.engine.asked))
    if stream:
        assert connection.recv(100)
    connection.close()
    wait_for(lambda: all(asked.cancelled for asked in site.engine.asked), seconds=3)
    assert len(site.engine.asked) == (2 if path == TEXT_PATH else 1)
    assert not any(asked.finished for asked in site.engine.asked)
    site.assert_counted(*["cancelled"] * len(site.engine.asked))


def test_leaving_an_openai_stream_cancels(site: Site) -> None:
    site.engine.script = Script(interval_s=0.05)
    with site.client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: site.engine.asked[0].cancelled, seconds=3)


def test_a_client_that_reads_slowly_holds_up_nobody(site: Site) -> None:
    site.engine.script = Script(text="word " * 300)
    slow = post(site.port, CHAT_PATH, {"messages": HI, "n": 64, "stream": True, "logprobs": True, "top_logprobs": 20})
    wait_for(lambda: bool(site.engine.asked) and site.engine.asked[0].finished)
    site.engine.script = Script()
    started = time.monotonic()
    assert site.client.chat.completions.create(model=MODEL, messages=HI).choices[0].message.content == ANSWER
    assert time.monotonic() - started < 2
    assert not site.metrics.meters[0].ends, "it was not slow"
    slow.close()
    wait_for(lambda: bool(site.metrics.meters[0].ends))


def test_silence_is_filled_with_comments(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "OPEN_S", 0.05)
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.05)
    site.engine.script = Script(text="ab", interval_s=0.3)
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True})
    assert reply.text.startswith(": ")
    assert reply.text.count(": waiting") >= 4
    assert reply.events[-1] == "[DONE]"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in site.client.chat.completions.create(
        model=MODEL, messages=HI, stream=True))
    assert text == "ab"
    site.engine.script = Script(error=CapacityError("too many"), interval_s=0.3)
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True})
    assert reply.status == 200
    assert json.loads(reply.events[-1])["error"]["code"] == "rate_limit_exceeded"


def test_a_bug_ends_a_stream_with_an_event_that_tells_nothing(site: Site) -> None:
    error: Any = RuntimeError("secret")
    site.engine.script = Script(error=error, error_at=2)
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True})
    assert "secret" not in reply.text
    assert "error" in json.loads(reply.events[-1])
    site.engine.script = Script(error=error)
    reply = send(site.port, CHAT_PATH, {"messages": HI})
    assert reply.status == 500
    assert "secret" not in reply.text


def test_many_at_once(site: Site) -> None:
    async def talk() -> set[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="k", max_retries=0) as client:
            async def one() -> str:
                stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return set(await asyncio.gather(*(one() for _ in range(50))))

    assert asyncio.run(talk()) == {ANSWER}
    site.assert_counted(*["stop"] * 50)
