"""What is read of an output in which a model may call tools: calls as they were written, and whatever is none as text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.chat.template import ChatTemplate
from coserve.chat.toolformats.events import ArgumentsEvent, CallEvent, Event, TextEvent
from coserve.chat.toolformats.formats import FORMATS
from tests.tool_templates import FAMILIES

PARAMETERS: dict[str, Any] = {"type": "object", "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "exact": {"type": "boolean"}, "near": {"type": ["array", "null"]},
}}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS}} for name in ("get_weather", "get_time")
]
HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OSLO = ("get_weather", '{"city": "Oslo"}')
Read = tuple[str, list[tuple[str, str]]]


def read(name: str, *pieces: str) -> Read:
    """An output's text, and its calls as name and arguments."""
    reader = FORMATS[name].new_reader(TOOLS)
    return collect([event for piece in pieces for event in reader.push(piece)] + reader.finish())


def collect(events: list[Event]) -> Read:
    text, calls = "", list[tuple[str, str]]()
    for event in events:
        match event:
            case TextEvent(piece):
                text += piece
            case CallEvent(name):
                calls.append((name, ""))
            case ArgumentsEvent(piece):
                calls[-1] = (calls[-1][0], calls[-1][1] + piece)
    return text, calls


# --- whatever a template writes is read again ---


def reply(source: str, content: str, calls: list[tuple[str, Any]]) -> str:
    """What a model has to write after the prompt so that the template would write these calls."""
    template = ChatTemplate(source, {"eos_token": "</s>", "bos_token": "<s>"})
    question = {"role": "user", "content": "x"}
    listed = [
        {"id": f"call{number:05d}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for number, (name, arguments) in enumerate(calls)
    ]
    prompt = template.render([question], add_generation_prompt=True)
    turn = {"role": "assistant", "content": content, "tool_calls": listed}
    text = template.render([question, turn], add_generation_prompt=False)
    assert text.startswith(prompt)
    ends = ("<|im_end|>", "<|eot_id|>", "</s>", "<|end_of_text|>")
    return text[len(prompt) : max(map(text.rfind, ends))]  # the last one ends the turn; arguments may hold others


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(texts, inner, max_size=3), max_leaves=6,
)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_calls_that_a_template_writes_are_read_again(family: str, data: st.DataObject) -> None:
    arguments = st.dictionaries(texts, values, max_size=3)
    if family == "qwen3_xml":  # values are text between tags, so not every text can be one
        plain = st.text(st.characters(exclude_characters="<\n", exclude_categories=["Cs"]), max_size=12)
        arguments = st.fixed_dictionaries({}, optional={
            "city": plain, "days": st.integers(), "exact": st.booleans(), "near": st.none() | st.lists(st.integers()),
        })
    most = 1 if family == "llama3_json" else 3
    drawn = data.draw(st.lists(st.tuples(st.sampled_from(["get_weather", "get_time"]), arguments), min_size=1, max_size=most))
    written = reply(FAMILIES[family], "", drawn)
    text, calls = read(ChatTemplate(FAMILIES[family], {"eos_token": "</s>"}).tool_prompt.call_format, written)
    assert text == ""
    assert [(name, json.loads(arguments)) for name, arguments in calls] == drawn


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_xml"])
def test_arguments_may_hold_what_ends_a_turn(family: str) -> None:
    drawn = [("get_weather", {"</s>": "a<|im_end|>b", "city": "<|eot_id|></s>"})]
    written = reply(FAMILIES[family], "", drawn)
    text, calls = read(ChatTemplate(FAMILIES[family], {"eos_token": "</s>"}).tool_prompt.call_format, written)
    assert (text, [(name, json.loads(arguments)) for name, arguments in calls]) == ("", drawn)


@pytest.mark.parametrize("family", ["hermes", "smollm3", "qwen3_xml", "mistral_v11"])
def test_text_before_calls(family: str) -> None:
    written = reply(FAMILIES[family], "Let me look.", [("get_weather", {"city": "Oslo"})] * 2)
    call_format = ChatTemplate(FAMILIES[family], {"eos_token": "</s>"}).tool_prompt.call_format
    assert read(call_format, written) == ("Let me look.", [OSLO, OSLO])


