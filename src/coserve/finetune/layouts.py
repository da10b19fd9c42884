"""From the JSON object of a line to token ids and loss weights, for every accepted layout of training data.

Owns: the accepted layouts (`_LAYOUTS`), which part of a line is the prompt, where the system prompt goes. Does not own: how
lines are read (jsonlines.py), messages one by one (turns.py), tokenization and which tokens of a conversation are trained
(coserve.text.tokenizer), lengths (datasets.py).

Layouts: OpenAI's fine-tuning API (https://platform.openai.com/docs/guides/fine-tuning), TRL's "Dataset formats"
(https://huggingface.co/docs/trl/dataset_formats), alpaca (https://github.com/tatsu-lab/stanford_alpaca) and ShareGPT, with the
optional columns that LLaMA-Factory (https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md) describes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from coserve.chat.messages import is_neutral
from coserve.chat.reasoning import style_of
from coserve.chat.template import NO_EXTRAS, ChatExtras
from coserve.chat.trained import texts_in
from coserve.chat.variables import check_variables
from coserve.config.settings import PAIRED, Objective, SystemPrompt
from coserve.core import InvalidRequest
from coserve.finetune.calls import link_calls, read_line_tools, unlisted_call
from coserve.finetune.jsonlines import LineError, kind, read_text, shown
from coserve.finetune.turns import Turn, merge_system, read_turns, same_turns
from coserve.text.examples import ExampleEncoder, Notes
from coserve.text.tokenizer import ChatTokenizer, TextRules

_SHOWN_KEYS = 8
_CHOICES = ("tool_choice", "function_call")
"""Columns of requests that data has no use for, but may hold with the values that ask for what happens anyway."""
_BESIDE = ("tools", "functions", "parallel_tool_calls", *_CHOICES, "chat_template_kwargs")
"""Columns beside a conversation of any layout."""
_MEDIA = ("images", "videos", "audios")
"""LLaMA-Factory's columns of what a model that reads text only can't be shown."""
_QUESTIONS = ("question", "query", "input", "instruction")
"""Columns that hold the prompt in other layouts."""
_WEAKEST = "text"
"""A column that is ignored beside another layout: in alpaca's files it is a rendering of the other columns."""


class Encoded(NamedTuple):
    """One encoded example. field: the key of the line that errors name. token_ids: int64 [n]. weights: float32 [n]."""

    field: str
    token_ids: np.ndarray
    weights: np.ndarray


Examples = tuple[Encoded, ...]
"""One example, or chosen and rejected (PAIRED)."""


