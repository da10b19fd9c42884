"""What a file of training data holds, before a job trains on it: counts, lengths, every problem, and what would be trained.

Owns: a reading of the whole file that goes on behind a bad line, the figures, the text of an example by what is trained. Does
not own: how a line is read (layouts.py, datasets.py), how the result is shown (coserve.cli, coserve.server).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from coserve.config.settings import PAIRED, FinetuneConfig, Objective
from coserve.core import InvalidRequest, one_line
from coserve.finetune.datasets import FEW_EXAMPLES, fit_examples, make_reader, read_file, read_line, remarks
from coserve.finetune.jsonlines import LineError, numbered_lines, read_object
from coserve.finetune.layouts import Encoded, Examples, LineReader, is_paired
from coserve.text.detokenizer import IncrementalDetokenizer
from coserve.text.tokenizer import ChatTokenizer

MAX_PROBLEMS = 100
"""Problems that are kept; more are counted."""
_GUESSED_LINES = 1000
"""Lines that are looked at for the objective."""
_LEFT_OUT = " [...] "
_SHOWN_OF_LINE = 8
"""Examples of a line that are shown, where it has more."""


class LineProblem(NamedTuple):
    """Why a line can't be used. line: from 1; None: it is about the whole file."""

    line: int | None
    message: str


class TrainedPiece(NamedTuple):
    """A part of an example's text, as the model's tokens have it. trained: whether these tokens carry loss."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownExample:
    """An example, readable. line: from 1. part: the line's field that it trains (messages, chosen). number: which of the line's
    examples it is, from 1. num_of_line: how many these are."""

    line: int
    part: str
    number: int
    num_of_line: int
    num_tokens: int
    num_trained: int
    pieces: tuple[TrainedPiece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of examples in tokens, uncut; for DPO chosen and rejected count apart. p95: 95 of 100 examples are at most as long.
    trained: tokens that carry loss."""

    min: int
    median: int
    p95: int
    max: int
    total: int
    trained: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCheck:
    """What a file holds.

    share: how much of the file was read, by bytes; 1: all. num_lines: that aren't blank. num_usable: examples (for DPO pairs)
    that a job would train on. layouts: lines by layout, named by its keys. lengths: None where no line could be read.
    num_too_long: examples of more than max_length tokens. warnings: what the file's owner should know. problems: the first of
    num_problems, for which a job would be refused. shown: the first examples.
    """

    objective: Objective
    share: float
    num_lines: int
    num_usable: int
    layouts: dict[str, int]
    lengths: Lengths | None
    max_length: int
    num_too_long: int
    warnings: tuple[str, ...]
    problems: tuple[LineProblem, ...]
    num_problems: int
    shown: tuple[ShownExample, ...]


