"""Carries out the API process's messages on an engine, and reports what becomes of them.

`EngineHost.on_message` runs on the process's main thread and never waits: what takes long (adapters, the start of jobs) runs in
a pool. Chunks and ends of jobs come on the engine's thread. Does not own: the socket (mailbox.py), the process's life
(enginemain.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

from coserve.cluster.load import Load
from coserve.core import CoserveError, JobFailed, TokenLogprob
from coserve.engine.engine import Engine
from coserve.engine.jobhandle import JobHandle
from coserve.engine.requests import Chunk, RequestHandle
from coserve.engine.threads import yield_to_others
from coserve.finetune.disk import refusal_of
from coserve.finetune.job import JobEvent, MetricsTable
from coserve.server.errors import EngineUnavailable, StorageRefused, error_name
from coserve.server.link.activity import ActivityPage, CallPlaces
from coserve.server.link.mailbox import MakeLoad
from coserve.server.link.messages import (
    ActJob,
    Cancel,
    ChargeTenants,
    EngineLoad,
    Failed,
    FromEngine,
    Generate,
    GetStats,
    JobEnded,
    JobHappened,
    LoadAdapter,
    LogprobEntry,
    Problem,
    Replied,
    ShareEnded,
    Shutdown,
    StartJob,
    StepSaid,
    StepTold,
    ToEngine,
    Tokens,
    UnloadAdapter,
    WatchLoad,
)
from coserve.server.link.stepmember import StepMember

_POOL_THREADS = 4
_COMPILING_THREADS = 2
_COMPILE_S = 10.0
"""How long compiling a grammar may take, for the watchdog. The API process has tried it within 2 s of processor time."""
_LOAD_S = 5.0
_LOAD_BYTES_PER_S, _DATA_BYTES_PER_S = 20e6, 1e6
"""How long loading an adapter and preparing a job may take, for the watchdog: seconds that both may take in any case, and the
speeds of a slow disk and of a slow tokenizer."""
_READS = 10
"""Tries of reading the engine's statistics while its thread changes them."""


def num_bytes(path: Path) -> int:
    """The bytes of a file, or of the files in a directory; 0 if there is none."""
    try:
        return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0


def make_problem(error: BaseException) -> Problem:
    """An error as it travels. If it isn't a CoserveError, the message begins with the name of its class."""
    if isinstance(error, CoserveError):
        return Problem(name=error_name(error), message=str(error), param=error.param)
    reason = refusal_of(error)
    if reason is not None:
        return Problem(name=StorageRefused.__name__, message=f"{reason}; try again when it can be written")
    return Problem(name=CoserveError.__name__, message=f"{type(error).__name__}: {error}")