@dataclass(slots=True, kw_only=True)
class LineReader:
    """Reads the lines of one file.

    ignored: columns that the lines' layouts don't have, in order of appearance. counts: in how many lines there is what
    examples.Notes counts, by its names, and `unlisted`: calls of tools that the line doesn't list. layouts: the number of
    lines by layout, named by its required keys.
    """

    tokenizer: ChatTokenizer
    objective: Objective
    rules: TextRules
    system_prompt: SystemPrompt
    ignored: dict[str, None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    _encoder: ExampleEncoder = field(init=False)
    _notes: Notes = field(default_factory=Notes)
    _extras: ChatExtras = NO_EXTRAS
    _parallel: bool = True
    _unlisted: bool = False

    def __post_init__(self) -> None:
        self._encoder = ExampleEncoder(self.tokenizer)

    def read(self, record: dict[str, Any]) -> list[Examples]:
        """The examples of one line: one, or several if a conversation can't be trained in one. Raises LineError, InvalidRequest
        (tokenizer)."""
        layout = _match(record, self.objective)
        _refuse_columns(record, layout)
        self._notes, self._unlisted = Notes(), False
        self._extras, self._parallel = NO_EXTRAS, True
        self.take_tools(record, "")
        encoded = layout.encode(record, self)
        self.layouts[", ".join(layout.required)] += 1
        self.ignored.update(dict.fromkeys(
            key for key in record if key not in (*layout.required, *layout.optional, *_BESIDE)
        ))
        told = {**asdict(self._notes), "unlisted": self._unlisted}
        self.counts.update(name for name, count in told.items() if count)
        return [tuple(encoded)] if self.objective in PAIRED else [(example,) for example in encoded]

    def take_tools(self, record: Mapping[str, Any], prefix: str) -> None:
        """Reads what a line, or an object in it, says beside its conversation. prefix: of the fields' places. Raises
        LineError."""
        for name in _CHOICES:
            if not is_neutral(record.get(name), ("none", "auto")):
                raise LineError(prefix + name, "training data has none; remove it")
        parallel = record.get("parallel_tool_calls")
        if not is_neutral(parallel, (True, False)):
            raise LineError(f"{prefix}parallel_tool_calls", f"true or false is expected, got {shown(parallel)}")
        variables = record.get("chat_template_kwargs")
        if not isinstance(variables, dict | None):
            raise LineError(f"{prefix}chat_template_kwargs", f"an object is expected, got {kind(variables)}")
        for text in texts_in(variables):
            read_text(text, f"{prefix}chat_template_kwargs")
        if variables and self.tokenizer.has_chat_template:
            template = self.tokenizer.template
            variables = check_variables(variables, template, style_of(template.written))
        tools = read_line_tools(record, prefix)
        if tools and self._extras.tools:
            raise LineError(f"{prefix}tools", "the line has tools beside it too; give them once")
        self._parallel = self._parallel and parallel is not False
        self._extras = ChatExtras(
            tools=tools or self._extras.tools, variables={**self._extras.variables, **(variables or {})}
        )

    def turns(self, value: object, place: str) -> list[Turn]:
        """A checked list of messages, with the chat template's roles. Raises LineError, InvalidRequest."""
        return read_turns(value, place, keep_developer=self.tokenizer.knows_developer)

    def chat(self, place: str, context: Sequence[Turn], response: Sequence[Turn]) -> list[Encoded]:
        """Encodes a conversation of which only `response` is trained: as one example, or several (not if PAIRED)."""
        given = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in context] + [*response]
        _require_response(response, place)
        turns: list[Turn] = [*link_calls(given, place)]
        if not self._parallel and any(len(turn.get("tool_calls", ())) > 1 and turn.get("weight", 1) for turn in turns):
            raise LineError("parallel_tool_calls", f"it is false, but a message in {place} has several calls")
        self._unlisted = self._unlisted or unlisted_call(turns, self._extras.tools)
        if self.system_prompt == "merge":
            turns = merge_system(turns, place)
        try:
            return [Encoded(place, *example) for example in self._encode(turns)]
        except InvalidRequest as error:
            if not self._can_merge(turns, place):
                raise
            raise InvalidRequest(
                f"{error}; with system_prompt merge the system prompt becomes part of the first user turn", param=error.param
            ) from error

    def _encode(self, turns: Sequence[Turn]) -> list[tuple[np.ndarray, np.ndarray]]:
        if self.objective in PAIRED:
            return [self._encoder.encode_training(turns, self.rules, self._notes, self._extras)]
        return self._encoder.encode_examples(turns, self.rules, self._notes, self._extras)

    def _can_merge(self, turns: Sequence[Turn], place: str) -> bool:
        """Whether the conversation has a system prompt, and could be encoded if that were merged into a user turn."""
        if all(turn["role"] != "system" for turn in turns):
            return False
        try:
            self._encode(merge_system(turns, place))
        except (LineError, InvalidRequest):
            return False
        return True

    def completion(self, place: str, prompt: str, text: str) -> Encoded:
        """Encodes a text that continues a prompt. Only the text is trained."""
        self._refuse_tools()
        return Encoded(place, *self._encoder.encode_completion(prompt, text, self.rules, self._notes))

    def text(self, place: str, text: str) -> Encoded:
        """Encodes a text that is trained whole."""
        self._refuse_tools()
        return Encoded(place, *self._encoder.encode_text(text, self.rules, self._notes))

    def _refuse_tools(self) -> None:
        if self._extras.tools:
            raise LineError("tools", "plain texts have none, as no chat template writes them; give messages, or remove it")


