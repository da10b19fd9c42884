"""Tools, calls and results in training data: every way to write them gives the same examples, and mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve.chat.template import ChatExtras
from coserve.config.settings import FinetuneConfig, Objective
from coserve.core import InvalidRequest
from coserve.finetune.datasets import Dataset, load_training
from coserve.server.inference.prompts import template_messages
from coserve.server.inference.protocol import ChatMessage
from coserve.text.examples import ExampleEncoder
from coserve.text.tokenizer import ChatTokenizer
from tests.agent_templates import QWEN3
from tests.tiny_tokenizer import CHATML, build_tiny_tokenizer
from tests.tool_templates import HERMES, MISTRAL

Record = dict[str, Any]
EOT = "<|im_end|>"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "description": "Tells the weather.", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": FUNCTION}]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ASKED, SAID = {"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": "It rains."}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "rain"}
MESSAGES = [ASKED, CALLED, RESULT, SAID]
WRITTEN_CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
TRAINED_CALL = f"<tool_call>\n{WRITTEN_CALL}\n</tool_call>"


@pytest.fixture(scope="module", params=[HERMES, QWEN3, CHATML, MISTRAL], ids=["hermes", "qwen3", "no tools", "mistral"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("bpe"), chat_template=request.param))


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("bpe"), chat_template=HERMES))


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Dataset]:
    def read(tokenizer: ChatTokenizer, *records: Record, objective: Objective = "sft", **config: Any) -> Dataset:
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
        return load_training(path, tokenizer, FinetuneConfig(objective=objective, **config), max_length=2000)

    return read


def content(dataset: Dataset) -> list[list[tuple[list[int], list[float]]]]:
    return [[(example.token_ids.tolist(), example.weights.tolist()) for example in group.examples] for group in dataset.groups]


def trained(dataset: Dataset, tokenizer: ChatTokenizer) -> list[str]:
    examples = [example for group in dataset.groups for example in group.examples]
    return [tokenizer.decode(e.token_ids[e.weights > 0].tolist(), skip_special_tokens=False) for e in examples]


WAYS: dict[str, Record] = {
    "tools as text": {"messages": MESSAGES, "tools": json.dumps(TOOLS)},
    "bare functions": {"messages": MESSAGES, "tools": [FUNCTION]},
    "old": {"functions": [FUNCTION], "messages": [
        ASKED, {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "weather", "content": "rain"}, SAID]},
    "no ids": {"tools": TOOLS, "messages": [
        ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
        {"role": "tool", "name": "weather", "content": "rain"}, SAID]},
    "other fields": {"tools": TOOLS, "parallel_tool_calls": False, "tool_choice": "auto", "functions": None, "messages": [
        {**ASKED, "tool_calls": None}, {**CALLED, "function_call": None, "refusal": None},
        {**RESULT, "content": [{"type": "text", "text": "rain"}]}, {**SAID, "tool_calls": []}]},
    "sharegpt": {"tools": json.dumps([FUNCTION]), "conversations": [
        {"from": "human", "value": "Oslo?"}, {"from": "function_call", "value": WRITTEN_CALL},
        {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "It rains."}]},
    "sharegpt, a list": {"tools": TOOLS, "conversations": [
        {"from": "human", "value": "Oslo?"}, {"from": "function_call", "value": f"[{WRITTEN_CALL}]"},
        {"from": "tool", "value": "rain"}, {"from": "gpt", "value": "It rains."}]},
    "trl": {"tools": TOOLS, "prompt": [{**ASKED}], "completion": MESSAGES[1:]},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(load: Callable[..., Dataset], tokenizer: ChatTokenizer, way: str) -> None:
    expected = load(tokenizer, {"messages": MESSAGES, "tools": TOOLS})
    assert expected.report.warnings == () or expected.report.warnings[0].startswith("1 of 1 conversations became several")
    assert content(load(tokenizer, WAYS[way])) == content(expected)


def test_a_call_and_an_answer_are_trained_and_nothing_else(load: Callable[..., Dataset], hermes: ChatTokenizer) -> None:
    dataset = load(hermes, {"messages": MESSAGES, "tools": TOOLS})
    assert trained(dataset, hermes) == [f"{TRAINED_CALL}{EOT}It rains.{EOT}"]
    masked = {"messages": [ASKED, {**CALLED, "weight": 0}, RESULT, SAID], "tools": TOOLS}
    assert trained(load(hermes, masked), hermes) == [f"It rains.{EOT}"]


def test_data_are_rendered_as_requests_are(load: Callable[..., Dataset], tokenizer: ChatTokenizer) -> None:
    """Each prompt's tokens are those of a request with the same messages and tools."""
    turns = template_messages([ChatMessage(**message) for message in MESSAGES])
    extras = ChatExtras(tools=TOOLS)
    dataset = load(tokenizer, {"messages": MESSAGES, "tools": TOOLS})
    ids = [group.examples[0].token_ids.tolist() for group in dataset.groups]
    for end in (1, 3):
        prompt = tokenizer.encode_chat(turns[:end], extras=extras)
        assert any(found[: len(prompt)] == prompt for found in ids)
    assert ids[-1] == ExampleEncoder(tokenizer).encode_training(turns, extras=extras)[0].tolist()


