"""A file's check: its figures are those of the job that would train on it, problems don't end it, and examples can be read."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.config.settings import FinetuneConfig
from coserve.core import NotFound
from coserve.finetune.datacheck import (
    DataCheck,
    LineProblem,
    TrainedPiece,
    as_json,
    check_data,
    guess_objective,
    split_pieces,
)
from coserve.finetune.datasets import load_training
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_directory import chat_line, chat_lines, preference_lines, write_lines
from tests.tiny_tokenizer import CHATML, build_tiny_tokenizer

BAD = {"messages": [{"role": "user", "content": "Hi"}]}


def check(path: Path, tokenizer: ChatTokenizer, max_length: int = 1000, **more: Any) -> DataCheck:
    config = FinetuneConfig(**{name: more.pop(name) for name in ("objective", "too_long") if name in more})
    return check_data(path, tokenizer, config, max_length=max_length, **more)


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_figures_are_those_of_the_job(tokenizer: ChatTokenizer, tmp_path: Path, objective: Any) -> None:
    lines = chat_lines(11) if objective == "sft" else preference_lines(11)
    path = write_lines(tmp_path / "data.jsonl", lines)
    found = check(path, tokenizer, objective=objective)
    dataset = load_training(path, tokenizer, FinetuneConfig(objective=objective), max_length=1000)
    assert (found.num_lines, found.num_usable, found.num_problems, found.num_too_long) == (11, len(dataset.groups), 0, 0)
    lengths = sorted(example.num_tokens for group in dataset.groups for example in group.examples)
    assert found.lengths is not None
    assert (found.lengths.min, found.lengths.max) == (lengths[0], dataset.report.longest)
    assert found.lengths.median == sorted(lengths)[(len(lengths) - 1) // 2]
    assert sum(length <= found.lengths.p95 for length in lengths) >= 0.95 * len(lengths)
    assert (found.lengths.total, found.lengths.trained) == (dataset.report.num_tokens, dataset.report.num_label_tokens)
    assert found.layouts == ({"messages": 11} if objective == "sft" else {"prompt, chosen, rejected": 11})
    assert found.warnings == ()


def test_every_problem_is_told_with_its_line(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([json.dumps(chat_lines(1)[0]), "", "[", json.dumps(BAD), "{}", json.dumps(chat_lines(1)[0])]))
    found = check(path, tokenizer, max_problems=2)
    assert (found.num_lines, found.num_usable, found.num_problems) == (5, 2, 3)
    assert [problem.line for problem in found.problems] == [3, 4]
    assert found.problems[1] == LineProblem(4, "messages: no assistant message; add one, it is what is trained")
    assert found.warnings == ("1 example is the same as an earlier one", "2 usable examples only; at least 10 are better")


@pytest.mark.parametrize(("too_long", "usable", "problems"), [("error", 1, 1), ("drop", 1, 0), ("truncate", 2, 0)])
def test_long_examples(tokenizer: ChatTokenizer, tmp_path: Path, too_long: Any, usable: int, problems: int) -> None:
    path = write_lines(tmp_path / "data.jsonl", [chat_line("1", "1"), chat_line("1", "1" * 50)])
    found = check(path, tokenizer, max_length=40, too_long=too_long)
    assert (found.num_too_long, found.num_usable, found.num_problems) == (1, usable, problems)
    assert any("1 example is too long" in warning for warning in found.warnings) == (too_long != "error")
    if problems:
        assert found.problems[0].line == 2
        assert "more than max_length 40" in found.problems[0].message


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty"), (b"\n \n", "the file is empty"), ("{}".encode("utf-16"), "encoding: the file is UTF-16"),
    (b"\x1f\x8b0", "compressed (gzip)"),
])
def test_a_file_that_holds_no_lines(tokenizer: ChatTokenizer, tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    found = check(path, tokenizer)
    (problem,) = found.problems
    assert problem.line is None
    assert message in problem.message
    assert (found.lengths, found.num_usable, found.shown) == (None, 0, ())


def test_nothing_fits(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    found = check(write_lines(tmp_path / "data.jsonl", chat_lines(2)), tokenizer, max_length=5, too_long="drop")
    assert found.problems == (
        LineProblem(None, "no usable example, all 2 are longer than max_length 5 tokens; raise it"),
    )


def test_a_missing_file(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        check(tmp_path / "none.jsonl", tokenizer)


def test_examples_are_shown_by_what_is_trained(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    lines = [BAD, chat_line("Hi", "grün"), {"prompt": "a", "completion": "b"}, chat_line("Hi", "x")]
    found = check(write_lines(tmp_path / "data.jsonl", lines), tokenizer, num_shown=2)
    first, second = found.shown
    assert (first.line, first.part, first.number, first.num_of_line) == (2, "messages", 1, 1)
    assert first.pieces == (
        TrainedPiece("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", False), TrainedPiece("grün<|im_end|>", True),
        TrainedPiece("\n", False),
    )
    assert second.pieces == (TrainedPiece("a", False), TrainedPiece("b<|im_end|>", True))
    assert (second.num_tokens, second.num_trained) == (3, 2)


def test_both_of_a_pair_are_shown(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", preference_lines(2))
    found = check(path, tokenizer, objective="dpo", num_shown=1)
    assert [(example.line, example.part, example.number) for example in found.shown] == [(1, "chosen", 1), (1, "rejected", 2)]


def test_the_first_token_of_a_text_is_not_trained(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    (example,) = check(write_lines(tmp_path / "data.jsonl", [{"text": "111"}]), tokenizer, num_shown=1).shown
    assert example.pieces == (TrainedPiece("1", False), TrainedPiece("11<|im_end|>", True))
    assert example.num_trained == 3


@given(text=st.text(st.characters(exclude_categories=["Cs"])), start=st.integers(0, 20), end=st.integers(0, 20))
@settings(deadline=None, max_examples=60)
def test_pieces_are_the_whole_text(
    tokenizer: ChatTokenizer, sentencepiece: ChatTokenizer, text: str, start: int, end: int
) -> None:
    for each in (tokenizer, sentencepiece):
        ids = np.asarray(each.encode(text), dtype=np.int64)
        weights = np.zeros(len(ids), dtype=np.float32)
        weights[start:end] = 1
        pieces = split_pieces(each, ids, weights)
        assert "".join(piece.text for piece in pieces) == each.decode(ids.tolist(), skip_special_tokens=False)
        assert all(one.trained != other.trained for one, other in itertools.pairwise(pieces))


def test_long_texts_are_shortened_in_the_middle(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    turns = [{"role": role, "content": "1" * 300} for role in ("user", "assistant")]
    path = write_lines(tmp_path / "data.jsonl", [{"messages": turns}, {"messages": [*turns * 30]}])
    for example in check(path, tokenizer, 10**7, num_shown=2, max_chars=500).shown:
        assert sum(len(piece.text) for piece in example.pieces) < 1000
        assert any(" [...] " in piece.text and piece.trained for piece in example.pieces)


def test_progress_is_told_and_may_stop(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path, shares = write_lines(tmp_path / "data.jsonl", chat_lines(5)), list[float]()
    check(path, tokenizer, on_line=shares.append)
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert 0.5 < shares[-1] <= 1

    def stop(share: float) -> None:
        if share > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(path, tokenizer, on_line=stop)


@pytest.mark.parametrize(("lines", "objective"), [
    (["[", json.dumps(preference_lines(1)[0])], "dpo"), ([json.dumps(chat_lines(1)[0])], "sft"), (["["], "sft"), ([], "sft"),
    (["\ufeff" + json.dumps({"input": {}, "preferred_output": [], "non_preferred_output": []})], "dpo"),
    ([json.dumps({"prompt": "x", "completion": "y"})], "sft"),
])
def test_the_objective_is_guessed(tmp_path: Path, lines: list[str], objective: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert guess_objective(path) == objective


def test_what_is_as_json(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    found = check(write_lines(tmp_path / "data.jsonl", [BAD, *chat_lines(1)]), tokenizer, num_shown=1)
    read = json.loads(json.dumps(as_json(found)))
    assert read["problems"][0]["line"] == 1
    assert read["lengths"]["trained"] == read["shown"][0]["num_trained"]
    assert read["shown"][0]["pieces"][1]["trained"] is True


def test_a_conversation_of_several_examples(tmp_path: Path) -> None:
    """A template that writes an answer differently at the end: each answer is an example, and the check says so."""
    template = CHATML.replace("'<|im_end|>'", "('!' if loop.last and message['role'] == 'assistant' else '') + '<|im_end|>'")
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path / "bpe", chat_template=template))
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")] * 2
    found = check(write_lines(tmp_path / "data.jsonl", [{"messages": turns}]), tokenizer, num_shown=1)
    assert [(example.line, example.number, example.num_of_line) for example in found.shown] == [(1, 1, 2), (1, 2, 2)]
    assert (found.num_lines, found.num_usable) == (1, 2)
    assert found.warnings[0].startswith("1 of 1 conversations became several examples")
