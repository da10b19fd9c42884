"""What a chat template is given of tools, calls and results; and the text that says the same where it doesn't render them.

    template renders the tools' names, and writes calls in a known way    it is given all of them as they are
    ... but not calls, or not results (SmolLM3's)                         those become text, the rest is given
    any other (SmolLM2's)                                                 all become text, in Hermes' style

    tools      at the end of the system message                     <tools>{...}</tools>
    calls      at the end of the assistant's content                <tool_call>{"name": ..., "arguments": ...}</tool_call>
    results    a user's turn, one for all that follow each other    <tool_response>...</tool_response>

Owns: this text, which way of writing calls a template's source tells. Does not own: rendering (template.py), how calls are read
again (toolformats/).
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

CALL_FORMATS = ("hermes", "qwen3_xml", "llama3_json", "mistral", "granite")
"""Ways of writing calls that are known, by vLLM's names."""
_MARKERS = (
    ("<function=", "qwen3_xml"), ("[TOOL_CALLS]", "mistral"), ("<tool_call>", "hermes"), ("<|tool_call|>", "granite"),
    ("<|python_tag|>", "llama3_json"), ("ipython", "llama3_json"),
)
"""What templates write around calls, and the format that it tells: the first one that is found."""
PROBE_TOOL: Mapping[str, Any] = {"type": "function", "function": {
    "name": "qzx_probe", "description": "x", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "description": "x"}}, "required": ["place"],
    },
}}
PROBE_CALL: Mapping[str, Any] = {
    "id": "qzxprobe1", "type": "function", "function": {"name": "qzx_probe", "arguments": {"place": "x"}},
}
_MISTRAL_ID_CHARS = 9


def find_call_format(source: str) -> str | None:
    """How a model writes calls, a name of CALL_FORMATS, by the source of its chat template; None: unknown."""
    return next((name for marker, name in _MARKERS if marker in source), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPrompt:
    """What one chat template does with tools.

    call_format: how the model is expected to write calls. tools, calls, results: whether the template renders these itself.
    system: whether it renders a system message.
    """

    call_format: str
    tools: bool
    calls: bool
    results: bool
    system: bool

    def adapt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Message], Sequence[Mapping[str, Any]]]:
        """The messages and the tools that the template is given."""
        turns: list[Message] = []
        for message in messages:
            if "tool_calls" in message and not self.calls:
                turns.append(_with_calls(message))
            elif message["role"] == "tool" and not self.results:
                answers = turns[-1].get("answers", []) if turns else []
                result = f"<tool_response>\n{message['content']}\n</tool_response>"
                turn = {"role": "user", "answers": [*answers, result], "content": "\n".join([*answers, result])}
                turns = [*turns[:-1], turn] if answers else [*turns, turn]
            else:
                turns.append(_with_short_ids(message) if self.call_format == "mistral" else message)
        turns = [{key: value for key, value in turn.items() if key != "answers"} for turn in turns]
        return (turns, tools) if self.tools or not tools else (self._with_tools(turns, tools), ())

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


def write_calls(calls: Sequence[Mapping[str, Any]]) -> str:
    """Calls as a model writes them in Hermes' style."""
    return "\n".join(
        f'<tool_call>\n{{"name": {_json(call["function"]["name"])}, "arguments": {_arguments(call)}}}\n</tool_call>'
        for call in calls
    )


def _with_calls(message: Message) -> Message:
    content, calls = message["content"], write_calls(message["tool_calls"])
    turn = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**turn, "content": f"{content}\n{calls}" if content else calls}


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
