"""Tools in chats through the unmodified openai client, over a real socket, with a scripted engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from coserve.chat.template import ChatExtras
from coserve.text.tokenizer import ChatTokenizer
from tests.server.fakes import ANSWER, MODEL, Script, send
from tests.server.sites import CHAT_PATH, HI, Site, open_site
from tests.tiny_tokenizer import build_tiny_tokenizer
from tests.tool_templates import LLAMA3, MISTRAL, MISTRAL_V11

PARAMETERS: dict[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False,
}
WEATHER: dict[str, Any] = {"name": "get_weather", "description": "The weather.", "parameters": PARAMETERS}
TIME: dict[str, Any] = {"name": "get_time"}
TOOLS: Any = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
ARGUMENTS = '{"city": "Zürich 🙂"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TIME_CALL = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


def chunks_of(site: Site, **body: Any) -> list[dict[str, Any]]:
    """The choices of a stream's chunks."""
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True, **body})
    assert reply.events[-1] == "[DONE]", reply.text
    return [json.loads(event)["choices"][0] for event in reply.events[:-1]]


def choice_of(site: Site, **body: Any) -> dict[str, Any]:
    """The only choice of a whole response."""
    reply = send(site.port, CHAT_PATH, {"messages": HI, **body})
    assert reply.status == 200, reply.text
    choice: dict[str, Any] = reply.json["choices"][0]
    return choice


@contextlib.contextmanager
def open_long(tokenizer: ChatTokenizer) -> Iterator[Site]:
    """A site whose context is long enough for tools."""
    with open_site(tokenizer) as site:
        site.engine.info = msgspec.structs.replace(site.engine.info, max_model_len=1 << 13)
        yield site


@pytest.fixture(scope="module")
def running_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The one that this file's tests share."""
    with open_long(ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))) as site:
        yield site


# --- calls in answers ---


def test_a_call(site: Site) -> None:
    site.engine.script = Script(CALL)
    choice = site.client.chat.completions.create(model=MODEL, messages=HI, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls or []
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert (call.function.name, call.function.arguments) == ("get_weather", ARGUMENTS)
    expected = site.tokenizer.encode_chat(HI, extras=ChatExtras(tools=TOOLS))
    assert site.engine.asked[0].prompt_ids == expected
    assert "<tools>" in site.tokenizer.decode(expected)


def test_text_and_several_calls(site: Site) -> None:
    site.engine.script = Script(f"Let me look.\n{CALL}\n{TIME_CALL}")
    choice = choice_of(site, tools=TOOLS)
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Let me look.", "tool_calls")
    calls = choice["message"]["tool_calls"]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in calls] == [
        ("get_weather", ARGUMENTS), ("get_time", "{}"),
    ]
    assert len({call["id"] for call in calls}) == 2


def test_no_call(site: Site) -> None:
    choice = choice_of(site, tools=TOOLS)
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_calls_in_a_stream(site: Site) -> None:
    site.engine.script = Script(f"Let me look.\n{CALL}\n{TIME_CALL}")
    chunks = chunks_of(site, tools=TOOLS)
    assert "".join(chunk["delta"].get("content") or "" for chunk in chunks) == "Let me look."
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    parts = [call for chunk in chunks for call in chunk["delta"].get("tool_calls", [])]
    for index, name, arguments in ((0, "get_weather", ARGUMENTS), (1, "get_time", "{}")):
        first, *rest = [part for part in parts if part["index"] == index]
        assert first["id"].startswith("call_")
        assert (first["type"], first["function"]) == ("function", {"name": name, "arguments": ""})
        assert all(set(part) == {"index", "function"} and set(part["function"]) == {"arguments"} for part in rest)
        assert "".join(part["function"]["arguments"] for part in rest) == arguments
    assert len([part for part in parts if part["index"] == 0]) > 5, "arguments come as they are written"


