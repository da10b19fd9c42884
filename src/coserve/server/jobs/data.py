"""Reads a job's data before it is queued: what the engine would refuse is refused here.

    a tenant's jobs    one after the other
    a tenant's looks   before a job is created; MAX_TENANT_LOOKS of them wait or run, one after the other
    tenants            side by side, each on a thread; MAX_AT_WORK of them at work, in turns of SLICE_S

So a small file of one tenant is soon read, however large the files of others are. A turn ends between two lines, and so does a
reading that was cancelled. The engine reads the files once more when the job starts: it runs in another process and needs the
tokens, while this reading only looks for errors and counts.

Owns: the turns, and what is said about the data. Does not own: formats of lines (finetune/datasets.py), the figures of a look
(finetune/datacheck.py).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from coserve.config.settings import FinetuneConfig
from coserve.core import Group, InvalidRequest, NotFound
from coserve.finetune.datacheck import DataCheck, check_data
from coserve.finetune.datasets import FEW_EXAMPLES, Dataset, load_training
from coserve.server.locks import NameLocks
from coserve.server.work import Allowance
from coserve.text.tokenizer import ChatTokenizer

MAX_AT_WORK = 2
"""Threads that read at the same moment; the others wait for their turn."""
MAX_READINGS = 16
"""Tenants whose data are held in memory at once."""
SLICE_S = 0.2
"""Length of a turn, in seconds."""
MAX_TENANT_LOOKS = 4
MAX_LOOKS = 4
"""Tenants who look at data at the same moment; the others wait."""
LOOK_S = 10.0
"""Seconds after which a look ends with what it has read."""
LOOK_BYTES = 64 << 20
"""Of a file's beginning that a look reads at most."""
_LOOK_LINES, _LOOK_CHARS, _LOOK_PROBLEMS = 3, 6000, 50
"""Lines that a look shows, about how many characters of each example, and problems that it tells."""
Result = TypeVar("Result")


class DataFile(NamedTuple):
    """A file of a job. name: what its owner calls it. param: the field of the body that names it."""

    path: Path
    name: str
    param: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """num_examples: usable lines of the training file. summary, warnings: texts for events."""

    num_examples: int
    summary: str
    warnings: tuple[str, ...]


class _Stopped(Exception):
    """The reading was cancelled."""


