"""The coordinator of a job that several replicas share, beside the engine that holds the job.

    members --envelopes--> StepCoordinator --> StepMachine (cluster/steps.py): what is to be done
                                |  blobs: seals come in, their sum and the primary's state go out

It adds the members' sums in one fixed order, and sends all members the same bytes. Owns: the members' blobs, the sum, what is
told of members. Does not own: the protocol's decisions (cluster/steps.py), the engine's side (server/link/stepmember.py), how
envelopes travel (steplink.py).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
        self._newest_state: Offer | None = None
        self._states: dict[int, set[str]] = {}  # blob -> the members that still read it
        self._outgoing = OutgoingBlobs()
        self._tidied = -1, 0  # at which step and round

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
        if envelope.number != peer.num_read:
            self._do(machine.dismiss(name, "messages of this member were lost", self._clock(), fault=False))
        else:
            peer.num_read += 1
            try:
                self._do(self._take(peer, body))
            except BlobError as error:
                self._do(machine.dismiss(name, str(error), self._clock()))
                self._send_away(name, str(error), fault=True)  # if it was no member yet
        self._tidy()
        return name

    def tick(self) -> None:
        """Looks for members that are lost or late. To be called about once a second."""
        self._do(self.machine.tick(self._clock()))
        self._tidy()

    def heard(self, name: str) -> None:
        """A member's replica is alive, and has not said that its engine is not."""
        self.machine.heard(name, self._clock())

    def lost(self, name: str) -> None:
        """A member is known to be gone."""
        if name in self._peers:
            self._note(f"{name} is lost to the job; what it had begun runs elsewhere")
            self._do(self.machine.lost(name, self._clock()))
            self._forget_peer(name)
            self._tidy()

    def close(self, reason: str = "the job has ended") -> None:
        """Sends all members away."""
        self._do(self.machine.close(reason))
        for name in list(self._peers):
            self._send_away(name, reason, fault=False)
        self._tidy()

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
                else:
                    self._read_no_more(name, body.blob)
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
            self._newest_state = self._offered(offer)
            self._states[self._newest_state.blob] = set()
            self._outgoing.add(self._newest_state.blob, blob.data)
            return machine.state_given(offer.step, now)
        assert offer.counts is not None
        self._keys += 1
        counts, actions = machine.seal(peer.name, offer.step, offer.round, offer.ids, self._keys, now)
        if counts:
            self._sums[self._keys] = SealedSum(blob.data, offer.counts)
        return actions

    def _read_no_more(self, name: str, blob: int | None = None) -> None:
        """A member has read a state, or needs none (blob: None) any more."""
        for state, takers in self._states.items():
            if blob is None or blob == state:
                takers.discard(name)

    def _tidy(self) -> None:
        """Forgets states that nobody reads (where members join one after another, several are read at once), and what has come
        of seals that would not count any more: a member whose words stall may stay for long."""
        for blob in [blob for blob, takers in self._states.items() if not takers]:
            del self._states[blob]
            self._outgoing.drop(blob)
        now = self.machine.step, self.machine.round
        if now == self._tidied:
            return
        self._tidied = now
        for name, peer in self._peers.items():
            for blob, offer in [(blob, incoming.offer) for blob, incoming in peer.incoming.items()]:
                if offer.kind == "seal" and not self.machine.accepts(name, offer.step, offer.round, offer.ids):
                    del peer.incoming[blob]

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
            case TakeState(step=step) if self._newest_state is not None:
                self._note(f"{name} has joined the job at step {step + 1}")
                self._states[self._newest_state.blob].add(name)
                peer.say(self._newest_state)
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
        self._read_no_more(name)
