"""How envelopes of jobs that several replicas share travel: between a replica's engine, its coordinators and other replicas.

    primary's engine -- StepLinks -- StepCoordinator        in the replica that holds the job's lease
                            |
                         StepWire: sockets, a test's queue, an object store
                            |
    other engine ------ StepLinks                           in every other replica that helps

Owns: who is reached how, signs of life between replicas. Does not own: what envelopes say (server/link/stepmessages.py,
stepcoordinator.py), sockets, which replica is asked to help.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from coserve.cluster.steps import MAX_MEMBERS, StepLimits
from coserve.core import CoserveError
from coserve.server.link.stepmessages import EnterJob, Envelope, GoAway, LeaveJob, StepBody, decode_step, encode_step
from coserve.server.replicas.stepcoordinator import StepCoordinator, Total

BEAT_S = 1.0
"""Seconds between two signs of life, and between two looks for lost ones."""
_STOP_S = 1.0
"""Seconds that the last frames have to leave."""
_log = logging.getLogger(__name__)


class StepFrame(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """An envelope on its way between replicas. up: to the job's coordinator, or else to `member`. data: empty for a sign of
    life."""

    job: str
    member: str
    up: bool
    data: bytes


class Invitation(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Asks another replica to help with a job. run: what the job is called here, in frames. epoch: of its lease."""

    job: str
    run: str
    epoch: int


class StepWire(Protocol):
    """How replicas reach each other: whole frames, in order, authenticated by whoever implements it. What can't be delivered
    may be dropped: envelopes are counted, so that a loss is noticed."""

    async def send(self, replica: str, frames: Sequence[bytes]) -> None:
        """Sends a message to a replica; waits while too much is on its way."""

    async def receive(self) -> tuple[str, list[bytes]]:
        """The next message, and the replica that it is from."""


_frame_encoder = msgspec.msgpack.Encoder()
_frame_decoder: msgspec.msgpack.Decoder[StepFrame | Invitation] = msgspec.msgpack.Decoder(StepFrame | Invitation)


class _Hosted(NamedTuple):
    """homes: replicas of the members elsewhere."""

    coordinator: StepCoordinator
    homes: dict[str, str]


class _Followed(NamedTuple):
    """A share in a job that `replica` holds."""

    job: str
    epoch: int
    member: str
    replica: str


def share_id(job: str, epoch: int, member: str) -> str:
    """What a replica's engine calls its share in a job that another replica holds. (It calls a job that its own replica holds
    by the job's id, and may have both for a moment.)"""
    return f"{job}/{epoch}/{member}"


