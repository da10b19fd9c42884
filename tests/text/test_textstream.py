"""The text of an output as it grows: what is held back, and where a stop string cuts it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.stream import TextStream
from coserve.text.tokenizer import ChatTokenizer
from tests.text.test_tokenizer import byte_tokenizer

STOPS = st.lists(st.text("ab🙂é", min_size=1, max_size=4), max_size=4)

PIECES = (b"hello", b"aa", b"ba", "🙂".encode(), "é🙂".encode(), b"lo\xf0\x9f", b"\x99\x82", b"aab")


@pytest.fixture(scope="module")
def pieces_tokenizer() -> ChatTokenizer:
    """Ids 0 to 255 are bytes, then PIECES."""
    return ChatTokenizer(byte_tokenizer(PIECES))


def feed(tokenizer: ChatTokenizer, ids: Sequence[int], stop: Sequence[str]) -> tuple[list[str], TextStream]:
    """The pieces of every push and of finish."""
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token_id) for token_id in ids]
    return [*pieces, stream.finish()], stream


def cut(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, character by character; and that string."""
    for end in range(len(text) + 1):
        complete = [each for each in stop if text[:end].endswith(each)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(text=st.text("ab🙂é", max_size=30), stop=STOPS)
@example(text="aaab", stop=["aab", "ab", "aaa"])
@example(text="baaab", stop=["aab", "ab"])
@example(text="ababa", stop=["abb", "baba"])
@example(text="a🙂b", stop=["🙂b"])
@example(text="abba", stop=["abb", "b"])
@settings(deadline=None, max_examples=300)
def test_pieces_are_the_text_cut_at_the_first_stop(
    tokenizer: ChatTokenizer, sentencepiece: ChatTokenizer, text: str, stop: list[str]
) -> None:
    want, found = cut(text, stop)
    for each in (tokenizer, sentencepiece):
        pieces, stream = feed(each, each.encode(text), stop)
        assert "".join(pieces) == want
        assert stream.stopped == found


@given(
    pieces=st.lists(st.integers(0, len(PIECES) - 1), max_size=14),
    stop=st.lists(st.sampled_from(["ell", "lo", "loa", "he", "hell", "l🙂", "🙂", "é🙂b", "aab", "a🙂h", "oh"]), max_size=4),
)
@example(pieces=[0], stop=["ell", "e"])
@example(pieces=[1, 0], stop=["ah", "hello"])
@settings(deadline=None, max_examples=300)
def test_the_cut_into_tokens_makes_no_difference(pieces_tokenizer: ChatTokenizer, pieces: list[int], stop: list[str]) -> None:
    """Tokens of many letters, that each may hold stop strings or end inside a character, and one token per byte."""
    merged = [256 + piece for piece in pieces]
    spelled = list(b"".join(PIECES[piece] for piece in pieces))
    text = pieces_tokenizer.decode(merged)
    want, found = cut(text, stop)
    for ids in (merged, spelled):
        parts, stream = feed(pieces_tokenizer, ids, stop)
        assert ("".join(parts), stream.stopped) == (want, found)


@given(text=st.text("ab🙂", max_size=16), stop=STOPS)
@settings(deadline=None, max_examples=200)
def test_no_piece_is_taken_back_or_late(tokenizer: ChatTokenizer, text: str, stop: list[str]) -> None:
    """After each character: all is out but the longest suffix that may still become a stop string."""
    stream = TextStream(tokenizer, stop)
    given_out = ""
    for end, character in enumerate(text, 1):
        given_out += "".join(stream.push(token_id) for token_id in tokenizer.encode(character))
        seen, found = cut(text[:end], stop)
        if found is None:
            held = max((n for each in stop for n in range(1, len(each)) if seen.endswith(each[:n])), default=0)
            seen = seen[: len(seen) - held]
        assert (given_out, stream.stopped) == (seen, found)


def test_each_piece_of_a_text(tokenizer: ChatTokenizer) -> None:
    ids = [token_id for part in ("x", "E", "N", "x", "E", "N", "D", "y") for token_id in tokenizer.encode(part)]
    pieces, stream = feed(tokenizer, ids, ["END"])
    assert pieces == ["x", "", "", "ENx", "", "", "", "", ""]
    assert stream.stopped == "END"
    assert stream.finish() == ""


def test_what_was_held_comes_at_the_end(tokenizer: ChatTokenizer) -> None:
    stream = TextStream(tokenizer, ["END"])
    assert [stream.push(token_id) for part in "xEN" for token_id in tokenizer.encode(part)] == ["x", "", ""]
    assert stream.finish() == "EN"
    assert stream.finish() == ""
    assert stream.stopped is None


def test_a_character_that_is_cut_short_shows_at_the_end(tokenizer: ChatTokenizer) -> None:
    unicorn = tokenizer.encode("🦄")
    pieces, _ = feed(tokenizer, [*tokenizer.encode("a"), *unicorn[:-1]], ["ab"])
    assert "".join(pieces[:-1]) == ""
    assert pieces[-1] == "a\ufffd"
    stopped, stream = feed(tokenizer, [*tokenizer.encode("a"), *unicorn[:-1]], ["\ufffd"])
    assert "".join(stopped) == "a"
    assert stream.stopped == "\ufffd"


def test_a_multi_byte_stop_string(tokenizer: ChatTokenizer) -> None:
    """An emoji that shares its first bytes with the stop string is text."""
    ids = [token_id for character in "a🙃b🙂c" for token_id in tokenizer.encode(character)]
    pieces, stream = feed(tokenizer, ids, ["b🙂"])
    assert "".join(pieces) == "a🙃"
    assert stream.stopped == "b🙂"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: ChatTokenizer) -> None:
    eos = tokenizer.eos_token_id
    assert eos is not None
    ids = [*tokenizer.encode("a"), eos, *tokenizer.encode("b")]
    assert feed(tokenizer, ids, ["<|im"])[0] == ["a", "", "b", ""]
    shown = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    assert [shown.push(token_id) for token_id in ids] == ["a", "<|im_end|>", "b"]
