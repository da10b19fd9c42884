"""Training files (JSON Lines) to groups of token ids with loss weights.

Owns: the accepted line formats, every check of a user's line, what happens to lines that are too long. Does not own:
tokenization and which tokens of a conversation are trained (coserve.tokenizer), order and batching.

Formats: OpenAI's fine-tuning API (https://platform.openai.com/docs/guides/fine-tuning) and TRL's "Dataset formats"
(https://huggingface.co/docs/trl/dataset_formats); `_FORMATS` lists them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coserve.config import Objective, TooLong
from coserve.core import Example, Group, InvalidRequest, NotFound
from coserve.tokenizer import ChatTokenizer

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Accepted roles and what the chat template is given."""
_UNSUPPORTED_ROLES = ("tool", "function")
_MESSAGE_KEYS = ("role", "content", "name", "weight")
_UNSUPPORTED_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "function_call", "refusal", "audio")
_TOOL_KEYS = ("tools", "parallel_tool_calls")
_SHOWN_KEYS = 8
_MARK = b"\xef\xbb\xbf"
_MAX_LINE_BYTES = 4 << 20
"""Tokenizing takes up to 250 times the memory of a text."""
_MAX_MESSAGES = 2048
"""Of one example: which tokens are trained is found in time that grows with its square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What became of a file."""

    num_lines: int
    """Lines that aren't blank."""
    num_dropped: int
    """Lines left out because an example is too long, or has no trained token left after the cut."""
    num_truncated: int
    """Lines kept with an example cut at the end."""
    num_tokens: int
    """Tokens of all examples; for DPO the prompt counts twice."""
    num_label_tokens: int
    """Tokens whose prediction is trained."""
    longest: int
    """Tokens of the longest example, after cutting."""
    digest: str
    """SHA-256 (hex) of the file's bytes and the settings that change the groups: equal digests, equal groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A training file, tokenized. groups[i].index is i: the position among the accepted lines."""

    groups: tuple[Group, ...]
    report: DatasetReport


class _Sequence(NamedTuple):
    """One encoded example: `field` is the line's key to blame, token_ids int64 [n], weights float32 [n]."""

    field: str
    token_ids: np.ndarray
    weights: np.ndarray


class _LineError(Exception):
    """`field`: what is wrong with it and what to do, without file and line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")


class _Format(NamedTuple):
    objective: Objective
    required: tuple[str, ...]
    optional: tuple[str, ...]
    encode: Callable[[dict[str, Any], ChatTokenizer], list[_Sequence]]


def load_groups(
    path: Path,
    tokenizer: ChatTokenizer,
    *,
    objective: Objective,
    max_length: int,
    too_long: TooLong,
    param: str = "training_file",
    on_line: Callable[[], None] = lambda: None,
) -> Dataset:
    """Reads a JSON Lines file; each line is one group: an example (sft) or (chosen, rejected) (dpo).

    Blank lines are skipped. An example of more than `max_length` tokens is an error, drops its group, or is cut at the
    end, as `too_long` says. Raises NotFound if there is no such file, InvalidRequest with a one-line message that names
    file, line and field if a line can't be used or none is left; both carry `param`. on_line: called before each line; what
    it raises ends the reading.
    """
    if not path.is_file():
        raise NotFound(f"no such file: {path}", param=param)
    data = path.read_bytes()
    groups: list[Group] = []
    num_lines = num_truncated = num_examples = 0
    for number, line in _lines(data):
        on_line()
        if not line:
            continue
        num_lines += 1
        try:
            sequences = _encode_line(line, tokenizer, objective)
            fitted = [_fit(sequence, max_length, too_long) for sequence in sequences]
        except (_LineError, InvalidRequest) as error:
            raise InvalidRequest(f"{path.name}, line {number}: {' '.join(str(error).split())}", param=param) from error
        kept = [sequence for sequence in fitted if sequence is not None]
        if len(kept) < len(sequences):
            continue
        num_truncated += any(len(new.token_ids) < len(old.token_ids) for new, old in zip(kept, sequences, strict=True))
        groups.append(_group(len(groups), num_examples, kept))
        num_examples += len(kept)
    if not num_lines:
        raise InvalidRequest(f"{path.name}: the file is empty; give one JSON object per line", param=param)
    if not groups:
        raise InvalidRequest(
            f"{path.name}: no usable example, all {num_lines} are longer than max_length {max_length} tokens; raise it",
            param=param,
        )
    examples = [example for group in groups for example in group.examples]
    report = DatasetReport(
        num_lines=num_lines,
        num_dropped=num_lines - len(groups),
        num_truncated=num_truncated,
        num_tokens=sum(example.num_tokens for example in examples),
        num_label_tokens=sum(int(np.count_nonzero(example.weights[1:])) for example in examples),
        longest=max(example.num_tokens for example in examples),
        digest=_digest(data, tokenizer, objective, max_length, too_long),
    )
    return Dataset(groups=tuple(groups), report=report)


def _group(index: int, first_example: int, sequences: list[_Sequence]) -> Group:
    return Group(
        index=index,
        examples=tuple(
            Example(index=first_example + i, token_ids=sequence.token_ids, weights=sequence.weights)
            for i, sequence in enumerate(sequences)
        ),
    )


def _digest(data: bytes, tokenizer: ChatTokenizer, objective: Objective, max_length: int, too_long: TooLong) -> str:
    settings = {
        "objective": objective,
        "max_length": max_length,
        "too_long": too_long,
        "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return hashlib.sha256(hashlib.sha256(data).digest() + json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines without white space around them, with their numbers from 1; a UTF-8 byte-order mark is skipped."""
    number, start = 0, len(_MARK) if data.startswith(_MARK) else 0
    while start <= len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        yield number, data[start:end].strip()
        start = end + 1


