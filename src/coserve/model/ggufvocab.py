"""The tokenizer that the metadata of a GGUF file describes, as a Hugging Face one.

Owns: the two kinds of vocabulary that decoders of these families use (byte-level BPE and SentencePiece's BPE), how each named
pre-tokenizer splits text, and what every tokenizer key means. Does not own: the file (gguf.py). A key or a pre-tokenizer that
is not known is refused, never guessed: other tokens than the model was trained on look like a bad model.
Source of meaning: llama.cpp's llama-vocab.cpp, and the tokenizer.json files that its converter reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from coserve.core import InvalidRequest, one_line
from coserve.text.tokenizer import EXACT_KEY

PREFIX = "tokenizer.ggml."
_KNOWN = frozenset({
    "model", "pre", "tokens", "token_type", "token_type_count", "scores", "merges", "add_bos_token", "add_eos_token",
    "add_space_prefix", "add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap",
})
"""Keys below PREFIX that are read or refused by value; ids of special tokens beside them."""
_REFUSED = ("add_sep_token", "remove_extra_whitespaces", "precompiled_charsmap")
"""Keys that change ids in ways that the tokenizers of these families don't have."""

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
"""llama.cpp's types of tokens that matter here."""

_SPACE = "\u2581"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreTokenizer:
    """How a byte-level vocabulary splits text before merges."""

    split: str | None = None
    """A regular expression of pieces; None: GPT-2's."""
    single_digits: bool = False
    """Each digit is a piece, whatever surrounds it."""
    whole_words: bool = False
    """A piece that is a token is that token, whatever merges would make of it (`ignore_merges`)."""
    add_bos: bool = False
    """Where the file doesn't say."""
    compose: bool = False
    """Unicode normalization form C first."""


_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_LLAMA3 = PreTokenizer(split=_WORDS + r"\p{N}{1,3}" + _REST, whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer(split=_WORDS + r"\p{N}" + _REST, compose=True)
_TEKKEN = PreTokenizer(
    split=rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True, add_bos=True,
)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    "smaug-bpe": PreTokenizer(split=_LLAMA3.split),
    "tekken": _TEKKEN,
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("gpt-2", "mellum", "trillion"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), _DIGITS),
}
"""By `tokenizer.ggml.pre`."""


