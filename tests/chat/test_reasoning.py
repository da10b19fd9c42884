"""Thoughts told apart from the answer, however an output's text is cut."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coserve.chat.reasoning import STYLES, Begin, ThoughtSplitter, find_begin, style_of
from coserve.chat.template import ChatTemplate
from tests.chat_templates import ALWAYS_THINKING, THINKING
from tests.tiny_tokenizer import CHATML


def split(begin: Begin, texts: Sequence[str]) -> tuple[str, str]:
    """(thoughts, answer). No thought comes after a part of the answer, and no part is empty."""
    splitter = ThoughtSplitter(begin)
    pieces = [piece for text in texts for piece in splitter.push(text)] + splitter.finish()
    kinds = [piece.is_thought for piece in pieces]
    assert kinds == sorted(kinds, reverse=True)
    assert all(piece.text for piece in pieces)
    thoughts, answer = ("".join(piece.text for piece in pieces if piece.is_thought is kind) for kind in (True, False))
    return thoughts, answer


CASES: list[tuple[Begin, str, tuple[str, str]]] = [
    (Begin.MAYBE, "<think>\nHm.\n\nSo:\n</think>\n\nYes.\n", ("Hm.\n\nSo:", "Yes.\n")),
    (Begin.MAYBE, "Yes.", ("", "Yes.")),
    (Begin.MAYBE, " \n Yes.", ("", " \n Yes.")),
    (Begin.MAYBE, "\n<think>Hm.</think>Yes.", ("Hm.", "Yes.")),
    (Begin.MAYBE, "<think>\n\n</think>\n\nYes.", ("", "Yes.")),
    (Begin.MAYBE, "<think>\nHm", ("Hm", "")),
    (Begin.MAYBE, "<think>", ("", "")),
    (Begin.MAYBE, "<thi", ("", "<thi")),
    (Begin.MAYBE, "  ", ("", "  ")),
    (Begin.MAYBE, "", ("", "")),
    (Begin.MAYBE, "Yes. <think>No</think>", ("", "Yes. <think>No</think>")),
    (Begin.MAYBE, "Yes.</think>No.", ("", "Yes.</think>No.")),
    (Begin.MAYBE, "<think>a</think>b<think>c</think>d", ("a", "b<think>c</think>d")),
    (Begin.THOUGHTS, "Hm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
    (Begin.THOUGHTS, "<think>\nHm.\n</think>\n\nYes.", ("Hm.", "Yes.")),
    (Begin.THOUGHTS, "\n <think>Hm.</think>Yes.", ("Hm.", "Yes.")),
    (Begin.THOUGHTS, "  Hm.\n\n", ("  Hm.", "")),
    (Begin.THOUGHTS, "Hm.\n\n</thin", ("Hm.\n\n</thin", "")),
    (Begin.THOUGHTS, "</think>", ("", "")),
    (Begin.THOUGHTS, "a</think></think>b", ("a", "</think>b")),
    (Begin.THOUGHTS, "a<</</think>b", ("a<</", "b")),
    (Begin.MIDST, "\nand so.\n</think>\n\nYes.", ("\nand so.", "Yes.")),
    (Begin.MIDST, "<think>x</think>y", ("<think>x", "y")),
    (Begin.ANSWER, "\n<think>Hm.</think>Yes.", ("", "\n<think>Hm.</think>Yes.")),
]


@pytest.mark.parametrize(("begin", "text", "expected"), CASES)
def test_what_is_which(begin: Begin, text: str, expected: tuple[str, str]) -> None:
    assert split(begin, [text]) == expected
    assert split(begin, list(text)) == expected


TEXTS = st.lists(st.sampled_from([
    "<think>", "</think>", "<", "</", "<thi", "nk>", "</th", "ink>", "\n", "\n\n", " ", "Hm", "🙂",
]), max_size=12).map("".join)


@given(st.sampled_from(Begin), TEXTS, st.data())
@example(Begin.THOUGHTS, "a\n\n</think>\n\nb", None)
@settings(deadline=None, max_examples=400)
def test_cuts_change_nothing(begin: Begin, text: str, data: st.DataObject | None) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text))))) if data is not None else range(len(text))
    cut = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    assert split(begin, cut) == split(begin, [text])


@given(TEXTS, TEXTS)
@settings(deadline=None, max_examples=200)
def test_nothing_but_tags_and_line_ends_is_lost(thoughts: str, answer: str) -> None:
    inner = thoughts.replace("</think>", "")
    if "</think>" in inner or inner.lstrip().startswith("<think>"):
        return
    found = split(Begin.MAYBE, [f"<think>{inner}</think>{answer}"])
    assert found == (inner.strip("\n"), answer.lstrip("\n"))


def test_whether_it_thinks_is_known_as_soon_as_it_can_be() -> None:
    splitter = ThoughtSplitter(Begin.MAYBE)
    seen = []
    for text in ("\n", "<thi", "nk>", "Hm.", "</thin", "k>", "\n", "Yes"):
        splitter.push(text)
        seen.append(splitter.is_thinking)
    assert seen == [False, False, True, True, True, False, False, False]


QWEN, R1 = STYLES["qwen3"], STYLES["deepseek_r1"]


@pytest.mark.parametrize(("end", "continued", "qwen", "r1"), [
    ("<|im_start|>assistant\n", None, Begin.MAYBE, Begin.THOUGHTS),
    ("<|im_start|>assistant\n<think>\n", None, Begin.THOUGHTS, Begin.THOUGHTS),
    ("<|im_start|>assistant\n<think>", None, Begin.THOUGHTS, Begin.THOUGHTS),
    ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, Begin.ANSWER, Begin.ANSWER),
    ("<think>\nHm</think> and <|im_end|>\n<|im_start|>assistant\n", None, Begin.MAYBE, Begin.THOUGHTS),
    ("<think>\n\n</think>\n\nThe answer", "The answer", Begin.ANSWER, Begin.ANSWER),
    ("assistant\n<think>\nHm, so", "<think>\nHm, so", Begin.MIDST, Begin.MIDST),
    ("assistant\n<think>Hm</think>So", "<think>Hm</think>So", Begin.ANSWER, Begin.ANSWER),
    ("assistant\nThe tag <think>", "The tag <think>", Begin.ANSWER, Begin.ANSWER),
    ("assistant\n", "", Begin.MAYBE, Begin.THOUGHTS),
    ("assistant\n<think>\n", "", Begin.THOUGHTS, Begin.THOUGHTS),
    ("<think>\nHm\n</think>\n\n", "", Begin.ANSWER, Begin.ANSWER),
])
def test_what_an_output_begins_with(end: str, continued: str | None, qwen: Begin, r1: Begin) -> None:
    assert (find_begin(end, QWEN, continued), find_begin(end, R1, continued)) == (qwen, r1)


def test_templates_tell_whether_a_model_thinks() -> None:
    assert style_of(ChatTemplate(THINKING, {}).written) == QWEN
    assert style_of(ChatTemplate(ALWAYS_THINKING, {}).written) == QWEN, "its prompts say that it begins with thoughts"
    assert style_of(ChatTemplate(CHATML, {}).written) is None
    assert style_of(ChatTemplate("{# no </think> here #}{{ '<think>' }}", {}).written) is None
