"""Masks against languages that are written down: a token may come next exactly if some text of the language goes on with it."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from coserve.core import InvalidRequest
from coserve.grammar import after, choice, ebnf, json_object, json_schema, matcher, nested, regex
from coserve.grammar.build import MAX_CHARACTERS
from coserve.grammar.matcher import GrammarMatcher, Grammars, Masks, packed
from coserve.text.tokenizer import ChatTokenizer

SIZE = 391
"""Fewer than the tokenizer has, and no multiple of 32: a model may have another number of rows."""


@pytest.fixture(scope="module")
def grammars(tokenizer: ChatTokenizer) -> Grammars:
    return Grammars(tokenizer, SIZE)


def ids_of(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def new_matcher(grammars: Grammars, grammar: str, ending: Iterable[int] = ()) -> GrammarMatcher:
    (made,) = grammars.new_matchers(grammar, 1)
    made.set_ending(frozenset(ending))
    return made


def spelled(*parts: Iterable[str]) -> set[str]:
    """All ways to take one of each part."""
    return {"".join(way) for way in itertools.product(*parts)}


COMMA, COLON = (",", ", "), (":", ": ")
LANGUAGES: dict[str, tuple[str, set[str]]] = {
    "choice": (choice(["yes", "yesterday", "nö", "\n", 'a"b']), {"yes", "yesterday", "nö", "\n", 'a"b'}),
    "pattern": (regex("[ab]{1,3}(c|de)"), {
        "".join(way) + end for count in (1, 2, 3) for way in itertools.product("ab", repeat=count) for end in ("c", "de")
    }),
    "digits": (regex(r"\d/\d"), spelled("0123456789", "/", "0123456789")),
    "schema": (
        json_schema({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, "x", None]}},
                     "required": ["a"], "additionalProperties": False}),
        spelled(['{"a"'], COLON, ["true", "false"], ["}"])
        | spelled(['{"a"'], COLON, ["true", "false"], COMMA, ['"b"'], COLON, ["1", '"x"', "null"], ["}"]),
    ),
    "list": (
        json_schema({"type": "array", "items": {"const": "ö"}, "maxItems": 3}, compact=True),
        {"[]", '["ö"]', '["ö","ö"]', '["ö","ö","ö"]'},
    ),
    "lark": ('start: a\na: "(" a ")" | "x" b\nb: "!" | /[?.]/ | ', {
        "(" * depth + "x" + end + ")" * depth for depth in range(60) for end in ("!", "?", ".", "")
    }),
    "gbnf": (ebnf('root ::= "a" tail\ntail ::= [0-2]{2} | "-" # either'), {"a-"} | spelled("a", "012", "012")),
    "nested": (f'start: "<" first second ">"\nfirst: {nested(choice(["a", "}"]))}\nsecond: {nested(regex("[0}]"))}',
               spelled("<", "a}", "0}", ">")),
}


@pytest.mark.parametrize("name", LANGUAGES)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_token_is_allowed_exactly_if_a_text_goes_on_with_it(
    tokenizer: ChatTokenizer, sentencepiece: ChatTokenizer, name: str, kind: str
) -> None:
    """At every place of random texts, for every token."""
    used = tokenizer if kind == "bytes" else sentencepiece
    size = used.vocab_size
    grammars, (grammar, language) = Grammars(used, size), LANGUAGES[name]
    texts = sorted(text.encode() for text in language)
    spellings = [b"" if token in used.special_ids else used.token_bytes[token] for token in range(size)]
    ending = frozenset({used.eos_token_id or 0, 7})
    rng = random.Random(name)
    for _ in range(12):
        made, text, complete = new_matcher(grammars, grammar, ending), b"", False
        while not complete:
            rests = {other[len(text) :] for other in texts if other.startswith(text)} - {b""}
            want = {token for token in range(size) if spellings[token] and any(r.startswith(spellings[token]) for r in rests)}
            over = text in texts
            assert ids_of(made.mask()) == (want | ending if over else want), (text, used.decode(sorted(want)))
            if not want:
                break
            token = rng.choice(sorted(want - ending))
            text += spellings[token]
            complete = made.accept(token)
            assert made.error is None
            assert complete == (text in texts and not any(other != text and other.startswith(text) for other in texts))
        assert text in texts


def test_ending_waits_while_it_can(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    """`hold` keeps the end off while something else is left, an end token that is part of the text too."""
    (a,) = tokenizer.encode("a")
    made = new_matcher(grammars, regex("a{1,2}"), [2, 389])
    assert ids_of(made.mask()) == ids_of(made.mask(hold=True)) and not {2, 389} & ids_of(made.mask())
    assert not made.accept(a)
    assert ids_of(made.mask(hold=True)) == {a}
    assert ids_of(made.mask()) == {a, 2, 389}
    made.set_ending([a])
    assert ids_of(made.mask(hold=True)) == {a}, "nothing else is left"
    assert made.accept(a), "and nothing can follow"


def test_an_end_token_that_is_text_ends_where_the_output_matches(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    """So that what has ended matches; one that the request itself names may end it anywhere."""
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    made = new_matcher(grammars, regex("[ab]{2}"), [a])
    assert ids_of(made.mask()) == {b}
    made.set_ending([a], [a])
    assert ids_of(made.mask()) == {a, b}
    made.set_ending([a])
    made.accept(b)
    made.accept(b)
    made = new_matcher(grammars, regex("[ab]{2,3}"), [a])
    made.accept(b)
    assert ids_of(made.mask()) == {b}
    made.accept(b)
    assert ids_of(made.mask()) == {a, b}, "an end, or the third letter"


def test_an_output_that_may_not_end_goes_on(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    (a,) = tokenizer.encode("a")
    made = new_matcher(grammars, regex("a+"))
    for _ in range(20):
        assert a in ids_of(made.mask())
        assert not made.accept(a)
    assert 2 not in ids_of(made.mask())


def test_special_tokens_are_named_and_match_no_pattern(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    special = tokenizer.special_tokens["<|im_start|>"]
    free = new_matcher(grammars, "start: /(.|\\n)*/", [2])
    assert not tokenizer.special_ids & (ids_of(free.mask()) - {2})
    named = new_matcher(grammars, 'start: <|im_start|> "a"')
    assert ids_of(named.mask()) == {special}
    assert not named.accept(special)
    assert "a" in {tokenizer.decode([token]) for token in ids_of(named.mask())}


@pytest.mark.parametrize("by_id", [False, True])
def test_any_text_then_a_grammar(grammars: Grammars, tokenizer: ChatTokenizer, by_id: bool) -> None:
    """The marker is found in a text, across tokens, or is a special token; the grammar begins behind it, or after space."""
    special = tokenizer.special_tokens["<|im_start|>"]
    grammar = after(special if by_id else "</think>", json_schema({"enum": ["yes", "no"]}))
    mark = [special] if by_id else tokenizer.encode("</think>")
    for between in ("", "\n\n"):
        made = new_matcher(grammars, grammar, [2])
        for token in tokenizer.encode('Hm, "no" </thin king> {} \n 🙂 ') + mark:
            mask = ids_of(made.mask())
            assert token in mask and 2 not in mask
            assert not made.accept(token)
        rest = tokenizer.encode(f'{between}"yes"')
        for place, token in enumerate(rest):
            mask = ids_of(made.mask())
            assert token in mask and len(mask) < 40
            assert made.accept(token) == (place + 1 == len(rest))
        assert made.error is None


@pytest.mark.parametrize("begin_by_id", [False, True])
@pytest.mark.parametrize("end_by_id", [False, True])
def test_a_text_that_may_be_missing_then_a_grammar(
    grammars: Grammars, tokenizer: ChatTokenizer, begin_by_id: bool, end_by_id: bool
) -> None:
    """What doesn't begin with the first marker is held to the grammar from its first token on."""
    begin, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|endoftext|>"]
    grammar = after(
        end if end_by_id else "</think>", json_schema({"enum": ["yes", "no"]}), begin=begin if begin_by_id else "<think>"
    )
    opened = [begin] if begin_by_id else tokenizer.encode("<think>")
    closed = [end] if end_by_id else tokenizer.encode("</think>")
    for thoughts in ([], [*opened, *tokenizer.encode('Hm, "no" </thin king> <think> 🙂 '), *closed, *tokenizer.encode("\n\n")]):
        made = new_matcher(grammars, grammar, [2])
        assert not set(tokenizer.encode("Hm")) & ids_of(made.mask())
        for token in thoughts:
            mask = ids_of(made.mask())
            assert token in mask and 2 not in mask
            assert not made.accept(token)
        rest = tokenizer.encode('"yes"')
        for place, token in enumerate(rest):
            mask = ids_of(made.mask())
            assert token in mask and len(mask) < 40
            assert made.accept(token) == (place + 1 == len(rest))
        assert made.error is None