PAIRS: dict[str, Record] = {
    "openai": {"input": {"messages": [ASKED], "tools": TOOLS, "parallel_tool_calls": True}, "preferred_output": MESSAGES[1:],
               "non_preferred_output": [SAID]},
    "prompt": {"prompt": [ASKED], "chosen": MESSAGES[1:], "rejected": [SAID], "tools": TOOLS},
    "implicit": {"chosen": MESSAGES, "rejected": [ASKED, SAID], "tools": json.dumps(TOOLS)},
    "sharegpt": {"conversations": [{"from": "human", "value": "Oslo?"}], "tools": [FUNCTION], "chosen": MESSAGES[1:],
                 "rejected": {"from": "gpt", "value": "It rains."}},
}


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_with_tools(load: Callable[..., Dataset], hermes: ChatTokenizer, layout: str) -> None:
    dataset = load(hermes, PAIRS[layout], objective="dpo")
    assert trained(dataset, hermes) == [f"{TRAINED_CALL}{EOT}It rains.{EOT}", f"It rains.{EOT}"]
    assert all("Tells the weather." in hermes.decode(example.token_ids.tolist()) for example in dataset.groups[0].examples)


def test_a_call_that_one_of_a_pair_makes_behind_a_shared_one(load: Callable[..., Dataset], hermes: ChatTokenizer) -> None:
    other = {**SAID, "content": "No idea."}
    pair = {"chosen": MESSAGES, "rejected": [*MESSAGES[:3], other], "tools": TOOLS}
    assert trained(load(hermes, pair, objective="dpo"), hermes) == [f"It rains.{EOT}", f"No idea.{EOT}"]


def test_alpaca_with_tools(load: Callable[..., Dataset], hermes: ChatTokenizer) -> None:
    line = {"instruction": "Oslo?", "output": "It rains.", "tools": json.dumps([FUNCTION])}
    plain = {"messages": [ASKED, SAID], "tools": TOOLS}
    assert content(load(hermes, line)) == content(load(hermes, plain))


def test_parallel_calls_and_results_by_id(load: Callable[..., Dataset], hermes: ChatTokenizer) -> None:
    """Results without an id answer the open calls in their order, or by the function's name."""
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("weather", "tides")]
    rows = [{"role": "tool", "name": name, "content": name} for name in ("tides", "weather")]
    mistral = HERMES.replace("m.content + '\n</tool_response>'", "m.tool_call_id + ' ' + m.content + '\n</tool_response>'")
    assert mistral != HERMES
    hermes = ChatTokenizer(hermes._hf.from_pretrained(hermes._hf.name_or_path))
    hermes._hf.chat_template = mistral
    dataset = load(hermes, {"messages": [ASKED, {"role": "assistant", "tool_calls": calls}, *rows, SAID], "tools": TOOLS})
    text = hermes.decode(dataset.groups[0].examples[0].token_ids.tolist())
    assert "call00002 tides" in text
    assert "call00001 weather" in text
    (warning,) = dataset.report.warnings
    assert warning == "1 of 1 lines have calls of tools that aren't among their tools"


