"""Messages of training data, checked one by one, with OpenAI's keys (role, content) or ShareGPT's (from, value).

Owns: the checks and their messages, merging system prompts into user turns. Does not own: calls of tools (calls.py), what is
trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coserve.chat.messages import IGNORED, is_neutral, join_parts
from coserve.finetune.calls import EMPTY, read_call_text, read_message_calls
from coserve.finetune.jsonlines import LineError, kind, read_text, shown

Turn = Mapping[str, Any]
"""Keys: role, content, and optionally name; of an assistant's turn tool_calls, reasoning_content and weight, of a tool's
tool_call_id."""

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool", "function": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "function_call": "assistant",
    "observation": "tool",
}
"""{accepted role: the chat template's role}. The first six are OpenAI's names, the others ShareGPT's."""
_OPENAI_ROLES = 6
_KEYS = ("role", "content", "name", "weight")
_SHAREGPT_KEYS = ("from", "value", "name", "weight")
_OF_ROLE = {
    "tool_calls": "assistant", "function_call": "assistant", "reasoning_content": "assistant", "reasoning": "assistant",
    "tool_call_id": "tool",
}
"""{key of a message: the template's role whose messages may have it}."""
_MAX_TURNS = 2048
"""The most messages of one example. The time to find its trained tokens grows with the square of their number."""


def read_turns(value: object, place: str, *, keep_developer: bool) -> list[Turn]:
    """A checked list of messages. keep_developer: whether the chat template has the role developer; else it becomes system.

    Raises LineError, and InvalidRequest for a bad part of a content list.
    """
    if not isinstance(value, list):
        raise LineError(place, f"a list of messages is expected, got {kind(value)}")
    if not value:
        raise LineError(place, "the list is empty; give at least one message")
    if len(value) > _MAX_TURNS:
        raise LineError(place, f"{len(value)} messages, more than {_MAX_TURNS}; split the example")
    return [_turn(message, f"{place}[{i}]", keep_developer) for i, message in enumerate(value)]


def same_turns(some: Sequence[Turn], others: Sequence[Turn]) -> bool:
    """Whether two lists of messages are equal, weights apart."""
    return [{**turn, "weight": None} for turn in some] == [{**turn, "weight": None} for turn in others]


def merge_system(turns: Sequence[Turn], place: str) -> list[Turn]:
    """Puts system messages before the next user turn's text, an empty line between. Raises LineError if none follows."""
    merged: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        if turn["role"] == "system":
            waiting += [turn["content"]] if turn["content"] else []
        elif turn["role"] == "user" and waiting:
            merged.append({**turn, "content": "\n\n".join([*waiting, turn["content"]])})
            waiting = []
        else:
            merged.append(turn)
    if waiting:
        raise LineError(place, "a system message has no user message behind it that it could be merged into; add one")
    return merged


def _turn(message: object, place: str, keep_developer: bool) -> Turn:
    if not isinstance(message, dict):
        raise LineError(place, f"an object with role and content is expected, got {kind(message)}")
    sharegpt = "role" not in message and ("from" in message or "value" in message)
    keys = _SHAREGPT_KEYS if sharegpt else _KEYS
    role_key, content_key = keys[:2]
    role = _role(message, role_key, place)
    _check_keys(message, keys, role, place)
    checked: dict[str, Any] = {"role": "system" if role == "developer" and not keep_developer else role}
    if role == "assistant":
        checked |= _said(message, message[role_key], content_key, place)
    else:
        checked["content"] = _content(message.get(content_key), f"{place}.{content_key}")
    if role == "tool" and message.get("tool_call_id"):
        checked["tool_call_id"] = read_text(message["tool_call_id"], f"{place}.tool_call_id")
    if message.get("name") is not None:
        checked["name"] = read_text(message["name"], f"{place}.name")
    weight = message.get("weight")
    if weight is None:
        return checked
    if role != "assistant":
        raise LineError(f"{place}.weight", f"only assistant messages have a weight, not {role} messages; remove it")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise LineError(f"{place}.weight", f"0 or 1 is expected, got {shown(weight)}")
    return {**checked, "weight": weight}


def _said(message: Mapping[str, Any], role: str, content_key: str, place: str) -> dict[str, Any]:
    """What an assistant's message says: content, calls and thoughts. role: as the line names it."""
    content = message.get(content_key)
    found: dict[str, Any] = {}
    calls = read_message_calls(message, place)
    if role == "function_call":
        if calls:
            raise LineError(f"{place}.{content_key}", "a function_call message has its calls here, and no others")
        content, found["tool_calls"] = read_call_text(content, f"{place}.{content_key}")
    elif calls:
        found["tool_calls"] = calls
        content = "" if content is None or content == [] else content
    found["content"] = _content(content, f"{place}.{content_key}")
    for key in ("reasoning_content", "reasoning"):
        if message.get(key):
            found.setdefault("reasoning_content", read_text(message[key], f"{place}.{key}"))
    return found


def _check_keys(message: Mapping[str, Any], keys: Sequence[str], role: str, place: str) -> None:
    """Raises LineError for a key that a message of this role, the template's, can't have."""
    for key, value in message.items():
        if key in _OF_ROLE:
            if role != _OF_ROLE[key] and not is_neutral(value, EMPTY):
                raise LineError(f"{place}.{key}", f"{role} messages have none, only {_OF_ROLE[key]} messages; remove it")
        elif key == "audio":
            if not is_neutral(value, EMPTY):
                raise LineError(f"{place}.audio", "not supported yet; remove it or leave the example out")
        elif key not in keys and key not in IGNORED and value is not None:
            raise LineError(f"{place}.{shown(key)}", f"unknown key; remove it (known: {', '.join([*keys, *_OF_ROLE])})")


def _role(message: Mapping[str, Any], key: str, place: str) -> str:
    role = message.get(key)
    known = list(_ROLES) if key == "from" else list(_ROLES)[:_OPENAI_ROLES]
    if not isinstance(role, str) or role not in known:
        got = "is missing" if key not in message else f"{shown(role)} is unknown"
        use = "human, gpt, function_call, observation or system" if key == "from" else "system, user, assistant or tool"
        raise LineError(f"{place}.{key}", f"{got}; use {use}")
    return _ROLES[role]


def _content(value: object, place: str) -> str:
    """A message's text, given as a string or in parts."""
    if isinstance(value, list) and value:
        value = join_parts(value, place)
    return read_text(value, place)
