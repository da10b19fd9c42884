"""Tools and calls of tools, as requests and training data write them: OpenAI's function tools.

    tool    {"type": "function", "function": {"name": "weather", "description": "...", "parameters": {JSON schema}}}
    call    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}}

A chat template sees the same, with arguments as an object. Owns: the checks, and their messages. Does not own: how a model
writes a call, and where requests and lines of data have them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from coserve.config.values import is_nested_deeper, shown
from coserve.core import invalid_field

MAX_TOOLS = 128
"""Of a request, and calls of a message."""
_MAX_DEPTH = 100
"""Of objects and lists within each other, in parameters and in arguments."""
_NAME = re.compile(r"[\w.:/-]{1,128}")
_TOOL_KEYS = ("name", "description", "parameters", "strict")


def read_tools(value: Any, place: str) -> list[dict[str, Any]]:
    """A checked list of tools, without null fields. Raises InvalidRequest, whose message begins with the field's place."""
    tools = [_tool(item, f"{place}[{number}]") for number, item in enumerate(_list(value, place))]
    names = [tool["function"]["name"] for tool in tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise invalid_field(f"{place}[{number}].function.name", f"there are two tools called {name}; rename one")
    return tools


def read_calls(value: Any, place: str, *, any_arguments: bool) -> list[dict[str, Any]]:
    """A checked list of an assistant's calls, with arguments as objects. any_arguments: whether arguments may be a text that is
    no JSON object, as a model may have written it, and are kept as that text. Raises InvalidRequest."""
    return [_call(item, f"{place}[{number}]", any_arguments) for number, item in enumerate(_list(value, place))]


def read_arguments(value: Any, place: str, *, any_arguments: bool) -> Any:
    """The arguments of a call, given as JSON text or as an object. See `read_calls`."""
    if isinstance(value, str):
        try:
            read = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            read = value
        value = read if isinstance(read, dict) and not is_nested_deeper(read, _MAX_DEPTH) else value if any_arguments else read
    if isinstance(value, dict) and is_nested_deeper(value, _MAX_DEPTH):
        raise invalid_field(place, f"more than {_MAX_DEPTH} objects and lists within each other")
    if isinstance(value, dict) or (any_arguments and isinstance(value, str)):
        return value
    raise invalid_field(place, f"must be a JSON object, or its text, got {shown(value)}")


def _tool(value: Any, place: str) -> dict[str, Any]:
    kind = _object(value, place).get("type")
    if kind != "function":
        raise invalid_field(f"{place}.type", f'must be "function", got {shown(kind)}; other tools are not supported')
    function = {key: item for key, item in _object(value.get("function"), f"{place}.function").items() if item is not None}
    place = f"{place}.function"
    for key in function:
        if key not in _TOOL_KEYS:
            raise invalid_field(f"{place}.{shown(key)}", f"there is no such field; known: {', '.join(_TOOL_KEYS)}")
    _name(function.get("name"), f"{place}.name")
    if not isinstance(function.get("description", ""), str):
        raise invalid_field(f"{place}.description", "must be a text")
    if not isinstance(function.get("strict", False), bool):
        raise invalid_field(f"{place}.strict", "must be true or false")
    if is_nested_deeper(_object(function.get("parameters", {}), f"{place}.parameters"), _MAX_DEPTH):
        raise invalid_field(f"{place}.parameters", f"more than {_MAX_DEPTH} objects and lists within each other")
    return {"type": "function", "function": function}


def _call(value: Any, place: str, any_arguments: bool) -> dict[str, Any]:
    call = _object(value, place)
    if call.get("type", "function") != "function":
        raise invalid_field(f"{place}.type", f'must be "function", got {shown(call["type"])}')
    function = _object(call.get("function"), f"{place}.function")
    name = _name(function.get("name"), f"{place}.function.name")
    arguments = read_arguments(function.get("arguments") or {}, f"{place}.function.arguments", any_arguments=any_arguments)
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    identity = call.get("id")
    if identity is not None and not isinstance(identity, str):
        raise invalid_field(f"{place}.id", f"must be a text, got {shown(identity)}")
    return read if identity is None else {"id": identity, **read}


def _name(value: Any, place: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise invalid_field(place, f"must be a name of at most 128 letters, digits, or any of _ . : / -, got {shown(value)}")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise invalid_field(place, f"must be a list, got {shown(value)}")
    if len(value) > MAX_TOOLS:
        raise invalid_field(place, f"at most {MAX_TOOLS}, got {len(value)}")
    return value


def _object(value: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise invalid_field(place, "is missing" if value is None else f"must be an object, got {shown(value)}")
    return value
