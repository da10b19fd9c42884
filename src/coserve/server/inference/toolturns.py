"""Calls and results among a conversation's messages, in OpenAI's form and in its old one, for a chat template.

    {"role": "assistant", "tool_calls": [{"id": "call_1", ...}]}     the same, arguments as an object
    {"role": "tool", "tool_call_id": "call_1", "content": "..."}     the same, with the function's name
    {"role": "assistant", "function_call": {...}}                    an assistant's turn with one call
    {"role": "function", "name": "f", "content": "..."}              a tool's turn that answers the last call of f

A result must answer an earlier call. Calls without a result are taken: a client may have left off.

Owns: these rules. Does not own: what a call may say (chat/tools.py), content (prompts.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coserve.chat.tools import read_calls
from coserve.config.values import shown
from coserve.core import InvalidRequest, invalid_field
from coserve.server.inference.protocol import ChatMessage


class ToolTurns:
    """Follows one conversation, message by message."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # of the functions called so far, by the call's id
        self._num_old = 0

    def calls(self, message: ChatMessage, place: str) -> list[dict[str, Any]]:
        """The calls of an assistant's message. Raises InvalidRequest, naming the field."""
        calls = self._old_call(message, place) if message.function_call else []
        if message.tool_calls:
            if calls:
                raise invalid_field(f"{place}.function_call", "can't stand beside tool_calls; leave one of them out")
            calls = read_calls(message.tool_calls, f"{place}.tool_calls", any_arguments=True)
        for number, call in enumerate(calls):
            if not call.get("id"):
                raise invalid_field(f"{place}.tool_calls[{number}].id", "is missing; a result names its call by it")
            self._names[call["id"]] = call["function"]["name"]
        return calls

    def result(self, message: ChatMessage, place: str) -> dict[str, Any]:
        """What a message of role tool or function has beside its content. Raises InvalidRequest, naming the field."""
        if message.role == "function":
            return self._old_result(message, place)
        if message.tool_call_id is None:
            raise invalid_field(f"{place}.tool_call_id", "is missing; a message of role tool names the call that it answers")
        if message.tool_call_id not in self._names:
            raise invalid_field(
                f"{place}.tool_call_id", f"{shown(message.tool_call_id)} is the id of no call before this message; a message "
                "of role tool answers one of an assistant's tool_calls"
            )
        return {"role": "tool", "tool_call_id": message.tool_call_id, "name": self._names[message.tool_call_id]}

    def _old_call(self, message: ChatMessage, place: str) -> list[dict[str, Any]]:
        place = f"{place}.function_call"
        if not isinstance(message.function_call, Mapping):
            raise invalid_field(place, f"must be an object with name and arguments, got {shown(message.function_call)}")
        self._num_old += 1
        given = {"id": f"call{self._num_old:05d}", "type": "function", "function": dict(message.function_call)}
        try:
            return read_calls([given], place, any_arguments=True)
        except InvalidRequest as error:
            field = (error.param or place).replace("[0].function", "", 1)
            raise invalid_field(field, str(error).partition(": ")[2]) from error

    def _old_result(self, message: ChatMessage, place: str) -> dict[str, Any]:
        if message.name is None:
            raise invalid_field(f"{place}.name", "is missing; a message of role function names the function")
        for identity, name in reversed(self._names.items()):
            if name == message.name:
                return {"role": "tool", "tool_call_id": identity, "name": name}
        raise invalid_field(
            f"{place}.name", f"{shown(message.name)} wasn't called before this message; a message of role function answers an "
            "assistant's function_call"
        )
