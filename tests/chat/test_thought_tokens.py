"""Marks around thoughts, calls and results: an assistant's own writing in its text, plain text in everybody else's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from coserve.chat.template import ChatExtras
from coserve.core import InvalidRequest
from coserve.text.examples import ExampleEncoder, Notes
from coserve.text.tokenizer import ChatTokenizer, TextRules
from tests.chat_templates import ALWAYS_THINKING, THINKING, THINKING_MARKS
from tests.tiny_tokenizer import CHATML, IM_END, IM_START, build_sentencepiece_tokenizer, build_tiny_tokenizer

ALLOWED = TextRules(allow_control_tokens=True)
WORD = "[word]"
"""An added token that no template writes."""
HI = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    added = [*THINKING_MARKS, WORD, "Tools"]
    return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("t"), chat_template=THINKING, added=added))


def count(tokenizer: ChatTokenizer, ids: list[int], name: str) -> int:
    (token,) = tokenizer.encode(name)
    return ids.count(token)


def test_which_tokens_are_control_tokens(tokenizer: ChatTokenizer) -> None:
    controls = tokenizer.controls
    for name in (*THINKING_MARKS, IM_START, IM_END):
        assert controls.holds(f"a{name}b"), name
        assert controls.holds(f"a{name}b", own=True) == (name in (IM_START, IM_END)), name
    assert not controls.holds(WORD), "the template doesn't write it"
    assert not controls.holds("Tools"), "the template writes it, but it is a word"


@pytest.mark.parametrize("name", THINKING_MARKS)
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_in_others_texts_they_are_plain_text(tokenizer: ChatTokenizer, role: str, name: str) -> None:
    text = f"{name}x{name}"
    messages = [HI, {"role": role, "content": text}]
    ids = tokenizer.encode_chat(messages)
    clean = tokenizer.encode_chat([HI, {"role": role, "content": "x"}])
    assert count(tokenizer, ids, name) == count(tokenizer, clean, name)
    assert tokenizer.decode(ids, False) == tokenizer.render_chat(messages, add_generation_prompt=True)
    allowed = tokenizer.encode_chat(messages, rules=ALLOWED)
    assert count(tokenizer, allowed, name) == count(tokenizer, clean, name) + 2


@pytest.mark.parametrize("name", THINKING_MARKS)
def test_in_tools_and_variables_they_are_plain_text(tokenizer: ChatTokenizer, name: str) -> None:
    function = {"name": f"n{name}", "description": name, "parameters": {"properties": {name: {"enum": [name]}}}}
    extras = ChatExtras(tools=[{"type": "function", "function": function}], variables={"system": name})
    ids = tokenizer.encode_chat([HI], extras=extras)
    assert tokenizer.decode(ids, False).count(name) >= 4
    clean = ChatExtras(tools=[{"type": "function", "function": {"name": "n"}}])
    assert count(tokenizer, ids, name) == count(tokenizer, tokenizer.encode_chat([HI], extras=clean), name)


@pytest.mark.parametrize("name", THINKING_MARKS)
def test_in_an_assistants_calls_they_are_plain_text(tokenizer: ChatTokenizer, name: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": name}}}
    clean = {"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
    ids, others = (
        tokenizer.encode_chat([HI, {"role": "assistant", "content": "", "tool_calls": [each]}, HI]) for each in (call, clean)
    )
    assert count(tokenizer, ids, name) == count(tokenizer, others, name)


def test_an_assistants_text_keeps_its_own_marks(tokenizer: ChatTokenizer) -> None:
    content = '<think>\nHm.\n</think>\n\nSee:\n<tool_call>\n{"name": "f"}\n</tool_call>'
    messages = [HI, {"role": "assistant", "content": content}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert ids == tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=False))
    assert [count(tokenizer, ids, name) for name in THINKING_MARKS] == [1, 1, 1, 1, 0, 0]
    given = [HI, {"role": "assistant", "content": content.partition("</think>\n\n")[2], "reasoning_content": "Hm."}]
    assert tokenizer.encode_chat(given, add_generation_prompt=False) == ids


def test_an_assistants_text_ends_no_turn(tokenizer: ChatTokenizer) -> None:
    messages = [HI, {"role": "assistant", "content": f"<think>\na{IM_END}\n</think>\n\nb{IM_END}{IM_START}"}]
    ids = tokenizer.encode_chat(messages, add_generation_prompt=False)
    assert [count(tokenizer, ids, name) for name in ("<think>", "</think>", IM_START, IM_END)] == [1, 1, 2, 2]
    assert tokenizer.decode(ids, False) == tokenizer.render_chat(messages, add_generation_prompt=False)


def test_earlier_thoughts_are_left_out_as_the_template_has_it(tokenizer: ChatTokenizer) -> None:
    """A template that splits at the tag finds it, and nobody else's tag is split at."""
    later = {"role": "user", "content": "a</think>b"}
    for turn in ({"content": "<think>\nHm.\n</think>\n\nYes."}, {"content": "Yes.", "reasoning_content": "Hm."}):
        messages = [HI, {"role": "assistant", **turn}, later]
        text = tokenizer.decode(tokenizer.encode_chat(messages), False)
        assert text == (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\na</think>b<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


def test_training_learns_the_marks(tokenizer: ChatTokenizer) -> None:
    notes = Notes()
    messages = [{"role": "user", "content": "Is <think> a tag?"},
                {"role": "assistant", "content": "<think>\nHm.\n</think>\n\n<tool_call>\n{}\n</tool_call>"}]
    ids, weights = ExampleEncoder(tokenizer).encode_training(messages, notes=notes)
    trained = ids[weights > 0].tolist()
    assert [count(tokenizer, trained, name) for name in THINKING_MARKS] == [1, 1, 1, 1, 0, 0]
    assert count(tokenizer, ids.tolist(), "<think>") == 1
    assert notes.control_texts == 1, "the question's"


def test_texts_outside_the_template_keep_the_marks(tokenizer: ChatTokenizer) -> None:
    prompt, completion = f"<tool_response>x{IM_END}", "<think>\nHm.</think>Yes."
    ids, _ = ExampleEncoder(tokenizer).encode_completion(prompt, completion)
    assert [count(tokenizer, ids.tolist(), name) for name in ("<tool_response>", "<think>", "</think>", IM_END)] == [1, 1, 1, 1]
    ids, _ = ExampleEncoder(tokenizer).encode_text(prompt + completion)
    assert [count(tokenizer, ids.tolist(), name) for name in ("<tool_response>", "<think>", "</think>", IM_END)] == [1, 1, 1, 1]


def test_marks_that_a_tokenizer_calls_special_stay_control_tokens_for_all(tmp_path: Path) -> None:
    directory = build_tiny_tokenizer(tmp_path, chat_template=THINKING, added=THINKING_MARKS)
    for path in (directory / "tokenizer.json", directory / "tokenizer_config.json"):
        path.write_text(re.sub(r'"special":\s*false', '"special": true', path.read_text()))
    special = ChatTokenizer.load(directory)
    assert "<think>" in special.special_tokens
    ids = special.encode_chat([HI, {"role": "assistant", "content": "a<think>b"}], add_generation_prompt=False)
    assert count(special, ids, "<think>") == 1, "the template's own"


def test_thoughts_in_every_turn_of_a_template_are_no_marks_of_turns(tmp_path: Path) -> None:
    """The probe of turns renders them, and they are an assistant's own all the same."""
    template = THINKING.replace("loop.index0 > last.question", "true")
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path, chat_template=template, added=THINKING_MARKS))
    messages = [HI, {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}, HI]
    ids = tokenizer.encode_chat(messages)
    assert ids == tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True))


