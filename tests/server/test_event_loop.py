"""Nothing that a request can say keeps the event loop busy for long: all routes on one loop, whose longest stall is measured.

The engine is a fake; files, jobs and their index are real ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from coserve.core import InvalidRequest
from coserve.server.bodies.parse import MAX_ESCAPES, MAX_VALUES
from coserve.server.errors import Unauthorized
from coserve.server.handlers import install_handlers
from coserve.server.middleware import BodyLimits, LastResort
from coserve.server.routes import adapters, files, finetuning, inference, responses, tokens
from coserve.server.services import Services
from coserve.text.tokenizer import ChatTokenizer
from tests.loopstall import StallMeter, least_stall
from tests.server.badfiles import forms
from tests.server.bench_site import BenchSite
from tests.server.fakes import MODEL, FakeEngineClient, FakeMetrics, FakeModels, Script
from tests.server.jobs_bench import Bench
from tests.server.malformed import raw_bodies, wrong_fields
from tests.tiny_tokenizer import build_tiny_tokenizer

LIMIT_S = 0.1
JSON = {"content-type": "application/json"}
CHAT, TEXT, JOBS = "/v1/chat/completions", "/v1/completions", "/v1/fine_tuning/jobs"
RESPONSES = "/v1/responses"
BODY = 16 << 20


class Tenants:
    """The key is the tenant; without one nobody is let in."""

    def identify(self, authorization: str | None) -> str:
        if authorization is None:
            raise Unauthorized("an API key is needed")
        return authorization.removeprefix("Bearer ")


class Models(FakeModels):
    """Loads nothing."""

    async def load(self, tenant: str, name: str, path: str, *, replace: bool) -> None:
        raise InvalidRequest("lora_path: there is no such directory", param="lora_path")

    async def unload(self, tenant: str, name: str) -> None:
        self.find(tenant, name)


class Site(BenchSite):
    """All of it, with a meter on its loop."""

    def __init__(self, model: Path, data_dir: Path) -> None:
        self.meter = StallMeter()
        self._tokenizer = ChatTokenizer.load(model)
        super().__init__(model, data_dir)
        self.loop.call_soon_threadsafe(self.meter.start)
        self.client = httpx.Client(base_url=self.url, timeout=120, headers={"authorization": "Bearer me"})

    def make_app(self, bench: Bench) -> FastAPI:
        self.engine = FakeEngineClient(self._tokenizer)
        fakes: Any = (Tenants(), self.engine, Models(), FakeMetrics())
        app = FastAPI()
        app.state.services = Services(
            config=bench.config, tenants=fakes[0], engine=fakes[1], models=fakes[2], metrics=fakes[3],
            tokenizer=self._tokenizer, store=bench.store, files=bench.files, jobs=bench.jobs, draw_seed=lambda: 1,
        )
        app.add_middleware(BodyLimits, max_bytes=BODY)
        app.add_middleware(LastResort)
        install_handlers(app)
        for module in (inference, responses, tokens, files, finetuning, adapters):
            app.include_router(module.router)
        return app

    def close(self) -> None:
        self.client.close()
        self.loop.call_soon_threadsafe(self.meter.stop)
        super().close()

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=data, headers={**JSON, **headers})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    model = build_tiny_tokenizer(tmp_path_factory.mktemp("model"))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.001)  # both as the server does
    gc.collect()
    gc.freeze()
    found = Site(model, tmp_path_factory.mktemp("data"))
    yield found
    found.close()
    gc.unfreeze()
    sys.setswitchinterval(interval)


def filled(head: bytes, item: bytes, tail: bytes, size: int = BODY - 1000) -> bytes:
    """A body of about `size` bytes that is mostly one item, many times."""
    return head + b",".join([item] * ((size - len(head) - len(tail)) // (len(item) + 1))) + tail


def messages(count: int) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": ""}] * count}).encode()


def items(count: int, **item: Any) -> bytes:
    return encoded(input=[{name: f"{value}{number}" if name == "call_id" else value for name, value in item.items()}
                          for number in range(count)])


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def said(text: bytes) -> bytes:
    """A conversation of one message, its text as JSON writes it."""
    return b'{"messages": [{"role": "user", "content": "' + text + b'"}]}'


HI = b'"messages": [{"role": "user", "content": "Hi"}]'
COSTLY: dict[str, tuple[str, bytes, int]] = {
    "60,000 empty messages": (CHAT, messages(60_000), 400),
    "messages without end": (CHAT, filled(b'{"messages": [', b'{"role":"user","content":""}', b"]}"), 400),
    "empty objects": (CHAT, filled(b'{"messages": [', b"{}", b"]}"), 400),
    "as many messages as are taken": (CHAT, messages(4096), 400),
    "one too many": (CHAT, messages(4097), 400),
    "parts": (CHAT, filled(b'{"messages": [{"role":"user","content":[', b'{"type":"text","text":""}', b"]}]}"), 400),
    "parts in their limit": (
        CHAT, filled(b'{"messages": [{"role":"user","content":[', b'{"type":"text","text":""}', b"]}]}", 100_000), 400,
    ),
    "as many items as are taken": (RESPONSES, items(4096, role="user", content=""), 400),
    "one item too many": (RESPONSES, items(4097, role="user", content=""), 400),
    "items without end": (RESPONSES, filled(b'{"input": [', b'{"role":"user","content":""}', b"]}"), 400),
    "items that are calls": (
        RESPONSES, items(4000, type="function_call", call_id="c", name="f", arguments='{"city": "Oslo"}'), 400,
    ),
    "items that are reasoning": (RESPONSES, items(4096, type="reasoning", summary=[]), 200),
    "parts of items": (
        RESPONSES, filled(b'{"input": [{"role":"user","content":[', b'{"type":"input_text","text":""}', b"]}]}", 100_000), 400,
    ),
    "wrong items of a response": (RESPONSES, filled(b'{"input": [', b"0", b"]}", MAX_VALUES), 400),
    "tools without end": (
        RESPONSES, filled(b'{"input": "Hi", "tools": [', b'{"type":"function","name":"f"}', b"]}", 500_000), 400,
    ),
    "ids": ("/detokenize", filled(b'{"tokens": [', b"1", b"]}"), 400),
    "ids within the values": ("/detokenize", filled(b'{"tokens": [', b"1", b"]}", 2 * MAX_VALUES - 1000), 400),
    "ids that are taken": ("/detokenize", filled(b'{"tokens": [', b"65", b"]}", 3 * 65_000), 200),
    "long ids": ("/detokenize", filled(b'{"tokens": [', b"1" * 18, b"]}"), 400),
    "a prompt of ids": (TEXT, filled(b'{"prompt": [', b"5", b"]}", 2 * MAX_VALUES - 1000), 400),
    "prompts of ids": (TEXT, filled(b'{"prompt": [', b"[5]", b"]}", MAX_VALUES), 400),
    "prompts": (TEXT, encoded(prompt=["Hi"] * 256, max_tokens=1, logit_bias={str(i): 1 for i in range(300)}), 200),
    "many outputs": (TEXT, encoded(prompt=["Hi"] * 2, n=128, max_tokens=1), 200),
    "a long text": (CHAT, said(b"x" * (BODY - 200)), 400),
    "a long text of two bytes": (CHAT, said("ü".encode() * (BODY // 2 - 99)), 400),
    "a long text with commas": (CHAT, said(b"a,b:{[" * (BODY // 6 - 99)), 400),
    "escapes": (CHAT, said(b"\\n" * (BODY // 2 - 99)), 400),
    "escapes that are taken": (CHAT, said(b"\\n" * (MAX_ESCAPES - 9)), 400),
    "a name of megabytes": (CHAT, b'{"' + b"a" * (BODY - 99) + b'": 1}', 400),
    "names": (CHAT, b"{" + HI + b", " + b",".join(b'"k%d":1' % i for i in range(1_200_000)) + b"}", 400),
    "names of an inner object": (CHAT, b'{"messages": [{' + b",".join(b'"k%d":1' % i for i in range(200_000)) + b"}]}", 400),
    "biases": (TEXT, encoded(prompt="Hi", logit_bias={str(i): "x" for i in range(200_000)}), 400),
    "inner lists": (CHAT, filled(b"{" + HI + b', "metadata": [', b"[[]]", b"]}", MAX_VALUES), 400),
    "wrong biases": (TEXT, encoded(prompt="Hi", logit_bias={str(i): "x" for i in range(1000)}), 400),
    "stops": (TEXT, filled(b'{"prompt": "Hi", "stop": [', b'"x"', b"]}"), 400),
    "a long stop": (TEXT, b'{"prompt": "Hi", "stop": "' + b"x" * (BODY - 99) + b'"}', 400),
    "stop ids": (TEXT, filled(b'{"prompt": "Hi", "stop_token_ids": [', b"1", b"]}", 2 * MAX_VALUES - 1000), 400),
    "a long schema": (CHAT, b"{" + HI + b', "guided_json": {"title": "' + b"x" * (BODY - 999) + b'"}}', 400),
    "a long schema as text": (CHAT, b"{" + HI + b', "json_schema": "' + b"[" * (BODY - 999) + b'"}', 400),
    "a schema of many names": (
        CHAT, b"{" + HI + b', "guided_json": {"properties": {' + b",".join(b'"k%d":{}' % i for i in range(4000)) + b"}}}", 400,
    ),
    "a schema of many values": (CHAT, filled(b"{" + HI + b', "guided_json": {"enum": [', b"1", b"]}}", 500_000), 400),
    "a long pattern": (TEXT, b'{"prompt": "Hi", "regex": "' + b"\\\\d" * (BODY // 5) + b'"}', 400),
    "choices": (TEXT, filled(b'{"prompt": "Hi", "guided_choice": [', b'"x"', b"]}", 4 * MAX_VALUES), 400),
    "choices that are taken": (TEXT, encoded(prompt="Hi", max_tokens=1, guided_choice=[f"text {i}" for i in range(9000)]), 200),
    "a long grammar": (TEXT, b'{"prompt": "Hi", "ebnf": "root ::= ' + b"a " * (BODY // 2 - 99) + b'"}', 400),
    "calls": (CHAT, filled(b'{"messages": [{"role":"assistant","content":"x","tool_calls":[', b"[]", b"]}]}", MAX_VALUES), 400),
    "ignored metadata": (CHAT, filled(b"{" + HI + b', "metadata": {"a": [', b'"b"', b"]}}"), 400),
    "depth": (CHAT, b'{"messages": ' + b"[" * (BODY // 2 - 99) + b"]" * (BODY // 2 - 99) + b"}", 400),
    "depth of objects": (CHAT, b'{"a":' * 3_000_000, 400),
    "wrong items": (CHAT, filled(b'{"messages": [', b"0", b"]}", MAX_VALUES), 400),
    "a number": (CHAT, b'{"seed": ' + b"9" * (BODY - 99) + b"}", 400),
    "white space": (CHAT, b" " * (BODY - 99) + b"{}", 400),
    "quotes": (CHAT, b'{"a": ' + b'""' * (BODY // 2 - 99), 400),
    "backslashes": (CHAT, b'{"a": "' + b"\\" * (BODY - 99), 400),
    "job targets": (JOBS, filled(b'{"model": "m", "training_file": "f", "target_modules": [', b'"x"', b"]}"), 400),
    "job integrations": (JOBS, filled(b'{"model": "m", "training_file": "f", "integrations": [', b"1", b"]}"), 400),
    "job integrations in their limit": (
        JOBS, filled(b'{"model": "m", "training_file": "f", "integrations": [', b"1", b"]}", 15_000), 400,
    ),
    "job metadata": (JOBS, encoded(model="m", training_file="f", metadata={str(i): "x" for i in range(4000)}), 400),
    "job text": (JOBS, b'{"training_file": "f", "model": "' + b"x" * (BODY - 99) + b'"}', 400),
    "adapter name": ("/v1/load_lora_adapter", b'{"lora_path": "p", "lora_name": "' + b"x" * (BODY - 99) + b'"}', 400),
    "adapter names": ("/v1/unload_lora_adapter", b"{" + b",".join(b'"k%d":1' % i for i in range(1_200_000)) + b"}", 400),
}


@pytest.mark.parametrize("name", COSTLY)
def test_what_is_costly_does_not_stall_the_loop(site: Site, name: str) -> None:
    path, body, status = COSTLY[name]
    answers: list[httpx.Response] = []
    stall = least_stall(site.meter, lambda: answers.append(site.post(path, body)), LIMIT_S)
    assert {answer.status_code for answer in answers} == {status}, answers[0].text[:500]
    if status != 200:
        assert len(answers[0].content) < 2000 and answers[0].json()["error"]["message"]
    assert stall < LIMIT_S, f"{name}: {1000 * stall:.0f} ms"


@pytest.mark.parametrize("path", [
    CHAT, RESPONSES, TEXT, "/tokenize", "/detokenize", JOBS, "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/files",
])
def test_who_has_no_key_has_nothing_read(site: Site, path: str) -> None:
    """The answer comes though the body never does."""
    host, port = site.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {BODY}\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")


def test_long_log_probabilities(site: Site) -> None:
    """The most that is given, in one response; more is refused before anything runs."""
    site.engine.script = Script(text="Hi")
    ids = [65] * 500
    fits = {"prompt": [ids] * 24, "max_tokens": 1, "prompt_logprobs": 20}
    answers: list[httpx.Response] = []
    stall = least_stall(site.meter, lambda: answers.append(site.post(TEXT, fits)), LIMIT_S)
    assert answers[0].status_code == 200, answers[0].text[:300]
    assert len(answers[0].json()["choices"][23]["prompt_logprobs"]) == 500
    assert stall < LIMIT_S, f"{1000 * stall:.0f} ms"
    before = len(site.engine.asked)
    for body, param in (
        ({**fits, "prompt": [ids] * 26}, "prompt_logprobs"), ({**fits, "n": 2}, "prompt_logprobs"),
        ({"prompt": [ids] * 300, "max_tokens": 1, "echo": True, "logprobs": 1}, "prompt_logprobs"),
        ({"prompt": [[65]] * 128, "n": 32, "max_tokens": 400, "logprobs": 5}, "logprobs"),
    ):
        answer = site.post(TEXT, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert len(site.engine.asked) == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_long_response(site: Site, stream: bool) -> None:
    """The last events of a stream have all log-probabilities, each of them again."""
    site.engine.script = Script(text="word " * 400)
    body = {"input": "Hi", "stream": stream, "include": ["message.output_text.logprobs"], "top_logprobs": 20}
    answers: list[httpx.Response] = []
    stall = least_stall(site.meter, lambda: answers.append(site.post(RESPONSES, body)), LIMIT_S)
    site.engine.script = Script()
    assert answers[0].status_code == 200 and len(answers[0].content) > 50_000, answers[0].text[:300]
    assert stall < LIMIT_S, f"{1000 * stall:.0f} ms"


@pytest.mark.full
def test_the_malformed_suite(site: Site) -> None:
    def play() -> None:
        for wrong in wrong_fields(MODEL):
            with contextlib.suppress(UnicodeEncodeError):
                assert site.post(wrong.path, wrong.body).status_code < 500
        for path in (CHAT, JOBS, "/v1/load_lora_adapter"):
            for body in raw_bodies().values():
                assert site.post(path, body).status_code < 500
        for body in forms().values():
            kind = {"content-type": "multipart/form-data; boundary=b"}
            assert site.client.post("/v1/files", content=body, headers=kind).status_code < 500

    stall = least_stall(site.meter, play, LIMIT_S)
    assert stall < LIMIT_S, f"{1000 * stall:.0f} ms"


def test_a_form_made_to_be_slow(site: Site) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    for filling in (b"\r\n", b"\r\n--", b"\r", b"-"):
        body = head + filling * ((4 << 20) // len(filling)) + b"\r\n--b--\r\n"
        send = partial(site.client.post, "/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=b"})
        stall = least_stall(site.meter, send, LIMIT_S)
        assert stall < LIMIT_S, f"{filling!r}: {1000 * stall:.0f} ms"


def test_the_meter_sees_both_kinds_of_stall() -> None:
    """What runs on the loop, and a thread that keeps Python's lock."""
    async def play(stall: Callable[[], Any]) -> float:
        meter = StallMeter()
        meter.start()
        await asyncio.sleep(0.05)
        meter.reset()
        await asyncio.to_thread(stall) if stall is keep_lock else stall()
        await asyncio.sleep(0.05)
        meter.stop()
        return meter.longest_s

    def keep_lock() -> None:
        json.loads(b"[" + b"0," * 10_000_000 + b"0]")

    assert asyncio.run(play(lambda: time.sleep(0.2))) > 0.15
    assert asyncio.run(play(keep_lock)) > 0.1