@dataclass(slots=True, kw_only=True)
class _Checking:
    """A file that is being read. num_shown, max_problems, max_chars: as for `check_data`. digests: of the examples' tokens, to
    find those that are there twice."""

    reader: LineReader
    config: FinetuneConfig
    max_length: int
    num_shown: int
    max_problems: int
    max_chars: int | None
    num_lines: int = 0
    num_usable: int = 0
    num_too_long: int = 0
    num_same: int = 0
    num_problems: int = 0
    num_trained: int = 0
    lengths: list[int] = field(default_factory=list)
    problems: list[LineProblem] = field(default_factory=list)
    shown: list[ShownExample] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)

    def take(self, number: int, line: bytes) -> None:
        """Reads a line that isn't blank."""
        self.num_lines += 1
        try:
            groups = read_line(self.reader, line)
        except (LineError, InvalidRequest) as error:
            self.fault(number, one_line(error))
            return
        for examples in groups:
            self._count(number, examples)
        if len({example.line for example in self.shown}) < self.num_shown:
            self.shown += self._show(number, [sequence for examples in groups for sequence in examples])

    def fault(self, line: int | None, message: str) -> None:
        self.num_problems += 1
        if len(self.problems) < self.max_problems:
            self.problems.append(LineProblem(line, message))

    def result(self, share: float) -> DataCheck:
        if not self.num_problems and not self.num_lines:
            self.fault(None, "the file is empty; give one JSON object per line")
        elif not self.num_problems and not self.num_usable:
            self.fault(None, f"no usable example, all {self.num_too_long} are longer than max_length {self.max_length} tokens; "
                             "raise it")
        return DataCheck(
            objective=self.config.objective, share=share, num_lines=self.num_lines, num_usable=self.num_usable,
            layouts=dict(self.reader.layouts), lengths=self._lengths(), max_length=self.max_length,
            num_too_long=self.num_too_long, warnings=tuple(self._warnings(share)), problems=tuple(self.problems),
            num_problems=self.num_problems, shown=tuple(self.shown),
        )

    def _count(self, number: int, examples: Examples) -> None:
        self.lengths += [len(sequence.token_ids) for sequence in examples]
        self.num_trained += sum(map(_num_trained, examples))
        self.num_too_long += any(len(sequence.token_ids) > self.max_length for sequence in examples)
        digest = _digest(examples)
        self.num_same += digest in self.digests
        self.digests.add(digest)
        try:
            self.num_usable += fit_examples(examples, self.max_length, self.config.too_long)[0] is not None
        except LineError as error:
            self.fault(number, one_line(error))

    def _show(self, line: int, sequences: Sequence[Encoded]) -> Iterator[ShownExample]:
        for number, sequence in enumerate(sequences[:_SHOWN_OF_LINE], 1):
            pieces = split_pieces(self.reader.tokenizer, sequence.token_ids, sequence.weights)
            yield ShownExample(
                line=line, part=sequence.field, number=number, num_of_line=len(sequences),
                num_tokens=len(sequence.token_ids), num_trained=_num_trained(sequence),
                pieces=pieces if self.max_chars is None else _shortened(pieces, self.max_chars),
            )

    def _lengths(self) -> Lengths | None:
        lengths = sorted(self.lengths)
        if not lengths:
            return None
        return Lengths(
            min=lengths[0], median=lengths[(len(lengths) - 1) // 2], p95=lengths[math.ceil(0.95 * len(lengths)) - 1],
            max=lengths[-1], total=sum(lengths), trained=self.num_trained,
        )

    def _warnings(self, share: float) -> Iterator[str]:
        yield from remarks(self.reader, self.num_lines)
        if self.num_same:
            yield f"{_examples(self.num_same)} the same as an earlier one"
        if self.num_too_long and self.config.too_long != "error":
            done = "left out" if self.config.too_long == "drop" else "cut at the end, or left out if nothing trained remains"
            yield f"{_examples(self.num_too_long)} too long and will be {done}"
        if self.num_usable < FEW_EXAMPLES and self.num_lines and share == 1:
            yield f"{self.num_usable} usable examples only; at least {FEW_EXAMPLES} are better"


def check_data(
    path: Path, tokenizer: ChatTokenizer, config: FinetuneConfig, *, max_length: int, num_shown: int = 0,
    max_problems: int = MAX_PROBLEMS, max_chars: int | None = None, max_bytes: int | None = None,
    param: str = "training_file", on_line: Callable[[float], bool | None] = lambda _: None,
) -> DataCheck:
    """Reads a JSON Lines file as a job with these settings would.

    num_shown: lines whose examples are shown. max_problems: that are kept. max_chars: of an example that is shown, about;
    None: all. max_bytes: of the file's beginning that are read; None: all. on_line: called before each line with the share of
    the file that has been read; the reading ends where it returns true, and it may raise. Raises NotFound if there is no such
    file.
    """
    data, size = _beginning(path, param, max_bytes)
    checking = _Checking(
        reader=make_reader(tokenizer, config), config=config, max_length=max_length, num_shown=num_shown,
        max_problems=max_problems, max_chars=max_chars,
    )
    position = 0
    try:
        for number, line in numbered_lines(data):
            if on_line(min(1.0, position / size)):
                break
            position += len(line) + 1
            if line:
                checking.take(number, line)
        else:
            position = len(data)
    except LineError as error:  # the file isn't UTF-8 at all
        checking.fault(None, one_line(error))
        position = size
    return checking.result(min(1.0, position / size))


def _beginning(path: Path, param: str, max_bytes: int | None) -> tuple[bytes, int]:
    """A file's bytes, or its first lines within max_bytes, and how many bytes count as all of it. Raises NotFound."""
    if max_bytes is None or not path.is_file():
        data = read_file(path, param)
        return data, max(1, len(data))
    with path.open("rb") as file:
        data, size = file.read(max_bytes), max(1, path.stat().st_size)
    return (data if len(data) >= size else data[: data.rfind(b"\n") + 1] or data), size


def guess_objective(path: Path) -> Objective:
    """The objective that a file's first readable line is for: dpo if it is a pair, else sft."""
    with path.open("rb") as file:
        for line in itertools.islice(file, _GUESSED_LINES):
            try:
                return PAIRED[0] if is_paired(read_object(line.strip().removeprefix(b"\xef\xbb\xbf"))) else "sft"
            except LineError:
                continue
    return "sft"


def split_pieces(tokenizer: ChatTokenizer, token_ids: np.ndarray, weights: np.ndarray) -> tuple[TrainedPiece, ...]:
    """An example's text in pieces, control tokens written out. token_ids: int64 [n]; weights: float32 [n].

    The first token carries no loss, whatever its weight, since nothing predicts it. A character of several tokens counts as
    trained if one of them carries loss.
    """
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    shown: list[tuple[str, bool]] = []
    waiting = False
    for place, (token, weight) in enumerate(zip(token_ids.tolist(), weights.tolist(), strict=True)):
        text, waiting = detokenizer.push(token), waiting or (place > 0 and weight > 0)
        if text:
            shown.append((text, waiting))
            waiting = False
    if rest := detokenizer.finish():
        shown.append((rest, waiting))
    runs = itertools.groupby(shown, key=lambda pair: pair[1])
    return tuple(TrainedPiece("".join(text for text, _ in run), trained) for trained, run in runs)


def _examples(count: int) -> str:
    return "1 example is" if count == 1 else f"{count} examples are"


def _num_trained(sequence: Encoded) -> int:
    return int(np.count_nonzero(sequence.weights[1:]))


def _shortened(pieces: Sequence[TrainedPiece], max_chars: int) -> tuple[TrainedPiece, ...]:
    """The pieces in about max_chars characters in all: the middle of long ones is left out, and the last ones where there are
    very many."""
    kept = pieces[: max(1, max_chars // 80)]
    most = max(40, max_chars // max(1, len(kept)))
    spare = sum(max(0, most - len(piece.text)) for piece in kept)
    long = sum(len(piece.text) > most for piece in kept)
    most += spare // long if long else 0
    shorter = [TrainedPiece(_middle_out(piece.text, most), piece.trained) for piece in kept]
    return tuple([*shorter, TrainedPiece(_LEFT_OUT, False)] if len(kept) < len(pieces) else shorter)


def _middle_out(text: str, most: int) -> str:
    half = most // 2
    return text if len(text) <= most else f"{text[:half]}{_LEFT_OUT}{text[-half:]}"


def _digest(examples: Examples) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for sequence in examples:
        digest.update(np.int64(len(sequence.token_ids)).tobytes() + sequence.token_ids.tobytes() + sequence.weights.tobytes())
    return digest.digest()


def as_json(check: DataCheck) -> dict[str, object]:
    """The check as JSON values."""
    return {**dataclasses.asdict(check), "problems": [problem._asdict() for problem in check.problems], "shown": [
        {**dataclasses.asdict(example), "pieces": [piece._asdict() for piece in example.pieces]} for example in check.shown
    ]}
