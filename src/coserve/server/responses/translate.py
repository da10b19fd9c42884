"""A response's body as the body of a chat, and a chat's errors as the response's.

    instructions, input      messages                     max_output_tokens   max_completion_tokens
    tools (flat)             tools (with `function`)      text.format         response_format
    include, top_logprobs    logprobs, top_logprobs       reasoning.effort    reasoning_effort

Owns: both directions of these names. Does not own: what a chat takes: what it refuses is refused here, by the body's own name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.chat.messages import is_neutral
from coserve.config.values import shown
from coserve.core import CoserveError, invalid_field
from coserve.server.responses.body import SHARED, CreateResponse
from coserve.server.responses.items import ChatTurn, read_input

_CHOICES = ("none", "auto", "required")
_TOOL_FIELDS = ("name", "description", "parameters", "strict")
_TOOL_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],), "async": (False,), "defer_loading": (False,), "output_schema": (),
}
_FORMAT_FIELDS = ("name", "description", "schema", "strict")
_NAMES = (
    (re.compile(r"tool_choice\.allowed_tools"), "tool_choice"),
    (re.compile(r"response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"reasoning_effort"), "reasoning.effort"),
    (re.compile(r"verbosity"), "text.verbosity"),
    (re.compile(r"max_(completion_)?tokens"), "max_output_tokens"),
    (re.compile(r"logprobs"), "include"),
    (re.compile(r"messages(?!\[)"), "input"),
)
"""How a chat's field begins, and what it is called here."""
_TURN = re.compile(r"messages\[(\d+)\]")
_FUNCTION = re.compile(r"^(tools\[\d+\]|tool_choice|tool_choice\.allowed_tools\.tools\[\d+\]|"
                       r"messages\[\d+\]\.tool_calls\[\d+\])\.function(?=\.|$)")
"""What a chat has around the fields of a tool or call, and this API has not."""


@dataclass(frozen=True, slots=True)
class ChatTranslation:
    """fields: a chat's body. turns: where its messages are from."""

    fields: dict[str, Any]
    turns: Sequence[ChatTurn]

    def renamed(self, error: CoserveError) -> CoserveError:
        """A chat's error, about the field of the response's body that it comes from."""
        if error.param is None:
            return error
        name, message = self._name(error.param), str(error)
        if message.startswith(error.param):
            message = name + message[len(error.param):]
        message = re.sub(r"\bmax_(completion_)?tokens\b", "max_output_tokens", message)
        return type(error)(message, param=name)

    def _name(self, param: str) -> str:
        param = _FUNCTION.sub(r"\1", param)
        if (found := _TURN.match(param)) is not None and int(found[1]) < len(self.turns):
            places, rest = self.turns[int(found[1])].places, param[found.end():]
            start = max((start for start in places if rest.startswith(start)), key=len)
            return places[start] + rest[len(start):]
        for pattern, name in _NAMES:
            if (found := pattern.match(param)) is not None:
                return name + param[found.end():]
        return param


def translate(body: CreateResponse) -> ChatTranslation:
    """The body of the chat whose answer is the response. It is not streamed as a chat. Raises InvalidRequest."""
    body.check()
    turns = read_input(body.input)
    if body.instructions is not None:
        message = {"role": "system", "content": body.instructions}
        turns.insert(0, ChatTurn(message, {"": "instructions", ".content": "instructions"}))
    fields = {name: getattr(body, name) for name in SHARED}
    fields |= {
        "messages": [turn.message for turn in turns],
        "max_completion_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
    }
    if body.gives_logprobs:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.tools is not None:
        fields["tools"] = _tools(body.tools)
    if body.tool_choice is not None:
        fields["tool_choice"] = _tool_choice(body.tool_choice)
    if body.text is not None:
        fields["verbosity"] = body.text.verbosity
        if body.text.format is not None:
            fields["response_format"] = _response_format(body.text.format)
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    return ChatTranslation({name: value for name, value in fields.items() if value is not None}, turns)


def _tools(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise invalid_field("tools", f"must be a list of tools, got {shown(value)}")
    return [_tool(tool, f"tools[{number}]") for number, tool in enumerate(value)]


def _tool(value: Any, place: str) -> dict[str, Any]:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(kind, str):
        raise invalid_field(place, f"must be an object with a type, got {shown(value)}")
    if kind != "function":
        raise invalid_field(
            f"{place}.type", f'tools of type {shown(kind)} are not there, only those of type "function", which the client runs'
        )
    if "function" in value:
        raise invalid_field(
            f"{place}.function", "name, description, parameters and strict are fields of the tool itself in this API"
        )
    for name, item in value.items():
        if name not in ("type", *_TOOL_FIELDS, *_TOOL_NEUTRAL):
            raise invalid_field(f"{place}.{_named(name)}", f"there is no such field; known: {', '.join(_TOOL_FIELDS)}")
        if name in _TOOL_NEUTRAL and not is_neutral(item, _TOOL_NEUTRAL[name]):
            raise invalid_field(f"{place}.{name}", "is not supported; leave it out")
    return {"type": "function", "function": _given(value, _TOOL_FIELDS)}


def _tool_choice(value: Any) -> Any:
    if value in _CHOICES:
        return value
    kind = value.get("type") if isinstance(value, Mapping) else None
    match kind:
        case "function":
            return _chosen(value, "tool_choice")
        case "allowed_tools":
            _check_fields(value, ("type", "mode", "tools"), "tool_choice")
            tools = value.get("tools")
            if not isinstance(tools, list):
                raise invalid_field("tool_choice.tools", f"must be a list of tools, got {shown(tools)}")
            chosen = [_chosen(tool, f"tool_choice.tools[{number}]") for number, tool in enumerate(tools)]
            return {"type": "allowed_tools", "allowed_tools": {"mode": value.get("mode"), "tools": chosen}}
        case _:
            raise invalid_field(
                "tool_choice",
                f"must be {', '.join(_CHOICES)}, or an object of type function or allowed_tools, got {shown(value)}",
            )


def _chosen(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or value.get("type") != "function":
        raise invalid_field(place, f'must be an object with the type "function" and a name, got {shown(value)}')
    _check_fields(value, ("type", "name"), place)
    if not isinstance(value.get("name"), str):
        raise invalid_field(f"{place}.name", f"must be the name of a tool, got {shown(value.get('name'))}")
    return {"type": "function", "function": {"name": value["name"]}}


def _response_format(value: Mapping[str, Any]) -> dict[str, Any]:
    kind = value.get("type")
    match kind:
        case "text" | "json_object":
            _check_fields(value, ("type",), "text.format")
            return {"type": kind}
        case "json_schema":
            _check_fields(value, ("type", *_FORMAT_FIELDS), "text.format")
            return {"type": kind, "json_schema": _given(value, _FORMAT_FIELDS)}
        case _:
            raise invalid_field("text.format.type", f"must be text, json_object or json_schema, got {shown(kind)}")


def _given(value: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value[name] for name in names if value.get(name) is not None}


def _check_fields(value: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for name, item in value.items():
        if name not in known and item is not None:
            raise invalid_field(f"{place}.{_named(name)}", f"there is no such field; known: {', '.join(known)}")


def _named(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else shown(name)
