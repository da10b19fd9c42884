"""Grammars of calls, held against llguidance: what a format allows, what it must not, and that its reader reads the same."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from coserve.chat.toolformats.events import CallEvent
from coserve.chat.toolformats.formats import FORMATS
from coserve.chat.toolformats.grammar import call_grammar, enforced, schema_grammar
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_tiny_tokenizer

llguidance = pytest.importorskip("llguidance")

WEATHER: dict[str, Any] = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "required": ["city"], "additionalProperties": False, "$defs": {"many": {"type": "array", "items": {
        "type": "integer"}}},
    "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}, "near": {"$ref": "#/$defs/many"},
    },
}}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
TOOLS = [WEATHER, TIME]
ARGUMENTS = '{"city": "Zürich", "days": 3, "unit": "C", "near": [1, 2]}'
_XML = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nZürich <b>\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=unit>\nC\n</parameter>\n<parameter=near>\n[1, 2]\n</parameter>\n</function>\n</tool_call>"
)
OTHER_XML = "<tool_call>\n<function=get_time>\n</function>\n</tool_call>"
ONE: Mapping[str, str] = {
    "hermes": f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
    "granite": f'<|tool_call|>[{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
    "llama3_json": f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
    "mistral_v11": f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}",
    "qwen3_xml": _XML,
}
TWO: Mapping[str, str] = {
    "hermes": f'{ONE["hermes"]}\n<tool_call>\n{{"name": "get_time", "arguments": {{}}}}\n</tool_call>',
    "granite": ONE["granite"][:-1] + ', {"name": "get_time", "arguments": {}}]',
    "mistral": ONE["mistral"][:-1] + ', {"name": "get_time", "arguments": {}}]',
    "mistral_v11": ONE["mistral_v11"] + "[TOOL_CALLS]get_time[CALL_ID]abcdefgh9[ARGS]{}",
    "qwen3_xml": f"{_XML}\n{OTHER_XML}",
}
SPECIAL = {
    "mistral_v11": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), "granite": ("<|tool_call|>",), "llama3_json": ("<|python_tag|>",),
}
WRONG = [
    ('"city"', '"town"'), ("city>", "town>"), ("3", "x"), ("[1, 2]", "[1, {}]"), ("get_weather", "get_sun"), ('"C"', '"K"'),
    ("\nC\n", "\nK\n"), ("</parameter>\n</function>", "</function>"),
]


class Matcher:
    """A grammar over a tiny tokenizer."""

    def __init__(self, tokenizer: ChatTokenizer, grammar: str) -> None:
        self._tokenizer, self._grammar = tokenizer, grammar + '\n%llguidance {"no_forcing": true}\n'
        size = tokenizer.vocab_size
        tokens = [tokenizer.token_bytes[token] for token in range(size)]
        table = SimpleNamespace(
            tokens=[*tokens, b"<|end|>"], special_token_ids=[*tokenizer.special_ids, size], eos_token_id=size, bos_token_id=None
        )
        self._table = llguidance.LLTokenizer(llguidance.TokenizerWrapper(table))
        assert not self._new().is_error(), f"{self._new().get_error()}\n{grammar}"

    def takes(self, text: str) -> bool:
        """Whether the text, as a whole, is one that the grammar allows."""
        matcher = self._new()
        return all(map(matcher.consume_token, self._tokenizer.encode(text))) and matcher.is_accepting()

    def _new(self) -> Any:
        return llguidance.LLMatcher(self._table, self._grammar, log_level=0)


@pytest.fixture(scope="module", params=ONE)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ChatTokenizer]:
    """A format as the tables above call it, and a tokenizer whose special tokens are some of its markers."""
    directory = build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    fast: Any = PreTrainedTokenizerFast.from_pretrained(directory)
    fast.add_tokens([AddedToken(marker, special=True, normalized=False) for marker in SPECIAL.get(request.param, ())])
    fast.save_pretrained(directory)
    return request.param, ChatTokenizer.load(directory)


def matcher(case: tuple[str, ChatTokenizer], *, schema: bool = True, **settings: Any) -> Matcher:
    name, tokenizer = case
    grammar = call_grammar(
        name.removesuffix("_v11"), [enforced(tool, schema=schema) for tool in TOOLS], tokenizer.special_tokens, **settings
    )
    return Matcher(tokenizer, grammar)


@pytest.mark.parametrize("parallel", [True, False])
def test_required(case: tuple[str, ChatTokenizer], parallel: bool) -> None:
    found, name = matcher(case, required=True, parallel=parallel), case[0]
    assert found.takes(ONE[name])
    assert not any(map(found.takes, ("", "No.", f"Let me look. {ONE[name]}", ONE[name][:-1], f"{ONE[name]} Done.")))
    if name in TWO:
        assert found.takes(TWO[name]) == parallel
    for old, new in WRONG:
        if old in ONE[name]:
            assert not found.takes(ONE[name].replace(old, new)), (old, new)


@pytest.mark.parametrize("parallel", [True, False])
def test_not_required(case: tuple[str, ChatTokenizer], parallel: bool) -> None:
    found, name = matcher(case, required=False, parallel=parallel), case[0]
    assert all(map(found.takes, ("", "No.", "\n a < b, <tool, [TOOL ", ONE[name])))
    assert found.takes(f"Let me look.\n{ONE[name]}") or name == "llama3_json"
    if name in TWO:
        assert found.takes(TWO[name]) == parallel
    for old, new in WRONG:
        if old in ONE[name]:
            assert not found.takes(ONE[name].replace(old, new)), (old, new)


def test_any_arguments(case: tuple[str, ChatTokenizer]) -> None:
    found, name = matcher(case, required=False, parallel=True, schema=False), case[0]
    assert found.takes(ONE[name].replace('"city"', '"town"').replace("=city", "=town"))
    assert not found.takes(ONE[name].replace("get_weather", "get_sun"))


def test_a_call_or_an_answer_of_another_grammar(case: tuple[str, ChatTokenizer]) -> None:
    name = case[0]
    answer = 'start: %json {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
    found = matcher(case, required=False, parallel=True, content=answer)
    marked = f"<|python_tag|>{ONE[name]}" if name == "llama3_json" else ONE[name]
    assert all(map(found.takes, ('{"a": 1}', marked)))
    assert not any(map(found.takes, ("No.", '{"b": 1}', "")))


def test_what_a_grammar_allows_is_read_as_calls(case: tuple[str, ChatTokenizer]) -> None:
    name = case[0]
    for text in (ONE[name], TWO.get(name, ONE[name])):
        reader = FORMATS[name.removesuffix("_v11")].new_strict_reader(TOOLS)
        events = [*reader.push(text), *reader.finish()]
        assert [event.name for event in events if isinstance(event, CallEvent)] == ["get_weather", "get_time"][: 1 + (
            text != ONE[name])]


def test_only_what_a_grammar_holds_is_a_call_then() -> None:
    """Else a call could come around the grammar."""
    bare = '{"name": "get_weather", "arguments": {}}'
    for name, text in (
        ("hermes", bare), ("hermes", f"[{bare}]"), ("granite", bare), ("granite", f"<tool_call>{bare}"), ("mistral", bare),
        ("qwen3_xml", "<function=get_weather>\n</function>"), ("llama3_json", f"[{bare}]"),
    ):
        reader = FORMATS[name].new_strict_reader(TOOLS)
        assert not any(isinstance(event, CallEvent) for event in [*reader.push(text), *reader.finish()]), (name, text)


@pytest.mark.parametrize(("parameters", "taken", "refused"), [
    (None, "{}", '{"a": 1}'), ({}, '{"a": 1}', "[]"), ({"properties": {"a": {"type": "null"}}}, '{"a": null}', '{"a": 1}'),
    ({"properties": {"a": {}}}, "{}", '{"b": 1}'), ({"properties": {"a": {}}, "additionalProperties": {}}, '{"b": 1}', "[]"),
    ({"allOf": [{"properties": {"a": {}}}], "properties": {"b": {}}}, '{"a": 1}', "[]"),
    ({"type": "object", "x-guidance": {"whitespace_flexible": True}}, "{ }", "[]"),
    ({"properties": {"a": {}}, "required": ["b"]}, '{"b": 1}', "{}"),
    ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"properties": {"b": {}}}}}, '{"a": {}}', '{"a": {"c": 1}}'),
])
def test_parameters(case: tuple[str, ChatTokenizer], parameters: Any, taken: str, refused: str) -> None:
    function = {"name": "f"} if parameters is None else {"name": "f", "parameters": parameters}
    found = Matcher(case[1], schema_grammar(enforced({"type": "function", "function": function}, schema=True)))
    assert found.takes(taken)
    assert not found.takes(refused)


def test_keywords_that_cannot_be_enforced_are_ignored_of_tools_that_are_not_strict(case: tuple[str, ChatTokenizer]) -> None:
    numbers = [{"type": "integer"}, {"type": "integer", "format": "odd"}]
    parameters = {"properties": {"a": {"oneOf": numbers}}, "required": ["a"], "propertyNames": {"pattern": "a"}}
    function = {"name": "f", "parameters": parameters}
    found = Matcher(case[1], schema_grammar(enforced({"type": "function", "function": function}, schema=True)))
    assert found.takes('{"a": 1}')
    assert not found.takes('{"a": "x"}')
    with pytest.raises(AssertionError, match="propertyNames"):
        Matcher(case[1], schema_grammar(enforced({"type": "function", "function": {**function, "strict": True}}, schema=True)))


def test_white_space_has_a_limit(case: tuple[str, ChatTokenizer]) -> None:
    found = Matcher(case[1], schema_grammar(enforced(WEATHER, schema=True)))
    assert found.takes('{"city":"x","days":1}')
    assert not found.takes('{"city":  "x"}')
    assert not found.takes('{\n"city": "x"}')
