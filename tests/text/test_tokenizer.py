"""Chat encoding with loss weights, and the incremental detokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from coserve.chat.trained import TrainedText, check_calls
from coserve.core import InvalidRequest, NotFound
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.examples import ExampleEncoder, Notes
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import CHATML, SMOL_CHATML, build_sentencepiece_tokenizer, build_tiny_tokenizer

EOT = "<|im_end|>"
STRIPPING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '' if not loop.last else '<think>\n\n</think>\n\n' }}GENERATE{{ m['content'] + '<|im_end|>' }}ENDGENERATE"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As Qwen3's: only the last turn has a thinking part, so earlier turns look different at the end and inside."""
STRIPPING_TAGGED = STRIPPING.replace("ENDGENERATE", "{% endgeneration %}").replace("GENERATE", "{% generation %}")
STRIPPING_PLAIN = STRIPPING.replace("ENDGENERATE", "").replace("GENERATE", "")

Build = Callable[[str | None], ChatTokenizer]


def turns(*contents: str) -> list[dict[str, Any]]:
    """User and assistant by turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def trained_text(tokenizer: ChatTokenizer, ids: np.ndarray, weights: np.ndarray) -> str:
    assert ids.dtype == np.int64
    assert weights.dtype == np.float32
    assert ids.shape == weights.shape
    return tokenizer.decode(ids[weights > 0].tolist(), skip_special_tokens=False)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Tokenizers by chat template."""

    def load(chat_template: str | None) -> ChatTokenizer:
        return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("bpe"), chat_template=chat_template))

    return load


@pytest.fixture(scope="module")
def tokenizer(build: Build) -> ChatTokenizer:
    return build(CHATML)


@pytest.fixture(scope="module")
def byte_level() -> ChatTokenizer:
    return ChatTokenizer(byte_tokenizer([b"\x82\xac\xe2", b"\xf0\x9f\x98"]))


# loading


def test_load_names_a_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no such model directory: .*nowhere"):
        ChatTokenizer.load(tmp_path / "nowhere")


def test_load_names_a_directory_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NotFound, match=r"no tokenizer in .*: expected tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


def test_load_refuses_a_damaged_tokenizer(tmp_path: Path) -> None:
    build_tiny_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(InvalidRequest, match="can't be read: ") as caught:
        ChatTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.param == "model"


def test_plain_encoding(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode(f"grün{EOT}")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == "grün"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"grün{EOT}"
    assert tokenizer.decode([tokenizer.vocab_size + 5, *ids]) == "grün"


def test_bos_is_added_only_when_asked(sentencepiece: ChatTokenizer) -> None:
    bos = sentencepiece.encode("<s>")[0]
    assert bos not in sentencepiece.encode("x")
    assert sentencepiece.encode("x", add_special_tokens=True)[0] == bos


# chat


def test_encode_chat_ends_with_the_generation_prompt(tokenizer: ChatTokenizer) -> None:
    ids = tokenizer.encode_chat(turns("Hi"))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.render_chat(turns("Hi"), add_generation_prompt=True) == text
    without = text.removesuffix("<|im_start|>assistant\n")
    assert tokenizer.render_chat(turns("Hi"), add_generation_prompt=False) == without


def test_names_reach_the_template(build: Build) -> None:
    named = build("{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}")
    messages = [{"role": "user", "content": "Hi", "name": "Ada"}]
    assert named.render_chat(messages, add_generation_prompt=False) == "Ada: Hi"


def test_no_chat_template(build: Build) -> None:
    plain = build(None)
    assert not plain.has_chat_template
    assert plain.chat_template is None
    with pytest.raises(InvalidRequest, match="has no chat template"):
        plain.render_chat(turns("Hi"), add_generation_prompt=True)


def test_refusal_of_the_template_is_passed_on(build: Build) -> None:
    strict = build("{{ raise_exception('roles must\nalternate') }}")
    assert strict.has_chat_template
    with pytest.raises(InvalidRequest, match=r"refuses the conversation: roles must alternate$"):
        ExampleEncoder(strict).encode_training(turns("Hi", "Hello"))


# training: conversations


def test_only_assistant_turns_are_trained(tokenizer: ChatTokenizer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *turns("Hi", "Hello there", "And?", "the 🙂 end \n")]
    ids, weights = ExampleEncoder(tokenizer).encode_training(messages)
    assert trained_text(tokenizer, ids, weights) == f"Hello there{EOT}the 🙂 end \n{EOT}"
    assert set(weights.tolist()) == {0.0, 1.0}
    assert ids.tolist() == tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=False))


