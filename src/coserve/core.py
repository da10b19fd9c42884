"""The nouns that cross rooms, and the error tree.

Owns: errors, training examples and groups, units of finetuning work. Does not own: tensors of any device,
policy, or how a noun is stored. Vocabulary: docs/architecture.md.
"""

from __future__ import annotations

import enum
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


class NotFound(CoserveError, LookupError):
    """A named thing (model, adapter, file, job) does not exist."""


class CapacityError(CoserveError, RuntimeError):
    """The device has too little memory for what was asked: says what is needed and what there is."""


class JobFailed(CoserveError, RuntimeError):
    """A finetuning step failed. The job ends; the engine and other jobs go on."""


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
