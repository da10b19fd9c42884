"""What an ingress and a replica say to each other: msgpack over ZeroMQ, encrypted and authenticated by CURVE.

    ingress -> replica: Greeting (every second), Serve, Cancel, Nudge, GetStats, ChargeTenants
    replica -> replica: Steps
    replica -> ingress: Beat (about ten times a second), Tokens, Failed, Returned, Replied

The messages that the API process and the engine exchange (link/messages.py) travel as they are, but for their times: the clocks
of two machines differ, so that a time goes as an age, the seconds since then, and becomes a time again where it arrives.
"""

from __future__ import annotations

import msgspec

from coserve.cluster.load import Load
from coserve.server.link.messages import (
    AdapterRef,
    Cancel,
    ChargeTenants,
    Failed,
    Generate,
    GetStats,
    Message,
    Problem,
    Replied,
    Tokens,
)


class Greeting(Message, frozen=True, kw_only=True):
    """An ingress lives, and wants to be told of the replica's state. One that has not said so for GREET_LIMIT_S counts as gone:
    the replica ends its requests, and says so in case it lives."""


class Serve(Message, frozen=True, kw_only=True):
    """A request. generate: its arrival_s is an age. adapter: what the engine must hold first; None: the base model."""

    generate: Generate
    adapter: AdapterRef | None = None


class Nudge(Message, frozen=True, kw_only=True):
    """The row of a job has changed; the replica reads it at once, if the job is its own."""

    job: str


class Steps(Message, frozen=True, kw_only=True):
    """Frames of a job that several replicas share (steplink.py), from the replica `sender`."""

    sender: str
    frames: list[bytes]


class Beat(Message, frozen=True, kw_only=True):
    """The replica lives.

    ready: whether its engine takes requests. draining: whether the replica ends, so that it gets no new ones. load: the
    engine's report, if it has made one since the last beat. restarts: starts of the engine after the first. trouble: why the
    engine isn't ready.
    """

    ready: bool
    draining: bool = False
    load: Load | None = None
    restarts: int = 0
    trouble: str = ""


class Returned(Message, frozen=True, kw_only=True):
    """The replica gives a request back, which may go on elsewhere. problem: why the replica does not work on it; None: its
    ingress was thought to be gone. suspect: whether the engine has begun it and says nothing since, so that the request may be
    the cause."""

    id: str
    problem: Problem | None = None
    suspect: bool = False


ToReplica = Greeting | Serve | Cancel | Nudge | GetStats | ChargeTenants | Steps
FromReplica = Beat | Tokens | Failed | Returned | Replied

GREET_EVERY_S, GREET_LIMIT_S = 1.0, 5.0
"""Seconds between two greetings, and after the last one until an ingress counts as gone."""
BEAT_EVERY_S = 0.1
"""About how many seconds lie between two reports of an engine, each of which is a beat."""

_encoder = msgspec.msgpack.Encoder()
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)
_from_replica: msgspec.msgpack.Decoder[FromReplica] = msgspec.msgpack.Decoder(FromReplica)


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_to_replica(data: bytes) -> ToReplica:
    """Raises msgspec.ValidationError, also where a config's own check fails."""
    return _to_replica.decode(data)


def decode_from_replica(data: bytes) -> FromReplica:
    """Raises msgspec.ValidationError."""
    return _from_replica.decode(data)


def shift_generate(message: Generate, now_s: float) -> Generate:
    """A request with its time of arrival as an age, or its age as a time, at the monotonic time `now_s`."""
    return msgspec.structs.replace(message, arrival_s=now_s - message.arrival_s)


def shift_tokens(message: Tokens, now_s: float) -> Tokens:
    """A chunk with its times as ages, or its ages as times, at the monotonic time `now_s`."""
    begun, first = (None if time is None else now_s - time for time in (message.begun_s, message.first_s))
    return msgspec.structs.replace(message, time_s=now_s - message.time_s, begun_s=begun, first_s=first)
