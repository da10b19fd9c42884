"""Structured output through a real server: answers match, what leads nowhere ends alone, and no process is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.server.conftest import RunningServer, StartServer, descendants, is_alive, processes_of, wait_until
from tests.server.malformed import TOO_MANY_PATTERNS
from tests.server.sites import CHAT_PATH, HI, TEXT_PATH

pytestmark = pytest.mark.full
SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "tags": {"type": "array", "items": {"enum": [
        "ä", "b"]}, "maxItems": 3}, "ok": {"type": "boolean"}}, "required": ["name", "tags"], "additionalProperties": False,
}
DEAD_END = {"$defs": {"x": {"$ref": "#/$defs/x"}}, "type": "object", "properties": {"abcdefgh": {"type": "null"},
            "b": {"$ref": "#/$defs/x"}}, "required": ["abcdefgh", "b"]}


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def checkers(server: RunningServer) -> list[int]:
    """The processes that try grammars."""
    return processes_of("checkmain", descendants(server.pid))


def test_answers_match(server: RunningServer, client: openai.OpenAI) -> None:
    asked: Any = {
        "model": server.model_name, "messages": HI, "temperature": 1.0, "seed": 4, "n": 3, "max_tokens": 120,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    }
    reply = client.chat.completions.create(**asked)
    texts = [choice.message.content or "" for choice in reply.choices]
    for choice, text in zip(reply.choices, texts, strict=True):
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(text), SCHEMA)
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    found = client.completions.create(
        model=server.model_name, prompt=["a", "b"], max_tokens=30, temperature=1.0, seed=1, n=2, logprobs=2,
        extra_body={"guided_regex": "(ab|c){2,5}!"},
    )
    assert all(re.fullmatch("(ab|c){2,5}!", choice.text) for choice in found.choices)


def test_what_leads_nowhere_ends_alone(server: RunningServer, client: openai.OpenAI) -> None:
    """It is a 400 as long as nothing was sent; the engine goes on, with the requests beside it."""
    engine = server.engine_pids
    with client.completions.create(
        model=server.model_name, prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    ) as beside:
        next(iter(beside))
        reply = httpx.post(f"{server.url}{CHAT_PATH}", json={"messages": HI, "guided_json": DEAD_END, "n": 2}, timeout=60)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "guided_json"), reply.text
        assert "no text can match" in reply.json()["error"]["message"]
        reply = httpx.post(f"{server.url}{CHAT_PATH}", json={"messages": HI, "guided_json": TOO_MANY_PATTERNS}, timeout=60)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "guided_json")
        assert next(iter(beside)).choices
    assert server.engine_pids == engine and server.is_ready


def test_a_client_that_leaves_while_its_grammar_is_compiled(server: RunningServer) -> None:
    properties = {f"p{n}": {"type": "string", "maxLength": n + 1} for n in range(300)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}  # no answer is done before 400 tokens
    for title in range(5):
        body = {"prompt": "a", "max_tokens": 400, "guided_json": {**schema, "title": title}}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{TEXT_PATH}", json=body, timeout=0.05)
    wait_until(lambda: not running(server), 30)


def running(server: RunningServer) -> float:
    """Requests that run or wait."""
    found = re.findall(r"^coserve_num_requests_(?:running|waiting)\{[^}]*\} (\S+)$",
                       httpx.get(f"{server.url}/metrics", timeout=30).text, re.MULTILINE)
    return sum(map(float, found))


def test_the_process_that_tries_grammars(start_server: StartServer) -> None:
    """It is there from the start, comes back when it dies, and ends with the server, however that ends."""
    server = start_server()
    (first,) = checkers(server)
    body = {"prompt": "a", "max_tokens": 5, "guided_choice": ["yes", "no"]}
    assert httpx.post(f"{server.url}{TEXT_PATH}", json=body, timeout=60).json()["choices"][0]["text"] in ("yes", "no")
    assert checkers(server) == [first]
    os.kill(first, signal.SIGKILL)
    body["guided_choice"] = ["yes", "perhaps"]
    assert httpx.post(f"{server.url}{TEXT_PATH}", json=body, timeout=60).status_code == 200
    (second,) = checkers(server)
    assert second != first
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(second), 10)
