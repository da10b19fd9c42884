"""A GGUF file's tokenizer gives the ids of the Hugging Face tokenizer that it was made from, or the file is refused.

Every file is written here: a tiny model, and a vocabulary trained or spelled out here, as llama.cpp's converter stores it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from coserve.core import InvalidRequest
from coserve.model.gguf import GgufFile, convert_gguf, read_config
from coserve.text.tokenizer import ChatTokenizer
from tests.model.test_gguf import write_gguf
from tests.tiny_models import build_tiny_model
from tests.tiny_tokenizer import build_sentencepiece_tokenizer

BOS, EOS, TOOL = "<|begin_of_text|>", "<|eot_id|>", "<tool>"
TEXTS = (
    "hello world", "Hello, World!", " hello", "  two  spaces  ", "\n\n\nlines\r\n\tand tabs \n", "it's IT'S don't we'LL 'twas",
    "1234567 3.14 1,000 \u0663\u0664 \u2460\u2461", "camelCaseHTMLParser", "x\n\n\n  y",
    "caf\u00e9 cafe\u0301 \u1e9b\u0323 \ufb01 \u212b",
    "\u4e2d\u6587\u5b57\u7b26 \u304b\u306a \ud55c\uad6d\uc5b4", "\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f642\U0001f642 \U0001f469\u200d\U0001f469\u200d\U0001f467", "a/b//c\\d", "<tool>x</tool>", f"{EOS}hello{BOS} world",
    "<|eot_id", "_under__score_", "\u00a0nbsp\u2003em", "    return x;\n\n}",
    "", " ", "\x00\x01", "\u2026\u2014\u201cquotes\u201d",
    "\u00c4\u00d6\u00dc\u00df \u01c5 \u2167 \u00aa\u00ba", "hellohello", "\u2581low line",
    "A\u0301 B\u030a", "!!!???...", "<s>a</s> b",
    "tail \n",
)
"""Contractions, digits of other scripts, cases, composed and decomposed letters, joined emoji, special tokens, odd spaces."""
SENTENCES = (
    "hello world, hello world: it's 12345 o'clock and don't we know it. The HTML parser isn't camelCase.",
    "caf\u00e9 na\u00efve Stra\u00dfe \u4e2d\u6587\u5b57\u7b26 and    spaces\n\n\nlines  ",
    "return x;\n    if (a/b == c) { print(1000); }\n" * 3,
)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""As in the tokenizer.json of Llama 3, Qwen2 and Mistral Nemo."""


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])


KINDS: Mapping[str, tuple[Any, bool, bool, bool]] = {
    "llama-bpe": (split(LLAMA3), True, True, False), "llama3": (split(LLAMA3), True, True, False),
    "tekken": (split(TEKKEN), True, True, False), "qwen2": (split(QWEN2), False, False, True),
    "smaug-bpe": (split(LLAMA3), False, False, False), "smollm": (digits(), False, False, False),
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False, False, False),
}
"""tokenizer.ggml.pre: how text is split, whether whole words come first, whether BOS does, whether text is composed."""


def byte_level(kind: str) -> Tokenizer:
    """A tokenizer with that pre-tokenizer, trained here. "hello" and " world" are tokens that no merge makes, so that they
    are only found as whole words."""
    how, whole_words, _, compose = KINDS[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = how
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"] if "".join(pair) not in ("hello", "Ġworld")]
    reached = {"".join(pair) for pair in merges}
    merges = [pair for pair in merges if all(len(part) == 1 or part in reached for part in pair)]
    names = sorted(model["vocab"], key=model["vocab"].__getitem__)
    names += [word for word in ("hello", "Ġworld") if word not in model["vocab"]]
    vocab = {name: index for index, name in enumerate((BOS, EOS, TOOL, *names))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    tokenizer.pre_tokenizer = how
    if compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in (BOS, EOS)])
    tokenizer.add_tokens([AddedToken(TOOL, normalized=False, special=False)])
    return tokenizer