class StepLinks:
    """One replica's jobs that several replicas share. Everything runs on its event loop.

    tell_engine: passes an envelope to this replica's engine, as tell_engine(id, data); EngineClient.tell_step. wire: reaches
    other replicas; None: none. lost_s: silence after which a replica counts as gone, to those that it helps and to those that
    help it.
    """

    def __init__(
        self, tell_engine: Callable[[str, bytes], None], wire: StepWire | None = None, *, lost_s: float = StepLimits().lost_s
    ) -> None:
        self._tell_engine, self._wire, self._lost_s = tell_engine, wire, lost_s
        self._hosted: dict[str, _Hosted] = {}
        self._followed: dict[str, _Followed] = {}
        self._heard: dict[str, float] = {}  # when the coordinators of those were heard
        self._listener: Callable[[str, Invitation], None] = lambda replica, invitation: None
        self._abandoned: Callable[[str], None] = lambda share: None
        self._queues: dict[str, asyncio.Queue[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begins to read and to beat."""
        self._spawn(self._beat())
        if self._wire is not None:
            self._spawn(self._read(self._wire))

    async def stop(self) -> None:
        """Ends everything here: members of this replica's jobs are sent away, and it leaves those of others."""
        for job in list(self._hosted):
            self.end(job, "the replica that holds the job stops")
        for share in list(self._followed):
            self._leave(share, "the replica stops")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*(queue.join() for queue in self._queues.values())), _STOP_S)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- which jobs ---

    def host(
        self, job: str, epoch: int, member: str, *, most: int = MAX_MEMBERS, note: Callable[[str], None] = _log.info
    ) -> StepCoordinator:
        """This replica holds a job's lease: its engine will be the primary, as `member`. job: what the engine calls this run of
        the job, such as JOB-eEPOCH. most: members. note: as for StepCoordinator."""
        self.end(job, "the job begins again")
        limits = StepLimits(lost_s=self._lost_s, max_members=min(most, MAX_MEMBERS))
        coordinator = StepCoordinator(epoch, member, limits=limits, later=self._later, note=note)
        self._hosted[job] = _Hosted(coordinator, {})
        return coordinator

    def end(self, job: str, reason: str = "the job has ended") -> None:
        """A job that this replica holds has ended here."""
        hosted = self._hosted.pop(job, None)
        if hosted is not None:
            hosted.coordinator.close(reason)

    def join(self, job: str, epoch: int, member: str, replica: str) -> str:
        """This replica's engine will be a member of a job that another replica holds. Returns what the engine must call its
        share."""
        share = share_id(job, epoch, member)
        self._followed[share], self._heard[share] = _Followed(job, epoch, member, replica), time.monotonic()
        return share

    def invite(self, replica: str, invitation: Invitation) -> None:
        """Asks another replica to help."""
        self._put(replica, invitation)

    def on_invited(self, listener: Callable[[str, Invitation], None]) -> None:
        """The listener is called with other replicas' names and invitations."""
        self._listener = listener

    def on_abandoned(self, listener: Callable[[str], None]) -> None:
        """The listener is called with shares whose coordinator is gone, once this replica's engine has been told. An engine
        that begins such a share later is told then."""
        self._abandoned = listener

    def share_ended(self, share: str) -> None:
        """This replica's engine takes part no more: it has said so."""
        self._followed.pop(share, None)
        self._heard.pop(share, None)

    def engine_lost(self) -> None:
        """This replica's engine has died: its places in all jobs are lost."""
        for job in list(self._hosted):
            self.end(job, "the engine that holds the job has died")
        for share in list(self._followed):
            self._leave(share, "its engine has died")

    def replica_lost(self, replica: str) -> None:
        """Another replica is known to be gone."""
        for hosted in self._hosted.values():
            for member in [name for name, home in hosted.homes.items() if home == replica]:
                hosted.coordinator.lost(member)
                del hosted.homes[member]
        for share in [share for share, followed in self._followed.items() if followed.replica == replica]:
            self._abandon(share)

    def _leave(self, share: str, reason: str) -> None:
        """Says for this replica's engine that it has left. The coordinator takes that for a loss, since it is not counted as
        the engine's envelopes are."""
        followed = self._followed[share]
        self.share_ended(share)
        self._post(followed.replica, followed, _uncounted(followed, LeaveJob(reason=reason)))

    def _abandon(self, share: str) -> None:
        """Tells this replica's engine that a job's coordinator is gone."""
        away = GoAway(reason="the replica that holds the job is gone", fault=False)
        self._tell(share, _uncounted(self._followed[share], away))
        self.share_ended(share)
        self._abandoned(share)

    # --- passing on ---

    def from_engine(self, id: str, data: bytes) -> None:
        """Passes on what this replica's engine says as a member of a job. It is sent away from jobs that are not known here."""
        hosted, followed = self._hosted.get(id), self._followed.get(id)
        if hosted is not None:
            hosted.coordinator.receive(data, lambda reply: self._tell(id, reply))
        elif followed is not None:
            self._post(followed.replica, followed, data)
        else:
            self._refuse(id, data)

    def _refuse(self, id: str, data: bytes) -> None:
        """Tells the engine that what it has begun has been given up meanwhile; else it would wait for ever, and keep memory."""
        envelope = decode_step(data)  # this replica's own engine has made it
        number, fault = -1, False
        match envelope.body:
            case LeaveJob():
                return
            case EnterJob(primary=primary):  # nothing has been told it before
                number, fault = 0, primary
        away = GoAway(reason="the job has ended, or its replica is gone", fault=fault)
        self._tell(id, encode_step(Envelope(epoch=envelope.epoch, member=envelope.member, number=number, body=away)))

    def from_replica(self, replica: str, frame: bytes) -> None:
        """Passes on what another replica says. What can't be read is dropped."""
        try:
            found = _frame_decoder.decode(frame)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            _log.warning("replica %s sent what can't be read: %s", replica, error)
            return
        if isinstance(found, Invitation):
            self._listener(replica, found)
            return
        if found.up:
            self._up(replica, found)
            return
        for share, followed in self._followed.items():
            if (followed.job, followed.member, followed.replica) == (found.job, found.member, replica):
                self._heard[share] = time.monotonic()
                if found.data:
                    self._tell(share, found.data)
                return

    def _up(self, replica: str, frame: StepFrame) -> None:
        hosted = self._hosted.get(frame.job)
        if hosted is None or hosted.homes.get(frame.member, replica) != replica:
            return
        way = _Followed(frame.job, 0, frame.member, replica)
        if not frame.data:  # answered also while its engine still reads the job's data
            hosted.coordinator.heard(frame.member)
            self._post(replica, way, b"", up=False)
            return
        name = hosted.coordinator.receive(frame.data, lambda reply: self._post(replica, way, reply, up=False))
        if name is not None and name == frame.member:
            hosted.homes[name] = replica

    def _tell(self, id: str, data: bytes) -> None:
        with contextlib.suppress(CoserveError):  # the engine has died, which engine_lost tells
            self._tell_engine(id, data)

    def _later(self, work: Callable[[], Total], then: Callable[[Total], None]) -> None:
        async def run() -> None:
            then(await asyncio.to_thread(work))

        self._spawn(run())

    def _post(self, replica: str, way: _Followed, data: bytes, *, up: bool = True) -> None:
        self._put(replica, StepFrame(job=way.job, member=way.member, up=up, data=data))

    def _put(self, replica: str, frame: StepFrame | Invitation) -> None:
        queue = self._queues.get(replica)
        if queue is None:
            queue = self._queues[replica] = asyncio.Queue()
            self._spawn(self._write(replica, queue))
        queue.put_nowait(_frame_encoder.encode(frame))

    async def _write(self, replica: str, queue: asyncio.Queue[bytes]) -> None:
        while self._wire is not None:
            frame = await queue.get()
            try:
                await self._wire.send(replica, [frame])
            except Exception as error:
                _log.warning("replica %s can't be reached: %s", replica, error)
                self.replica_lost(replica)
            finally:
                queue.task_done()

    async def _read(self, wire: StepWire) -> None:
        while True:
            replica, frames = await wire.receive()
            for frame in frames:
                self.from_replica(replica, frame)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            for share, followed in list(self._followed.items()):
                self._post(followed.replica, followed, b"")
                if time.monotonic() - self._heard[share] > self._lost_s:
                    self._abandon(share)
            for hosted in list(self._hosted.values()):
                primary = hosted.coordinator.machine.primary
                hosted.coordinator.heard(primary)  # its engine's death is told by more than silence
                hosted.coordinator.tick()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _uncounted(followed: _Followed, body: StepBody) -> bytes:
    """A message for or from a member that is not one of its engine's."""
    return encode_step(Envelope(epoch=followed.epoch, member=followed.member, number=-1, body=body))
