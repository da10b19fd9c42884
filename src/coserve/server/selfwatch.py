"""The API process watches itself: its event loop, and the thread that writes jobs down.

    every second: ask the event loop for a sign, look how long the journal has been at one action --> the log, and /health

A loop that stands still answers no request, not even /health, and no signal. After GIVE_UP times the timeout the process ends,
so that a service manager can start it again; jobs go on from their checkpoints. Time counts only while this thread runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable

LOOK_EVERY_S = 1.0
GIVE_UP = 5
"""After so many timeouts of silence the process ends."""
_log = logging.getLogger(__name__)


def stack_of(thread: threading.Thread) -> str:
    """The stack of a thread, as text."""
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)).rstrip() if frame is not None else "(it has ended)"


class SelfWatch:
    """The watch; it lasts as long as this context, which is entered on the loop's thread.

    journal_busy_s: gives for how many seconds the journal has been at the present action.
    timeout_s: 0 turns the watch off.
    leave: ends the process with an exit code.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, journal_busy_s: Callable[[], float], timeout_s: float, *,
        leave: Callable[[int], object] = os._exit, look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        self._loop, self._journal_busy_s, self._timeout_s = loop, journal_busy_s, timeout_s
        self._leave, self._look_every_s = leave, look_every_s
        self._watched = threading.current_thread()
        self._silent_s = 0.0
        self._logged_journal = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coserve-watch", daemon=True)

    def __enter__(self) -> SelfWatch:
        if self._timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    @property
    def problem(self) -> str | None:
        """What /health says is wrong, although requests are served; None: nothing."""
        seconds = self._journal_busy_s()
        if not 0 < self._timeout_s < seconds:
            return None
        return f"what happens to jobs has not been written down for {seconds:.0f} s: the disk or the database doesn't answer"

    def _run(self) -> None:
        while not self._done.wait(self._look_every_s):
            self._look_at_loop()
            self._look_at_journal()

    def _look_at_loop(self) -> None:
        before, self._silent_s = self._silent_s, self._silent_s + self._look_every_s
        if before <= self._timeout_s < self._silent_s:
            _log.error("the API process's event loop stands still for %.0f s at:\n%s", self._silent_s, stack_of(self._watched))
        if self._silent_s > GIVE_UP * self._timeout_s:
            _log.critical("the API process's event loop has stood still for %.0f s; the process ends", self._silent_s)
            logging.shutdown()
            self._leave(1)
        try:
            self._loop.call_soon_threadsafe(self._sign)
        except RuntimeError:  # it is closed
            self._done.set()

    def _sign(self) -> None:
        self._silent_s = 0.0

    def _look_at_journal(self) -> None:
        problem = self.problem
        if problem is not None and not self._logged_journal:
            threads = [thread for thread in threading.enumerate() if thread.name.startswith("coserve-jobs")]
            _log.error("%s. Its thread is at:\n%s", problem, "\n".join(map(stack_of, threads)))
        self._logged_journal = problem is not None
