"""What a load's requests experienced.

Owns: TTFT, TPOT and ITL of a request, attainment with its interval, goodput, summaries. Times are seconds of
one clock, from the start of the measured window. TTFT counts from when a request was due, not from when it was submitted: a
driver that is kept waiting by a long iteration must not hide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from coserve.core import percentile


@dataclass(frozen=True, slots=True, kw_only=True)
class SloInMs:
    """What a request has to meet, in milliseconds."""

    ttft_ms: float
    tpot_ms: float

    def met_by(self, ttft_ms: float | None, tpot_ms: float | None) -> bool:
        """Without a first token nothing is met; an output of one token has no TPOT (None) to miss."""
        return ttft_ms is not None and ttft_ms <= self.ttft_ms and (tpot_ms is None or tpot_ms <= self.tpot_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request's life. token_times: one per output token; finished: it ended as asked, not by failure or cancellation."""

    due_s: float
    prompt_tokens: int
    token_times: tuple[float, ...]
    finished: bool

    @property
    def ttft_ms(self) -> float | None:
        return (self.token_times[0] - self.due_s) * 1e3 if self.token_times else None

    @property
    def tpot_ms(self) -> float | None:
        """Mean time of an output token after the first; None for outputs of one token."""
        times = self.token_times
        return (times[-1] - times[0]) / (len(times) - 1) * 1e3 if len(times) > 1 else None

    @property
    def itl_ms(self) -> list[float]:
        """Gaps between output tokens."""
        return [(b - a) * 1e3 for a, b in zip(self.token_times, self.token_times[1:], strict=False)]


def meets(record: RequestRecord, objectives: SloInMs) -> bool:
    """Failed, dropped and unfinished requests miss."""
    return record.finished and objectives.met_by(record.ttft_ms, record.tpot_ms)


def wilson(hits: int, total: int) -> tuple[float, float]:
    """The 95% score interval of a share (E. B. Wilson 1927). total: at least 1."""
    z = 1.959964
    share, square = hits / total, z * z
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(values: Sequence[float]) -> dict[str, float]:
    """mean, p50 and p99. values: at least one."""
    return {"mean": mean(values), "p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}


def summarize(records: Sequence[RequestRecord], objectives: SloInMs, window_s: float) -> dict[str, Any]:
    """The latency keys of a result row. window_s: the seconds over which the requests were due, all repeats together.

    Latencies are of the requests that finished. A key without a value is absent.
    """
    if not records:
        return {}
    hits = sum(meets(record, objectives) for record in records)
    row: dict[str, Any] = {
        "num_requests": len(records), "slo_attainment": hits / len(records), "slo_interval": list(wilson(hits, len(records))),
        "goodput": hits / window_s,
    }
    done = [record for record in records if record.finished]
    for key, values in (
        ("ttft_ms", [r.ttft_ms for r in done if r.ttft_ms is not None]),
        ("tpot_ms", [r.tpot_ms for r in done if r.tpot_ms is not None]),
        ("itl_ms", [gap for r in done for gap in r.itl_ms]),
    ):
        if values:
            row[key] = summary(values)
    return row