def test_the_clients_own_stream(site: Site) -> None:
    site.engine.script = Script(f"Let me look.\n{CALL}")
    strict: Any = [{"type": "function", "function": {**WEATHER, "strict": True}}]
    with site.client.chat.completions.stream(model=MODEL, messages=HI, tools=strict) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0]
    assert {"content.delta", "tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.message.content == "Let me look."
    [call] = final.message.tool_calls or []
    assert (call.function.name, call.function.parsed_arguments) == ("get_weather", {"city": "Zürich 🙂"})
    parsed = site.client.chat.completions.parse(model=MODEL, messages=HI, tools=strict).choices[0]
    assert [call.function.parsed_arguments for call in parsed.message.tool_calls or []] == [{"city": "Zürich 🙂"}]


def test_every_output_has_its_own_calls(site: Site) -> None:
    site.engine.script = Script(CALL)
    reply = send(site.port, CHAT_PATH, {"messages": HI, "tools": TOOLS, "n": 2})
    calls = [choice["message"]["tool_calls"] for choice in reply.json["choices"]]
    assert [len(found) for found in calls] == [1, 1]
    assert calls[0][0]["id"] != calls[1][0]["id"]


def test_a_limit_ends_by_length(site: Site) -> None:
    site.engine.script = Script(CALL)
    cut = len(site.tokenizer.encode(CALL[: CALL.index(" 🙂")]))
    choice = choice_of(site, tools=TOOLS, max_tokens=cut)
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "Zürich'
    assert chunks_of(site, tools=TOOLS, max_tokens=cut)[-1]["finish_reason"] == "length"


def test_log_probabilities_are_those_of_the_whole_text(site: Site) -> None:
    site.engine.script = Script(f"Well.\n{CALL}")
    choice = choice_of(site, tools=TOOLS, logprobs=True)
    assert b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode() == f"Well.\n{CALL}"
    chunks = chunks_of(site, tools=TOOLS, logprobs=True)
    assert [entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]] == (
        choice["logprobs"]["content"]
    )


# --- choices ---


def test_none_is_text(site: Site) -> None:
    site.engine.script = Script(CALL)
    choice = choice_of(site, tools=TOOLS, tool_choice="none")
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")
    choice_of(site, tools=TOOLS)
    assert site.engine.asked[0].prompt_ids == site.engine.asked[1].prompt_ids, "the model is told of the tools all the same"


@pytest.mark.parametrize(("tool_choice", "reason"), [
    ("required", "tool_calls"), (NAMED, "stop"), ("auto", "tool_calls"),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}, "tool_calls"),
    ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}, "tool_calls"),
])
def test_reasons(site: Site, tool_choice: Any, reason: str) -> None:
    site.engine.script = Script(CALL)
    choice = choice_of(site, tools=TOOLS, tool_choice=tool_choice)
    assert choice["finish_reason"] == reason
    assert len(choice["message"]["tool_calls"]) == 1
    assert chunks_of(site, tools=TOOLS, tool_choice=tool_choice)[-1]["finish_reason"] == reason


def test_one_call_at_most(site: Site) -> None:
    site.engine.script = Script(f"{CALL}\n{TIME_CALL}\n")
    choice = choice_of(site, tools=TOOLS, parallel_tool_calls=False)
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    parts = [call for chunk in chunks_of(site, tools=TOOLS, parallel_tool_calls=False)
             for call in chunk["delta"].get("tool_calls", [])]
    assert {part["index"] for part in parts} == {0}


def test_a_call_of_no_tool_is_passed_on(site: Site) -> None:
    site.engine.script = Script(CALL.replace("get_weather", "nothing"))
    assert choice_of(site, tools=TOOLS)["message"]["tool_calls"][0]["function"]["name"] == "nothing"


# --- what is enforced ---


STRICT: Any = [{"type": "function", "function": {**WEATHER, "strict": True}}, TOOLS[1]]
ONE: Any = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"answer": {}}}}}


@pytest.mark.parametrize(("body", "there", "absent"), [
    ({}, (), ()), ({"tool_choice": "none"}, (), ()),
    ({"tool_choice": "required"}, ("start: call (", "city", "get_time"), ("TEXT",)),
    ({"tool_choice": "required", "parallel_tool_calls": False}, ("start: call\n", "city", "get_time"), ("TEXT",)),
    ({"tool_choice": NAMED}, ("start: call\n", "city"), ("TEXT", "get_time")),
    ({"tools": STRICT}, ("start: (head rest)* TEXT", "city", "get_time"), ()),
    ({"parallel_tool_calls": False}, ("start: head rest | TEXT", "get_weather", "get_time"), ("city",)),
    ({"tool_choice": ONE}, ("TEXT", "get_weather"), ("get_time",)),
    ({"response_format": FORM}, ("start: call (", "| content", "answer", "get_time"), ("TEXT", "city")),
    ({"response_format": FORM, "tool_choice": "required"}, ("start: call (",), ("answer",)),
    ({"response_format": FORM, "tool_choice": "none"}, ("answer",), ("get_time",)),
])
def test_the_grammar_of_a_request(site: Site, body: dict[str, Any], there: tuple[str, ...], absent: tuple[str, ...]) -> None:
    site.engine.script = Script(CALL)
    choice_of(site, **{"tools": TOOLS, **body})
    grammar = site.engine.asked[0].sampling.grammar or ""
    assert bool(grammar) == bool(there)
    assert all(part in grammar for part in there), grammar
    assert not any(part in grammar for part in absent), grammar