def test_thoughts_or_none_before_any_text_or_calls(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    """An answer that is free text may begin with what could have become thoughts."""
    free = after("</think>", 'start: TEXT | TEXT "<call>" "x" "</call>"\nTEXT: /(.|\\n)*/', begin="<think>")
    for text in ("Hello", "<think>a</think>\n\nHello", "<thunder>", "<think>a</think><call>x</call>", "a<call>x</call>"):
        made = new_matcher(grammars, free, [2])
        for token in tokenizer.encode(text):
            assert token in ids_of(made.mask()), text
            made.accept(token)
        assert made.error is None


def test_after_can_be_composed(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    made = new_matcher(grammars, after("#", after("=", choice(["}{"]))))
    ends = [made.accept(token) for token in tokenizer.encode("a = b # c # d = }{")]
    assert ends[-1] and not any(ends[:-1]) and made.error is None


def test_json_stays_in_one_line(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    def takes(grammar: str, text: str) -> bool:
        made = new_matcher(grammars, grammar)
        for token in tokenizer.encode(text):
            if token not in ids_of(made.mask()):
                return False
            made.accept(token)
        return made.error is None

    for text in ('{"a":[1,2],"b":{}}', '{"a": [1, 2], "b": {}}'):
        assert takes(json_object(), text)
        assert takes(json_object(compact=True), text) == (" " not in text)
    for text in ('{ "a":1}', '{"a":  1}', '{"a":1 }', '{\n', '{"a" :1}', " {}"):
        assert not takes(json_object(), text)
    assert takes(json_object(whitespace_pattern=r"[ \n]{0,3}"), '{\n  "a": 1}')
    assert not takes(json_object(whitespace_pattern=r"[ \n]{0,3}"), '{\n    "a": 1}')
    assert takes(json_schema({"type": "object", "x-guidance": {"whitespace_flexible": True}}), '{\n\n\n\n "a" : 1')


@pytest.mark.parametrize(("grammar", "words"), [
    (json_schema({"not": {"type": "string"}, "uniqueItems": True}), "not, uniqueItems can't be enforced"),
    (json_schema({"type": "string", "format": "colour"}), "format colour can't be enforced"),
    (json_schema({"type": "colour"}), "Invalid type: colour"),
    (json_schema({"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}), "use anyOf"),
    (json_schema({"type": "string", "pattern": "(?=a)b"}), "look-ahead"),
    (json_schema({"type": "integer", "minimum": 3, "maximum": 2}), "minimum (3) is greater"),
    (json_schema({"$ref": "http://example.com/schema"}), "example.com"),
    (json_schema({"type": "string", "x-guidance": {"colour": 1}}), "unknown field `colour`"),
    (json_schema(False), "schema is false"),
    (regex("("), "unclosed group"),
    (regex(r"(a)\1"), "backreferences"),
    ("start: a", "unknown name"),
    ('begin: "a"', "no start rule"),
    ('start: "a"\nb: "a\n', "line 2"),
    ("start: <|nobody|>", 'unknown special token: <|nobody|>'),
    ("start: \ud800", "surrogate"),
    ("{}", ""),
    ("", ""),
    ('start: "' + "a" * MAX_CHARACTERS + '"', f"at most {MAX_CHARACTERS}"),
])
def test_what_cannot_be_compiled_is_named(grammars: Grammars, grammar: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        grammars.new_matchers(grammar, 1)
    assert words in str(refused.value)
    assert str(refused.value).startswith("grammar: ") and refused.value.param == "grammar"
    assert len(str(refused.value)) < 600


def test_a_dead_end_is_an_error_and_allows_everything(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    """Such a schema compiles: no text is finite."""
    endless = {"$defs": {"x": {"$ref": "#/$defs/x"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}},
               "required": ["a"]}
    made = new_matcher(grammars, json_schema(endless))
    for token in tokenizer.encode('{"a": '):
        assert made.error is None
        made.accept(token)
    assert ids_of(made.mask()) >= set(range(SIZE))
    assert isinstance(made.error, InvalidRequest) and "no text can match" in str(made.error)


def test_ambiguity_ends_before_it_harms(
    grammars: Grammars, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each token of such a grammar takes longer than the one before it."""
    monkeypatch.setattr(matcher, "CREDIT_S", 0.05)
    monkeypatch.setattr(matcher, "TOKEN_S", 1e-3)
    (a,) = tokenizer.encode("a")
    made = new_matcher(grammars, "start: a\na: a a a | a a | /a/")
    began = time.thread_time()
    for _ in range(400):
        made.mask()
        if made.error is None:
            made.accept(a)
        if made.error is not None:
            break
    assert isinstance(made.error, InvalidRequest) and "less ambiguous" in str(made.error)
    assert time.thread_time() - began < 5, "0.3 s on an idle machine"


def test_outputs_of_one_grammar_go_their_own_ways(grammars: Grammars, tokenizer: ChatTokenizer) -> None:
    first, second = grammars.new_matchers(choice(["ab", "cd"]), 2)
    (other,) = grammars.new_matchers(choice(["ab", "cd"]), 1)
    (a,), (b,), (c,) = (tokenizer.encode(letter) for letter in "abc")
    first.accept(a)
    second.accept(c)
    assert b in ids_of(first.mask()) and b not in ids_of(second.mask()) and {a, c} <= ids_of(other.mask())
    assert first.accept(b) and first.error is None


def test_masks_of_a_batch_are_each_rows_own(grammars: Grammars) -> None:
    made = {number: new_matcher(grammars, choice([chr(97 + number)]), [2]) for number in range(9)}
    masks = Masks(grammars, {number: (made[number], number % 2 == 0) for number in made})
    for number, one in made.items():
        found = masks.of(number)
        assert found is not None and np.array_equal(found, one.mask())
    assert masks.of(99) is None


def test_a_bug_ends_one_output(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = new_matcher(grammars, choice(["a"])), new_matcher(grammars, choice(["b"]))
    monkeypatch.setattr(made, "_inner", None)
    masks = Masks(grammars, {1: (made, False), 2: (other, False)})
    found = masks.of(1)
    assert found is not None and ids_of(found) >= set(range(SIZE))
    assert made.error is not None and not isinstance(made.error, InvalidRequest)
    assert other.error is None and masks.of(2) is not None


def test_nothing_is_kept_of_grammars_that_are_not_used(tokenizer: ChatTokenizer) -> None:
    grammars = Grammars(tokenizer, SIZE)
    assert not grammars.in_use
    made = grammars.new_matchers(choice(["a"]), 2)
    assert grammars.in_use
    del made
    assert not grammars.in_use


def test_requests_that_compile_one_grammar_at_the_same_time(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one's end says nothing about the other, whose tokens would be free."""
    import llguidance

    both, compile_ = threading.Barrier(2, timeout=30), llguidance.LLMatcher

    def slow(*args: Any, **options: Any) -> Any:
        both.wait()
        return compile_(*args, **options)

    monkeypatch.setattr(llguidance, "LLMatcher", slow)
    grammars = Grammars(tokenizer, SIZE)
    with ThreadPoolExecutor(2) as threads:
        made = list(threads.map(lambda _: grammars.new_matchers(choice(["ab"]), 1), range(2)))
    assert made[0][0]._compiled is not made[1][0]._compiled
    for _ in range(2):
        assert grammars.in_use
        made.sort(key=lambda one: grammars._compiled.get(choice(["ab"])) is one[0]._compiled)
        del made[-1]  # first the one that later requests would share
    assert not grammars.in_use


def test_outputs_of_a_grammar_that_was_compiled_again_still_count(tokenizer: ChatTokenizer) -> None:
    """Another output's error makes later ones begin anew; the earlier ones go on."""
    grammars = Grammars(tokenizer, SIZE)
    first, second = grammars.new_matchers(choice(["ab"]), 2)
    second._fail("a limit")
    (third,) = grammars.new_matchers(choice(["ab"]), 1)
    assert third._compiled is not first._compiled
    del second, third
    assert grammars.in_use and first.error is None
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    first.accept(a)
    assert ids_of(first.mask()) == {b}
    del first
    assert not grammars.in_use


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 391])
def test_packed(size: int) -> None:
    tokens = {0, 5, 30, 31, 32, 63, 390}
    assert ids_of(packed([*tokens, 5, -1, 10**9], size)) == {token for token in tokens if token < size}


@pytest.mark.parametrize("given", [1, 1.5, None, [], "[", "5", '"x"', "nothing", "[" * 100_000])
def test_what_is_no_schema(given: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^my\.field: ") as refused:
        json_schema(given, field="my.field")  # type: ignore[arg-type]
    assert refused.value.param == "my.field"


def test_what_cannot_be_written() -> None:
    for make in (
        lambda: regex(""), lambda: choice([]), lambda: choice(["a", ""]), lambda: ebnf("root ::= x"), lambda: ebnf("("),
        lambda: ebnf("root ::= " + "(" * 5000 + ")" * 5000), lambda: json_schema({"const": float("nan")}),
        lambda: json_schema({"const": object()}), lambda: ebnf("root ::= " + '"a" ' * MAX_CHARACTERS),
    ):
        with pytest.raises(InvalidRequest):
            make()


def test_lark_is_left_as_it_is() -> None:
    text = 'start: "a"\n'
    assert ebnf(text) == text


def test_a_schema_may_be_text_in_any_spelling(grammars: Grammars) -> None:
    """Names and values as the schema has them, whatever characters they have."""
    schema = {"const": 'ä"\\/\n\u2028🙂</%json>{'}
    for given in (schema, json.dumps(schema), json.dumps(schema, ensure_ascii=False)):
        grammar = json_schema(given)
        assert "\n" not in grammar.strip()
        assert json.loads(re.sub("^start: %json ", "", grammar))["const"] == schema["const"]
        grammars.new_matchers(grammar, 1)
