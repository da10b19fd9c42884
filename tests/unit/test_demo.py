"""The demo's data keeps its promises: real training lines, held-out questions, facts that can be learnt and not guessed."""

from __future__ import annotations

import json
import re
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest

from coserve.config import FinetuneConfig, OptimizerConfig, SamplingConfig
from coserve.demo import run as demo
from coserve.demo.run import ANSWER_TOKENS, DEMO_CONFIG, Answer, DemoReport, is_right, questions, run_demo
from coserve.engine.generation import Generator
from coserve.engine.model import load_model
from coserve.finetune.datasets import Dataset, load_groups
from coserve.tokenizer import ChatTokenizer
from tests.tiny_directory import build_tiny_directory

FAST = FinetuneConfig(
    optimizer=OptimizerConfig(learning_rate=0.05), max_steps=3, batch_size=9, max_microbatch_tokens=1024
)


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_directory(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def dataset(model_directory: Path) -> Dataset:
    """The training file, read as a user's file is read."""
    with as_file(files("coserve.demo").joinpath("train.jsonl")) as path:
        return load_groups(
            path, ChatTokenizer.load(model_directory), objective=DEMO_CONFIG.objective,
            max_length=DEMO_CONFIG.max_microbatch_tokens, too_long=DEMO_CONFIG.too_long,
        )


def conversations() -> list[list[dict[str, Any]]]:
    text = files("coserve.demo").joinpath("train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["messages"] for line in text.splitlines()]


def spoken(role: str) -> list[str]:
    return [message["content"] for messages in conversations() for message in messages if message["role"] == role]


def plain(text: str) -> str:
    """Letters and digits only: what is left when wording is compared."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_training_data_passes_the_real_rules(dataset: Dataset) -> None:
    report = dataset.report
    assert (len(dataset.groups), report.num_lines, report.num_dropped, report.num_truncated) == (99, 99, 0, 0)
    assert 0 < report.num_label_tokens < report.num_tokens
    for messages in conversations():
        assert [message["role"] for message in messages] == ["user", "assistant"]


def test_training_data_fits_the_default_models_context(dataset: Dataset) -> None:
    """The tiny tokenizer makes more tokens of a text than the real one."""
    assert dataset.report.longest <= 512
    assert 99 % DEMO_CONFIG.batch_size == 0, "every step of the demo has as many examples"


def test_no_conversation_is_given_twice() -> None:
    asked = [plain(text) for text in spoken("user")]
    assert len(set(asked)) == len(asked)


def test_questions_parse() -> None:
    found = questions()
    assert len(found) == 24
    for question, keywords in found:
        assert question == question.strip()
        assert len(question) > 10
        assert keywords
        assert all(isinstance(word, str) and word == word.strip() and word for word in keywords)
    assert len({plain(question) for question, _ in found}) == 24


def test_held_out_questions_are_not_in_the_training_data() -> None:
    trained = {plain(text) for messages in conversations() for text in (message["content"] for message in messages)}
    for question, _ in questions():
        assert plain(question) not in trained
        assert not any(plain(question) in text for text in trained)


def test_answers_are_in_the_training_data_and_not_in_the_question() -> None:
    taught = spoken("assistant")
    for question, keywords in questions():
        assert any(is_right(answer, keywords) for answer in taught), f"nothing teaches {keywords}"
        assert not is_right(question, keywords), f"repeating the question would count as right: {question}"


def test_training_questions_of_a_fact_do_not_give_it_away() -> None:
    """A keyword in a question's wording would let the base answer by repeating."""
    words = tuple({word for _, keywords in questions() for word in keywords})
    assert [text for text in spoken("user") if is_right(text, words)] == []


@pytest.mark.parametrize(("answer", "keywords", "right"), [
    ("Odile Pratt tends it.", ("Odile", "Pratt"), True),
    ("It is PRATT!", ("Pratt",), True),
    ("pratt", ("Pratt",), True),
    ("He prattles on.", ("Pratt",), False),
    ("Spratt", ("Pratt",), False),
    ("It weighs 412 pounds.", ("412",), True),
    ("It weighs 4123 pounds.", ("412",), False),
    ("It weighs 1412.", ("412",), False),
    ("one button", ("button", "buttons"), True),
    ("some buttons.", ("button", "buttons"), True),
    ("an unbuttoned coat", ("button", "buttons"), False),
    ("(goose)", ("goose", "geese"), True),
    ("a goose-like bird", ("goose",), True),
    ("345", ("3.5",), False),
    ("about 3.5 miles", ("3.5",), True),
    ("The old\npiano", ("piano",), True),
    ("", ("piano",), False),
    ("piano", (), False),
])
def test_is_right_wants_a_keyword_as_a_whole_word(answer: str, keywords: tuple[str, ...], right: bool) -> None:
    assert is_right(answer, keywords) is right


def test_report_counts() -> None:
    answers = tuple(
        Answer(question=f"q{i}", keywords=("k",), base="b", tuned="t", base_right=i < 1, tuned_right=i < 3) for i in range(4)
    )
    report = DemoReport(
        answers=answers, finetune_seconds=2.0, answer_seconds=1.0, trained_tokens=10, first_loss=3.0, last_loss=1.0
    )
    data = json.loads(report.to_json())
    assert (data["questions"], data["base_right"], data["tuned_right"]) == (4, 1, 3)
    assert data["answers"][2]["tuned_right"] is True
    assert (data["trained_tokens"], data["first_loss"], data["last_loss"]) == (10, 3.0, 1.0)


def test_the_demo_runs_and_asks_both_models(
    tmp_path: Path, model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole demo on the tiny model: base answers come from the base, tuned ones from the adapter, of the same batch."""
    monkeypatch.setattr(demo, "DEMO_CONFIG", FAST)
    model = load_model(str(model_directory), device="cpu", dtype="float32")
    tokens: list[int] = []
    result, report = run_demo(tmp_path / "out", model=model, listen=lambda event: None, progress=tokens.append)
    assert [answer.question for answer in report.answers] == [question for question, _ in questions()]
    assert [answer.base_right for answer in report.answers] == [is_right(a.base, a.keywords) for a in report.answers]
    assert [answer.tuned_right for answer in report.answers] == [is_right(a.tuned, a.keywords) for a in report.answers]
    assert report.trained_tokens == sum(row.tokens for row in result.rows)
    assert (report.first_loss, report.last_loss) == (result.rows[0].train_loss, result.rows[-1].train_loss)
    assert 0 < len(tokens) <= 2 * 24 * ANSWER_TOKENS

    sampling = SamplingConfig(max_tokens=ANSWER_TOKENS, temperature=0)
    different = [answer for answer in report.answers if answer.base != answer.tuned]
    assert len(different) > 12
    for answer in different[:3]:
        prompt = model.tokenizer.encode_chat([{"role": "user", "content": answer.question}])
        for adapter, text in ((None, answer.base), (result.adapter, answer.tuned)):
            (ids,) = Generator(model, adapter).generate([prompt], sampling)
            assert model.tokenizer.decode(ids).strip() == text
