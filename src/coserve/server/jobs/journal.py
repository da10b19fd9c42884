"""What happens to jobs, written down in order by one thread, and told to those who follow a job's events.

    event loop --write(action)--> the thread: index, manifests, files --event--> followers' queues, on the event loop

So a slow disk or database delays the record, never the streams of other users. Owns: the thread, the followers. Does not own:
what is written (service.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from coserve.core import CoserveError
from coserve.server.index.store import Store
from coserve.server.records import EventRecord, JobRecord, now

_PAGE = 1000
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class JobJournal:
    """Coroutines and `write` belong to the event loop; `event`, `update` and `events` to any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._thread = ThreadPoolExecutor(1, "coserve-jobs")
        self._followers: dict[str, set[asyncio.Queue[EventRecord | None]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def write(self, action: Callable[[], _T]) -> asyncio.Future[_T]:
        """Runs an action behind those before it. A failure is raised where the future is awaited, and logged."""
        self._loop = asyncio.get_running_loop()
        future = self._loop.run_in_executor(self._thread, action)
        future.add_done_callback(_log_failure)
        return future

    def event(
        self, job: str, message: str, *, level: Literal["info", "warn", "error"] = "info", data: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Adds an event now; with a step, the metrics of that step. For actions."""
        record = self._store.add_event(
            job, level=level, type="message" if step is None else "metrics", message=message, data=data, step=step,
            created_at=now(),
        )
        self._tell(job, record)

    def end(self, job: str) -> None:
        """No more events come; followers' streams end. For actions."""
        self._tell(job, None)

    def events(self, job: str) -> list[EventRecord]:
        """All events, oldest first."""
        found, more = self._store.list_events(job, limit=_PAGE)
        while more:
            page, more = self._store.list_events(job, after=found[-1].id, limit=_PAGE)
            found += page
        return found[::-1]

    async def follow(self, job: JobRecord, ended: Callable[[], bool], after: str | None) -> AsyncIterator[EventRecord]:
        """Events as they come, those there are first, oldest first, until the job ends. after: an event's id; only later ones.
        ended: whether the index knows the job's end."""
        queue: asyncio.Queue[EventRecord | None] = asyncio.Queue()
        self._followers.setdefault(job.id, set()).add(queue)
        try:
            over, known = await asyncio.to_thread(lambda: (ended(), self.events(job.id)))
            last = 0
            if after is not None:
                last = next((event.seq for event in known if event.id == after), 0)
            for event in known:
                if event.seq > last:
                    last = event.seq
                    yield event
            while not over:
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

    async def close(self) -> None:
        """Ends all streams; waits until everything is written."""
        for job in list(self._followers):
            self._hand_out(job, None)
        await asyncio.to_thread(self._thread.shutdown)

    def _tell(self, job: str, event: EventRecord | None) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._hand_out, job, event)

    def _hand_out(self, job: str, event: EventRecord | None) -> None:
        for queue in self._followers.get(job, ()):
            queue.put_nowait(event)


def _log_failure(future: asyncio.Future[Any]) -> None:
    if future.cancelled() or (error := future.exception()) is None:
        return
    if isinstance(error, CoserveError):
        _log.error("a job's record could not be written: %s", error)
    else:
        _log.error("a job's record could not be written", exc_info=error)