def test_training_starts_where_a_request_would(tokenizer: ChatTokenizer) -> None:
    messages = turns("Hi", "Hello", "And?", "Well")
    ids, weights = ExampleEncoder(tokenizer).encode_training(messages)
    for i in (1, 3):
        prompt = tokenizer.encode_chat(messages[:i])
        assert ids[: len(prompt)].tolist() == prompt
        assert weights[len(prompt) - 1 : len(prompt) + 1].tolist() == [0.0, 1.0]


def test_a_default_system_prompt_is_not_trained(build: Build) -> None:
    smol = build(SMOL_CHATML)
    ids, weights = ExampleEncoder(smol).encode_training(turns("Hi", "Hello", "And?", "Well"))
    assert trained_text(smol, ids, weights) == f"Hello{EOT}Well{EOT}"
    assert smol.decode(ids.tolist()).startswith("system\nYou are a helpful assistant\nuser\nHi\n")


def test_a_first_assistant_turn_is_trained_without_its_header(build: Build) -> None:
    for template in (CHATML, SMOL_CHATML):
        tokenizer = build(template)
        ids, weights = ExampleEncoder(tokenizer).encode_training([{"role": "assistant", "content": "Welcome"}])
        assert trained_text(tokenizer, ids, weights) == f"Welcome{EOT}"


def test_consecutive_assistant_turns(tokenizer: ChatTokenizer) -> None:
    messages = [*turns("Hi", "One"), {"role": "assistant", "content": "Two"}]
    assert trained_text(tokenizer, *ExampleEncoder(tokenizer).encode_training(messages)) == f"One{EOT}Two{EOT}"


def test_weight_0_masks_a_turn_and_never_reaches_the_template(build: Build) -> None:
    tokenizer = build(CHATML + "{% for m in messages %}{{ m.weight }}{% endfor %}")
    messages = turns("Hi", "One", "And?", "Two")
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    ids, weights = ExampleEncoder(tokenizer).encode_training(messages)
    assert trained_text(tokenizer, ids, weights) == f"Two{EOT}"
    assert messages[1]["weight"] == 0


