"""What agents' conversations train, by a check of its own: by characters, around words that are in one message only.

Each text is found by a word that nothing else holds. A turn's words, and all between the start of a reply before them and the
end-of-turn token behind them, carry loss; nothing else does.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from coserve.chat.template import ChatExtras
from coserve.config.settings import FinetuneConfig
from coserve.core import InvalidRequest
from coserve.finetune.datasets import load_training
from coserve.text.examples import ExampleEncoder
from coserve.text.tokenizer import ChatTokenizer
from tests.agent_templates import DEEPSEEK_R1, QWEN3, QWEN3_THINKING, QWQ
from tests.tiny_tokenizer import SMOL_CHATML, build_tiny_tokenizer
from tests.tool_templates import HERMES, LLAMA3, MISTRAL

Message = dict[str, Any]
IM_ASSISTANT, IM_END = "<|im_start|>assistant\n", "<|im_end|>"


class Family(NamedTuple):
    """starts: what stands right before a reply; the last of them before a turn's words counts. end: the end-of-turn token."""

    template: str
    starts: tuple[str, ...]
    end: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    parallel: bool = True
    system: bool = True
    thinks: bool = False


HERMES_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
FAMILIES = {
    "llama3": Family(
        LLAMA3, ("<|start_header_id|>assistant<|end_header_id|>\n\n",), "<|eot_id|>", parallel=False,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "qwen2.5": Family(HERMES, (IM_ASSISTANT,), IM_END, added=HERMES_ADDED[:4]),
    "qwen3": Family(QWEN3, (IM_ASSISTANT,), IM_END, added=HERMES_ADDED, thinks=True),
    "qwen3-thinking": Family(QWEN3_THINKING, (f"{IM_ASSISTANT}<think>\n",), IM_END, added=HERMES_ADDED, thinks=True),
    "qwq": Family(QWQ, (f"{IM_ASSISTANT}<think>\n",), IM_END, added=HERMES_ADDED, thinks=True),
    "deepseek-r1": Family(
        DEEPSEEK_R1, ("<|Assistant|><think>\n",), "<|eos|>", thinks=True, special=("<|User|>", "<|Assistant|>", "<|eos|>"),
        added=HERMES_ADDED[4:],
    ),
    "mistral": Family(
        MISTRAL, ("[/INST]", "[/TOOL_RESULTS]"), "</s>", system=False,
        special=("</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                 "[/TOOL_RESULTS]"),
    ),
    "smollm2": Family(SMOL_CHATML, (IM_ASSISTANT,), IM_END),
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    found = {}
    for name, family in FAMILIES.items():
        directory = build_tiny_tokenizer(tmp_path_factory.mktemp("bpe"), chat_template=family.template)
        hf = PreTrainedTokenizerFast.from_pretrained(directory)
        hf.add_special_tokens({"additional_special_tokens": list(family.special)})
        hf.add_tokens(list(family.added))
        hf.eos_token = family.end
        found[name] = ChatTokenizer(hf)
    return found


# --- conversations of words that are in one place only ---


class Words:
    """Makes words that no other text holds."""

    def __init__(self) -> None:
        self._numbers = itertools.count(100)

    def __call__(self) -> str:
        return f"w{next(self._numbers)}w"


def tools_of(words: Words) -> list[dict[str, Any]]:
    parameters = {"type": "object", "properties": {"place": {"type": "string", "description": words()}}}
    return [
        {"type": "function", "function": {"name": name, "description": words(), "parameters": parameters}}
        for name in ("weather", "tides")
    ]


def call(words: Words, number: int) -> dict[str, Any]:
    return {"id": f"id{number:07d}", "type": "function",
            "function": {"name": ("weather", "tides")[number % 2], "arguments": {"place": words(), "days": number}}}


class Round(NamedTuple):
    """A question and what follows. steps: for each step the number of its calls. thoughts: whether each turn thinks."""

    steps: list[int]
    thoughts: list[bool]
    weight: int


ROUNDS = st.lists(
    st.builds(Round, steps=st.lists(st.integers(1, 2), max_size=2), thoughts=st.lists(st.booleans(), min_size=3, max_size=3),
              weight=st.integers(0, 3)),
    min_size=1, max_size=3,
)


def conversation(words: Words, rounds: list[Round], family: Family, system: bool, with_tools: bool) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": words()}] if system and family.system else []
    numbers = itertools.count()
    for item in rounds:
        messages.append({"role": "user", "content": words()})
        thoughts = iter(item.thoughts)
        for calls in item.steps if with_tools else ():
            made = [call(words, next(numbers)) for _ in range(calls if family.parallel else 1)]
            messages.append({"role": "assistant", "content": "", "tool_calls": made, **thought(words, family, next(thoughts))})
            messages += [{"role": "tool", "tool_call_id": one["id"], "content": words()} for one in made]
        answer = {"role": "assistant", "content": words(), **thought(words, family, next(thoughts))}
        messages.append(answer if item.weight else {**answer, "weight": 0})
    messages[-1].pop("weight", None)
    return messages


def thought(words: Words, family: Family, thinks: bool) -> Message:
    return {"reasoning_content": words()} if thinks and family.thinks else {}


def own_words(message: Message) -> list[str]:
    """The words of one assistant's turn, its thoughts apart: they are written where the turn is trained only."""
    said = [one["function"]["arguments"]["place"] for one in message.get("tool_calls", ())]
    return [message["content"], *said] if message["content"] else said


# --- the check ---


def characters(tokenizer: ChatTokenizer, ids: list[int], weights: list[float]) -> tuple[str, list[bool]]:
    """The text, and whether each of its characters is in a token with loss. All texts are ASCII: a token is some characters."""
    pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
    flags = [flag for piece, weight in zip(pieces, weights, strict=True) for flag in [weight > 0] * len(piece)]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    return "".join(pieces), flags


def region(text: str, message: Message, family: Family) -> tuple[int, int] | None:
    """The characters [start, end) of an assistant's turn in a text, where it stands there."""
    places = [text.find(word) for word in own_words(message)]
    if min(places) < 0:
        return None
    starts = [text.rfind(mark, 0, min(places)) + len(mark) for mark in family.starts if mark in text[: min(places)]]
    return None if not starts else (max(starts), text.index(family.end, max(places)) + len(family.end))


def check(family: Family, tokenizer: ChatTokenizer, messages: list[Message], extras: ChatExtras) -> list[list[int]]:
    """Checks every character of every example. Returns the positions of the turns that each example trains."""
    trained: list[list[int]] = []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for ids, weights in ExampleEncoder(tokenizer).encode_examples(messages, extras=extras):
        text, flags = characters(tokenizer, ids.tolist(), weights.tolist())
        expected = [False] * len(flags)
        trained.append([])
        for i in answers:
            found = region(text, messages[i], family)
            if found is None or not all(flags[found[0] : found[1]]):
                continue
            trained[-1].append(i)
            expected[found[0] : found[1]] = [True] * (found[1] - found[0])
            assert messages[i].get("reasoning_content", "") in text[found[0] : found[1]]
            prompt = tokenizer.encode_chat(messages[:i], extras=extras)
            assert ids[: len(prompt)].tolist() == prompt  # what a request for this turn would be
        assert flags == expected, text
        untrained = [message["content"] for message in messages if message["role"] != "assistant"]
        assert not any(any(flags[text.find(word) : text.find(word) + len(word)]) for word in untrained if word in text)
    wanted = [i for i in answers if messages[i].get("weight", 1)]
    assert sorted(itertools.chain(*trained)) == wanted  # each of them once
    return trained


@pytest.mark.parametrize("name", FAMILIES)
@given(rounds=ROUNDS, system=st.booleans(), with_tools=st.booleans())
@settings(deadline=None, max_examples=40)
def test_exactly_the_assistants_tokens_are_trained(
    tokenizers: dict[str, ChatTokenizer], name: str, rounds: list[Round], system: bool, with_tools: bool
) -> None:
    family, words = FAMILIES[name], Words()
    with_tools = with_tools and name != "deepseek-r1"  # whose calls follow rules of their own
    messages = conversation(words, rounds, family, system, with_tools)
    check(family, tokenizers[name], messages, ChatExtras(tools=tools_of(words) if with_tools else ()))


TWO_ROUNDS = [Round([2, 1], [True] * 3, 1), Round([1], [True] * 3, 1)]
"""Positions: 0 system, 1 user, 2 calls, 3 and 4 results, 5 call, 6 result, 7 answer, 8 user, 9 call, 10 result, 11 answer."""


@pytest.mark.parametrize(("name", "examples"), [
    ("qwen2.5", [[2, 5, 7, 9, 11]]), ("smollm2", [[2, 5, 7, 9, 11]]), ("qwen3", [[2, 5, 7], [9, 11]]),
    ("qwen3-thinking", [[2, 5, 7], [9, 11]]), ("qwq", [[2], [5], [7], [9], [11]]),
])
def test_turns_share_an_example_where_the_template_keeps_their_form(
    tokenizers: dict[str, ChatTokenizer], name: str, examples: list[list[int]]
) -> None:
    words = Words()
    messages = conversation(words, TWO_ROUNDS, FAMILIES[name], True, True)
    assert check(FAMILIES[name], tokenizers[name], messages, ChatExtras(tools=tools_of(words))) == examples


def test_without_thoughts_each_turn_of_qwen3_is_an_example(tokenizers: dict[str, ChatTokenizer]) -> None:
    """The last turn is written with empty thoughts, and earlier ones without: as requests without thoughts have it."""
    words = Words()
    messages = conversation(words, [Round([1], [False] * 3, 1)], FAMILIES["qwen3"], True, True)
    assert check(FAMILIES["qwen3"], tokenizers["qwen3"], messages, ChatExtras(tools=tools_of(words))) == [[2], [4]]


def test_thinking_turned_off_trains_the_answer_behind_empty_thoughts(tokenizers: dict[str, ChatTokenizer]) -> None:
    family = FAMILIES["qwen3"]._replace(starts=(f"{IM_ASSISTANT}<think>\n\n</think>\n\n", IM_ASSISTANT))
    messages = conversation(Words(), [Round([], [False] * 3, 1)] * 2, family, True, False)
    assert check(family, tokenizers["qwen3"], messages, ChatExtras(variables={"enable_thinking": False})) == [[2], [4]]


def test_a_system_prompt_that_serving_writes_elsewhere_is_refused_with_a_way_out(
    tokenizers: dict[str, ChatTokenizer], tmp_path: Path
) -> None:
    """Mistral's template puts the system prompt into the last turn, and only while that is the user's."""
    line = {"messages": [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"},
                         {"role": "assistant", "content": "Hello"}]}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InvalidRequest, match=r"line 1: messages\[2\]: .*; with system_prompt merge"):
        load_training(path, tokenizers["mistral"], FinetuneConfig(), max_length=500)
    (group,) = load_training(path, tokenizers["mistral"], FinetuneConfig(system_prompt="merge"), max_length=500).groups
    (example,) = group.examples
    text, flags = characters(tokenizers["mistral"], example.token_ids.tolist(), example.weights.tolist())
    assert "".join(itertools.compress(text, flags)) == " Hello</s>"
    assert text.startswith("[INST] Be.\n\nHi[/INST]")
