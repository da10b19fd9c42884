"""Brings what jobs have made to the artifact store, job by job in order, and says of each job whether it has to wait for that.

    the engine writes --box--> waits --> is sent, again while the store refuses --> the row that makes it visible

A job may run on while one checkpoint is on its way. If another one waits behind, or the store refuses, the job is held. Owns:
the order, tries, the events about waiting. Does not own: what is sent (parcels.py), rows (fenced.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from coserve.server.errors import StorageRefused
from coserve.server.index.disk import storage_errors
from coserve.server.jobs.journal import RETRY_S
from coserve.server.jobs.queue import UnfinishedJob
from coserve.server.locks import NameLocks
from coserve.server.replicas.parcels import drop_box

_THREADS = 4
_MOST_BEHIND = 2
"""Checkpoints of a job, waiting or on their way, from which on the job is held."""
_SLOW_S = 10.0
"""Seconds after which an event tells that a job is held."""
T = TypeVar("T")


class JobNotes(Protocol):
    """Adds an event to a job."""

    def __call__(self, id: str, message: str, *, level: Literal["info", "warn", "error"] = "info") -> None: ...


class Deliveries:
    """Belongs to one event loop. note: adds an event. hold: says of a job whether it must wait for the store."""

    def __init__(self, note: JobNotes, hold: Callable[[UnfinishedJob, bool], None]) -> None:
        self._note, self._hold = note, hold
        self._senders = ThreadPoolExecutor(_THREADS, "coserve-deliveries")
        self._packer = ThreadPoolExecutor(1, "coserve-boxes")
        self._locks, self._packing = NameLocks(), NameLocks()
        self._behind: Counter[str] = Counter()
        self._refused: dict[str, set[str]] = {}  # by job: who refuses its files
        self._slow: dict[str, asyncio.TimerHandle] = {}
        self._under_way: dict[Future[Any], str] = {}

    def close(self) -> None:
        """Sends nothing more."""
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._packer.shutdown(wait=False, cancel_futures=True)

    def forget(self, job: str) -> None:
        """The job's run has ended."""
        self._refused.pop(job, None)
        if (told := self._slow.pop(job, None)) is not None:
            told.cancel()

    async def pack(self, live: UnfinishedJob, action: Callable[[], T]) -> T:
        """Runs an action in a thread, behind those of the job before it, and again while the disk refuses it."""
        async with self._packing.hold(live.record.id):
            return await self._insist(live, "the disk", self._packer, action)

    def drop(self, box: Path) -> None:
        """Removes a box, behind the packing of it that may be under way."""
        with contextlib.suppress(RuntimeError):  # closed: it goes with the run's directory
            self._packer.submit(drop_box, box)

    @asynccontextmanager
    async def turn(self, live: UnfinishedJob) -> AsyncIterator[None]:
        """Waits until what the job has made before has been delivered."""
        job = live.record.id
        self._behind[job] += 1
        self._decide(live)
        try:
            async with self._locks.hold(job):
                yield
        finally:
            self._behind[job] -= 1
            self._decide(live)
            if not self._behind[job]:
                del self._behind[job]

    async def send(self, live: UnfinishedJob, action: Callable[[], T]) -> T:
        """Runs an action in a thread, and again while the store refuses it."""
        return await self._insist(live, "the artifact store", self._senders, action)

    async def _insist(self, live: UnfinishedJob, place: str, threads: Executor, action: Callable[[], T]) -> T:
        """place: what takes the job's files, or refuses them."""
        job = live.record.id
        while True:
            try:
                done = await asyncio.wrap_future(self._submit(job, threads, action))
            except StorageRefused as error:
                refusing = self._refused.setdefault(job, set())
                if place not in refusing:
                    self._note(job, f"{error}: the job waits, and goes on when its files can be stored", level="warn")
                refusing.add(place)
                self._decide(live)
                await asyncio.sleep(RETRY_S)
            else:
                if place in (refusing := self._refused.get(job, set())):
                    refusing.discard(place)
                    self._note(job, f"{place} takes the job's files again; the job goes on")
                    self._decide(live)
                return done

    def _submit(self, job: str, threads: Executor, action: Callable[[], T]) -> Future[T]:
        future = threads.submit(_refusable, action)
        self._under_way[future] = job
        future.add_done_callback(lambda done: self._under_way.pop(done, None))
        return future

    async def idle(self, job: str) -> None:
        """Returns when nothing of a job is being packed or sent, also not for those who have given up waiting for it."""
        left = [asyncio.wrap_future(future) for future, of in list(self._under_way.items()) if of == job]
        await asyncio.gather(*left, return_exceptions=True)

    def _decide(self, live: UnfinishedJob) -> None:
        job = live.record.id
        behind = self._behind[job] >= _MOST_BEHIND
        if behind and job not in self._slow:
            self._slow[job] = asyncio.get_running_loop().call_later(_SLOW_S, self._tell, job)
        elif not behind and (told := self._slow.pop(job, None)) is not None:
            told.cancel()
        self._hold(live, behind or bool(self._refused.get(job)))

    def _tell(self, job: str) -> None:
        self._note(job, "the artifact store takes the job's checkpoints more slowly than they come: the job waits for it")


def _refusable(action: Callable[[], T]) -> T:
    """Runs an action. What the system refuses for now, such as opening a file, is raised as StorageRefused."""
    with storage_errors():
        return action()