def test_thoughts_before_a_sharegpt_call(load: Callable[..., Dataset], tmp_path: Path) -> None:
    qwen = ChatTokenizer.load(build_tiny_tokenizer(tmp_path / "qwen", chat_template=QWEN3))
    value = f"<think>\nhm\n</think>\n\n{WRITTEN_CALL}"
    conversation = [{"from": "human", "value": "Oslo?"}, {"from": "function_call", "value": value}]
    dataset = load(qwen, {"conversations": conversation, "tools": TOOLS})
    assert trained(dataset, qwen) == [f"<think>\nhm\n</think>\n\n{TRAINED_CALL}{EOT}"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thoughts_in_a_field(load: Callable[..., Dataset], tmp_path: Path, key: str) -> None:
    qwen = ChatTokenizer.load(build_tiny_tokenizer(tmp_path / "qwen", chat_template=QWEN3))
    dataset = load(qwen, {"messages": [ASKED, {**SAID, key: "hm"}]})
    assert trained(dataset, qwen) == [f"<think>\nhm\n</think>\n\nIt rains.{EOT}"]
    off = load(qwen, {"messages": [ASKED, SAID], "chat_template_kwargs": {"enable_thinking": False}})
    assert trained(off, qwen) == [f"It rains.{EOT}"]


def test_thoughts_that_the_template_leaves_out_are_told(load: Callable[..., Dataset], hermes: ChatTokenizer) -> None:
    (warning,) = load(hermes, {"messages": [ASKED, {**SAID, "reasoning_content": "hm"}]}).report.warnings
    assert warning.startswith("1 of 1 conversations have reasoning_content that isn't trained")


def messages(*turns: Record) -> Record:
    return {"messages": [*turns], "tools": TOOLS}


def calling(**function: Any) -> Record:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "weather", **function}}]}