def test_what_a_grammar_does_not_hold_is_no_call(site: Site) -> None:
    """Without a grammar a call without its marker counts; with one it would go around it."""
    text = '{"name": "get_weather", "arguments": {}}'
    site.engine.script = Script(text)
    assert choice_of(site, tools=TOOLS)["message"]["content"] is None
    assert choice_of(site, tools=STRICT)["message"]["content"] == text


def test_a_schema_that_cannot_be_enforced(site: Site) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "object", "propertyNames": {"pattern": "x"}}}}
    strict = {"type": "function", "function": {"name": "f", "parameters": odd, "strict": True}}
    reply = send(site.port, CHAT_PATH, {"messages": HI, "tools": [*TOOLS, strict]})
    assert (reply.status, reply.error["param"]) == (400, "tools[2].function.parameters")
    assert "propertyNames" in reply.error["message"]
    reply = send(site.port, CHAT_PATH, {"messages": HI, "functions": [strict["function"]], "function_call": "auto"})
    assert (reply.status, reply.error["param"]) == (400, "functions[0].parameters")


# --- OpenAI's old fields ---


def test_functions(site: Site) -> None:
    site.engine.script = Script(f"{CALL}\n{TIME_CALL}")
    choice = choice_of(site, functions=[WEATHER, TIME])
    assert choice["message"] == {
        "role": "assistant", "content": None, "refusal": None, "function_call": {"name": "get_weather", "arguments": ARGUMENTS},
    }
    assert choice["finish_reason"] == "function_call"
    assert site.engine.asked[0].prompt_ids == site.tokenizer.encode_chat(HI, extras=ChatExtras(tools=TOOLS))
    assert choice_of(site, functions=[WEATHER], function_call={"name": "get_weather"})["finish_reason"] == "stop"
    chunks = chunks_of(site, functions=[WEATHER, TIME])
    assert chunks[-1]["finish_reason"] == "function_call"
    first, *rest = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
    assert first == {"name": "get_weather", "arguments": ""}
    assert "".join(part["arguments"] for part in rest) == ARGUMENTS


# --- conversations with calls and results ---


def test_a_conversation_goes_on(site: Site) -> None:
    site.engine.script = Script(CALL)
    client = site.client.chat.completions
    messages: Any = [*HI]
    message = client.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message
    calls: Any = message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": calls[0].id, "content": "rainy"}]
    site.engine.script = Script()
    assert client.create(model=MODEL, messages=messages, tools=TOOLS).choices[0].message.content == ANSWER
    turns = [
        *HI, {"role": "assistant", "content": CALL},
        {"role": "user", "content": "<tool_response>\nrainy\n</tool_response>"},
    ]
    assert site.engine.asked[1].prompt_ids == site.tokenizer.encode_chat(turns, extras=ChatExtras(tools=TOOLS))


def test_the_old_form_is_the_same_conversation(site: Site) -> None:
    old = [
        *HI, {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": ARGUMENTS}},
        {"role": "function", "name": "get_weather", "content": "rainy"},
    ]
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": json.loads(ARGUMENTS)}}
    new = [*HI, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": [
        {"type": "text", "text": "rainy"},
    ]}]
    choice_of(site, messages=old)
    choice_of(site, messages=new)
    assert site.engine.asked[0].prompt_ids == site.engine.asked[1].prompt_ids


