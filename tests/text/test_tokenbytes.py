"""Bytes and names of single tokens, in vocabularies of each kind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coserve.text.detokenizer import IncrementalDetokenizer, shown_text
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_tiny_tokenizer


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """With added tokens: one with a space, and one whose letters all stand for bytes in the vocabulary."""
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("bpe")))
    tokenizer._hf.add_tokens([AddedToken("plain added"), AddedToken("grün!")])
    return ChatTokenizer(tokenizer._hf)


def word_pieces() -> ChatTokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2, "b": 3, "##b": 4}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def metaspace() -> ChatTokenizer:
    vocab = {piece: index for index, piece in enumerate(["<unk>", "▁", "a", "b", "▁a", "▁b"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
@settings(deadline=None, max_examples=100)
def test_joined_bytes_are_the_text(byte_level: ChatTokenizer, sentencepiece: ChatTokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert b"".join(byte_level.token_bytes[token] for token in ids).decode() == text
    ids = sentencepiece.encode(text)
    spelled = sentencepiece.token_bytes
    joined = b"".join([spelled.at_start(token) for token in ids[:1]] + [spelled[token] for token in ids[1:]])
    assert joined.decode() == sentencepiece.decode(ids)
    assert shown_text(sentencepiece, ids) == sentencepiece.decode(ids)


def test_bytes_of_each_kind(byte_level: ChatTokenizer, sentencepiece: ChatTokenizer) -> None:
    emoji = byte_level.encode("🦄")
    assert len(emoji) > 1 and b"".join(byte_level.token_bytes[token] for token in emoji) == "🦄".encode()
    for text in ("<|im_end|>", "plain added", "grün!"):
        (token,) = byte_level.encode(text)
        assert byte_level.token_bytes[token] == text.encode()
        assert byte_level.token_bytes.name(token) == text
    assert byte_level.token_bytes[10**6] == b""
    assert [sentencepiece.token_bytes[3 + byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    the = sentencepiece._hf.convert_tokens_to_ids("▁the")
    assert (sentencepiece.token_bytes[the], sentencepiece.token_bytes.at_start(the)) == (b" the", b"the")
    assert sentencepiece.token_bytes[2] == b"</s>"


@pytest.mark.parametrize("make", [word_pieces, metaspace])
def test_other_decoders(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    for ids in ([1, 2, 3], [3, 3, 2, 1], [5, 1, 4], [1, 4, 1]):
        kept = [token for token in ids if tokenizer._hf.convert_ids_to_tokens(token) is not None]
        stream = IncrementalDetokenizer(tokenizer)
        assert "".join(map(stream.push, kept)) + stream.finish() == tokenizer.decode(kept)


def test_no_two_tokens_have_one_name(byte_level: ChatTokenizer, sentencepiece: ChatTokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece, word_pieces(), metaspace()):
        names = [tokenizer.token_bytes.name(token) for token in range(tokenizer.vocab_size + 3)]
        assert len(set(names)) == len(names)
        assert all(names)
        assert not any("\ufffd" in name for name in names)


def test_names_are_texts_or_bytes(byte_level: ChatTokenizer, sentencepiece: ChatTokenizer) -> None:
    letter = sentencepiece._hf.convert_tokens_to_ids("A")
    assert sentencepiece.token_bytes.name(letter) == "A"
    assert sentencepiece.token_bytes.name(3 + ord("A")) == "bytes:\\x41"
    assert sentencepiece.token_bytes.name(3 + 10) == "\n", "nothing else stands for a line end"
    assert sentencepiece.token_bytes.name(3 + 0xE2) == "bytes:\\xe2"
    assert sentencepiece.token_bytes.name(sentencepiece.vocab_size) == f"token_id:{sentencepiece.vocab_size}"
    partial = byte_level.encode("🦄")[0]
    assert byte_level.token_bytes.name(partial).startswith("bytes:\\xf0")
    assert byte_level.token_bytes.name(byte_level.eos_token_id or 0) == "<|im_end|>"


# --- after a context ---


def test_a_text_that_goes_on_keeps_its_first_space(sentencepiece: ChatTokenizer) -> None:
    prompt = sentencepiece.encode("in", add_special_tokens=True)
    both = sentencepiece.encode("in the the", add_special_tokens=True)
    stream = IncrementalDetokenizer(sentencepiece, context=prompt)
    assert "".join(map(stream.push, both[len(prompt):])) + stream.finish() == " the the"
    only_bos = IncrementalDetokenizer(sentencepiece, context=both[:1])
    assert "".join(map(only_bos.push, both[1:])) == "in the the", "special tokens are no text"


def test_a_character_that_the_context_begins_is_the_outputs(byte_level: ChatTokenizer, sentencepiece: ChatTokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        ids = tokenizer.encode("ab🦄c")
        for cut in range(1, len(ids) + 1):
            stream = IncrementalDetokenizer(tokenizer, context=ids[:cut])
            rest = "".join(map(stream.push, ids[cut:])) + stream.finish()
            assert shown_text(tokenizer, ids[:cut]) + rest == "ab🦄c"[-len(tokenizer.decode(ids)):] or cut == len(ids)
            if cut < len(ids):
                assert "\ufffd" not in rest


def test_where_tokens_begin(byte_level: ChatTokenizer) -> None:
    eos, unicorn = byte_level.eos_token_id or 0, byte_level.encode("🦄")
    stream = IncrementalDetokenizer(byte_level)
    ids = [*byte_level.encode("a"), *unicorn, eos, *byte_level.encode("b"), *unicorn[:2], *byte_level.encode("c")]
    starts, added = [], []
    for token in ids:
        stream.push(token)
        starts.append(stream.start)
        added.append(stream.added)
    assert starts == [0, *[1] * len(unicorn), 2, 2, 3, 3, 4], "what stays unfinished is one U+FFFD before the c"
    part = b"".join(byte_level.token_bytes[token] for token in unicorn[:2])
    assert b"".join(added) == "a🦄b".encode() + part + b"c"