class EngineHost:
    """Carries out messages. post: sends a message, from any thread. stop: is called at Shutdown. watch_load: a Mailbox's.
    places: where the pool's threads say what they do."""

    def __init__(
        self, engine: Engine, post: Callable[[FromEngine], None], stop: Callable[[], None],
        watch_load: Callable[[MakeLoad, float], None] = lambda make, every_s: None, places: CallPlaces | None = None,
    ) -> None:
        self._engine, self._post, self._stop = engine, post, stop
        self._places = places or CallPlaces(ActivityPage(None))
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "coserve-calls")
        self._compiling = ThreadPoolExecutor(_COMPILING_THREADS, "coserve-grammars", yield_to_others)
        self._requests: dict[str, RequestHandle] = {}
        self._early_ends: dict[str, bool] = {}  # of requests whose grammars are being compiled, whether they were cancelled
        self._jobs: dict[str, JobHandle | None] = {}  # None: the job is being prepared
        self._members: dict[str, StepMember] = {}  # this engine's places in jobs that several engines share
        self._early: dict[str, list[str]] = {}  # actions on jobs that are being prepared, in order
        self._lock = threading.Lock()
        self._watch_load, self._num_loads = watch_load, 0

    def on_message(self, message: ToEngine) -> None:
        """Begins to carry out a message; what becomes of it is posted."""
        match message:
            case Generate():
                if message.sampling.grammar is None:
                    self._generate(message)
                else:
                    self._compile(message)
            case Cancel():
                self._cancel(message.id)
            case LoadAdapter(call=call, name=name, directory=directory):
                seconds = _LOAD_S + num_bytes(Path(directory)) / _LOAD_BYTES_PER_S
                self._change_adapters(
                    call, lambda: self._engine.load_adapter(name, directory), f"load adapter {name}", seconds
                )
            case UnloadAdapter(call=call, name=name):
                self._change_adapters(call, lambda: self._engine.unload_adapter(name), f"unload adapter {name}")
            case StartJob():
                with self._lock:
                    self._jobs[message.id] = None
                seconds = _LOAD_S + num_bytes(Path(message.training_file)) / _DATA_BYTES_PER_S
                self._call(message.call, lambda: self._start_job(message), f"start job {message.id}", seconds, (message.id,))
            case ActJob():
                self._act(message.id, message.action)
            case StepTold(id=job, data=data):
                member = self._members.get(job)
                if member is not None:
                    member.on_message(data)
            case GetStats(call=call):
                self._call(call, self._stats, "figures for metrics")
            case WatchLoad(every_s=every_s):
                self._watch_load(self._make_load, every_s)
            case ChargeTenants(tokens=tokens):
                with contextlib.suppress(CoserveError):  # the engine has stopped
                    self._engine.charge_tenants(tokens)
            case Shutdown():
                self._stop()

    def close(self) -> None:
        """Drops the calls that wait. Calls that run go on, and nobody waits for them."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._compiling.shutdown(wait=False, cancel_futures=True)

    def _make_load(self) -> EngineLoad | None:
        """A report of the engine's load; None if a table changed its size while it was read."""
        try:
            load = Load(number=self._num_loads + 1, **self._engine.load_report()._asdict())
        except RuntimeError:
            return None
        self._num_loads += 1
        return EngineLoad(load=load)

    def _call(
        self, number: int, work: Callable[[], Any], what: str, seconds: float = 0.0, jobs: Iterable[str] = ()
    ) -> None:
        def run() -> None:
            try:
                with self._places.doing(what, seconds, jobs=jobs):
                    value = work()
                reply = Replied(call=number, value=value)
            except Exception as error:  # whatever it is, somebody waits for the answer
                reply = Replied(call=number, problem=make_problem(error))
            self._post(reply)

        self._pool.submit(run)

    def _change_adapters(self, number: int, change: Callable[[], None], what: str, seconds: float = 0.0) -> None:
        def work() -> list[str]:
            change()
            return self._engine.adapter_directories

        self._call(number, work, what, seconds)

    def _stats(self) -> dict[str, Any]:
        for _ in range(_READS):
            try:
                return {**self._engine.metrics(), "time_s": time.monotonic()}
            except RuntimeError:  # a table changed size while it was read
                time.sleep(1e-3)
        return {**self._engine.metrics(), "time_s": time.monotonic()}

    # --- requests ---

    def _generate(self, message: Generate) -> None:
        try:
            handle = self._engine.submit(
                message.prompt_ids, message.sampling, adapter=message.adapter, tenant=message.tenant, tpot_ms=message.tpot_ms,
                ttft_ms=message.ttft_ms, arrival_s=message.arrival_s, label=message.id, emitted=message.emitted,
            )
        except CoserveError as error:
            self._fail(message.id, error)
            return
        self._requests[message.id] = handle
        _RequestReporter(message.id, handle, self._post, self._end)

    def _compile(self, message: Generate) -> None:
        """`_generate` on another thread, as compiling a grammar takes up to seconds."""
        with self._lock:
            self._early_ends[message.id] = False

        def run() -> None:
            try:
                with self._places.doing("compile a grammar", _COMPILE_S):
                    self._generate(message)
            except Exception as error:  # whatever it is, somebody waits for the answer
                self._fail(message.id, CoserveError(f"{type(error).__name__}: {error}"))
            with self._lock:
                cancelled = self._early_ends.pop(message.id)
            if cancelled:
                self._cancel(message.id)

        self._compiling.submit(run)

    def _end(self, request: str, error: CoserveError | None) -> None:
        self._requests.pop(request, None)
        if error is not None:
            self._fail(request, error)

    def _fail(self, request: str, error: CoserveError) -> None:
        shown = EngineUnavailable(str(error)) if self._engine.closed else error
        self._post(Failed(id=request, problem=make_problem(shown)))

    def _cancel(self, request: str) -> None:
        with self._lock:
            if request in self._early_ends:
                self._early_ends[request] = True
                return
        handle = self._requests.get(request)
        if handle is not None:
            with contextlib.suppress(CoserveError):  # the engine has stopped
                handle.cancel()

    # --- jobs ---

    def _start_job(self, message: StartJob) -> None:
        member = self._enter(message)
        follows = member is not None and not member.primary
        try:
            handle = self._engine.finetune(
                message.training_file, message.directory, message.config, name=message.id if follows else message.adapter,
                validation=message.validation_file, start=message.start, resume=message.resume, tenant=message.tenant,
                weight=message.weight, listen=lambda event: None if follows else self._job_happened(message.id, event),
                label=message.id, exchange=member,
            )
        except BaseException:
            with self._lock:
                del self._jobs[message.id]
                self._early.pop(message.id, None)
                self._members.pop(message.id, None)
            if member is not None:
                member.leave()
            raise
        with self._lock:  # held throughout: an action that comes now is later than the early ones
            self._jobs[message.id] = handle
            for action in self._early.pop(message.id, []):
                _act(handle, action)
        handle.watch(lambda ended: self._job_ended(message.id, ended))

    def _enter(self, message: StartJob) -> StepMember | None:
        """This engine's place in a job that several engines share."""
        share = message.share
        if share is None:
            return None
        member = StepMember(
            epoch=share.epoch, member=share.member, primary=share.primary,
            send=lambda data: self._post(StepSaid(id=message.id, data=data)),
        )
        with self._lock:
            self._members[message.id] = member
        return member

    def _act(self, job: str, action: str) -> None:
        with self._lock:
            if job not in self._jobs:
                return
            handle = self._jobs[job]
            if handle is None:
                self._early.setdefault(job, []).append(action)
                return
        _act(handle, action)

    def _job_happened(self, job: str, event: JobEvent) -> None:
        self._post(JobHappened(
            id=job, level=cast(Literal["info", "warn", "error"], event.level), message=event.message, time_s=time.monotonic(),
            row=None if event.row is None else dataclasses.asdict(event.row), num_steps=event.num_steps,
            checkpoint=None if event.checkpoint is None else str(event.checkpoint), checkpoint_step=event.checkpoint_step,
            resumed_step=event.resumed_step,
        ))

    def _job_ended(self, job: str, handle: JobHandle) -> None:
        """Runs on the engine's thread, or on the pool's if the job ended at once."""
        if self._engine.closed:  # the process ends, not the job: it goes on in the next one
            return
        with self._lock:
            self._jobs.pop(job, None)
            member = self._members.pop(job, None)
        if member is not None and not member.primary:
            ended = ShareEnded(id=job, problem=None if handle.error is None else make_problem(handle.error))
            member.gone.add_done_callback(lambda _: self._post(ended))
            return
        # After the checkpoints and rows that are still being written, so that whoever hears of it may remove the directory.
        self._engine.jobs.writer.submit(self._engine.jobs.recorder.submit, self._report_end, job, handle)

    def _report_end(self, job: str, handle: JobHandle) -> None:
        tokens = sum(row.tokens for row in MetricsTable(Path(handle.directory) / "metrics.csv").rows())
        error = handle.error if handle.error is not None or handle.status != "failed" else JobFailed("the job failed")
        self._post(JobEnded(
            id=job, status=cast(Literal["succeeded", "failed", "cancelled", "handed_over"], handle.status), step=handle.step,
            trained_tokens=tokens, problem=None if error is None else make_problem(error),
        ))


