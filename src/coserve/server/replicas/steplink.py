"""The replicas' side of a job that several of them share: the coordinator beside the primary, and the way to it.

    primary's engine --\
                        StepCoordinator (StepMachine, sums)     in the replica that holds the job's lease
    other replicas  ---/
      |  StepLinks, one per replica: passes envelopes between its engine, its coordinators and other replicas
      engine

What travels between replicas goes through one small interface, StepWire, so that sockets, a test's queue or an object store can
serve. The coordinator adds the members' sums in one fixed order, and sends all members the same bytes.

Owns: the members' blobs at the coordinator, the sum, who is reached how. Does not own: the protocol's decisions
(cluster/steps.py), the engine's side (server/link/stepmember.py), sockets, which replica is asked to help.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from coserve.cluster.steps import (
    Action,
    Apply,
    Discard,
    Dismiss,
    DropAll,
    Forget,
    GiveState,
    Instruction,
    MakeTotal,
    SealNow,
    StepLimits,
    StepMachine,
    Take,
    TakeState,
    Told,
)
from coserve.core import CoserveError
from coserve.server.link.stepmessages import (
    DTYPES,
    MAX_ELEMENTS,
    MAX_IDS,
    AdapterDigest,
    Applied,
    Beat,
    BlobError,
    BlobPart,
    Counts,
    DropIds,
    EnterJob,
    Envelope,
    GiveBack,
    GoAway,
    IncomingBlob,
    LeaveJob,
    Offer,
    OutgoingBlobs,
    Pull,
    SealIds,
    StepBody,
    TakeId,
    WantPart,
    WantState,
    blob_digest,
    decode_step,
    encode_step,
    vector_of,
)

BEAT_S = 1.0
"""Seconds between two signs of life of a member, and between two looks for lost ones."""
_STOP_S = 1.0
"""Seconds that the last frames have to leave."""
_CHUNK = 1 << 20
"""Elements whose squares are added at once."""
_log = logging.getLogger(__name__)
Later = Callable[[Callable[[], "Total"], Callable[["Total"], None]], None]
"""Runs work elsewhere, then calls back with its result where the coordinator runs."""


class Total(NamedTuple):
    """The sum over a whole batch. digest: of the bytes."""

    data: bytearray
    digest: str
    norm: float
    counts: Counts


class SealedSum(NamedTuple):
    """A member's sum over some micro-batches."""

    data: bytearray
    counts: Counts


def add_sums(sums: Sequence[SealedSum], elements: int, dtype: str) -> Total:
    """Adds in the given order, into the first one's memory."""
    data = sums[0].data
    total = vector_of(data, elements, dtype)
    for other in sums[1:]:
        np.add(total, vector_of(other.data, elements, dtype), out=total)
    squares = [float(np.square(total[start : start + _CHUNK], dtype=np.float64).sum()) for start in range(0, elements, _CHUNK)]
    counts = [each.counts for each in sums]
    extra: dict[str, float] = {}
    for one in counts:
        for name, value in one.extra.items():
            extra[name] = extra.get(name, 0.0) + value
    summed = Counts(
        loss=sum(one.loss for one in counts), correct=sum(one.correct for one in counts),
        labels=sum(one.labels for one in counts), tokens=sum(one.tokens for one in counts), extra=extra,
    )
    return Total(data, blob_digest(data), math.sqrt(sum(squares)), summed)


class _Peer:
    """A member as the coordinator reaches it."""

    def __init__(self, name: str, epoch: int, send: Callable[[bytes], None]) -> None:
        self.name, self.epoch, self._send = name, epoch, send
        self.num_read = self._num_sent = 0
        self.incoming: dict[int, IncomingBlob] = {}
        self.entered: EnterJob | None = None

    def say(self, body: StepBody) -> None:
        """Sends a message."""
        self._send(encode_step(Envelope(epoch=self.epoch, member=self.name, number=self._num_sent, body=body)))
        self._num_sent += 1


