"""A finetuning job as whoever started it sees it: how far it is, what can be done with it, how it ended.

Owns: the handle, which any thread may use. Does not own: running the job (jobs.py).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from coserve.core import CoserveError, JobFailed
from coserve.finetune.job import JobEvent, StepRow


@dataclass(frozen=True, slots=True, kw_only=True)
class JobProgress:
    """trained_tokens: forward-token equivalents of the units that have run, forward and backward counting half each."""

    status: str
    step: int
    num_steps: int
    trained_tokens: float
    last: StepRow | None


def _nothing(action: str) -> None:
    """What an ended job does when it is asked for something."""


class JobHandle:
    """A job in an engine. status: running, paused, succeeded, failed or cancelled."""

    def __init__(self, name: str, directory: Path, act: Callable[[str], None]) -> None:
        self.name, self.directory, self.label = name, directory, name
        self.status = "running"
        self.error: CoserveError | None = None
        self.events: list[JobEvent] = []
        self.step = self.num_steps = 0
        self.trained_tokens = 0.0
        self.last: StepRow | None = None
        self._act = act
        self._done = threading.Event()
        self._watchers: list[Callable[[JobHandle], None]] = []
        self._lock = threading.Lock()

    @property
    def finished(self) -> bool:
        return self._done.is_set()

    def progress(self) -> JobProgress:
        """Where the job is."""
        return JobProgress(
            status=self.status, step=self.step, num_steps=self.num_steps, trained_tokens=self.trained_tokens, last=self.last
        )

    def pause(self) -> None:
        """No more units after the present iteration; the job's memory stays."""
        if not self.finished:
            self._act("pause")

    def resume(self) -> None:
        """Goes on where it was paused."""
        if not self.finished:
            self._act("resume")

    def cancel(self) -> None:
        """Ends the job; checkpoints that are written stay."""
        if not self.finished:
            self._act("cancel")

    def result(self, timeout: float | None = None) -> Path:
        """Waits for the end; the tuned adapter's directory. Raises JobFailed, or TimeoutError after `timeout` seconds. For
        engines with a thread of their own."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"job {self.name} is still {self.status}")
        if self.error is not None:
            raise self.error
        if self.status == "cancelled":
            raise JobFailed(f"job {self.name} was cancelled")
        return self.directory

    def listen(self, event: JobEvent) -> None:
        """Takes an event of the job."""
        self.events.append(event)
        if event.row is not None:
            self.last, self.step, self.num_steps = event.row, event.row.step, event.num_steps

    def watch(self, listener: Callable[[JobHandle], None]) -> None:
        """Calls `listener` once when the job ends, from the engine's thread; now, if it has ended."""
        with self._lock:
            if not self.finished:
                self._watchers.append(listener)
                return
        listener(self)

    def close(self, status: str, error: CoserveError | None) -> None:
        """The engine ends the job."""
        with self._lock:
            self.status, self.error = status, error
            self._done.set()
        self._act = _nothing  # it holds the engine
        for watcher in self._watchers:
            watcher(self)
