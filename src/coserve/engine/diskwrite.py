"""One write of a job in an engine. A thread runs it, and tries again while the disk refuses it; the engine's thread only looks.

Owns: when the next try is. Does not own: what is written, which refusals are temporary (finetune/disk.py), who waits (jobs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait

from coserve.finetune.disk import RETRY_S, refusal_of


class DiskWrite:
    """A write under way. refusal: why the disk refused the latest failed try, or None."""

    answer = None
    """The answer to the job's driver, as every VerbRun has one (verbs.py). A write has no result."""

    def __init__(self, thread: Executor, action: Callable[[], object]) -> None:
        self._thread, self._action = thread, action
        self.refusal: str | None = None
        self._again_s: float | None = None
        self._try: Future[object] = thread.submit(action)

    def wait(self, seconds: float) -> None:
        """Blocks until the write ends, at most `seconds`."""
        wait([self._try], seconds)

    def done(self) -> bool:
        """Whether the write has succeeded. RETRY_S after a refusal, starts the next try. Raises errors that trying again can't
        fix."""
        if self._again_s is not None:
            if time.monotonic() < self._again_s:
                return False
            self.retry()
        if not self._try.done():
            return False
        error = self._try.exception()
        if error is None:
            return True
        self.refusal = refusal_of(error)
        if self.refusal is None:
            raise error
        self._again_s = time.monotonic() + RETRY_S
        return False

    def retry(self) -> None:
        """Starts the next try now."""
        self._again_s = None
        self._try = self._thread.submit(self._action)
