"""A finetuning job as its caller sees it: how far it is, what can be done with it, how it ended.

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
    """trained_tokens: a token's forward through all layers counts half, its backward the other half. last: newest metrics."""

    status: str
    step: int
    num_steps: int
    trained_tokens: float
    last: StepRow | None


class JobHandle:
    """A job in an engine. status: running, paused, succeeded, failed, cancelled or handed_over."""

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
        """How far the job is."""
        return JobProgress(
            status=self.status, step=self.step, num_steps=self.num_steps, trained_tokens=self.trained_tokens, last=self.last
        )

    def pause(self) -> None:
        """Stops the job after the present iteration. It keeps its memory."""
        self._act("pause")

    def resume(self) -> None:
        """Continues a paused job."""
        self._act("resume")

    def cancel(self) -> None:
        """Ends the job. Written checkpoints stay."""
        self._act("cancel")

    def hand_over(self) -> None:
        """Ends the job's run at the end of its present step, at once if it is paused, with a checkpoint that another engine can
        resume it from."""
        self._act("hand_over")

    def result(self, timeout: float | None = None) -> Path:
        """Blocks until the job ends; returns the tuned adapter's directory. The engine needs a thread of its own. Raises the
        job's error, JobFailed if it was cancelled or handed over, TimeoutError after `timeout` seconds."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"job {self.name} is still {self.status}")
        if self.error is not None:
            raise self.error
        if self.status != "succeeded":
            raise JobFailed(f"job {self.name} was {self.status.replace('_', ' ')}")
        return self.directory

    def listen(self, event: JobEvent) -> None:
        """Records an event of the job."""
        self.events.append(event)
        if event.row is not None:
            self.last, self.step, self.num_steps = event.row, event.row.step, event.num_steps

    def watch(self, listener: Callable[[JobHandle], None]) -> None:
        """Calls `listener` once, from the engine's thread, when the job ends; at once if it has ended."""
        with self._lock:
            if not self.finished:
                self._watchers.append(listener)
                return
        listener(self)

    def close(self, status: str, error: CoserveError | None) -> None:
        """Records the job's end. The engine calls this."""
        self._act = lambda action: None  # the old one would keep the engine in memory
        with self._lock:
            self.status, self.error = status, error
            self._done.set()
        for watcher in self._watchers:
            watcher(self)
