"""The fields of a chat request about tools: OpenAI's, and those that it had before, `functions` and `function_call`.

    tools, tool_choice, parallel_tool_calls      ->  ToolUse
    functions, function_call                     ->  the same; the answer then has OpenAI's old form

Owns: which tools there are, which may or must be called. Does not own: what a tool may say (chat/tools.py), messages
(toolturns.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from coserve.chat.tools import MAX_TOOLS, read_tools
from coserve.config.values import shown
from coserve.core import InvalidRequest, invalid_field

_MODES = ("none", "auto", "required")
_FUNCTION: dict[str, Any] = {
    "type": "object", "required": ["name"], "additionalProperties": False, "properties": {
        "name": {"type": "string"}, "description": {"type": "string"}, "parameters": {"type": "object"},
        "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
}
TOOLS_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "array", "maxItems": MAX_TOOLS, "items": {
    "type": "object", "required": ["type", "function"], "properties": {"type": {"const": "function"}, "function": _FUNCTION},
}}, {"type": "null"}]}
_NAMED_FUNCTION: dict[str, Any] = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
_NAMED_TOOL: dict[str, Any] = {
    "type": "object", "required": ["type", "function"],
    "properties": {"type": {"const": "function"}, "function": _NAMED_FUNCTION},
}
_ALLOWED_TOOLS: dict[str, Any] = {
    "type": "object", "required": ["type", "allowed_tools"],
    "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": {
        "type": "object", "required": ["mode", "tools"], "properties": {
            "mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "minItems": 1, "items": _NAMED_TOOL},
        },
    }},
}
TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_TOOL, _ALLOWED_TOOLS, {"type": "null"}],
}
FUNCTIONS_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "array", "maxItems": MAX_TOOLS, "items": _FUNCTION}, {"type": "null"}]}
FUNCTION_CALL_SCHEMA: dict[str, Any] = {"anyOf": [{"enum": ["none", "auto"]}, _NAMED_FUNCTION, {"type": "null"}]}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """What a request says about tools, checked.

    tools: all that the model is told of. callable: those of them that it may call; none: its text is read as plain text.
    required: whether it must call at least one. named: whether the request names the tool that must be called, once.
    parallel: whether it may write several calls. old: whether the request has OpenAI's old fields.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    callable: Sequence[Mapping[str, Any]] = ()
    required: bool = False
    named: bool = False
    parallel: bool = True
    old: bool = False

    @property
    def restricted(self) -> bool:
        """Whether the model may call some of the tools only."""
        return len(self.callable) < len(self.tools)


NO_TOOL_USE = ToolUse()


def read_tool_use(
    tools: Any, tool_choice: Any, parallel: bool | None, functions: Any, function_call: Any
) -> ToolUse:
    """The fields of a request, None where it doesn't have them. Raises InvalidRequest, naming the field."""
    if functions is not None or function_call is not None:
        for name, value in (("tools", tools), ("tool_choice", tool_choice), ("parallel_tool_calls", parallel)):
            if value is not None:
                raise invalid_field(name, "can't stand beside functions or function_call, its old form; leave those out")
        return _old(functions, function_call)
    found = [] if tools is None else read_tools(tools, "tools")
    if not found:
        if tool_choice not in (None, "none", "auto"):
            raise invalid_field("tool_choice", "is for requests with tools; give some, or leave it out")
        return NO_TOOL_USE
    use = _choice(tool_choice, found)
    return use if parallel is not False else replace(use, parallel=False)


def _choice(choice: Any, tools: Sequence[Mapping[str, Any]]) -> ToolUse:
    place = "tool_choice"
    if choice is None or choice == "auto":
        return ToolUse(tools=tools, callable=tools)
    if choice == "none":
        return ToolUse(tools=tools)
    if choice == "required":
        return ToolUse(tools=tools, callable=tools, required=True)
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        return ToolUse(tools=tools, callable=[_pick(choice, place, tools)], required=True, named=True, parallel=False)
    if kind == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), f"{place}.allowed_tools", tools)
    raise invalid_field(place, f'must be {", ".join(_MODES)}, or {{"type": "function", "function": {{"name": NAME}}}}, got '
                        f"{shown(choice)}")


def _allowed(value: Any, place: str, tools: Sequence[Mapping[str, Any]]) -> ToolUse:
    """OpenAI's allowed_tools: the model is told of all tools, and may call some."""
    if not isinstance(value, Mapping):
        raise invalid_field(place, 'must be an object with mode and tools')
    mode, listed = value.get("mode"), value.get("tools")
    if mode not in ("auto", "required"):
        raise invalid_field(f"{place}.mode", f"must be auto or required, got {shown(mode)}")
    if not isinstance(listed, list) or not listed:
        raise invalid_field(f"{place}.tools", "must be a list of at least one tool")
    picked = {_name(_pick(item, f"{place}.tools[{number}]", tools)) for number, item in enumerate(listed)}
    return ToolUse(tools=tools, callable=[tool for tool in tools if _name(tool) in picked], required=mode == "required")


def _old(functions: Any, choice: Any) -> ToolUse:
    """OpenAI's old fields. The old form has one call at most."""
    listed = functions if isinstance(functions, list) else [] if functions is None else None
    if listed is None:
        raise invalid_field("functions", f"must be a list, got {shown(functions)}")
    try:
        tools = read_tools([{"type": "function", "function": item} for item in listed], "functions")
    except InvalidRequest as error:
        place = (error.param or "functions").replace("].function", "]", 1)
        raise invalid_field(place, str(error).partition(": ")[2]) from error
    if not tools:
        if choice not in (None, "none", "auto"):
            raise invalid_field("function_call", "is for requests with functions; give some, or leave it out")
        return ToolUse(old=True)
    if choice is None or choice in ("none", "auto"):
        use = _choice(choice, tools)
    elif isinstance(choice, Mapping):
        named = _pick({"type": "function", "function": choice}, "function_call", tools)
        use = ToolUse(tools=tools, callable=[named], required=True, named=True, parallel=False)
    else:
        raise invalid_field("function_call", f'must be none, auto, or {{"name": NAME}}, got {shown(choice)}')
    return replace(use, parallel=False, old=True)


def _pick(value: Any, place: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The tool that {"type": "function", "function": {"name": ...}} names."""
    function = value.get("function") if isinstance(value, Mapping) and value.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    field = f"{place}.name" if place == "function_call" else f"{place}.function.name"
    if not isinstance(name, str):
        raise invalid_field(field, 'is missing; write {"type": "function", "function": {"name": NAME}}')
    for tool in tools:
        if _name(tool) == name:
            return tool
    raise invalid_field(field, f"{shown(name)} is none of the tools of the request")


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])
