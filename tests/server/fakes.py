"""A server without an engine process: scripted tokens through the real streams, routes and sockets.

    FakeEngineClient   says what its script says, one token at a time, and notes who asked and who cancelled
    serve(app)         uvicorn in a thread, on a free port
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import uvicorn
from fastapi import FastAPI

from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.core import CoserveError, NotFound, Slo
from coserve.server.errors import EngineUnavailable, Unauthorized
from coserve.server.handlers import install_handlers
from coserve.server.link.messages import AdapterRef, LogprobEntry, Ready, Tokens
from coserve.server.link.streams import RequestStream
from coserve.server.middleware import BodyLimits, LastResort
from coserve.server.models import ServedModel
from coserve.server.routes import inference, responses, tokens
from coserve.server.services import Services
from coserve.server.settings import ServerConfig
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import ChatTokenizer

ANSWER = "Hello, grün 🙂 world."
MODEL, ADAPTER = "tiny", "tiny-tuned"
MAX_MODEL_LEN = 512


@dataclass(slots=True)
class Script:
    """What the engine does with a request. text: of every output; interval_s: between tokens; error: raised after `error_at`
    tokens; cancel_at: outputs end as cancelled after so many."""

    text: str = ANSWER
    interval_s: float = 0.0
    error: CoserveError | None = None
    error_at: int = 0
    cancel_at: int | None = None


@dataclass(slots=True)
class Asked:
    """A request as it arrived."""

    prompt_ids: list[int]
    sampling: SamplingConfig
    adapter: str | None
    tenant: str
    tpot_ms: SloMs | None
    ttft_ms: SloMs | None
    arrival_s: float | None
    cancelled: bool = False
    finished: bool = False


class FakeEngineClient:
    """Stands for EngineClient and its supervisor. script: may be changed between requests; generate must be called on the event
    loop."""

    def __init__(self, tokenizer: ChatTokenizer, vocab_size: int = 400) -> None:
        self.tokenizer, self.script, self.asked = tokenizer, Script(), list[Asked]()
        self.ready, self.num_restarts, self.generation, self.supervisor = True, 0, 1, self
        self.info = Ready(
            model=MODEL, directory="", fingerprint="fp-tiny", architecture="llama", num_parameters=1, vocab_size=vocab_size,
            max_model_len=MAX_MODEL_LEN, device="cpu", dtype="float32", threads=1, memory={}, start_s=0.0,
            objectives=Slo(tpot_s=0.1, ttft_s=3.0),
        )
        self._tasks: set[asyncio.Task[None]] = set()

    def generate(self, *, prompt_ids: Sequence[int], sampling: SamplingConfig, adapter: AdapterRef | None = None,
                 tenant: str = "", tpot_ms: SloMs | None = None, ttft_ms: SloMs | None = None,
                 arrival_s: float | None = None) -> RequestStream:
        if not self.ready:
            raise EngineUnavailable("the engine is starting; try again in a few seconds")
        name = None if adapter is None else adapter.name
        asked = Asked(list(prompt_ids), sampling, name, tenant, tpot_ms, ttft_ms, arrival_s)
        self.asked.append(asked)

        def cancel(_: RequestStream) -> None:
            asked.cancelled = True
            task.cancel()

        stream = RequestStream(f"request-{len(self.asked)}", sampling.n, cancel)
        task = asyncio.get_running_loop().create_task(self._answer(asked, stream, self.script))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _answer(self, asked: Asked, stream: RequestStream, script: Script) -> None:
        sampling, ids = asked.sampling, self.tokenizer.encode(script.text)
        count = min(len(ids), sampling.max_tokens)
        reason = "length" if sampling.max_tokens < len(ids) else "stop"
        texts = [
            IncrementalDetokenizer(self.tokenizer, context=asked.prompt_ids, shown_ids=sampling.shown_special_ids)
            for _ in range(sampling.n)
        ]
        if not count:
            prompt = asked.prompt_ids[1:] if sampling.prompt_logprobs is not None else []
            for index in range(sampling.n):
                stream.push(Tokens(
                    id=stream.id, index=index, text="", token_ids=[], time_s=time.monotonic(), finish_reason="length",
                    begun_s=time.monotonic(),
                    prompt_logprobs=[logprob(token, sampling.prompt_logprobs or 0) for token in prompt],
                ))
            asked.finished = True
            return None
        for place in range(count):
            await asyncio.sleep(script.interval_s)
            if script.error is not None and place >= script.error_at:
                return stream.fail(script.error)
            for index in range(sampling.n):
                if index % 16 == 15:
                    await asyncio.sleep(0)  # what an engine says comes over a socket
                last = place + 1 >= count
                text = texts[index].push(ids[place]) + (texts[index].finish() if last else "")
                finish = "cancelled" if script.cancel_at == place else reason if last else None
                prompt = asked.prompt_ids[1:] if last and sampling.prompt_logprobs is not None else []
                stream.push(Tokens(
                    id=stream.id, index=index, text=text, token_ids=[ids[place]], time_s=time.monotonic(),
                    finish_reason=finish, cached_tokens=3 if place == 0 and index == 0 else 0,
                    logprobs=[] if sampling.logprobs is None else [logprob(ids[place], sampling.logprobs)],
                    prompt_logprobs=[logprob(token, sampling.prompt_logprobs or 0) for token in prompt],
                ))
            if script.cancel_at == place:
                return None
        asked.finished = True
        return None


def logprob(token: int, count: int) -> LogprobEntry:
    """A made-up one, the same for a token wherever it comes."""
    return LogprobEntry(token=token, logprob=-token / 1000, top=[(token, -token / 1000), (65, -math.inf)][:count])


class FakeModels:
    """A base with two names and one adapter, which belongs to the tenant 'default'."""

    base_names = (MODEL, "tiny-alias")

    def __init__(self) -> None:
        self.prepared: list[str] = []

    def list(self, tenant: str) -> list[ServedModel]:
        found = [ServedModel(name=name, adapter=None, created=1) for name in self.base_names]
        tuned = ServedModel(name=ADAPTER, adapter=AdapterRef(name=f"default/{ADAPTER}"), created=2)
        return [*found, tuned] if tenant == "default" else found

    def find(self, tenant: str, name: str) -> ServedModel:
        for model in self.list(tenant):
            if model.name == name:
                return model
        raise NotFound(f"model: there is no {name!r}", param="model")

    async def resolve(self, tenant: str, name: str) -> ServedModel:
        return self.find(tenant, name)

    async def prepare(self, tenant: str, name: str) -> ServedModel:
        self.prepared.append(name)
        return self.find(tenant, name)


class FakeTenants:
    """The key 'wrong' is refused, 'key-NAME' is the tenant NAME's, everybody else is 'default'."""

    def identify(self, authorization: str | None) -> str:
        key = (authorization or "").removeprefix("Bearer ")
        if key == "wrong":
            raise Unauthorized("the API key isn't known")
        return key.removeprefix("key-") if key.startswith("key-") else "default"


