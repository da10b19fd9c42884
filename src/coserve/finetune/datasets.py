"""From training files (JSON Lines) to groups of token ids with loss weights.

Owns: the treatment of too long examples, the report on a file, its digest. Does not own: how lines are read (jsonlines.py), the
accepted layouts (layouts.py), tokens and which of a conversation are trained (text/tokenizer.py), batches (batches.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from coserve.config.settings import FinetuneConfig, TooLong
from coserve.core import Example, Group, InvalidRequest, NotFound, one_line
from coserve.finetune.jsonlines import LineError, numbered_lines, read_object, shown
from coserve.finetune.layouts import Encoded, LineReader
from coserve.text.tokenizer import ChatTokenizer, TextRules

_SHOWN_COLUMNS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What was read from a file."""

    num_lines: int
    """Lines that are not blank."""
    num_dropped: int
    """Lines left out because an example is too long, or would have no trained token after the cut."""
    num_truncated: int
    """Lines that are kept with an example cut at its end."""
    num_tokens: int
    """Tokens of all examples; for DPO the prompt counts twice."""
    num_label_tokens: int
    """Tokens whose prediction is trained."""
    longest: int
    """Tokens of the longest example, after cutting."""
    digest: str
    """SHA-256 (hex) of the file's bytes, the settings that change the groups, and the groups' token ids and weights."""
    warnings: tuple[str, ...] = ()
    """For the file's owner: ignored columns, conversations trained in part, control tokens read as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A tokenized training file. groups[i].index is i, the position among the accepted lines."""

    groups: tuple[Group, ...]
    report: DatasetReport


def load_training(
    path: Path, tokenizer: ChatTokenizer, config: FinetuneConfig, *, max_length: int, param: str = "training_file",
    on_line: Callable[[], None] = lambda: None,
) -> Dataset:
    """Reads a JSON Lines file with a job's settings. Each line is one group: an example (sft), or (chosen, rejected) (dpo).

    Blank lines are skipped. config.too_long says whether an example of more than `max_length` tokens is an error, drops its
    group, or is cut at its end. on_line: called before each line; may raise to stop the reading. param: the field that errors
    name. Raises NotFound if there is no such file, InvalidRequest with a one-line message that names file, line and field if a
    line can't be used or no example is left.
    """
    if not path.is_file():
        raise NotFound(f"no such file: {path}", param=param)
    data = path.read_bytes()
    now = None if config.template_date is None else datetime.fromisoformat(config.template_date)
    rules = TextRules(allow_control_tokens=config.allow_control_tokens, now=now)
    reader = LineReader(tokenizer=tokenizer, objective=config.objective, rules=rules, system_prompt=config.system_prompt)
    groups: list[Group] = []
    num_lines = num_truncated = num_examples = 0
    for sequences, fitted in _read(path.name, data, reader, max_length, config.too_long, param, on_line):
        num_lines += 1
        kept = [sequence for sequence in fitted if sequence is not None]
        if len(kept) < len(sequences):
            continue
        num_truncated += any(len(new.token_ids) < len(old.token_ids) for new, old in zip(kept, sequences, strict=True))
        groups.append(Group(index=len(groups), examples=tuple(
            Example(index=num_examples + i, token_ids=sequence.token_ids, weights=sequence.weights)
            for i, sequence in enumerate(kept)
        )))
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
        digest=_digest(data, examples, tokenizer, config, max_length),
        warnings=tuple(_warnings(reader, num_lines)),
    )
    return Dataset(groups=tuple(groups), report=report)


def _read(
    name: str, data: bytes, reader: LineReader, max_length: int, too_long: TooLong, param: str, on_line: Callable[[], None]
) -> Iterator[tuple[list[Encoded], list[Encoded | None]]]:
    """Per line: its examples, and the same fitted to `max_length` by `_fit`. Raises InvalidRequest, naming file and line."""
    place = name
    try:
        for number, line in numbered_lines(data):
            on_line()
            if not line:
                continue
            place = f"{name}, line {number}"
            sequences = reader.read(read_object(line))
            yield sequences, [_fit(sequence, max_length, too_long) for sequence in sequences]
    except (LineError, InvalidRequest) as error:
        raise InvalidRequest(f"{place}: {one_line(error)}", param=param) from error


def _warnings(reader: LineReader, num_lines: int) -> Iterator[str]:
    if reader.ignored:
        names = [shown(name) for name in reader.ignored]
        more = [f"and {len(names) - _SHOWN_COLUMNS} more"] if len(names) > _SHOWN_COLUMNS else []
        yield f"columns that no layout has are ignored: {', '.join([*names[:_SHOWN_COLUMNS], *more])}"
    if reader.last_turn_only:
        yield (
            f"{reader.last_turn_only} of {num_lines} conversations are trained in their last assistant turn only: the model's "
            "chat template renders earlier turns differently inside a conversation than at its end; to train them too, write "
            "one example per turn"
        )
    if reader.control_texts:
        yield (
            f"{reader.control_texts} of {num_lines} lines hold control tokens written out in their texts, which are trained as "
            "plain text; with allow_control_tokens they are control tokens"
        )


def _digest(data: bytes, examples: list[Example], tokenizer: ChatTokenizer, config: FinetuneConfig, max_length: int) -> str:
    settings = {
        "objective": config.objective, "max_length": max_length, "too_long": config.too_long,
        "chat_template": tokenizer.chat_template, "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_token_id,
    }
    digest = hashlib.sha256(hashlib.sha256(data).digest() + json.dumps(settings, sort_keys=True).encode())
    for example in examples:
        digest.update(np.int64(example.num_tokens).tobytes() + example.token_ids.tobytes() + example.weights.tobytes())
    return digest.hexdigest()


def _fit(sequence: Encoded, max_length: int, too_long: TooLong) -> Encoded | None:
    """The sequence, cut to `max_length` if too long, or None to drop its group. Raises LineError."""
    field, token_ids, weights = sequence
    if not weights[1:].any():
        raise LineError(field, "no trained token; give an assistant message (of weight 1) or a completion with text")
    if len(token_ids) <= max_length:
        return sequence
    if too_long == "error":
        raise LineError(
            field,
            f"{len(token_ids)} tokens, more than max_length {max_length}; shorten the example, raise max_length, or "
            "set too_long to drop or truncate",
        )
    if too_long == "drop" or not weights[1:max_length].any():
        return None
    return Encoded(field, token_ids[:max_length], weights[:max_length])
