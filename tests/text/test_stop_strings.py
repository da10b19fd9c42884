"""Stop strings: special tokens in them, min_tokens, and what they cost."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.text.stream import StopMatcher, TextStream
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_sentencepiece_tokenizer

END = "<|im_end|>"


def feed(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize(("stop", "text", "want"), [
    (END, f"ab{END}cd", "ab"),
    (f"\n{END}", f"ab\n{END}cd", "ab"),
    (f"\n{END}", f"ab{END}c\nd{END}", None),
    (f"{END}\n", f"ab{END}\ncd", "ab"),
    (f"b{END}c", f"ab{END}cd", "a"),
    (f"{END}<|im_start|>user", f"x{END}<|im_start|>user\nHi", "x"),
    (f"{END}{END}", f"x{END}y{END}{END}z", "xy"),
    ("bc", f"ab{END}cd", "a"),
    ("<|im", f"ab{END}cd", None),
    ("|>", f"ab{END}cd", None),
])
def test_special_tokens_in_stop_strings(tokenizer: ChatTokenizer, stop: str, text: str, want: str | None) -> None:
    """Special tokens, which don't show in the text, match as a whole or not at all."""
    stream = TextStream(tokenizer, [stop])
    found = "".join(feed(stream, tokenizer.encode(text)))
    whole = text.replace(END, "").replace("<|im_start|>", "")
    assert (found, stream.stopped) == ((whole, None) if want is None else (want, stop))


def test_a_special_token_may_be_spelled_out(tokenizer: ChatTokenizer) -> None:
    """An ordinary text that reads like one."""
    spelled = [token for letter in f"ab{END}c" for token in tokenizer.encode(letter)]
    stream = TextStream(tokenizer, [END])
    assert "".join(feed(stream, spelled)) == "ab"
    assert stream.stopped == END


def test_the_token_that_ends_an_output_may_complete_a_stop_string(tokenizer: ChatTokenizer) -> None:
    eos = tokenizer.eos_token_id
    stream = TextStream(tokenizer, [f"\n{END}"])
    assert [stream.push(token) for token in tokenizer.encode("a\n")] == ["a", ""]
    assert (stream.finish(eos), stream.stopped) == ("", f"\n{END}")
    other = TextStream(tokenizer, [f"\n\n{END}"])
    assert [other.push(token) for token in tokenizer.encode("a\n")] == ["a", ""]
    assert (other.finish(eos), other.stopped) == ("\n", None)


def test_special_tokens_of_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = ChatTokenizer.load(build_sentencepiece_tokenizer(tmp_path_factory.mktemp("spm")))
    stream = TextStream(tokenizer, ["\n</s>"])
    newline = 3 + 10
    assert "".join(feed(stream, [*tokenizer.encode("ab"), newline, 2, 2])) == "ab"
    assert stream.stopped == "\n</s>"


@pytest.mark.parametrize(("min_tokens", "want"), [(0, "x"), (3, "x"), (4, "xENDy"), (7, "xENDy"), (8, "xENDyENDz")])
def test_min_tokens_holds_stop_strings_back(tokenizer: ChatTokenizer, min_tokens: int, want: str) -> None:
    """x E N D y E N D z: END is complete with tokens 4 and 8."""
    ids = [token for letter in "xENDyENDz" for token in tokenizer.encode(letter)]
    stream = TextStream(tokenizer, ["END"], min_tokens=min_tokens)
    assert "".join(feed(stream, ids)) == want


def test_what_began_before_min_tokens_may_end_after(tokenizer: ChatTokenizer) -> None:
    ids = [token for letter in "abcd" for token in tokenizer.encode(letter)]
    stream = TextStream(tokenizer, ["abcd", "bc"], min_tokens=3)
    assert "".join(feed(stream, ids)) == ""
    assert stream.stopped == "abcd"
    overlap = TextStream(tokenizer, ["aa"], min_tokens=2)
    assert "".join(feed(overlap, [*tokenizer.encode("a") * 3])) == "a"


@pytest.mark.parametrize("stops", [
    ["a" * 8000 + chr(98 + number) for number in range(16)],
    ["ab" * (2000 + number) + "!" for number in range(16)],
    [f"{number:03}" + "x" * 500 for number in range(400)],
])
def test_a_token_costs_the_same_however_much_there_was(stops: list[str]) -> None:
    """The text keeps being a beginning of the stop strings, the worst case: everything is held back."""
    matcher = StopMatcher(stops)
    text = (stops[0][:-1] + "?") * 40

    def seconds(start: int) -> float:
        began = time.process_time()
        assert matcher.feed(text[start : start + 6000]) is None
        return time.process_time() - began

    first = [seconds(place) for place in range(0, 6000 * 4, 6000)]
    for place in range(6000 * 4, 6000 * 16, 6000):
        assert matcher.feed(text[place : place + 6000]) is None
    last = [seconds(place) for place in range(6000 * 16, 6000 * 20, 6000)]
    assert sum(last) < 5 * sum(first) + 0.05
    assert sum(last) < 2.0, "some microseconds a character"


SPECIAL = (END, "<|im_start|>")


def cut(symbols: Sequence[str], stops: Sequence[str]) -> str:
    """The text before the first stop string, by trying every end: in what shows, and in whole symbols where it writes out a
    special token."""
    for end in range(1, len(symbols) + 1):
        shown = "".join(symbol for symbol in symbols[:end] if symbol not in SPECIAL)
        found = [stop for stop in stops if symbols[end - 1] not in SPECIAL and shown.endswith(stop)]
        sizes = [len(stop) for stop in found]
        for stop in stops:
            parts = [part for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})|(.)", stop, flags=re.DOTALL) if part]
            if set(parts) & set(SPECIAL) and list(symbols[max(0, end - len(parts)) : end]) == parts:
                sizes.append(sum(part not in SPECIAL for part in parts))
        if sizes:
            return shown[: len(shown) - max(sizes)]
    return "".join(symbol for symbol in symbols if symbol not in SPECIAL)


WRITTEN = st.lists(st.sampled_from(["a", "b", "\n", END]), min_size=1, max_size=3).map("".join)


@given(
    symbols=st.lists(st.sampled_from(["a", "b", "\n", *SPECIAL]), max_size=12),
    stops=st.lists(WRITTEN, min_size=1, max_size=3),
)
@settings(deadline=None, max_examples=400)
def test_the_first_stop_string_of_any(tokenizer: ChatTokenizer, symbols: list[str], stops: list[str]) -> None:
    stream = TextStream(tokenizer, stops)
    ids = [token for symbol in symbols for token in tokenizer.encode(symbol)]
    assert "".join(feed(stream, ids)) == cut(symbols, stops)


def test_a_special_token_that_shows_is_a_part_of_the_text(tokenizer: ChatTokenizer) -> None:
    start = tokenizer.special_tokens["<|im_start|>"]
    ids = tokenizer.encode(f"ab<|im_start|>c{END}d")
    stream = TextStream(tokenizer, shown_ids=[start])
    assert "".join(feed(stream, ids)) == "ab<|im_start|>cd"
    for stop, text in (("b<|im_start|>", "a"), ("<|im_start|>c", "ab"), ("im_start", "ab<|"), (f"c{END}", "ab<|im_start|>")):
        stream = TextStream(tokenizer, [stop], shown_ids=[start])
        assert "".join(feed(stream, ids)) == text
        assert stream.stopped == stop
