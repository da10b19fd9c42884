"""One write of a job in an engine: run by a thread, tried again while the disk refuses it. The engine's thread only looks.

Owns: when the next try is. Does not own: what is written, which refusals pass (finetune/disk.py), who waits (jobs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait

from coserve.finetune.disk import RETRY_S, refusal_of


class DiskWrite:
    """refusal: why the last try failed, None while none has."""

    answer = None
    """As the run of a verb has one (verbs.py): nobody waits for more than its end."""

    def __init__(self, thread: Executor, action: Callable[[], object]) -> None:
        self._thread, self._action = thread, action
        self.refusal: str | None = None
        self._again_s: float | None = None
        self._try: Future[object] = thread.submit(action)

    def wait(self, seconds: float) -> None:
        """Gives a short write the time to end."""
        wait([self._try], seconds)

    def done(self) -> bool:
        """Whether it is written. After a refusal, starts the next try when its time has come. Raises errors that more tries
        don't mend."""
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
        """The next try, now."""
        self._again_s = None
        self._try = self._thread.submit(self._action)