def set_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Replaces, adds or (None) removes a metadata value."""
    values = writer.kv_data[0]
    if value is None:
        values.pop(key, None)
    elif key in values:
        values[key] = replace(values[key], value=value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, value)


def make(tmp_path: Path, tokenizer: Tokenizer, family: str = "llama", **keys: Any) -> Path:
    """A GGUF file of a tiny model with the tokens of `tokenizer`. keys: below tokenizer.ggml., over the defaults."""
    names = tokenizer.get_vocab_size()
    tokens = [tokenizer.id_to_token(index) for index in range(names)]
    added = {index: 3 if token.special else 4 for index, token in tokenizer.get_added_tokens_decoder().items()}
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    every = {"tokens": tokens, "token_type": [added.get(index, 1) for index in range(names)], "merges": merges,
             "bos_token_id": 0, "eos_token_id": 1, **keys}

    def edit(writer: gguf.GGUFWriter, _: dict[str, np.ndarray]) -> None:
        for name, value in every.items():
            set_key(writer, f"tokenizer.ggml.{name}", value)

    return write_gguf(build_tiny_model(family, tmp_path / "source"), tmp_path / "tiny.gguf", edit=edit)


def convert(file: Path) -> ChatTokenizer:
    return ChatTokenizer.load(convert_gguf(file, file.parent / "converted"))


def check_equal(found: ChatTokenizer, expected: Tokenizer, *, bos: bool = False) -> None:
    """Ids of every text, with and without special tokens, and back."""
    for text in TEXTS:
        ids = expected.encode(text, add_special_tokens=False).ids
        assert found.encode(text) == ids, text
        assert found.encode(text, add_special_tokens=True) == ([0] if bos else []) + ids, text
        assert found.decode(ids, skip_special_tokens=False) == expected.decode(ids, skip_special_tokens=False), text


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_ids_are_those_of_the_original(tmp_path: Path, kind: str) -> None:
    tokenizer = byte_level(kind)
    check_equal(convert(make(tmp_path, tokenizer, pre=kind)), tokenizer, bos=KINDS[kind][2])


@pytest.mark.parametrize("kind", ["llama-bpe", "tekken"])
def test_whole_words_are_looked_up_first(tmp_path: Path, kind: str) -> None:
    found = convert(make(tmp_path, byte_level(kind), pre=kind))
    assert len(found.encode("hello world")) == 2
    other = convert(make(tmp_path / "other", byte_level("gpt-2"), pre="gpt-2"))
    assert len(other.encode("hello world")) > 2, "by merges alone these words take more"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2", "smollm"])
def test_the_architecture_does_not_change_the_ids(tmp_path: Path, family: str, kind: str) -> None:
    """transformers has rules of its own for the tokenizers of some architectures."""
    tokenizer = byte_level(kind)
    check_equal(convert(make(tmp_path, tokenizer, family, pre=kind)), tokenizer, bos=KINDS[kind][2])


@pytest.mark.parametrize(("keys", "before", "after"), [
    ({"add_bos_token": False}, [], []), ({"add_bos_token": True}, [0], []), ({"add_eos_token": True}, [0], [1]),
    ({"add_bos_token": False, "add_eos_token": True}, [], [1]), ({}, [0], []), ({"bos_token_id": None}, [], []),
])
def test_ends_are_added_as_the_file_says(tmp_path: Path, keys: dict[str, Any], before: list[int], after: list[int]) -> None:
    found = convert(make(tmp_path, byte_level("llama-bpe"), pre="llama-bpe", **keys))
    ids = found.encode("hello world")
    assert found.encode("hello world", add_special_tokens=True) == before + ids + after


def test_tokens_outside_of_the_byte_alphabet_stay_whole(tmp_path: Path) -> None:
    """As DeepSeek's, which are written with characters that no byte is spelled as."""
    tokenizer = byte_level("qwen2")
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    file = make(tmp_path, tokenizer, pre="deepseek-r1-qwen", tokens=[*tokens, end],
                token_type=[3, 3, 4, *[1] * (len(tokens) - 3), 3], eos_token_id=len(tokens))
    found = convert(file)
    assert found.encode(f"hello{end}")[-1] == len(tokens) == found.eos_token_id
    assert found.decode([len(tokens)]) == "" and found.decode([len(tokens)], skip_special_tokens=False) == end


# --- SentencePiece ---


