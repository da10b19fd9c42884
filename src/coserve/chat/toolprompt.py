"""What a chat template is given of tools, calls and results; and the text that says the same where it doesn't render them.

    template renders the tools' names, and calls are written in a known way    it is given all of them as they are
    ... but not calls (SmolLM3's, Granite 3's), or not results                 those become text, the rest is given
    any other (SmolLM2's)                                                      all become text, in Hermes' way

    tools      at the end of the system message                     <tools>{...}</tools>
    calls      at the end of the assistant's content                <tool_call>{"name": ..., "arguments": ...}</tool_call>
    results    a user's turn, one for all that follow each other    <tool_response>...</tool_response>

Owns: this text. Does not own: what a template renders (toolprobe.py), rendering (template.py), how calls are read again
(toolformats/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]
"""A chat message: role, content, possibly name, and for an assistant possibly `tool_calls` (with arguments as objects),
`reasoning_content` and `weight` (0: not trained). One of role tool may have `tool_call_id`."""

HERMES = "hermes"
CALL_FORMATS = (HERMES, "qwen3_xml", "llama3_json", "mistral", "granite")
"""Ways of writing calls that are known, by vLLM's names."""
_MISTRAL_ID_CHARS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPrompt:
    """What one chat template does with tools.

    call_format: how the model is expected to write calls. tools, calls, results: whether the template renders these itself.
    system: whether it renders a system message. several: whether it takes more than one call in a turn; if not, each call is
    given in a turn of its own, with its result behind it. tools_variable: the variable that the template reads tools from:
    `tools`, or `xml_tools`, which holds the functions alone.
    """

    call_format: str
    tools: bool
    calls: bool
    results: bool
    system: bool
    several: bool = True
    tools_variable: str = "tools"

    def adapt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Message], Mapping[str, Any]]:
        """The messages that the template is given, and the variables that tell it of tools."""
        turns: list[Message] = []
        for message in messages if self.several else _one_by_one(messages):
            if "tool_calls" in message and not self.calls:
                turns.append(_with_calls(message, self.call_format))
            elif message["role"] == "tool" and not self.results:
                answers = turns[-1].get("answers", []) if turns else []
                result = f"<tool_response>\n{message['content']}\n</tool_response>"
                turn = {"role": "user", "answers": [*answers, result], "content": "\n".join([*answers, result])}
                turns = [*turns[:-1], turn] if answers else [*turns, turn]
            else:
                turns.append(_with_short_ids(message) if self.call_format == "mistral" else message)
        turns = [{key: value for key, value in turn.items() if key != "answers"} for turn in turns]
        if not tools:
            return turns, {}
        if not self.tools:
            return self._with_tools(turns, tools), {}
        given = [dict(tool["function"] if self.tools_variable == "xml_tools" else tool) for tool in tools]
        return turns, {self.tools_variable: given}

    def _with_tools(self, turns: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
        """The messages with the tools as text: in the system message, or in the first one where there can't be one."""
        text = describe_tools(tools)
        if turns and turns[0]["role"] in ("system", "developer"):
            return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
        if self.system or not turns or turns[0]["role"] != "user":
            return [{"role": "system", "content": text}, *turns]
        return [{**turns[0], "content": f"{text}\n\n{turns[0]['content']}"}, *turns[1:]]


def describe_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """What tells a model the tools, and how to call them, in Hermes' style."""
    listed = "\n".join(_json(tool) for tool in tools)
    return (
        "# Tools\n\nYou may call one or more of the functions whose signatures are given as JSON within <tools></tools>:\n"
        f"<tools>\n{listed}\n</tools>\n\n"
        "For each call, answer with a JSON object of the function's name and arguments within <tool_call></tool_call>:\n"
        '<tool_call>\n{"name": <name of the function>, "arguments": <object of its arguments>}\n</tool_call>\n'
        "The function's result then comes within <tool_response></tool_response>. Without a call, answer in plain text."
    )


def write_calls(calls: Sequence[Mapping[str, Any]], call_format: str) -> str:
    """Calls as a model writes them, for a template that doesn't: in Granite's way, or in Hermes'."""
    listed = [
        f'{{"name": {_json(call["function"]["name"])}, "arguments": {_arguments(call)}}}' for call in calls
    ]
    if call_format == "granite":
        return f"<|tool_call|>[{', '.join(listed)}]"
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in listed)


def _with_calls(message: Message, call_format: str) -> Message:
    content, calls = message["content"], write_calls(message["tool_calls"], call_format)
    turn = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**turn, "content": f"{content}\n{calls}" if content else calls}


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """The messages with one call in each turn, followed by its result if there is one."""
    turns: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            turns.append(message)
            continue
        count = next((place for place, turn in enumerate(rest) if turn["role"] != "tool"), len(rest))
        results, rest = rest[:count], rest[count:]
        for place, call in enumerate(calls):
            turns.append({**message, "content": "" if place else message["content"], "tool_calls": [call]})
            turns += [result for result in results if result.get("tool_call_id") == call.get("id")]
        known = {call.get("id") for call in calls}
        turns += [result for result in results if result.get("tool_call_id") not in known]
    return turns


def _with_short_ids(message: Message) -> Message:
    """Ids as Mistral's templates demand them: nine letters and digits, the same for the same id."""
    found = dict(message)
    if found.get("tool_call_id") is not None:
        found["tool_call_id"] = _short(found["tool_call_id"])
    if "tool_calls" in found:
        found["tool_calls"] = [{**call, "id": _short(call.get("id", ""))} for call in found["tool_calls"]]
    return found


def _short(identity: str) -> str:
    if len(identity) == _MISTRAL_ID_CHARS and identity.isascii() and identity.isalnum():
        return identity
    return hashlib.sha256(identity.encode()).hexdigest()[:_MISTRAL_ID_CHARS]


def _arguments(call: Mapping[str, Any]) -> str:
    """A call's arguments as JSON; a text that is none as it is."""
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else _json(arguments)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
