"""Keeps an engine process running: starts it, watches it, and starts another one when it has died.

    spawn -> Ready -> ... -> dies -> spawn -> ...        dies before Ready: wait longer each time, at most MAX_FAILURES in a row

Owns: when a process is started and ended, whether the engine is ready. Does not own: how that is done (process.py), what counts
as a hang (watchdog.py), who waits for the engine (calls.py, streams.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import zmq
import zmq.asyncio

from coserve.core import CoserveError
from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.messages import FromEngine, Problem, Progress, Ready, Replied, Shutdown, ToEngine
from coserve.server.link.process import EngineEnd, EngineProcess
from coserve.server.link.setup import START_CALL, STOP_S
from coserve.server.link.watchdog import LOOK_EVERY_S, Hang, Watchdog
from coserve.server.settings import ServerConfig

DELAYS_S = (0.0, 1.0, 2.0, 5.0, 10.0)
"""Seconds before a restart, by the number of processes in a row that have died before they were ready."""
MAX_FAILURES = 5
"""No further process is started after so many in a row have died before they were ready."""
_STOP_HANG_S, _STOP_FACTOR = 5.0, 5.0
"""The watchdog's timeout and factor while the server ends, when it is less patient."""
_LAST_WORDS_S = 0.05
"""Seconds for the last messages of a dead process to arrive."""
_log = logging.getLogger(__name__)


def restart_delay_s(failures: int) -> float | None:
    """Seconds before the next start; None: give up. failures: how many processes in a row have died before they were ready."""
    return None if failures >= MAX_FAILURES else DELAYS_S[min(failures, len(DELAYS_S) - 1)]


