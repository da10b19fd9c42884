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
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from coserve.server.errors import StorageRefused
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
        self._locks = NameLocks()
        self._behind: Counter[str] = Counter()
        self._refused: set[str] = set()
        self._slow: dict[str, asyncio.TimerHandle] = {}

    def close(self) -> None:
        """Sends nothing more."""
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._packer.shutdown(wait=False, cancel_futures=True)

    def forget(self, job: str) -> None:
        """The job's run has ended."""
        self._refused.discard(job)
        if (told := self._slow.pop(job, None)) is not None:
            told.cancel()

    async def pack(self, action: Callable[[], T]) -> T:
        """Runs an action behind those before it, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._packer, action)

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
        job = live.record.id
        while True:
            try:
                sent = await asyncio.get_running_loop().run_in_executor(self._senders, action)
            except StorageRefused as error:
                if job not in self._refused:
                    self._note(job, f"{error}: the job waits, and goes on when its files can be stored", level="warn")
                self._refused.add(job)
                self._decide(live)
                await asyncio.sleep(RETRY_S)
            else:
                if job in self._refused:
                    self._refused.discard(job)
                    self._note(job, "the artifact store takes the job's files again; the job goes on")
                    self._decide(live)
                return sent

    def _decide(self, live: UnfinishedJob) -> None:
        job = live.record.id
        behind = self._behind[job] >= _MOST_BEHIND
        if behind and job not in self._slow:
            self._slow[job] = asyncio.get_running_loop().call_later(_SLOW_S, self._tell, job)
        elif not behind and (told := self._slow.pop(job, None)) is not None:
            told.cancel()
        self._hold(live, behind or job in self._refused)

    def _tell(self, job: str) -> None:
        self._note(job, "the artifact store takes the job's checkpoints more slowly than they come: the job waits for it")
