"""Streams of jobs' events at an ingress: the index is asked twice a second for all jobs that somebody follows.

Owns: who follows which job, the polling. Does not own: the queries (deskrows.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator

from coserve.server.errors import StorageRefused
from coserve.server.records import EventRecord, JobRecord
from coserve.server.replicas.deskrows import DeskStore, Followed

POLL_S = 0.5
_PAGE = 1000
_GONE = Followed(0, ended=True)
_log = logging.getLogger(__name__)


class EventFollowers:
    """Belongs to one event loop. It has what the rest of a server uses of a JobJournal."""

    busy_s = 0.0
    """Nothing is written here that could hang."""

    def __init__(self, store: DeskStore) -> None:
        self._store = store
        self._jobs: Counter[str] = Counter()
        self._known: dict[str, Followed] = {}
        self._news = asyncio.Condition()
        self._poller: asyncio.Task[None] | None = None
        self._ending = False

    async def follow(self, job: JobRecord, after: int) -> AsyncIterator[EventRecord]:
        """Yields events as they come, oldest first, until the job ends. after: the seq of an event; only later ones are
        told."""
        self._jobs[job.id] += 1
        if self._poller is None or self._poller.done():
            self._poller = asyncio.create_task(self._poll())
        last = after
        try:
            ended = False
            while not self._ending:
                try:
                    if not ended:  # looked at before the events are read, so that none is missed
                        ended = (await asyncio.to_thread(self._store.followed, [job.id])).get(job.id, _GONE).ended
                    new = await asyncio.to_thread(self._store.events_after, job.id, last, _PAGE)
                except StorageRefused:
                    await asyncio.sleep(POLL_S)
                    continue
                for event in new:
                    last = event.seq
                    yield event
                if not new and ended:
                    return
                if not new:
                    await self._wait(job.id, last)
        finally:
            self._jobs[job.id] -= 1
            if not self._jobs[job.id]:
                del self._jobs[job.id]
                self._known.pop(job.id, None)

    async def _wait(self, job: str, last: int) -> None:
        """Until there is a later event, the job has ended, or the streams end."""
        def has_news() -> bool:
            known = self._known.get(job)
            return self._ending or (known is not None and (known.ended or known.seq > last))

        async with self._news:
            await self._news.wait_for(has_news)

    async def _poll(self) -> None:
        while self._jobs and not self._ending:
            began = time.monotonic()
            try:
                found = await asyncio.to_thread(self._store.followed, list(self._jobs))
            except StorageRefused as error:
                _log.warning("events of jobs can't be read: %s", error)
            else:
                gone = {job: _GONE for job in self._jobs if job not in found}
                self._known = {job: at for job, at in (found | gone).items() if job in self._jobs}
                async with self._news:
                    self._news.notify_all()
            await asyncio.sleep(max(0.0, began + POLL_S - time.monotonic()))

    def end_streams(self) -> None:
        """Ends all streams, since the server is about to end."""
        self._ending = True
        if self._poller is not None and not self._poller.done():
            asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def close(self) -> None:
        """Ends all streams and the polling."""
        self._ending = True
        await self._notify()
        if self._poller is not None:
            self._poller.cancel()
            await asyncio.gather(self._poller, return_exceptions=True)
