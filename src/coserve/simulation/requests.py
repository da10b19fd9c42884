"""A request of a simulation: what its user wants, and when its tokens came."""

from __future__ import annotations

from dataclasses import dataclass, field

from coserve.scheduler.requests import RequestState


def simulated_token(request: int, position: int) -> int:
    """The token that is sampled at a position of a request's tokens. A lost or doubled token shows, since no two neighbours
    are equal."""
    return (request * 7919 + position * 104729) % 50000


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