@dataclass(slots=True)
class FakeMeter:
    """Notes what it is told."""

    model: str
    prompt_tokens: int
    num_tokens: int = 0
    ends: list[str] = field(default_factory=list)

    def tokens(self, message: Tokens) -> None:
        self.num_tokens += len(message.token_ids)

    def end(self, reason: str) -> None:
        self.ends.append(reason)


class FakeMetrics:
    """Meters, and reasons of rejections."""

    def __init__(self) -> None:
        self.meters: list[FakeMeter] = []
        self.rejections: list[str] = []

    def begin(
        self, *, model: str, prompt_tokens: int, sampling: SamplingConfig, arrival_s: float,
        ttft_ms: SloMs | None, tpot_ms: SloMs | None,
    ) -> FakeMeter:
        assert abs(time.monotonic() - arrival_s) < 60
        self.meters.append(FakeMeter(model, prompt_tokens))
        return self.meters[-1]

    def rejected(self, reason: str) -> None:
        self.rejections.append(reason)


def make_services(tokenizer: ChatTokenizer, **settings: Any) -> Services:
    """Services whose engine, models, tenants and metrics are fakes, and which have nothing else. settings: of the server."""
    absent: Any = None
    engine: Any = FakeEngineClient(tokenizer)
    models: Any = FakeModels()
    tenants: Any = FakeTenants()
    metrics: Any = FakeMetrics()
    return Services(
        config=ServerConfig(**settings), engine=engine, tokenizer=tokenizer, store=absent, tenants=tenants, files=absent,
        jobs=absent, models=models, metrics=metrics, draw_seed=partial(Random(0).getrandbits, 32),
    )


def make_app(services: Services) -> FastAPI:
    """The routes of inference and tokens over these services."""
    app = FastAPI()
    app.state.services = services
    app.add_middleware(BodyLimits, max_bytes=services.config.max_body_bytes)
    app.add_middleware(LastResort)
    install_handlers(app)
    app.include_router(inference.router)
    app.include_router(responses.router)
    app.include_router(tokens.router)
    return app


@contextlib.contextmanager
def serve(app: FastAPI) -> Iterator[int]:
    """Serves in a thread; gives the port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Polls; fails after `seconds`."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never happened"
        time.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Reply:
    """A plain HTTP response."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """Of a response or of a stream's last event."""
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found

    @property
    def events(self) -> list[str]:
        """Data of a stream's events, without comments."""
        blocks = self.text.split("\n\n")
        assert blocks.pop() == ""
        return [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]


def send(port: int, path: str, body: Any = None, *, key: str | None = None) -> Reply:
    """GET, or POST of JSON or of bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"content-type": "application/json"} | ({} if key is None else {"authorization": f"Bearer {key}"})
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request("GET" if body is None else "POST", path, data, headers)
        response = connection.getresponse()
        return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
    finally:
        connection.close()