Encoder = Callable[[dict[str, Any], LineReader], list[Encoded]]
"""The examples of a line."""


class _Layout(NamedTuple):
    objectives: tuple[Objective, ...]
    required: tuple[str, ...]
    optional: tuple[str, ...]
    encode: Encoder


def _match(record: dict[str, Any], objective: Objective) -> _Layout:
    """The layout whose required keys the line has. A key with null counts as present only if no layout is found otherwise."""
    given = [key for key, value in record.items() if value is not None]
    for keys in (given, list(record)):
        matches = [layout for layout in _LAYOUTS if all(key in keys for key in layout.required)]
        own = [layout for layout in matches if objective in layout.objectives]
        if own:
            return _only(own)
    wanted = " or ".join("{" + ", ".join(f.required) + "}" for f in _LAYOUTS if objective in f.objectives)
    if matches:
        others = " or ".join(matches[0].objectives)
        raise LineError(
            ", ".join(matches[0].required),
            f"this is a line for objective {others}, but the objective is {objective}; give {wanted}, or "
            f"set the objective to {others}",
        )
    keys_shown = ", ".join([shown(key) for key in list(record)[:_SHOWN_KEYS]] + ["..."] * (len(record) > _SHOWN_KEYS))
    raise LineError("keys", f"{keys_shown or 'none'}: no known format; for objective {objective} give {wanted}")


def is_paired(record: Mapping[str, Any]) -> bool:
    """Whether a line has a layout of pairs."""
    return any(layout.objectives == PAIRED and all(key in record for key in layout.required) for layout in _LAYOUTS)


def _only(matches: list[_Layout]) -> _Layout:
    """The first of the matching layouts. Raises LineError if another one requires keys that the first doesn't, `text` apart."""
    first = matches[0]
    for other in matches[1:]:
        if not {*other.required} <= {*first.required, _WEAKEST}:
            raise LineError(
                ", ".join(other.required), f"the line has {', '.join(first.required)} too; leave out what is not to be trained"
            )
    return first


def _refuse_columns(record: dict[str, Any], layout: _Layout) -> None:
    """Raises LineError for columns without which the line would mean something else."""
    for name in _MEDIA:
        if record.get(name):
            raise LineError(name, "not supported, the model reads text; leave the example out")
    columns = ("label", "kto_tag") if layout.required == ("prompt", "completion") else ("kto_tag",)  # TRL's, LLaMA-Factory's
    for name in columns:
        if isinstance(record.get(name), bool) and layout.objectives != PAIRED:
            raise LineError(name, "completions that are only called good or bad are not supported; give pairs, or remove it")


def _require_response(turns: Sequence[Turn], place: str) -> None:
    if all(turn["role"] != "assistant" for turn in turns):
        raise LineError(place, "no assistant message; add one, it is what is trained")
    if turns[-1]["role"] != "assistant":
        raise LineError(
            f"{place}[{len(turns) - 1}].role",
            f"the last message must be the assistant's, this one is of role {turns[-1]['role']}; remove it or add a "
            "reply",
        )


# --- layouts, one function each ---


def _conversation(column: str) -> Encoder:
    return lambda record, reader: reader.chat(column, _system(record), reader.turns(record[column], column))


def _prompt_and(*columns: str) -> Encoder:
    return lambda record, reader: _responses(record["prompt"], "prompt", record, columns, reader)


def _alpaca(record: dict[str, Any], reader: LineReader) -> list[Encoded]:
    answer = {"role": "assistant", "content": read_text(record["output"], "output")}
    return reader.chat("output", (), [*_instruction(record), answer])


def _text(record: dict[str, Any], reader: LineReader) -> list[Encoded]:
    return [reader.text("text", read_text(record["text"], "text"))]


