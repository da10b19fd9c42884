"""/v1/responses through the unmodified openai client, over a real socket, with a scripted engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent

from coserve.core import CapacityError, ContextExceeded, CoserveError, InvalidRequest
from coserve.server.errors import EngineUnavailable
from coserve.server.inference import chat, sse
from coserve.server.inference.chat import AskedChat
from coserve.server.inference.protocol import GenerationRequest
from coserve.server.responses.body import RESPONSE_FORM, SHARED, CreateResponse
from coserve.server.responses.items import read_input
from coserve.server.responses.tokens import WritingTokens
from coserve.server.responses.translate import ChatTranslation, translate
from coserve.server.routes import responses as routes
from tests.server.fakes import ADAPTER, ANSWER, MAX_MODEL_LEN, MODEL, Reply, Script, send, wait_for
from tests.server.markreader import MarkReader
from tests.server.sites import HI, Site, post

PATH = "/v1/responses"
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
THOUGHT = "<think>\nHm, a 🙂.</think>Let me see.<call>weather {\"city\": \"Oslo\"}</call><call>news {}</call>"
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are read for reasoning and calls, by marks that no model has."""
    async def ask_chat(*given: Any) -> AskedChat:
        return replace(await chat.ask_chat(*given), new_reader=MarkReader)

    monkeypatch.setattr(routes, "ask_chat", ask_chat)


def strict(body: dict[str, Any]) -> Response:
    """A response in which everything that OpenAI's type requires is there and of the right type, numbers for times aside."""
    return Response.model_validate(body, strict=True)


def events_of(reply: Reply) -> list[dict[str, Any]]:
    """Events of a stream, each with the name that its data has, valid for OpenAI's types, and numbered from 0."""
    assert reply.status == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in reply.text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event, strict=True)
        found.append(event)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def without_ids(body: dict[str, Any]) -> dict[str, Any]:
    """A response without what differs from one to the next."""
    output = [{name: value for name, value in item.items() if name != "id"} for item in body["output"]]
    return {**body, "output": output, "id": None, "created_at": None, "completed_at": None}


# --- the object ---


def test_a_response(site: Site) -> None:
    reply = send(site.port, PATH, {"model": MODEL, "input": "Hi"})
    response = strict(reply.json)
    assert response.id.startswith("resp_")
    assert (response.object, response.model, response.status) == ("response", MODEL, "completed")
    assert abs(response.created_at - time.time()) < 60 and response.completed_at is not None
    assert response.error is response.incomplete_details is None
    (message,) = response.output
    assert message.type == "message"
    assert (message.role, message.status, message.id[:4]) == ("assistant", "completed", "msg_")
    (part,) = message.content
    assert part.type == "output_text"
    assert (part.text, part.annotations, part.logprobs) == (ANSWER, [], [])
    assert response.output_text == ANSWER
    asked = site.engine.asked[0]
    assert asked.prompt_ids == site.tokenizer.encode_chat(HI)
    assert asked.sampling.max_tokens == MAX_MODEL_LEN - len(asked.prompt_ids)
    assert asked.sampling.temperature == 1.0
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (len(asked.prompt_ids), site.num_answer_tokens)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert (usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens) == (3, 0)
    assert reply.json["store"] is False
    site.assert_counted("stop")


