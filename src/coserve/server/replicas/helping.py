"""Replicas that help each other with jobs: who is asked, who says yes, and what its engine needs for it.

    holder's replica    host: a coordinator for the run --Invitation--> replicas that may help, again while there is room
    helper's replica    invited --> brings the job's files here --> StartJob as a member, which enters by itself

An invitation promises nothing: who has no time does not answer, and who comes too late is sent away. Owns: invitations, this
replica's shares in others' jobs. Does not own: steps (cluster/steps.py), envelopes (steplink.py), the holder's run (runs.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from coserve.cluster.steps import DIFFERS
from coserve.config.data import finetune_config_from_dict
from coserve.core import CoserveError
from coserve.durable import write_directory
from coserve.server.errors import EngineUnavailable
from coserve.server.index.disk import storage_errors
from coserve.server.index.store import Store
from coserve.server.jobs.hosting import EngineLife, JobFiles
from coserve.server.link.messages import JobShare, ShareEnded, StepSaid
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.parcels import link_tree, start_key
from coserve.server.replicas.stepcoordinator import StepCoordinator
from coserve.server.replicas.steplink import Invitation, StepLinks

INVITE_S = 3.0
"""Seconds between two invitations of a run that has room for more members."""
MAX_SHARES = 1
"""Jobs of others that a replica helps with at once."""
LEAST_HEADROOM = 0.1
"""The share of an engine's time that training must be able to get, for it to help."""
_AGAIN_S, _MOST_AGAIN_S = 30.0, 1800.0
"""Seconds for which a run is not helped again after that has ended, or its job after that has failed, at first and at most."""
_MOST_GUILTY = 2
"""Times that a share may crash this replica's engine, or give another adapter than the holder's, before its job is never helped
from here again."""
_log = logging.getLogger(__name__)


class SharingEngine(Protocol):
    """The engine of a replica, as EngineClient tells it."""

    @property
    def ready(self) -> bool:
        """Whether it takes jobs."""

    @property
    def supervisor(self) -> EngineLife:
        """The life of its process."""

    def on_step(self, listener: Callable[[StepSaid | ShareEnded], None]) -> None:
        """The listener is called with what the engine says as a member of jobs."""

    async def start_job(self, **fields: Any) -> None:
        """Returns when the job may get units. fields: those of StartJob, without `call`."""

    def act_job(self, job: str, action: str) -> None:
        """Cancels or hands over a share."""


class ShareFiles:
    """Brings to a directory what an engine needs to help with a job. Synchronous, for a thread."""

    def __init__(self, store: Store, files: JobFiles, artifacts: ArtifactStore) -> None:
        self._store, self._files, self._artifacts = store, files, artifacts

    def __call__(self, job: str, directory: Path) -> dict[str, Any]:
        """Fields of StartJob. Raises NotFound, StorageRefused."""
        record = self._store.get_job(None, job)
        paths: dict[str, str | None] = {"training_file": None, "validation_file": None}
        with storage_errors():
            for param in paths:
                id = getattr(record, param)
                if id is not None:
                    link_tree(self._files.path(self._store.get_file(record.tenant, id)), directory / param)
                    paths[param] = str(directory / param)
            start = None
            if record.start is not None:
                start = directory / "start"
                with self._artifacts.hold(start_key(job)) as found:  # members compare its digest
                    write_directory(start, lambda place: link_tree(found, place))
        return {
            **paths, "config": finetune_config_from_dict(record.config), "start": None if start is None else str(start),
            "tenant": record.tenant, "weight": record.weight,
        }


class _Share(NamedTuple):
    """A share in a job of another replica, since began_s. given: whether the engine has it, or is about to get it; then the
    engine says when it has ended."""

    invitation: Invitation
    began_s: float
    given: bool = False


class Backoff:
    """When what has ended may be tried again: after _AGAIN_S, and after twice as long each time that it ends soon again."""

    def __init__(self) -> None:
        self._ends: dict[str, tuple[int, float]] = {}  # how many, and until when it may not be tried

    def allows(self, name: str, now: float) -> bool:
        """Whether it may be tried now."""
        return name not in self._ends or now >= self._ends[name][1]

    def ended(self, name: str, began_s: float, now: float) -> None:
        """It was tried at `began_s` and has ended. Whatever lasted for longer than the longest pause went well, and what has
        not been tried for as long is forgotten."""
        self._ends = {other: end for other, end in self._ends.items() if now < end[1] + _MOST_AGAIN_S}
        before = 0 if now - began_s > _MOST_AGAIN_S else self._ends.get(name, (0, 0.0))[0]
        self._ends[name] = before + 1, now + min(_AGAIN_S * 2.0 ** min(before, 16), _MOST_AGAIN_S)


class _Hosted(NamedTuple):
    coordinator: StepCoordinator
    most: int
    inviting: asyncio.Task[None]