def test_arguments_that_are_no_json_come_back(site: Site) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": '}}
    choice_of(site, messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
    assert '"arguments": {"city": }' in site.tokenizer.decode(site.engine.asked[0].prompt_ids)


def test_calls_without_a_result_are_taken(site: Site) -> None:
    calls = [{"id": name, "type": "function", "function": {"name": "f", "arguments": "{}"}} for name in ("a", "b")]
    turns = [*HI, {"role": "assistant", "tool_calls": calls}, {"role": "tool", "tool_call_id": "b", "content": "x"}, *HI]
    choice_of(site, messages=turns)


def test_tokenize_counts_tools(site: Site) -> None:
    reply = send(site.port, "/tokenize", {"messages": HI, "tools": TOOLS})
    assert reply.json["tokens"] == site.tokenizer.encode_chat(HI, extras=ChatExtras(tools=TOOLS))


# --- what is wrong ---


CALLING = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}


@pytest.mark.parametrize(("body", "field", "reason"), [
    ({"tool_choice": "required"}, "tool_choice", "for requests with tools"),
    ({"tool_choice": NAMED, "tools": []}, "tool_choice", "for requests with tools"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice.function.name", "none of"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice", "must be none, auto, required"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice", "must be none, auto, required"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x"}}},
     "tool_choice.allowed_tools.mode", "auto or required"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOLS[0], {}]}}},
     "tool_choice.allowed_tools.tools[1].function.name", "is missing"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2].function.name", "two tools called get_weather"),
    ({"functions": [WEATHER], "tools": TOOLS}, "tools", "old form"),
    ({"functions": [{"name": "a b"}]}, "functions[0].name", "must be a name"),
    ({"functions": [{"parameters": {}}]}, "functions[0].name", "must be a name"),
    ({"functions": [WEATHER], "function_call": {"name": "f"}}, "function_call.name", "none of"),
    ({"functions": [WEATHER], "function_call": "required"}, "function_call", "must be none, auto"),
    ({"function_call": {"name": "f"}}, "function_call", "for requests with functions"),
    ({"messages": [*HI, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id", "is missing"),
    ({"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": "c"}, CALLING]}, "messages[1].tool_call_id",
     "no call before this message"),
    ({"messages": [*HI, CALLING, {"role": "tool", "content": "x", "tool_call_id": "d"}]}, "messages[2].tool_call_id", "'d'"),
    ({"messages": [*HI, CALLING, {"role": "tool", "tool_call_id": "c"}]}, "messages[2].content", "is missing"),
    ({"messages": [*HI, CALLING, {"role": "function", "content": "x"}]}, "messages[2].name", "is missing"),
    ({"messages": [*HI, CALLING, {"role": "function", "content": "x", "name": "g"}]}, "messages[2].name", "wasn't called"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": CALLING["tool_calls"]}]}, "messages[0].tool_calls",
     "no field of a message of role user"),
    ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id", "no field"),
    ({"messages": [*HI, {**CALLING, "function_call": {"name": "f", "arguments": "{}"}}]}, "messages[1].function_call",
     "can't stand beside tool_calls"),
    ({"messages": [*HI, {"role": "assistant", "function_call": {"arguments": "{}"}}]}, "messages[1].function_call.name",
     "must be a name"),
    ({"messages": [*HI, {"role": "assistant", "function_call": "f"}]}, "messages[1].function_call", "must be an object"),
    ({"messages": [*HI, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "messages[1].tool_calls[0].id",
     "is missing"),
])
def test_what_is_wrong_is_named(site: Site, body: dict[str, Any], field: str, reason: str) -> None:
    reply = send(site.port, CHAT_PATH, {"messages": HI, **body})
    assert reply.status == 400, reply.text
    assert reply.error["param"] == field
    assert reply.error["message"].startswith(f"{field}: ")
    assert reason in reply.error["message"]


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_values_within_each_other_have_a_limit(site: Site) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": nested(300)}}
    reply = send(site.port, CHAT_PATH, {"messages": HI, "tools": [tool]})
    assert (reply.status, reply.error["param"]) == (400, "tools[0].function.parameters")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": nested(300)}}
    reply = send(site.port, CHAT_PATH, {"messages": [*HI, {"role": "assistant", "tool_calls": [call]}]})
    assert (reply.status, reply.error["param"]) == (400, "messages[1].tool_calls[0].function.arguments")
    call["function"] = {"name": "f", "arguments": json.dumps(nested(300))}
    choice_of(site, messages=[*HI, {"role": "assistant", "tool_calls": [call]}])


def test_tools_that_are_longer_than_the_context(site: Site) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "x" * 1_000_000}}
    reply = send(site.port, CHAT_PATH, {"messages": HI, "tools": [tool]})
    assert (reply.status, reply.error["param"], reply.error["code"]) == (400, "tools", "context_length_exceeded")


