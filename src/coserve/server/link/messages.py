"""What the API process and the engine process say to each other: msgpack over a ZeroMQ pair of sockets.

    API -> engine: Generate, Cancel, LoadAdapter, UnloadAdapter, StartJob, ActJob, StepTold, GetStats, WatchLoad, ChargeTenants,
                   Ack, Shutdown
    engine -> API: Progress, Ready, Tokens, Failed, Replied, JobHappened, JobEnded, StepSaid, ShareEnded, EngineLoad

A `call` number is answered by one Replied. Times are seconds of the machine's monotonic clock, which both processes share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from coserve.cluster.load import Load
from coserve.config.settings import FinetuneConfig, SamplingConfig
from coserve.config.values import SloMs
from coserve.core import Slo


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Every message is one of the classes below."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as it travels; errors.error_name gives the name, errors.make_error the exception."""

    name: str
    message: str
    param: str | None = None


class AdapterRef(msgspec.Struct, frozen=True, kw_only=True):
    """A version of an adapter. name: the engine's name of it. uri: where its files are in the artifact store, and sha256: their
    digest; both are empty where the engine has been told of the name already."""

    name: str
    uri: str = ""
    sha256: str = ""


# --- from the API ---


class Generate(Message, frozen=True, kw_only=True):
    """A request.

    arrival_s: when it arrived at the API process. adapter: a name that LoadAdapter or a job has made; None: the base model.
    tpot_ms, ttft_ms: the request's own objectives; None takes the server's, and "none" is best effort. emitted: for each output
    the ids that another engine has already sent, behind which it goes on (Engine.submit); empty: none.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingConfig
    arrival_s: float
    adapter: str | None = None
    tenant: str = ""
    tpot_ms: SloMs | None = None
    ttft_ms: SloMs | None = None
    emitted: list[list[int]] = []


class Cancel(Message, frozen=True, kw_only=True):
    """Nobody waits for a request any more: the engine stops working on it."""

    id: str


class LoadAdapter(Message, frozen=True, kw_only=True):
    """Loads an adapter that has passed the gate (peft/gate.py), as a newer version if the name exists.

    The reply's value is the list of directories that the engine's adapters may still be read from.
    """

    call: int
    name: str
    directory: str


class UnloadAdapter(Message, frozen=True, kw_only=True):
    """Requests that use the adapter go on. The reply's value is that of LoadAdapter."""

    call: int
    name: str


class JobShare(msgspec.Struct, frozen=True, kw_only=True):
    """An engine's place among those that share a job. epoch: of the job's lease. member: its name. primary: whether this
    engine's replica holds the lease. Where it doesn't, the engine writes and publishes nothing, makes no `directory`, and says
    nothing of the job but its ShareEnded; the message's id is the share's, since this replica may come to hold the job too."""

    epoch: int
    member: str
    primary: bool


class StartJob(Message, frozen=True, kw_only=True):
    """Starts a job, or continues one.

    adapter: the name under which checkpoints and the result are published. directory: where the job writes.
    resume: whether the directory holds a job already, which goes on. start: directory of the adapter that training starts from;
    None: a new adapter. weight: the job's share of finetuning's time, beside the weights of other jobs. share: for a job that
    several engines share.
    """

    call: int
    id: str
    adapter: str
    training_file: str
    validation_file: str | None
    directory: str
    config: FinetuneConfig
    resume: bool
    start: str | None = None
    tenant: str = ""
    weight: float = 1.0
    share: JobShare | None = None


class ActJob(Message, frozen=True, kw_only=True):
    """Pauses, resumes, cancels or hands over a job; one that has ended stays as it is. A job that is handed over writes a
    checkpoint at the end of its present step, and leaves the engine."""

    id: str
    action: Literal["pause", "resume", "cancel", "hand_over"]


class StepTold(Message, frozen=True, kw_only=True):
    """An envelope (stepmessages.py) for the engine as a member of a job."""

    id: str
    data: bytes


class GetStats(Message, frozen=True, kw_only=True):
    """Asks for Engine.metrics(), which is the reply's value."""

    call: int


class WatchLoad(Message, frozen=True, kw_only=True):
    """Asks for an EngineLoad about every so many seconds from now on; 0: for no more of them."""

    every_s: float


class ChargeTenants(Message, frozen=True, kw_only=True):
    """Other engines have served tenants: tokens by tenant, which count for their turns here."""

    tokens: dict[str, int]


class Ack(Message, frozen=True, kw_only=True):
    """A batch of the engine's messages has been read, so that another may be sent."""


class Shutdown(Message, frozen=True, kw_only=True):
    """Write what is being written, then end."""


