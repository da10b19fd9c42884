"""A running server on fakes, with a client: what tests of the routes share."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import openai

from coserve.server.inference.templates import RequestTemplates
from coserve.text.tokenizer import ChatTokenizer
from tests.server.fakes import (
    ANSWER,
    FakeEngineClient,
    FakeMetrics,
    FakeModels,
    Script,
    make_app,
    make_services,
    serve,
    wait_for,
)

HI: Any = [{"role": "user", "content": "Hi"}]
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Site:
    """A running server, with its fakes and a client. Counters of the fakes begin anew with every test."""

    port: int
    engine: FakeEngineClient
    models: FakeModels
    metrics: FakeMetrics
    tokenizer: ChatTokenizer

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="key-default", max_retries=0, timeout=30)

    @property
    def num_answer_tokens(self) -> int:
        return len(self.tokenizer.encode(ANSWER))

    def assert_counted(self, *reasons: str) -> None:
        """Every meter ended, the first of its ends being these."""
        wait_for(lambda: all(meter.ends for meter in self.metrics.meters))
        assert [meter.ends[0] for meter in self.metrics.meters] == list(reasons)

    def reset(self) -> None:
        """Before a test: the usual script, and nothing noted."""
        self.engine.script, self.engine.ready = Script(), True
        for notes in (self.engine.asked, self.models.prepared, self.metrics.meters, self.metrics.rejections):
            notes.clear()


@contextlib.contextmanager
def open_site(tokenizer: ChatTokenizer, *, templates: RequestTemplates | None = None, **settings: Any) -> Iterator[Site]:
    """Serves. templates: takes those of requests. settings: of the server."""
    services: Any = replace(make_services(tokenizer, **settings), templates=templates)
    with contextlib.closing(services.grammars), serve(make_app(services)) as port:
        yield Site(port, services.engine, services.models, services.metrics, tokenizer)


def post(port: int, path: str, body: Any) -> socket.socket:
    """Sends a request and leaves the response unread."""
    data = json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection
