"""What agents' clients do with a server, as a program: `python agent_clients.py CASE URL MODEL`.

Each case uses one client unmodified: text, a stream, structured output, and a tool's round trip, in which a call is forced and
its result given back. The model may be any: schemas leave it no other choice than a few words. The program needs only the
client that the case is about, so that it runs in an environment of its own; a failed assertion ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import pydantic

os.environ |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LANGSMITH_TRACING": "false", "OPENAI_AGENTS_DISABLE_TRACING": "1"}
KEY = "EMPTY"
QUESTION = "What is the weather in Oslo?"
SHORT = 24
"""Tokens of an answer that nothing bounds."""
MUCH = 200
"""Tokens that a call or an object fits into."""


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome"]
    unit: Literal["C", "F"]


PARAMETERS = {
    "type": "object", "additionalProperties": False, "required": ["city", "unit"],
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}, "unit": {"type": "string", "enum": ["C", "F"]}},
}
FUNCTION = {"name": "weather", "description": "The weather in a city.", "parameters": PARAMETERS, "strict": True}
CHAT_TOOLS: Any = [{"type": "function", "function": FUNCTION}]
FLAT_TOOLS: Any = [{"type": "function", **FUNCTION}]


def check(arguments: str | dict[str, Any]) -> str:
    """Checks a call's arguments; the result of the call."""
    found = Weather.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments)
    return f"12 degrees {found.unit} in {found.city}"


# --- openai ---


def openai_chat(url: str, model: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    messages: Any = [{"role": "user", "content": QUESTION}]
    word: Any = {"structured_outputs": {"choice": ["Rain.", "Sun."]}}  # the client raises where a stream ends by its length
    with client.chat.completions.stream(model=model, messages=messages, max_tokens=MUCH, extra_body=word) as stream:
        deltas = "".join(event.delta for event in stream if event.type == "content.delta")
        message = stream.get_final_completion().choices[0].message
    assert deltas == message.content and deltas in ("Rain.", "Sun.")

    parsed = client.chat.completions.parse(model=model, messages=messages, max_tokens=MUCH, response_format=Weather)
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    with client.chat.completions.stream(model=model, messages=messages, max_tokens=MUCH, response_format=Weather) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)

    tool = openai.pydantic_function_tool(Weather, name="weather")
    for _ in range(2):
        answer = client.chat.completions.parse(
            model=model, messages=messages, tools=[tool], tool_choice="required", max_tokens=MUCH, parallel_tool_calls=False,
        ).choices[0]
        (call,) = answer.message.tool_calls or []
        assert answer.finish_reason == "tool_calls" and isinstance(call.function.parsed_arguments, Weather)
        result = {"role": "tool", "tool_call_id": call.id, "content": check(call.function.arguments)}
        messages += [answer.message, result]
    with client.chat.completions.stream(
        model=model, messages=messages, tools=[tool], tool_choice={"type": "function", "function": {"name": "weather"}},
        max_tokens=MUCH, parallel_tool_calls=False,
    ) as stream:
        arguments = "".join(event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta")
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert arguments == call.function.arguments and check(arguments)
    last = client.chat.completions.create(
        model=model, messages=messages, tools=CHAT_TOOLS, tool_choice="none", max_tokens=SHORT
    ).choices[0]
    assert last.finish_reason in ("stop", "length") and not last.message.tool_calls


def openai_responses(url: str, model: str) -> None:
    import openai

    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)
    items: Any = [{"role": "user", "content": QUESTION}]
    whole = client.responses.create(model=model, input=items, max_output_tokens=SHORT, instructions="Be short.")
    assert whole.status in ("completed", "incomplete") and whole.usage is not None
    assert whole.usage.output_tokens <= SHORT
    events = list(client.responses.create(model=model, input=QUESTION, max_output_tokens=SHORT, stream=True))
    end: Any = events[-1]
    assert (events[0].type, end.type) == ("response.created", f"response.{end.response.status}")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == end.response.output_text

    parsed = client.responses.parse(model=model, input=items, max_output_tokens=MUCH, text_format=Weather)
    assert isinstance(parsed.output_parsed, Weather)
    with client.responses.stream(model=model, input=items, max_output_tokens=MUCH, text_format=Weather) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Weather)

    for streamed in (False, True):
        asked: dict[str, Any] = {
            "model": model, "input": items, "tools": FLAT_TOOLS, "tool_choice": "required", "max_output_tokens": MUCH,
            "parallel_tool_calls": False, "store": False,
        }
        if streamed:
            with client.responses.stream(**asked) as stream:
                deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
                response: Any = stream.get_final_response()
        else:
            response = client.responses.create(**asked)
        (call,) = [item for item in response.output if item.type == "function_call"]
        assert call.name == "weather" and (not streamed or "".join(deltas) == call.arguments)
        result = {"type": "function_call_output", "call_id": call.call_id, "output": check(call.arguments)}
        items += [*response.output, result]
    last = client.responses.create(model=model, input=items, tools=FLAT_TOOLS, tool_choice="none", max_output_tokens=SHORT)
    assert [item.type for item in last.output] == ["message"]


# --- litellm ---


def litellm_chat(url: str, model: str) -> None:
    import litellm

    common: dict[str, Any] = {"model": f"openai/{model}", "api_base": url, "api_key": KEY}
    messages: Any = [{"role": "user", "content": QUESTION}]
    whole: Any = litellm.completion(**common, messages=messages, max_tokens=SHORT)
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens <= SHORT
    chunks = list(litellm.completion(**common, messages=messages, max_tokens=SHORT, stream=True))
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")

    parsed: Any = litellm.completion(**common, messages=messages, max_tokens=MUCH, response_format=Weather)
    check(parsed.choices[0].message.content)
    for streamed in (False, True):
        answer: Any = litellm.completion(
            **common, messages=messages, tools=CHAT_TOOLS, tool_choice="required", max_tokens=MUCH, stream=streamed,
        )
        if streamed:
            answer = litellm.stream_chunk_builder(list(answer), messages=messages)
        calls = answer.choices[0].message.tool_calls
        assert answer.choices[0].finish_reason == "tool_calls" and calls
        results = [
            {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": check(call.function.arguments)}
            for call in calls
        ]
        messages += [answer.choices[0].message.model_dump(), *results]
    last: Any = litellm.completion(**common, messages=messages, tools=CHAT_TOOLS, max_tokens=SHORT)
    assert last.choices[0].message.role == "assistant"


def litellm_responses(url: str, model: str) -> None:
    import litellm

    common: dict[str, Any] = {"model": f"openai/{model}", "api_base": url, "api_key": KEY}
    items: Any = [{"role": "user", "content": QUESTION}]
    whole: Any = litellm.responses(**common, input=items, max_output_tokens=SHORT)
    assert whole.status in ("completed", "incomplete") and whole.output
    events: Any = list(litellm.responses(**common, input=items, max_output_tokens=SHORT, stream=True))
    assert events[-1].type in ("response.completed", "response.incomplete")
    answer: Any = litellm.responses(
        **common, input=items, tools=FLAT_TOOLS, tool_choice="required", max_output_tokens=MUCH, parallel_tool_calls=False,
    )
    (call,) = [item for item in answer.output if item.type == "function_call"]
    items += [
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": check(call.arguments)},
    ]
    assert litellm.responses(**common, input=items, tools=FLAT_TOOLS, tool_choice="none", max_output_tokens=SHORT).output


# --- LangChain ---


def _langchain(url: str, model: str, **options: Any) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    @tool
    def weather(city: Literal["Oslo", "Rome"], unit: Literal["C", "F"]) -> str:
        """The weather in a city."""
        return check({"city": city, "unit": unit})

    def chat(most: int) -> ChatOpenAI:
        return ChatOpenAI(base_url=url, api_key=KEY, model=model, max_retries=0, max_tokens=most, **options)

    messages: list[Any] = [HumanMessage(QUESTION)]
    assert chat(SHORT).invoke(messages).usage_metadata["output_tokens"] <= SHORT
    assert len(list(chat(SHORT).stream(messages))) > 1
    for method in ("json_schema", "function_calling"):
        structured = chat(MUCH).with_structured_output(Weather, method=method)
        assert isinstance(structured.invoke(messages), Weather), method
    for strict in (True, None):
        bound = chat(MUCH).bind_tools([weather], tool_choice="any", strict=strict, parallel_tool_calls=False)
        answer = bound.invoke(messages)
        (call,) = answer.tool_calls
        assert call["name"] == "weather"
        messages += [answer, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    gathered: Any = None
    for chunk in chat(MUCH).bind_tools([weather], tool_choice="weather", parallel_tool_calls=False).stream(messages):
        gathered = chunk if gathered is None else gathered + chunk
    (call,) = gathered.tool_calls
    messages += [gathered, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert chat(SHORT).bind_tools([weather]).invoke(messages).type == "ai"


def langchain_chat(url: str, model: str) -> None:
    _langchain(url, model)


def langchain_responses(url: str, model: str) -> None:
    _langchain(url, model, use_responses_api=True)


# --- OpenAI's Agents SDK ---


def _agents(url: str, model: str, api: Literal["responses", "chat"]) -> None:
    import agents
    import openai

    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)
    made: Any = agents.OpenAIResponsesModel if api == "responses" else agents.OpenAIChatCompletionsModel
    asked: list[str] = []

    @agents.function_tool
    def weather(city: Literal["Oslo", "Rome"], unit: Literal["C", "F"]) -> str:
        """The weather in a city."""
        asked.append(city)
        return check({"city": city, "unit": unit})

    def agent(most: int, **options: Any) -> Any:
        settings = agents.ModelSettings(max_tokens=most, **options.pop("settings", {}))
        return agents.Agent(
            name="Helper", instructions="Be short.", model=made(model=model, openai_client=client), model_settings=settings,
            **options,
        )

    async def play() -> None:
        found = await agents.Runner.run(agent(MUCH, output_type=Weather), QUESTION)
        assert isinstance(found.final_output, Weather)
        forced = agent(
            MUCH, tools=[weather], settings={"tool_choice": "required", "parallel_tool_calls": False},
            tool_use_behavior="stop_on_first_tool",
        )
        found = await agents.Runner.run(forced, QUESTION)
        assert "degrees" in found.final_output and len(asked) == 1
        streamed = agents.Runner.run_streamed(forced, [*found.to_input_list(), {"role": "user", "content": "And now?"}])
        kinds = [event.type async for event in streamed.stream_events()]
        assert "raw_response_event" in kinds and "degrees" in streamed.final_output and len(asked) == 2
        both = agent(MUCH, tools=[weather], settings={"tool_choice": "required"}, output_type=Weather)
        found = await agents.Runner.run(both, QUESTION, max_turns=8)
        assert isinstance(found.final_output, Weather) and len(asked) >= 3

    asyncio.run(play())


def agents_responses(url: str, model: str) -> None:
    _agents(url, model, "responses")


def agents_chat(url: str, model: str) -> None:
    _agents(url, model, "chat")


CASES: dict[str, tuple[str, Callable[[str, str], None]]] = {
    "openai chat": ("openai", openai_chat),
    "openai responses": ("openai", openai_responses),
    "litellm chat": ("litellm", litellm_chat),
    "litellm responses": ("litellm", litellm_responses),
    "langchain chat": ("langchain_openai", langchain_chat),
    "langchain responses": ("langchain_openai", langchain_responses),
    "agents responses": ("agents", agents_responses),
    "agents chat": ("agents", agents_chat),
}
"""{name: (the module that it needs, the case)}."""


if __name__ == "__main__":
    case, url, model = sys.argv[1:]
    CASES[case][1](url, model)
