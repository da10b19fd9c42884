"""What an engine needs of its place among the members of one job: micro-batches of a step, a total for its share of them.

    engine's thread:  begin, pull --> orders: TakeShare(3), TakeShare(7), SealShare --> seal --> StepTotal --> told_update

Owns: the interface, and the types that pass it. Does not own: who gets what (cluster/steps.py), how members reach each other
(server/link/stepmember.py), what the engine does with it (sharing.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from coserve.core import CoserveError
from coserve.training.batchwork import LossCounts


class TakeShare(NamedTuple):
    """Run micro-batch `id` of the step."""

    id: int


class SealShare(NamedTuple):
    """No micro-batch is left: seal the sum over what was taken, as soon as it has run."""


class DropShare(NamedTuple):
    """What was taken has been given to others: forget it."""


class StepTotal(NamedTuple):
    """The whole batch's gradient [elements], in the host's memory, its norm, and its counts: the same bytes at every member."""

    gradient: Tensor
    norm: float
    counts: LossCounts


class JoinedState(NamedTuple):
    """The state that a member begins with. step: the next one. tensors: those of the optimizer, by name, in the host's
    memory."""

    step: int
    tensors: Mapping[str, Tensor]


ShareOrder = TakeShare | SealShare | DropShare | StepTotal


class Dismissed(CoserveError):
    """A member has no more part in its job. fault: whether that is an error."""

    def __init__(self, message: str, *, fault: bool) -> None:
        super().__init__(message)
        self.fault = fault


class Exchange(Protocol):
    """One member's side. Only the engine's thread calls it, and every call returns at once.

    primary: whether this member holds the job's lease. Tensors that are handed over are read by another thread; they must not
    change until `settled`.
    """

    primary: bool

    @property
    def failure(self) -> Dismissed | None:
        """Why this member has no more part in the job; None as long as it has."""

    @property
    def settled(self) -> bool:
        """Whether all tensors that were handed over have been read."""

    @property
    def wants_state(self) -> bool:
        """Whether `give_state` is to be called, between two updates."""

    def on_news(self, wake: Callable[[], None]) -> None:
        """From now on `wake` is called, by any thread, when there is something to read here."""

    def enter(self, step: int, facts: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
        """Says what this member works on. The primary begins at `step`; others wait for `joined`. facts: what all members must
        agree on, by name. state: the optimizer's tensors, all of one size and type, whose contents don't matter yet."""

    def joined(self) -> JoinedState | None:
        """The state to begin with, once it is there."""

    def begin(self, step: int, num_microbatches: int) -> None:
        """A step begins."""

    def pull(self) -> None:
        """Asks for one more micro-batch, unless that has been asked for."""

    def orders(self) -> Sequence[ShareOrder]:
        """What has come for the present step since the last call, in order."""

    def seal(self, ids: Sequence[int], gradient: Tensor, counts: LossCounts) -> None:
        """Hands over the sum [elements] over micro-batches."""

    def give_back(self) -> None:
        """What was taken and not sealed can't be run just now."""

    def told_update(self, step: int, values: Tensor) -> None:
        """The total of a step has been applied. values: the adapter's float32 (or wider) values after it, of which a digest is
        compared with those of the others."""

    def give_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Hands over the state at the start of `step`, for members that join."""

    def leave(self) -> None:
        """Takes part no more. May be called again."""
