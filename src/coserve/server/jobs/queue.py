"""Which job runs next, and how fast a job runs: pure rules over jobs that haven't ended.

Owns: the order of the queue, the estimate of a job's end. Does not own: starting jobs (runner.py), shares among running ones
(the engine's scheduler).
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from coserve.server.jobs.objects import Pace
from coserve.server.records import JobRecord

MAX_STRIKES = 3
"""A job is given up after the engine has ended so often while it worked on the same step of the job."""
_PACE_STEPS = 20


@dataclass(slots=True)
class UnfinishedJob:
    """A job that hasn't ended. generation: of the engine that it was handed to; None if it wasn't. rows: metrics of the steps
    since the last checkpoint."""

    record: JobRecord
    generation: int | None = None
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_PACE_STEPS))
    """(time at the end of a step in seconds, its tokens), of the steps since the job was last started or resumed."""
    furthest: int = 0
    """The last step that the job has reached since this server started."""
    strikes: int = 0
    """Evidence that the job is the cause of the engine's ends; `strike` counts it."""
    struck_at: int = -1

    def strike(self, *, alone: bool) -> bool:
        """The engine hung or crashed while it worked on this job; True if it has done so MAX_STRIKES times in a row at the same
        step. alone: whether it worked on no request at the same time; if it did, this counts half."""
        if self.furthest > self.struck_at:
            self.strikes = 0
        self.struck_at = max(self.furthest, self.struck_at)
        self.strikes += 2 if alone else 1
        return self.strikes >= 2 * MAX_STRIKES

    def holds_place(self, generation: int) -> bool:
        """Whether it counts among max_jobs: it runs in the present engine and isn't paused. A paused job keeps its memory."""
        return self.generation == generation and not self.record.paused

    def pace(self) -> Pace | None:
        """How fast the job runs, from its last steps. None before its second step and while it is paused."""
        steps = list(self.steps)
        if len(steps) < 2 or self.record.paused:
            return None
        seconds = max(steps[-1][0] - steps[0][0], 1e-9)
        per_step = seconds / (len(steps) - 1)
        left = max(0, self.record.num_steps - self.record.step)
        tokens = sum(count for _, count in steps[1:])
        return Pace(tokens_per_second=round(tokens / seconds, 1), finish=math.ceil(time.time() + left * per_step))


def next_job(jobs: Collection[UnfinishedJob], generation: int) -> UnfinishedJob | None:
    """The waiting job to start. A job that ran before the engine's restart comes first, then jobs of the tenant with the fewest
    running jobs; of several, those of lower priority numbers, of earlier deadlines, the oldest. jobs: oldest first."""
    running = Counter(job.record.tenant for job in jobs if job.holds_place(generation))
    waiting = [
        job for job in jobs
        if job.record.status in ("queued", "running") and job.generation != generation and not job.record.paused
    ]

    def key(job: UnfinishedJob) -> tuple[bool, int, int, float]:
        record = job.record
        deadline = math.inf if record.deadline is None else record.deadline
        return record.status != "running", running[record.tenant], record.priority, deadline

    return min(waiting, key=key, default=None)
