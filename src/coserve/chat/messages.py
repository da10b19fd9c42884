"""What a chat message may hold: one set of rules for requests and for training data.

Owns: roles, values that ask for what happens anyway, content in parts. Does not own: how either side names a place in its
input, message fields that only one of them knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from coserve.config.values import shown
from coserve.core import InvalidRequest

ROLES = ("system", "developer", "user", "assistant")
TOOL_ROLES = ("tool", "function")
"""Of results: a tool's, and a function's in OpenAI's old form."""
CALL_FIELDS = ("tool_calls", "tool_call_id", "function_call")
"""Fields of a message that belong to calls and results."""
Neutral = Mapping[str, tuple[Any, ...]]
"""{field: the values that ask for what happens anyway}; null always does."""

_EMPTY: tuple[Any, ...] = ([], {}, "")
UNSUPPORTED: Neutral = dict.fromkeys(
    ("tool_calls", "tool_call_id", "function_call", "audio", "reasoning", "reasoning_content"), _EMPTY
)
"""Fields of a message that must be empty; in a request those of CALL_FIELDS and an assistant's of REASONING need not."""
REASONING = ("reasoning_content", "reasoning")
"""Names of an assistant's thoughts. Chat templates know the first one."""
IGNORED = ("refusal", "annotations", "provider_specific_fields")
"""Fields of a message, left over from an earlier response, that are no part of the conversation."""


def same(value: Any, other: Any) -> bool:
    """Equal, and not merely as 1 and true are."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def is_neutral(value: Any, neutral: Collection[Any]) -> bool:
    """Whether the value is null or one of the neutral ones."""
    return value is None or any(same(value, other) for other in neutral)


def join_parts(parts: Sequence[Any], place: str) -> str:
    """The text of a message's content in parts of type text, joined by line ends. Raises InvalidRequest, naming the part.

    A part's `cache_control` (a hint for other services) and null fields are ignored.
    """
    return "\n".join(_part(part, f"{place}[{number}]") for number, part in enumerate(parts))


def _part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidRequest(f"{place}: a part must be an object with type and text", param=place)
    kind = part.get("type")
    if kind != "text":
        named = repr(kind[:40]) if isinstance(kind, str) else "that is no name"
        raise InvalidRequest(
            f"{place}: a part of type {named} is not supported yet; the model reads text", param=f"{place}.type"
        )
    text = part.get("text")
    if text is None:
        raise InvalidRequest(f"{place}.text: is missing", param=f"{place}.text")
    if not isinstance(text, str):
        raise InvalidRequest(f"{place}.text: must be a string", param=f"{place}.text")
    for name, value in part.items():
        if name not in ("type", "text", "cache_control") and value is not None:
            field = f"{place}.{name if name.isprintable() and len(name) <= 80 else shown(name)}"
            raise InvalidRequest(f"{field}: there is no such field; remove it", param=field)
    return text