class JobHelp:
    """One replica's part in jobs that several replicas share. Belongs to one event loop.

    others: tells which replicas may be asked, those first that have most time. bring: as ShareFiles. headroom: tells the share
    of time that training could get here, 0 to 1. scratch: a directory of this process alone.
    """

    def __init__(
        self, replica: str, engine: SharingEngine, links: StepLinks, scratch: Path, *, others: Callable[[], Sequence[str]],
        bring: Callable[[str, Path], dict[str, Any]], headroom: Callable[[], float] = lambda: 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replica, self._engine, self._links, self._scratch = replica, engine, links, scratch
        self._others, self._bring, self._headroom, self._clock = others, bring, headroom, clock
        self._hosted: dict[str, _Hosted] = {}
        self._shares: dict[str, _Share] = {}
        self._backoff, self._guilty = Backoff(), Counter[str]()
        self._num_members = 0
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        shutil.rmtree(scratch, ignore_errors=True)
        engine.on_step(self._hear)
        engine.supervisor.on_down(self._engine_lost)
        links.on_invited(self._invited)
        links.on_abandoned(self._abandoned)

    # --- jobs that this replica holds ---

    def host(self, run: str, job: str, epoch: int, most: int, note: Callable[[str], None]) -> JobShare:
        """Before the engine gets a run: other replicas may help with it, so that `most` share it. note: takes lines for the
        job's events."""
        self.end(run)
        member = self._new_member()
        coordinator = self._links.host(run, epoch, member, most=most, note=note)
        invitation = Invitation(job=job, run=run, epoch=epoch)
        self._hosted[run] = _Hosted(coordinator, most, self._spawn(self._invite(coordinator, most, invitation)))
        return JobShare(epoch=epoch, member=member, primary=True)

    def end(self, run: str) -> None:
        """A run has ended here, if it was hosted."""
        hosted = self._hosted.pop(run, None)
        if hosted is not None:
            hosted.inviting.cancel()
            self._links.end(run)

    async def _invite(self, coordinator: StepCoordinator, most: int, invitation: Invitation) -> None:
        asked = 0
        while not coordinator.closed:
            others = [name for name in self._others() if name != self.replica]
            for _ in range(min(most - max(1, len(coordinator.members)), len(others))):
                self._links.invite(others[asked % len(others)], invitation)
                asked += 1  # who does not come is asked again when all others have been
            await asyncio.sleep(INVITE_S)

    # --- jobs that others hold ---

    @property
    def shares(self) -> tuple[str, ...]:
        """This replica's shares in jobs of others."""
        return tuple(self._shares)

    def _invited(self, replica: str, invitation: Invitation) -> None:
        now, run = self._clock(), invitation.run
        if self._stopping or not self._engine.ready or len(self._shares) >= MAX_SHARES:
            return
        if any(share.invitation.run == run for share in self._shares.values()):
            return
        job = invitation.job
        if self._guilty[job] >= _MOST_GUILTY or not (self._backoff.allows(run, now) and self._backoff.allows(job, now)):
            return
        if self._headroom() < LEAST_HEADROOM:
            return
        member = self._new_member()
        share = self._links.join(run, invitation.epoch, member, replica)
        self._shares[share] = _Share(invitation, now)
        self._spawn(self._help(share, member, invitation))

    async def _help(self, share: str, member: str, invitation: Invitation) -> None:
        directory = self._directory(share)
        try:
            await asyncio.to_thread(directory.mkdir, parents=True)
            fields = await asyncio.to_thread(self._bring, invitation.job, directory)
            if share in self._shares:  # else the engine has died, or the job's replica is gone
                self._shares[share] = self._shares[share]._replace(given=True)
                await self._engine.start_job(**fields | {
                    "id": share, "adapter": share, "directory": str(directory / "none"), "resume": False,
                    "share": JobShare(epoch=invitation.epoch, member=member, primary=False),
                })
        except (CoserveError, OSError) as error:
            if share in self._shares and not isinstance(error, EngineUnavailable):
                _log.warning("this replica can't help: %s", error, extra={"job": invitation.job})
            self._ended(share, failed=True)
        if share not in self._shares:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    def _hear(self, message: StepSaid | ShareEnded) -> None:
        if isinstance(message, StepSaid):
            self._links.from_engine(message.id, message.data)
            return
        if message.problem is not None:
            _log.warning("this replica helps no more: %s", message.problem.message, extra={"job": message.id})
        problem = message.problem
        self._ended(message.id, failed=problem is not None, guilty=problem is not None and DIFFERS in problem.message)

    def _abandoned(self, share: str) -> None:
        """The replica that holds the job is gone, or the job has ended there."""
        if share in self._shares and not self._shares[share].given:
            self._ended(share)

    def _ended(self, share: str, *, failed: bool = False, guilty: bool = False) -> None:
        """A share has ended, well or not: where the run still wants help, this replica was of none (too far behind, unequal,
        crashed), so that it waits before it comes again. failed: it may fail in the job's next run too. guilty: it does harm
        here."""
        ended = self._shares.pop(share, None)
        self._links.share_ended(share)
        if ended is not None:
            job = ended.invitation.job
            self._backoff.ended(job if failed else ended.invitation.run, ended.began_s, self._clock())
            if guilty:
                self._guilty[job] += 1
                if self._guilty[job] == _MOST_GUILTY:
                    _log.error("this replica helps with this job no more: it did harm here twice", extra={"job": job})
            if ended.given:  # else _help removes it, when nothing is brought there any more
                self._spawn(asyncio.to_thread(shutil.rmtree, self._directory(share), ignore_errors=True))

    def _engine_lost(self) -> None:
        """This replica's engine has died."""
        self._links.engine_lost()
        for run in list(self._hosted):
            self.end(run)
        for share in list(self._shares):
            end = self._engine.supervisor.last_end
            guilty = end is None or (end.guilty and (share in end.jobs or (end.alone and not end.jobs)))
            self._ended(share, failed=True, guilty=guilty)

    def drain(self) -> None:
        """Helps with nothing more; present shares end with their step."""
        self._stopping = True
        for share in self._shares:
            with contextlib.suppress(CoserveError):
                self._engine.act_job(share, "hand_over")

    async def stop(self) -> None:
        """Ends everything here, before the links stop."""
        self._stopping = True
        for run in list(self._hosted):
            self.end(run)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)

    # --- inside ---

    def _new_member(self) -> str:
        self._num_members += 1
        return f"{self.replica}.{self._num_members}"

    def _directory(self, share: str) -> Path:
        return self._scratch / share.replace("/", "_")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
