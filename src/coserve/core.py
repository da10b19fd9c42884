"""The nouns that cross rooms, and the error tree.

Owns: errors, training examples and groups, units of finetuning work, what one iteration runs, costs and gives. Does not own:
tensors of any device, policy, or how a noun is stored. Vocabulary: docs/architecture.md.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class CoserveError(Exception):
    """Root of the error tree. `param` names the field at fault in the words of the caller's interface."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(CoserveError, ValueError):
    """A setting is wrong, or two settings contradict each other."""


class InvalidRequest(CoserveError, ValueError):
    """A user's input (a data file, an adapter, a request) can't be used as it is."""


class ContextExceeded(InvalidRequest):
    """A prompt, alone or with the output that was asked for, is longer than the model or its cache takes."""


class NotFound(CoserveError, LookupError):
    """A named thing (model, adapter, file, job) does not exist."""


class CapacityError(CoserveError, RuntimeError):
    """The device has too little memory for what was asked: says what is needed and what there is."""


class JobFailed(CoserveError, RuntimeError):
    """A finetuning step failed. The job ends; the engine and other jobs go on."""


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message without line breaks, or its type where it has none. most: characters; a longer message is cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if most is None or len(text) <= most else f"{text[: most - 3]}..."


def percentile(values: Iterable[float], share: float) -> float:
    """The value that a share (0 to 1) of at least one value lies below: linear between the nearest two, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place % 1)


class Slo(NamedTuple):
    """What a request is promised, in seconds: per output token after the first, and from its arrival to the first. math.inf:
    nothing, which is best effort."""

    tpot_s: float
    ttft_s: float

    @property
    def in_ms(self) -> tuple[float | None, float | None]:
        """TPOT and TTFT in milliseconds, as JSON can say them; None: best effort."""
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
        """Sum of the weights that count."""
        return float(self.weights[1:].sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Examples whose backward waits for each other: one for SFT, (chosen, rejected) for DPO."""

    index: int
    examples: tuple[Example, ...]

    @property
    def num_tokens(self) -> int:
        return sum(example.num_tokens for example in self.examples)


class Direction(enum.Enum):
    FORWARD = "forward"
    BACKWARD = "backward"


class Unit(NamedTuple):
    """The smallest piece of finetuning work: layers [layer_start, layer_end) for packed tokens [start, end)."""

    direction: Direction
    layer_start: int
    layer_end: int
    start: int
    end: int


class Span(NamedTuple):
    """A request's rows in one iteration: its tokens [start, start + length).

    logits: how many of the last rows need logits: 0 inside a prompt, 1 where a token is sampled, all for prompt logprobs.
    samples: whether the last row's logits give the next token. A decode span's token is the request's last sampled one,
    wherever that is held.
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
    """A unit of one micro-batch in flight. fused: its rows ride in the inference pass (forward over all layers only)."""

    microbatch: int
    unit: Unit
    fused: bool = False


class OptimizerSlice(NamedTuple):
    """Elements [start, end) of a job's flat parameter, in its present optimizer step."""

    job: int
    start: int
    end: int


class AdapterCopy(NamedTuple):
    """A job's working weights become an immutable version. snapshot: the optimizer's state too, for a checkpoint."""

    job: int
    snapshot: bool


class BlockMove(NamedTuple):
    """A block of the key-value pool changes place; copied between two iterations."""

    source: int
    target: int


class PassCost(NamedTuple):
    """One inference pass over all layers.

    rows: decode, prefill and fused; head_rows: rows through the output head for logits; decode_context: sum of context tokens
    over decode rows; prefill_pairs, fused_pairs: query-key pairs per layer; fused_rows: finetuning rows among `rows`, whose
    kept values are written; fused_labels: label rows through the loss head; adapter_segments: different adapters among the
    rows; prefill_spans: prompts.
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
    """A unit of finetuning work that is not fused.

    pairs: query-key pairs of the window per layer; labels: label rows through the loss head, of forward units that reach the
    top, else 0; recompute_fraction: the share of forward, by matrix FLOPs, that a backward unit runs again, from 0 to 1.
    """

    backward: bool
    rows: int
    layers: int
    pairs: int
    labels: int
    recompute_fraction: float = 0.0


class Contents(NamedTuple):
    """What an iteration holds.

    inference: the pass, None without one. units: the units that are not fused into it. optimizer_elements: parameters that the
    optimizer updates. refresh_seconds: the time to refresh what adapters derive from those parameters, such as DoRA's norms; it
    was measured when their job began.
    """

    inference: PassCost | None
    units: tuple[UnitCost, ...]
    optimizer_elements: int
    refresh_seconds: float = 0.0


NO_CONTENTS = Contents(None, (), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one iteration runs. Validation windows are forward units of micro-batches that have no backward.

    Rows are packed [decode | prefill | fused finetuning]; units that are not fused follow one by one, then optimizer slices
    and copies. contents: its cost in counts. predicted_s: seconds by the latency model. finetune_share: the share of those
    seconds that is a job's, from 0 to 1. kind: what it holds, such as 'decode+backward', for error metrics.
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
        """All requests' rows, in batch order."""
        return self.decode + self.prefill

    @property
    def fused(self) -> WorkUnit | None:
        """The unit that rides in the inference pass."""
        return next((unit for unit in self.units if unit.fused), None)

    @property
    def empty(self) -> bool:
        return not (self.decode or self.prefill or self.units or self.optimizer or self.copies)


class TokenLogprob(NamedTuple):
    """Log-probability of one token; top: the most likely ones at its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampled(NamedTuple):
    """One sampled token. logprob: None unless asked for."""

    token: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What an iteration gave. tokens: per request, those sampled (none, one, or several); prompt_logprobs: per request, of the
    prompt's rows that ran; seconds: by the engine's clock, the whole iteration."""

    tokens: Mapping[int, Sequence[Sampled]]
    prompt_logprobs: Mapping[int, Sequence[TokenLogprob]]
    seconds: float