def test_what_was_asked_for_is_told(site: Site) -> None:
    response = site.client.responses.create(
        model=MODEL, input="Hi", instructions="Be short.", max_output_tokens=64, temperature=0.5, top_p=0.25,
        metadata={"run": "1"}, truncation="disabled", store=True, text={"format": {"type": "text"}, "verbosity": "medium"},
        reasoning={"effort": "none", "summary": "auto"}, parallel_tool_calls=True, tool_choice="auto", tools=[], user="u",
        service_tier="auto", safety_identifier="s", prompt_cache_key="k", background=False,
    )
    assert (response.instructions, response.max_output_tokens, response.temperature, response.top_p) == (
        "Be short.", 64, 0.5, 0.25
    )
    assert (response.metadata, response.tool_choice, response.tools) == ({"run": "1"}, "auto", [])
    assert response.reasoning is not None and response.reasoning.summary == "auto"
    sampling = site.engine.asked[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (64, 0.5, 0.25)
    expected = [{"role": "system", "content": "Be short."}, *HI]
    assert site.engine.asked[0].prompt_ids == site.tokenizer.encode_chat(expected)


def test_settings_beyond_openais_arrive(site: Site) -> None:
    site.client.responses.create(model=ADAPTER, input="Hi", max_output_tokens=6, extra_body={
        "top_k": 4, "min_p": 0.125, "repetition_penalty": 1.25, "presence_penalty": 0.5, "frequency_penalty": 0.75,
        "ignore_eos": True, "min_tokens": 2, "stop_token_ids": [9], "stop": "END", "seed": 11, "logit_bias": {"7": -1.5},
        "slo_tpot_ms": 50, "slo_ttft_ms": "none",
    })
    asked = site.engine.asked[0]
    sampling = asked.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty, sampling.seed) == (4, 0.125, 1.25, 11)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.min_tokens) == (0.5, 0.75, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.stop) == (True, (9,), ("END",))
    assert dict(sampling.logit_bias) == {7: -1.5}
    assert (asked.tpot_ms, asked.ttft_ms, asked.adapter) == (50, "none", f"default/{ADAPTER}")


def test_a_response_that_is_cut_off(site: Site) -> None:
    reply = send(site.port, PATH, {"input": "Hi", "max_output_tokens": 4})
    response = strict(reply.json)
    assert (response.status, response.completed_at) == ("incomplete", None)
    assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
    assert ANSWER.startswith(response.output_text) and response.output_text
    assert reply.json["output"][0]["status"] == "incomplete"
    last = events_of(send(site.port, PATH, {"input": "Hi", "max_output_tokens": 4, "stream": True}))[-1]
    assert last["type"] == "response.incomplete"
    assert without_ids(last["response"]) == without_ids(reply.json)
    site.assert_counted("length", "length")


def test_an_output_without_text_is_an_empty_message(site: Site, marks: None) -> None:
    site.engine.script = Script(text="<think>Hm</think>")
    response = strict(send(site.port, PATH, {"input": "Hi"}).json)
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output_text == ""
    site.engine.script = Script(text="<think>Hm, this is long</think>")
    response = strict(send(site.port, PATH, {"input": "Hi", "max_output_tokens": 12}).json)
    assert [(item.type, getattr(item, "status", "")) for item in response.output] == [("reasoning", "incomplete")]


def test_reasoning_text_and_calls_are_items_in_order(site: Site, marks: None) -> None:
    site.engine.script = Script(text=THOUGHT)
    reply = send(site.port, PATH, {"input": "Hi"})
    response = strict(reply.json)
    reasoning, message, weather, news = response.output
    assert reasoning.type == "reasoning" and message.type == "message"
    assert reasoning.summary == [] and reasoning.content is not None
    assert [(part.type, part.text) for part in reasoning.content] == [("reasoning_text", "Hm, a 🙂.")]
    assert response.output_text == "Let me see."
    assert weather.type == "function_call" and news.type == "function_call"
    assert (weather.name, weather.call_id, weather.arguments) == ("weather", "call_0", '{"city": "Oslo"}')
    assert (news.name, news.call_id, news.arguments) == ("news", "call_1", "{}")
    assert {item["status"] for item in reply.json["output"]} == {"completed"}
    assert len({item["id"] for item in reply.json["output"]}) == 4


# --- the stream ---


