"""Messages of training data, checked one by one, with OpenAI's keys (role, content) or ShareGPT's (from, value).

Owns: the checks and their messages, merging system prompts into user turns. Does not own: which fields a message may have
(coserve.chat.messages), which turns are trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coserve.chat.messages import IGNORED, TOOL_ROLES, UNSUPPORTED, is_neutral, join_parts
from coserve.finetune.jsonlines import LineError, kind, shown

Turn = Mapping[str, Any]
"""Keys: role, content, and optionally name and weight."""

_ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}
"""{accepted role: the chat template's role}. The first four are OpenAI's names, the others ShareGPT's."""
_OPENAI_ROLES = 4
_TOOL_ROLES = (*TOOL_ROLES, "function_call", "observation")
_KEYS = ("role", "content", "name", "weight")
_SHAREGPT_KEYS = ("from", "value", "name", "weight")
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


def read_text(value: object, place: str) -> str:
    """The value as a string. Raises LineError if it is none, or can't be encoded as UTF-8."""
    if not isinstance(value, str):
        raise LineError(place, f"a string is expected, got {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LineError(place, "holds half of a surrogate pair (\\ud800-\\udfff); write whole characters") from error
    return value


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
    for key, value in message.items():
        if key in UNSUPPORTED:
            if not is_neutral(value, UNSUPPORTED[key]):
                raise LineError(f"{place}.{key}", "not supported yet; remove it or leave the example out")
        elif key not in keys and key not in IGNORED and value is not None:
            raise LineError(f"{place}.{shown(key)}", f"unknown key; remove it (known: {', '.join(keys)})")
    role = _role(message, role_key, place)
    checked = {"role": "system" if role == "developer" and not keep_developer else role}
    checked["content"] = _content(message.get(content_key), f"{place}.{content_key}")
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


def _role(message: Mapping[str, Any], key: str, place: str) -> str:
    role = message.get(key)
    if role in _TOOL_ROLES:
        raise LineError(f"{place}.{key}", f"{role} messages are not supported yet; leave the example out")
    known = list(_ROLES) if key == "from" else list(_ROLES)[:_OPENAI_ROLES]
    if not isinstance(role, str) or role not in known:
        got = "is missing" if key not in message else f"{shown(role)} is unknown"
        use = "human, gpt or system" if key == "from" else "system, user or assistant"
        raise LineError(f"{place}.{key}", f"{got}; use {use}")
    return _ROLES[role]


def _content(value: object, place: str) -> str:
    """A message's text, given as a string or in parts."""
    if isinstance(value, list) and value:
        value = join_parts(value, place)
    return read_text(value, place)
