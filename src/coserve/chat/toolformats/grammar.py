"""Grammars of calls, in llguidance's variant of Lark: each format written out with a request's tools.

    must call                start: call (SEP call)*
    may call                 start: (head rest)* TEXT            any text, and whatever begins as a call is one
    may call, at most once   start: head rest | TEXT
    a call or else that      start: call (SEP call)* | content   content: another grammar, of an answer's JSON

    call    OPEN rest                       <tool_call> ...
    head    TEXT OPEN, the first OPEN       Let me look. <tool_call>
    rest    \\n {"name": "f", "arguments": args} \\n </tool_call>

Arguments are the tool's parameters as `%json`, in one line with at most one space behind each comma and colon. Markers that are
special tokens are written by their ids.

Owns: the grammar of each format. Does not own: which one a request gets (server/inference/toolcalling.py), enforcing it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coserve.chat.schemas import closed
from coserve.chat.toolformats import mistral, qwenxml

_ONE_LINE = {"whitespace_flexible": False, "item_separator": ",[ ]?", "key_separator": ":[ ]?"}
_LENIENT = {"lenient": True, "coerce_one_of": True}
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""A tool without parameters has none, as at OpenAI."""
_ANY: Mapping[str, Any] = {"type": "object"}
_DEFINITIONS = ("$defs", "definitions")
_TEXT = "TEXT: /(.|\\n)*/"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnforcedTool:
    """A tool that may be called. name: of it. schema: what its arguments must match."""

    name: str
    schema: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """One format with some tools: parts of grammars.

    open: what begins a call, or a list of calls. rest: what follows. separator: between that and the next `open`; None: there
    is no next one. rules: of everything else. bare: whether `open` may be missing at the beginning of an output.
    """

    open: str
    rest: str
    separator: str | None
    rules: Sequence[str]
    bare: bool = False


def enforced(tool: Mapping[str, Any], *, schema: bool) -> EnforcedTool:
    """A request's tool. schema: whether its arguments must match its parameters; if not, they are any object.

    An object that lists properties and says nothing of others has no others. Of a tool that isn't strict, keywords that can't
    be enforced are ignored."""
    function = tool["function"]
    if not schema:
        return EnforcedTool(name=function["name"], schema=_ANY)
    parameters = {"type": "object", **closed(function.get("parameters", _NO_PARAMETERS))}
    own = parameters.get("x-guidance")
    if not function.get("strict") and (own is None or isinstance(own, Mapping)):
        parameters["x-guidance"] = {**_LENIENT, **(own or {})}
    return EnforcedTool(name=function["name"], schema=parameters)


def schema_grammar(tool: EnforcedTool) -> str:
    """Of a tool's arguments alone."""
    return f"start: {_schema(tool.schema)}\n"


def call_grammar(
    name: str, tools: Sequence[EnforcedTool], special: Mapping[str, int], *, required: bool, parallel: bool,
    content: str | None = None,
) -> str:
    """A grammar of calls. name: of the format. special: ids of special tokens by name. required: whether there must be a call.
    parallel: whether there may be several. content: the grammar of an answer without a call; None: any text."""
    writing = _WRITERS[name](tools, special, parallel)
    repeated = writing.separator is not None and parallel
    more = f" ({writing.separator} call)*" if repeated else ""
    lines = [f"call: {writing.open} rest", f"rest: {writing.rest}", *writing.rules]
    begun = f"rest{more} | call{more}" if writing.bare else f"call{more}"
    if required:
        return _joined(f"start: {begun}", *lines)
    if content is not None:
        return _joined(f"start: call{more} | content", f"content: %lark {{\n{content}\n}}", *lines)
    if writing.bare:
        text = r"TEXT: /[ \n\r\t]*([^{ \n\r\t](.|\n)*)?/"
        return _joined(f"start: {begun} | TEXT", text, *lines)
    lines += [f"head{_lazy(writing.open)}: TEXT {writing.open}", _TEXT]
    return _joined("start: (head rest)* TEXT" if repeated else "start: head rest | TEXT", *lines)


def _hermes(tools: Sequence[EnforcedTool], special: Mapping[str, int], parallel: bool) -> Writing:
    return Writing(
        open=_marker("<tool_call>", special), rest=rf'"\n" tool "\n" {_marker("</tool_call>", special)}', separator=r'"\n"',
        rules=_objects(tools, "arguments"),
    )


def _granite(tools: Sequence[EnforcedTool], special: Mapping[str, int], parallel: bool) -> Writing:
    return Writing(
        open=_marker("<|tool_call|>", special), rest=_list(parallel), separator=None, rules=_objects(tools, "arguments"),
    )


def _llama3(tools: Sequence[EnforcedTool], special: Mapping[str, int], parallel: bool) -> Writing:
    """One call at most, since Llama's templates take no more in a turn."""
    return Writing(
        open=_marker("<|python_tag|>", special), rest="tool", separator=None, rules=_objects(tools, "parameters"), bare=True,
    )