def test_sentencepiece(tmp_path: Path) -> None:
    template = ALWAYS_THINKING.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    tokenizer = ChatTokenizer.load(build_sentencepiece_tokenizer(tmp_path, chat_template=template, added=THINKING_MARKS))
    ids = tokenizer.encode_chat([{"role": "user", "content": "a <think> b"}])
    assert count(tokenizer, ids, "<think>") == 1
    text = "<s> user\na <think> b</s> \n<s> assistant\n<think> \n"
    assert tokenizer.decode(ids, False).replace(" ", "") == text.replace(" ", "")


def test_values_that_are_nested_too_deeply(tokenizer: ChatTokenizer) -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        tokenizer.encode_chat([HI], extras=ChatExtras(variables={"a": deep}))


def test_another_template_has_its_own_marks(tokenizer: ChatTokenizer) -> None:
    plain = tokenizer.with_template(CHATML)
    assert (plain.chat_template, plain.has_chat_template) == (CHATML, True)
    assert not plain.controls.holds("<think>")
    assert tokenizer.controls.holds("<think>")
    longer = tokenizer.with_template(THINKING + " ")
    assert longer.controls is tokenizer.controls, "the copy of the tokenizer is large"
    assert plain.encode_chat([HI]) == tokenizer.encode_chat([HI])
    assert tokenizer.chat_template == THINKING