def _act(handle: JobHandle, action: str) -> None:
    with contextlib.suppress(CoserveError):  # the engine has stopped
        getattr(handle, action)()  # ActJob's actions are names of its methods


class _RequestReporter:
    """Turns a request's chunks into messages. end: is called once, at the end, with the request's id and its error."""

    def __init__(
        self, request: str, handle: RequestHandle, post: Callable[[FromEngine], None],
        end: Callable[[str, CoserveError | None], None],
    ) -> None:
        self._id, self._handle, self._post, self._end = request, handle, post, end
        self._left = len(handle.outputs)
        self._first, self._sent_prompt = True, False
        handle.listen(self._on_chunk)

    def _on_chunk(self, chunk: Chunk) -> None:
        last, failed = chunk.finish_reason is not None, chunk.finish_reason == "error"
        self._left -= last
        if not failed:
            self._post_tokens(chunk, last)
        if not self._left:
            self._end(self._id, (self._handle.error or CoserveError("the request failed")) if failed else None)

    def _post_tokens(self, chunk: Chunk, last: bool) -> None:
        handle = self._handle
        self._post(Tokens(
            id=self._id, index=chunk.index, text=chunk.text, token_ids=list(chunk.token_ids), time_s=time.monotonic(),
            finish_reason=chunk.finish_reason, cached_tokens=handle.cached_tokens if self._first else 0,
            begun_s=handle.begun_s if self._first else None, logprobs=_entries(chunk.logprobs),
            prompt_logprobs=_entries(handle.prompt_logprobs) if last and not self._sent_prompt else [],
        ))
        self._sent_prompt = self._sent_prompt or last  # once: they are the same for all outputs
        self._first = self._first and not chunk.token_ids  # an output may have ended by what it came with


def _entries(logprobs: Iterable[TokenLogprob]) -> list[LogprobEntry]:
    return [LogprobEntry(token=found.token, logprob=found.logprob, top=list(found.top)) for found in logprobs]
