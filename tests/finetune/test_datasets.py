"""Training files: every format, every refusal, lengths, the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coserve.config.settings import FinetuneConfig, Objective, TooLong
from coserve.core import InvalidRequest, NotFound
from coserve.finetune.datasets import Dataset, load_training
from coserve.text.examples import ExampleEncoder
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_tiny_tokenizer

EOT = "<|im_end|>"
HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}
BYE = {"role": "assistant", "content": "Go away"}
CHAT: dict[str, Any] = {"messages": [HI, HELLO]}
PAIR: dict[str, Any] = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
OPENAI_PAIR: dict[str, Any] = {
    "input": {"messages": [HI]}, "preferred_output": [HELLO], "non_preferred_output": [BYE]
}
CHATML_HI = f"<|im_start|>user\nHi{EOT}\n<|im_start|>assistant\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def write(path: Path, *lines: object) -> None:
    """Bytes and strings as they are, anything else as JSON."""
    raw = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
           for line in lines]
    path.write_bytes(b"\n".join(raw) + b"\n")


def load(
    path: Path,
    tokenizer: ChatTokenizer,
    objective: Objective = "sft",
    max_length: int = 1000,
    too_long: TooLong = "error",
) -> Dataset:
    return load_training(path, tokenizer, FinetuneConfig(objective=objective, too_long=too_long), max_length=max_length)


def refusal(path: Path, tokenizer: ChatTokenizer, *arguments: Any, **settings: Any) -> str:
    """What `load` says when it refuses these arguments."""
    with pytest.raises(InvalidRequest) as caught:
        load(path, tokenizer, *arguments, **settings)
    assert caught.value.param == "training_file"
    message = str(caught.value)
    assert "\n" not in message
    return message


def texts(dataset: Dataset, tokenizer: ChatTokenizer) -> list[list[tuple[str, str]]]:
    """For each example of each group: its text of weight 0 and its text of weight 1."""
    result = []
    for group in dataset.groups:
        parts = []
        for example in group.examples:
            assert example.token_ids.dtype == np.int64
            assert example.weights.dtype == np.float32
            masked, trained = (
                tokenizer.decode(example.token_ids[example.weights == weight].tolist(), skip_special_tokens=False)
                for weight in (0.0, 1.0)
            )
            parts.append((masked, trained))
        result.append(parts)
    return result


# formats


@pytest.mark.parametrize(
    ("line", "masked", "trained"),
    [
        (CHAT, CHATML_HI + "\n", f"Hello{EOT}"),
        ({**CHAT, "tools": [], "parallel_tool_calls": None}, CHATML_HI + "\n", f"Hello{EOT}"),
        ({"messages": [{**HI, "name": "Ada"}, {**HELLO, "weight": 1, "tool_calls": None}]}, CHATML_HI + "\n",
         f"Hello{EOT}"),
        ({"messages": [HI, {**BYE, "weight": 0}, HI, HELLO]}, f"{CHATML_HI}Go away{EOT}\n{CHATML_HI}\n", f"Hello{EOT}"),
        ({"messages": [{"role": "developer", "content": "Be."}, HI, HELLO]},
         f"<|im_start|>system\nBe.{EOT}\n{CHATML_HI}\n", f"Hello{EOT}"),
        ({"prompt": "Hi", "completion": " Hello"}, "Hi", f" Hello{EOT}"),
        ({"prompt": [HI], "completion": [HELLO]}, CHATML_HI + "\n", f"Hello{EOT}"),
        ({"prompt": [HI, BYE, HI], "completion": [HELLO]}, f"{CHATML_HI}Go away{EOT}\n{CHATML_HI}\n", f"Hello{EOT}"),
        ({"text": "Hi Hello"}, "", f"Hi Hello{EOT}"),
    ],
)
def test_sft_formats(path: Path, tokenizer: ChatTokenizer, line: dict[str, Any], masked: str, trained: str) -> None:
    write(path, line)
    assert texts(load(path, tokenizer), tokenizer) == [[(masked, trained)]]


@pytest.mark.parametrize(
    ("line", "masked", "tail"),
    [
        (PAIR, "Hi", ""),
        ({"prompt": [HI], "chosen": [HELLO], "rejected": [BYE]}, CHATML_HI, "\n"),
        (OPENAI_PAIR, CHATML_HI, "\n"),
        ({**OPENAI_PAIR, "input": {"messages": [HI, HELLO, HI], "tools": []}},
         f"{CHATML_HI}Hello{EOT}\n{CHATML_HI}", "\n"),
    ],
)
def test_dpo_formats(path: Path, tokenizer: ChatTokenizer, line: dict[str, Any], masked: str, tail: str) -> None:
    write(path, line)
    chosen, rejected = (masked + tail, f"Hello{EOT}"), (masked + tail, f"Go away{EOT}")
    assert texts(load(path, tokenizer, "dpo"), tokenizer) == [[chosen, rejected]]


def test_groups_and_examples_are_numbered_in_file_order(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, PAIR, {**PAIR, "chosen": "x " * 50}, OPENAI_PAIR, PAIR)
    dataset = load(path, tokenizer, "dpo", max_length=40, too_long="drop")
    assert [group.index for group in dataset.groups] == [0, 1, 2]
    assert [example.index for group in dataset.groups for example in group.examples] == [0, 1, 2, 3, 4, 5]
    assert dataset.report.num_dropped == 1


def test_blank_lines_byte_order_mark_and_windows_line_ends(path: Path, tokenizer: ChatTokenizer) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two\\u2028"}\r\n')
    dataset = load(path, tokenizer)
    assert texts(dataset, tokenizer) == [[("", f"one{EOT}")], [("", f"two\u2028{EOT}")]]
    assert dataset.report.num_lines == 2


# refusals: one line each


def messages(*given: object) -> dict[str, Any]:
    return {"messages": list(given)}


SFT_REFUSALS = {
    "broken JSON": ('{"text": "a"', "JSON: Expecting ',' delimiter at column 13; give one JSON object per line"),
    "nesting": ("[" * 100_000, "JSON: maximum recursion depth exceeded"),
    "not UTF-8": (b'{"text": "gr\xfcn"}', "encoding: not UTF-8 (byte 12 of the line); save the file as UTF-8"),
    "not an object": ("[1]", "line: a JSON object is expected, got a list"),
    "no known format": ({"question": "x", "answer": "y"},
                        'keys: "question", "answer": no known format; for objective sft give {messages} or '
                        "{conversations} or {prompt, completion} or {instruction, output} or {text}"),
    "no keys": ({}, "keys: none: no known format"),
    "half a format": ({"prompt": "x"}, 'keys: "prompt": no known format'),
    "wrong objective": (PAIR, "prompt, chosen, rejected: this is a line for objective dpo, but the objective is sft; "
                        "give {messages} or {conversations} or {prompt, completion} or {instruction, output} or {text}, "
                        "or set the objective to dpo"),
    "two layouts": ({**CHAT, "prompt": "x", "completion": "y"},
                    "prompt, completion: the line has messages too; leave out what is not to be trained"),
    "only good or bad": ({"prompt": "x", "completion": "y", "label": False},
                         "label: completions that are only called good or bad are not supported"),
    "key twice": ('{"messages": [{"role": "user", "role": "assistant", "content": "x"}]}',
                  '"role": the key is in one object twice; keep one of them'),
    "tools": ({**CHAT, "tools": [{}]}, 'tools[0].type: must be "function", got'),
    "parallel tools": ({**CHAT, "parallel_tool_calls": 0}, "parallel_tool_calls: true or false is expected, got 0"),
    "messages no list": ({"messages": "Hi"}, "messages: a list of messages is expected, got a string"),
    "messages null": ({"messages": None}, "messages: a list of messages is expected, got nothing"),
    "messages empty": (messages(), "messages: the list is empty; give at least one message"),
    "message no object": (messages("Hi"), "messages[0]: an object with role and content is expected, got a string"),
    "no assistant": (messages(HI), "messages: no assistant message; add one"),
    "last not assistant": (messages(HI, HELLO, HI), "messages[2].role: the last message must be the assistant's, this "
                           "one is of role user; remove it or add a reply"),
    "unknown role": (messages({**HI, "role": "human"}, HELLO),
                     'messages[0].role: "human" is unknown; use system, user, assistant or tool'),
    "role no string": (messages({**HI, "role": ["user"]}, HELLO), 'messages[0].role: ["user"] is unknown'),
    "role missing": (messages({"content": "Hi"}, HELLO), "messages[0].role: is missing; use system, user, assistant or tool"),
    "tool role last": (messages(HI, HELLO, {"role": "tool", "content": "3"}),
                       "messages[2].role: the last message must be the assistant's, this one is of role tool"),
    "tool content": (messages({"role": "function", "content": {}}, HELLO), "messages[0].content: a string is expected, got a"),
    "message key": (messages({**HI, "mood": "good"}, HELLO),
                    'messages[0]."mood": unknown key; remove it (known: role, content, name, weight, tool_calls'),
    "tool calls": (messages(HI, {**HELLO, "tool_calls": [{}]}), "messages[1].tool_calls[0].function: is missing"),
    "content missing": (messages(HI, {"role": "assistant"}), "messages[1].content: a string is expected, got nothing"),
    "content parts": (messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, HELLO),
                      "messages[0].content[0]: a part of type 'image_url' is not supported yet; the model reads text"),
    "content part's key": (messages({"role": "user", "content": [{"type": "text", "text": "Hi", "mood": 1}]}, HELLO),
                           "messages[0].content[0].mood: there is no such field; remove it"),
    "content part's key of half a character": (
        messages({"role": "user", "content": [{"type": "text", "text": "Hi", "\ud800": 1}]}, HELLO),
        "messages[0].content[0].'\\ud800': there is no such field"),
    "no content parts": (messages({"role": "user", "content": []}, HELLO),
                         "messages[0].content: a string is expected, got a list"),
    "surrogate": ('{"text": "\\ud83d!"}',
                  "text: holds half of a surrogate pair (\\ud800-\\udfff); write whole characters"),
    "name": (messages({**HI, "name": 7}, HELLO), "messages[0].name: a string is expected, got a number"),
    "weight value": (messages(HI, {**HELLO, "weight": 0.5}), "messages[1].weight: 0 or 1 is expected, got 0.5"),
    "weight type": (messages(HI, {**HELLO, "weight": True}), "messages[1].weight: 0 or 1 is expected, got true"),
    "weight of user": (messages({**HI, "weight": 1}, HELLO),
                       "messages[0].weight: only assistant messages have a weight, not user messages; remove it"),
    "nothing trained": (messages(HI, {**HELLO, "weight": 0}), "messages: no trained token; give an assistant message"),
    "empty text": ({"text": ""}, "text: no trained token"),
    "text no string": ({"text": 3.5}, "text: a string is expected, got a number"),
    "prompt no string": ({"prompt": {}, "completion": "x"}, "prompt: a string is expected, got an object"),
    "mixed kinds": ({"prompt": [HI], "completion": "x"},
                    "completion: a string, but prompt is a list; give both as strings or both as lists of messages"),
    "completion of user": ({"prompt": [HI], "completion": [HI]}, "completion: no assistant message"),
    "completion ends": ({"prompt": [HI], "completion": [HELLO, HI]}, "completion[1].role: the last message must be"),
    "completion masked": ({"prompt": [HI], "completion": [{**HELLO, "weight": 0}]}, "completion: no trained token"),
    "prompt ends": ({"prompt": [HI, HELLO], "completion": [HELLO]},
                    "prompt: the last message is the assistant's; end the prompt with another role"),
    "prompt weight": ({"prompt": [HI, {**HELLO, "weight": 1}, HI], "completion": [HELLO]},
                      "prompt[1].weight: nothing of a prompt is trained; remove it"),
}
DPO_REFUSALS = {
    "messages": (CHAT, "messages: this is a line for objective sft, but the objective is dpo; give {input, "
                 "preferred_output, non_preferred_output} or {prompt, chosen, rejected} or {conversations, chosen, "
                 "rejected} or {instruction, chosen, rejected} or {chosen, rejected}, or set the objective to sft"),
    "no prompt": ({"chosen": [HELLO], "rejected": [BYE]},
                  "chosen, rejected: they have no first message in common; begin both with the prompt, or give a prompt"),
    "one answer": ({"prompt": "x", "chosen": "a"}, "no known format; for objective dpo give {input, preferred_output"),
    "mixed kinds": ({**PAIR, "rejected": [BYE]}, "rejected: a list, but prompt is a string"),
    "rejected type": ({**PAIR, "rejected": None}, "rejected: a string is expected, got nothing"),
    "rejected role": ({"prompt": [HI], "chosen": [HELLO], "rejected": [HI]}, "rejected: no assistant message"),
    "input": ({**OPENAI_PAIR, "input": [HI]}, 'input: an object with a list "messages" is expected'),
    "input key": ({**OPENAI_PAIR, "input": {"messages": [HI], "user": 1}}, 'input."user": unknown key; remove it'),
    "input tools": ({**OPENAI_PAIR, "input": {"messages": [HI], "tools": [1]}},
                    "input.tools[0]: must be an object, got 1"),
    "input messages": ({**OPENAI_PAIR, "input": {"messages": "Hi"}},
                       "input.messages: a list of messages is expected, got a string"),
    "input role": ({**OPENAI_PAIR, "input": {"messages": [{**HI, "role": "x"}]}},
                   'input.messages[0].role: "x" is unknown'),
    "output": ({**OPENAI_PAIR, "preferred_output": "Hello"},
               "preferred_output: a list of messages is expected, got a string"),
    "output empty": ({**OPENAI_PAIR, "non_preferred_output": []}, "non_preferred_output: the list is empty"),
}


@pytest.mark.parametrize(
    ("objective", "line", "expected"),
    [pytest.param("sft", *case, id=f"sft, {name}") for name, case in SFT_REFUSALS.items()]
    + [pytest.param("dpo", *case, id=f"dpo, {name}") for name, case in DPO_REFUSALS.items()],
)
def test_refusals(path: Path, tokenizer: ChatTokenizer, objective: Objective, line: object, expected: str) -> None:
    write(path, {"sft": CHAT, "dpo": PAIR}[objective], "", line)
    message = refusal(path, tokenizer, objective)
    assert message.startswith("train.jsonl, line 3: ")
    assert expected in message


def test_names_reach_the_template(tmp_path: Path, path: Path) -> None:
    template = "{% for m in messages %}{{ m.name + ':' + m.content + '<|im_end|>' }}{% endfor %}" \
        "{% if add_generation_prompt %}Bo:{% endif %}"
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path / "named", chat_template=template))
    write(path, messages({**HI, "name": "Ada"}, {**HELLO, "name": "Bo"}))
    assert texts(load(path, tokenizer), tokenizer) == [[(f"Ada:Hi{EOT}Bo:", f"Hello{EOT}")]]


def test_a_long_value_is_cut_in_the_message(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, {"x" * 10_000: 1})
    assert len(refusal(path, tokenizer)) < 300


def test_refusals_of_the_chat_template_name_the_line(tmp_path: Path, path: Path) -> None:
    strict = build_tiny_tokenizer(tmp_path / "strict", chat_template="{{ raise_exception('no\nsystem') }}")
    bare = build_tiny_tokenizer(tmp_path / "bare", chat_template=None)
    write(path, {"text": "x"}, CHAT)
    assert "line 2: the model's chat template refuses the conversation: no system" in refusal(
        path, ChatTokenizer.load(strict)
    )
    assert "line 2: the model's tokenizer has no chat template" in refusal(path, ChatTokenizer.load(bare))


# whole files


@pytest.mark.parametrize("content", [b"", b"\n \r\n\n", b"\xef\xbb\xbf"])
def test_an_empty_file(path: Path, tokenizer: ChatTokenizer, content: bytes) -> None:
    path.write_bytes(content)
    assert refusal(path, tokenizer) == "train.jsonl: the file is empty; give one JSON object per line"


def test_a_missing_file(path: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(NotFound, match=r"no such file: .*train\.jsonl") as caught:
        load(path, tokenizer)
    assert caught.value.param == "training_file"


def test_a_validation_file_is_named_so(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, "[]")
    with pytest.raises(InvalidRequest) as caught:
        load_training(path, tokenizer, FinetuneConfig(), max_length=9, param="validation_file")
    assert caught.value.param == "validation_file"


# lengths


def completion(tokenizer: ChatTokenizer, num_prompt: int, num_completion: int) -> dict[str, str]:
    """An example of num_prompt + num_completion + 1 tokens."""
    digits = {"prompt": "1" * num_prompt, "completion": "2" * num_completion}
    assert len(ExampleEncoder(tokenizer).encode_completion(**digits)[0]) == num_prompt + num_completion + 1
    return digits


def test_an_example_of_max_length_fits(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, completion(tokenizer, 4, 5))
    for too_long in ("error", "drop", "truncate"):
        report = load(path, tokenizer, max_length=10, too_long=too_long).report
        assert (report.num_dropped, report.num_truncated, report.longest) == (0, 0, 10)


def test_too_long_is_an_error(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, completion(tokenizer, 4, 6))
    assert refusal(path, tokenizer, max_length=10) == (
        "train.jsonl, line 1: completion: 11 tokens, more than max_length 10; shorten the example, raise max_length, "
        "or set too_long to drop or truncate"
    )
    write(path, {"prompt": "1", "chosen": "2", "rejected": "3" * 20})
    assert "line 1: rejected: 22 tokens, more than max_length 10" in refusal(path, tokenizer, "dpo", max_length=10)


def test_too_long_is_dropped(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, completion(tokenizer, 4, 6), completion(tokenizer, 1, 2))
    dataset = load(path, tokenizer, max_length=10, too_long="drop")
    assert texts(dataset, tokenizer) == [[("1", f"22{EOT}")]]
    assert (dataset.report.num_lines, dataset.report.num_dropped, dataset.report.num_truncated) == (2, 1, 0)


def test_too_long_is_cut_at_the_end(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, completion(tokenizer, 4, 6), completion(tokenizer, 10, 2), completion(tokenizer, 9, 3))
    dataset = load(path, tokenizer, max_length=10, too_long="truncate")
    assert texts(dataset, tokenizer) == [[("1111", "222222")], [("1" * 9, "2")]]
    assert (dataset.report.num_lines, dataset.report.num_dropped, dataset.report.num_truncated) == (3, 1, 2)


def test_a_pair_is_dropped_or_cut_together(path: Path, tokenizer: ChatTokenizer) -> None:
    short = {"prompt": "1", "chosen": "2", "rejected": "3"}
    write(path, {**short, "rejected": "3" * 20}, short)
    assert load(path, tokenizer, "dpo", max_length=10, too_long="drop").report.num_dropped == 1
    cut = load(path, tokenizer, "dpo", max_length=10, too_long="truncate")
    assert [[example.num_tokens for example in group.examples] for group in cut.groups] == [[3, 10], [3, 3]]
    assert cut.report.num_truncated == 1


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_no_usable_example(path: Path, tokenizer: ChatTokenizer, too_long: TooLong) -> None:
    write(path, completion(tokenizer, 20, 2), completion(tokenizer, 30, 2))
    assert refusal(path, tokenizer, max_length=10, too_long=too_long) == (
        "train.jsonl: no usable example, all 2 are longer than max_length 10 tokens; raise it"
    )


def test_examples_of_megabytes_are_refused_before_they_are_tokenized(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, CHAT, {"text": "x" * (5 << 20)})
    assert "train.jsonl, line 2: line: 5242892 bytes, more than 4194304" in refusal(path, tokenizer)
    write(path, {"messages": [HI, HELLO] * 20_000})
    assert "line 1: messages: 40000 messages, more than 2048" in refusal(path, tokenizer)


# report


def test_report_counts(path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, completion(tokenizer, 4, 5), {"text": "111"}, "")
    report = load(path, tokenizer).report
    # The text's first token is predicted from nothing: 3 of its 4 count.
    assert (report.num_lines, report.num_tokens, report.num_label_tokens, report.longest) == (2, 14, 6 + 3, 10)


def test_digest_changes_with_file_and_settings(path: Path, tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    write(path, CHAT)
    base = load(path, tokenizer).report.digest
    assert len(base) == 64
    assert load(path, tokenizer).report.digest == base
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}" \
        "{% if add_generation_prompt %}assistant:{% endif %}"
    other = ChatTokenizer.load(build_tiny_tokenizer(tmp_path / "other", chat_template=template))
    different = {
        load(path, tokenizer, max_length=999).report.digest,
        load(path, tokenizer, too_long="drop").report.digest,
        load(path, other).report.digest,
    }
    write(path, CHAT, "")
    different.add(load(path, tokenizer).report.digest)
    assert len(different | {base}) == 5