class GGUFVocabulary:
    """A GGUF file's tokens with their types, and what else it says about its tokenizer."""

    def __init__(self, get: Callable[[str], Any], keys: Sequence[str], source: Path) -> None:
        """get: gives the value of a metadata key, None where the file hasn't got it. keys: all of the file's. source: for
        messages. Raises InvalidRequest naming the key that can't be understood."""
        self.get = lambda name: get(PREFIX + name)
        self.source = source
        self._check_keys(keys)
        self.model = self.get("model")
        if self.model not in ("gpt2", "llama"):
            raise self._error("model", f"{self.model!r} is not supported; known are gpt2 (byte-level BPE) and llama "
                              "(SentencePiece)")
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or not tokens:
            raise self._error("tokens", "must be a list of texts")
        self.tokens: list[str] = tokens
        self.ids = {token: index for index, token in enumerate(tokens)}
        if len(self.ids) != len(tokens):
            twice = next(token for index, token in enumerate(tokens) if self.ids[token] != index)
            raise self._error("tokens", f"{twice!r} is there twice")
        self.types = self._list("token_type", int) or [1] * len(tokens)
        self.pre = self._pre_tokenizer()

    def special_ids(self) -> dict[str, int]:
        """Ids by name: bos, eos, unknown, padding, eot, eom; those that the file states, else llama.cpp's defaults."""
        default = {"bos": 1, "eos": 2, "unknown": 0} if self.model == "llama" else {}
        found = {}
        for name in ("bos", "eos", "unknown", "padding", "eot", "eom"):
            stated = self.get(f"{name}_token_id")
            value = default.get(name) if stated is None else stated
            if value is None:
                continue
            if not isinstance(value, int) or not 0 <= value < len(self.tokens):
                if stated is None:
                    continue
                raise self._error(f"{name}_token_id", f"{value!r} is not the id of one of {len(self.tokens)} tokens")
            found[name] = value
        return found

    def build(self) -> PreTrainedTokenizerFast:
        """The tokenizer, without chat template."""
        ids = self.special_ids()
        tokenizer = self._sentencepiece() if self.model == "llama" else self._byte_level()
        kinds = dict(zip(self.tokens, self.types, strict=True))
        named = {self.tokens[index] for index in ids.values()}
        added = [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in kinds.items() if token and (kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in named)
        ]
        tokenizer.add_tokens(added)
        self._add_ends(tokenizer, ids)
        words = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        texts: dict[str, Any] = {words[name]: self.tokens[index] for name, index in ids.items() if name in words}
        # Without these two, transformers makes up <s> and </s>.
        texts = {"bos_token": None, "eos_token": None, **texts}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **texts)
        if len(fast) != len(self.tokens):
            raise self._error("tokens", f"they make a vocabulary of {len(fast)} tokens instead of {len(self.tokens)}")
        return fast

    def _check_keys(self, keys: Sequence[str]) -> None:
        for key in keys:
            name = key.removeprefix(PREFIX)
            if name == key or name in _KNOWN or name.endswith("token_id"):
                continue
            if self.get(name) not in (None, False, 0, "", []):
                raise self._error(name, "is not known; it may change tokens")
        for name in _REFUSED:
            if self.get(name):
                raise self._error(name, "is not supported")

    def _pre_tokenizer(self) -> PreTokenizer:
        if self.model == "llama":
            return PreTokenizer(add_bos=True)
        kind = self.get("pre")
        if kind not in PRE_TOKENIZERS:
            wrong = f"{kind!r} is not known" if kind else "is missing (convert the model again with a newer llama.cpp)"
            raise self._error("pre", f"{wrong}; without it text would be split into other tokens than the model was trained "
                              f"on. Known are {', '.join(PRE_TOKENIZERS)}")
        if self.get("add_space_prefix"):
            raise self._error("add_space_prefix", "true is not supported for a byte-level vocabulary")
        return PRE_TOKENIZERS[kind]

    def _byte_level(self) -> Tokenizer:
        merges = self.get("merges")
        if not isinstance(merges, list):
            raise self._error("merges", "is missing")
        pairs = [self._pair(merge) for merge in merges]
        tokenizer = Tokenizer(models.BPE(vocab=self.ids, merges=pairs, ignore_merges=self.pre.whole_words))
        if self.pre.compose:
            tokenizer.normalizer = normalizers.NFC()
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.pre.single_digits else []
        if self.pre.split is not None:
            steps.append(pre_tokenizers.Split(Regex(self.pre.split), behavior="isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.pre.split is None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        return tokenizer

    def _sentencepiece(self) -> Tokenizer:
        """A piece with a higher score is merged first. A text, and what follows a special token, begins with a space that is
        not written, unless add_space_prefix is false."""
        scores = self._list("scores", float)
        if not scores:
            raise self._error("scores", "is missing")
        # Only a piece may come out of a merge: never a control token or a byte that is written out.
        whole = {token for token, kind in zip(self.tokens, self.types, strict=True) if kind in (UNKNOWN, CONTROL, BYTE)}
        merges = generate_merges(self.ids, dict(zip(self.tokens, scores, strict=True)), skip_tokens=whole)
        unknown = self.special_ids().get("unknown")
        tokenizer = Tokenizer(models.BPE(
            vocab=self.ids, merges=merges, unk_token=None if unknown is None else self.tokens[unknown], fuse_unk=True,
            byte_fallback=BYTE in self.types,
        ))
        prefix = self.get("add_space_prefix")
        prefix = True if prefix is None else bool(prefix)
        spaces: list[Any] = [normalizers.Replace(" ", _SPACE)]
        back: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), *spaces] if prefix else spaces)
        tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefix else back)
        return tokenizer

    def _add_ends(self, tokenizer: Tokenizer, ids: Mapping[str, int]) -> None:
        """BOS and EOS around a text, where the file, or llama.cpp for this kind of vocabulary, asks for them."""
        pieces: list[str] = ["$A"]
        used = []
        for name, default in (("bos", self.pre.add_bos), ("eos", False)):
            stated = self.get(f"add_{name}_token")
            if not (default if stated is None else stated):
                continue
            if name not in ids:
                if stated is None:
                    continue
                raise self._error(f"add_{name}_token", f"is true, but {PREFIX}{name}_token_id is missing")
            token = self.tokens[ids[name]]
            used.append((token, ids[name]))
            pieces = [token, *pieces] if name == "bos" else [*pieces, token]
        if used:
            tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=used)

    def _pair(self, merge: object) -> tuple[str, str]:
        left, _, right = str(merge)[1:].partition(" ")
        pair = (str(merge)[:1] + left, right)
        if not right or any(part not in self.ids for part in (*pair, "".join(pair))):
            raise self._error("merges", f"{merge!r} does not join two tokens into a third")
        return pair

    def _list(self, name: str, kind: type) -> list[Any] | None:
        values = self.get(name)
        if values is None:
            return None
        if not isinstance(values, list) or len(values) < len(self.tokens):
            raise self._error(name, f"must have a value for each of {len(self.tokens)} tokens")
        try:
            return [kind(value) for value in values[:len(self.tokens)]]
        except (TypeError, ValueError) as error:
            raise self._error(name, "must hold numbers") from error

    def _error(self, name: str, what: str) -> InvalidRequest:
        return InvalidRequest(f"{self.source}: {PREFIX}{name} {what}")


def write_tokenizer(vocabulary: GGUFVocabulary, chat_template: object, directory: Path) -> None:
    """Writes the tokenizer files into a model's directory. Raises InvalidRequest for a vocabulary that can't be built."""
    try:
        built = vocabulary.build()
        if isinstance(chat_template, str) and chat_template:
            built.chat_template = chat_template
        built.save_pretrained(directory)
    except InvalidRequest:
        raise
    except Exception as error:  # transformers and tokenizers raise many unrelated types here
        raise InvalidRequest(f"{vocabulary.source}: its tokenizer cannot be built: {one_line(error)}") from error
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, EXACT_KEY: True}, indent=1, ensure_ascii=False), encoding="utf-8")