def test_white_space_after_the_end_of_turn_is_not_trained_but_a_plain_end_is(build: Build) -> None:
    bare = build("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                 "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
    # The newline is all there is to end a turn.
    assert trained_text(bare, *ExampleEncoder(bare).encode_training(turns("Hi", "hello"))) == "hello\n"


def test_no_token_reaches_from_a_prompt_into_its_reply(build: Build, tmp_path: Path) -> None:
    """A space and a word are one token, but a request's prompt ends with the space: the reply is what comes then."""
    spaced = CHATML.replace("assistant\n", "assistant ").replace("message['role'] + '\n'", "message['role'] + ' '")
    pieces = ChatTokenizer.load(build_sentencepiece_tokenizer(tmp_path / "spm", chat_template=spaced))
    for each, word in ((build(spaced), "hello"), (pieces, "the")):
        assert len(each.encode(f" {word}")) < len(each.encode(" ")) + len(each.encode(word))
        messages = turns("Hi", f"{word} one", "And?", f"{word} two")
        ids, weights = ExampleEncoder(each).encode_training(messages)
        prompt = each.encode_chat(messages[:1])
        assert ids[: len(prompt)].tolist() == prompt
        assert weights[: len(prompt) + 1].tolist() == [0.0] * len(prompt) + [1.0]
        assert each.decode(ids.tolist(), skip_special_tokens=False) == each.render_chat(messages, add_generation_prompt=False)
        assert "".join(trained_text(each, ids, weights).split()) == f"{word}one{EOT}{word}two{EOT}"


def test_a_token_of_white_space_alone_before_a_turn_is_not_trained(build: Build) -> None:
    # Byte-level offsets leave out leading spaces: those of a lone space are empty and lie where the turn starts.
    header = CHATML.replace("assistant\n", "assistant: ")
    spaced = build(header.replace("message['role'] + '\n'", "message['role'] + ': '"))
    ids, weights = ExampleEncoder(spaced).encode_training(turns("Hi", "<|endoftext|>"))
    assert trained_text(spaced, ids, weights) == f"<|endoftext|>{EOT}"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_any_content_is_trained_in_full(tokenizer: ChatTokenizer, replies: list[str]) -> None:
    messages = [message for reply in replies for message in turns(" ask\n", reply)]
    ids, weights = ExampleEncoder(tokenizer).encode_training(messages)
    assert trained_text(tokenizer, ids, weights) == "".join(reply + EOT for reply in replies)


def test_a_template_that_rewrites_earlier_turns_trains_the_last_one(build: Build) -> None:
    stripping, notes = build(STRIPPING_PLAIN), Notes()
    messages = turns("Hi", "One", "And?", "Two")
    ids, weights = ExampleEncoder(stripping).encode_training(messages, notes=notes)
    assert trained_text(stripping, ids, weights) == f"<think>\n\n</think>\n\nTwo{EOT}"
    assert ids.tolist() == stripping.encode(stripping.render_chat(messages, add_generation_prompt=False))
    assert notes.last_turn_only == 1


def test_a_template_that_rewrites_earlier_turns_trains_each_in_an_example(build: Build) -> None:
    stripping, notes = build(STRIPPING_PLAIN), Notes()
    messages = turns("Hi", "One", "And?", "Two")
    examples = ExampleEncoder(stripping).encode_examples(messages, notes=notes)
    for end, said, (ids, weights) in zip((1, 3), ("One", "Two"), examples, strict=True):
        assert trained_text(stripping, ids, weights) == f"<think>\n\n</think>\n\n{said}{EOT}"
        assert ids.tolist() == stripping.encode(stripping.render_chat(messages[: end + 1], add_generation_prompt=False))
    assert notes == Notes(several=1)


def test_a_rewritten_turn_before_untrained_ones_ends_the_conversation(build: Build) -> None:
    stripping, notes = build(STRIPPING_PLAIN), Notes()
    messages = [*turns("Hi", "One", "And?", "Two"), *turns("So?", "Three")]
    messages[1]["weight"] = messages[5]["weight"] = 0
    ids, weights = ExampleEncoder(stripping).encode_training(messages, notes=notes)
    assert trained_text(stripping, ids, weights) == f"<think>\n\n</think>\n\nTwo{EOT}"
    assert ids.tolist() == stripping.encode(stripping.render_chat(messages[:4], add_generation_prompt=False))
    assert notes.last_turn_only == 0


def test_a_template_whose_replies_start_otherwise_is_refused(build: Build) -> None:
    other = build(CHATML.replace("assistant\n", "assistant\nSo: "))
    assert other.encode_chat(turns("Hi"))
    messages = [{**turn, "weight": i == 3} for i, turn in enumerate(turns("Hi", "One", "And?", "Two"))]
    with pytest.raises(InvalidRequest, match=r"messages\[3\]: .* not start this turn as it starts a reply \(.*So: '\)"):
        ExampleEncoder(other).encode_training(messages)


OPENING = CHATML.replace("assistant\n", "assistant\n<think>\n")
"""The prompt opens a thought, and answers are written without one, as DeepSeek-R1's does."""
FORGETTING = OPENING.replace("message['content']", "message['content'].split('</think>')[-1].lstrip('\n')")


@pytest.mark.parametrize("answer", [
    {"content": "One", "reasoning_content": "hm"}, {"content": "<think>\nhm\n</think>\n\nOne"},
    {"content": "hm\n</think>\n\nOne"},
])
def test_a_thought_that_the_prompt_opens_is_trained(build: Build, answer: dict[str, Any]) -> None:
    forgetting, notes = build(FORGETTING), Notes()
    messages = [*turns("Hi"), {"role": "assistant", **answer}, *turns("And?", "Two")]
    first, second = ExampleEncoder(forgetting).encode_examples(messages, notes=notes)
    assert trained_text(forgetting, *first) == f"hm\n</think>\n\nOne{EOT}"
    assert trained_text(forgetting, *second) == f"\n</think>\n\nTwo{EOT}"
    for end, (ids, weights) in ((1, first), (3, second)):
        prompt = forgetting.encode_chat(messages[:end])
        assert ids[: len(prompt)].tolist() == prompt
        assert weights[: len(prompt) + 1].tolist() == [0.0] * len(prompt) + [1.0]
    assert (notes.several, notes.lost_thoughts, notes.no_thoughts) == (1, 0, 1)


@pytest.mark.parametrize("content", ["<think>\nhm\n</think>\n\nOne", "<think>hm\n</think>\n\nOne"])
def test_a_thought_that_the_prompt_opens_and_the_template_writes(build: Build, content: str) -> None:
    opening, notes = build(OPENING), Notes()
    ids, weights = ExampleEncoder(opening).encode_training(turns("Hi", content), notes=notes)
    assert trained_text(opening, ids, weights) == f"hm\n</think>\n\nOne{EOT}"
    assert notes == Notes()


def test_a_thought_that_the_template_does_not_write_is_counted(tokenizer: ChatTokenizer) -> None:
    notes = Notes()
    answer = {"role": "assistant", "content": "One", "reasoning_content": "hm"}
    ExampleEncoder(tokenizer).encode_training([*turns("Hi"), answer], notes=notes)
    assert notes == Notes(lost_thoughts=1)


def test_a_call_that_the_template_does_not_write_is_refused() -> None:
    """A template may write tools, and so is given calls as they are, but leave out the calls of some turns."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    messages = [*turns("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(InvalidRequest, match=r"messages\[1\]\.tool_calls: the model's chat template does not write calls"):
        check_calls(TrainedText("Hi: .", [(4, 5)], [1]), messages)
    check_calls(TrainedText("Hi: weather()", [(4, 13)], [1]), messages)


def test_a_template_that_rewrites_earlier_turns_works_where_only_the_last_is_trained(build: Build) -> None:
    stripping = build(STRIPPING_PLAIN)
    messages = turns("Hi", "One", "And?", "Two")
    messages[1]["weight"] = 0
    ids, weights = ExampleEncoder(stripping).encode_training(messages)
    assert trained_text(stripping, ids, weights) == f"<think>\n\n</think>\n\nTwo{EOT}"


def test_generation_tags_decide_where_prefixes_cannot(build: Build) -> None:
    tagged = build(STRIPPING_TAGGED)
    messages = turns("Hi", "One", "And?", "Two", "So?", "Three")
    ids, weights = ExampleEncoder(tagged).encode_training(messages)
    assert trained_text(tagged, ids, weights) == f"One{EOT}Two{EOT}Three{EOT}"
    assert ids.tolist() == tagged.encode(tagged.render_chat(messages, add_generation_prompt=False))
    messages[3]["weight"] = 0
    assert trained_text(tagged, *ExampleEncoder(tagged).encode_training(messages)) == f"One{EOT}Three{EOT}"


def test_generation_tags_that_miss_a_turn_do_not_decide(build: Build) -> None:
    half = build(STRIPPING_TAGGED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last"))
    examples = ExampleEncoder(half).encode_examples(turns("Hi", "One", "And?", "Two"))
    said = [trained_text(half, *example) for example in examples]
    assert said == [f"<think>\n\n</think>\n\nOne{EOT}", f"<think>\n\n</think>\n\nTwo{EOT}"]


def test_generation_tags_that_miss_a_turn_are_refused_where_prefixes_cannot_decide(build: Build) -> None:
    half = build(
        STRIPPING_TAGGED.replace("m['role'] == 'assistant'", "m['role'] == 'assistant' and loop.last")
        .replace("'<|im_start|>assistant\n'", "'<|im_start|>bot\n'")
    )
    with pytest.raises(InvalidRequest, match="marks 1 generated passages in a conversation of 2"):
        ExampleEncoder(half).encode_training(turns("Hi", "One", "And?", "Two"))


# training: plain text


def test_completion_is_trained_with_eos(tokenizer: ChatTokenizer) -> None:
    ids, weights = ExampleEncoder(tokenizer).encode_completion("the cap", "ital of")
    prompt = tokenizer.encode("the cap")
    assert ids.tolist() == [*prompt, *tokenizer.encode("ital of"), tokenizer.eos_token_id]
    assert weights.tolist() == [0.0] * len(prompt) + [1.0] * (len(ids) - len(prompt))


def test_text_is_trained_whole_with_eos(tokenizer: ChatTokenizer) -> None:
    ids, weights = ExampleEncoder(tokenizer).encode_text("the end")
    assert ids.tolist() == [*tokenizer.encode("the end"), tokenizer.eos_token_id]
    assert weights.tolist() == [1.0] * len(ids)
    assert ExampleEncoder(tokenizer).encode_text("the end" + EOT)[0].tolist() == ids.tolist()


def test_bos_comes_first_once_where_the_tokenizer_adds_one(sentencepiece: ChatTokenizer) -> None:
    bos, eos = sentencepiece.encode("<s>")[0], sentencepiece.eos_token_id
    ids, weights = ExampleEncoder(sentencepiece).encode_completion("hi", "yo")
    assert (ids[0], ids[-1], weights[0]) == (bos, eos, 0.0)
    assert ExampleEncoder(sentencepiece).encode_text("hi")[0].tolist() == [bos, *sentencepiece.encode("hi"), eos]
    assert np.count_nonzero(ExampleEncoder(sentencepiece).encode_text("<s>hi")[0] == bos) == 1


@pytest.mark.parametrize("completion", ["", "hi", " the", "\n\nthe 🙂", " "])
def test_a_completion_adds_no_space(
    tokenizer: ChatTokenizer, sentencepiece: ChatTokenizer, completion: str
) -> None:
    for each in (tokenizer, sentencepiece):
        ids, weights = ExampleEncoder(each).encode_completion("What is the", completion)
        assert each.decode(ids.tolist()) == "What is the" + completion
        assert weights[-1] == 1.0


def test_training_text_needs_an_eos() -> None:
    bare = ChatTokenizer(byte_tokenizer([]))
    with pytest.raises(InvalidRequest, match="names no EOS"):
        ExampleEncoder(bare).encode_text("hi")


# incremental detokenizer


def byte_tokenizer(extra: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: ids 0 to 255 are bytes, then `extra`, possibly cut inside a character."""
    pieces = ["".join(map(_byte_letter, piece)) for piece in (*(bytes([byte]) for byte in range(256)), *extra)]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _byte_letter(byte: int) -> str:
    """The printable letter that GPT-2 stands for a byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printable else chr(256 + [b for b in range(256) if b not in printable].index(byte))


def feed(tokenizer: ChatTokenizer, ids: Sequence[int], **options: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("🙂👍🏽 中文 \ufffd!")
@settings(deadline=None, max_examples=150)
def test_pieces_add_up_to_any_text(tokenizer: ChatTokenizer, sentencepiece: ChatTokenizer, text: str) -> None:
    for each in (tokenizer, sentencepiece):
        ids = each.encode(text)
        assert "".join(feed(each, ids)) == each.decode(ids)


@given(st.data())
@settings(deadline=None, max_examples=200)
def test_pieces_add_up_for_any_ids(tokenizer: ChatTokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=80))
    assert "".join(feed(tokenizer, ids)) == tokenizer.decode(ids)
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    assert "".join(feed(tokenizer, ids, skip_special_tokens=False)) == whole


@given(st.lists(st.one_of(st.integers(0x7E, 258), st.sampled_from([0xE2, 0xEF, 0xBF, 0xBD, 0xF0])), max_size=80))
@settings(deadline=None, max_examples=200)
def test_pieces_add_up_for_any_bytes(byte_level: ChatTokenizer, ids: list[int]) -> None:
    assert "".join(feed(byte_level, ids)) == byte_level.decode(ids)


@given(st.lists(st.integers(0, 300), max_size=60))
@example([3 + byte for byte in " 🙂".encode()])
@settings(deadline=None, max_examples=200)
def test_pieces_add_up_with_byte_fallback(sentencepiece: ChatTokenizer, ids: list[int]) -> None:
    whole, pieces = sentencepiece.decode(ids), feed(sentencepiece, ids)
    if "\ufffd" not in whole:
        assert "".join(pieces) == whole


@given(st.lists(st.sampled_from(["€", "🙂", "é", "▁", " ", "the", "<s>"]), max_size=20))
@settings(deadline=None)
def test_pieces_add_up_with_byte_fallback_for_whole_characters(sentencepiece: ChatTokenizer, parts: list[str]) -> None:
    ids = [token_id for part in parts for token_id in sentencepiece.encode(part)]
    assert "\ufffd" not in sentencepiece.decode(ids)
    assert "".join(feed(sentencepiece, ids)) == sentencepiece.decode(ids)


def test_text_comes_as_soon_as_it_is_complete() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer([" 🦄 b".encode()]))
    assert feed(tokenizer, [*"a🦄".encode(), 256]) == ["a", "", "", "", "🦄", " 🦄 b", ""]


def test_an_unfinished_character_is_only_shown_at_the_end() -> None:
    tokenizer = ChatTokenizer(byte_tokenizer([]))
    assert feed(tokenizer, list("a🦄".encode())[:-1]) == ["a", "", "", "", "\ufffd"]


def test_special_tokens_inside_a_character_do_not_break_it(tokenizer: ChatTokenizer) -> None:
    eos, unicorn = tokenizer.eos_token_id, tokenizer.encode("🦄")
    assert eos is not None
    assert len(unicorn) >= 3
    assert feed(tokenizer, [*unicorn[:2], *[eos] * 50, *unicorn[2:]])[-2:] == ["🦄", ""]


def test_tokens_that_each_end_inside_a_character(byte_level: ChatTokenizer) -> None:
    ids = [0xE2, *[256] * 200, 0x82, 0xAC]
    assert byte_level.decode(ids) == "€" * 201
    assert feed(byte_level, ids) == ["", *["€"] * 200, "", "€", ""]


class CountingTokenizer(ChatTokenizer):
    """Remembers the most ids that one call decoded."""

    longest = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        return super().decode(ids, skip_special_tokens)


@pytest.mark.parametrize("ids", [[0x80] * 500, [0xE2] * 500, [256] * 500, [0x41] * 500, [0xEF, 0xBF, 0xBD] * 200])
def test_work_per_token_is_bounded(ids: list[int]) -> None:
    tokenizer = CountingTokenizer(byte_tokenizer([b"\x82\xac\xe2"]))
    pieces = feed(tokenizer, ids)
    assert tokenizer.longest <= 30
    assert "".join(pieces) == tokenizer.decode(ids)
    assert len("".join(pieces[:-1])) >= 150


def test_another_template_for_the_same_object(build: Build) -> None:
    given, other = build(CHATML), "{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    given.use_template(other)
    assert given.render_chat(turns("Hi"), add_generation_prompt=False) == "user: Hi;"
    assert given.encode_chat(turns("Hi")) == given.with_template(other).encode_chat(turns("Hi"))
