"""Where a prompt's tokens begin in its text, also where the tokenizer changes the text; and added tokens in it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from tokenizers import AddedToken, normalizers

from coserve.server.inference.walk import prompt_offsets
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_sentencepiece_tokenizer, build_tiny_tokenizer

TEXTS = [
    "The quick brown fox", "Grüße, Straße", "中文测试 你好", "日本語のテスト", "한국어 시험", "Привет, мир", "שלום עולם",
    "مرحبا \u200f123", "हिन्दी क्षेत्र", "ไทยภาษา", "தமிழ் மொழி", "ქართული", "Ελληνικά", "አማርኛ",
    "👨\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 👍🏽", "\x00\x07\x1b[0m \ufeff", "  two  spaces   ",
    "x  <|im_end|>  y", "plain added grün!",
]


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """With a normal form, added tokens, and a control token that takes the white space around it."""
    directory = tmp_path_factory.mktemp("tokenizer")
    build = build_tiny_tokenizer if request.param == "byte-level" else build_sentencepiece_tokenizer
    hf_tokenizer = ChatTokenizer.load(build(directory))._hf
    backend = hf_tokenizer.backend_tokenizer
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), *before])
    hf_tokenizer.add_tokens([AddedToken("plain added"), AddedToken("grün!")])
    hf_tokenizer.add_tokens([AddedToken("<|im_end|>", special=True, lstrip=True, rstrip=True, normalized=False)])
    return ChatTokenizer(hf_tokenizer)


@pytest.mark.parametrize("change", ["", "e\u0301 "])
@pytest.mark.parametrize("text", TEXTS)
def test_offsets_cut_a_text_into_its_tokens(tokenizer: ChatTokenizer, text: str, change: str) -> None:
    """change: makes the whole text another one than its tokens' own."""
    whole = text + change
    ids = tokenizer.encode(whole, add_special_tokens=True)
    offsets = prompt_offsets(tokenizer, ids, whole)
    cut = [whole[start:end] for start, end in pairwise([*offsets, len(whole)])]
    assert "".join(cut) == whole
    for token, piece in zip(ids, cut, strict=True):
        try:
            own = tokenizer.token_bytes[token].decode()
        except UnicodeDecodeError:  # a part of a character
            continue
        assert piece in (own, own.removeprefix(" "), "") or piece.strip() == own or "\u0301" in piece


def test_a_character_that_several_tokens_share_is_at_one_place(tokenizer: ChatTokenizer) -> None:
    text = "a🦄b e\u0301"
    ids = tokenizer.encode(text)
    places = dict.fromkeys(
        offset for token, offset in zip(ids, prompt_offsets(tokenizer, ids, text), strict=True)
        if tokenizer.token_bytes[token].strip() and tokenizer.token_bytes[token] in "🦄".encode()
    )
    assert list(places) == [1]


def test_an_added_token_is_spelled_as_the_tokenizer_spells_it(tokenizer: ChatTokenizer) -> None:
    """SentencePiece's normalizer puts a space before those that it normalizes."""
    for text in ("plain added", "a grün! b", "grün!plain added"):
        ids = tokenizer.encode(text)
        assert len(ids) < len(text), "no added token"
        stream = IncrementalDetokenizer(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.finish() in (tokenizer.decode(ids), text)
