"""The input of a response as turns of a chat.

    reasoning "Hm." | message assistant "Let me see." | function_call a | function_call b | function_call_output a | ... b
    one turn of the assistant: reasoning_content, content, tool_calls a, b                | tool a              | tool b

Owns: which items and parts are taken, and which items make up one turn. Does not own: what a chat makes of a turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from coserve.chat.messages import ROLES
from coserve.config.values import shown
from coserve.core import invalid_field

_NOTES = ("type", "id", "status")
"""Fields of any item that say nothing to the model."""
_PART_NOTES = ("type", "annotations", "logprobs", "prompt_cache_breakpoint", "parsed")
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""{type of a part: its field that has the text}."""


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A message of a chat, in OpenAI's shape. places: where it is from, for it ('') and for its parts
    ('.tool_calls[0]')."""

    message: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)


def read_input(value: Any) -> list[ChatTurn]:
    """The turns of an input: a text, or a list of items. Raises InvalidRequest, naming the item."""
    if isinstance(value, str):
        return [ChatTurn({"role": "user", "content": value}, {"": "input", ".content": "input"})]
    if not isinstance(value, list):
        raise invalid_field("input", f"must be a text or a list of items, got {shown(value)}")
    if not value:
        raise invalid_field("input", "has no items; give at least one")
    items = _Items()
    for number, item in enumerate(value):
        items.add(item, f"input[{number}]")
    return items.turns


class _Items:
    """The turns so far. Items of the assistant join its last turn until another item comes."""

    def __init__(self) -> None:
        self.turns: list[ChatTurn] = []
        self._assistant: ChatTurn | None = None
        self._call_ids: set[str] = set()

    def add(self, item: Any, place: str) -> None:
        """Adds an item. Raises InvalidRequest."""
        if not isinstance(item, Mapping):
            raise invalid_field(place, f"must be an object, got {shown(item)}")
        kind = item.get("type")
        if kind is None:
            kind = "message" if "role" in item else "item_reference" if set(item) <= {"id", "type"} and "id" in item else None
        match kind:
            case "message":
                self._add_message(item, place)
            case "reasoning":
                self._add_reasoning(item, place)
            case "function_call":
                self._add_call(item, place)
            case "function_call_output":
                self._add_output(item, place)
            case "item_reference":
                raise invalid_field(place, "items are not stored here; give the item itself instead of a reference")
            case _:
                known = "message, reasoning, function_call, function_call_output"
                raise invalid_field(f"{place}.type", f"items of this type are not supported, only {known}; got {shown(kind)}")

    def _add_message(self, item: Mapping[str, Any], place: str) -> None:
        _check_names(item, ("role", "content", "phase", *_NOTES), place)
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise invalid_field(f"{place}.role", f"must be one of {', '.join(ROLES)}, got {shown(role)}")
        texts = _texts(item.get("content"), f"{place}.content")
        if role != "assistant":
            content = texts if isinstance(texts, str) else [{"type": "text", "text": text} for text in texts]
            self._assistant = None
            self.turns.append(ChatTurn({"role": role, "content": content}, {"": place}))
            return
        turn = self._joined(place, new=("content",))
        turn.message["content"] = (turn.message.get("content") or "") + "".join(texts)
        turn.places.setdefault(".content", f"{place}.content")

    def _add_reasoning(self, item: Mapping[str, Any], place: str) -> None:
        _check_names(item, ("content", "summary", "encrypted_content", *_NOTES), place)
        texts = _reasoning(item.get("content"), f"{place}.content", "reasoning_text")
        summary = _reasoning(item.get("summary"), f"{place}.summary", "summary_text")
        if not texts and not summary and item.get("encrypted_content") is not None:
            raise invalid_field(
                f"{place}.encrypted_content", "only the service that encrypted it can read it; leave out this item"
            )
        turn = self._joined(place, new=("content",))
        before = turn.message.get("reasoning_content")
        text = "".join(texts) or "\n".join(summary)
        turn.message["reasoning_content"] = text if before is None else f"{before}\n{text}"
        turn.places.setdefault(".reasoning_content", f"{place}.content")

    def _add_call(self, item: Mapping[str, Any], place: str) -> None:
        _check_names(item, ("call_id", "name", "arguments", "parsed_arguments", *_NOTES), place)
        call_id, name, arguments = (_text(item, key, place) for key in ("call_id", "name", "arguments"))
        if call_id in self._call_ids:
            raise invalid_field(f"{place}.call_id", f"there is a function_call with the call_id {shown(call_id)} already")
        self._call_ids.add(call_id)
        turn = self._joined(place, new=())
        calls = turn.message.setdefault("tool_calls", [])
        turn.places[f".tool_calls[{len(calls)}]"] = place
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def _add_output(self, item: Mapping[str, Any], place: str) -> None:
        _check_names(item, ("call_id", "output", *_NOTES), place)
        call_id = _text(item, "call_id", place)
        if call_id not in self._call_ids:
            raise invalid_field(
                f"{place}.call_id", f"there is no function_call with the call_id {shown(call_id)} before it in input; "
                "responses are not stored here, so give their items too"
            )
        texts = _texts(item.get("output"), f"{place}.output")
        content = texts if isinstance(texts, str) else [{"type": "text", "text": text} for text in texts]
        self._assistant = None
        places = {"": place, ".content": f"{place}.output", ".tool_call_id": f"{place}.call_id"}
        self.turns.append(ChatTurn({"role": "tool", "tool_call_id": call_id, "content": content}, places))

    def _joined(self, place: str, *, new: Collection[str]) -> ChatTurn:
        """The assistant's turn that an item joins. new: fields of it, any of which makes the item begin a turn of its own,
        unless there are calls, whose outputs must follow the turn."""
        turn = self._assistant
        if turn is None or ("tool_calls" not in turn.message and any(turn.message.get(name) is not None for name in new)):
            turn = self._assistant = ChatTurn({"role": "assistant", "content": None}, {"": place})
            self.turns.append(turn)
        return turn


def _texts(value: Any, place: str) -> str | list[str]:
    """Content or output: a text, or the texts of its parts."""
    if isinstance(value, str):
        return value
    if value is None:
        raise invalid_field(place, "is missing")
    if not isinstance(value, list):
        raise invalid_field(place, f"must be a text or a list of parts, got {shown(value)}")
    found = []
    for number, part in enumerate(value):
        at = f"{place}[{number}]"
        if not isinstance(part, Mapping):
            raise invalid_field(at, f"must be an object with type and text, got {shown(part)}")
        kind = part.get("type")
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            known = ", ".join(_TEXT_PARTS)
            raise invalid_field(f"{at}.type", f"must be one of {known}, got {shown(kind)}; the model reads text")
        name = _TEXT_PARTS[kind]
        _check_names(part, (name, *_PART_NOTES), at)
        found.append(_text(part, name, at))
    return found


def _reasoning(value: Any, place: str, kind: str) -> list[str]:
    """The texts of a reasoning item's content or summary."""
    if value is not None and not isinstance(value, list):
        raise invalid_field(place, f"must be a list of parts, got {shown(value)}")
    found = []
    for number, part in enumerate(value or ()):
        at = f"{place}[{number}]"
        if not isinstance(part, Mapping) or part.get("type") != kind:
            raise invalid_field(at, f'must be an object with the type "{kind}" and text, got {shown(part)}')
        _check_names(part, ("type", "text"), at)
        found.append(_text(part, "text", at))
    return found


def _text(item: Mapping[str, Any], name: str, place: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise invalid_field(f"{place}.{name}", "is missing" if value is None else f"must be a text, got {shown(value)}")
    return value


def _check_names(item: Mapping[str, Any], known: Collection[str], place: str) -> None:
    """Refuses fields that aren't known. A null is no field: clients give back items with all their fields."""
    for name, value in item.items():
        if name not in known and value is not None:
            named = name if name.isprintable() and len(name) <= 80 else shown(name)
            raise invalid_field(f"{place}.{named}", "there is no such field; remove it")