def test_events_of_a_text(site: Site) -> None:
    events = events_of(send(site.port, PATH, {"input": "Hi", "stream": True}))
    kinds = [event["type"] for event in events]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * len(deltas), "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]
    assert len(deltas) > 5 and "".join(event["delta"] for event in deltas) == ANSWER
    assert [events[n]["response"]["status"] for n in (0, 1, -1)] == ["in_progress", "in_progress", "completed"]
    assert (events[0]["response"]["output"], events[0]["response"]["usage"]) == ([], None)
    assert (events[2]["item"]["content"], events[2]["item"]["status"]) == ([], "in_progress")
    assert events[3]["part"] == {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    assert events[-4]["text"] == events[-3]["part"]["text"] == ANSWER
    assert events[-1]["response"]["output"] == [events[-2]["item"]]
    assert {event["item_id"] for event in events if "item_id" in event} == {events[2]["item"]["id"]}
    whole = send(site.port, PATH, {"input": "Hi"}).json
    assert without_ids(events[-1]["response"]) == without_ids(whole)
    site.assert_counted("stop", "stop")


def test_events_of_reasoning_and_calls(site: Site, marks: None) -> None:
    site.engine.script = Script(text=THOUGHT)
    reply = send(site.port, PATH, {"input": "Hi", "stream": True})
    assert "[DONE]" not in reply.text
    events = events_of(reply)
    kinds: list[str] = []
    for event in events:
        if not kinds or kinds[-1] != event["type"]:
            kinds.append(event["type"])
    call = ["response.output_item.added", "response.function_call_arguments.delta", "response.function_call_arguments.done",
            "response.output_item.done"]
    parts = [
        ["response.output_item.added", "response.content_part.added", f"{name}.delta", f"{name}.done",
         "response.content_part.done", "response.output_item.done"]
        for name in ("response.reasoning_text", "response.output_text")
    ]
    assert kinds == ["response.created", "response.in_progress", *parts[0], *parts[1], *call, *call, "response.completed"]
    output = events[-1]["response"]["output"]
    for index, (item, name) in enumerate(zip(output, (
        "response.reasoning_text.delta", "response.output_text.delta", *["response.function_call_arguments.delta"] * 2
    ), strict=True)):
        mine = [event for event in events if event.get("output_index") == index]
        text = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
        assert "".join(event["delta"] for event in mine if event["type"] == name) == text
        assert mine[0]["item"]["id"] == mine[-1]["item"]["id"] == item["id"]
        assert {event["item_id"] for event in mine if "item_id" in event} == {item["id"]}
        assert mine[-1]["item"] == item
    assert without_ids(events[-1]["response"]) == without_ids(send(site.port, PATH, {"input": "Hi"}).json)


def test_the_clients_own_helpers(site: Site, marks: None) -> None:
    site.engine.script = Script(text=f"<think>Hm.</think>{json.dumps({'city': 'Oslo'})}")
    with site.client.responses.stream(model=MODEL, input="Hi") as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert {"response.reasoning_text.delta", "response.output_text.delta", "response.completed"} <= kinds
    assert json.loads(final.output_text) == {"city": "Oslo"}
    site.engine.script = Script(text=THOUGHT)
    with site.client.responses.stream(model=MODEL, input="Hi") as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        calls = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert '{"city": "Oslo"}' in snapshots
    assert [(item.name, item.arguments) for item in calls] == [("weather", '{"city": "Oslo"}'), ("news", "{}")]


def test_the_async_client(site: Site) -> None:
    async def talk() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="k", max_retries=0) as client:
            whole = await client.responses.create(model=MODEL, input="Hi")
            stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
            pieces = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            return whole.output_text, "".join(pieces)

    assert asyncio.run(talk()) == (ANSWER, ANSWER)


# --- tools and formats ---

WEATHER: dict[str, Any] = {"type": "function", "name": "weather", "description": "d", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
}}


