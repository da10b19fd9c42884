"""A request of a simulation: what its user wants, and when its tokens came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from coserve.scheduler.requests import RequestState

_TOKENS_APART = 1_000_003


def simulated_token(request: int, position: int) -> int:
    """The token that is sampled at a position of a request's tokens. A lost or doubled token shows, since no two neighbours
    are equal."""
    return (request * 7919 + position * 104729) % 50000


def distinct_prompt(number: int, length: int) -> Sequence[int]:
    """Token ids of a prompt that shares no prefix with those of other numbers. length: at most a million."""
    return range(number * _TOKENS_APART, number * _TOKENS_APART + length)


@dataclass(slots=True, kw_only=True)
class SimulatedRequest:
    """One request. Times are seconds of the virtual clock.

    stop_at: output tokens after which the text ends by itself. cancel_at: when its user leaves. finished_s: when its last token
    came. cancelled: whether its user left before. logit_rows: rows of the prompt whose logits were wanted and computed.
    """

    state: RequestState
    stop_at: int
    cancel_at: float | None = None
    finished_s: float | None = None
    cancelled: bool = False
    logit_rows: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether it finished within both of its objectives."""
        if self.finished_s is None:
            return False
        first, last = self.token_times[0], self.token_times[-1]
        gaps = len(self.token_times) - 1
        late = gaps > 0 and (last - first) / gaps > self.state.tpot_s + 1e-9
        return first - self.state.arrival_s <= self.state.ttft_s + 1e-9 and not late
