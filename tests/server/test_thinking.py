"""Thinking over HTTP: what a request says about it, thoughts beside the answer, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from coserve.chat.reasoning import STYLES, Begin
from coserve.grammar import after
from coserve.server.inference.deltas import ContentDelta, PlainReader, ReasoningDelta
from coserve.server.inference.thoughts import ReasoningCounter, Thoughts, find_style
from coserve.text.tokenizer import ChatTokenizer
from tests.chat_templates import ALWAYS_THINKING, THINKING, THINKING_MARKS
from tests.server.fakes import MODEL, Reply, Script, send
from tests.server.sites import CHAT_PATH, HI, Site, open_site
from tests.tiny_tokenizer import CHATML, build_tiny_tokenizer

OUTPUT = "<think>\nThe quick\n\nbrown fox?\n</think>\n\nHello, grün 🙂 world."
THOUGHTS, ANSWER = "The quick\n\nbrown fox?", "Hello, grün 🙂 world."
GRADED = THINKING + "{{ '[' + reasoning_effort + ']' if reasoning_effort is defined }}"


def load(factory: pytest.TempPathFactory, template: str, **options: Any) -> ChatTokenizer:
    directory = build_tiny_tokenizer(factory.mktemp("t"), chat_template=template, added=THINKING_MARKS, **options)
    return ChatTokenizer.load(directory)


@pytest.fixture(scope="module")
def thinking_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(load(tmp_path_factory, THINKING)) as site:
        yield site


@pytest.fixture(scope="module")
def r1_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(load(tmp_path_factory, ALWAYS_THINKING)) as site:
        yield site


@pytest.fixture(scope="module")
def graded_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(load(tmp_path_factory, GRADED)) as site:
        yield site


@pytest.fixture
def thinker(thinking_site: Site) -> Site:
    thinking_site.reset()
    thinking_site.engine.script = Script(text=OUTPUT)
    return thinking_site


@pytest.fixture
def r1(r1_site: Site) -> Site:
    r1_site.reset()
    r1_site.engine.script = Script(text=OUTPUT.removeprefix("<think>\n"))
    return r1_site


@pytest.fixture
def graded(graded_site: Site) -> Site:
    graded_site.reset()
    return graded_site


def ask(site: Site, **fields: Any) -> Reply:
    return send(site.port, CHAT_PATH, {"messages": HI, **fields})


def message(site: Site, **fields: Any) -> dict[str, Any]:
    reply = ask(site, **fields)
    assert reply.status == 200, reply.text
    found: dict[str, Any] = reply.json["choices"][0]["message"]
    return found


def streamed(site: Site, **fields: Any) -> list[dict[str, Any]]:
    """The deltas."""
    events = ask(site, stream=True, **fields).events
    assert events.pop() == "[DONE]"
    return [json.loads(event)["choices"][0]["delta"] for event in events]


def joined(deltas: list[dict[str, Any]], field: str) -> str:
    return "".join(delta.get(field) or "" for delta in deltas)


def prompt(site: Site) -> str:
    return site.tokenizer.decode(site.engine.asked[-1].prompt_ids, skip_special_tokens=False)


# --- thoughts beside the answer ---


def test_thoughts_stand_beside_the_answer(thinker: Site) -> None:
    assert message(thinker) == {"role": "assistant", "content": ANSWER, "refusal": None, "reasoning_content": THOUGHTS}
    deltas = streamed(thinker)
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == (THOUGHTS, ANSWER)
    kinds = ["content" in delta for delta in deltas[1:] if delta]
    assert kinds == sorted(kinds), "thoughts come first"
    assert sum(not kind for kind in kinds) > 5


def test_openais_client_finds_them(thinker: Site) -> None:
    reply = thinker.client.chat.completions.create(model=MODEL, messages=HI)
    assert (reply.choices[0].message.reasoning_content, reply.choices[0].message.content) == (THOUGHTS, ANSWER)  # type: ignore[attr-defined]
    chunks = list(thinker.client.chat.completions.create(model=MODEL, messages=HI, stream=True))
    found = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert found == THOUGHTS


def test_thoughts_that_the_prompt_begins(r1: Site) -> None:
    assert message(r1) == {"role": "assistant", "content": ANSWER, "refusal": None, "reasoning_content": THOUGHTS}
    assert prompt(r1).endswith("assistant\n<think>\n")
    deltas = streamed(r1)
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == (THOUGHTS, ANSWER)


def test_an_output_that_ends_in_its_thoughts(r1: Site) -> None:
    reply = ask(r1, max_tokens=4).json
    found, usage = reply["choices"][0], reply["usage"]
    assert THOUGHTS.startswith(found["message"]["reasoning_content"])
    assert (found["message"]["content"], found["finish_reason"]) == ("", "length")
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 4}


def test_an_output_without_thoughts(thinker: Site) -> None:
    thinker.engine.script = Script(text="Just </think> text.")
    assert message(thinker) == {"role": "assistant", "content": "Just </think> text.", "refusal": None}
    assert ask(thinker).json["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


def test_several_outputs(thinker: Site) -> None:
    reply = ask(thinker, n=2).json
    assert [choice["message"]["reasoning_content"] for choice in reply["choices"]] == [THOUGHTS] * 2
    one = ask(thinker).json["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2 * one


def test_reasoning_tokens_are_those_up_to_the_end_of_the_thoughts(thinker: Site, r1: Site) -> None:
    for site, text in ((thinker, OUTPUT), (r1, OUTPUT.removeprefix("<think>\n"))):
        ids = site.tokenizer.encode(text)
        (end,) = site.tokenizer.encode("</think>")
        expected = ids.index(end) + 1
        assert ask(site).json["usage"]["completion_tokens_details"] == {"reasoning_tokens": expected}
        options = {"include_usage": True, "continuous_usage_stats": True}
        events = ask(site, stream=True, stream_options=options).events[:-1]
        counts = [json.loads(event)["usage"]["completion_tokens_details"]["reasoning_tokens"] for event in events]
        assert counts == sorted(counts) and counts[-1] == expected


def test_a_model_that_does_not_think_has_no_such_count(site: Site) -> None:
    usage = ask(site).json["usage"]
    assert "completion_tokens_details" not in usage
    site.engine.script = Script(text=OUTPUT)
    assert message(site) == {"role": "assistant", "content": OUTPUT, "refusal": None}


def test_counting_by_text_where_tags_are_several_tokens(site: Site) -> None:
    """This tokenizer spells them in pieces."""
    ids = site.tokenizer.encode(OUTPUT)
    assert len(site.tokenizer.encode("</think>")) > 1
    counter = ReasoningCounter(site.tokenizer, site.tokenizer.encode("Hi"), Begin.MAYBE)
    counts = []
    for token in ids:
        counter.push([token])
        counts.append(counter.count)
    shown = site.tokenizer.decode(ids[: counter.count])
    assert shown.partition("</think>")[1] and shown.count("\n") <= OUTPUT.partition("Hello")[0].count("\n")
    assert "</think>" not in site.tokenizer.decode(ids[: counter.count - 1])
    assert counts == sorted(counts)


# --- what is shown ---


def test_include_reasoning(thinker: Site) -> None:
    assert message(thinker, include_reasoning=False) == {"role": "assistant", "content": ANSWER, "refusal": None}
    deltas = streamed(thinker, include_reasoning=False)
    assert (joined(deltas, "reasoning_content"), joined(deltas, "content")) == ("", ANSWER)
    assert message(thinker, include_reasoning=True)["reasoning_content"] == THOUGHTS


def test_separate_reasoning(thinker: Site) -> None:
    assert message(thinker, separate_reasoning=False) == {"role": "assistant", "content": OUTPUT, "refusal": None}
    assert joined(streamed(thinker, separate_reasoning=False), "content") == OUTPUT
    assert ask(thinker, separate_reasoning=False).json["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0


def test_stream_reasoning(thinker: Site) -> None:
    deltas = streamed(thinker, stream_reasoning=False)
    assert [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta] == [THOUGHTS]
    assert joined(deltas, "content") == ANSWER
    cut = streamed(thinker, stream_reasoning=False, max_tokens=6)
    (whole,) = [delta["reasoning_content"] for delta in cut if "reasoning_content" in delta]
    assert THOUGHTS.startswith(whole)


def test_readers_deltas() -> None:
    reader = Thoughts(style=STYLES["qwen3"]).reader(Begin.THOUGHTS, PlainReader)()
    assert reader.push("Hm.\n</thi") == [ReasoningDelta("Hm.")]
    assert reader.push("nk>\n") == []
    assert reader.push("\nYes") == [ContentDelta("Yes")]
    assert reader.finish() == []


@pytest.mark.parametrize("begin", [Begin.MAYBE, Begin.THOUGHTS, Begin.MIDST, Begin.ANSWER])
def test_where_a_grammar_begins(begin: Begin) -> None:
    compose = Thoughts(style=STYLES["qwen3"], expected=True).compose(begin)
    assert (compose is None) == (begin is Begin.ANSWER)
    opening = "<think>" if begin is Begin.MAYBE else None
    assert compose is None or (compose("x"), compose(None)) == (after("</think>", "x", begin=opening), None)
    special = Thoughts(style=STYLES["qwen3"], special={"<think>": 6, "</think>": 7}, expected=True).compose(Begin.MAYBE)
    assert special is not None and special("x") == after(7, "x", begin=6)
    assert Thoughts(style=STYLES["qwen3"], expected=False).compose(begin) is None


def test_a_response_format_is_the_answers(thinker: Site) -> None:
    fields = {"response_format": {"type": "json_object"}}
    assert ask(thinker, **fields).status == 200
    behind = thinker.engine.asked[-1].sampling.grammar
    assert ask(thinker, reasoning_effort="none", **fields).status == 200
    alone = thinker.engine.asked[-1].sampling.grammar
    assert alone is not None and behind == after("</think>", alone, begin="<think>")


# --- what a request says ---


def test_thinking_can_be_turned_off(thinker: Site) -> None:
    closed = "<think>\n\n</think>\n\n"
    for fields in (
        {"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}},
    ):
        thinker.engine.script = Script(text="<think> is a tag.")
        assert message(thinker, **fields)["content"] == "<think> is a tag.", "the thoughts are over"
        assert prompt(thinker).endswith(closed), fields
    for fields in (
        {}, {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "low"}, {"reasoning_effort": "xhigh"},
        {"thinking": {"type": "enabled"}}, {"chat_template_kwargs": {}}, {"chat_template_kwargs": None},
        {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"},
    ):
        assert ask(thinker, **fields).status == 200
        assert prompt(thinker).endswith("assistant\n"), fields


def test_effort_reaches_a_template_that_knows_it(graded: Site) -> None:
    for effort in ("none", "minimal", "low", "medium", "high", "xhigh"):
        assert ask(graded, reasoning_effort=effort).status == 200
        closed = "<think>\n\n</think>\n\n" if effort == "none" else ""
        assert prompt(graded).endswith(f"assistant\n{closed}[{effort}]")
    ask(graded, chat_template_kwargs={"reasoning_effort": "mine"}, reasoning_effort="high")
    assert prompt(graded).endswith("[mine]")
    ask(graded, thinking={"type": "enabled"})
    assert prompt(graded).endswith("assistant\n")


def test_what_a_model_without_thinking_takes(site: Site) -> None:
    for fields in ({"reasoning_effort": "none"}, {"thinking": {"type": "disabled"}},
                   {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
                   {"include_reasoning": True, "separate_reasoning": True, "stream_reasoning": True},
                   {"include_reasoning": False, "separate_reasoning": False, "stream_reasoning": False}):
        assert ask(site, **fields).status == 200, fields
    for fields, param in (({"reasoning_effort": "high"}, "reasoning_effort"), ({"thinking": {"type": "enabled"}}, "thinking"),
                          ({"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking")):
        refused = ask(site, **fields)
        assert (refused.status, refused.error["param"]) == (400, param)


def test_what_a_model_that_always_thinks_takes(r1: Site) -> None:
    for fields in ({"reasoning_effort": "high"}, {"thinking": {"type": "enabled"}},
                   {"chat_template_kwargs": {"enable_thinking": True}}):
        assert message(r1, **fields)["reasoning_content"] == THOUGHTS
    for fields, param in (({"reasoning_effort": "none"}, "reasoning_effort"), ({"thinking": {"type": "disabled"}}, "thinking"),
                          ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs.enable_thinking")):
        refused = ask(r1, **fields)
        assert (refused.status, refused.error["param"]) == (400, param)


DEEP: Any = "x"
for _ in range(40):
    DEEP = {"a": [DEEP]}


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "set by the server itself"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "set by the server itself"),
    ({"chat_template_kwargs": {"add_generation_prompt": False}}, "chat_template_kwargs.add_generation_prompt", "set by"),
    ({"chat_template_kwargs": {"bos_token": "x"}}, "chat_template_kwargs.bos_token", "set by"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template", "set by"),
    ({"chat_template_kwargs": {"enable_thinkin": False}}, "chat_template_kwargs.enable_thinkin", "enable_thinking, "),
    ({"chat_template_kwargs": {"thinking": False}}, "chat_template_kwargs.thinking", "enable_thinking, "),
    ({"chat_template_kwargs": {"namespace": "x"}}, "chat_template_kwargs.namespace", "reads no variable"),
    ({"chat_template_kwargs": {"\u202e{{ x }}": 1}}, "chat_template_kwargs", "reads no variable"),
    ({"chat_template_kwargs": {"": 1}}, "chat_template_kwargs", "reads no variable"),
    ({"chat_template_kwargs": {"enable_thinking": DEEP}}, "chat_template_kwargs", "nested too deeply"),
    ({"chat_template_kwargs": {f"a{i}": 1 for i in range(65)}}, "chat_template_kwargs", "65 variables"),
    ({"chat_template_kwargs": []}, "chat_template_kwargs", ""),
    ({"reasoning_effort": "much"}, "reasoning_effort", ""),
    ({"reasoning_effort": "high", "thinking": {"type": "disabled"}}, "thinking", "something else"),
    ({"thinking": {"type": "auto"}}, "thinking.type", ""),
    ({"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens", ""),
    ({"thinking": True}, "thinking", ""),
    ({"thinking_token_budget": 5}, "thinking_token_budget", "not supported yet"),
    ({"separate_reasoning": 1}, "separate_reasoning", ""),
])
def test_what_is_refused(thinker: Site, fields: dict[str, Any], param: str, words: str) -> None:
    refused = ask(thinker, **fields)
    assert (refused.status, refused.error["param"]) == (400, param), refused.text
    assert words in refused.error["message"]
    assert not thinker.engine.asked


def test_variables_of_tokenize(thinker: Site) -> None:
    body = {"messages": HI, "chat_template_kwargs": {"enable_thinking": False}}
    ask(thinker, **body)
    assert send(thinker.port, "/tokenize", body).json["tokens"] == thinker.engine.asked[-1].prompt_ids
    for wrong, param in (
        ({"messages": HI, "chat_template_kwargs": {"tone": 1}}, "chat_template_kwargs.tone"),
        ({"prompt": "x", "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"prompt": "x", "chat_template": "x"}, "chat_template"), ({"messages": HI, "chat_template": "x"}, "chat_template"),
        ({"prompt": "x", "continue_final_message": True}, "continue_final_message"),
    ):
        refused = send(thinker.port, "/tokenize", wrong)
        assert (refused.status, refused.error["param"]) == (400, param), refused.text


def test_a_variable_as_long_as_a_book_is_refused_before_it_is_tokenized(graded: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    encode = ChatTokenizer.encode
    monkeypatch.setattr(ChatTokenizer, "encode", lambda self, text, *rest: read.append(len(text)) or encode(self, text, *rest))
    refused = ask(graded, chat_template_kwargs={"reasoning_effort": "x" * (4 << 20)})
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    assert refused.error["param"] == "chat_template_kwargs"
    assert max(read, default=0) < 1 << 20
    turns = [*HI, {"role": "assistant", "content": "x", "reasoning_content": "x" * 100_000}]
    refused = ask(graded, messages=turns)
    assert (refused.error["param"], refused.error["code"]) == ("messages", "context_length_exceeded")


# --- earlier turns ---


@pytest.mark.parametrize("turn", [
    {"content": "Yes.", "reasoning_content": "Hm."}, {"content": "Yes.", "reasoning": "Hm."},
    {"content": "Yes.", "reasoning": "Hm.", "reasoning_content": "Hm."}, {"content": "<think>\nHm.\n</think>\n\nYes."},
])
def test_thoughts_of_earlier_turns(thinker: Site, turn: dict[str, Any]) -> None:
    last = [*HI, {"role": "assistant", **turn}]
    assert ask(thinker, messages=last, add_generation_prompt=False).status == 200
    assert prompt(thinker).endswith("assistant\n<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")
    assert ask(thinker, messages=[*last, *HI]).status == 200
    assert "Hm." not in prompt(thinker), "the template leaves them out before a new question"


def test_an_answer_can_be_sent_back(thinker: Site) -> None:
    found = message(thinker)
    assert ask(thinker, messages=[*HI, found, *HI]).status == 200


@pytest.mark.parametrize(("turn", "param"), [
    ({"role": "user", "content": "x", "reasoning_content": "y"}, "messages[0].reasoning_content"),
    ({"role": "system", "content": "x", "reasoning": "y"}, "messages[0].reasoning"),
    ({"role": "assistant", "content": "x", "reasoning": "y", "reasoning_content": "z"}, "messages[0].reasoning"),
    ({"role": "assistant", "content": "x", "reasoning_content": ["y"]}, "messages[0].reasoning_content"),
])
def test_thoughts_that_are_refused(thinker: Site, turn: dict[str, Any], param: str) -> None:
    refused = ask(thinker, messages=[turn, *HI])
    assert (refused.status, refused.error["param"]) == (400, param), refused.text


def test_empty_thoughts_are_none(thinker: Site) -> None:
    for value in (None, ""):
        turns = [{"role": "user", "content": "x", "reasoning_content": value, "reasoning": value}]
        assert ask(thinker, messages=turns).status == 200


# --- the setting ---


def test_which_style_a_setting_means(tmp_path_factory: pytest.TempPathFactory) -> None:
    thinking, plain = load(tmp_path_factory, THINKING), load(tmp_path_factory, CHATML)
    assert find_style("auto", thinking) == find_style("qwen3", plain) == STYLES["qwen3"]
    assert find_style("auto", plain) is find_style("none", thinking) is None
    assert find_style("deepseek_r1", plain) == STYLES["deepseek_r1"]


def test_tags_that_are_special_tokens(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = build_tiny_tokenizer(tmp_path_factory.mktemp("t"), chat_template=THINKING, added=THINKING_MARKS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = directory / name
        path.write_text(path.read_text().replace('"special": false', '"special": true'))
    special = ChatTokenizer.load(directory)
    assert "</think>" in special.special_tokens
    with open_site(special) as site:
        site.engine.script = Script(text=OUTPUT)
        found = message(site)
        assert (found["reasoning_content"], found["content"]) == (THOUGHTS, ANSWER)
        (end,) = special.encode("</think>")
        tokens = ask(site).json["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert tokens == special.encode(OUTPUT).index(end) + 1
        ids = ask(site, messages=[{"role": "assistant", "content": "a<think>b"}, *HI]) and site.engine.asked[-1].prompt_ids
        assert special.encode("<think>")[0] not in ids, "special tokens are no role's own writing"


def test_a_parser_that_always_expects_thoughts(tmp_path_factory: pytest.TempPathFactory) -> None:
    with open_site(load(tmp_path_factory, CHATML), reasoning_parser="deepseek_r1") as site:
        site.engine.script = Script(text=OUTPUT.removeprefix("<think>\n"))
        assert message(site)["reasoning_content"] == THOUGHTS
        site.engine.script = Script(text="Yes.")
        begun = [*HI, {"role": "assistant", "content": "The answer: "}]
        found = message(site, messages=begun, continue_final_message=True)
        assert found == {"role": "assistant", "content": "Yes.", "refusal": None}, "an answer that was begun goes on"


# --- an open last message ---


def test_an_answer_goes_on(thinker: Site) -> None:
    thinker.engine.script = Script(text=" and so on.")
    messages = [*HI, {"role": "assistant", "content": "One, two"}]
    for options in ({}, {"add_generation_prompt": False}):
        body = {"messages": messages, "continue_final_message": True, **options}
        assert ask(thinker, **body).json["choices"][0]["message"]["content"] == " and so on."
        assert prompt(thinker).endswith("assistant\n<think>\n\n</think>\n\nOne, two")
        assert send(thinker.port, "/tokenize", body).json["tokens"] == thinker.engine.asked[-1].prompt_ids
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]
    ask(thinker, messages=[*HI, {"role": "assistant", "content": parts}], continue_final_message=True)
    assert prompt(thinker).endswith("One\ntwo")


def test_thoughts_go_on(r1: Site) -> None:
    r1.engine.script = Script(text="\nbrown.\n</think>\n\nYes.")
    messages = [*HI, {"role": "assistant", "content": "<think>\nThe quick"}]
    found = message(r1, messages=messages, continue_final_message=True)
    assert (found["reasoning_content"], found["content"]) == ("\nbrown.", "Yes.")
    assert prompt(r1).endswith("assistant\n<think>\nThe quick")


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"messages": HI}, "continue_final_message", "must be the assistant's"),
    ({"add_generation_prompt": True}, "continue_final_message", "add_generation_prompt"),
    ({"messages": [*HI, {"role": "assistant", "content": None}]}, "messages[1].content", "is missing"),
    ({"messages": [*HI, {"role": "assistant", "content": "x"}, *HI]}, "continue_final_message", "must be the assistant's"),
])
def test_what_cannot_go_on(thinker: Site, fields: dict[str, Any], param: str, words: str) -> None:
    body = {"messages": [*HI, {"role": "assistant", "content": "x"}], "continue_final_message": True, **fields}
    for path in (CHAT_PATH, "/tokenize"):
        refused = send(thinker.port, path, body)
        assert (refused.status, refused.error["param"]) == (400, param), refused.text
        assert words in refused.error["message"]


def test_special_tokens_are_added_where_they_are_asked_for(site: Site) -> None:
    for asked in (True, False):
        ask(site, add_special_tokens=asked)
        tokens = send(site.port, "/tokenize", {"messages": HI, "add_special_tokens": asked}).json["tokens"]
        assert tokens == site.engine.asked[-1].prompt_ids == site.tokenizer.encode_chat(HI, add_special_tokens=asked)


def test_langchains_and_litellms_way(thinker: Site) -> None:
    """What clients of other servers send."""
    client = thinker.client
    reply = client.chat.completions.create(
        model=MODEL, messages=HI, reasoning_effort="medium", extra_body={"chat_template_kwargs": {"enable_thinking": True}},
    )
    assert reply.usage is not None and reply.usage.completion_tokens_details is not None
    assert reply.usage.completion_tokens_details.reasoning_tokens
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=HI, extra_body={"chat_template_kwargs": {"messages": []}})
