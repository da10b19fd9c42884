"""What the server does, second by second: its counters, and the job as its API shows it.

Owns: samples, rates between them, losses. Does not own: chat as its users see it (traffic.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coserve.demo.client import Connection, read_counters
from coserve.demo.server import DemoFailed

if TYPE_CHECKING:
    from openai.types.fine_tuning import FineTuningJob

INTERVAL_S = 1.0
SHORT_S = 5.0
"""Rates that are shown while it runs are of so many seconds."""
STALLED_S = 180.0
"""A job without progress for so long counts as lost."""
FINETUNE, INFERENCE = "coserve_finetune_tokens_total", "coserve_inference_tokens_total"
_EVENTS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensAt:
    """Tokens so far at a time (seconds, the clock of time.perf_counter)."""

    time_s: float
    finetune_tokens: float
    inference_tokens: float


def add_sample(samples: list[TokensAt], time_s: float, counters: dict[str, float]) -> None:
    """A counter that fell has begun anew (the engine was restarted): what it has now is added."""
    last = samples[-1] if samples else TokensAt(time_s=time_s, finetune_tokens=0, inference_tokens=0)
    samples.append(TokensAt(
        time_s=time_s, finetune_tokens=last.finetune_tokens + counters[FINETUNE],
        inference_tokens=last.inference_tokens + counters[INFERENCE],
    ))


def rate(samples: list[TokensAt], kind: str, since_s: float, until_s: float) -> float | None:
    """Tokens per second of finetune_tokens or inference_tokens between two times; None without two samples there."""
    part = [sample for sample in samples if since_s <= sample.time_s <= until_s]
    if len(part) < 2:
        return None
    rise: float = getattr(part[-1], kind) - getattr(part[0], kind)
    return rise / (part[-1].time_s - part[0].time_s)


def trained_until(samples: list[TokensAt]) -> float:
    """Time of the first sample that has all finetuning tokens."""
    return next(sample.time_s for sample in samples if sample.finetune_tokens == samples[-1].finetune_tokens)


class Watch:
    """samples: one per second; losses: by step, of the job it follows; show: called after each look."""

    def __init__(self, connection: Connection, show: Callable[[], None]) -> None:
        self._connection, self._show = connection, show
        self._seen: dict[str, float] = {}
        self._moved_s = time.perf_counter()
        self.samples: list[TokensAt] = []
        self.losses: dict[int, float] = {}
        self.job: FineTuningJob | None = None
        self.num_steps = 0
        self._looked = asyncio.Condition()

    async def run(self) -> None:
        """Looks until it is cancelled. Raises DemoFailed if the job fails or stalls, and the client's errors."""
        while True:
            began = time.perf_counter()
            await self.look()
            await asyncio.sleep(max(0.0, began + INTERVAL_S - time.perf_counter()))

    async def look(self) -> None:
        """One sample, and the job's state."""
        await self._sample()
        if self.job is not None and self.job.status != "succeeded":
            await self._look_at_job(self.job.id)
        self._show()
        async with self._looked:
            self._looked.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a look after which the condition holds."""
        async with self._looked:
            await self._looked.wait_for(condition)

    def recent(self, kind: str) -> float:
        """Tokens per second of the last seconds."""
        now = time.perf_counter()
        return rate(self.samples, kind, now - SHORT_S - INTERVAL_S, now) or 0.0

    async def _sample(self) -> None:
        try:
            found = await read_counters(self._connection.url, (FINETUNE, INFERENCE))
        except OSError:
            return  # the next one may come through; a server that has ended is noticed elsewhere
        if not {FINETUNE, INFERENCE} <= found.keys():
            return  # the engine is being restarted
        rises = {name: value - self._seen.get(name, 0.0) for name, value in found.items()}
        add_sample(self.samples, time.perf_counter(), {
            name: rise if rise >= 0 else found[name] for name, rise in rises.items()
        })
        self._seen = dict(found)

    async def _look_at_job(self, id: str) -> None:
        jobs = self._connection.client.fine_tuning.jobs
        num_losses, status = len(self.losses), self.job and self.job.status
        job = await jobs.retrieve(id)
        for event in (await jobs.list_events(id, limit=_EVENTS)).data:
            data = event.data if isinstance(event.data, dict) else {}
            if event.type == "metrics" and "train_loss" in data:
                self.losses[int(data["step"])] = float(data["train_loss"])
        self.num_steps = int((job.model_extra or {}).get("num_steps", 0))
        self.job = job
        now = time.perf_counter()
        if job.status in ("failed", "cancelled"):
            raise DemoFailed(f"the finetuning job {job.status}: {job.error.message if job.error else 'no reason was given'}")
        if len(self.losses) != num_losses or job.status != status:
            self._moved_s = now
        elif now - self._moved_s > STALLED_S:
            raise DemoFailed(f"the finetuning job made no step in {STALLED_S:.0f} s")
