"""Reads a job's data before it is queued, in a thread, one job at a time: what the engine would refuse is refused here.

Owns: the tokenizer for it, what is said about the data. Does not own: formats of lines (finetune/datasets.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coserve.config import FinetuneConfig
from coserve.core import Group, InvalidRequest, NotFound
from coserve.finetune.datasets import Dataset, load_training
from coserve.tokenizer import ChatTokenizer

FEW_EXAMPLES = 10
"""OpenAI's least number; fewer are allowed here, with a warning."""


class DataFile(NamedTuple):
    """A file of a job. name: what its owner calls it; param: the field of the create body."""

    path: Path
    name: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """num_examples: usable lines of the training file; summary, warnings: for events."""

    num_examples: int
    summary: str
    warnings: tuple[str, ...]


class DataReader:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._tokenizer: tuple[Path, ChatTokenizer] | None = None

    async def read(
        self, model: Path, config: FinetuneConfig, training: DataFile, validation: DataFile | None
    ) -> DataReport:
        """model: the base's directory; config: with max_length. Raises InvalidRequest that names file, line and field."""
        async with self._turn:
            return await asyncio.to_thread(self._read, model, config, training, validation)

    def _read(self, model: Path, config: FinetuneConfig, training: DataFile, validation: DataFile | None) -> DataReport:
        if self._tokenizer is None or self._tokenizer[0] != model:
            self._tokenizer = model, ChatTokenizer.load(model)
        tokenizer = self._tokenizer[1]
        data = _load(training, tokenizer, config)
        warnings = [*_remarks(training, data)]
        if len(data.groups) < FEW_EXAMPLES:
            warnings.append(f"{training.name} has {len(data.groups)} examples only; at least {FEW_EXAMPLES} are better")
        if validation is not None:
            held_out = _load(validation, tokenizer, config)
            warnings += _remarks(validation, held_out)
            known = {_content(group) for group in data.groups}
            shared = sum(_content(group) in known for group in held_out.groups)
            if shared:
                warnings.append(f"{shared} of {len(held_out.groups)} examples of {validation.name} are in {training.name} too")
        report = data.report
        return DataReport(
            num_examples=len(data.groups), warnings=tuple(warnings),
            summary=f"{len(data.groups)} examples, {report.num_tokens} tokens, {report.num_label_tokens} of them trained",
        )


def _load(file: DataFile, tokenizer: ChatTokenizer, config: FinetuneConfig) -> Dataset:
    assert config.max_length is not None
    try:
        return load_training(file.path, tokenizer, config, max_length=config.max_length, param=file.param)
    except NotFound as error:
        raise InvalidRequest(f"{file.name} is no longer on disk", param=file.param) from error
    except InvalidRequest as error:  # it knows the file by its name on disk
        message = str(error)
        if message.startswith(file.path.name):
            message = file.name + message.removeprefix(file.path.name)
        raise InvalidRequest(message, param=file.param) from error


def _remarks(file: DataFile, data: Dataset) -> Iterable[str]:
    for count, what in ((data.report.num_dropped, "left out"), (data.report.num_truncated, "cut")):
        if count:
            yield f"{count} too long examples of {file.name} were {what}"
    for warning in data.report.warnings:
        yield f"{file.name}: {warning}"


def _content(group: Group) -> bytes:
    return b"|".join(example.token_ids.tobytes() for example in group.examples)