def _openai_preference(record: dict[str, Any], reader: LineReader) -> list[Encoded]:
    given = record["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise LineError("input", 'an object with a list "messages" is expected')
    for key, value in given.items():
        if key not in ("messages", *_BESIDE) and value is not None:
            raise LineError(f"input.{shown(key)}", "unknown key; remove it (known: messages, tools, parallel_tool_calls)")
    reader.take_tools(given, "input.")
    fields = ("preferred_output", "non_preferred_output")
    for name, value in (("input.messages", given["messages"]), *((name, record[name]) for name in fields)):
        if not isinstance(value, list):
            raise LineError(name, f"a list of messages is expected, got {kind(value)}")
    return _responses(given["messages"], "input.messages", record, fields, reader)


def _alpaca_preference(record: dict[str, Any], reader: LineReader) -> list[Encoded]:
    context, fields = _instruction(record), ("chosen", "rejected")
    answers = {name: {"role": "assistant", "content": read_text(record[name], name)} for name in fields}
    return [example for name in fields for example in reader.chat(name, context, [answers[name]])]


def _sharegpt_preference(record: dict[str, Any], reader: LineReader) -> list[Encoded]:
    context = [*_system(record), *reader.turns(record["conversations"], "conversations")]
    return [example for name in ("chosen", "rejected")
            for example in _continued(context, "conversations", _turns_of(record, name, reader), name, reader)]


def _implicit_preference(record: dict[str, Any], reader: LineReader) -> list[Encoded]:
    """Chosen and rejected begin with the prompt. It is the beginning that they share."""
    fields = ("chosen", "rejected")
    chosen, rejected = (record[name] for name in fields)
    if isinstance(chosen, str) and isinstance(rejected, str):
        texts = [read_text(record[name], name) for name in fields]
        start = _common_words(*texts)
        for name in _QUESTIONS:
            if record.get(name):
                raise LineError(name, "a column beside chosen and rejected that no layout has; call it prompt, or remove it")
        return [reader.completion(name, start, text[len(start) :]) for name, text in zip(fields, texts, strict=True)]
    both = [_turns_of(record, name, reader) for name in fields]
    shared = 0
    while shared < min(map(len, both)) - 1 and same_turns(both[0][shared : shared + 1], both[1][shared : shared + 1]):
        shared += 1
    while shared and both[0][shared - 1]["role"] == "assistant":
        shared -= 1
    if not shared:
        raise LineError(
            "chosen, rejected", "they have no first message in common; begin both with the prompt, or give a prompt"
        )
    return [example for name, turns in zip(fields, both, strict=True)
            for example in reader.chat(name, turns[:shared], turns[shared:])]


# --- parts of layouts ---


def _system(record: dict[str, Any]) -> list[Turn]:
    """The system turn of a line's column `system`, or nothing."""
    text = read_text(record.get("system") or "", "system")
    return [{"role": "system", "content": text}] if text else []


def _instruction(record: dict[str, Any]) -> list[Turn]:
    """The turns of an alpaca line before its answer. Raises LineError."""
    turns = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list):
        raise LineError("history", f"a list of [question, answer] is expected, got {kind(history)}")
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise LineError(f"history[{number}]", "[question, answer] is expected")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": read_text(text, f"history[{number}]")})
    parts = [read_text(record["instruction"], "instruction"), read_text(record.get("input") or "", "input")]
    question = "\n".join(part for part in parts if part)
    if not question:
        raise LineError("instruction", "it is empty, and there is no input; give a question")
    return [*turns, {"role": "user", "content": question}]


def _turns_of(record: dict[str, Any], name: str, reader: LineReader) -> list[Turn]:
    """The turns in a column that holds a list of messages or one message."""
    value = record[name]
    return reader.turns([value] if isinstance(value, dict) else value, name)


