"""Latency objectives of requests that set none, from what the machine's own profile predicts for a typical load.

    TPOT = TPOT_FACTOR x the time of an iteration that decodes NUM_REQUESTS requests with NUM_TOKENS tokens each
    TTFT = the time of NUM_REQUESTS prompts of NUM_TOKENS tokens, one after another, each beside those requests that decode

Prompts come in the number of chunks that is fastest. Both objectives are rounded up to two digits, and are at least LEAST.
Owns: that rule, what best effort counts as beside jobs, objectives in words. Does not own: what follows from objectives
(deadlines.py, prompts.py).
"""

from __future__ import annotations

import math

from coserve.config.values import SloMs, check_objective, objective_seconds
from coserve.core import PassCost, Slo
from coserve.scheduler.latency import LatencyModel

NUM_REQUESTS, NUM_TOKENS = 8, 512
NUM_CHUNKS = (1, 2, 4, 8)
"""In how many chunks a prompt may come. The fastest way counts, since one large pass may have been measured during a stall."""
TPOT_FACTOR = 1.5
"""The part above 1 leaves time for jobs, prompts and a few more requests."""
LEAST = Slo(tpot_s=0.010, ttft_s=1.0)
"""Nobody reads more than a hundred tokens per second, and a shorter iteration holds too little training."""


def profile_slo(latency: LatencyModel) -> Slo:
    """What this machine can promise. latency: fitted to the machine's profile, and not corrected online yet."""
    decode = PassCost(NUM_REQUESTS, NUM_REQUESTS, NUM_REQUESTS, NUM_REQUESTS * NUM_TOKENS, 0, 0, 0, 0, 0)
    pairs = NUM_TOKENS * (NUM_TOKENS + 1) // 2

    def seconds(cost: PassCost) -> float:
        return latency.constant_seconds + latency.pass_seconds(cost)

    def prompt_seconds(num_chunks: int) -> float:
        return num_chunks * seconds(decode._replace(
            rows=NUM_REQUESTS + NUM_TOKENS // num_chunks, head_rows=NUM_REQUESTS + 1, prefill_pairs=pairs // num_chunks,
            prefill_spans=1,
        ))

    return Slo(
        tpot_s=max(LEAST.tpot_s, _readable(TPOT_FACTOR * seconds(decode))),
        ttft_s=max(LEAST.ttft_s, _readable(NUM_REQUESTS * min(map(prompt_seconds, NUM_CHUNKS)))),
    )


def best_effort(default: Slo, profile: Slo) -> Slo:
    """The objectives that a best-effort request counts as having beside jobs.

    They are the profile's, or the defaults where those are longer, so that best effort is never better than the default.
    """
    longer = (max(promised, own) if promised < math.inf else own for promised, own in zip(default, profile, strict=True))
    return Slo(*longer)


def asked_slo(tpot_ms: SloMs | None, ttft_ms: SloMs | None, default: Slo) -> Slo:
    """The objectives that a request or the settings ask for, and the defaults where they ask for none. Raises ConfigError."""
    check_objective("tpot_ms", tpot_ms)
    check_objective("ttft_ms", ttft_ms)
    return Slo(objective_seconds(tpot_ms, default.tpot_s), objective_seconds(ttft_ms, default.ttft_s))


def describe_slo(slo: Slo, given: tuple[SloMs | None, SloMs | None], settings: tuple[str, str] | None = None) -> str:
    """Objectives in words, such as '85 ms per token, 3.2 s to the first (from this machine's profile; set tpot_ms, ttft_ms)'.

    given: TPOT and TTFT in the settings, None where nothing was set. settings: the names of these two; None leaves them out.
    """
    if slo == (math.inf, math.inf):
        return "best effort"
    parts = [f"{_in_words(slo.tpot_s)} per token", f"{_in_words(slo.ttft_s)} to the first"]
    unset = [place for place in (0, 1) if given[place] is None]
    if unset:
        names = "" if settings is None else f"; set {', '.join(settings[place] for place in unset)}"
        parts[unset[-1]] += f" (from this machine's profile{names})"
    return ", ".join(parts)


def _in_words(seconds: float) -> str:
    if seconds == math.inf:
        return "best effort"
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"


def _readable(seconds: float) -> float:
    """Rounded up to two digits."""
    if seconds <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(seconds))
    return round(math.ceil(seconds * 10**digits - 1e-6) / 10**digits, 6)