class Supervisor:
    """The life of the engine, one process after another.

    ready: whether the engine takes requests. generation: the number of starts that became ready. num_restarts: the number of
    starts after the first. failure: why no process is started any more; None while one is. hang: what the process hung in, from
    then until the next one starts. last_end: how the last process ended; set before the listeners of `on_down` are called.
    """

    def __init__(
        self, config: ServerConfig, *, report: Callable[[str], None], on_message: Callable[[FromEngine], None],
        on_lost: Callable[[str], None],
    ) -> None:
        """report: takes a line about a start. on_message: takes what the engine says of requests, calls and jobs.
        on_lost: called when the engine goes down, with the message for whoever waits for it."""
        self._config, self._report, self._on_message, self._on_lost = config, report, on_message, on_lost
        self.ready = False
        self.generation = self.num_restarts = 0
        self.failure: str | None = None
        self.hang: str | None = None
        self.last_end: EngineEnd | None = None
        self._info: Ready | None = None
        self._context: zmq.asyncio.Context | None = None
        self._process: EngineProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._first: asyncio.Future[None] | None = None
        self._problem: Problem | None = None
        self._stopping = False
        self._given_up = asyncio.Event()
        self._up_listeners: list[Callable[[], Awaitable[None]]] = []
        self._down_listeners: list[Callable[[], None]] = []

    @property
    def info(self) -> Ready:
        """What the running engine has said of itself, or the last one. Raises EngineUnavailable before the first start."""
        if self._info is None:
            raise EngineUnavailable("the engine has not started yet")
        return self._info

    @property
    def pid(self) -> int | None:
        """The number of the present process, if there is one."""
        return None if self._process is None else self._process.pid

    @property
    def trouble(self) -> str | None:
        """Why the engine takes no requests, if that is known and this is not its first start."""
        if self.failure is not None:
            return self.failure
        reason = self.hang or (None if self.ready or self.last_end is None else self.last_end.reason)
        return None if reason is None else f"the engine is being started again: {reason}"

    def on_up(self, listener: Callable[[], Awaitable[None]]) -> None:
        """The listener is awaited after every start, when `ready` is true."""
        self._up_listeners.append(listener)

    def on_down(self, listener: Callable[[], None]) -> None:
        """The listener is called when a process that was ready has died or is ended."""
        self._down_listeners.append(listener)

    async def wait_given_up(self) -> str:
        """Waits until no process is started any more, which may never be. Returns the reason, `failure`."""
        await self._given_up.wait()
        assert self.failure is not None
        return self.failure

    def send(self, message: ToEngine) -> None:
        """Raises EngineUnavailable while the engine isn't ready, and InvalidRequest if a number is too large to travel."""
        if not self.ready or self._process is None:
            raise EngineUnavailable(self.trouble or "the engine is starting; try again in a few seconds")
        self._process.send(message)

    # --- start and end of the server ---

    async def start(self) -> None:
        """Starts a process and waits until it is ready. Raises what keeps it from starting."""
        self._context = zmq.asyncio.Context()
        self._first = asyncio.get_running_loop().create_future()
        self._run(self._supervise())
        try:
            await self._first
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Fails what still waits, lets the process finish what it is writing, and ends it."""
        self._stopping = True
        asked = self.ready
        if asked:
            self.send(Shutdown())
        self._go_down("the server is ending")
        process = self._process
        if process is not None:
            if not asked:
                process.kill()
            if not await self._ends_in_time(process):
                process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._context is not None:
            self._context.destroy(linger=0)

    async def _ends_in_time(self, process: EngineProcess) -> bool:
        """Whether the process ends by itself within STOP_S, without hanging."""
        ended = asyncio.ensure_future(process.wait())
        dog, limit = Watchdog(process.page, _STOP_HANG_S), time.monotonic() + STOP_S
        while time.monotonic() < limit:
            done, _ = await asyncio.wait([ended], timeout=LOOK_EVERY_S / 2)
            if done:
                return True
            hang = dog.look(factor=_STOP_FACTOR)
            if hang is not None:
                _log.error("at the end the engine process hangs and is killed: %s", hang)
                return False
        _log.error("the engine process has not ended within %g s and is killed: %s", STOP_S, process.describe_work())
        return False

    def _run(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- one process after another ---

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopping:
            generation = self.generation
            try:
                reason = await self._live()
            except Exception as error:  # no sockets, files or processes are left: it is tried again all the same
                reason = str(error)
                if not isinstance(error, (OSError, zmq.ZMQError)):
                    _log.exception("the engine's process can't be started or read")
            if self._stopping:
                return
            if self._first is not None and not self._first.done():
                unknown = CoserveError(f"the engine can't start: {reason}")
                self._first.set_exception(unknown if self._problem is None else make_error(self._problem))
                return
            failures = 0 if self.generation > generation else failures + 1
            delay = restart_delay_s(failures)
            if delay is None:
                self.failure = f"the engine's process died {failures} times before it was ready; the last time: {reason}"
                _log.error("%s; restart the server", self.failure)
                self._given_up.set()
                return
            _log.warning("the engine's process died (%s); starting another in %g s", reason, delay)
            await asyncio.sleep(delay)
            self.num_restarts += 1

    async def _live(self) -> str:
        """One process, from its start to its end; returns why it ended."""
        assert self._context is not None
        self._problem, self.hang = None, None
        process = await EngineProcess.spawn(self._config, self._context)
        self._process = process
        watch = asyncio.create_task(self._watch(process))
        reader = asyncio.create_task(process.read(self._on_any_message))
        reader.add_done_callback(lambda ended: self._on_reader_end(ended, process))
        try:
            code = await process.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(reader), _LAST_WORDS_S)
            known = self.hang or (self._problem.message if self._problem is not None else None)
            self.last_end = end = process.describe_end(code, known, hung=self.hang is not None)
            if not self._stopping and not end.hung and (stacks := process.read_stacks()):
                _log.error("the engine process crashed at:\n%s", stacks)
            return end.reason
        finally:
            for task in (reader, watch):
                task.cancel()
            await asyncio.gather(reader, watch, return_exceptions=True)
            process.kill()
            self._process = None
            process.close()
            self._go_down("the engine process died; it is being started again")

    async def _watch(self, process: EngineProcess) -> None:
        """Kills the process when it hangs. Its start may take as long as it takes."""
        dog = Watchdog(process.page, self._config.watchdog_timeout)
        while self._config.watchdog_timeout > 0:
            await asyncio.sleep(LOOK_EVERY_S)
            hang = dog.look() if self.ready and not self._stopping else None
            if hang is not None:
                await self._end_hung(process, hang)
                return

    async def _end_hung(self, process: EngineProcess, hang: Hang) -> None:
        self.hang, self.ready = f"it hangs: {hang}", False
        stacks = await process.ask_stacks()
        _log.error(
            "the engine process hangs and is started again: %s. At that time: %s. Its threads:\n%s", hang,
            process.describe_work(), stacks or "(it could not write their stacks)",
        )
        process.kill()

    def _on_reader_end(self, reader: asyncio.Task[None], process: EngineProcess) -> None:
        if not reader.cancelled():  # a message that can't be understood: start afresh
            _log.error("the engine's messages can't be read", exc_info=reader.exception())
            process.kill()

    def _on_any_message(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self._on_ready(message)
            case Progress(line=line):
                self._report(line)
            case Replied(call=call) if call == START_CALL:
                self._problem = message.problem
            case _:
                self._on_message(message)

    def _on_ready(self, info: Ready) -> None:
        if self._stopping or self._process is None:
            return
        self._process.hide()
        self._info, self.ready = info, True
        self.generation += 1
        self._run(self._notify_up())
        if self._first is not None and not self._first.done():
            self._first.set_result(None)

    async def _notify_up(self) -> None:
        for listener in self._up_listeners:
            try:
                await listener()
            except Exception:  # the others are called all the same
                _log.exception("after the engine's start")

    def _go_down(self, message: str) -> None:
        was_up, self.ready = self.ready or self.hang is not None, False
        self._on_lost(message)
        if was_up:
            notify_all(self._down_listeners)


def notify_all(listeners: Iterable[Callable[..., None]], *arguments: Any) -> None:
    """Calls every listener, whatever another one raises."""
    for listener in listeners:
        try:
            listener(*arguments)
        except Exception:
            _log.exception("a listener of the engine failed")