class _Turns:
    """A number of places for threads at work; threads get them in the order in which they asked."""

    def __init__(self, num_places: int) -> None:
        self._lock, self._free = threading.Lock(), num_places
        self._waiting: deque[threading.Event] = deque()

    def begin(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        turn.wait()

    def end(self) -> None:
        """Gives the place to the thread that has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def give_way(self) -> None:
        """If a thread waits, gives it this place and waits for another one."""
        if self._waiting:
            self.end()
            self.begin()


class DataReader:
    """Reads data for jobs. It belongs to one event loop. chat_template: the source of the one to use; None: the model's."""

    def __init__(self, chat_template: str | None = None) -> None:
        self._chat_template = chat_template
        self._turns = _Turns(MAX_AT_WORK)
        self._threads = ThreadPoolExecutor(MAX_READINGS, "coserve-data")
        self._room = asyncio.Semaphore(MAX_READINGS)
        self._of_tenant = NameLocks()
        self._tasks: dict[str, asyncio.Task[DataReport]] = {}
        self._lookers = ThreadPoolExecutor(MAX_LOOKS, "coserve-look")
        self._looks = asyncio.Semaphore(MAX_LOOKS)
        self._looks_of_tenant = NameLocks()
        self._allowed = Allowance(
            MAX_TENANT_LOOKS, f"{MAX_TENANT_LOOKS} of your checks of data run already; try again when one has ended"
        )
        self._tokenizer: tuple[Path, ChatTokenizer] | None = None
        self._loading = threading.Lock()

    async def read(
        self, job: str, tenant: str, model: Path, config: FinetuneConfig, training: DataFile, validation: DataFile | None, *,
        begin: Callable[[], None] = lambda: None,
    ) -> DataReport | None:
        """A report, or None if the reading was cancelled.

        model: the base's directory. config: must have a max_length. begin: is called when the reading begins.

        Raises InvalidRequest that names file, line and field.
        """
        async def read_in_turn() -> DataReport:
            async with self._of_tenant.hold(tenant), self._room:
                begin()
                stopped = threading.Event()
                reading = self._threads.submit(
                    self._in_turns, stopped, lambda rest: self._report(model, config, training, validation, rest)
                )
                try:
                    return await asyncio.wrap_future(reading)
                finally:
                    stopped.set()

        task = self._tasks[job] = asyncio.create_task(read_in_turn())
        try:
            return await task
        except asyncio.CancelledError:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            return None
        finally:
            self._tasks.pop(job, None)

    async def look(self, tenant: str, model: Path, config: FinetuneConfig, file: DataFile) -> DataCheck:
        """What a file holds, or its beginning, of which nothing is kept. model, config: as for `read`.

        Raises InvalidRequest if the file is gone, CapacityError if the tenant has too many looks.
        """
        stopped = threading.Event()
        with self._allowed.hold(tenant):
            async with self._looks_of_tenant.hold(tenant), self._looks:
                looking = self._lookers.submit(self._in_turns, stopped, lambda rest: self._look(model, config, file, rest))
                try:
                    return await asyncio.wrap_future(looking)
                finally:
                    stopped.set()

    def cancel(self, job: str) -> None:
        """Ends the reading of a job's data, if it is being read or waits."""
        task = self._tasks.get(job)
        if task is not None:
            task.cancel()

    def _load_tokenizer(self, model: Path) -> ChatTokenizer:
        with self._loading:
            if self._tokenizer is None or self._tokenizer[0] != model:
                self._tokenizer = model, ChatTokenizer.load(model).or_template(self._chat_template)
            return self._tokenizer[1]

    def _in_turns(self, stopped: threading.Event, work: Callable[[Callable[[], None]], Result]) -> Result:
        """On a thread of its own: waits for a place, and gives way to others whenever a turn is over. work: is given what it
        has to call between two lines."""
        self._turns.begin()
        since = time.monotonic()

        def between_lines() -> None:
            nonlocal since
            if stopped.is_set():
                raise _Stopped
            if time.monotonic() - since > SLICE_S:
                self._turns.give_way()
                since = time.monotonic()

        try:
            return work(between_lines)
        finally:
            self._turns.end()

    def _look(self, model: Path, config: FinetuneConfig, file: DataFile, between_lines: Callable[[], None]) -> DataCheck:
        until = time.monotonic() + LOOK_S

        def on_line(_: float) -> bool:
            between_lines()
            return time.monotonic() > until

        assert config.max_length is not None
        try:
            return check_data(
                file.path, self._load_tokenizer(model), config, max_length=config.max_length, num_shown=_LOOK_LINES,
                max_problems=_LOOK_PROBLEMS, max_chars=_LOOK_CHARS, max_bytes=LOOK_BYTES, param=file.param, on_line=on_line,
            )
        except NotFound as error:
            raise InvalidRequest(f"{file.name} is no longer on disk", param=file.param) from error

    def _report(
        self, model: Path, config: FinetuneConfig, training: DataFile, validation: DataFile | None, on_line: Callable[[], None]
    ) -> DataReport:
        tokenizer = self._load_tokenizer(model)
        data = _load(training, tokenizer, config, on_line)
        warnings = [*_remarks(training, data)]
        if len(data.groups) < FEW_EXAMPLES:
            warnings.append(f"{training.name} has {len(data.groups)} examples only; at least {FEW_EXAMPLES} are better")
        if validation is not None:
            held_out = _load(validation, tokenizer, config, on_line)
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


def _load(file: DataFile, tokenizer: ChatTokenizer, config: FinetuneConfig, on_line: Callable[[], None]) -> Dataset:
    assert config.max_length is not None
    try:
        return load_training(
            file.path, tokenizer, config, max_length=config.max_length, param=file.param, on_line=on_line
        )
    except NotFound as error:
        raise InvalidRequest(f"{file.name} is no longer on disk", param=file.param) from error
    except InvalidRequest as error:  # the message begins with the name of the file on disk
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
