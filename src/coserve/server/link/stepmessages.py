"""What the members of one job and its coordinator say to each other: msgpack, in envelopes that are counted.

    member -> coordinator: EnterJob, Pull, Applied, AdapterDigest, GiveBack, LeaveJob
    coordinator -> member: TakeId, SealIds, DropIds, WantState, GoAway
    either way:            Offer (a blob that can be had), WantPart, BlobPart

A gradient or a state is a blob: the bytes of one vector, or of several one after another. Who offers one tells its size and
digest; who wants it asks for part after part, a few at a time, so that the receiver sets the pace and nothing else waits long.
What arrives is used only if its size is the expected one and its digest the offered one. Nothing is pickled.

Owns: the messages, blobs on their way. Does not own: what they mean (stepmember.py, server/replicas/stepcoordinator.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import numpy as np

from coserve.core import CoserveError

PART_BYTES = 512 << 10
"""Bytes of a part: a process that passes one on does nothing else for well under a millisecond."""
PARTS_AHEAD = 4
"""Parts that are asked for before the first of them has come."""
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
"""Types of vectors."""
MAX_ELEMENTS, MAX_IDS = 1 << 32, 1 << 20
"""Elements of a vector, and micro-batches of a step."""


class StepMessage(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Every message is one of the classes below."""


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """LossCounts, as they travel."""

    loss: float
    correct: int
    labels: int
    tokens: int
    extra: dict[str, float] = {}


class EnterJob(StepMessage, frozen=True, kw_only=True):
    """A member's first message. step: at which the primary begins. facts: what all members must agree on. elements, dtype: of
    the adapter's vector. vectors: names of those that make up a state."""

    step: int
    primary: bool
    facts: dict[str, str]
    elements: int
    dtype: str
    vectors: list[str]


class Pull(StepMessage, frozen=True, kw_only=True):
    """There is room for one more micro-batch. num_ids: how many the step has."""

    step: int
    num_ids: int


class Applied(StepMessage, frozen=True, kw_only=True):
    """The member's adapter is that after `step`."""

    step: int


class AdapterDigest(StepMessage, frozen=True, kw_only=True):
    """The digest of the adapter's values after `step`."""

    step: int
    digest: str


class GiveBack(StepMessage, frozen=True, kw_only=True):
    """The member can't run what it holds just now."""

    step: int


class LeaveJob(StepMessage, frozen=True, kw_only=True):
    """The member goes. reason: for the log."""

    reason: str = ""


class TakeId(StepMessage, frozen=True, kw_only=True):
    """cluster.steps.Take."""

    step: int
    round: int
    id: int


class SealIds(StepMessage, frozen=True, kw_only=True):
    """cluster.steps.SealNow."""

    step: int
    round: int


class DropIds(StepMessage, frozen=True, kw_only=True):
    """cluster.steps.DropAll."""

    step: int
    round: int


class WantState(StepMessage, frozen=True, kw_only=True):
    """The primary's state is needed."""


class GoAway(StepMessage, frozen=True, kw_only=True):
    """cluster.steps.Dismiss."""

    reason: str
    fault: bool


class Offer(StepMessage, frozen=True, kw_only=True):
    """A blob can be had from the sender.

    kind: a seal (with its round, ids and counts), a total (with its norm and counts), or a state at the start of `step`.
    """

    blob: int
    kind: Literal["seal", "total", "state"]
    step: int
    num_bytes: int
    digest: str
    round: int = 0
    ids: list[int] = []
    counts: Counts | None = None
    norm: float = 0.0


class WantPart(StepMessage, frozen=True, kw_only=True):
    """Send the bytes of a blob from `start` on, at most PART_BYTES. From its end on: the blob is not needed any more."""

    blob: int
    start: int


class BlobPart(StepMessage, frozen=True, kw_only=True):
    """Bytes of a blob."""

    blob: int
    start: int
    data: bytes


