"""How long an iteration may take beside one request that has almost all of its tokens."""

from __future__ import annotations

import pytest

from coserve.config.settings import SchedulerConfig
from coserve.core import Slo
from coserve.scheduler.deadlines import SHORT_WAIT, Deadlines
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.requests import RequestState
from coserve.simulation.engine import BASE_KEY

PASS, PROMPT = 0.02, 0.2
"""Seconds of a pass, and of a prompt that may come."""


def jobs_limit(tpot_s: float, ttft_s: float, prompt_s: float = PROMPT) -> float:
    """What finetuning may take, in seconds, beside a request that is 0.5 s ahead with 99 of 100 tokens."""
    law = LatencyModel({("inference", "once", 0): PASS})
    deadlines = Deadlines(SchedulerConfig(reserve=0.0, itl_factor=100.0), law, Slo(tpot_s, ttft_s))
    request = RequestState(
        id=1, tenant="", prompt=(1,), max_tokens=100, key=BASE_KEY, arrival_s=0.0, ttft_s=ttft_s, tpot_s=tpot_s, running=True,
        output=[0] * 99, computed=99, first_token_s=0.0,
    )
    return deadlines.limits([request], 99 * tpot_s - 0.5, prompt_s).jobs


def test_the_time_of_a_prompt_is_put_aside_where_requests_gain_slack_slowly() -> None:
    assert jobs_limit(PASS, ttft_s=1.0) == pytest.approx(0.5 - 0.99 * PROMPT)


def test_nothing_is_put_aside_where_they_soon_gain_it() -> None:
    """In a short wait, a tenth of the second in which the first token is due, a request gains 80 ms for each pass of 20 ms."""
    assert jobs_limit(5 * PASS, ttft_s=1.0) == jobs_limit(5 * PASS, ttft_s=1.0, prompt_s=0.0) == pytest.approx(0.5)


def test_what_they_do_not_gain_soon_is_put_aside() -> None:
    gained = SHORT_WAIT * 1.0
    assert jobs_limit(2 * PASS, ttft_s=1.0) == pytest.approx(0.5 - 0.99 * (PROMPT - gained))
