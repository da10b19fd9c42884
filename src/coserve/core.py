"""The types that several rooms share, and the error tree.

Owns: errors, training examples and groups, units of finetuning work, and what one iteration runs, costs and returns. Does not
own: device tensors, policy, or how any of these is stored. Vocabulary: docs/architecture.md.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_MAX_MESSAGE, _MAX_PLACE = 1000, 300
"""Characters of an error's message, and of a field's place."""


class CoserveError(Exception):
    """Root of the error tree. param: the field at fault, by its name in the caller's interface."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(CoserveError, ValueError):
    """A setting is wrong, or two settings contradict each other."""


class InvalidRequest(CoserveError, ValueError):
    """A user's input (a data file, an adapter, a request) can't be used as it is."""


def invalid_field(place: str, message: str) -> InvalidRequest:
    """An InvalidRequest about a field. Its place in the input (`messages[0].role`) begins the message. Both are cut where they
    are too long, since names in an input may have any length."""
    return InvalidRequest(f"{place}: {message}"[:_MAX_MESSAGE], param=place[:_MAX_PLACE])


class ContextExceeded(InvalidRequest):
    """A prompt, alone or with the requested output, is longer than the model or its key-value cache takes."""


class NotFound(CoserveError, LookupError):
    """A named thing (model, adapter, file, job) does not exist."""


class CapacityError(CoserveError, RuntimeError):
    """There is too little memory or disk space, or too many requests or jobs wait already. The message says which."""


class JobFailed(CoserveError, RuntimeError):
    """A finetuning job failed or was cancelled. The engine and other jobs go on."""


