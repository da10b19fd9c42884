"""Layouts of training data, against an oracle: what is trained decodes to the assistant's words and the end-of-turn token."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coserve.config.settings import FinetuneConfig, Objective, SystemPrompt
from coserve.core import InvalidRequest
from coserve.finetune.datasets import Dataset, load_training
from coserve.text.tokenizer import ChatTokenizer
from tests.chat_templates import ALTERNATING, DATED, DEVELOPER, REWRITING
from tests.tiny_tokenizer import CHATML, build_tiny_tokenizer

EOT = "<|im_end|>"
HEAD = "<|im_start|>assistant\n"
Record = dict[str, Any]
Build = Callable[[str], ChatTokenizer]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    made: dict[str, ChatTokenizer] = {}

    def load(template: str) -> ChatTokenizer:
        if template not in made:
            made[template] = ChatTokenizer.load(
                build_tiny_tokenizer(tmp_path_factory.mktemp("bpe"), chat_template=template)
            )
        return made[template]

    return load


@pytest.fixture
def load(build: Build, tmp_path: Path) -> Callable[..., Dataset]:
    def read(*records: Record | str, template: str = CHATML, objective: Objective = "sft", **settings: Any) -> Dataset:
        path = tmp_path / "train.jsonl"
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path.write_text("\n".join(lines) + "\n")
        return load_training(path, build(template), FinetuneConfig(objective=objective, **settings), max_length=2000)

    return read


def parts(dataset: Dataset, tokenizer: ChatTokenizer) -> list[list[tuple[str, list[str]]]]:
    """Of each example of each group: the text before the first trained token, and each run of trained text."""
    groups = []
    for group in dataset.groups:
        examples = []
        for example in group.examples:
            runs: list[list[int]] = []
            for i, (token, weight) in enumerate(zip(example.token_ids.tolist(), example.weights.tolist(), strict=True)):
                if weight and (i == 0 or not example.weights[i - 1]):
                    runs.append([])
                if weight:
                    runs[-1].append(token)
            first = int(example.weights.argmax())
            before = tokenizer.decode(example.token_ids[:first].tolist(), skip_special_tokens=False)
            examples.append((before, [tokenizer.decode(run, skip_special_tokens=False) for run in runs]))
        groups.append(examples)
    return groups


def said(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{EOT}\n"


def turn(role: str, content: Any, **more: Any) -> Record:
    return {"role": role, "content": content, **more}


HI, HELLO, BYE = turn("user", "Hi"), turn("assistant", "Hello"), turn("assistant", "Go away")
ASKED = said("user", "Hi") + HEAD
NEUTRAL = {
    "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": [], "name": None,
    "tool_call_id": None, "reasoning_content": None, "provider_specific_fields": None,
}

SFT: dict[str, tuple[Record, str, list[str]]] = {
    "neutral fields": (
        {"messages": [{**HI, "name": None}, {**HELLO, **NEUTRAL}], "tools": [], "parallel_tool_calls": True,
         "tool_choice": "auto", "functions": [], "function_call": "none"}, ASKED, [f"Hello{EOT}"]),
    "refusal and content": ({"messages": [HI, {**HELLO, "refusal": "no"}]}, ASKED, [f"Hello{EOT}"]),
    "parts": ({"messages": [turn("user", [{"type": "text", "text": "Hi"}]), turn("assistant", [
        {"type": "text", "text": "One", "cache_control": {}}, {"type": "text", "text": "two"}])]}, ASKED, [f"One\ntwo{EOT}"]),
    "developer": ({"messages": [turn("developer", "Be."), HI, HELLO]}, said("system", "Be.") + ASKED, [f"Hello{EOT}"]),
    "nulls beside": ({"messages": [HI, HELLO], "prompt": None, "completion": None, "text": None}, ASKED, [f"Hello{EOT}"]),
    "rendered text beside": ({"messages": [HI, HELLO], "text": "Hi Hello"}, ASKED, [f"Hello{EOT}"]),
    "several turns": ({"messages": [HI, HELLO, HI, BYE]}, ASKED, [f"Hello{EOT}", f"Go away{EOT}"]),
    "sharegpt": (
        {"conversations": [
            {"from": "system", "value": "Be."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        said("system", "Be.") + ASKED, [f"Hello{EOT}"]),
    "sharegpt, system apart": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": None}],
         "system": "Be."},
        said("system", "Be.") + ASKED, [f"Hello{EOT}"]),
    "sharegpt, OpenAI's words": ({"conversations": [HI, HELLO], "system": ""}, ASKED, [f"Hello{EOT}"]),
    "sharegpt, weights": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x", "weight": 0},
                           {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        ASKED + f"x{EOT}\n" + ASKED, [f"Hello{EOT}"]),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Hello"}, ASKED, [f"Hello{EOT}"]),
    "alpaca, no input": ({"instruction": "Hi", "output": "Hello", "input": None}, ASKED, [f"Hello{EOT}"]),
    "alpaca, input": ({"instruction": "Add", "input": "1 2", "output": "3", "text": "..."},
                      said("user", "Add\n1 2") + HEAD, [f"3{EOT}"]),
    "alpaca, all": (
        {"instruction": "c", "output": "d", "system": "Be.", "history": [["a", "b"]]},
        said("system", "Be.") + said("user", "a") + HEAD, [f"b{EOT}", f"d{EOT}"]),
    "text prompt": ({"prompt": "Hi", "completion": [HELLO]}, ASKED, [f"Hello{EOT}"]),
    "whole conversation": ({"prompt": [HI], "completion": [HI, HELLO]}, ASKED, [f"Hello{EOT}"]),
    "system alone as prompt": ({"prompt": [turn("system", "Be.")], "completion": [HI, HELLO]},
                               said("system", "Be.") + ASKED, [f"Hello{EOT}"]),
}


@pytest.mark.parametrize("name", SFT)
def test_sft_layouts(load: Callable[..., Dataset], build: Build, name: str) -> None:
    record, before, trained = SFT[name]
    assert parts(load(record), build(CHATML)) == [[(before, trained)]]


SYSTEM = turn("system", "Be.")
PAIRS: dict[str, tuple[Record, str]] = {
    "implicit prompt": ({"chosen": [HI, HELLO], "rejected": [HI, BYE]}, ASKED),
    "implicit prompt, system": ({"chosen": [SYSTEM, HI, HELLO], "rejected": [SYSTEM, HI, BYE]}, said("system", "Be.") + ASKED),
    "implicit prompt, several turns": (
        {"chosen": [HI, BYE, HI, HELLO], "rejected": [HI, BYE, HI, BYE]}, ASKED + f"Go away{EOT}\n" + ASKED),
    "implicit prompt, null prompt": ({"prompt": None, "chosen": [HI, HELLO], "rejected": [HI, BYE]}, ASKED),
    "text prompt": ({"prompt": "Hi", "chosen": [HELLO], "rejected": [BYE]}, ASKED),
    "ultrafeedback": (
        {"prompt": "Hi", "prompt_id": "x", "chosen": [HI, HELLO], "rejected": [HI, BYE], "messages": [HI, HELLO],
         "score_chosen": 8.0, "score_rejected": 3.0}, ASKED),
    "whole conversations": ({"prompt": [HI], "chosen": [HI, HELLO], "rejected": [HI, BYE]}, ASKED),
    "one of them whole": ({"prompt": [HI], "chosen": [HI, HELLO], "rejected": [BYE]}, ASKED),
    "openai, whole": (
        {"input": {"messages": [SYSTEM, HI]}, "preferred_output": [SYSTEM, HI, HELLO], "non_preferred_output": [BYE]},
        said("system", "Be.") + ASKED),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"},
                  "rejected": {"from": "gpt", "value": "Go away"}}, ASKED),
    "alpaca": ({"instruction": "Hi", "chosen": "Hello", "rejected": "Go away"}, ASKED),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_layouts(load: Callable[..., Dataset], build: Build, name: str) -> None:
    record, before = PAIRS[name]
    found = parts(load(record, objective="dpo"), build(CHATML))
    assert found == [[(before, [f"Hello{EOT}"]), (before, [f"Go away{EOT}"])]]


@pytest.mark.parametrize(("chosen", "rejected", "prompt"), [
    ("The sky is blue.", "The sky is green.", "The sky is"), ("Q: x\n\nA: yes", "Q: x\n\nA: no", "Q: x\n\nA:"),
    ("I can", "I can't", "I"), ("ab", "ac", ""),
])
def test_an_implicit_prompt_in_texts(
    load: Callable[..., Dataset], build: Build, chosen: str, rejected: str, prompt: str
) -> None:
    tokenizer = build(CHATML)
    (group,) = load({"chosen": chosen, "rejected": rejected}, objective="dpo").groups
    for example, text in zip(group.examples, (chosen, rejected), strict=True):
        masked, trained = (
            tokenizer.decode(example.token_ids[example.weights == weight].tolist(), skip_special_tokens=False)
            for weight in (0, 1)
        )
        assert (masked, trained) == (prompt, text.removeprefix(prompt) + EOT)


@pytest.mark.parametrize(("record", "objective", "message"), [
    ({"prompt": [turn("user", "Ho")], "chosen": [HI, HELLO], "rejected": [HI, BYE]}, "dpo",
     "chosen: a whole conversation, but not one that begins with prompt"),
    ({"prompt": [SYSTEM, HI], "chosen": [HI, HELLO], "rejected": [HI, BYE]}, "dpo", "not one that begins with prompt"),
    ({"prompt": [HI], "completion": [SYSTEM, HI, HELLO]}, "sft", "completion: a whole conversation, but not one that begins"),
    ({"prompt": "Ho", "chosen": [HI, HELLO], "rejected": [HI, BYE]}, "dpo", "not one that asks what prompt says"),
    ({"prompt": "Hi", "chosen": [SYSTEM, HI, HELLO], "rejected": [HI, BYE]}, "dpo", "rejected: what comes before the answer"),
    ({"chosen": [HI, HELLO], "rejected": [turn("user", "Ho"), BYE]}, "dpo", "no first message in common"),
    ({"conversations": [HI, HELLO], "chosen": HELLO, "rejected": BYE}, "dpo", "conversations: the last message is"),
    ({"conversations": [{"from": "human", "value": "Hi"}]}, "sft", "conversations: no assistant message"),
    ({"conversations": [{"from": "bot", "value": "Hi"}]}, "sft", 'conversations[0].from: "bot" is unknown; use human, gpt, f'),
    ({"conversations": [{"from": "human"}]}, "sft", "conversations[0].value: a string is expected, got nothing"),
    ({"conversations": [{"from": "observation", "value": "x"}]}, "sft", "conversations: no assistant message"),
    ({"messages": [turn("gpt", "x")]}, "sft", 'messages[0].role: "gpt" is unknown'),
    ({"instruction": "", "input": "", "output": "x"}, "sft", "instruction: it is empty"),
    ({"instruction": "x", "output": 3}, "sft", "output: a string is expected, got a number"),
    ({"instruction": "x", "output": "y", "history": ["a"]}, "sft", "history[0]: [question, answer] is expected"),
    ({"instruction": "x", "output": "y", "history": [["a", None]]}, "sft", "history[0]: a string is expected, got nothing"),
    ({"instruction": "x", "output": "y", "tools": [{}]}, "sft", 'tools[0].type: must be "function"'),
    ({"messages": [HI, {**HELLO, "tool_calls": 0}]}, "sft", "messages[1].tool_calls: must be a list, got 0"),
    ({"messages": [HI, HELLO], "tools": False}, "sft", "tools: a list of tools, or its JSON text, is expected, got"),
    ({"messages": [HI, HELLO], "tools": '[{"name": "f g"}]'}, "sft", "tools[0].name: must be a name"),
    ({"question": "Hi", "chosen": "Hello", "rejected": "Go"}, "dpo", "question: a column beside chosen and rejected that no"),
    ({"input": "Hi", "chosen": "A: Hello", "rejected": "A: Go"}, "dpo", "input: a column beside chosen and rejected that no"),
    ({"conversations": [HELLO, HI], "system": "Be."}, "sft", "conversations[1].role: the last message must be"),
    ("[", "sft", "write each object of a JSON array on a line of its own"),
    ('[{"text": "x"}]', "sft", "got a list; write each object of a JSON array on a line of its own"),
    ({"messages": [HI, turn("assistant", None, refusal="no")]}, "sft", "messages[1].content: a string is expected"),
    ('{"text": "x", "a": {"b": [{"c": 1, "c": 1}]}}', "sft", '"c": the key is in one object twice'),
    ('{"text": "x", "text": "y"}', "sft", '"text": the key is in one object twice'),
])
def test_contradictions_are_refused(
    load: Callable[..., Dataset], record: Record | str, objective: Objective, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(record, objective=objective)
    assert str(caught.value).startswith("train.jsonl, line 1: ")
    assert message in str(caught.value)


def test_other_columns_are_ignored_with_one_warning(load: Callable[..., Dataset]) -> None:
    chat = {"messages": [HI, HELLO]}
    dataset = load({**chat, "id": 1, "tools": []}, {**chat, "source": "x", "id": 2}, {**chat, "id": None})
    assert dataset.report.warnings == ('columns that no layout has are ignored: "id", "source"',)
    assert load(chat).report.warnings == ()
    many = load({**chat, **{f"c{i}": i for i in range(30)}}).report.warnings
    assert many[0].endswith('"c19", and 10 more')


def test_control_tokens_in_data_are_told(load: Callable[..., Dataset]) -> None:
    chat = {"messages": [turn("user", f"Hi{EOT}"), HELLO]}
    (warning,) = load(chat, {"messages": [HI, HELLO]}, {"text": f"a{EOT}b"}, {"text": f"a{EOT}\n"}).report.warnings
    assert warning.startswith("2 of 4 lines hold control tokens written out")
    assert load(chat, allow_control_tokens=True).report.warnings == ()


@pytest.mark.parametrize("record", [
    {"messages": [HI, HELLO], "system": "Be."}, {"messages": [HI, HELLO], "system": "Be.", "tools": ""},
    {"conversations": [HI, HELLO], "system": "Be.", "tools": "[]"},
])
def test_columns_beside_a_conversation(load: Callable[..., Dataset], build: Build, record: Record) -> None:
    dataset = load(record)
    assert dataset.report.warnings == ()
    assert parts(dataset, build(CHATML)) == [[(said("system", "Be.") + ASKED, [f"Hello{EOT}"])]]


# --- templates that rewrite earlier turns ---


def test_an_end_of_the_conversation_is_no_end_of_a_turn(load: Callable[..., Dataset], build: Build) -> None:
    """As Phi-3's template, which writes its EOS token behind the last turn only: every answer is trained all the same."""
    template = CHATML.replace("'<|im_end|>'", "'<|endoftext|>'")
    template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    dataset = load({"messages": [HI, HELLO, HI, BYE]}, template=template)
    assert dataset.report.warnings == ()
    assert parts(dataset, build(template))[0][0][1] == ["Hello<|endoftext|>", "Go away<|endoftext|>"]


def test_several_turns_where_only_the_last_keeps_its_form(load: Callable[..., Dataset], build: Build) -> None:
    chats = {"messages": [HI, HELLO, HI, BYE]}
    dataset = load(chats, {"messages": [HI, HELLO]}, chats, template=REWRITING)
    first, last = ([(ASKED, [f"<think>\n\n</think>\n\nHello{EOT}"])],
                   [(ASKED + f"Hello{EOT}\n" + ASKED, [f"<think>\n\n</think>\n\nGo away{EOT}"])])
    assert parts(dataset, build(REWRITING)) == [first, last, first, first, last]
    assert [group.index for group in dataset.groups] == list(range(5))
    (warning,) = dataset.report.warnings
    assert warning.startswith("2 of 3 conversations became several examples")


def test_a_pair_is_trained_in_its_last_turns_where_the_template_rewrites_earlier_ones(
    load: Callable[..., Dataset], build: Build
) -> None:
    pair = {"prompt": [HI], "chosen": [HELLO, HI, HELLO], "rejected": [BYE, HI, BYE]}
    dataset = load(pair, template=REWRITING, objective="dpo")
    (group,) = parts(dataset, build(REWRITING))
    assert [trained for _, trained in group] == [[f"<think>\n\n</think>\n\n{said}{EOT}"] for said in ("Hello", "Go away")]
    (warning,) = dataset.report.warnings
    assert warning.startswith("1 of 1 conversations are trained in their last assistant turn only")


