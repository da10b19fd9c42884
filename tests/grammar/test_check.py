"""Grammars are tried in a process of their own: what takes too much is refused and harms nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coserve.core import CoserveError, InvalidRequest
from coserve.grammar import check, choice, json_schema, regex
from coserve.grammar.check import GrammarChecker, explained
from coserve.grammar.matcher import Grammars
from coserve.grammar.table import TokenTable, read_token_table
from coserve.text.tokenizer import ChatTokenizer

TOO_MUCH = "it takes more than"


@pytest.fixture(scope="module")
def table(tokenizer: ChatTokenizer) -> TokenTable:
    return read_token_table(tokenizer, tokenizer.vocab_size)


@pytest.fixture(scope="module")
def checker(table: TokenTable) -> Iterator[GrammarChecker]:
    """With little time and memory, so that tests are fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CPU_S", 1.5)
        patch.setattr(check, "MEMORY_BYTES", 200 << 20)
        made = GrammarChecker()
        made.check(choice(["a"]), lambda: table)
    yield made
    made.close()


@pytest.fixture
def refused(checker: GrammarChecker, table: TokenTable) -> Any:
    """refused(grammar): what is said about a grammar; nothing if it may be used."""
    def ask(grammar: str) -> str:
        try:
            checker.check(grammar, lambda: table, field="my.field")
        except InvalidRequest as error:
            return f"{error.param}|{error}".removeprefix("my.field|my.field: ")
        return ""

    return ask


def chained(count: int) -> str:
    """A schema whose references go on and on."""
    links: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(count)
    }
    return json_schema({"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "object"}}})


def test_most_grammars_may_be_used(refused: Any) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(60):
        deep = {"type": "object", "properties": {"a": deep}, "required": ["a"]}
    for grammar in (
        json_schema({"type": "object"}), json_schema(True), json_schema(deep), chained(60), regex("(a|b){3,100}c"),
        choice([f"option {number}" for number in range(2000)]), "start: <|im_start|>",
        json_schema({"properties": {f"p{number}": {"type": "string"} for number in range(300)}}),
    ):
        assert refused(grammar) == ""


@pytest.mark.parametrize(("grammar", "words"), [
    ('start: "a', "line 1: "), ('start: "a"\n\nb: ("', "line 3: "),
    (json_schema({"if": {}, "then": {}}), "the schema's if, then can't be enforced"),
    (json_schema({"$ref": "#"}), "no text can match it"),
    ('start: ""', "no token of the model can begin"),
    ("start: <[400]>", "no token of the model can begin"),
    ("start: <[401]>", "too large"),
    (json_schema({"properties": {f"p{number}": {} for number in range(700)}}), "have fewer optional properties"),
])
def test_what_is_wrong_is_told(refused: Any, tokenizer: ChatTokenizer, grammar: str, words: str) -> None:
    grammar = grammar.replace("400", str(tokenizer.vocab_size)).replace("401", str(tokenizer.vocab_size + 1))
    assert words in refused(grammar)


@pytest.mark.parametrize("grammar", [
    chained(5000),  # overflows the stack
    "start: A0\n" + "\n".join(f"A{i}: A{i + 1}" for i in range(20_000)) + '\nA20000: "x"',  # the same
    json_schema({"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(24)]}),  # takes gigabytes
    json_schema({"properties": {f"p{i}": {} for i in range(18_000)}}),  # takes long
], ids=["references", "terminals", "patterns", "properties"])
def test_what_takes_too_much_is_refused(refused: Any, checker: GrammarChecker, grammar: str) -> None:
    process = checker._process
    assert TOO_MUCH in refused(grammar)
    assert refused(choice([f"after {grammar[:80]}"])) == "", "the next one is tried as ever"
    assert checker._process is process, "in the same process"


def test_others_do_not_wait(refused: Any) -> None:
    slow = json_schema({"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(25)]})
    threads = [threading.Thread(target=refused, args=(slow + "\n" * number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    assert refused(choice(["quick"])) == ""
    quick = time.monotonic() - began
    for thread in threads:
        thread.join()
    assert quick < time.monotonic() - began


def test_what_was_found_is_remembered(refused: Any, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = choice(["known"]), json_schema({"not": {}, "title": "known"})
    assert refused(good) == ""
    said = refused(bad)
    monkeypatch.setattr(checker, "_try", lambda *_: pytest.fail("it is known"))
    assert refused(good) == "" and refused(bad) == said
    monkeypatch.setattr(check, "_REMEMBERED", 3)
    monkeypatch.setattr(checker, "_try", lambda *_: None)
    for number in range(5):
        assert refused(choice([f"new {number}"])) == ""
    assert len(checker._found) == 3


def test_a_process_that_has_ended_is_started_again(table: TokenTable) -> None:
    checker = GrammarChecker()
    checker.check(choice(["a"]), lambda: table)
    process = checker._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    checker.check(choice(["b"]), lambda: table)
    assert checker._process is not process
    process = checker._process
    assert process is not None
    checker.close()
    assert process.returncode == 0, "it ends by itself"
    checker.check(choice(["c"]), lambda: table)
    checker.close()


def test_no_process_is_an_error_of_the_server(table: TokenTable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkmain.py").write_text("raise SystemExit('broken')")
    monkeypatch.setattr(check, "__file__", str(tmp_path / "check.py"))
    checker = GrammarChecker()
    for _ in range(2):
        with pytest.raises(CoserveError, match="the log says why") as refused:
            checker.check(choice(["a"]), lambda: table)
        assert not isinstance(refused.value, InvalidRequest)
    monkeypatch.undo()
    checker.check(choice(["a"]), lambda: table)
    checker.close()


def test_what_passes_can_be_compiled_elsewhere(tokenizer: ChatTokenizer, refused: Any) -> None:
    """A thread of the engine has a larger stack: chains of references that pass here, and the first that don't, compile."""
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    low, high = 60, 5000
    while high - low > 20:
        middle = (low + high) // 2
        low, high = (middle, high) if refused(chained(middle)) == "" else (low, middle)
    assert low > 60
    found: list[object] = []
    compiling = threading.Thread(target=lambda: found.extend(grammars.new_matchers(chained(high), 1)))
    compiling.start()
    compiling.join()
    assert found


@pytest.mark.parametrize(("error", "words"), [
    ("at 3(8): failed to compile JSON schema: Bad thing\n   1 | start: %json {}\n              ^\n", "Bad thing"),
    ('at 2(8): unknown name: "b"\n   2 | start: b\n             ^\n', 'line 2: unknown name: "b"'),
    ("3(1): lexer error\n   3 | x\n       ^\n", "line 3: lexer error"),
    ("lexer error: too many states: 9 >= 9\n<non-verbose/>", "its patterns are too large together; simplify them"),
    ("", ""),
])
def test_the_librarys_words(error: str, words: str) -> None:
    assert explained(error) == words


def test_a_long_error_is_cut() -> None:
    assert len(explained(json.dumps(["x"] * 1000))) <= 500


def test_a_process_that_is_prepared_is_the_one_that_tries(table: TokenTable) -> None:
    checker = GrammarChecker()
    checker.prepare(lambda: table)
    process = checker._process
    checker.prepare(lambda: table)
    checker.check(choice(["a"]), lambda: table)
    assert process is not None and checker._process is process
    checker.close()
