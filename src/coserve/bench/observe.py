"""One load of requests beside one trainer, observed over a window.

Owns: the window, what is counted in it. Does not own: server and trainer (rivals.py), which loads there are (versus.py).

    -warmup_s ------------- 0 ------------------------- window_s --------------- the last request's end
       requests that are      requests due here are       no arrivals; training goes on until
       not counted            counted, and training       something is known of the window's end
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from coserve.bench.cells import record_from_dict, record_to_dict
from coserve.bench.driver import TokensDone
from coserve.bench.loads import PromptLoad, Send, run_load
from coserve.bench.metrics import RequestRecord

SAMPLE_S = 1.0
"""Between two looks at a trainer."""
SILENT_S = 120.0
"""A trainer that tells of nothing for so long after the window has failed: a micro-batch takes seconds."""


class Trainer(Protocol):
    """Something that trains beside a server. Its times are those of time.monotonic."""

    def start(self) -> None:
        """Lets it train; returns when it has made progress, which `poll` tells of next. Raises RuntimeError."""

    def poll(self) -> list[TokensDone]:
        """What was trained so far, at times since the last call. Raises RuntimeError if it has ended."""

    def stop(self) -> None:
        """Takes the processors from it. Raises RuntimeError if it has ended already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowTraffic:
    """Requests of equal output. due_s: seconds from the window's start, rising; below 0 in the warm-up."""

    prompts: tuple[tuple[int, ...], ...]
    due_s: tuple[float, ...]
    output_tokens: int
    warmup_s: float
    window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """records: the counted requests; samples: what was trained until when. Times are seconds from the window's start."""

    records: tuple[RequestRecord, ...]
    samples: tuple[TokensDone, ...]
    window_s: float

    @property
    def finetune_tokens_per_s(self) -> float:
        """Over the window; between two samples, training is taken to advance evenly."""
        times, tokens = zip(*self.samples, strict=True)
        start, end = np.interp([0.0, self.window_s], times, tokens)
        return float(end - start) / self.window_s


async def observe(send: Send, traffic: WindowTraffic, trainer: Trainer) -> Observed:
    """Sends the traffic beside the trainer, which has been started. Raises RuntimeError if the trainer ends or is silent."""
    start = time.monotonic() + traffic.warmup_s
    end = start + traffic.window_s
    load = PromptLoad(prompts=traffic.prompts, output_tokens=traffic.output_tokens,
                due_s=tuple(due_s + traffic.warmup_s for due_s in traffic.due_s))
    requests = asyncio.create_task(run_load(send, load, time.monotonic))
    samples: list[TokensDone] = []
    try:
        while not (requests.done() and samples and samples[-1].time_s >= end):
            samples += await asyncio.to_thread(trainer.poll)
            heard = samples[-1].time_s if samples else start
            if time.monotonic() > max(heard, end) + SILENT_S:
                raise RuntimeError(f"the trainer has told of no progress for {time.monotonic() - heard:.0f} s")
            await asyncio.sleep(SAMPLE_S)
    finally:
        requests.cancel()
    records = [_shifted(record, traffic.warmup_s) for record in requests.result()]
    return Observed(
        records=tuple(record for record in records if record.due_s >= 0), window_s=traffic.window_s,
        samples=tuple(TokensDone(time_s - start, tokens) for time_s, tokens in samples),
    )


def _shifted(record: RequestRecord, seconds: float) -> RequestRecord:
    """The record with its times counted from `seconds` later."""
    return replace(record, due_s=record.due_s - seconds, token_times=tuple(at - seconds for at in record.token_times))


def observed_to_dict(observed: Observed) -> dict[str, Any]:
    """Plain JSON types."""
    return {
        "window_s": observed.window_s, "samples": [[round(time_s, 5), tokens] for time_s, tokens in observed.samples],
        "records": [record_to_dict(record) for record in observed.records],
    }


def observed_from_dict(data: Mapping[str, Any]) -> Observed:
    """Reads what `observed_to_dict` wrote."""
    return Observed(
        records=tuple(map(record_from_dict, data["records"])), samples=tuple(TokensDone(*sample) for sample in data["samples"]),
        window_s=data["window_s"],
    )
