"""How other threads reach an engine: commands that run between two iterations, and the engine's thread, if it has one.

    any thread: post(command) --> [ command, command, ... ] --drain--> the thread that calls step, under one lock

Owns: the queue, the lock, the thread and its end. Does not own: what an iteration does (engine.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from coserve.core import CoserveError
from coserve.engine.watching import Watcher

_IDLE_WAIT_S = 0.05


class EngineLoop:
    """An engine's commands and thread. lock: held while an iteration runs. watcher: called with what the thread does."""

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.watcher = watcher or Watcher()
        self.lock = threading.Lock()
        self.closed = False
        self.failure: CoserveError | None = None
        self._commands: deque[tuple[str, Callable[[], None]]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self.ended = threading.Event()
        """Set when the engine is closed or has failed."""

    def __len__(self) -> int:
        return len(self._commands)

    # --- commands ---

    def post(self, command: Callable[[], None], what: str) -> None:
        """Queues a command to run before the next iteration. what: names it for the watcher. Raises CoserveError if closed."""
        with self._wake:
            self._require_open()
            self._commands.append((what, command))
            self._wake.notify()

    def call(self, command: Callable[[], object], what: str) -> None:
        """Runs a command between two iterations and waits for it. Raises what the command raises. With a thread, the command is
        queued rather than run under the lock here, since a busy engine hardly ever releases the lock."""
        if self._thread is None:
            with self.lock:
                self._require_open()
                command()
            return
        done: Future[object] = Future()

        def run() -> None:
            try:
                done.set_result(command())
            except Exception as error:
                done.set_exception(error)

        self.post(run, what)
        done.result()

    def _require_open(self) -> None:
        if self.closed:
            raise CoserveError("the engine is closed" if self.failure is None else str(self.failure))

    def drain(self) -> None:
        """Runs the posted commands."""
        while self._commands:
            what, command = self._commands.popleft()
            self.watcher.begin(what)
            command()

    # --- the thread ---

    @property
    def has_thread(self) -> bool:
        return self._thread is not None

    def start(self, step: Callable[[], bool], fail: Callable[[CoserveError], None]) -> None:
        """Starts a thread that calls `step` again and again. fail: called in that thread with the error that ends it."""
        if self._thread is None and not self.closed:
            self._closing = False
            self._thread = threading.Thread(target=self._loop, args=(step, fail), name="coserve-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the present iteration."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._wake:
                self._closing = True
                self._wake.notify()
            thread.join()

    def close(self) -> None:
        """Refuses further commands and runs those already posted."""
        with self._wake:
            self.closed = True
        self.drain()
        self.ended.set()

    def _loop(self, step: Callable[[], bool], fail: Callable[[CoserveError], None]) -> None:
        while not self._closing:
            try:
                worked = step()
            except BaseException as error:  # a bug: callers that wait must get the error
                self._fail(error, fail)
                raise
            if not worked:
                self.watcher.end()
                with self._wake:
                    if not self._commands and not self._closing:
                        self._wake.wait(_IDLE_WAIT_S)
        self.watcher.end()

    def _fail(self, error: BaseException, fail: Callable[[CoserveError], None]) -> None:
        wrapped = error if isinstance(error, CoserveError) else CoserveError(f"the engine stopped: {error!r}")
        with self._wake:
            self.failure, self.closed = wrapped, True
        while self._commands:  # their callers may wait for them; the commands may fail, since the engine's state may be broken
            with contextlib.suppress(Exception):
                self._commands.popleft()[1]()
        try:
            fail(wrapped)
        finally:
            self.ended.set()