# --- from the engine ---


class Progress(Message, frozen=True, kw_only=True):
    """A line about the start."""

    line: str


class Ready(Message, frozen=True, kw_only=True):
    """The engine takes requests.

    max_model_len: the most tokens of prompt and output together. memory: bytes of the weights and of the pool's parts, by name,
    in each process if several share the model, which threads are too. objectives: those of requests that set none. start_s: how
    many seconds the start took.
    """

    model: str
    directory: str
    fingerprint: str
    architecture: str
    num_parameters: int
    vocab_size: int
    max_model_len: int
    hidden_size: int = 0
    device: str
    dtype: str
    quantization: str = "none"
    threads: int
    memory: dict[str, int]
    objectives: Slo
    start_s: float


class LogprobEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A token's log-probability and those of the likeliest tokens, as (token id, log-probability)."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Tokens(Message, frozen=True, kw_only=True):
    """What one iteration added to one output, or several iterations where chunks were merged.

    index: which of the request's outputs. finish_reason: stop, length or cancelled, in an output's last chunk.
    time_s: when the last of the tokens was there. first_s: when the first was, if chunks were merged; None: at time_s.
    cached_tokens: how many of the prompt's tokens the prefix cache had, in a request's first chunk.
    begun_s: when the prompt began to be computed, in a request's first chunk.
    prompt_logprobs: in the last chunk of the first output that ends, if they were asked for. An output that had ended by what
    the request came with (Generate.emitted) ends again, in a chunk without ids.
    """

    id: str
    index: int
    text: str
    token_ids: list[int]
    time_s: float
    finish_reason: str | None = None
    cached_tokens: int = 0
    begun_s: float | None = None
    first_s: float | None = None
    logprobs: list[LogprobEntry] = []
    prompt_logprobs: list[LogprobEntry] = []


def merge_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Chunks of one output, in order, as one."""
    if len(parts) == 1:
        return parts[0]
    first, last = parts[0], parts[-1]
    return msgspec.structs.replace(
        last, text="".join(part.text for part in parts), token_ids=[token for part in parts for token in part.token_ids],
        cached_tokens=max(part.cached_tokens for part in parts), begun_s=first.begun_s,
        first_s=first.time_s if first.first_s is None else first.first_s,
        logprobs=[entry for part in parts for entry in part.logprobs],
    )


class Failed(Message, frozen=True, kw_only=True):
    """A request has ended by an error; nothing follows."""

    id: str
    problem: Problem


class Replied(Message, frozen=True, kw_only=True):
    """The answer to a call: a value, or the problem because of which there is none."""

    call: int
    problem: Problem | None = None
    value: Any = None


class JobHappened(Message, frozen=True, kw_only=True):
    """An event of a job.

    row: the fields of a StepRow, where a step has ended. num_steps: how many steps the job has in all. checkpoint: directory of
    a checkpoint that is whole on disk. checkpoint_step: the checkpoint's step. resumed_step: the last step that a resumed job
    doesn't run again.
    """

    id: str
    level: Literal["info", "warn", "error"]
    message: str
    time_s: float
    row: dict[str, float | int | None] | None = None
    num_steps: int = 0
    checkpoint: str | None = None
    checkpoint_step: int = 0
    resumed_step: int | None = None


class JobEnded(Message, frozen=True, kw_only=True):
    """A job's last message. trained_tokens: tokens that went through forward and backward, in all runs of the job."""

    id: str
    status: Literal["succeeded", "failed", "cancelled", "handed_over"]
    step: int
    trained_tokens: int
    problem: Problem | None = None


class StepSaid(Message, frozen=True, kw_only=True):
    """An envelope (stepmessages.py) of the engine as a member of a job, for the job's coordinator."""

    id: str
    data: bytes


class ShareEnded(Message, frozen=True, kw_only=True):
    """This engine's part in a job that another replica holds has ended. problem: why it failed, if it did."""

    id: str
    problem: Problem | None = None


class EngineLoad(Message, frozen=True, kw_only=True):
    """The engine's load now. The replica's name is still empty; reports are numbered from 1."""

    load: Load


ToEngine = (
    Generate | Cancel | LoadAdapter | UnloadAdapter | StartJob | ActJob | StepTold | GetStats | WatchLoad
    | ChargeTenants | Ack | Shutdown
)
FromEngine = Progress | Ready | Tokens | Failed | Replied | JobHappened | JobEnded | StepSaid | ShareEnded | EngineLoad

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: Message) -> bytes:
    """A message as bytes."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises msgspec.ValidationError, also where a config's own check fails."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Raises msgspec.ValidationError."""
    return _from_engine.decode(data)