def _fit(sequence: _Sequence, max_length: int, too_long: TooLong) -> _Sequence | None:
    """The sequence within `max_length`, or None to drop it. Raises _LineError."""
    field, token_ids, weights = sequence
    if not weights[1:].any():
        raise _LineError(field, "no trained token; give an assistant message (of weight 1) or a completion with text")
    if len(token_ids) <= max_length:
        return sequence
    if too_long == "error":
        raise _LineError(
            field,
            f"{len(token_ids)} tokens, more than max_length {max_length}; shorten the example, raise max_length, or "
            "set too_long to drop or truncate",
        )
    if too_long == "drop" or not weights[1:max_length].any():
        return None
    return _Sequence(field, token_ids[:max_length], weights[:max_length])


def _encode_line(line: bytes, tokenizer: ChatTokenizer, objective: Objective) -> list[_Sequence]:
    """The examples of one line. Raises _LineError, or InvalidRequest from the tokenizer."""
    if len(line) > _MAX_LINE_BYTES:
        raise _LineError("line", f"{len(line)} bytes, more than {_MAX_LINE_BYTES}; split the example")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _LineError("encoding", f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise _LineError("JSON", f"{error.msg} at column {error.colno}; give one JSON object per line") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
        raise _LineError("JSON", f"{error}; give one plain JSON object per line") from error
    if not isinstance(record, dict):
        raise _LineError("line", f"a JSON object is expected, got {_kind(record)}")
    chosen = _match(record, objective)
    for key in record:
        if key not in chosen.required + chosen.optional:
            known = ", ".join(chosen.required + chosen.optional)
            raise _LineError(_shown(key), f"unknown key; remove it (known beside {chosen.required[0]!r}: {known})")
    _refuse_tools(record, "")
    return chosen.encode(record, tokenizer)


def _match(record: dict[str, Any], objective: Objective) -> _Format:
    """The format whose required keys the line has."""
    matches = [f for f in _FORMATS if all(key in record for key in f.required)]
    for f in matches:
        if f.objective == objective:
            return f
    wanted = " or ".join("{" + ", ".join(f.required) + "}" for f in _FORMATS if f.objective == objective)
    if matches:
        raise _LineError(
            ", ".join(matches[0].required),
            f"this is a line for objective {matches[0].objective}, but the objective is {objective}; give {wanted}, or "
            f"set the objective to {matches[0].objective}",
        )
    given = ", ".join([_shown(key) for key in list(record)[:_SHOWN_KEYS]] + ["..."] * (len(record) > _SHOWN_KEYS)) or "none"
    raise _LineError("keys", f"{given}: no known format; for objective {objective} give {wanted}")


def _encode_messages(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[_Sequence]:
    """OpenAI's and TRL's chat format."""
    messages = _messages(record["messages"], "messages")
    _require_response(messages, "messages")
    return [_Sequence("messages", *tokenizer.encode_training(messages))]


def _encode_prompt_completion(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[_Sequence]:
    """TRL's prompt-completion format, in strings or messages."""
    return _encode_responses(record["prompt"], "prompt", record, ("completion",), tokenizer)


def _encode_text(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[_Sequence]:
    """TRL's language modeling format."""
    return [_Sequence("text", *tokenizer.encode_text(_text(record["text"], "text")))]


def _encode_preference(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[_Sequence]:
    """TRL's preference format, in strings or messages."""
    return _encode_responses(record["prompt"], "prompt", record, ("chosen", "rejected"), tokenizer)


def _encode_openai_preference(record: dict[str, Any], tokenizer: ChatTokenizer) -> list[_Sequence]:
    """OpenAI's preference format: messages only."""
    given = record["input"]
    if not isinstance(given, dict) or "messages" not in given:
        raise _LineError("input", 'an object with a list "messages" is expected')
    for key in given:
        if key not in ("messages", *_TOOL_KEYS):
            raise _LineError(f"input.{_shown(key)}", "unknown key; remove it (known: messages)")
    _refuse_tools(given, "input.")
    fields = ("preferred_output", "non_preferred_output")
    for field, value in (("input.messages", given["messages"]), *((field, record[field]) for field in fields)):
        if not isinstance(value, list):
            raise _LineError(field, f"a list of messages is expected, got {_kind(value)}")
    return _encode_responses(given["messages"], "input.messages", record, fields, tokenizer)


def _encode_responses(
    prompt: object, prompt_field: str, record: dict[str, Any], fields: tuple[str, ...], tokenizer: ChatTokenizer
) -> list[_Sequence]:
    """One sequence per field: the prompt, not trained, and the response of that field."""
    for field in fields:
        if isinstance(record[field], list) != isinstance(prompt, list):
            raise _LineError(
                field,
                f"{_kind(record[field])}, but {prompt_field} is {_kind(prompt)}; give both as strings or both as lists "
                "of messages",
            )
    if not isinstance(prompt, list):
        start = _text(prompt, prompt_field)
        return [_Sequence(field, *tokenizer.encode_completion(start, _text(record[field], field))) for field in fields]
    context = _messages(prompt, prompt_field)
    for i, message in enumerate(context):
        if message.get("weight") == 1:
            raise _LineError(f"{prompt_field}[{i}].weight", "nothing of a prompt is trained; remove it")
        if message["role"] == "assistant":
            message["weight"] = 0
    if context[-1]["role"] == "assistant":
        raise _LineError(prompt_field, "the last message is the assistant's; end the prompt with another role")
    sequences = []
    for field in fields:
        response = _messages(record[field], field)
        _require_response(response, field)
        sequences.append(_Sequence(field, *tokenizer.encode_training(context + response)))
    return sequences


def _messages(value: object, field: str) -> list[dict[str, Any]]:
    """A checked list of messages, in the roles of the chat template. Raises _LineError."""
    if not isinstance(value, list):
        raise _LineError(field, f"a list of messages is expected, got {_kind(value)}")
    if not value:
        raise _LineError(field, "the list is empty; give at least one message")
    if len(value) > _MAX_MESSAGES:
        raise _LineError(field, f"{len(value)} messages, more than {_MAX_MESSAGES}; split the example")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: object, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _LineError(field, f"an object with role and content is expected, got {_kind(message)}")
    for key, value in message.items():
        if key in _UNSUPPORTED_MESSAGE_KEYS:
            if value:
                raise _LineError(f"{field}.{key}", "not supported yet; remove it or leave the example out")
        elif key not in _MESSAGE_KEYS:
            raise _LineError(f"{field}.{_shown(key)}", f"unknown key; remove it (known: {', '.join(_MESSAGE_KEYS)})")
    role = message.get("role")
    if role in _UNSUPPORTED_ROLES:
        raise _LineError(f"{field}.role", f"{role} messages are not supported yet; leave the example out")
    if not isinstance(role, str) or role not in _ROLES:
        got = "is missing" if "role" not in message else f"{_shown(role)} is unknown"
        raise _LineError(f"{field}.role", f"{got}; use system, user or assistant")
    checked = {"role": _ROLES[role], "content": _text(message.get("content"), f"{field}.content")}
    if message.get("name") is not None:
        checked["name"] = _text(message["name"], f"{field}.name")
    weight = message.get("weight")
    if weight is None:
        return checked
    if role != "assistant":
        raise _LineError(f"{field}.weight", f"only assistant messages have a weight, not {role} messages; remove it")
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _LineError(f"{field}.weight", f"0 or 1 is expected, got {_shown(weight)}")
    return {**checked, "weight": weight}


def _require_response(messages: list[dict[str, Any]], field: str) -> None:
    if all(message["role"] != "assistant" for message in messages):
        raise _LineError(field, "no assistant message; add one, it is what is trained")
    if messages[-1]["role"] != "assistant":
        raise _LineError(
            f"{field}[{len(messages) - 1}].role",
            f"the last message must be the assistant's, this one is of role {messages[-1]['role']}; remove it or add a "
            "reply",
        )


def _refuse_tools(record: dict[str, Any], prefix: str) -> None:
    for key in _TOOL_KEYS:
        if record.get(key):
            raise _LineError(prefix + key, "tools are not supported yet; remove it or leave the example out")


def _text(value: object, field: str) -> str:
    """Raises _LineError unless the value is a string that UTF-8 can write."""
    if not isinstance(value, str):
        raise _LineError(field, f"a string is expected, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _LineError(field, "holds half of a surrogate pair (\\ud800-\\udfff); write whole characters") from error
    return value


def _kind(value: object) -> str:
    """A JSON value's type, in JSON's words."""
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]


def _shown(value: object) -> str:
    """A user's value as JSON, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


_FORMATS = (
    _Format("sft", ("messages",), _TOOL_KEYS, _encode_messages),
    _Format("sft", ("prompt", "completion"), (), _encode_prompt_completion),
    _Format("sft", ("text",), (), _encode_text),
    _Format("dpo", ("input", "preferred_output", "non_preferred_output"), (), _encode_openai_preference),
    _Format("dpo", ("prompt", "chosen", "rejected"), (), _encode_preference),
)