class RankFailed(CoserveError, RuntimeError):
    """One of the processes that share a model has ended or hangs. The others can't go on without it. signal: by which the
    system ended it, if it did."""

    def __init__(self, message: str, *, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message on one line, or its type's name if it has none. most: characters to which a longer one is cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."


def percentile(values: Iterable[float], share: float) -> float:
    """The value that a share (0 to 1) of at least one value lies below: linear between the nearest two, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place % 1)


class Slo(NamedTuple):
    """A request's latency objectives, in seconds. tpot_s: per output token after the first. ttft_s: from its arrival to the
    first token. math.inf is best effort."""

    tpot_s: float
    ttft_s: float

    @property
    def in_ms(self) -> tuple[float | None, float | None]:
        """(TPOT, TTFT) in milliseconds for JSON; None is best effort."""
        tpot, ttft = (None if seconds == math.inf else round(seconds * 1e3, 6) for seconds in self)
        return tpot, ttft


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One training sequence.

    token_ids: int64 [n]. weights: float32 [n]; weights[i] is the loss weight of predicting token i from the
    tokens before it (weights[0] has no predecessor and is ignored).
    """

    index: int
    token_ids: np.ndarray
    weights: np.ndarray

    def __post_init__(self) -> None:
        assert self.token_ids.shape == self.weights.shape and self.token_ids.ndim == 1

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def label_weight(self) -> float:
        """The sum of the weights, without the first, which is ignored."""
        return float(self.weights[1:].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Examples with a common loss, so that backward waits for all their forwards: one for SFT, (chosen, rejected) for DPO."""

    index: int
    examples: tuple[Example, ...]

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)


class Direction(enum.Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


class Unit(NamedTuple):
    """The smallest piece of finetuning work: layers [layer_start, layer_end) for the packed tokens [start, end)."""

    direction: Direction
    layer_start: int
    layer_end: int
    start: int
    end: int

    def tokens(self, num_layers: int) -> float:
        """Tokens through all of the model's layers that are as much work: its rows times its share of the layers."""
        return (self.end - self.start) * (self.layer_end - self.layer_start) / num_layers


class Span(NamedTuple):
    """A request's rows in one iteration: its tokens [start, start + length).

    logits: how many of the last rows need logits: 0 inside a prompt, 1 if a token is sampled, all for prompt log-probabilities.
    samples: whether the next token is sampled from the last row's logits. The token of a decode span is the request's last
    sampled one, which need not be known when the plan is made.
    """

    request: int
    start: int
    length: int
    logits: int
    samples: bool

    @property
    def end(self) -> int:
        return self.start + self.length


class WorkUnit(NamedTuple):
    """A unit of one micro-batch in flight. fused: whether its rows are in the inference pass (forward over all layers only)."""

    microbatch: int
    unit: Unit
    fused: bool = False


class OptimizerSlice(NamedTuple):
    """A part of a job's present optimizer step: elements [start, end) of its flat parameter."""

    job: int
    start: int
    end: int


class AdapterCopy(NamedTuple):
    """Copies a job's working weights to an immutable version. snapshot: also copies the optimizer's state, for a checkpoint."""

    job: int
    snapshot: bool


class BlockMove(NamedTuple):
    """A block of the key-value pool to be copied from index `source` to `target`, between two iterations."""

    source: int
    target: int


class PassCost(NamedTuple):
    """The size of one inference pass over all layers.

    rows: decode, prefill and fused rows together. head_rows: rows whose logits are computed. decode_context: context tokens,
    summed over decode rows. prefill_pairs, fused_pairs: query-key pairs per layer. fused_rows: finetuning rows among `rows`.
    fused_labels: their label rows through the loss head. adapter_segments: different adapters among the rows. prefill_spans:
    prompts.
    """

    rows: int
    head_rows: int
    decode_rows: int
    decode_context: int
    prefill_pairs: int
    fused_rows: int
    fused_pairs: int
    fused_labels: int
    adapter_segments: int
    prefill_spans: int = 0


class UnitCost(NamedTuple):
    """The size of a unit of finetuning work that is not fused.

    pairs: query-key pairs of the window per layer. labels: label rows through the loss head; 0 except for forward units up to
    the top layer. recompute_fraction: the share of forward's matrix FLOPs that a backward unit runs again, from 0 to 1.
    """

    backward: bool
    rows: int
    layers: int
    pairs: int
    labels: int
    recompute_fraction: float = 0.0


class Contents(NamedTuple):
    """The size of an iteration.

    inference: the pass, or None. units: the units that are not fused into it. optimizer_elements: how many parameters the
    optimizer updates. refresh_seconds: the time to refresh what adapters derive from those parameters, such as DoRA's norms,
    as measured when their job began.
    """

    inference: PassCost | None
    units: tuple[UnitCost, ...]
    optimizer_elements: int
    refresh_seconds: float = 0.0


NO_CONTENTS = Contents(None, (), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one iteration runs. Validation windows are forward units of micro-batches that have no backward.

    The pass packs rows [decode | prefill | fused finetuning]. Units that are not fused follow one by one, then optimizer slices
    and copies. kind: the plan's parts, such as 'decode+backward', for error metrics. contents: its size. predicted_s: by the
    latency model. finetune_share: the part of `predicted_s` that finetuning causes, from 0 to 1.
    """

    number: int
    decode: tuple[Span, ...] = ()
    prefill: tuple[Span, ...] = ()
    units: tuple[WorkUnit, ...] = ()
    optimizer: tuple[OptimizerSlice, ...] = ()
    copies: tuple[AdapterCopy, ...] = ()
    kind: str = "idle"
    contents: Contents = NO_CONTENTS
    predicted_s: float = 0.0
    finetune_share: float = 0.0

    @property
    def spans(self) -> tuple[Span, ...]:
        """The rows of all requests, in batch order."""
        return self.decode + self.prefill

    @property
    def fused(self) -> WorkUnit | None:
        """The unit that is part of the inference pass, or None."""
        return next((unit for unit in self.units if unit.fused), None)

    @property
    def empty(self) -> bool:
        return not (self.decode or self.prefill or self.units or self.optimizer or self.copies)


class TokenLogprob(NamedTuple):
    """Log-probability of one token. top: (token, log-probability) of the most likely tokens at its position, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampled(NamedTuple):
    """One sampled token. logprob: None unless asked for."""

    token: int
    logprob: TokenLogprob | None = None


class MeasuredStep(NamedTuple):
    """An iteration that is over. seconds: its duration on the device."""

    plan: StepPlan
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The result of an iteration. tokens: the tokens sampled per request (none, one or several). prompt_logprobs: per request,
    of the prompt rows that ran. ended: the iterations whose end is known since the last result, with the seconds that each took
    on the device. A device that works beside the host may still be at this one. waited_s: how long the host waited for the
    device; a CPU's own work counts as waiting."""

    tokens: Mapping[int, Sequence[Sampled]]
    prompt_logprobs: Mapping[int, Sequence[TokenLogprob]]
    ended: Sequence[MeasuredStep]
    waited_s: float = 0.0