class StepCoordinator:
    """The members of one job in one epoch of its lease. Everything runs on one thread but the sums.

    primary: the name of the member that holds the lease. later: where sums are added; None: here and now. note: is called with
    lines about members that come and go, for the job's events. clock: monotonic, in seconds.
    """

    def __init__(
        self, epoch: int, primary: str, *, limits: StepLimits | None = None, later: Later | None = None,
        note: Callable[[str], None] = _log.info, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.machine = StepMachine(epoch, primary, limits=limits)
        self._later: Later = later or (lambda work, then: then(work()))
        self._note, self._clock = note, clock
        self._peers: dict[str, _Peer] = {}
        self._early: list[str] = []  # those that entered before the primary
        self._keys = self._blobs = 0
        self._sums: dict[int, SealedSum] = {}
        self._totals: dict[int, tuple[Offer, bytearray]] = {}
        self._state: Offer | None = None
        self._state_takers: set[str] = set()
        self._outgoing = OutgoingBlobs()

    @property
    def closed(self) -> bool:
        return self.machine.closed

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the members that take part, the primary's first."""
        return self.machine.active

    def receive(self, data: bytes, reply: Callable[[bytes], None]) -> str | None:
        """Takes an envelope of a member. reply: sends bytes to where it came from. Returns the member's name; None if the
        envelope is of another epoch, of nobody who takes part, or can't be read."""
        try:
            envelope = decode_step(data)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            _log.warning("a message of a job's member can't be read: %s", error)
            return None
        machine, name, body = self.machine, envelope.member, envelope.body
        if envelope.epoch != machine.epoch:
            return None
        peer = self._peers.get(name)
        if peer is None:
            if not isinstance(body, EnterJob):
                return None  # it was sent away, or has left
            peer = self._peers[name] = _Peer(name, machine.epoch, reply)
            if self.closed:
                self._send_away(name, "the job has ended", fault=False)
                return name
        if isinstance(body, Beat):  # not counted: replicas send them for their engines
            machine.heard(name, self._clock())
            return name
        if envelope.number != peer.num_read:
            self._do(machine.dismiss(name, "messages of this member were lost", self._clock(), fault=False))
            return name
        peer.num_read += 1
        try:
            self._do(self._take(peer, body))
        except BlobError as error:
            self._do(machine.dismiss(name, str(error), self._clock()))
            self._send_away(name, str(error), fault=True)  # if it was no member yet
        return name

    def tick(self) -> None:
        """Looks for members that are lost or late. To be called about once in BEAT_S."""
        self._do(self.machine.tick(self._clock()))

    def beat(self) -> None:
        """`tick` where the primary's engine is this process's own, so that its death is told by others than silence."""
        self.machine.heard(self.machine.primary, self._clock())
        self.tick()

    def lost(self, name: str) -> None:
        """A member is known to be gone."""
        if name in self._peers:
            self._note(f"{name} is lost to the job; what it had begun runs elsewhere")
            self._do(self.machine.lost(name, self._clock()))
            self._forget_peer(name)

    def close(self, reason: str = "the job has ended") -> None:
        """Sends all members away."""
        self._do(self.machine.close(reason))
        for name in list(self._peers):
            self._send_away(name, reason, fault=False)

    # --- messages ---

    def _take(self, peer: _Peer, body: StepBody) -> list[Action]:
        machine, name, now = self.machine, peer.name, self._clock()
        machine.heard(name, now)
        match body:
            case EnterJob():
                return self._enter(peer, body, now)
            case Pull(step=step, num_ids=num_ids):
                return machine.pull(name, step, min(max(num_ids, 0), MAX_IDS), now)
            case Applied(step=step):
                return machine.applied(name, step, now)
            case AdapterDigest(step=step, digest=digest):
                return machine.digest(name, step, digest, now)
            case GiveBack(step=step):
                return machine.give_back(name, step, now)
            case LeaveJob():
                actions = machine.leave(name, now)
                self._forget_peer(name)
                if name != machine.primary:
                    self._note(f"{name} has left the job")
                return actions
            case Offer(kind="seal"):
                machine.progressed(name, now)
                if machine.accepts(name, body.step, body.round, body.ids) and body.counts is not None:
                    self._fetch(peer, body, self._vector_bytes)
            case Offer(kind="state") if name == machine.primary and peer.entered is not None:
                self._fetch(peer, body, self._vector_bytes * len(peer.entered.vectors))
            case WantPart():
                part = self._outgoing.part(body)
                if part is not None:
                    peer.say(part)
                elif self._state is not None and body.blob == self._state.blob:
                    self._has_state(name)
            case BlobPart(blob=blob) if blob in peer.incoming:
                machine.progressed(name, now)
                if peer.incoming[blob].take(body):
                    return self._arrived(peer, peer.incoming.pop(blob), now)
        return []

    def _enter(self, peer: _Peer, body: EnterJob, now: float) -> list[Action]:
        machine = self.machine
        if peer.entered is not None or body.primary != (peer.name == machine.primary):
            raise BlobError("this member has entered the job already, or takes itself for another")
        if not 0 < body.elements <= MAX_ELEMENTS or body.dtype not in DTYPES or not body.vectors:
            raise BlobError(f"a member's vector has {body.elements} elements of {body.dtype}")
        peer.entered = body
        if body.primary:
            actions = machine.open(body.step, now)
            for name in self._early:
                if name in self._peers:
                    actions += self._admit(self._peers[name], now)
            self._early.clear()
            return actions
        if self._primary_entered is None:
            self._early.append(peer.name)
            return []
        return self._admit(peer, now)

    @property
    def _primary_entered(self) -> EnterJob | None:
        peer = self._peers.get(self.machine.primary)
        return None if peer is None else peer.entered

    def _admit(self, peer: _Peer, now: float) -> list[Action]:
        """Lets a member join that agrees with the primary, or sends it away."""
        own, other = self._primary_entered, peer.entered
        assert own is not None and other is not None
        differs = [name for name in {**own.facts, **other.facts} if own.facts.get(name) != other.facts.get(name)]
        differs += [name for name in ("elements", "dtype", "vectors") if getattr(own, name) != getattr(other, name)]
        if differs:
            what = f"{', '.join(differs)} of this member is not the primary's"
            self._send_away(peer.name, f"{what}; replicas that share a job need the same model and data", fault=True)
            return []
        try:
            return self.machine.join(peer.name, now)
        except CoserveError as error:
            self._send_away(peer.name, str(error), fault=False)
            return []

    @property
    def _vector_bytes(self) -> int:
        entered = self._primary_entered
        return 0 if entered is None else entered.elements * DTYPES[entered.dtype].itemsize

    def _fetch(self, peer: _Peer, offer: Offer, num_bytes: int) -> None:
        peer.incoming[offer.blob] = IncomingBlob(offer, num_bytes, peer.say)

    def _arrived(self, peer: _Peer, blob: IncomingBlob, now: float) -> list[Action]:
        offer, machine = blob.offer, self.machine
        if offer.kind == "state":
            if self._state is not None:
                self._outgoing.drop(self._state.blob)
            self._state = self._offered(offer)
            self._state_takers.clear()
            self._outgoing.add(self._state.blob, blob.data)
            return machine.state_given(offer.step, now)
        assert offer.counts is not None
        self._keys += 1
        counts, actions = machine.seal(peer.name, offer.step, offer.round, offer.ids, self._keys, now)
        if counts:
            self._sums[self._keys] = SealedSum(blob.data, offer.counts)
        return actions

    def _has_state(self, name: str) -> None:
        """A member has read the state or needs it no more. It is forgotten when nobody reads it."""
        self._state_takers.discard(name)
        if self._state is not None and not self._state_takers:
            self._outgoing.drop(self._state.blob)
            self._state = None

    def _offered(self, offer: Offer) -> Offer:
        """The same offer under a number of this side."""
        self._blobs += 1
        return msgspec.structs.replace(offer, blob=self._blobs)

    # --- actions ---

    def _do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            match action:
                case Told(member=name, instruction=instruction):
                    self._tell(name, instruction)
                case MakeTotal(step=step, keys=keys):
                    self._make_total(step, keys)
                case Discard(key=key):
                    self._sums.pop(key, None)
                case Forget(step=step):
                    found = self._totals.pop(step, None)
                    if found is not None:
                        self._outgoing.drop(found[0].blob)

    def _make_total(self, step: int, keys: Sequence[int]) -> None:
        entered = self._primary_entered
        assert entered is not None
        sums, elements, dtype = [self._sums.pop(key) for key in keys], entered.elements, entered.dtype

        def made(total: Total) -> None:
            if self.closed:
                return
            self._blobs += 1
            offer = Offer(
                blob=self._blobs, kind="total", step=step, num_bytes=len(total.data), digest=total.digest, norm=total.norm,
                counts=total.counts,
            )
            self._totals[step] = (offer, total.data)
            self._outgoing.add(offer.blob, total.data)
            self._do(self.machine.total_made(step, self._clock()))

        self._later(lambda: add_sums(sums, elements, dtype), made)

    def _tell(self, name: str, instruction: Instruction) -> None:
        peer = self._peers.get(name)
        if peer is None:
            return
        match instruction:
            case Take(step=step, round=round, id=id):
                peer.say(TakeId(step=step, round=round, id=id))
            case SealNow(step=step, round=round):
                peer.say(SealIds(step=step, round=round))
            case DropAll(step=step, round=round):
                self._note(f"{name} is late with step {step + 1}; what it had begun runs elsewhere")
                peer.say(DropIds(step=step, round=round))
            case Apply(step=step) if step in self._totals:
                peer.say(self._totals[step][0])
            case GiveState():
                peer.say(WantState())
            case TakeState() if self._state is not None:
                self._note(f"{name} has joined the job at step {self._state.step + 1}")
                self._state_takers.add(name)
                peer.say(self._state)
            case Dismiss(reason=reason, fault=fault):
                if fault and name != self.machine.primary:
                    self._note(f"{name} goes on without the job: {reason}")
                self._send_away(name, reason, fault=fault)

    def _send_away(self, name: str, reason: str, *, fault: bool) -> None:
        peer = self._peers.get(name)
        if peer is not None:
            peer.say(GoAway(reason=reason, fault=fault))
            self._forget_peer(name)

    def _forget_peer(self, name: str) -> None:
        self._peers.pop(name, None)
        if name in self._state_takers:
            self._has_state(name)


# --- between replicas ---


class StepFrame(msgspec.Struct, frozen=True, kw_only=True):
    """An envelope on its way between replicas. up: to the job's coordinator, or else to `member`."""

    job: str
    member: str
    up: bool
    data: bytes


class StepWire(Protocol):
    """How replicas reach each other: whole frames, in order, authenticated by whoever implements it. What can't be delivered
    may be dropped: envelopes are counted, so that a loss is noticed."""

    async def send(self, replica: str, frames: Sequence[bytes]) -> None:
        """Sends a message to a replica; waits while too much is on its way."""

    async def receive(self) -> tuple[str, list[bytes]]:
        """The next message, and the replica that it is from."""


_frame_encoder = msgspec.msgpack.Encoder()
_frame_decoder: msgspec.msgpack.Decoder[StepFrame] = msgspec.msgpack.Decoder(StepFrame)


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
    other replicas; None: none.
    """

    def __init__(self, tell_engine: Callable[[str, bytes], None], wire: StepWire | None = None) -> None:
        self._tell_engine, self._wire = tell_engine, wire
        self._hosted: dict[str, _Hosted] = {}
        self._followed: dict[str, _Followed] = {}
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
        self, job: str, epoch: int, member: str, *, limits: StepLimits | None = None, note: Callable[[str], None] = _log.info
    ) -> StepCoordinator:
        """This replica holds a job's lease: its engine will be the primary, as `member`, and call the share by the job's id.
        note: as for StepCoordinator."""
        self.end(job, "the job begins again")
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
        self._followed[share] = _Followed(job, epoch, member, replica)
        return share

    def share_ended(self, share: str) -> None:
        """This replica's engine takes part no more: it has said so."""
        self._followed.pop(share, None)

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
        for share, followed in list(self._followed.items()):
            if followed.replica == replica:
                del self._followed[share]
                away = GoAway(reason="the replica that holds the job is gone", fault=False)
                self._tell(share, _uncounted(followed, away))

    def _leave(self, share: str, reason: str) -> None:
        """Says for this replica's engine that it has left. The coordinator takes that for a loss, since it is not counted as
        the engine's envelopes are."""
        followed = self._followed.pop(share)
        self._post(followed.replica, followed, _uncounted(followed, LeaveJob(reason=reason)))

    # --- passing on ---

    def from_engine(self, id: str, data: bytes) -> None:
        """Passes on what this replica's engine says as a member of a job."""
        hosted, followed = self._hosted.get(id), self._followed.get(id)
        if hosted is not None:
            hosted.coordinator.receive(data, lambda reply: self._tell(id, reply))
        elif followed is not None:
            self._post(followed.replica, followed, data)

    def from_replica(self, replica: str, frame: bytes) -> None:
        """Passes on what another replica says. What can't be read is dropped."""
        try:
            found = _frame_decoder.decode(frame)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            _log.warning("replica %s sent what can't be read: %s", replica, error)
            return
        if found.up:
            self._up(replica, found)
            return
        for share, followed in self._followed.items():
            if (followed.job, followed.member, followed.replica) == (found.job, found.member, replica):
                self._tell(share, found.data)
                return

    def _up(self, replica: str, frame: StepFrame) -> None:
        hosted = self._hosted.get(frame.job)
        if hosted is None or hosted.homes.get(frame.member, replica) != replica:
            return
        way = _Followed(frame.job, 0, frame.member, replica)
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
        queue = self._queues.get(replica)
        if queue is None:
            queue = self._queues[replica] = asyncio.Queue()
            self._spawn(self._write(replica, queue))
        queue.put_nowait(_frame_encoder.encode(StepFrame(job=way.job, member=way.member, up=up, data=data)))

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
            for followed in self._followed.values():
                self._post(followed.replica, followed, _uncounted(followed, Beat()))
            for hosted in list(self._hosted.values()):
                hosted.coordinator.beat()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _uncounted(followed: _Followed, body: StepBody) -> bytes:
    """A message for or from a member that is not one of its engine's."""
    return encode_step(Envelope(epoch=followed.epoch, member=followed.member, number=-1, body=body))
