"""What happens to jobs, written down in order by one thread, and told to those who follow a job's events.

    event loop --write(action)--> the thread: index, manifests, files --event--> followers' queues, on the event loop

So a slow disk or database delays the record, never the streams of other users. An action that must not be lost is "kept": it
waits while the disk refuses it, and later kept actions of the same job wait behind it.

Owns: the thread, the followers, what waits. Does not own: what is written (service.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

from coserve.core import CapacityError, CoserveError
from coserve.finetune.disk import refusal_of
from coserve.server.index.store import Store
from coserve.server.records import EventRecord, JobRecord, now

RETRY_S = 5.0
"""Seconds after which what the disk has refused, for example since it is full, is tried again."""
_LAST_TRIES_S = 2.0
"""Seconds at the end in which actions are still tried although the disk refuses others; the rest follows at the next start."""
_PAGE = 1000
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class _Kept(NamedTuple):
    """An action that waits for the disk, and whoever waits for it."""

    action: Callable[[], Any]
    future: asyncio.Future[Any]


class JobJournal:
    """Coroutines, `write` and `keep` belong to the event loop; `event` and `end` to actions; `events` to any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "coserve-jobs")
        self._followers: dict[str, set[asyncio.Queue[EventRecord | None]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: dict[str, deque[_Kept]] = {}  # of the thread
        self._busy_since: float | None = None
        self._closing_s: float | None = None  # when the end began
        self._ending = False

    def write(self, action: Callable[[], _T]) -> asyncio.Future[_T]:
        """Runs an action behind those before it. A failure is raised where the future is awaited, and logged."""
        self._loop = asyncio.get_running_loop()
        future = self._loop.run_in_executor(self._thread, self._timed, action)
        future.add_done_callback(_log_failure)
        return future

    def keep(self, job: str, action: Callable[[], _T]) -> asyncio.Future[_T]:
        """Runs an action behind those before it, and again while the disk refuses it. Later kept actions of the job wait. The
        action must be repeatable. Other failures are raised where the future is awaited, and logged."""
        self._loop = loop = asyncio.get_running_loop()
        future: asyncio.Future[_T] = loop.create_future()
        future.add_done_callback(lambda done: _log_failure(done, job))
        self._thread.submit(self._timed, lambda: self._put(job, _Kept(action, future)))
        return future

    def drop(self, job: str) -> asyncio.Future[None]:
        """Forgets what is kept of a job and waits: it isn't to be written any more. The future is done when nothing of what was
        written or kept before will be."""
        return self.write(lambda: self._drop(job))

    def refuses(self, job: str) -> bool:
        """Whether the disk refuses what is kept of a job."""
        return job in self._waiting

    @property
    def busy_s(self) -> float:
        """For how long the thread has been at the present action."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def _timed(self, action: Callable[[], _T]) -> _T:
        self._busy_since = time.monotonic()
        try:
            return action()
        finally:
            self._busy_since = None

    # --- in the thread ---

    def _put(self, job: str, kept: _Kept) -> None:
        behind = self._waiting.get(job)
        if behind is not None:
            behind.append(kept)
        elif self._gives_up:
            self._waiting[job] = deque([kept])
        elif (refusal := self._try(kept)) is not None:
            _log.warning("the record of a job can't be written (%s); it is tried again", refusal, extra={"job": job})
            waiting = self._waiting[job] = deque([kept])
            self._later(job, waiting)

    def _drop(self, job: str) -> None:
        for kept in self._waiting.pop(job, ()):
            self._call_loop(kept.future.cancel)

    @property
    def _gives_up(self) -> bool:
        """Whether it is too late to try again, since the server is ending and each try of a busy index takes seconds."""
        return self._closing_s is not None and bool(self._waiting) and time.monotonic() - self._closing_s > _LAST_TRIES_S

    def _try(self, kept: _Kept) -> Exception | None:
        """Runs an action. Returns the disk's refusal, or None if there was none."""
        try:
            result = kept.action()
        except Exception as error:
            if isinstance(error, CapacityError) or refusal_of(error) is not None:
                return error
            self._call_loop(_settle, kept.future, None, error)
        else:
            self._call_loop(_settle, kept.future, result, None)
        return None

    def _retry(self, job: str, waiting: deque[_Kept]) -> None:
        if self._waiting.get(job) is not waiting:
            return  # it was dropped
        while waiting and not self._gives_up:
            if self._try(waiting[0]) is not None:
                self._later(job, waiting)
                return
            waiting.popleft()
        if waiting:
            return
        del self._waiting[job]
        _log.info("the record of a job is written again", extra={"job": job})

    def _later(self, job: str, waiting: deque[_Kept]) -> None:
        def retry() -> None:
            if self._closing_s is None:
                self._thread.submit(self._timed, lambda: self._retry(job, waiting))

        assert self._loop is not None
        self._call_loop(self._loop.call_later, RETRY_S, retry)

    def _call_loop(self, action: Callable[..., object], *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, *arguments)

    # --- events ---

    def event(
        self, job: str, message: str, *, level: Literal["info", "warn", "error"] = "info", data: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Adds an event, to be called by actions. step: given if the event has the metrics of this step."""
        record = self._store.add_event(
            job, level=level, type="message" if step is None else "metrics", message=message, data=data, step=step,
            created_at=now(),
        )
        self._call_loop(self._hand_out, job, record)

    def end(self, job: str) -> None:
        """Ends the streams of a job's followers, to be called by actions: no more events come."""
        self._call_loop(self._hand_out, job, None)

    def events(self, job: str) -> list[EventRecord]:
        """All events of a job, oldest first."""
        found, more = self._store.list_events(job, limit=_PAGE)
        while more:
            page, more = self._store.list_events(job, after=found[-1].id, limit=_PAGE)
            found += page
        return found[::-1]

    async def follow(self, job: JobRecord, ended: Callable[[], bool], after: str | None) -> AsyncIterator[EventRecord]:
        """Yields the events so far and then new ones as they come, until the job ends. after: the id of an event; only later
        ones are told. ended: tells whether the index knows the job's end."""
        queue: asyncio.Queue[EventRecord | None] = asyncio.Queue()
        self._followers.setdefault(job.id, set()).add(queue)
        try:
            over, known = await asyncio.to_thread(lambda: (ended(), self.events(job.id)))
            last = next((event.seq for event in known if event.id == after), 0)
            for event in known:
                if event.seq > last:
                    last = event.seq
                    yield event
            while not (over or self._ending):
                new = await queue.get()
                if new is None:
                    return
                if new.seq > last:  # else a step that ran again: its metrics are those that were told
                    last = new.seq
                    yield new
        finally:
            followers = self._followers.get(job.id, set())
            followers.discard(queue)
            if not followers:
                self._followers.pop(job.id, None)

    def end_streams(self) -> None:
        """Ends all followers' streams, since the server is about to end."""
        self._ending = True
        for job in list(self._followers):
            self._hand_out(job, None)

    async def close(self) -> None:
        """Ends all streams; waits until everything is written that the disk takes. The rest is told again at the next start,
        from manifests and tables."""
        self._closing_s = time.monotonic()
        self.end_streams()
        await asyncio.to_thread(self._thread.shutdown)
        for waiting in self._waiting.values():
            for kept in waiting:
                kept.future.cancel()
        await asyncio.sleep(0)  # what the thread has told the loop

    def _hand_out(self, job: str, event: EventRecord | None) -> None:
        for queue in self._followers.get(job, ()):
            queue.put_nowait(event)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _log_failure(future: asyncio.Future[Any], job: str = "") -> None:
    if future.cancelled() or (error := future.exception()) is None:
        return
    known = isinstance(error, CoserveError)
    _log.error(
        "a job's record could not be written: %s", error, exc_info=None if known else error, extra={"job": job} if job else {}
    )
