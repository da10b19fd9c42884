"""The API process's view of the engine: requests, calls and job events over the socket, whichever process is behind it.

When the engine's process dies, everything that waits for it fails at once with EngineUnavailable, and another one is started;
one that hangs is ended first. Owns: who waits for what, restarts. Does not own: how a process is started (supervisor.py), when
it hangs (watchdog.py). All on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Literal, cast

import zmq
import zmq.asyncio

from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.core import CoserveError, InvalidRequest
from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.messages import (
    ActJob,
    Cancel,
    Failed,
    FromEngine,
    Generate,
    GetStats,
    Heard,
    JobEnded,
    JobHappened,
    LoadAdapter,
    Problem,
    Progress,
    Ready,
    Replied,
    Shutdown,
    StartJob,
    ToEngine,
    Tokens,
    UnloadAdapter,
    decode_from_engine,
    encode,
)
from coserve.server.link.setup import START_CALL, STOP_S
from coserve.server.link.streams import RequestStream
from coserve.server.link.supervisor import EngineEnd, EngineProcess, restart_delay_s
from coserve.server.link.watchdog import LOOK_EVERY_S, Hang, Watchdog
from coserve.server.logs import present_request
from coserve.server.settings import ServerConfig

_STOP_HANG_S, _STOP_FACTOR = 5.0, 5.0
"""The watchdog's timeout and factor while the server ends: it is less patient then."""
_LAST_WORDS_S = 0.05
"""Seconds within which the last messages of a dead process arrive."""
_AT_ONCE = 64
"""Messages that are heard before others have a turn of the loop."""
_log = logging.getLogger(__name__)


