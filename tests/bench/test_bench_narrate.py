"""What `coserve bench sharing` says: what is to come, what each run measures, and how long it may take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coserve.bench.narrate import describe, introduction
from coserve.bench.sharing import BurstConfig, SharingConfig

CONFIG = SharingConfig(policies=("coserve", "temporal:16"), loads=(0.5,), requests=60, capacity_requests=40, alone_s=30.0)


def test_the_introduction_names_every_step_and_its_time() -> None:
    lines = introduction(CONFIG, 3)
    assert lines[0].startswith("measures, one after the other")
    assert lines[1].startswith("1. transformers.generate") and "about 60 s" in lines[1]
    assert lines[2].startswith("2. the requests per second that this machine holds") and "40 requests" in lines[2]
    assert lines[3].startswith("3. 3 runs") and "coserve, temporal:16 with 60 requests at 50%" in lines[3]
    assert "Ctrl-C" in lines[-1]


def test_what_is_given_is_not_measured() -> None:
    lines = introduction(replace(CONFIG, tpot_ms=100.0, capacity=1.5, burst=BurstConfig()), 5)
    assert len(lines) == 3 and lines[1].startswith("1. 5 runs") and "a burst under each" in lines[1]


@pytest.mark.parametrize(("label", "stored", "seconds", "words"), [
    ("peer", False, None, "peer: transformers.generate at batch 8, for the objective per token, about 60 s"),
    ("capacity-1.414", False, 42.4, "capacity-1.414: whether this machine holds 1.414 requests/s without training, about 42 s"),
    ("finetune-only-0", False, 35.0, "finetune-only-0: finetuning alone, about 35 s"),
    ("temporal:16-0.5-1", False, 80.0, "temporal:16-0.5-1: temporal:16 at 50% of capacity, repeat 2, about 80 s"),
    ("dynamic-temporal-0.25-0", True, 80.0,
     "dynamic-temporal-0.25-0: dynamic-temporal at 25% of capacity, repeat 1 (kept from before)"),
    ("burst-coserve", False, 50.0, "burst-coserve: a burst of requests under coserve, about 50 s"),
])
def test_each_run_in_words(label: str, stored: bool, seconds: float | None, words: str) -> None:
    assert describe(label, stored, seconds) == words
