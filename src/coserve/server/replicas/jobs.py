"""The finetuning jobs of one replica: claimed from the index, run on its engine, and left to others when it drains or is too
late.

    index --claim--> validating_files --> queued --> running --> its end is written
               ^                                        |
               +---- given back: drained, no room ------+---- lost: a renewal or a write finds another epoch

One task keeps the leases and claims jobs (cluster/leases.py decides when). It never waits for the database: renewals and claims
run beside it, so that jobs pause in time whatever the database does. Owns: what becomes of a job between its claim and its end
here. Does not own: which jobs are taken, and when (jobsearch.py), the run (runner.py), what tenants ask for (desk.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from coserve.cluster.leases import LeaseBook, LeaseChanges, LeaseTiming
from coserve.core import JobFailed
from coserve.server.errors import StorageRefused
from coserve.server.index.store import Store
from coserve.server.jobs.data import DataReader
from coserve.server.jobs.intake import disk_problem
from coserve.server.jobs.queue import MAX_STRIKES, UnfinishedJob
from coserve.server.jobs.validation import DataValidation
from coserve.server.link.engineclient import EngineClient
from coserve.server.records import ENDED
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.claims import ClaimedJob, HeldRow, JobClaims
from coserve.server.replicas.fenced import Fenced, FencedStore
from coserve.server.replicas.files import StoredFiles
from coserve.server.replicas.helping import JobHelp
from coserve.server.replicas.jobsearch import JobSearch
from coserve.server.replicas.runner import Hold, ReplicaRunner, ServedNames
from coserve.server.replicas.runs import RunsEngine, run_name
from coserve.server.replicas.scratch import ScratchOutputs
from coserve.server.replicas.setup import DRAIN_S
from coserve.server.replicas.sweeping import sweep_job
from coserve.server.replicas.usage import StoredBytes
from coserve.server.settings import ServerConfig

_MAX_VALIDATING = 4
"""Jobs whose data a replica reads or is about to read, so that others get some."""
T = TypeVar("T")
_LAST_S = 2.0
"""Seconds at the end for jobs that are just leaving."""
_log = logging.getLogger(__name__)


def boot_clock() -> float:
    """Seconds of a clock that goes on while processes, or the machine, are stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class _Mine(NamedTuple):
    """A job that this replica has. run: its name in the engine and on the disk."""

    live: UnfinishedJob
    run: str


