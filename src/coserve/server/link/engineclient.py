"""The API process's view of the engine: requests, calls and job events over the socket, whichever process is behind it.

When the engine's process dies, everything that waits for it fails at once with EngineUnavailable, and another one is started.
Owns: who waits for what, restarts. Does not own: how a process is started (supervisor.py). All on one event loop.
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

import msgspec
import zmq.asyncio

from coserve.config import SamplingConfig
from coserve.core import CoserveError, InvalidRequest
from coserve.server.errors import EngineUnavailable, make_error
from coserve.server.link.messages import (
    ActJob,
    Cancel,
    Failed,
    FromEngine,
    Generate,
    GetStats,
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
from coserve.server.link.setup import START_CALL
from coserve.server.link.supervisor import EngineProcess, restart_delay_s
from coserve.server.settings import ServerConfig

STOP_S = 30.0
"""What an engine gets to write its checkpoints at the end."""
_LAST_WORDS_S = 0.05
"""What a dead process has sent arrives within this time."""
_log = logging.getLogger(__name__)


def merge_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Chunks of one output, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    last = parts[-1]
    return msgspec.structs.replace(
        last, text="".join(part.text for part in parts), token_ids=[token for part in parts for token in part.token_ids],
        cached_tokens=max(part.cached_tokens for part in parts), begun_s=parts[0].begun_s,
        logprobs=[entry for part in parts for entry in part.logprobs],
    )


class RequestStream:
    """A request's chunks, for one reader, until every output has a finish_reason.

    What comes while nobody reads is held as one chunk per output: never more than the request's own tokens. Raises the
    request's error, or EngineUnavailable.
    """

    def __init__(self, request: str, num_outputs: int, cancel: Callable[[RequestStream], None]) -> None:
        self.id = request
        self._cancel = cancel
        self._unread: dict[int, list[Tokens]] = {}
        self._unfinished = set(range(num_outputs))
        self._unended = set(self._unfinished)
        self._error: CoserveError | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the engine is through with it."""
        return self._error is not None or not self._unended

    def push(self, chunk: Tokens) -> None:
        """The engine has sent a chunk."""
        self._unread.setdefault(chunk.index, []).append(chunk)
        if chunk.finish_reason is not None:
            self._unended.discard(chunk.index)
        self._news.set()

    def fail(self, error: CoserveError) -> None:
        """Nothing follows."""
        self._error = error
        self._news.set()

    def __aiter__(self) -> RequestStream:
        """Itself."""
        return self

    async def __anext__(self) -> Tokens:
        while True:
            if self._unread:
                index = next(iter(self._unread))
                chunk = merge_tokens(self._unread.pop(index))
                if chunk.finish_reason is not None:
                    self._unfinished.discard(index)
                return chunk
            if not self._unfinished:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()

    async def aclose(self) -> None:
        """Nobody reads any more; the engine stops working on it."""
        self._unread.clear()
        self._unfinished.clear()
        if not self.ended:
            self._cancel(self)


class EngineClient:
    """The engine, in whichever process it runs.

    report: takes a line about a start. info: of the running engine, or of the last one. generation: rises with every start.
    failure: why no engine is started any more, or None.
    """

    def __init__(self, config: ServerConfig, *, report: Callable[[str], None] = _log.info) -> None:
        self._config, self._report = config, report
        self.ready = False
        self.generation = self.num_restarts = 0
        self.failure: str | None = None
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
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._context is not None:
            self._context.destroy(linger=0)

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
                code = await self._live()
                reason = self._problem.message if self._problem is not None else f"it ended with exit code {code}"
            except OSError as error:
                reason = str(error)
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

    async def _live(self) -> int:
        """One process, from its start to its end; its exit code."""
        assert self._context is not None
        self._problem = None
        process = await EngineProcess.spawn(self._config, self._context)
        self._process = process
        reader = asyncio.create_task(self._read(process))
        reader.add_done_callback(lambda ended: self._reader_ended(ended, process))
        try:
            code = await process.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(reader), _LAST_WORDS_S)
            return code
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            process.kill()
            self._process = None
            process.close()
            self._go_down("the engine process died; it is being started again")

    def _go_down(self, message: str) -> None:
        was_ready, self.ready = self.ready, False
        streams, self._streams = self._streams, {}
        calls, self._calls = self._calls, {}
        for stream in streams.values():
            stream.fail(EngineUnavailable(message))
        for call in calls.values():
            if not call.done():
                call.set_exception(EngineUnavailable(message))
        if was_ready:
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
            for part in await process.socket.recv_multipart():
                self._hear(decode_from_engine(part))

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
            raise EngineUnavailable(self.failure or "the engine is starting; try again in a few seconds")

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
        tpot_ms: float | None = None, ttft_ms: float | None = None, arrival_s: float | None = None,
    ) -> RequestStream:
        """Sends a request. arrival_s: of the monotonic clock, default now. Close the stream if it isn't read to its end.
        Raises EngineUnavailable, InvalidRequest."""
        self._require_ready()
        request = uuid.uuid4().hex
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


def _call_all(listeners: Iterable[Callable[..., None]], *arguments: Any) -> None:
    """Every listener, whatever another one raises."""
    for listener in listeners:
        try:
            listener(*arguments)
        except Exception:
            _log.exception("a listener of the engine failed")