def test_a_long_one_of_several_examples_is_dropped_alone(build: Build, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [HI, HELLO, HI, BYE]}) + "\n")
    tokenizer, config = build(REWRITING), FinetuneConfig(too_long="drop")
    lengths = [group.examples[0].num_tokens for group in load_training(path, tokenizer, config, max_length=2000).groups]
    assert lengths == sorted(lengths)
    dataset = load_training(path, tokenizer, config, max_length=lengths[0])
    assert [group.examples[0].num_tokens for group in dataset.groups] == lengths[:1]
    assert (dataset.report.num_lines, dataset.report.num_dropped) == (1, 1)


def test_thinking_in_every_turn_is_trained(load: Callable[..., Dataset], build: Build) -> None:
    thought, said = turn("assistant", "<think>\nhm\n</think>\n\nHello"), [f"<think>\nhm\n</think>\n\nHello{EOT}"]
    dataset = load({"messages": [HI, thought, HI, thought]}, template=REWRITING)
    assert parts(dataset, build(REWRITING)) == [[(ASKED, said)], [(ASKED + f"Hello{EOT}\n" + ASKED, said)]]


def test_turns_behind_each_other_are_trained_where_they_keep_their_form(load: Callable[..., Dataset], build: Build) -> None:
    earlier = turn("assistant", "x", weight=0)
    dataset = load({"messages": [HI, earlier, HI, HELLO]}, template=REWRITING)
    assert dataset.report.warnings == ()
    assert parts(dataset, build(REWRITING))[0][0][1] == [f"<think>\n\n</think>\n\nHello{EOT}"]


