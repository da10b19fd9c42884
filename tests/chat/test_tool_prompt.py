"""What a template is given of tools, calls and results, and what becomes text before."""

from __future__ import annotations

from typing import Any

import pytest

from coserve.chat.template import ChatExtras, ChatTemplate
from coserve.chat.toolprobe import format_of
from coserve.core import InvalidRequest
from tests.chat_templates import ALTERNATING
from tests.tiny_tokenizer import SMOL_CHATML
from tests.tool_templates import (
    FAMILIES,
    GRANITE_TEXT_ONLY,
    HERMES,
    LIKE_GLM,
    LLAMA3,
    MISTRAL,
    QWEN3_XML,
    REFUSING_RESULTS,
    SMOLLM3,
    SMOLLM3_XML_TOOLS,
    UNKNOWN_CALLS,
)

TOOL: dict[str, Any] = {"type": "function", "function": {
    "name": "get_weather", "description": "The weather of a place.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}}
CALL: dict[str, Any] = {
    "id": "call_12345678901", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}},
}
OTHER = {**CALL, "id": "call_2"}
USER: dict[str, Any] = {"role": "user", "content": "Weather?"}
CALLING: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT: dict[str, Any] = {"role": "tool", "content": "rainy", "tool_call_id": CALL["id"], "name": "get_weather"}
TEXT_OF_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


def render(source: str, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None) -> str:
    template = ChatTemplate(source, {"eos_token": "</s>", "bos_token": "<s>"})
    return template.render(messages, add_generation_prompt=True, extras=ChatExtras(tools=tools or []))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_given_tools_as_they_are(name: str) -> None:
    found = ChatTemplate(FAMILIES[name], {"eos_token": "</s>"}).tool_prompt
    assert found.tools
    assert found.call_format == {"smollm3": "hermes", "mistral_v11": "mistral"}.get(name, name)
    assert found.calls == (name != "smollm3")
    assert found.results
    text = render(FAMILIES[name], [USER, CALLING, RESULT], tools=[TOOL])
    assert text.count("The weather of a place.") == 1
    assert "rainy" in text
    assert "Zürich" in text


def test_a_conversation_without_tools_is_as_it_was() -> None:
    for source in (*FAMILIES.values(), SMOL_CHATML):
        bare = ChatTemplate(source, {"eos_token": "</s>"})
        text = bare.render([USER], add_generation_prompt=True)
        assert "tool_prompt" not in vars(bare), "nothing is tried out where there are no tools"
        assert "<tools>" not in text


def test_each_template_is_what_it_is_meant_to_be() -> None:
    for source, tools, calls in (
        (SMOLLM3_XML_TOOLS, True, False), (GRANITE_TEXT_ONLY, True, False), (LIKE_GLM, False, False),
        (UNKNOWN_CALLS, False, False), (REFUSING_RESULTS, True, True),
    ):
        found = ChatTemplate(source, {}).tool_prompt
        assert (found.tools, found.calls) == (tools, calls)
    assert ChatTemplate(LIKE_GLM, {}, "hermes").tool_prompt.tools, "a way that is named is believed"
    assert "<tool_call>get_weather " in render_raw(LIKE_GLM, [USER, CALLING])


def render_raw(source: str, messages: list[dict[str, Any]]) -> str:
    template = ChatTemplate(source, {}, "hermes")
    return template.render(messages, add_generation_prompt=False)


def test_tools_in_another_variable() -> None:
    text = render(SMOLLM3_XML_TOOLS, [USER, CALLING, RESULT], tools=[TOOL])
    assert f"<tools>\n{TOOL['function']}\n</tools>" in text
    assert TEXT_OF_CALL in text


def test_calls_as_granite_writes_them() -> None:
    text = render(GRANITE_TEXT_ONLY, [USER, {**CALLING, "tool_calls": [CALL, OTHER]}, RESULT], tools=[TOOL])
    call = '{"name": "get_weather", "arguments": {"city": "Zürich"}}'
    assert f"assistant<|end_of_role|><|tool_call|>[{call}, {call}]<|end_of_text|>" in text


