"""Tools through a whole server: what a request asks for is enforced on a model of random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.conftest import RunningServer
from tests.tiny_directory import build_tiny_directory
from tests.tiny_tokenizer import CHATML

pytestmark = pytest.mark.full

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% if tools %}{{ '<tool_call>' }}{% endif %}" + CHATML
)
"""So short that the tiny model's context holds it."""
TOOLS: Any = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"],
        "additionalProperties": False,
    }}},
    {"type": "function", "function": {"name": "get_time"}},
]
HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = build_tiny_directory(tmp_path_factory.mktemp("model"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    server = RunningServer(model, tmp_path_factory.mktemp("server") / "data", "--enable-auto-tool-choice")
    yield server
    assert server.stop() == 0, server.log


@pytest.fixture
def client(running: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_required_and_named(client: openai.OpenAI, running: RunningServer) -> None:
    for choice, names, reason in (
        ("required", {"get_weather", "get_time"}, "tool_calls"),
        ({"type": "function", "function": {"name": "get_weather"}}, {"get_weather"}, "stop"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "get_time"}}]}}, {"get_time"}, "tool_calls"),
    ):
        body: Any = {"tool_choice": choice, "parallel_tool_calls": False}
        for seed in range(3):
            reply = client.chat.completions.create(
                model=running.model_name, messages=HI, tools=TOOLS, seed=seed, max_tokens=200, **body
            ).choices[0]
            assert reply.finish_reason == reason
            assert reply.message.content is None
            [call] = reply.message.tool_calls or []
            assert call.type == "function"
            assert call.function.name in names
            arguments = json.loads(call.function.arguments)
            assert arguments in ({"city": "Oslo"}, {"city": "Rome"}) if call.function.name == "get_weather" else arguments == {}


def test_a_call_or_an_answer(client: openai.OpenAI, running: RunningServer) -> None:
    schema = {"type": "object", "properties": {"sum": {"enum": [1, 2]}}, "required": ["sum"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    kinds = set()
    for seed in range(12):
        reply = client.chat.completions.create(
            model=running.model_name, messages=HI, tools=TOOLS, seed=seed, max_tokens=300, response_format=form,
            parallel_tool_calls=False,
        ).choices[0].message
        kinds.add(bool(reply.tool_calls))
        if not reply.tool_calls:
            assert json.loads(reply.content or "") in ({"sum": 1}, {"sum": 2})
    assert kinds, "both may come"


def test_a_schema_that_cannot_be_enforced_is_named(client: openai.OpenAI, running: RunningServer) -> None:
    wrong: Any = {"type": "object", "properties": {"a": {"type": "object", "propertyNames": {"pattern": "x"},
                  "minProperties": 1}}, "required": ["a"]}
    tools: Any = [*TOOLS, {"type": "function", "function": {"name": "f", "parameters": wrong, "strict": True}}]
    with pytest.raises(openai.BadRequestError, match=r"tools\[2\]\.function\.parameters: .*propertyNames"):
        client.chat.completions.create(model=running.model_name, messages=HI, tools=tools)
    old: Any = [{"name": "f", "parameters": wrong, "strict": True}]
    with pytest.raises(openai.BadRequestError, match=r"functions\[0\]\.parameters: "):
        client.chat.completions.create(model=running.model_name, messages=HI, functions=old, function_call={"name": "f"})
    tools[2]["function"]["strict"] = False
    for choice in ("auto", {"type": "function", "function": {"name": "f"}}):
        body: Any = {"tool_choice": choice}
        client.chat.completions.create(model=running.model_name, messages=HI, tools=tools, max_tokens=4, **body)


def test_a_stream_of_a_required_call(client: openai.OpenAI, running: RunningServer) -> None:
    strict: Any = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    with client.chat.completions.stream(
        model=running.model_name, messages=HI, tools=strict,
        tool_choice="required", parallel_tool_calls=False, max_tokens=200,
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    [call] = final.message.tool_calls or []
    assert call.function.parsed_arguments in ({}, {"city": "Oslo"}, {"city": "Rome"})


def test_a_parser_that_is_not_the_models(tmp_path: Path) -> None:
    model = build_tiny_directory(tmp_path / "model")
    with pytest.raises(AssertionError, match="tells it of no tools"):
        RunningServer(model, tmp_path / "data", "--tool-call-parser", "mistral")
