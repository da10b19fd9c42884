"""Tools, calls and results in training data: every way in which a line may write them becomes one.

    OpenAI         "tools": [...], "tool_calls": [...], {"role": "tool", "tool_call_id": ...}
    OpenAI, old    "functions": [...], "function_call": {...}, {"role": "function", "name": ...}
    TRL            "tools": a list of tools, or its JSON text
    LLaMA-Factory  "tools": JSON text of a list of functions; {"from": "function_call", "value": JSON}, {"from": "observation"}

Owns: these ways, which result answers which call. Does not own: what a tool and a call may say (coserve.chat.tools), other
fields of messages (turns.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from coserve.chat.messages import is_neutral
from coserve.chat.tools import read_calls, read_tools
from coserve.chat.trained import texts_in
from coserve.core import InvalidRequest
from coserve.finetune.jsonlines import LineError, kind, read_text, shown

Call = dict[str, Any]
EMPTY: tuple[Any, ...] = ([], {}, "")
"""Values of fields that say nothing, as null does."""
_THOUGHT = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)
"""What LLaMA-Factory allows before the JSON of a call."""


def read_line_tools(record: Mapping[str, Any], prefix: str) -> list[dict[str, Any]]:
    """The tools of a line, or of an object in it, in OpenAI's form. prefix: of fields' places. Raises LineError."""
    tools, functions = (_listed(record.get(name), prefix + name) for name in ("tools", "functions"))
    if tools and functions:
        raise LineError(f"{prefix}functions", "the line has tools too; leave out functions, their old form")
    return _checked(tools, f"{prefix}tools") if tools else _checked(functions, f"{prefix}functions")


def read_message_calls(message: Mapping[str, Any], place: str) -> list[Call]:
    """The calls of an assistant's message. Raises LineError, InvalidRequest."""
    given = {name: message.get(name) for name in ("tool_calls", "function_call")}
    calls, old = (None if is_neutral(value, EMPTY) else value for value in given.values())
    if calls is not None and old is not None:
        raise LineError(f"{place}.function_call", "the message has tool_calls too; leave out function_call, their old form")
    if old is not None:
        return _functions([old], f"{place}.function_call", numbered=False)
    return [] if calls is None else _whole(read_calls(calls, f"{place}.tool_calls", any_arguments=False), f"{place}.tool_calls")


def read_call_text(value: object, place: str) -> tuple[str, list[Call]]:
    """What ShareGPT's function_call says: the thoughts before it, as text, and the calls. Raises LineError, InvalidRequest."""
    if not isinstance(value, str):
        raise LineError(place, f"JSON of a call is expected, as text, got {kind(value)}")
    thought = _THOUGHT.match(value)
    before = thought[0] if thought else ""
    try:
        read = json.loads(value.removeprefix(before))
    except (ValueError, RecursionError) as error:
        raise LineError(
            place, f'not JSON ({error}); give {{"name": ..., "arguments": {{...}}}}, or a list of such objects, as text'
        ) from error
    calls = read if isinstance(read, list) else [read]
    if not calls:
        raise LineError(place, "an empty list; give at least one call")
    return before.strip(), _functions(calls, place, numbered=isinstance(read, list))


def link_calls(turns: Sequence[Mapping[str, Any]], place: str) -> list[dict[str, Any]]:
    """The turns of a conversation where every call has an id, and every result that answers a call has that id and the name of
    the function.

    A result without an id answers the first open call: of its name, if it has one. Raises LineError if it has an id that no
    call before it has.
    """
    taken = {call["id"] for turn in turns for call in turn.get("tool_calls", ()) if "id" in call}
    fresh = (name for name in (f"call{number:05d}" for number in range(1, 100_000)) if name not in taken)
    linked: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    unanswered: list[str] = []
    for given in turns:
        turn = dict(given)
        if "tool_calls" in turn:
            turn["tool_calls"] = [call if "id" in call else {"id": next(fresh), **call} for call in turn["tool_calls"]]
            found = {call["id"]: call["function"]["name"] for call in turn["tool_calls"]}
            names |= found
            unanswered += found
        elif turn["role"] == "tool" and names:
            call = turn.get("tool_call_id") or _open_call(unanswered, names, turn.get("name"))
            if call is not None:
                if call not in names:
                    raise LineError(
                        place, f"a result's tool_call_id is {shown(call)}, which is the id of no call before it; give the id "
                        "of the call that it answers, or none"
                    )
                turn |= {"tool_call_id": call, "name": names[call]}
                unanswered = [other for other in unanswered if other != call]
        linked.append(turn)
    return linked


def unlisted_call(turns: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a call is of none of the tools, where there are some."""
    listed = {tool["function"]["name"] for tool in tools}
    return bool(listed) and any(
        call["function"]["name"] not in listed for turn in turns for call in turn.get("tool_calls", ())
    )


def _open_call(unanswered: Sequence[str], names: Mapping[str, str], name: str | None) -> str | None:
    fitting = [call for call in unanswered if name is None or names[call] == name]
    return next(iter(fitting or unanswered), None)


def _listed(value: Any, place: str) -> list[Any]:
    """A list, given as such or as JSON text; nothing for null and an empty text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise LineError(place, f"not JSON ({error}); give a list of tools, or its JSON text") from error
    if value is None:
        return []
    if not isinstance(value, list):
        raise LineError(place, f"a list of tools, or its JSON text, is expected, got {kind(value)}")
    return value


def _checked(tools: Sequence[Any], place: str) -> list[dict[str, Any]]:
    """Checked tools. Bare functions, as LLaMA-Factory has them, are wrapped as OpenAI's are."""
    bare = [isinstance(tool, dict) and "function" not in tool and "name" in tool for tool in tools]
    wrapped = [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}} if is_bare else tool
        for tool, is_bare in zip(tools, bare, strict=True)
    ]
    try:
        return _whole(read_tools(wrapped, place), place)
    except InvalidRequest as error:
        raise _renamed(error, place, bare) from error


def _functions(calls: Sequence[Any], place: str, *, numbered: bool) -> list[Call]:
    """Checked calls that may be written as a function's name and arguments only. numbered: whether they stand in a list."""
    bare = [not (isinstance(call, dict) and "function" in call) for call in calls]
    wrapped = [{"function": call} if is_bare else call for call, is_bare in zip(calls, bare, strict=True)]
    try:
        return _whole(read_calls(wrapped, place, any_arguments=False), place)
    except InvalidRequest as error:
        raise _renamed(error, place, bare, numbered=numbered) from error


def _whole(found: list[dict[str, Any]], place: str) -> list[dict[str, Any]]:
    """The same. Raises LineError if a text in it can't be encoded."""
    for text in texts_in(found):
        read_text(text, place)
    return found


def _renamed(error: InvalidRequest, place: str, bare: Sequence[bool], *, numbered: bool = True) -> LineError:
    """The error with its field as the line has it: without the wrapping, and without the number of an only one."""
    field, _, message = str(error).partition(": ")
    for number, is_bare in enumerate(bare):
        start = f"{place}[{number}]"
        if field.startswith(start):
            own = field.removeprefix(start)
            field = (start if numbered else place) + (own.removeprefix(".function") if is_bare else own)
            break
    return LineError(field, message)