def sentencepiece(directory: Path, *, prefix: bool = True) -> tuple[Tokenizer, dict[str, Any]]:
    """Llama 2's kind of tokenizer, and what a GGUF file says of it."""
    tokenizer = AutoTokenizer.from_pretrained(build_sentencepiece_tokenizer(directory)).backend_tokenizer
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if not prefix:
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    kinds = [2, 3, 3] + [6 if token.startswith("<0x") else 1 for token in tokens[3:]]
    # The pieces that merges make have the scores of their order; all others come after them.
    order = {"\u2581t": 0.0, "he": -1.0, "\u2581the": -2.0}
    scores = [order.get(token, -1000.0 - index) for index, token in enumerate(tokens)]
    return tokenizer, {"model": "llama", "pre": "default", "token_type": kinds, "scores": scores, "merges": None,
                       "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_ids_are_those_of_the_original(tmp_path: Path, prefix: bool | None) -> None:
    tokenizer, keys = sentencepiece(tmp_path / "hf", prefix=prefix is not False)
    found = convert(make(tmp_path, tokenizer, **keys, add_space_prefix=prefix))
    for text in (*TEXTS, "the", " the", "the the", "<s>the", "<s> the</s>x"):
        for special in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=special).ids
            assert found.encode(text, add_special_tokens=special) == ids, text
        assert found.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids, skip_special_tokens=False), text
    assert (found.encode("the")[0] == tokenizer.token_to_id("\u2581the")) == (prefix is not False)


def test_a_sentencepiece_file_without_ids_has_llama_cpp_s(tmp_path: Path) -> None:
    tokenizer, keys = sentencepiece(tmp_path / "hf")
    file = make(tmp_path, tokenizer, **{**keys, "bos_token_id": None, "eos_token_id": None, "unknown_token_id": None})
    assert read_config(GgufFile(file))["eos_token_id"] == 2
    found = convert(file)
    assert (found.eos_token_id, found.encode("a", add_special_tokens=True)[0]) == (2, 1)


def test_sentencepiece_without_bos(tmp_path: Path) -> None:
    tokenizer, keys = sentencepiece(tmp_path / "hf")
    found = convert(make(tmp_path, tokenizer, **keys, add_bos_token=False))
    assert found.encode("the", add_special_tokens=True) == found.encode("the")


# --- refusals ---


@pytest.mark.parametrize(("keys", "message"), [
    ({"pre": "novel"}, r"tokenizer\.ggml\.pre 'novel' is not known; .* Known are llama3, "),
    ({"pre": "default"}, r"tokenizer\.ggml\.pre 'default' is not known"),
    ({"pre": None}, r"tokenizer\.ggml\.pre is missing \(convert the model again"),
    ({"pre": "gpt-4o"}, r"tokenizer\.ggml\.pre 'gpt-4o' is not known"),
    ({"model": "t5"}, r"tokenizer\.ggml\.model 't5' is not supported"),
    ({"add_space_prefix": True}, r"tokenizer\.ggml\.add_space_prefix true is not supported for a byte-level"),
    ({"remove_extra_whitespaces": True}, r"tokenizer\.ggml\.remove_extra_whitespaces is not supported"),
    ({"add_sep_token": True}, r"tokenizer\.ggml\.add_sep_token is not supported"),
    ({"precompiled_charsmap": [1, 2, 3]}, r"tokenizer\.ggml\.precompiled_charsmap is not supported"),
    ({"normalizer.lowercase": True}, r"tokenizer\.ggml\.normalizer\.lowercase is not known; it may change tokens"),
    ({"bos_token_id": 100_000}, r"tokenizer\.ggml\.bos_token_id 100000 is not the id of one of"),
    ({"add_eos_token": True, "eos_token_id": None}, r"add_eos_token is true, but tokenizer\.ggml\.eos_token_id is missing"),
    ({"merges": ["h e", "zz qq"]}, r"merges 'h e' does not join|merges 'zz qq' does not join"),
    ({"token_type": [1, 1, 1]}, r"token_type must have a value for each of"),
    ({"token_type": ["normal"] * 400}, r"token_type must hold numbers"),
    ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
])
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    file = make(tmp_path, byte_level("gpt-2"), **{"pre": "gpt-2", **keys})
    with pytest.raises(InvalidRequest, match=message) as caught:
        convert_gguf(file, tmp_path / "out" / "converted")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_token_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    tokens[-1] = tokens[-2]
    with pytest.raises(InvalidRequest, match=r"tokenizer\.ggml\.tokens .* is there twice"):
        convert(make(tmp_path, tokenizer, pre="gpt-2", tokens=tokens))


def test_false_keys_that_are_not_known_change_nothing(tmp_path: Path) -> None:
    tokenizer = byte_level("gpt-2")
    keys = {"normalizer.lowercase": False, "add_sep_token": False, "remove_extra_whitespaces": False, "fim_pre_token_id": 5}
    check_equal(convert(make(tmp_path, tokenizer, pre="gpt-2", **keys)), tokenizer)
