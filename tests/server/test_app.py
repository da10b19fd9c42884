"""What surrounds every route: limits, request ids, OpenAI's error bodies; and that a whole server starts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fastapi import FastAPI, Query, Request
from pydantic import BaseModel
from starlette.responses import StreamingResponse
from typer.testing import CliRunner

from coserve.cli.main import app as cli
from coserve.cli.vllmflags import drop_flags
from coserve.core import CapacityError, ConfigError, NotFound
from coserve.server.errors import EngineUnavailable, Unauthorized
from coserve.server.handlers import install_handlers
from coserve.server.listen import bind
from coserve.server.middleware import BodyLimits, LastResort
from coserve.server.settings import read_settings
from tests.server.conftest import RunningServer

LIMIT = 1000
JSON = {"content-type": "application/json"}


class Message(BaseModel):
    role: str
    content: str


class Body(BaseModel):
    messages: list[Message]


def make_app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(BodyLimits, max_bytes=LIMIT)
    app.add_middleware(LastResort)
    install_handlers(app)

    @app.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @app.post("/v1/files")
    async def upload(request: Request) -> int:
        return len(await request.body())

    @app.post("/chat")
    async def chat(body: Body, limit: Annotated[int, Query()] = 1) -> int:
        return limit

    @app.get("/fail/{kind}")
    async def fail(kind: str) -> None:
        raise {
            "capacity": CapacityError("full"), "down": EngineUnavailable("down"), "key": Unauthorized("no key"),
            "model": NotFound("no model x", param="model"), "bug": ZeroDivisionError("secret"),
        }[kind]

    @app.get("/breaks")
    async def breaks() -> StreamingResponse:
        async def stream() -> AsyncIterator[bytes]:
            yield b"one"
            raise ZeroDivisionError("secret")

        return StreamingResponse(stream())

    return app


def ask(method: str, path: str, **options: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app()), base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


async def pieces(count: int, size: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


def test_bodies_are_limited_as_they_come() -> None:
    assert ask("POST", "/echo", content=b"x" * LIMIT).json() == LIMIT
    assert ask("POST", "/echo", content=pieces(10, 100)).json() == LIMIT
    for content in (b"x" * (LIMIT + 1), pieces(11, 100)):
        response = ask("POST", "/echo", content=content)
        assert (response.status_code, error_of(response)["code"]) == (413, "too_large")
        assert response.headers["connection"] == "close"
    assert ask("POST", "/echo", content=b"", headers={"content-length": "9" * 30}).status_code == 413
    response = ask("POST", "/chat", content=pieces(11, 100), headers={"content-type": "application/json"})
    assert response.status_code == 413, "where the framework reads the body too"


def test_uploads_have_their_own_limit() -> None:
    assert ask("POST", "/v1/files", content=b"x" * 5000).json() == 5000


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "zstd"])
def test_compressed_bodies_are_refused_unread(encoding: str) -> None:
    for path in ("/echo", "/v1/files"):
        response = ask("POST", path, content=b"x", headers={"content-encoding": encoding})
        assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")
    assert ask("POST", "/echo", content=b"x", headers={"content-encoding": "Identity"}).status_code == 200


def test_requests_have_names() -> None:
    assert ask("GET", "/fail/down", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    made = [ask("POST", "/echo", headers=headers).headers["x-request-id"] for headers in ({}, {"x-request-id": "a b"})]
    assert len(set(made)) == 2 and all(len(name) == 32 for name in made)


@pytest.mark.parametrize(("path", "status", "type_", "code", "param"), [
    ("/fail/capacity", 429, "rate_limit_error", "rate_limit_exceeded", None),
    ("/fail/down", 503, "server_error", "engine_unavailable", None),
    ("/fail/key", 401, "invalid_request_error", "invalid_api_key", None),
    ("/fail/model", 404, "invalid_request_error", "model_not_found", "model"),
    ("/nothing", 404, "invalid_request_error", "not_found", None),
])
def test_errors_have_openais_body(path: str, status: int, type_: str, code: str, param: str | None) -> None:
    response = ask("GET", path)
    error = error_of(response)
    assert (response.status_code, error["type"], error["code"], error["param"]) == (status, type_, code, param)
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_other_methods_are_told_which_there_are() -> None:
    response = ask("DELETE", "/echo")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert error_of(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize("query", ["limit=x", "limit=x&query=1", "query=1&limit="])
def test_a_wrong_query_parameter_is_a_400_that_names_it(query: str) -> None:
    response = ask("POST", f"/chat?{query}")
    assert (response.status_code, error_of(response)["param"]) == (400, "limit")
    assert error_of(response)["message"].startswith("limit: Input should be a valid integer")


def test_an_unexpected_error_is_logged_and_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        response = ask("GET", "/fail/bug", headers={"x-request-id": "r-1"})
    assert response.status_code == 500 and error_of(response)["type"] == "server_error"
    assert "r-1" in response.text and "secret" not in response.text and "ZeroDivision" not in response.text
    assert "r-1" in caplog.text and "ZeroDivisionError: secret" in caplog.text


def test_a_stream_that_breaks_is_logged_and_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(AssertionError):  # httpx insists on a last message
        ask("GET", "/breaks")
    assert "ZeroDivisionError: secret" in caplog.text


def test_a_port_is_taken_once() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen at 127.0.0.1:{port}"):
            bind("127.0.0.1", port).listen()
    with pytest.raises(ConfigError, match="port"):
        bind("no.such.host.invalid", 80)


def test_keys_are_made_shown_once_and_revoked(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["keys", *arguments, "--data-dir", str(tmp_path / "data")], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    key = run("add", "alice").strip()
    assert key.startswith("sk-") and len(key) > 30
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700
    listed = run("list")
    assert "alice" in listed and key not in listed
    (identifier,) = [word for word in listed.split() if word.startswith("key-")]
    assert key.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "data").iterdir())
    assert identifier in run("revoke", identifier)
    with pytest.raises(NotFound):
        run("revoke", "key-none")


@pytest.mark.parametrize(("options", "message"), [
    (("--data-dir", "/proc/coserve"), "data_dir: /proc/coserve can't be made"),
    (("--slo-tpot-ms", "-1"), '^slo_tpot_ms: must be a positive number of milliseconds or "none" .*, got -1'),
    (("--slo-ttft-ms", "soon"), "^slo_ttft_ms: must be a positive number of milliseconds .*, got 'soon'"),
    (("--kv-cache-memory-bytes", "0"), "^kv_cache_memory_bytes: must be positive, got 0"),
    (("--max-num-queued-reqs", "-40"), "^max_num_queued_reqs: must be at least 1, got -40"),
    (("--max-loras", "0"), "^max_loras: must be at least 1, got 0"),
    (("--shutdown-timeout", "inf"), "^shutdown_timeout: must be finite, got inf"),
    (("--lora-modules", "x"), "lora_modules: write it as NAME=DIRECTORY"),
    (("--lora-modules", '{"name": "a"}'), "lora_modules: write it as NAME=DIRECTORY"),
    (("--lora-modules", '{"name": "a", "path": '), "lora_modules: .* isn't JSON"),
    (("--lora-modules", '{"name": "a", "path": ["b"]}'), "lora_modules: must be names and directories, got 'a' and"),
    (("--lora-modules", '{"name": "a", "path": "b", "base_model_name": "c"}'), "lora_modules: 'base_model_name' has no"),
    (("--lora-modules", "a=b", "--lora-modules", "a=c"), "lora_modules: the name 'a' is given twice"),
    (("--enable-lora", "--no-enable-prefix-caching"), "--no-enable-prefix-caching: the prefix .* on; leave it out"),
    (("-pp", "2"), "--pipeline-parallel-size: a model is shared by --tensor-parallel-size only; leave it out or give 1"),
    (("-tp", "0"), "^tensor_parallel_size: must be at least 1, got 0"),
    (("--block_size=32",), "--block-size: .*; leave it out or give 16"),
    (("--chat-template", "nowhere.jinja"), "^chat_template: 'nowhere.jinja' is no file that can be read"),
    (("--chat-template", "{% if"), "^chat_template: isn't a Jinja template"),
    (("--reasoning-parser", "gpt"), "^reasoning_parser: must be one of auto, none, qwen3, deepseek_r1, got 'gpt'"),
    (("--tokenizer",), "--tokenizer: the model's own"),
    (("--config", "none.toml"), "config: none.toml can't be read"),
])
def test_settings_are_refused_before_anything_starts(options: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, ["serve", "--port", "0", *options], catch_exceptions=False)


@pytest.mark.parametrize(("line", "message"), [
    ("allowed_hosts = 5", "^allowed_hosts: must be a text or a list of texts, got 5"),
    ("api_key = true", "^api_key: must be a text or a list of texts, got True"),
    ("served_model_name = {a = 1}", "^served_model_name: must be a text or a list of texts, got {'a': 1}"),
    ("allowed_origins = [1]", "^allowed_origins: must be texts, got \\[1\\]"),
    ("data_dir = 5", "^data_dir: must be the path of a directory, got 5"),
    ("port = 80.0", "^port: must be of type int, got 80.0"),
])
def test_values_of_a_wrong_type_in_the_settings_file_are_refused_by_name(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_settings(path, {})


def test_adapters_are_given_in_three_forms() -> None:
    expected = (("a", "x/a"), ("b", "y=z"))
    for given in (["a=x/a", "b=y=z"], ["a=x/a", '{"name": "b", "path": "y=z"}'], {"a": "x/a", "b": "y=z"}):
        assert read_settings(None, {"lora_modules": given}).lora_modules == expected


def test_flags_of_vllm_that_ask_for_what_happens_anyway_are_dropped() -> None:
    given = ["model", "--enable-lora", "--port", "1", "-pp", "1", "--kv_cache_dtype=auto", "--enable-chunked-prefill"]
    assert drop_flags(given) == ["model", "--port", "1"]
    kept = ["--enable-lora=no", "--enable-lor", "--max-loras", "4", "--", "--enforce-eager"]
    assert drop_flags(kept) == kept, "the parser's to judge"


# --- a whole server ---


def test_a_server_starts_says_what_it_does_and_answers(server: RunningServer, tiny_model: Path) -> None:
    for word in (str(tiny_model), " on cpu, 1 threads", "guaranteed to inference", str(server.data_dir), "everybody",
                 "to the first (from this machine's profile; set --slo-tpot-ms, --slo-ttft-ms)"):
        assert word in server.log
    assert server.is_ready
    assert server.data_dir.stat().st_mode & 0o777 == 0o700
    body = {"model": server.model_name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] in range(1, 5)
    assert httpx.get(f"{server.url}/openapi.json", timeout=30).json()["info"]["title"] == "coserve"


@pytest.mark.parametrize(("send", "status"), [
    (lambda url: httpx.get(f"{url}/v1/nothing", timeout=30), 404),
    (lambda url: httpx.put(f"{url}/v1/models", timeout=30), 405),
    (lambda url: httpx.post(f"{url}/v1/chat/completions", content=b"{", headers=JSON, timeout=30), 400),
    (lambda url: httpx.post(f"{url}/v1/chat/completions", content=b"{}", timeout=30), 415),
    (lambda url: httpx.post(f"{url}/v1/chat/completions", content=b"x", headers={"content-encoding": "gzip"}, timeout=30), 415),
    (lambda url: httpx.post(f"{url}/v1/completions", content=b" " * (17 << 20), timeout=30), 413),
])
def test_a_server_answers_mistakes_in_openais_form(
    server: RunningServer, send: Callable[[str], httpx.Response], status: int
) -> None:
    response = send(server.url)
    assert response.status_code == status
    assert error_of(response)["message"]
    assert response.headers["x-request-id"]
