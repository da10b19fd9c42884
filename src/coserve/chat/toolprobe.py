"""What a chat template does with tools, found by trying: a made-up tool, a call of it, its result.

    tools      the tool's name is in what it renders                               else text is put into the system message
    calls      the call's name is, and one of the formats reads the call again     else the format is unknown, and so are tools
               the name is not                                                     the format is the one that its source tells
    results    the result is

Owns: these trials. Does not own: what follows from them (toolprompt.py), the formats (toolformats/).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coserve.chat.toolformats.events import ArgumentsEvent, CallEvent
from coserve.chat.toolformats.formats import FORMATS
from coserve.chat.toolprompt import HERMES, Message, ToolPrompt

Render = Callable[[Sequence[Message], Mapping[str, Any]], str | None]
"""(messages, variables) -> what a template renders of them, None if it refuses them."""

_NAME, _RESULT = "qzx_probe", "qzx-result"
_ARGUMENTS = {"place": "x"}
_TOOL: Mapping[str, Any] = {"type": "function", "function": {
    "name": _NAME, "description": "x", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "description": "x"}}, "required": ["place"],
    },
}}
_CALL: Mapping[str, Any] = {"id": "qzxprobe1", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
_QUESTION: Message = {"role": "user", "content": "x"}
_CALLING: Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_TOLD: Mapping[str, Mapping[str, Any]] = {"tools": {"tools": [_TOOL]}, "xml_tools": {"xml_tools": [_TOOL["function"]]}}
"""Variables that templates read tools from."""
_MARKERS = (
    ("<function=", "qwen3_xml"), ("[TOOL_CALLS]", "mistral"), ("<tool_call>", HERMES), ("<|tool_call|>", "granite"),
    ("<|python_tag|>", "llama3_json"),
)
"""What templates write around calls, and the format that it tells: the first one that is found."""


def probe_tools(render: Render, source: str, call_format: str | None, *, system: bool) -> ToolPrompt:
    """source: of the template. call_format: how the model writes calls; None: as is found. system: whether the template renders
    a system message."""
    told = next((name for name, variables in _TOLD.items() if _NAME in (render([_QUESTION], variables) or "")), None)
    calls = render([_QUESTION, _CALLING], {})
    if call_format is None:
        call_format = _format_in(calls) if calls and _NAME in calls else format_of(source)
    if told is None or call_format is None:
        return ToolPrompt(call_format=HERMES, tools=False, calls=False, results=False, system=system)
    answer = {"role": "tool", "content": _RESULT, "tool_call_id": _CALL["id"], "name": _NAME}
    results = render([_QUESTION, _CALLING, answer], {})
    several = render([_QUESTION, {**_CALLING, "tool_calls": [_CALL, {**_CALL, "id": "qzxprobe2"}]}], {})
    return ToolPrompt(
        call_format=call_format, tools=True, calls=calls is None or _NAME in calls,
        results=results is None or _RESULT in results, system=system, several=calls is None or several is not None,
        tools_variable=told,
    )


def format_of(source: str) -> str | None:
    """The format that a template's source tells; None: unknown."""
    return next((name for marker, name in _MARKERS if marker in source), None)


def _format_in(text: str) -> str | None:
    """The format of the call in a rendered conversation; None if it is none that is known."""
    return next((name for name in FORMATS if _reads(name, text)), None)


def _reads(name: str, text: str) -> bool:
    """Whether a format reads the call in a rendered conversation, and no other one."""
    if name == "llama3_json":  # a call that has no marker begins a turn
        text = text[text.find('{"name"') :] if '"parameters"' in text else ""
    reader = FORMATS[name].new_strict_reader([_TOOL])
    events = [*reader.push(text), *reader.finish()]
    arguments = "".join(event.text for event in events if isinstance(event, ArgumentsEvent))
    if [event.name for event in events if isinstance(event, CallEvent)] != [_NAME]:
        return False
    try:
        return bool(json.loads(arguments) == _ARGUMENTS)
    except ValueError:
        return False