REFUSALS: dict[str, tuple[Record, str]] = {
    "arguments": (messages(ASKED, calling(arguments="{city: Oslo}")),
                  'messages[1].tool_calls[0].function.arguments: must be a JSON object, or its text, got'),
    "arguments as a list": (messages(ASKED, calling(arguments=[1])), "messages[1].tool_calls[0].function.arguments: must be a"),
    "arguments' characters": (messages(ASKED, calling(arguments={"a": "\ud800"})), "messages[1].tool_calls: holds half of a"),
    "name": (messages(ASKED, calling(name="a b")), "messages[1].tool_calls[0].function.name: must be a name"),
    "both forms": (messages(ASKED, {**CALLED, "function_call": CALL["function"]}),
                   "messages[1].function_call: the message has tool_calls too"),
    "old call": (messages(ASKED, {"role": "assistant", "function_call": {"name": "a b"}}),
                 "messages[1].function_call.name: must be a name"),
    "calls of a user": (messages({**ASKED, "tool_calls": [CALL]}, SAID), "messages[0].tool_calls: user messages have none"),
    "id of a user": (messages({**ASKED, "tool_call_id": "x"}, SAID), "messages[0].tool_call_id: user messages have none"),
    "thoughts of a user": (messages({**ASKED, "reasoning_content": "x"}, SAID), "messages[0].reasoning_content: user messages"),
    "weight of a result": (messages(ASKED, CALLED, {**RESULT, "weight": 1}, SAID), "only assistant messages have a weight"),
    "unknown id": (messages(ASKED, CALLED, {**RESULT, "tool_call_id": "x"}, SAID),
                   "messages: a result's tool_call_id is \"x\", which is the id of no call before it"),
    "result's content": (messages(ASKED, CALLED, {**RESULT, "content": {"rain": 1}}, SAID),
                         "messages[2].content: a string is expected, got an object"),
    "two tools": ({**messages(ASKED, SAID), "tools": [FUNCTION, FUNCTION]}, "tools[1].name: there are two tools called"),
    "tools in both forms": ({**messages(ASKED, SAID), "functions": [FUNCTION]}, "functions: the line has tools too"),
    "tools' text": ({**messages(ASKED, SAID), "tools": "[{"}, "tools: not JSON (Expecting property name"),
    "tools' kind": ({**messages(ASKED, SAID), "tools": {"name": "f"}}, "tools: a list of tools, or its JSON text, is"),
    "tool's kind": ({**messages(ASKED, SAID), "tools": [{"type": "web_search"}]}, 'tools[0].type: must be "function"'),
    "tool choice": ({**messages(ASKED, SAID), "tool_choice": "required"}, "tool_choice: training data has none; remove it"),
    "variables": ({**messages(ASKED, SAID), "chat_template_kwargs": []}, "chat_template_kwargs: an object is expected"),
    "unknown variable": ({**messages(ASKED, SAID), "chat_template_kwargs": {"colour": 1}},
                         "chat_template_kwargs.colour: the chat template reads no variable"),
    "own variable": ({**messages(ASKED, SAID), "chat_template_kwargs": {"add_generation_prompt": True}},
                     "chat_template_kwargs.add_generation_prompt: is set by the server itself"),
    "not parallel": ({**messages(ASKED, {"role": "assistant", "tool_calls": [CALL, {**CALL, "id": "b"}]}),
                      "parallel_tool_calls": False}, "parallel_tool_calls: it is false, but a message in messages has several"),
    "tools of a text": ({"text": "x", "tools": TOOLS}, "tools: plain texts have none"),
    "tools of texts": ({"prompt": "x", "completion": "y", "tools": TOOLS}, "tools: plain texts have none"),
    "sharegpt": ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "weather()"}]},
                 'conversations[1].value: not JSON (Expecting value: line 1 column 1 (char 0)); give {"name"'),
    "sharegpt's arguments": ({"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": "x"}'}]},
                             "conversations[0].value.arguments: must be a JSON object, or its text, got"),
    "sharegpt's second": (
        {"conversations": [{"from": "function_call", "value": f'[{WRITTEN_CALL}, {{"name": "f", "arguments": "x"}}]'}]},
        "conversations[0].value[1].arguments: must be a JSON object, or its text, got"),
    "sharegpt, none": ({"conversations": [{"from": "function_call", "value": "[]"}]}, "conversations[0].value: an empty list"),
    "images": ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "images": ["a.png"]},
               "images: not supported, the model reads text; leave the example out"),
    "kto": ({"instruction": "x", "output": "y", "kto_tag": True}, "kto_tag: completions that are only called good or bad"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_mistakes_are_told_with_line_and_field(load: Callable[..., Dataset], hermes: ChatTokenizer, name: str) -> None:
    record, message = REFUSALS[name]
    with pytest.raises(InvalidRequest) as caught:
        load(hermes, {"messages": MESSAGES}, record)
    assert str(caught.value).startswith("train.jsonl, line 2: ")
    assert message in str(caught.value)


def test_tools_beside_a_pair_and_in_its_input(load: Callable[..., Dataset], hermes: ChatTokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"line 1: input\.tools: the line has tools beside it too; give them once"):
        load(hermes, {**PAIRS["openai"], "tools": TOOLS}, objective="dpo")


@pytest.mark.parametrize("depth", [90, 400, 900, 100_000])
def test_deep_values_are_refused_or_trained(hermes: ChatTokenizer, tmp_path: Path, depth: int) -> None:
    path, deep = tmp_path / "train.jsonl", '{"a": ' * depth + "1" + "}" * depth
    path.write_text(json.dumps({"messages": [ASKED, calling(arguments="DEEP")]}).replace('"DEEP"', deep))
    if depth < 100:
        assert load_training(path, hermes, FinetuneConfig(), max_length=2000).groups
        return
    with pytest.raises(InvalidRequest, match=r"line 1: .*(nest|recursion|objects and lists)"):
        load_training(path, hermes, FinetuneConfig(), max_length=2000)
