"""From training files (JSON Lines) to groups of token ids with loss weights.

Owns: the treatment of too long examples, the report on a file, its digest. Does not own: how lines are read (jsonlines.py), the
accepted layouts (layouts.py), tokens and which of a conversation are trained (text/examples.py), batches (batches.py).
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
from coserve.finetune.layouts import Encoded, Examples, LineReader
from coserve.text.tokenizer import ChatTokenizer, TextRules

FEW_EXAMPLES = 10
"""OpenAI's least number; fewer are allowed here, with a warning."""
_SHOWN_COLUMNS = 20
_REWRITTEN = "the model's chat template renders earlier turns differently inside a conversation than at its end"
_REMARKS = {
    "several":
        f"conversations became several examples, each of the turns that can be trained in one text: {_REWRITTEN}; a turn of "
        "weight 0 makes none",
    "last_turn_only":
        f"conversations are trained in their last assistant turn only: {_REWRITTEN}; to train them too, write one example per "
        "turn",
    "lost_thoughts":
        "conversations have reasoning_content that isn't trained, since the model's chat template doesn't write it; to train "
        "it, write it into content",
    "no_thoughts":
        "conversations have an answer without a thought, though the prompt opens one: the model learns to end its thought at "
        "once; to train thoughts, give reasoning_content",
    "unlisted": "lines have calls of tools that aren't among their tools",
    "control_texts":
        "lines hold control tokens written out in their texts, which are trained as plain text; with allow_control_tokens they "
        "are control tokens",
}
"""{what LineReader counts: what is said about it, behind the number}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """What was read from a file."""

    num_lines: int
    """Lines that are not blank."""
    num_dropped: int
    """Examples (for DPO pairs) left out because they are too long, or would have no trained token after the cut."""
    num_truncated: int
    """Examples (for DPO pairs) that are kept, cut at the end."""
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
    """A tokenized training file. groups[i].index is i, the position among the accepted examples, or for DPO pairs."""

    groups: tuple[Group, ...]
    report: DatasetReport


def load_training(
    path: Path, tokenizer: ChatTokenizer, config: FinetuneConfig, *, max_length: int, param: str = "training_file",
    on_line: Callable[[], None] = lambda: None,
) -> Dataset:
    """Reads a JSON Lines file with a job's settings. A line is one group: an example (sft), or (chosen, rejected) (dpo). A
    conversation that can't be trained in one example is several groups (sft).

    Blank lines are skipped. config.too_long says whether an example of more than `max_length` tokens is an error, drops its
    group, or is cut at its end. on_line: called before each line; may raise to stop the reading. param: the field that errors
    name. Raises NotFound if there is no such file, InvalidRequest with a one-line message that names file, line and field if a
    line can't be used or no example is left.
    """
    data, reader = read_file(path, param), make_reader(tokenizer, config)
    groups: list[Group] = []
    num_lines = num_truncated = num_dropped = num_examples = 0
    for line in _read(path.name, data, reader, param, on_line, max_length, config.too_long):
        num_lines += 1
        for fitted, is_cut in line:
            num_dropped += fitted is None
            num_truncated += is_cut
            if fitted is not None:
                groups.append(Group(index=len(groups), examples=tuple(
                    Example(index=num_examples + i, token_ids=sequence.token_ids, weights=sequence.weights)
                    for i, sequence in enumerate(fitted)
                )))
                num_examples += len(fitted)
    if not num_lines:
        raise InvalidRequest(f"{path.name}: the file is empty; give one JSON object per line", param=param)
    if not groups:
        raise InvalidRequest(
            f"{path.name}: no usable example, all {num_dropped} are longer than max_length {max_length} tokens; raise it",
            param=param,
        )
    examples = [example for group in groups for example in group.examples]
    report = DatasetReport(
        num_lines=num_lines,
        num_dropped=num_dropped,
        num_truncated=num_truncated,
        num_tokens=sum(example.num_tokens for example in examples),
        num_label_tokens=sum(int(np.count_nonzero(example.weights[1:])) for example in examples),
        longest=max(example.num_tokens for example in examples),
        digest=_digest(data, examples, tokenizer, config, max_length),
        warnings=tuple(remarks(reader, num_lines)),
    )
    return Dataset(groups=tuple(groups), report=report)


def read_file(path: Path, param: str) -> bytes:
    """A file's bytes. Raises NotFound."""
    if not path.is_file():
        raise NotFound(f"no such file: {path}", param=param)
    return path.read_bytes()


def make_reader(tokenizer: ChatTokenizer, config: FinetuneConfig) -> LineReader:
    """A reader for a file with a job's settings."""
    now = None if config.template_date is None else datetime.fromisoformat(config.template_date)
    rules = TextRules(allow_control_tokens=config.allow_control_tokens, now=now)
    return LineReader(tokenizer=tokenizer, objective=config.objective, rules=rules, system_prompt=config.system_prompt)


def _read(
    name: str, data: bytes, reader: LineReader, param: str, on_line: Callable[[], None], max_length: int, too_long: TooLong
) -> Iterator[list[tuple[Examples | None, bool]]]:
    """Per line: what `fit_examples` makes of its examples. Raises InvalidRequest, naming file and line."""
    place = name
    try:
        for number, line in numbered_lines(data):
            on_line()
            if not line:
                continue
            place = f"{name}, line {number}"
            yield [fit_examples(examples, max_length, too_long) for examples in read_line(reader, line)]
    except (LineError, InvalidRequest) as error:
        raise InvalidRequest(f"{place}: {one_line(error)}", param=param) from error


def read_line(reader: LineReader, line: bytes) -> list[Examples]:
    """The examples of a line that isn't blank. Raises LineError, InvalidRequest, without file and line."""
    try:
        found = reader.read(read_object(line))
    except RecursionError as error:
        raise LineError("line", "objects and lists are nested too deeply; make them flatter") from error
    for sequence in (sequence for examples in found for sequence in examples):
        if not sequence.weights[1:].any():
            raise LineError(
                sequence.field, "no trained token; give an assistant message (of weight 1) or a completion with text"
            )
    return found


def fit_examples(examples: Examples, max_length: int, too_long: TooLong) -> tuple[Examples | None, bool]:
    """An example or a pair, cut to `max_length` if too long, or None to drop it; and whether it was cut. Raises LineError."""
    fitted = [_fit(sequence, max_length, too_long) for sequence in examples]
    kept = tuple(sequence for sequence in fitted if sequence is not None)
    if len(kept) < len(examples):
        return None, False
    return kept, any(len(new.token_ids) < len(old.token_ids) for new, old in zip(kept, examples, strict=True))


def remarks(reader: LineReader, num_lines: int) -> Iterator[str]:
    """What a file's owner should know about its lines."""
    if reader.ignored:
        names = [shown(name) for name in reader.ignored]
        more = [f"and {len(names) - _SHOWN_COLUMNS} more"] if len(names) > _SHOWN_COLUMNS else []
        yield f"columns that no layout has are ignored: {', '.join([*names[:_SHOWN_COLUMNS], *more])}"
    for name, remark in _REMARKS.items():
        if reader.counts[name]:
            yield f"{reader.counts[name]} of {num_lines} {remark}"


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