@pytest.mark.parametrize("source", [SMOL_CHATML, UNKNOWN_CALLS, LIKE_GLM])
def test_a_template_without_tools_gets_them_as_text(source: str) -> None:
    text = render(source, [{"role": "system", "content": "Be short."}, USER, CALLING, RESULT], tools=[TOOL])
    system, user, call, result, _ = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe short.\n\n# Tools\n")
    assert '"name": "get_weather"' in system
    assert system.index("<tools>\n{") < system.index("}\n</tools>")
    assert user == "user\nWeather?<|im_end|>\n"
    assert call == f"assistant\n{TEXT_OF_CALL}<|im_end|>\n"
    assert result == "user\n<tool_response>\nrainy\n</tool_response><|im_end|>\n"


def test_a_system_message_is_made_for_them() -> None:
    assert render(SMOL_CHATML, [USER], tools=[TOOL]).startswith("<|im_start|>system\n# Tools\n")


def test_results_that_follow_each_other_are_one_turn() -> None:
    calling = {**CALLING, "content": "Two.", "tool_calls": [CALL, OTHER]}
    text = render(SMOL_CHATML, [USER, calling, RESULT, {**RESULT, "content": "dry"}, USER], tools=[TOOL])
    assert f"assistant\nTwo.\n{TEXT_OF_CALL}\n{TEXT_OF_CALL}<|im_end|>" in text
    results = "<tool_response>\nrainy\n</tool_response>\n<tool_response>\ndry\n</tool_response>"
    assert f"<|im_start|>user\n{results}<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>" in text


def test_where_there_is_no_system_message_the_first_one_has_them() -> None:
    text = render(ALTERNATING, [USER, CALLING, RESULT], tools=[TOOL])
    assert text.startswith("<|im_start|>user\n# Tools\n")
    assert "in plain text.\n\nWeather?<|im_end|>" in text


def test_calls_that_a_template_ignores_become_text() -> None:
    text = render(SMOLLM3, [USER, CALLING, RESULT], tools=[TOOL])
    assert f"<|im_start|>assistant\n{TEXT_OF_CALL}<|im_end|>" in text
    assert text.count("</tools>") == 1


def test_a_text_that_is_no_object_stays() -> None:
    broken = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": '}}
    text = render(SMOL_CHATML, [USER, {**CALLING, "tool_calls": [broken]}])
    assert '<tool_call>\n{"name": "get_weather", "arguments": {"city": }\n</tool_call>' in text


def test_ids_of_mistral_have_nine_letters() -> None:
    text = render(MISTRAL, [USER, {**CALLING, "tool_calls": [CALL, {**CALL, "id": "abcdefgh9"}]}, RESULT])
    ids = [part[:9] for part in text.split('id": "')[1:]]
    assert ids[1] == "abcdefgh9"
    assert ids[0] == ids[2] != ids[1]
    assert all(found.isalnum() for found in ids)


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(InvalidRequest, match="Results are not supported by this model"):
        render(REFUSING_RESULTS, [USER, CALLING, RESULT], tools=[TOOL])


def test_several_calls_where_a_turn_takes_one() -> None:
    calling = {**CALLING, "tool_calls": [CALL, OTHER]}
    dry = {**RESULT, "content": "dry", "tool_call_id": "call_2"}
    apart = [USER, CALLING, RESULT, {**CALLING, "tool_calls": [OTHER]}, dry, USER]
    for together in ([USER, calling, RESULT, dry, USER], [USER, calling, dry, RESULT, USER]):
        assert render(LLAMA3, together, tools=[TOOL]) == render(LLAMA3, apart, tools=[TOOL])
    assert render(LLAMA3, [USER, calling]) == render(LLAMA3, [USER, CALLING, {**CALLING, "tool_calls": [OTHER]}])


def test_the_format_is_known_by_the_source() -> None:
    """Where calls aren't rendered."""
    sources = {"hermes": HERMES, "qwen3_xml": QWEN3_XML, "mistral": MISTRAL, "granite": GRANITE_TEXT_ONLY}
    assert {name: format_of(source) for name, source in sources.items()} == {name: name for name in sources}
    assert format_of(SMOL_CHATML) is None