# --- system prompts and developers ---


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_refused_system_prompt_says_so_and_can_be_merged(
    load: Callable[..., Dataset], build: Build, role: str
) -> None:
    chat = {"messages": [turn(role, "Be."), HI, HELLO, HI, BYE]}
    with pytest.raises(InvalidRequest, match="refuses the conversation: System role not supported; with system_prompt merge"):
        load(chat, template=ALTERNATING)
    dataset = load(chat, template=ALTERNATING, system_prompt="merge")
    assert parts(dataset, build(ALTERNATING)) == [
        [(said("user", "Be.\n\nHi") + HEAD, [f"Hello{EOT}", f"Go away{EOT}"])]]


def test_merging_in_every_layout(load: Callable[..., Dataset], build: Build) -> None:
    before = said("user", "Be.\n\nHi") + HEAD
    records: tuple[Record, ...] = (
        {"instruction": "Hi", "output": "Hello", "system": "Be."}, {"prompt": [SYSTEM, HI], "completion": [HELLO]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be."},
    )
    for record in records:
        assert parts(load(record, system_prompt="merge"), build(CHATML)) == [[(before, [f"Hello{EOT}"])]]
    pair = {"prompt": [SYSTEM, HI], "chosen": [HELLO], "rejected": [BYE]}
    (found,) = parts(load(pair, system_prompt="merge", objective="dpo"), build(CHATML))
    assert found == [(before, [f"Hello{EOT}"]), (before, [f"Go away{EOT}"])]
    two = {"messages": [SYSTEM, turn("system", "Brief."), HI, HELLO, SYSTEM, HI, BYE]}
    (((first, runs),),) = parts(load(two, system_prompt="merge"), build(CHATML))
    assert (first, runs) == (said("user", "Be.\n\nBrief.\n\nHi") + HEAD, [f"Hello{EOT}", f"Go away{EOT}"])
    nothing = {"messages": [turn("system", ""), HI, HELLO]}
    assert parts(load(nothing, system_prompt="merge"), build(CHATML)) == [[(ASKED, [f"Hello{EOT}"])]]
    with pytest.raises(InvalidRequest, match="no user message behind it"):
        load({"messages": [SYSTEM, HELLO]}, system_prompt="merge")


def test_other_refusals_of_the_template_have_no_such_hint(load: Callable[..., Dataset]) -> None:
    with pytest.raises(InvalidRequest, match=r"Roles must alternate user/assistant$"):
        load({"messages": [HI, HI, HELLO]}, template=ALTERNATING)


GENERIC = CHATML + "{# developer #}"
DROPPING = (
    "{# developer #}{% for m in messages %}{% if m.role in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MAPPING = CHATML.replace("message['role'] +", "('system' if message['role'] == 'developer' else message['role']) +")


@pytest.mark.parametrize(("template", "known"), [
    (CHATML, False), (GENERIC, False), (DROPPING, False), (DEVELOPER, True), (ALTERNATING, False), (MAPPING, True),
    (CHATML.replace("message['role']", "(message['role'] | upper)"), False),
    ("You help developers. " + CHATML, False), ("{{ messages[0].developer.x.y }}", False),
])
def test_the_developer_role_is_found_by_rendering(build: Build, template: str, known: bool) -> None:
    assert build(template).knows_developer is known


def test_a_developer_message_in_training(load: Callable[..., Dataset], build: Build) -> None:
    chat = {"messages": [turn("developer", "Be."), HI, HELLO]}
    for template, role in ((DEVELOPER, "rules"), (DROPPING, "system"), (MAPPING, "system")):
        (((before, runs),),) = parts(load(chat, template=template), build(template))
        assert (before, runs) == (said(role, "Be.") + ASKED, [f"Hello{EOT}"])


# --- the date that templates write ---


def test_the_date_is_the_jobs(load: Callable[..., Dataset], build: Build) -> None:
    chat = {"messages": [HI, HELLO]}
    first, again, later = (load(chat, template=DATED, template_date=day) for day in ("2025-01-31", "2025-01-31", "2025-02-01"))
    assert parts(first, build(DATED)) == [[(said("system", "Today: 31 Jan 2025") + ASKED, [f"Hello{EOT}"])]]
    assert first.report.digest == again.report.digest != later.report.digest


def test_the_digest_covers_tokens_and_weights(load: Callable[..., Dataset]) -> None:
    chat = {"messages": [SYSTEM, HI, HELLO]}
    assert load(chat).report.digest != load(chat, system_prompt="merge").report.digest
    attack = {"text": f"a{EOT}b"}
    assert load(attack).report.digest != load(attack, allow_control_tokens=True).report.digest


@pytest.mark.parametrize("system_prompt", ["keep", "merge"])
def test_masks_are_what_the_model_writes(load: Callable[..., Dataset], build: Build, system_prompt: SystemPrompt) -> None:
    """The prompt of every example is the one that a request gets."""
    tokenizer = build(CHATML)
    (group,) = load({"messages": [SYSTEM, HI, HELLO]}, system_prompt=system_prompt).groups
    asked = [SYSTEM, HI] if system_prompt == "keep" else [turn("user", "Be.\n\nHi")]
    prompt = tokenizer.encode_chat(asked)
    assert group.examples[0].token_ids[: len(prompt)].tolist() == prompt
    assert group.examples[0].weights[: len(prompt)].sum() == 0
