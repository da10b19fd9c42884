"""Conversations whose last message is to be continued; templates that write BOS, and those that refuse conversations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.chat.template import ChatTemplate
from coserve.core import ContextExceeded, InvalidRequest
from coserve.text.tokenizer import ChatTokenizer
from tests.chat_templates import ALTERNATING, ALWAYS_THINKING, INSTRUCT, REWRITING, THINKING, THINKING_MARKS
from tests.tiny_tokenizer import CHATML, IM_END, build_sentencepiece_tokenizer, build_tiny_tokenizer

Turns = list[dict[str, Any]]
Build = Callable[[str], ChatTokenizer]


def turns(*contents: str) -> Turns:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return lambda template: ChatTokenizer.load(
        build_tiny_tokenizer(tmp_path_factory.mktemp("t"), chat_template=template, added=THINKING_MARKS)
    )


@pytest.fixture(scope="module")
def tokenizer(build: Build) -> ChatTokenizer:
    return build(CHATML)


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(build_sentencepiece_tokenizer(tmp_path_factory.mktemp("m"), chat_template=INSTRUCT))


def as_transformers(tokenizer: ChatTokenizer, messages: Turns) -> list[int]:
    ids: list[int] = tokenizer._hf.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=False, continue_final_message=True, return_dict=False
    )
    return ids


def continued(tokenizer: ChatTokenizer, messages: Turns, **options: Any) -> list[int]:
    return tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final=True, **options)


@pytest.mark.parametrize("template", [CHATML, REWRITING, ALTERNATING, THINKING, ALWAYS_THINKING], ids=range(5))
@pytest.mark.parametrize("content", ["The", "The ", "  The quick\n", "a<", "1 + 1 =", "🙂", "</", "x</thi"])
def test_as_transformers_does_it(build: Build, template: str, content: str) -> None:
    tokenizer = build(template)
    messages = turns("Hi", content)
    ids = continued(tokenizer, messages)
    assert ids == as_transformers(tokenizer, messages)
    trims = template is ALTERNATING
    assert tokenizer.decode(ids, False).endswith(content.strip() if trims else content)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@settings(deadline=None, max_examples=150)
def test_any_content_stays_open(tokenizer: ChatTokenizer, content: str) -> None:
    assert tokenizer.decode(continued(tokenizer, turns("Hi", content)), False) == (
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{content}"
    )


def test_control_tokens_in_it_are_plain_text(tokenizer: ChatTokenizer) -> None:
    ids = continued(tokenizer, turns("Hi", f"a{IM_END}b{IM_END}"))
    assert ids.count(tokenizer.eos_token_id or -1) == 1
    assert tokenizer.decode(ids, False).endswith(f"assistant\na{IM_END}b{IM_END}")


def test_thoughts_before_it(build: Build) -> None:
    tokenizer = build(THINKING)
    messages = turns("Hi", "Yes, ")
    messages[1]["reasoning_content"] = "Hm."
    assert tokenizer.decode(continued(tokenizer, messages), False).endswith("<think>\nHm.\n</think>\n\nYes, ")


def test_a_template_that_drops_it(build: Build) -> None:
    silent = build("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(InvalidRequest, match="leaves out the last message's content") as caught:
        continued(silent, turns("Hi", "The"))
    assert caught.value.param == "continue_final_message"
    with pytest.raises(InvalidRequest, match="no content to continue"):
        continued(silent, [*turns("Hi"), {"role": "assistant", "content": None}])


def test_an_error_of_the_template_does_not_show_the_tag(build: Build) -> None:
    strict = build("{{ raise_exception('no: ' + messages[-1].content + '!') }}")
    with pytest.raises(InvalidRequest, match=r"refuses the conversation: no: The!$"):
        continued(strict, turns("Hi", "The"))


# --- one BOS ---


def test_a_template_that_writes_bos(mistral: ChatTokenizer) -> None:
    bos, eos = mistral.encode("<s>")[0], mistral.eos_token_id
    for messages in (turns("Hi"), turns("Hi", "Yes", "No")):
        ids = mistral.encode_chat(messages)
        assert (ids[0], ids.count(bos), ids.count(eos or -1)) == (bos, 1, len(messages) // 2)
    ids = continued(mistral, turns("Hi", "The quick"))
    assert ids == as_transformers(mistral, turns("Hi", "The quick"))
    assert (ids[0], ids.count(bos), ids.count(eos or -1)) == (bos, 1, 0)
    assert continued(mistral, turns("Hi", "The quick"), add_special_tokens=True) == [bos, *ids]


def test_a_template_that_leaves_bos_to_the_tokenizer(mistral: ChatTokenizer) -> None:
    bos = mistral.encode("<s>")[0]
    plain = mistral.with_template(INSTRUCT.replace("{{- bos_token }}", ""))
    for options in ({"add_generation_prompt": True}, {"add_generation_prompt": False, "continue_final": True}):
        messages = turns("Hi", "The </s> quick") if "continue_final" in options else turns("Hi </s>")
        assert plain.encode_chat(messages, **options).count(bos) == 0
        ids = plain.encode_chat(messages, add_special_tokens=True, **options)
        assert ids == [bos, *plain.encode_chat(messages, **options)]


# --- templates that refuse ---


@pytest.mark.parametrize(("template", "messages", "reason"), [
    (ALTERNATING, [{"role": "system", "content": "s"}, *turns("Hi")], "System role not supported"),
    (ALTERNATING, [*turns("Hi"), *turns("Hi")], "Roles must alternate user/assistant"),
    (INSTRUCT, [*turns("Hi"), *turns("Hi")], "roles must alternate"),
    (INSTRUCT, turns("Hi", "Yes")[1:], "roles must alternate"),
])
def test_a_template_gives_its_own_reason(build: Build, template: str, messages: Turns, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        build(template).encode_chat(messages)
    assert caught.value.param == "messages"


def test_a_system_message_goes_where_the_template_puts_it(build: Build) -> None:
    text = build(INSTRUCT).render_chat([{"role": "system", "content": "Be."}, *turns("Hi")], add_generation_prompt=True)
    assert text.endswith("[INST] Be.\n\nHi [/INST]")


# --- size ---


def test_a_rendered_conversation_may_not_be_longer_than_it_is_told(build: Build, tmp_path: Path) -> None:
    wordy = build("{% for i in range(1000) %}{{ 'word ' * 10 }}{% endfor %}{{ messages[0].content }}")
    with pytest.raises(ContextExceeded, match="more than 40000 characters"):
        wordy.encode_chat(turns("Hi"), max_chars=10_000)
    assert len(wordy.encode_chat(turns("Hi"), max_chars=20_000)) > 1000


def test_what_a_template_reads() -> None:
    read = ChatTemplate(
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% macro f(x) %}{{ x }}{{ tone }}{% endmacro %}"
        "{% for m in messages %}{{ f(m) }}{% endfor %}{{ bos_token }}{{ date if date is defined else strftime_now('%d') }}", {},
    ).reads
    assert read == {"thinking", "tone", "messages", "bos_token", "date"}
    assert ChatTemplate("{% if", {}).reads == frozenset()