def test_arguments_are_passed_on_as_they_were_written() -> None:
    arguments = '{ "city":"O\\u0073lo",\t"n" : 1.50 }'
    assert read("hermes", f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>') == ("", [("f", arguments)])


# --- streams ---


fragments = st.lists(st.one_of(
    st.sampled_from([
        HERMES_CALL, "<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}', '[{"name": "f", "arguments": {', "}", "]", "{", "[", '"',
        '{"name": ', '"get_time"', '"arguments": ', ", ", "; ", ": ", "\n", " ", "null", "1", "text", "<", "<tool", "é🙂",
        "<function=get_time>", "<parameter=city>", "</parameter>", "</function>", '"{\\"a\\": 1}"', "f[ARGS]{}", "\\", "'",
        "<parameter=days>", "\nTrue\n", "<function=", '"id": "x"', '"type": "function"',
    ]),
    st.text(max_size=4),
), max_size=14).map("".join)


@pytest.mark.parametrize("name", FORMATS)
@given(text=fragments, data=st.data())
@settings(deadline=None, max_examples=400)
def test_how_a_text_is_cut_makes_no_difference(name: str, text: str, data: st.DataObject) -> None:
    whole = read(name, text)
    assert read(name, *text) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(name, *pieces) == whole
    if not whole[1]:
        assert whole[0] == text, "what is no call is text, all of it"


@pytest.mark.parametrize("name", FORMATS)
@given(text=st.text(st.characters(exclude_characters="<[{", exclude_categories=["Cs"])))
def test_text_comes_at_once(name: str, text: str) -> None:
    reader = FORMATS[name].new_reader(TOOLS)
    assert collect(reader.push(text)) == (text.rstrip(), []) if text.strip() else reader.push(text) == []


def test_only_what_may_begin_a_marker_is_held() -> None:
    reader = FORMATS["hermes"].new_reader(TOOLS)
    assert [collect(reader.push(piece))[0] for piece in ("a <", "b", " <too", "l_caXX", "<tool_call>", "no")] == [
        "a", " <b", "", " <tool_caXX", "", "<tool_call>no",
    ]


def test_arguments_come_as_they_are_written() -> None:
    reader = FORMATS["hermes"].new_reader(TOOLS)
    assert reader.push('<tool_call>\n{"name": "get_weather", "arguments": ') == []
    assert reader.push('{"ci') == [CallEvent("get_weather"), ArgumentsEvent('{"ci')]
    assert [reader.push(piece) for piece in ('ty": "O', 'slo"', "}")] == [
        [ArgumentsEvent('ty": "O')], [ArgumentsEvent('slo"')], [ArgumentsEvent("}")],
    ]
    assert reader.push("}\n</tool_call>") == []
    assert reader.finish() == []


def test_values_of_qwen3_xml_come_as_they_are_written() -> None:
    reader = FORMATS["qwen3_xml"].new_reader(TOOLS)
    assert collect(reader.push("<tool_call>\n<function=get_time>\n<parameter=city>\nOslo and")) == (
        "", [("get_time", '{"city": "Oslo and')],
    )
    assert reader.push(' "Bergen"\nx\n</parameter>\n<parameter=days>\n3') == [ArgumentsEvent(' \\"Bergen\\"\\nx", "days": ')]
    assert reader.push("0\n</parameter>\n</function>\n</tool_call>") == [ArgumentsEvent("30}")]
    assert reader.finish() == []


# --- what small models write ---


@pytest.mark.parametrize(("name", "text", "calls"), [
    ("hermes", HERMES_CALL[: -len("\n</tool_call>")], [OSLO]),
    ("hermes", HERMES_CALL[:-4], [OSLO]),
    ("hermes", HERMES_CALL + HERMES_CALL, [OSLO, OSLO]),
    ("hermes", HERMES_CALL[: -len("</tool_call>")] + HERMES_CALL, [OSLO, OSLO]),
    ("hermes", HERMES_CALL.replace("}}", "}"), [OSLO]),
    ("hermes", HERMES_CALL.replace("}}", "}}}"), [OSLO]),
    ("hermes", HERMES_CALL.replace("}}", "}}]"), [OSLO]),
    ("hermes", HERMES_CALL.replace('"arguments"', '"parameters"'), [OSLO]),
    ("hermes", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo"}}, {"name": "g"}]</tool_call>',
     [OSLO, ("g", "{}")]),
    ("hermes", '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>', [OSLO]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}</tool_call>', [OSLO]),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Oslo\\"}"</tool_call>', [OSLO]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"type": "function", "id": "1", "name": "f", "arguments": {}, "x": 1}</tool_call>', [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": {"b": 1}</tool_call>', [("f", '{"a": {"b": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>"}}</tool_call>', [("f", '{"a": "</tool_call>"}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>', [("f", "{'a': 1}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', [("f", '{"a": "b')]),
    ("hermes", '{"name": "get_weather", "arguments": {"city": "Oslo"}}', [OSLO]),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo"}}', [OSLO]),
    ("llama3_json", '<|python_tag|>{"name": "anything", "parameters": {}}', [("anything", "{}")]),
    ("llama3_json", '{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}', [OSLO]),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "get_time", "parameters": {}}',
     [OSLO, ("get_time", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Oslo"}, "id": "abcdefgh9"}]', [OSLO]),
    ("mistral", '[TOOL_CALLS] [{"arguments": {"city": "Oslo"}, "name": "get_weather"}]', [OSLO]),
    ("mistral", '{"name": "get_weather", "arguments": {"city": "Oslo"}}', [OSLO]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]abcdefgh9[ARGS]{"city": "Oslo"}[TOOL_CALLS]f[ARGS]{}', [OSLO, ("f", "{}")]),
    ("mistral", '[TOOL_CALLS]get_weather{"city": "Oslo"}', [OSLO]),
    ("granite", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]', [OSLO]),
    ("granite", '<tool_call>[{"name": "get_weather", "arguments": {"city": "Oslo"}}]', [OSLO]),
    ("qwen3_xml", "<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>", [OSLO]),
    ("qwen3_xml", "<tool_call><function=get_weather><parameter=city>Oslo</parameter></function></tool_call>", [OSLO]),
    ("qwen3_xml", "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</function>\n</tool_call>", [OSLO]),
    ("qwen3_xml", "<tool_call>\n<function=f>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n</tool_call>",
     [("f", "{}"), ("g", "{}")]),
    ("qwen3_xml", "<tool_call>\n<function=f>\n</tool_call>", [("f", "{}")]),
    ("qwen3_xml", "<function=f>\n<parameter=near>\nNone\n</parameter>\n</function>", [("f", '{"near": "None"}')]),
    ("qwen3_xml", "<function=get_time>\n<parameter=near>\nNone\n</parameter>\n<parameter=exact>\nFalse\n</parameter>\n"
                  "<parameter=days>\nNaN\n</parameter>\n</function>",
     [("get_time", '{"near": null, "exact": false, "days": "NaN"}')]),
])
def test_calls_that_are_not_quite_right(name: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(name, text) == ("", calls)


@pytest.mark.parametrize(("name", "text"), [
    ("hermes", "<tool_call>I would call it.</tool_call>"), ("hermes", '<tool_call>{"city": "Oslo"}</tool_call>'),
    ("hermes", "<tool_call>[]</tool_call>"), ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'), ("hermes", '<tool_call>{"name": "f'),
    ("hermes", '<tool_call>{"name": "f", "argum'), ("hermes", '{"name": "Ada", "arguments": {}}'), ("hermes", "</tool_call>"),
    ("hermes", '{"name": "get_weather"}'), ("hermes", 'Use <tool_call> so: {"name": "get_weather", "arguments": {}}'),
    ("hermes", '<tool_call>{"name": "' + "x" * 300 + '", "arguments": {}}</tool_call>'), ("hermes", "  <tool_"),
    ("llama3_json", '{"name": "Ada", "parameters": {}}'), ("llama3_json", '{"title": "x", "name": "get_weather"}'),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'), ("llama3_json", "{"), ("mistral", "[TOOL_CALLS] later"),
    ("mistral", "[TOOL_CALLS][]"), ("mistral", "[TOOL_CALLS]f[ARGS]none"), ("mistral", "[1, 2]"),
    ("granite", "<|tool_call|>none"), ("qwen3_xml", "<tool_call>\nf\n</tool_call>"),
    ("qwen3_xml", "<function=>x"), ("qwen3_xml", "<function=a\nb>"),
])
def test_what_is_no_call_is_text(name: str, text: str) -> None:
    assert read(name, text) == (text, [])


@pytest.mark.parametrize(("text", "expected"), [
    (f"  Hi.\n\n{HERMES_CALL}\n", "  Hi."), (f"\n{HERMES_CALL}\n\nDone.", "Done."), (f"A\n{HERMES_CALL}\nB\n", "A\nB\n"),
])
def test_text_around_calls(text: str, expected: str) -> None:
    assert read("hermes", text) == (expected, [OSLO])


def test_a_long_output_of_beginnings_is_read_in_linear_time() -> None:
    text = '<tool_call>{"name": "f", "id": "' * 4000
    assert read("hermes", text) == (text, [])