class EngineClient:
    """The engine, in whichever process it runs.

    report: takes a line about a start. info: of the running engine, or of the last one. generation: rises with every start.
    failure: why no engine is started any more, or None. hang: what the engine hung in, from then until the next process starts.
    last_end: how the last process ended, known when on_down's listeners are called.
    """

    def __init__(self, config: ServerConfig, *, report: Callable[[str], None] = _log.info) -> None:
        self._config, self._report = config, report
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
        self._numbers = itertools.count(START_CALL + 1)
        self._streams: dict[str, RequestStream] = {}
        self._calls: dict[int, asyncio.Future[Replied]] = {}
        self._on_job: list[Callable[[JobHappened | JobEnded], None]] = []
        self._on_up: list[Callable[[], Awaitable[None]]] = []
        self._on_down: list[Callable[[], None]] = []

    @property
    def info(self) -> Ready:
        """What the engine has said of itself. Raises EngineUnavailable before the first start."""
        if self._info is None:
            raise EngineUnavailable("the engine has not started yet")
        return self._info

    @property
    def pid(self) -> int | None:
        """Of the present process."""
        return None if self._process is None else self._process.pid

    @property
    def trouble(self) -> str | None:
        """Why it takes no requests, if that is known and not its first start."""
        if self.failure is not None:
            return self.failure
        end = None if self.ready or self.last_end is None else self.last_end.reason
        reason = self.hang or end
        return None if reason is None else f"the engine is being started again: {reason}"

    def on_job(self, listener: Callable[[JobHappened | JobEnded], None]) -> None:
        """Called with every event of every job, in order, on the event loop."""
        self._on_job.append(listener)

    def on_up(self, listener: Callable[[], Awaitable[None]]) -> None:
        """Awaited after every start, when `ready` is true."""
        self._on_up.append(listener)

    def on_down(self, listener: Callable[[], None]) -> None:
        """Called when the engine's process has died or ends."""
        self._on_down.append(listener)

    # --- its life ---

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
        """Fails what still waits, has the process write what it is writing, and ends it."""
        self._stopping = True
        asked = self.ready
        if asked:
            self._send(Shutdown())
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
        """Whether the process ends by itself, without hanging, within STOP_S."""
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
        _log.error("the engine process has not ended within %g s and is killed: %s", STOP_S, _doing(process))
        return False

    def fail_requests(self, message: str) -> None:
        """Ends every stream with EngineUnavailable: the server is about to end."""
        for stream in list(self._streams.values()):
            self._send(Cancel(id=stream.id))
            stream.fail(EngineUnavailable(message))
        self._streams.clear()

    def _run(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopping:
            generation = self.generation
            try:
                reason = await self._live()
            except Exception as error:  # no sockets, files or processes are left: it is tried again all the same
                reason = str(error)
                if not isinstance(error, (OSError, zmq.ZMQError)):
                    _log.exception("the engine's process can't be started or heard")
            if self._stopping:
                return
            if self._first is not None and not self._first.done():
                self._first.set_exception(self._start_error(reason))
                return
            failures = 0 if self.generation > generation else failures + 1
            delay = restart_delay_s(failures)
            if delay is None:
                self.failure = f"the engine's process died {failures} times before it was ready; the last time: {reason}"
                _log.error("%s; restart the server", self.failure)
                return
            _log.warning("the engine's process died (%s); starting another in %g s", reason, delay)
            await asyncio.sleep(delay)
            self.num_restarts += 1

    def _start_error(self, reason: str) -> CoserveError:
        problem = self._problem
        if problem is None:
            return CoserveError(f"the engine can't start: {reason}")
        return make_error(problem.name, problem.message, problem.param)

    async def _live(self) -> str:
        """One process, from its start to its end; why it ended."""
        assert self._context is not None
        self._problem, self.hang = None, None
        process = await EngineProcess.spawn(self._config, self._context)
        self._process = process
        watch = asyncio.create_task(self._watch(process))
        reader = asyncio.create_task(self._read(process))
        reader.add_done_callback(lambda ended: self._reader_ended(ended, process))
        try:
            code = await process.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(reader), _LAST_WORDS_S)
            told = self.hang or (self._problem.message if self._problem is not None else None)
            self.last_end = end = process.describe_end(code, told, hung=self.hang is not None)
            if not self._stopping and not end.hung and (stacks := process.read_stacks()):
                _log.error("the engine process crashed; its threads were at:\n%s", stacks)
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
            "the engine process hangs and is started again: %s. At that time: %s. Its threads:\n%s", hang, _doing(process),
            stacks or "(it could not write their stacks)",
        )
        process.kill()

    def _go_down(self, message: str) -> None:
        was_up, self.ready = self.ready or self.hang is not None, False
        streams, self._streams = self._streams, {}
        calls, self._calls = self._calls, {}
        for stream in streams.values():
            stream.fail(EngineUnavailable(message))
        for call in calls.values():
            if not call.done():
                call.set_exception(EngineUnavailable(message))
        if was_up:
            _call_all(self._on_down)

    async def _rise(self) -> None:
        for listener in self._on_up:
            try:
                await listener()
            except Exception:  # the others are told all the same
                _log.exception("after the engine's start")

    # --- messages ---

    def _reader_ended(self, reader: asyncio.Task[None], process: EngineProcess) -> None:
        if not reader.cancelled():  # a message that can't be understood: start afresh
            _log.error("the engine's messages can't be read", exc_info=reader.exception())
            process.kill()

    async def _read(self, process: EngineProcess) -> None:
        while True:
            for number, part in enumerate(await process.socket.recv_multipart(), start=1):
                self._hear(decode_from_engine(part))
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # who waits for what was heard goes on first
            process.socket.send(encode(Heard()))

    def _hear(self, message: FromEngine) -> None:
        match message:
            case Tokens():
                self._hear_tokens(message)
            case Failed(id=request, problem=problem):
                stream = self._streams.pop(request, None)
                if stream is not None:
                    stream.fail(make_error(problem.name, problem.message, problem.param))
            case Replied(call=number):
                if number == START_CALL:
                    self._problem = message.problem
                call = self._calls.pop(number, None)
                if call is not None and not call.done():
                    call.set_result(message)
            case JobHappened() | JobEnded():
                _call_all(self._on_job, message)
            case Progress(line=line):
                self._report(line)
            case Ready():
                self._hear_ready(message)

    def _hear_tokens(self, chunk: Tokens) -> None:
        stream = self._streams.get(chunk.id)
        if stream is not None:
            stream.push(chunk)
            if stream.ended:
                del self._streams[chunk.id]

    def _hear_ready(self, info: Ready) -> None:
        if self._stopping or self._process is None:
            return
        self._process.hide()
        self._info, self.ready = info, True
        self.generation += 1
        self._run(self._rise())
        if self._first is not None and not self._first.done():
            self._first.set_result(None)

    def _send(self, message: ToEngine) -> None:
        """Raises InvalidRequest if a number in it is too large to travel."""
        if self._process is None:
            return
        try:
            data = encode(message)
        except OverflowError as error:
            raise InvalidRequest(f"a number is too large ({error})") from error
        self._process.socket.send(data)

    def _require_ready(self) -> None:
        if not self.ready:
            raise EngineUnavailable(self.trouble or "the engine is starting; try again in a few seconds")

    async def _call(self, make: Callable[[int], ToEngine]) -> Any:
        self._require_ready()
        number = next(self._numbers)
        answer: asyncio.Future[Replied] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        try:
            self._send(make(number))
            reply = await answer
        finally:
            self._calls.pop(number, None)
        if reply.problem is not None:
            raise make_error(reply.problem.name, reply.problem.message, reply.problem.param)
        return reply.value

    # --- what is asked of it ---

    def generate(
        self, *, prompt_ids: Sequence[int], sampling: SamplingConfig, adapter: str | None = None, tenant: str = "",
        tpot_ms: SloMs | None = None, ttft_ms: SloMs | None = None, arrival_s: float | None = None,
    ) -> RequestStream:
        """Sends a request. arrival_s: of the monotonic clock, default now. Close the stream if it isn't read to its end.
        Raises EngineUnavailable, InvalidRequest."""
        self._require_ready()
        request = f"{present_request() or uuid.uuid4().hex}#{next(self._numbers)}"
        stream = RequestStream(request, sampling.n, self._cancel)
        self._send(Generate(
            id=request, prompt_ids=list(prompt_ids), sampling=sampling, adapter=adapter, tenant=tenant, tpot_ms=tpot_ms,
            ttft_ms=ttft_ms, arrival_s=time.monotonic() if arrival_s is None else arrival_s,
        ))
        self._streams[request] = stream
        return stream

    def _cancel(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.id, None) is not None:
            self._send(Cancel(id=stream.id))

    async def load_adapter(self, name: str, directory: str) -> list[str]:
        """A newer version, if the name exists. Returns the directories that adapters may still be read from. Raises what the
        engine raises."""
        held: list[str] = await self._call(lambda call: LoadAdapter(call=call, name=name, directory=directory))
        return held

    async def unload_adapter(self, name: str) -> list[str]:
        """Requests that use it go on. Returns and raises as `load_adapter`."""
        held: list[str] = await self._call(lambda call: UnloadAdapter(call=call, name=name))
        return held

    async def start_job(self, **fields: Any) -> None:
        """fields: StartJob's, without `call`. Returns when the job may get units. Raises what the engine raises."""
        await self._call(lambda call: StartJob(call=call, **fields))

    def act_job(self, job: str, action: str) -> None:
        """pause, resume or cancel; of no effect if the job has ended. Raises EngineUnavailable."""
        self._require_ready()
        self._send(ActJob(id=job, action=cast(Literal["pause", "resume", "cancel"], action)))

    async def stats(self) -> dict[str, Any]:
        """Engine.metrics(), and time_s of the monotonic clock. Raises EngineUnavailable."""
        found: dict[str, Any] = await self._call(lambda call: GetStats(call=call))
        return found


def _doing(process: EngineProcess) -> str:
    """What the threads of a process are doing, in words."""
    now = time.monotonic()
    return " | ".join(
        f"{reading.activity} (for {now - reading.begun_s:.1f} s, predicted {reading.predicted_s:.2f} s)"
        for reading in process.page.read()
    ) or "nothing"


def _call_all(listeners: Iterable[Callable[..., None]], *arguments: Any) -> None:
    """Every listener, whatever another one raises."""
    for listener in listeners:
        try:
            listener(*arguments)
        except Exception:
            _log.exception("a listener of the engine failed")
