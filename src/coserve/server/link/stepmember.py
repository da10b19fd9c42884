"""An engine's place among the members of one job, by messages to the job's coordinator, wherever that runs.

    engine's thread --Exchange--> StepMember --envelopes--> coordinator        reading: any one thread calls `on_message`
                                   its own thread reads tensors, makes digests

Owns: one member's messages, its blobs. Does not own: who gets what (cluster/steps.py), the coordinator
(server/replicas/stepcoordinator.py), the sockets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import msgspec
import numpy as np
import torch
from torch import Tensor

from coserve.engine.exchange import Dismissed, DropShare, JoinedState, SealShare, ShareOrder, StepTotal, TakeShare
from coserve.engine.threads import SideThreads
from coserve.hostcopy import to_host_later
from coserve.server.link.stepmessages import (
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
from coserve.training.batchwork import LossCounts


def dtype_word(tensor: Tensor) -> str:
    """'float32' or 'float64'."""
    return str(tensor.dtype).removeprefix("torch.")


class StepMember:
    """engine.exchange.Exchange by messages. epoch, member: in every envelope. send: sends bytes to the coordinator, from any
    thread, in order, without waiting."""

    def __init__(self, *, epoch: int, member: str, primary: bool, send: Callable[[bytes], None]) -> None:
        self.epoch, self.member, self.primary = epoch, member, primary
        self._send = send
        self._wake: Callable[[], None] = lambda: None
        self._lock = threading.RLock()
        self._reader = SideThreads(1, "coserve-shares")
        self._failure: Dismissed | None = None
        self._left = False
        self.gone: Future[None] = Future()
        """Done when this member has said its last word."""
        self._num_sent = self._num_read = self._num_blobs = 0
        self._outgoing, self._incoming = OutgoingBlobs(once=True), dict[int, IncomingBlob]()
        self._elements, self._dtype, self._vectors = 0, "float32", list[str]()
        self._step, self._round, self._num_ids, self._asked = -1, 0, 0, False
        self._orders: list[ShareOrder] = []
        self._offered: dict[int, Offer] = {}  # totals of steps that have not begun here
        self._sealed: list[int] = []  # blobs of the present step
        self._joined: JoinedState | None = None
        self._wants_state = False
        self._unread = 0

    # --- Exchange: the engine's thread ---

    @property
    def failure(self) -> Dismissed | None:
        return self._failure

    @property
    def settled(self) -> bool:
        return self._unread == 0

    @property
    def wants_state(self) -> bool:
        return self._wants_state and self.settled

    def on_news(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def enter(self, step: int, facts: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
        first = next(iter(state.values()))
        with self._lock:
            self._elements, self._dtype, self._vectors = first.numel(), dtype_word(first), list(state)
            self._say(EnterJob(
                step=step, primary=self.primary, facts=dict(facts), elements=self._elements, dtype=self._dtype,
                vectors=self._vectors,
            ))

    def joined(self) -> JoinedState | None:
        with self._lock:
            found, self._joined = self._joined, None
        return found

    def begin(self, step: int, num_microbatches: int) -> None:
        with self._lock:
            self._step, self._num_ids, self._asked, self._round = step, num_microbatches, False, 0
            self._orders.clear()
            for blob in self._sealed:
                self._outgoing.drop(blob)
            self._sealed.clear()
            offer = self._offered.pop(step, None)
            if offer is not None:
                self._fetch(offer, self._vector_bytes)

    def pull(self) -> None:
        with self._lock:
            if not self._asked:
                self._asked = True
                self._say(Pull(step=self._step, num_ids=self._num_ids))

    def orders(self) -> Sequence[ShareOrder]:
        with self._lock:
            found, self._orders = self._orders, []
        return found

    def seal(self, ids: Sequence[int], gradient: Tensor, counts: LossCounts) -> None:
        step, round, numbers, copy = self._step, self._round, [*ids], to_host_later({"sum": gradient})
        told = Counts(
            loss=counts.loss, correct=counts.correct, labels=counts.labels, tokens=counts.tokens, extra=dict(counts.extra)
        )

        def read() -> None:
            data = bytearray(_bytes_of(copy()["sum"]))
            digest = blob_digest(data)
            with self._lock:
                blob = self._offer(data)
                self._sealed.append(blob)
                self._say(Offer(
                    blob=blob, kind="seal", step=step, num_bytes=len(data), digest=digest, round=round, ids=numbers, counts=told
                ))

        self._read(read)

    def give_back(self) -> None:
        with self._lock:
            self._asked = False
            self._orders.clear()
            self._say(GiveBack(step=self._step))

    def told_update(self, step: int, values: Tensor) -> None:
        copy = to_host_later({"values": values})
        self._say(Applied(step=step))

        def read() -> None:
            digest = blob_digest(_bytes_of(copy()["values"]))
            self._say(AdapterDigest(step=step, digest=digest))

        self._read(read)

    def give_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        copy = to_host_later(tensors)
        self._wants_state = False

        def read() -> None:
            found, size = copy(), self._vector_bytes
            data = bytearray(size * len(self._vectors))
            for index, name in enumerate(self._vectors):
                data[index * size : (index + 1) * size] = _bytes_of(found[name])
            digest = blob_digest(data)
            with self._lock:
                self._say(Offer(blob=self._offer(data), kind="state", step=step, num_bytes=len(data), digest=digest))

        self._read(read)

    def leave(self) -> None:
        with self._lock:
            if self._left:
                return
            self._left = True
        self._reader.submit(self._go)  # behind the last digest
        self._reader.shutdown(wait=False)

    def _go(self) -> None:
        with self._lock:
            self._say(LeaveJob())
            self._outgoing = OutgoingBlobs()
            self._incoming.clear()
            self._send = lambda data: None
        self.gone.set_result(None)

    # --- messages: the thread that reads ---

    def on_message(self, data: bytes) -> None:
        """Takes an envelope of the coordinator. Those of other members and epochs are ignored."""
        try:
            envelope = decode_step(data)
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            self._fail(f"a message of the job's coordinator can't be read ({error})")
            return
        if envelope.epoch != self.epoch or envelope.member != self.member:
            return
        with self._lock:
            if self._failure is not None or self._left:
                return
            if envelope.number != self._num_read:
                self._fail("messages of the job's coordinator were lost", fault=self.primary)
                return
            self._num_read += 1
            try:
                news = self._take(envelope.body)
            except BlobError as error:
                self._fail(str(error))
                return
        if news:
            self._wake()

    def lost(self, reason: str) -> None:
        """The coordinator can't be reached any more."""
        self._fail(reason, fault=self.primary)

    def _take(self, body: StepBody) -> bool:
        """Carries out a message. Returns whether the engine has something to look at."""
        match body:
            case TakeId(step=step, round=round, id=id) if step == self._step:
                self._asked, self._round = False, round
                self._orders.append(TakeShare(id))
            case SealIds(step=step, round=round) if step == self._step:
                self._round = round
                self._orders.append(SealShare())
            case DropIds(step=step, round=round) if step == self._step:
                self._asked, self._round = False, round
                self._orders.append(DropShare())
            case WantState() if self.primary:
                self._wants_state = True
            case Offer(kind="total", step=step) if step == self._step:
                self._fetch(body, self._vector_bytes)
                return False
            case Offer(kind="total", step=step) if step > self._step:
                self._offered[step] = body
                return False
            case Offer(kind="state") if not self.primary:
                self._fetch(body, self._vector_bytes * len(self._vectors))
                return False
            case WantPart():
                part = self._outgoing.part(body)
                if part is not None:
                    self._say(part)
                return False
            case BlobPart(blob=blob) if blob in self._incoming:
                return self._take_part(body, self._incoming[blob])
            case GoAway(reason=reason, fault=fault):
                self._failure = Dismissed(reason, fault=fault)
            case _:
                return False
        return True

    def _take_part(self, part: BlobPart, incoming: IncomingBlob) -> bool:
        if not incoming.take(part):
            return False
        del self._incoming[part.blob]
        offer, data = incoming.offer, incoming.data
        if offer.kind == "state":
            vectors = {
                name: torch.from_numpy(vector_of(data, self._elements, self._dtype, index))
                for index, name in enumerate(self._vectors)
            }
            self._joined = JoinedState(offer.step, vectors)
        elif offer.step == self._step and offer.counts is not None:
            counts = offer.counts
            self._orders.append(StepTotal(
                torch.from_numpy(vector_of(data, self._elements, self._dtype)), offer.norm,
                LossCounts(counts.loss, counts.correct, counts.labels, counts.tokens, counts.extra),
            ))
        return True

    # --- inside ---

    @property
    def _vector_bytes(self) -> int:
        return self._elements * np.dtype(self._dtype).itemsize

    def _fetch(self, offer: Offer, num_bytes: int) -> None:
        self._incoming[offer.blob] = IncomingBlob(offer, num_bytes, self._say)

    def _offer(self, data: bytearray) -> int:
        self._num_blobs += 1
        self._outgoing.add(self._num_blobs, data)
        return self._num_blobs

    def _say(self, body: StepBody) -> None:
        with self._lock:
            self._send(encode_step(Envelope(epoch=self.epoch, member=self.member, number=self._num_sent, body=body)))
            self._num_sent += 1

    def _read(self, work: Callable[[], None]) -> None:
        """Lets the reader's thread do `work` on tensors that were handed over."""
        with self._lock:
            if self._left:
                return
            self._unread += 1

        def run() -> None:
            try:
                work()
            except Exception as error:  # whatever it is, the engine must not wait for it for ever
                self._fail(f"this member's share can't be sent: {type(error).__name__}: {error}")
            with self._lock:
                self._unread -= 1
            self._wake()

        self._reader.submit(run)

    def _fail(self, reason: str, *, fault: bool = True) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = Dismissed(reason, fault=fault)
        self._wake()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A host tensor's own memory."""
    return tensor.detach().contiguous().view(-1).numpy().data.cast("B")