class ReplicaJobs:
    """Belongs to one event loop, on which it must be made.

    index: on PostgreSQL. replica: a name that no other replica has. scratch: a directory of this process alone, where it
    removes what earlier ones have left. headroom: tells the share of time that training could get here, 0 to 1. help: with jobs
    that several replicas may share (helping.py); None: this one has each of its jobs for itself.
    """

    def __init__(
        self, index: Store, artifacts: ArtifactStore, engine: EngineClient, config: ServerConfig, replica: str, scratch: Path,
        *, headroom: Callable[[], float] = lambda: 1.0, timing: LeaseTiming | None = None,
        clock: Callable[[], float] = boot_clock, help: JobHelp | None = None,
    ) -> None:
        """Raises ConfigError where the index isn't on PostgreSQL, StorageRefused where the disk refuses."""
        self._engine, self._config, self._replica, self._headroom, self._clock = engine, config, replica, headroom, clock
        self._loop = asyncio.get_running_loop()
        self._timing = timing or LeaseTiming()
        self._book = LeaseBook(self._timing)
        self._claims = JobClaims(index.database, replica, self._timing.lease_s)
        self._index, self._artifacts = index, artifacts
        store = FencedStore(index.database.limited(), self._book.epoch, self._on_fenced)
        self._usage = StoredBytes(store)
        files = StoredFiles(artifacts, scratch / "files", store, config.max_file_bytes, config.max_tenant_file_bytes)
        self._runs = RunsEngine(engine, self._book.epoch, help)
        models = ServedNames(lambda: config.served_model_name or (engine.info.model,))
        self._outputs = ScratchOutputs(
            scratch / "runs", store, files, models, artifacts, epochs=self._book.epoch, warn=self._warn_soon
        )
        self._runner = ReplicaRunner(
            store, self._outputs, models, self._runs, config, artifacts, self._check_disk, epochs=self._book.epoch,
            on_left=self._on_left, on_refused=self._on_refused, on_ended=self._on_ended,
        )
        self._validation = DataValidation(
            self._runner, self._outputs, DataReader(config.chat_template), lambda: engine.info
        )
        self._store = store
        self._mine: dict[str, _Mine] = {}
        """Jobs that this replica has, also while their end is being written."""
        self._going: set[str] = set()
        """Jobs that it had until now: not to be claimed again before nothing of them is left here."""
        self._threads = ThreadPoolExecutor(3, "coserve-leases")  # a renewal, a claim, a return
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake, self._left = asyncio.Event(), asyncio.Event()
        self._search = JobSearch(self._claims, self._timing, self._clock(), self._in_thread)
        self._claiming = self._stopping = False
        engine.supervisor.on_up(self._engine_up)
        engine.supervisor.on_down(self._engine_down)

    @property
    def held(self) -> Mapping[str, int]:
        """The epochs of the jobs that this replica has."""
        return self._book.jobs

    async def start(self) -> None:
        """Begins to claim jobs. Leases that an earlier process of this name has left end at once."""
        with contextlib.suppress(StorageRefused):  # else they end by themselves
            await self._in_thread(self._claims.abandon)
        self._spawn(self._keep())

    async def drain(self, seconds: float = DRAIN_S) -> None:
        """Claims nothing more, hands over every job at the end of its step, and returns when this replica has none, or when the
        time is over: `stop` then gives back what is left, to go on from its last checkpoint in the store."""
        self._runner.draining = True
        for mine in list(self._mine.values()):
            self._leave(mine)
        try:
            async with asyncio.timeout(seconds):
                while self._mine or self._going:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            _log.warning("not handed over within %g s: %s", seconds, ", ".join(self._mine))

    async def stop(self) -> None:
        """To be called before the engine ends, after `drain` unless there is no time: jobs then go on elsewhere from their last
        checkpoint in the store."""
        self._stopping = True
        self._wake.set()
        if self._tasks:  # jobs that are just leaving
            await asyncio.wait(self._tasks, timeout=_LAST_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._runner.stop()
        for job, epoch in self._book.jobs.items():
            self._book.drop(job)
            with contextlib.suppress(StorageRefused):  # else the lease ends by itself
                await self._in_thread(lambda job=job, epoch=epoch: self._claims.give_back(job, epoch))  # type: ignore[misc]
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._claims.close()
        if self._store.database is not self._index.database:
            self._store.close()

    def nudge(self, job: str) -> None:
        """The row of a job has changed, or there is a new one: it is looked at now."""
        now = self._clock()
        if job in self._mine:
            self._book.hurry(now)
        self._search.next_s = now
        self._wake.set()

    # --- the task that keeps leases and claims jobs ---

    async def _keep(self) -> None:
        while not self._stopping:
            now = self._clock()
            try:
                until = self._look(now)
            except Exception:  # a bug; without leases there would be no jobs here any more
                _log.exception("jobs of this replica: an unexpected error")
                until = now + self._search.poll_s
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), max(0.0, until - now))
            self._wake.clear()

    def _look(self, now: float) -> float:
        """Does what is due, and returns when to look again."""
        self._take_over(self._book.look(now))
        if asked := self._book.renewal(now):
            self._spawn(self._renew(dict(asked)))
        self._return_surplus()
        may_claim = self._may_claim and not self._claiming
        if may_claim and now >= self._search.next_s:
            self._claiming, may_claim = True, False
            self._spawn(self._claim())
        return min(self._book.next_s(), self._search.next_s if may_claim else now + self._search.poll_s)

    def _take_over(self, changes: LeaseChanges) -> None:
        for jobs, lapsed in ((changes.lapsed, True), (changes.regained, False)):
            for job in jobs:
                _log.warning("the lease %s", "may end before it is renewed; the job pauses" if lapsed else "is renewed again; "
                             "the job goes on", extra={"job": job})
                if (mine := self._mine.get(job)) is not None:
                    self._runner.hold(mine.live, Hold.LEASE, lapsed)
        for job in changes.lost:
            self._lose(job)

    async def _renew(self, asked: Mapping[str, int]) -> None:
        try:
            rows: Mapping[str, HeldRow] = await self._in_thread(lambda: self._claims.renew(asked))
        except StorageRefused as error:
            _log.warning("leases can't be renewed: %s", error)
            self._search.refused(self._clock())
            self._book.failed(self._clock())
        except Exception:  # a bug; the leases are needed all the same
            _log.exception("leases can't be renewed: an unexpected error")
            self._book.failed(self._clock())
        else:
            self._take_over(self._book.answered({job: row.epoch for job, row in rows.items()}, self._clock()))
            for job, row in rows.items():
                if (mine := self._mine.get(job)) is not None and self._book.epoch(job) == row.epoch:
                    self._runner.show_paused(mine.live, row.paused)
        finally:
            self._wake.set()

    @property
    def _may_claim(self) -> bool:
        return self._engine.ready and not self._runner.draining and any(self._room)

    @property
    def _room(self) -> tuple[bool, bool]:
        """Whether another job may run here, and whether another one's data may be read."""
        statuses = [mine.live.record.status for mine in self._mine.values() if not mine.live.record.paused]
        running = sum(status in ("queued", "running") for status in statuses)
        return running < self._config.max_jobs, statuses.count("validating_files") < _MAX_VALIDATING

    async def _claim(self) -> None:
        now, (may_run, may_validate) = self._clock(), self._room
        running = sum(mine.live.record.status == "running" for mine in self._mine.values())
        try:
            claimed = await self._search.find(
                now, self._engine.info.fingerprint, delay_s=self._timing.claim_delay(self._headroom(), running),
                may_run=may_run, may_validate=may_validate, but={*self._mine, *self._going},
            )
            if claimed is not None:
                await self._take(claimed, now)
        except (StorageRefused, Fenced) as error:
            _log.warning("jobs can't be claimed: %s", error)
            self._search.next_s = now + self._search.poll_s
            if isinstance(error, StorageRefused):
                self._search.refused(self._clock())
        except Exception:  # a bug; it must not be tried again without a pause
            _log.exception("jobs can't be claimed: an unexpected error")
            self._search.next_s = now + self._search.poll_s
        finally:
            self._claiming = False
            self._wake.set()

    async def _take(self, claimed: ClaimedJob, sent_s: float) -> None:
        record, runner = claimed.record, self._runner
        self._book.took(record.id, claimed.epoch, sent_s)
        live = UnfinishedJob(record, furthest=record.step, strikes=claimed.strikes, struck_at=claimed.struck_at)
        self._mine[record.id] = mine = _Mine(live, run_name(record.id, claimed.epoch))
        self._outputs.start_sha256[record.id] = claimed.start_sha256 or ""
        try:
            await asyncio.to_thread(self._outputs.open, record.id)
        except StorageRefused as error:  # of the scratch disk. Others are to have the job, which this replica would claim again
            _log.warning("a job can't be taken, and none is for a while: %s", error, extra={"job": record.id})
            self._search.next_s = self._clock() + self._timing.lease_s
            self._give_back(mine)
            return
        runner.live[record.id] = live
        if claimed.hopeless is not None:
            runner.spawn(runner.fail(live, JobFailed(claimed.hopeless)), live)
            return
        if record.status == "running":
            died = "" if claimed.before is None else f"The replica {claimed.before} doesn't answer any more. "
            text = f"{died}The job goes on from its last checkpoint, on the replica {self._replica}"
            runner.note(record.id, text, level="warn" if died else "info")
        if claimed.strikes >= 2 * MAX_STRIKES:
            given_up = JobFailed(
                f"replicas have died or failed {MAX_STRIKES} times or more while they had this job at step {record.step + 1}, "
                "so the job is given up"
            )
            runner.spawn(runner.fail(live, given_up), live)
        elif record.status == "validating_files":
            self._validation.begin(live)
        else:
            runner.advance()

    def _return_surplus(self) -> None:
        """Gives back jobs that wait here although others may have room for them."""
        gone = self._engine.supervisor.failure is not None  # no engine will be started again
        if not gone and not self._engine.ready:
            return
        self._runner.advance()
        for job, live in list(self._runner.live.items()):
            waits = live.record.status != "validating_files" and live.generation is None
            if (gone or waits) and job in self._mine:
                self._give_back(self._mine[job])

    # --- jobs leave ---

    def _on_fenced(self, job: str) -> None:
        """A write has found another epoch; in any thread."""
        self._loop.call_soon_threadsafe(self._lose, job)

    def _lose(self, job: str) -> None:
        """The job is another's, or it was cancelled: nothing more of it is written, and the engine stops working on it."""
        mine = self._mine.get(job)
        if mine is not None and (mine.live.record.status not in ENDED or job in self._runner.ending):  # else its end is written
            _log.info("the job is another replica's by now, or it was cancelled", extra={"job": job})
            self._clear(mine)

    def _on_ended(self, live: UnfinishedJob) -> None:
        mine = self._mine.get(live.record.id)
        if mine is not None and mine.live is live and not self._stopping:
            self._clear(mine)

    def _on_left(self, live: UnfinishedJob) -> None:
        mine = self._mine.get(live.record.id)
        if mine is not None and mine.live is live:
            self._give_back(mine)

    def _on_refused(self, live: UnfinishedJob) -> None:
        self._search.decline(live.record.id)
        self._on_left(live)

    def _leave(self, mine: _Mine) -> None:
        """Has a job leave at the end of its step, or now if the engine hasn't got it. One that is ending ends here."""
        job = mine.live.record.id
        if job not in self._runner.live:
            return
        if self._engine.ready and self._runs.has(mine.run):
            self._runs.act_job(job, "hand_over")
        else:
            self._give_back(mine)

    def _give_back(self, mine: _Mine) -> None:
        """Lets others have a job, when what it has made here is in the store."""
        job = mine.live.record.id
        if job not in self._going:
            self._going.add(job)
            self._runner.live.pop(job, None)
            self._spawn(self._deliver_and_give_back(mine))

    async def _deliver_and_give_back(self, mine: _Mine) -> None:
        job, epoch = mine.live.record.id, self._book.epoch(mine.live.record.id)
        self._validation.cancel(job)
        await self._runner.delivered(mine.live)
        if epoch is None or self._mine.get(job) is not mine:
            return  # it was lost meanwhile
        self._clear(mine, partial(self._claims.give_back, job, epoch))

    def _clear(self, mine: _Mine, give_back: Callable[[], None] = lambda: None) -> None:
        """Forgets a job, and removes what is left of its run here. give_back: lets others claim it."""
        job = mine.live.record.id
        self._going.add(job)
        del self._mine[job]
        self._book.drop(job)
        self._validation.cancel(job)
        self._spawn(self._clear_away(mine, give_back))

    async def _clear_away(self, mine: _Mine, give_back: Callable[[], None]) -> None:
        job = mine.live.record.id
        try:
            await self._runner.forget(mine.live)
            try:
                await self._in_thread(give_back)
            except StorageRefused as error:  # the lease ends by itself
                _log.warning("a job can't be given back: %s", error, extra={"job": job})
            await self._runs.end_run(mine.run)
            await asyncio.to_thread(self._outputs.close, mine.run)
            self._spawn(self._sweep(job))
        finally:
            self._outputs.start_sha256.pop(job, None)
            self._going.discard(job)
            self._left.set()
            self._wake.set()

    async def _sweep(self, job: str) -> None:
        await self._runner.deliveries.idle(job)
        await sweep_job(self._store, self._artifacts, job)

    # --- the engine ---

    async def _engine_up(self) -> None:
        for live in list(self._runner.live.values()):
            if live.record.status == "validating_files":
                self._validation.begin(live)
        self._runner.advance()
        self._wake.set()

    def _engine_down(self) -> None:
        if self._runner.draining and not self._stopping:
            for mine in list(self._mine.values()):
                self._leave(mine)
        self._wake.set()

    # --- the rest ---

    async def _check_disk(self, live: UnfinishedJob) -> None:
        """After a checkpoint: pauses the job if its tenant has stored more than it may. While the database is away nobody
        knows; the next checkpoint will tell."""
        id, tenant = live.record.id, live.record.tenant
        try:
            held = await asyncio.to_thread(self._usage.bytes_of, tenant)
        except StorageRefused as error:
            _log.warning("what a tenant has stored can't be counted: %s", error, extra={"job": id})
            return
        problem = disk_problem(held, self._config.max_tenant_file_bytes)
        if problem is not None and not live.record.paused and id in self._runner.live:
            self._runner.note(id, f"The job waits: {problem}, then resume it", level="warn")
            await self._runner.journal.keep(id, lambda: self._store.update_job(id, paused=True))
            self._runner.show_paused(live, True)

    def _warn_soon(self, job: str, message: str) -> None:
        self._loop.call_soon_threadsafe(lambda: self._runner.note(job, message, level="warn"))

    async def _in_thread(self, action: Callable[[], T]) -> T:
        return await self._loop.run_in_executor(self._threads, action)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_end)

    def _on_task_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("jobs of this replica: an unexpected error", exc_info=error)