def test_calls_of_a_models_own_kind(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tools reach the prompt, and the calls that the model writes are items; their results reach the next prompt."""
    roomy = msgspec.structs.replace(site.engine.info, max_model_len=4096)
    monkeypatch.setattr(site.engine, "info", roomy)
    site.engine.script = Script(text='Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>')
    reply = send(site.port, PATH, {"input": "Hi", "tools": [WEATHER], **LOGPROBS})
    response = strict(reply.json)
    (message, called) = response.output
    assert message.type == "message" and called.type == "function_call"
    assert (called.name, json.loads(called.arguments)) == ("weather", {"city": "Oslo"})
    assert reply.json["tools"] == [{**WEATHER, "strict": None}]
    assert "".join(names(reply.json["output"][0]["content"][0]["logprobs"])).startswith("Wait.")
    prompt = site.tokenizer.decode(site.engine.asked[-1].prompt_ids)
    assert "weather" in prompt
    last = events_of(send(site.port, PATH, {"input": "Hi", "tools": [WEATHER], "stream": True, **LOGPROBS}))[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["message", "function_call"]
    assert last["output"][1]["arguments"] == called.arguments
    result = {"type": "function_call_output", "call_id": called.call_id, "output": "12 degrees"}
    again = [{"role": "user", "content": "Hi"}, *reply.json["output"], result]
    assert send(site.port, PATH, {"input": again, "tools": [WEATHER]}).status == 200
    assert "12 degrees" in site.tokenizer.decode(site.engine.asked[-1].prompt_ids)


def test_formats_become_grammars(site: Site) -> None:
    for format_ in ({"type": "json_object"}, {"type": "json_schema", "name": "s", "schema": {"type": "object"}}):
        reply = send(site.port, PATH, {"input": "Hi", "text": {"format": format_}})
        assert reply.status == 200 and strict(reply.json), reply.text
        assert site.engine.asked[-1].sampling.grammar is not None
        assert reply.json["text"]["format"] == format_


# --- log-probabilities ---


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["token"] for entry in entries]


def test_logprobs(site: Site) -> None:
    ids = site.tokenizer.encode(ANSWER)
    reply = send(site.port, PATH, {"input": "Hi", **LOGPROBS})
    strict(reply.json)
    found = reply.json["output"][0]["content"][0]["logprobs"]
    assert [entry["logprob"] for entry in found] == [-token / 1000 for token in ids]
    assert b"".join(bytes(entry["bytes"]) for entry in found).decode() == ANSWER
    assert {len(entry["top_logprobs"]) for entry in found} == {2}
    events = events_of(send(site.port, PATH, {"input": "Hi", "stream": True, **LOGPROBS}))
    streamed = [entry for event in events if event["type"] == "response.output_text.delta" for entry in event["logprobs"]]
    assert streamed == found == events[-1]["response"]["output"][0]["content"][0]["logprobs"]
    chosen = site.client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2).choices[0]
    assert chosen.logprobs is not None
    assert found == [entry.model_dump() for entry in chosen.logprobs.content or []]


@pytest.mark.parametrize("text", [
    THOUGHT, "<think>\nthink</think>\nthink <b>", "a<call>f {}</call>a", "<think>a</think>banana", "no < mark <thin",
    "<think>grün</think>grün 🙂",
])
def test_logprobs_are_of_the_text_alone(site: Site, marks: None, text: str) -> None:
    """Not of reasoning, marks or calls. Tokens at its borders may be cut by them."""
    site.engine.script = Script(text=text)
    body = {"input": "Hi", **LOGPROBS}
    reply = send(site.port, PATH, body)
    parts = [item["content"][0] for item in reply.json["output"] if item["type"] == "message"]
    assert parts
    for part in parts:
        written = b"".join(bytes(entry["bytes"]) for entry in part["logprobs"]).decode()
        assert part["text"] in written and len(written) <= len(part["text"]) + 4, (part["text"], names(part["logprobs"]))
    last = events_of(send(site.port, PATH, {**body, "stream": True}))[-1]["response"]
    assert without_ids(last) == without_ids(reply.json)


# --- input ---


def chat_of(value: Any) -> list[dict[str, Any]]:
    return [turn.message for turn in read_input(value)]


def test_messages_in_both_forms(site: Site) -> None:
    items: Any = [
        {"role": "developer", "content": "Be short."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"},
                                                        {"type": "input_text", "text": "two"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
        {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "phase": "final_answer", "content": [
            {"type": "output_text", "text": "So", "annotations": [], "logprobs": []}, {"type": "output_text", "text": "."}]},
        {"role": "user", "content": "Oh.", "type": None},
    ]
    site.client.responses.create(model=MODEL, input=items, instructions="Hear.")
    expected = [
        {"role": "system", "content": "Hear."}, {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one\ntwo"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."}, {"role": "user", "content": "Oh."},
    ]
    assert site.engine.asked[0].prompt_ids == site.tokenizer.encode_chat(expected)


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{number}", "call_id": f"c{number}", "name": "f", "arguments": "{}",
            "status": "completed"}


def result(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": f"r{number}"}


def reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def says(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}


def in_chat(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}} for number in numbers]


def test_items_of_the_assistant_make_one_turn() -> None:
    assistant = {"role": "assistant"}
    tools = [{"role": "tool", "tool_call_id": f"c{number}", "content": f"r{number}"} for number in (1, 2)]
    together = {**assistant, "reasoning_content": "Hm.", "content": "See.", "tool_calls": in_chat(1, 2)}
    assert chat_of([reasoning("Hm."), says("See."), call(1), call(2), result(1), result(2)]) == [together, *tools]
    one, two = ({**assistant, "content": None, "tool_calls": in_chat(number)} for number in (1, 2))
    assert chat_of([call(1), result(1), call(2), result(2)]) == [one, tools[0], two, tools[1]]
    assert chat_of([call(1), says("See."), result(1)]) == [{**one, "content": "See."}, tools[0]]
    assert chat_of([call(1), reasoning("a"), reasoning("b"), call(2), result(2), result(1)]) == [
        {**assistant, "content": None, "reasoning_content": "a\nb", "tool_calls": in_chat(1, 2)}, tools[1], tools[0],
    ]
    assert chat_of([says("a"), says("b"), reasoning("c"), says("d")]) == [
        {**assistant, "content": "a"}, {**assistant, "content": "b"},
        {**assistant, "content": "d", "reasoning_content": "c"},
    ]
    user = {"role": "user", "content": "x"}
    assert chat_of([reasoning("a"), user, says("b")]) == [
        {**assistant, "content": None, "reasoning_content": "a"}, user, {**assistant, "content": "b"},
    ]


def test_forms_of_reasoning_and_outputs() -> None:
    summary = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}, {"type": "summary_text", "text": "b"}]}
    assert chat_of([{**summary, "encrypted_content": "x"}])[0]["reasoning_content"] == "a\nb"
    assert chat_of([{**summary, "content": [{"type": "reasoning_text", "text": "c"}]}])[0]["reasoning_content"] == "c"
    assert chat_of([{"type": "reasoning", "summary": []}])[0]["reasoning_content"] == ""
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    turn = chat_of([call(1), {**result(1), "output": parts}])[1]
    assert turn["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat_of([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}])[0]["content"] == "No."


def test_a_response_can_be_given_back(site: Site, marks: None) -> None:
    """All items of an output are input, as the client dumps them."""
    site.engine.script = Script(text=THOUGHT)
    output = site.client.responses.create(model=MODEL, input="Hi").output
    parsed = [{**item.to_dict(), "parsed_arguments": {}} if item.type == "function_call" else item.to_dict() for item in output]
    for items in ([item.model_dump() for item in output], [item.to_dict() for item in output], parsed):
        (turn,) = chat_of(items)
        assert (turn["reasoning_content"], turn["content"], len(turn["tool_calls"])) == ("Hm, a 🙂.", "Let me see.", 2)
    site.engine.script = Script()
    text: Any = site.client.responses.create(model=MODEL, input="Hi").output
    site.client.responses.create(model=MODEL, input=[*HI, *text, {"role": "user", "content": "x"}])
    expected = [*HI, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "x"}]
    assert site.engine.asked[-1].prompt_ids == site.tokenizer.encode_chat(expected)


# --- as a chat ---


def translated(**fields: Any) -> ChatTranslation:
    return translate(RESPONSE_FORM.read({"input": "Hi", **fields}))


def test_fields_become_those_of_a_chat() -> None:
    assert translated().fields == {"messages": HI}
    tool = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True,
            "allowed_callers": ["direct"], "defer_loading": False, "output_schema": None, "async": False}
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    named = {"type": "function", "function": {"name": "f"}}
    schema = {"name": "s", "schema": {"type": "object"}, "strict": True}
    assert translated(
        tools=[tool], tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False, max_output_tokens=5,
        text={"format": {"type": "json_schema", **schema, "description": None}, "verbosity": "low"},
        reasoning={"effort": "high", "summary": "auto"}, instructions="Be short.", temperature=0, stream=True, store=True,
        chat_template_kwargs={"enable_thinking": False}, **LOGPROBS,
    ).fields == {
        "messages": [{"role": "system", "content": "Be short."}, *HI], "max_completion_tokens": 5, "temperature": 0,
        "tools": [{"type": "function", "function": function}], "tool_choice": named, "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": schema}, "verbosity": "low", "reasoning_effort": "high",
        "logprobs": True, "top_logprobs": 2, "chat_template_kwargs": {"enable_thinking": False},
    }
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    assert translated(tool_choice=allowed).fields["tool_choice"] == {
        "type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]},
    }
    for kind in ("text", "json_object"):
        assert translated(text={"format": {"type": kind}}).fields["response_format"] == {"type": kind}
    assert [translated(tool_choice=choice).fields["tool_choice"] for choice in ("none", "required")] == ["none", "required"]


def test_fields_that_a_chat_has_too_are_of_the_same_type() -> None:
    for name in SHARED:
        own, chats = CreateResponse.model_fields[name], GenerationRequest.model_fields[name]
        assert (own.annotation, own.metadata, own.default) == (chats.annotation, chats.metadata, chats.default), name


@pytest.mark.parametrize(("param", "expected"), [
    ("messages", "input"), ("messages[0]", "instructions"), ("messages[0].content", "instructions"),
    ("messages[1].content", "input[0].content"), ("messages[2].tool_calls[0].function.arguments", "input[3].arguments"),
    ("messages[2].tool_calls[1].function.name", "input[4].name"), ("messages[2].reasoning_content", "input[1].content"),
    ("messages[2].content", "input[2].content"), ("messages[3].tool_call_id", "input[5].call_id"),
    ("messages[3].content[0].text", "input[5].output[0].text"),
    ("tools[3].function.parameters.function", "tools[3].parameters.function"), ("tools[0].function", "tools[0]"),
    ("tool_choice.function.name", "tool_choice.name"),
    ("tool_choice.allowed_tools.tools[0].function.name", "tool_choice.tools[0].name"),
    ("response_format.json_schema.schema.type", "text.format.schema.type"), ("response_format.type", "text.format.type"),
    ("reasoning_effort", "reasoning.effort"), ("max_completion_tokens", "max_output_tokens"), ("logprobs", "include"),
    ("verbosity", "text.verbosity"), ("top_logprobs", "top_logprobs"), ("model", "model"), ("temperature", "temperature"),
])
def test_a_chats_error_is_told_in_this_apis_names(param: str, expected: str) -> None:
    user = {"role": "user", "content": "x"}
    items = [user, reasoning("a"), says("b"), call(1), call(2), {**result(1), "output": [{"type": "input_text", "text": "x"}]}]
    error = translated(input=items, instructions="c").renamed(ContextExceeded(f"{param}: is wrong", param=param))
    assert (error.param, str(error), type(error)) == (expected, f"{expected}: is wrong", ContextExceeded)
    assert translated().renamed(error := InvalidRequest("no field")) is error


def test_tokens_that_have_written_a_text() -> None:
    def entries(*tokens: str) -> list[dict[str, Any]]:
        return [{"token": token, "bytes": list(token.encode())} for token in tokens]

    tokens = WritingTokens()
    tokens.add(entries("<think>", "a", "b</"))
    assert names(tokens.take("ab", follows=False)) == ["a", "b</"]
    tokens.add(entries("think>", "c", "d<"))
    assert names(tokens.take("cd", follows=False)) == ["c", "d<"]
    tokens.add(entries("b", "", ">"))
    assert names(tokens.take("<b>", follows=True)) == ["b", ">"], "the token of < was told with the text before"
    assert tokens.take("never written", follows=True) == []


# --- what is refused ---

WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "not stored here; give the conversation so far in input"),
    ({"conversation": "conv_1"}, "conversation", "not stored here"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "not stored here; give instructions and input"),
    ({"background": True}, "background", "can't be made in the background"),
    ({"truncation": "auto"}, "truncation", "refused and not cut"),
    ({"service_tier": "flex"}, "service_tier", "not supported"),
    ({"max_tokens": 5}, "max_tokens", "is max_output_tokens in this API"),
    ({"messages": HI}, "messages", "is input in this API"),
    ({"n": 2}, "n", "one output"),
    ({"colour": "red"}, "colour", "there is no such field"),
    ({"include": ["file_search_call.results"]}, "include[0]", "must be one of"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream=true"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage", ""),
    ({"max_output_tokens": 0}, "max_output_tokens", ""),
    ({"max_output_tokens": 100_000}, "max_output_tokens", "ask for at most"),
    ({"input": "x" * 100_000}, "input", "maximum context length"),
    ({"metadata": {"a": 1}}, "metadata", "must be a string"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'web_search' are not there"),
    ({"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type", "'mcp' are not there"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools[0].function", "fields of the tool itself"),
    ({"tools": [{"type": "function", "name": "f", "colour": 1}]}, "tools[0].colour", "no such field"),
    ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading", "not supported"),
    ({"tools": ["f"]}, "tools[0]", "must be an object"),
    ({"tools": {}}, "tools", "must be a list"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "must be a name"),
    ({"tools": [{"type": "function", "name": "f", "parameters": 1}]}, "tools[0].parameters", "must be an object"),
    ({"tools": [WEATHER, WEATHER]}, "tools[1].name", "two tools called weather"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "news"}}, "tool_choice.name", "none of the tools"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "news"}]},
      "tools": [WEATHER]}, "tool_choice.tools[0].name", "none of the tools"),
    ({"tool_choice": "required"}, "tool_choice", "is for requests with tools"),
    ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema", "is missing"),
    ({"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "nothing"}}}}, "text.format.schema", ""),
    ({"text": {"format": {"type": "json_schema", "name": 1, "schema": {}}}}, "text.format.name", ""),
    ({"tool_choice": "always"}, "tool_choice", "must be none, auto, required"),
    ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice", "function or allowed_tools"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.name", "name of a tool"),
    ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}}, "tool_choice.tools[0]", ""),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "must be text, json_object or json_schema"),
    ({"text": {"format": {"type": "json_object", "schema": {}}}}, "text.format.schema", "no such field"),
    ({"text": {"format": "text"}}, "text.format", ""),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"reasoning": {"summary": "long"}}, "reasoning.summary", "'auto'"),
    ({"input": []}, "input", "has no items"),
    ({"input": None}, "input", ""),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]", "give the item itself"),
    ({"input": [{"id": "msg_1"}]}, "input[0]", "give the item itself"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type", "'web_search_call'"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "must be one of"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0].type",
     "the model reads text"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text", "is missing"),
    ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
    ({"input": [{"role": "user", "content": "x", "name": "bob"}]}, "input[0].name", "no such field"),
    ({"input": [result(1)]}, "input[0].call_id", "there is no function_call with the call_id 'c1'"),
    ({"input": [call(1), call(1)]}, "input[1].call_id", "already"),
    ({"input": [{"type": "function_call", "call_id": "a", "name": "f"}]}, "input[0].arguments", "is missing"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content", "encrypted it"),
    ({"input": [{"type": "reasoning", "summary": ["x"]}]}, "input[0].summary[0]", "summary_text"),
    ({"input": HI * 5000}, "input", "at most 4096"),
    ({"model": "nobody"}, "model", ""),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_refused(site: Site, fields: dict[str, Any], param: str, message: str) -> None:
    reply = send(site.port, PATH, {"model": MODEL, "input": "Hi", **fields})
    assert reply.status == (404 if param == "model" else 400), reply.text
    assert reply.error["param"] == param
    assert message in reply.error["message"], reply.error
    assert not site.engine.asked


def test_a_chats_errors_name_the_responses_fields(site: Site) -> None:
    deep = "x" * 100_000
    items = [{"role": "user", "content": "a"}, says("b"), {"role": "user", "content": [{"type": "input_text", "text": deep}]}]
    reply = send(site.port, PATH, {"input": items})
    assert (reply.error["param"], reply.error["code"]) == ("input", "context_length_exceeded")
    many = {"input": "Hi", "max_output_tokens": 4, "include": LOGPROBS["include"], "stop": ["x" * 5000]}
    assert send(site.port, PATH, many).error["param"] == "stop"


@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/v1/responses/resp_1"), ("DELETE", "/v1/responses/resp_1"), ("POST", "/v1/responses/resp_1/cancel"),
    ("GET", "/v1/responses/resp_1/input_items"),
])
def test_nothing_is_stored(site: Site, method: str, path: str) -> None:
    client = site.client
    calls: dict[tuple[str, bool], Any] = {
        ("GET", False): client.responses.retrieve, ("DELETE", False): client.responses.delete,
        ("POST", False): client.responses.cancel, ("GET", True): client.responses.input_items.list,
    }
    with pytest.raises(openai.NotFoundError, match="not stored here"):
        calls[method, path.endswith("items")]("resp_1")


# --- what goes wrong ---


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status"), [
    (CapacityError("too many"), 429), (EngineUnavailable("the engine died"), 503), (CoserveError("it stopped"), 500),
])
def test_errors_before_the_first_token(site: Site, error: CoserveError, status: int, stream: bool) -> None:
    site.engine.script = Script(error=error)
    reply = send(site.port, PATH, {"input": "Hi", "stream": stream})
    assert (reply.status, reply.error["message"]) == (status, str(error))
    assert ("retry-after" in reply.headers) == (status in (429, 503))


def test_an_error_inside_a_stream(site: Site) -> None:
    """The response fails, and an event follows that makes clients raise."""
    site.engine.script = Script(error=EngineUnavailable("the engine process died"), error_at=4)
    reply = send(site.port, PATH, {"input": "Hi", "stream": True})
    *_, done, failed, last = events_of(reply)
    assert (done["type"], done["item"]["status"]) == ("response.output_item.done", "incomplete")
    assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
    assert failed["response"]["error"] == {"code": "server_error", "message": "the engine process died"}
    assert failed["response"]["output"] == [done["item"]] and ANSWER.startswith(done["item"]["content"][0]["text"])
    assert (last["type"], last["message"], last["error"]["code"]) == ("error", "the engine process died", "engine_unavailable")
    with pytest.raises(openai.APIError, match="the engine process died"):
        list(site.client.responses.create(model=MODEL, input="Hi", stream=True))
    site.engine.script = Script(error=CapacityError("too many"), error_at=1)
    assert events_of(send(site.port, PATH, {"input": "Hi", "stream": True}))[-2]["response"]["error"]["code"] == (
        "rate_limit_exceeded"
    )
    bug: Any = RuntimeError("secret")
    site.engine.script = Script(error=bug, error_at=1)
    reply = send(site.port, PATH, {"input": "Hi", "stream": True})
    assert events_of(reply)[-1]["type"] == "error" and "secret" not in reply.text


def test_an_error_after_silence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "OPEN_S", 0.05)
    site.engine.script = Script(error=CapacityError("too many"), interval_s=0.3)
    (event,) = events_of(send(site.port, PATH, {"input": "Hi", "stream": True}))
    assert (event["type"], event["message"], event["code"]) == ("error", "too many", "rate_limit_exceeded")
    with pytest.raises(openai.APIError, match="too many"):
        list(site.client.responses.create(model=MODEL, input="Hi", stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_cancel(site: Site, stream: bool) -> None:
    site.engine.script = Script(interval_s=0.2)
    connection = post(site.port, PATH, {"input": "Hi", "stream": stream})
    wait_for(lambda: bool(site.engine.asked))
    if stream:
        assert connection.recv(100)
    connection.close()
    wait_for(lambda: site.engine.asked[0].cancelled, seconds=3)
    site.assert_counted("cancelled")


def test_keys_and_tenants(site: Site) -> None:
    assert send(site.port, PATH, {"input": "Hi"}, key="wrong").status == 401
    assert send(site.port, f"{PATH}/resp_1", key="wrong").status == 401
    assert send(site.port, PATH, {"input": "Hi"}, key="key-other").status == 200
    assert site.engine.asked[0].tenant == "other"
    assert send(site.port, PATH, {"input": "Hi", "model": ADAPTER}, key="key-other").status == 404


def test_long_responses_with_logprobs(site: Site) -> None:
    """They are encoded beside the event loop, and are whole."""
    site.engine.script = Script(text="word " * 300)
    body = {"input": "Hi", "max_output_tokens": 400, **LOGPROBS}
    whole = send(site.port, PATH, body).json
    last = events_of(send(site.port, PATH, {**body, "stream": True}))[-1]["response"]
    assert without_ids(last) == without_ids(whole)
    assert len(whole["output"][0]["content"][0]["logprobs"]) > 300


def test_long_inputs_become_chats_beside_the_event_loop(site: Site) -> None:
    items = [{"role": "user" if number % 2 else "assistant", "content": ""} for number in range(70)]
    assert send(site.port, PATH, {"input": items}).status in (200, 400)
    wrong = [*items, {"role": "user", "content": [{"type": "input_file"}]}]
    assert send(site.port, PATH, {"input": wrong}).error["param"] == "input[70].content[0].type"


@pytest.fixture(autouse=True)
def nothing_left(site: Site) -> Iterator[None]:
    yield
    wait_for(lambda: all(meter.ends for meter in site.metrics.meters))