StepBody = (
    EnterJob | Pull | Applied | AdapterDigest | GiveBack | LeaveJob | TakeId | SealIds | DropIds | WantState | GoAway | Offer
    | WantPart | BlobPart
)


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """epoch: of the job's lease. member: whom it is from or for. number: counts the envelopes of one member in one direction,
    from 0, so that a lost one is noticed."""

    epoch: int
    member: str
    number: int
    body: StepBody


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Envelope] = msgspec.msgpack.Decoder(Envelope)


def encode_step(envelope: Envelope) -> bytes:
    """An envelope as bytes."""
    return _encoder.encode(envelope)


def decode_step(data: bytes) -> Envelope:
    """Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _decoder.decode(data)


class BlobError(CoserveError):
    """A blob is not what was expected, or not what was offered."""


def blob_digest(data: bytes | bytearray | memoryview) -> str:
    """A digest of a blob's bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def vector_of(data: bytearray, elements: int, dtype: str, index: int = 0) -> np.ndarray:
    """One of a blob's vectors [elements], in the blob's own memory."""
    size = DTYPES[dtype].itemsize
    return np.frombuffer(data, DTYPES[dtype], elements, offset=index * elements * size)


class OutgoingBlobs:
    """Blobs that others may ask for. once: one that somebody has had whole is forgotten. Not thread-safe."""

    def __init__(self, *, once: bool = False) -> None:
        self._blobs: dict[int, memoryview] = {}
        self._once = once

    def add(self, blob: int, data: bytes | bytearray | memoryview) -> None:
        """`data` must not change as long as it is here."""
        self._blobs[blob] = memoryview(data).cast("B")

    def drop(self, blob: int) -> None:
        """Forgets a blob, if it is here."""
        self._blobs.pop(blob, None)

    def part(self, want: WantPart) -> BlobPart | None:
        """The answer to a question for a part; None if there is none, since the blob is gone or all of it has been had."""
        data = self._blobs.get(want.blob)
        if data is None or want.start < 0:
            return None
        if want.start >= len(data):
            if self._once:
                self.drop(want.blob)
            return None
        return BlobPart(blob=want.blob, start=want.start, data=bytes(data[want.start : want.start + PART_BYTES]))


class IncomingBlob:
    """A blob on its way here. ask: sends a message to whoever offered it."""

    def __init__(self, offer: Offer, num_bytes: int, ask: Callable[[StepBody], None]) -> None:
        """num_bytes: the expected size. Raises BlobError for an offer of another."""
        if offer.num_bytes != num_bytes:
            raise BlobError(f"a {offer.kind} of {offer.num_bytes} bytes was offered, not of {num_bytes}")
        self.offer, self._ask = offer, ask
        self.data = bytearray(num_bytes)
        self._asked = self._got = 0
        self._hash = hashlib.blake2b(digest_size=16)
        for _ in range(PARTS_AHEAD):
            self._ask_next()

    def _ask_next(self) -> None:
        if self._asked < len(self.data):
            self._ask(WantPart(blob=self.offer.blob, start=self._asked))
            self._asked += PART_BYTES

    def take(self, part: BlobPart) -> bool:
        """A part has come. Returns whether the blob is whole. Raises BlobError if it is not what was offered."""
        size = min(PART_BYTES, len(self.data) - self._got)
        if part.start != self._got or len(part.data) != size or size <= 0:
            raise BlobError(f"bytes {part.start} to {part.start + len(part.data)} of a {self.offer.kind} came out of turn")
        self.data[part.start : part.start + size] = part.data
        self._hash.update(part.data)
        self._got += size
        self._ask_next()
        if self._got < len(self.data):
            return False
        if self._hash.hexdigest() != self.offer.digest:
            raise BlobError(f"a {self.offer.kind} was damaged on its way")
        self._ask(WantPart(blob=self.offer.blob, start=len(self.data)))
        return True