def _mistral(tools: Sequence[EnforcedTool], special: Mapping[str, int], parallel: bool) -> Writing:
    if mistral.ARGS not in special:
        rest = f'" "? {_list(parallel)}'
        return Writing(
            open=_marker(mistral.CALLS, special), rest=rest, separator=None, rules=_objects(tools, "arguments"),
        )
    args = _marker(mistral.ARGS, special)
    identity = f"({_marker(mistral.CALL_ID, special)} /[0-9A-Za-z]{{9}}/)? " if mistral.CALL_ID in special else ""
    rules = [f"tool: {_alternatives(tools)}"]
    for number, tool in enumerate(tools):
        rules += [f"tool_{number}: {_literal(tool.name)} {identity}{args} args_{number}", _arguments(number, tool)]
    return Writing(open=_marker(mistral.CALLS, special), rest="tool", separator="", rules=rules)


def _qwen3_xml(tools: Sequence[EnforcedTool], special: Mapping[str, int], parallel: bool) -> Writing:
    """A parameter that is a text goes to the end of its tag; what else its schema says of the text isn't enforced."""
    first, last = (_marker(tag, special) for tag in (qwenxml.CALL, qwenxml.END_CALL))
    rules = [f"tool: {_alternatives(tools)}", r"any[lazy]: /(.|\n)*\n<\/parameter>/"]
    for number, tool in enumerate(tools):
        rules += _xml_rules(number, tool)
    return Writing(
        open=first, rest=rf'"\n{qwenxml.FUNCTION}" tool "\n{qwenxml.END_FUNCTION}\n" {last}', separator=r'"\n"', rules=rules,
    )


_WRITERS: Mapping[str, Callable[[Sequence[EnforcedTool], Mapping[str, int], bool], Writing]] = {
    "hermes": _hermes, "granite": _granite, "llama3_json": _llama3, "mistral": _mistral, "qwen3_xml": _qwen3_xml,
}


def _objects(tools: Sequence[EnforcedTool], arguments: str) -> list[str]:
    """Rules of a `tool` that is an object of its name and arguments. arguments: what these are called."""
    rules = [f"tool: {_alternatives(tools)}"]
    for number, tool in enumerate(tools):
        head = _literal(f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "{arguments}": ')
        rules += [f'tool_{number}: {head} args_{number} "}}"', _arguments(number, tool)]
    return rules


def _xml_rules(number: int, tool: EnforcedTool) -> list[str]:
    properties, required = tool.schema.get("properties"), tool.schema.get("required") or ()
    name = f"tool_{number}"
    if not isinstance(properties, Mapping) or not isinstance(required, list | tuple):
        return [f'{name}: {_literal(f"{tool.name}>")} ("\\n<parameter=" /[^<>\\n]+/ ">\\n" any)*']
    shared = {key: tool.schema[key] for key in (*_DEFINITIONS, "x-guidance") if key in tool.schema}
    parts, rules = [], []
    for place, (key, schema) in enumerate(properties.items()):
        rule = f"{name}_{place}"
        parts.append(rule if key in required else f"{rule}?")
        opening, closing = _literal(f"\n<parameter={key}>\n"), _literal("\n</parameter>")
        rules.append(f"{rule}: {opening} {_xml_value(schema, shared, closing)}")
    return [f"{name}: {' '.join([_literal(f'{tool.name}>'), *parts])}", *rules]


def _xml_value(schema: Any, shared: Mapping[str, Any], closing: str) -> str:
    """A parameter's value with its end."""
    if not isinstance(schema, Mapping) or not (schema.keys() & {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}):
        return "any"
    options = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(options, list) and options and all(isinstance(option, str) for option in options):
        return f"({' | '.join(map(_literal, options))}) {closing}"
    kinds = schema.get("type")
    if "string" in (kinds if isinstance(kinds, list) else [kinds]):
        return "any"
    return f"{_schema({**shared, **schema})} {closing}"


def _list(parallel: bool) -> str:
    return '"[" tool (", " tool)* "]"' if parallel else '"[" tool "]"'


def _alternatives(tools: Sequence[EnforcedTool]) -> str:
    return " | ".join(f"tool_{number}" for number in range(len(tools)))


def _arguments(number: int, tool: EnforcedTool) -> str:
    return f"args_{number}: {_schema(tool.schema)}"


def _schema(schema: Mapping[str, Any]) -> str:
    own = schema.get("x-guidance")
    style = {**_ONE_LINE, **own} if isinstance(own, Mapping) else _ONE_LINE if own is None else own
    return f"%json {json.dumps({**schema, 'x-guidance': style})}"


def _marker(text: str, special: Mapping[str, int]) -> str:
    return f"<[{special[text]}]>" if text in special else _literal(text)


def _lazy(opening: str) -> str:
    """What a rule is marked with that ends where a text is found; special tokens aren't text."""
    return "" if opening.startswith("<[") else "[lazy]"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _joined(*lines: str) -> str:
    return "".join(f"{line}\n" for line in lines)