# --- markers that are special tokens ---


def build_marked(directory: Path, template: str, *markers: str) -> ChatTokenizer:
    """A tokenizer in which markers are special tokens."""
    fast: Any = PreTrainedTokenizerFast.from_pretrained(build_tiny_tokenizer(directory, chat_template=template))
    fast.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in markers])
    fast.save_pretrained(directory)
    return ChatTokenizer.load(directory)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_long(build_marked(tmp_path_factory.mktemp("m"), MISTRAL, "[TOOL_CALLS]", "[ARGS]", "[INST]")) as site:
        yield site


def test_a_marker_that_is_a_special_token(mistral: Site) -> None:
    mistral.reset()
    text = f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}, "id": "abcdefgh9"}}]'
    mistral.engine.script = Script(text)
    choice = choice_of(mistral, tools=TOOLS, logprobs=True, top_logprobs=1)
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
    assert len(call["id"]) == 9
    assert call["id"].isalnum()
    special = mistral.tokenizer.special_tokens
    assert set(mistral.engine.asked[0].sampling.shown_special_ids) == {special["[TOOL_CALLS]"], special["[ARGS]"]}
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text
    assert content[0]["token"] == "[TOOL_CALLS]"
    assert bytes(content[0]["top_logprobs"][0]["bytes"]) == b"[TOOL_CALLS]"
    chunks = chunks_of(mistral, tools=TOOLS, logprobs=True)
    assert b"".join(
        bytes(entry["bytes"]) for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]
    ).decode() == text
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice_of(mistral, messages=[*HI, turn, {"role": "tool", "tool_call_id": call["id"], "content": "rainy"}], tools=TOOLS)
    assert mistral.tokenizer.decode(mistral.engine.asked[-1].prompt_ids, skip_special_tokens=False).count(call["id"]) == 2


def test_markers_show_for_requests_with_tools_only(mistral: Site) -> None:
    mistral.reset()
    mistral.engine.script = Script("[TOOL_CALLS]Hi[INST]")
    assert choice_of(mistral)["message"]["content"] == "Hi"
    assert choice_of(mistral, tools=TOOLS)["message"]["content"] == "[TOOL_CALLS]Hi", "what is no call is text"
    assert mistral.engine.asked[0].sampling.shown_special_ids == ()


@pytest.mark.parametrize(("template", "marker", "text"), [
    (LLAMA3, "<|python_tag|>", f'<|python_tag|>{{"name": "get_weather", "parameters": {ARGUMENTS}}}'),
    (MISTRAL_V11, "[ARGS]", f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}"),
])
def test_other_markers(tmp_path: Path, template: str, marker: str, text: str) -> None:
    with open_long(build_marked(tmp_path, template, marker)) as site:
        site.engine.script = Script(text)
        call = choice_of(site, tools=TOOLS)["message"]["tool_calls"][0]
        assert call["function"] == {"name": "get_weather", "arguments": ARGUMENTS}


# --- special tokens in texts ---


def test_special_tokens_show_where_they_are_asked_for(site: Site) -> None:
    text = "a<|im_start|>b"
    site.engine.script = Script(text)
    assert choice_of(site)["message"]["content"] == "ab"
    choice = choice_of(site, skip_special_tokens=False, logprobs=True)
    assert choice["message"]["content"] == text
    assert [bytes(entry["bytes"]).decode() for entry in choice["logprobs"]["content"]] == ["a", "<|im_start|>", "b"]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks_of(site, skip_special_tokens=False)) == text
    body = {"prompt": "x", "max_tokens": 9, "skip_special_tokens": False, "logprobs": 1}
    completion = send(site.port, "/v1/completions", body).json["choices"][0]
    assert completion["text"] == text
    assert completion["logprobs"]["text_offset"] == [0, 1, 13]
    stream = send(site.port, "/v1/completions", {**body, "stream": True})
    parts = [json.loads(event)["choices"][0] for event in stream.events[:-1]]
    assert "".join(part["text"] for part in parts) == text
    assert [offset for part in parts for offset in (part["logprobs"] or {"text_offset": []})["text_offset"]] == [0, 1, 13]


def test_errors_of_the_client_are_bad_requests(site: Site) -> None:
    with pytest.raises(openai.BadRequestError, match="tool_choice: is for requests with tools"):
        site.client.chat.completions.create(model=MODEL, messages=HI, tool_choice="required")