def _responses(
    prompt: object, prompt_field: str, record: dict[str, Any], fields: tuple[str, ...], reader: LineReader
) -> list[Encoded]:
    """One example per field: the prompt, which is not trained, and that field's response, which may repeat the prompt."""
    asked_in_text = isinstance(prompt, str) and all(isinstance(record[name], list) for name in fields)
    for name in fields:
        if not asked_in_text and isinstance(record[name], list) != isinstance(prompt, list):
            raise LineError(
                name, f"{kind(record[name])}, but {prompt_field} is {kind(prompt)}; give both as strings or both as lists of "
                "messages",
            )
    if asked_in_text:
        question = read_text(prompt, prompt_field)
        parts = [_split_at(question, prompt_field, reader.turns(record[name], name), name) for name in fields]
        for name, (before, _) in zip(fields, parts, strict=True):
            if not same_turns(before, parts[0][0]):
                raise LineError(name, f"what comes before the answer differs from {fields[0]}'s; give both the same prompt")
        return [example for name, (before, after) in zip(fields, parts, strict=True)
                for example in reader.chat(name, before, after)]
    if not isinstance(prompt, list):
        start = read_text(prompt, prompt_field)
        return [reader.completion(name, start, read_text(record[name], name)) for name in fields]
    context = reader.turns(prompt, prompt_field)
    for i, turn in enumerate(context):
        if turn.get("weight") == 1:
            raise LineError(f"{prompt_field}[{i}].weight", "nothing of a prompt is trained; remove it")
    return [example for name in fields
            for example in _continued(context, prompt_field, reader.turns(record[name], name), name, reader)]


def _continued(context: list[Turn], prompt_field: str, response: list[Turn], place: str, reader: LineReader) -> list[Encoded]:
    """Encodes a response in messages: either the answer alone, or a whole conversation that begins with the prompt."""
    _require_response(response, place)
    if context[-1]["role"] == "assistant":
        raise LineError(prompt_field, "the last message is the assistant's; end the prompt with another role")
    if response[0]["role"] == "assistant":
        return reader.chat(place, context, response)
    if same_turns(response[: len(context)], context) and len(response) > len(context):
        return reader.chat(place, context, response[len(context) :])
    if context[-1]["role"] == "user" or response[0]["role"] != "user":
        raise LineError(
            place, f"a whole conversation, but not one that begins with {prompt_field}; give the answer alone, or that start"
        )
    return reader.chat(place, context, response)


def _split_at(
    question: str, prompt_field: str, response: Sequence[Turn], place: str
) -> tuple[Sequence[Turn], Sequence[Turn]]:
    """(turns up to the question, turns after it). `response` is an answer to the question, or a conversation with it inside."""
    _require_response(response, place)
    if response[0]["role"] == "assistant":
        return [{"role": "user", "content": question}], response
    asked = [i for i, turn in enumerate(response) if turn["role"] == "user" and turn["content"].strip() == question.strip()]
    if not asked:
        raise LineError(place, f"a whole conversation, but not one that asks what {prompt_field} says; give the answer alone")
    return response[: asked[0] + 1], response[asked[0] + 1 :]


def _common_words(some: str, other: str) -> str:
    """The common beginning of two texts, up to the white space before the word in which they first differ."""
    pairs = zip(some, other, strict=False)
    start = some[: next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(some), len(other)))]
    return start[: max(start.rfind(" "), start.rfind("\n"), 0)]


_LAYOUTS = (
    _Layout(("sft",), ("messages",), ("system",), _conversation("messages")),
    _Layout(("sft",), ("conversations",), ("system",), _conversation("conversations")),
    _Layout(("sft",), ("prompt", "completion"), (), _prompt_and("completion")),
    _Layout(("sft",), ("instruction", "output"), ("input", "system", "history"), _alpaca),
    _Layout(("sft",), ("text",), (), _text),
    _Layout(PAIRED, ("input", "preferred_output", "non_preferred_output"), (), _openai_preference),
    _Layout(PAIRED, ("prompt", "chosen", "rejected"), (), _prompt_and("chosen", "rejected")),
    _Layout(PAIRED, ("conversations", "chosen", "rejected"), ("system",), _sharegpt_preference),
    _Layout(PAIRED, ("instruction", "chosen", "rejected"), ("input", "system", "history"), _alpaca_preference),
    _Layout(PAIRED, ("chosen", "rejected"), (), _implicit_preference),
)
"""The first layout that matches a line is used."""
