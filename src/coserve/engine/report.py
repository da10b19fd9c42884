"""What an engine tells those who send it requests: what one more would wait, and what it holds.

A report is made by a thread that asks for it, beside the engine's own. It reads counts that the engine's thread changes
meanwhile, so they may be of slightly different times, and it never waits for an iteration. Until somebody asks for a first
report, nothing here costs the engine anything.

Owns: the figures of a report. Does not own: what is measured (scheduler/), reports' way to a router (server/), what a router
makes of them (cluster/).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from coserve.config.settings import EngineConfig
from coserve.core import PassCost
from coserve.engine.adapters import AdapterRegistry
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.requests import RequestState

CHUNK_TOKENS = 256
"""The chunk of a prompt for which a prompt's speed is told, at most max_num_batched_tokens."""
PREFIXES_EVERY_S = 0.5
"""Prefixes are told so often; they are most of a report's size."""
ENDS_S = 10.0
"""Ends of outputs are counted over about so many seconds."""
HEADROOM_S = 2.0
"""The share of time without requests is told over about so many seconds, as an iteration may last longer than a report is
apart."""


class EngineReport(NamedTuple):
    """The fields of cluster.load.Load that an engine knows, as they are described there."""

    queued_prompt_tokens: int
    running: int
    waiting: int
    max_running: int
    max_waiting: int
    end_s: float
    prefill_s_per_token: float
    iteration_s: float
    output_s: float
    free_blocks: int
    num_blocks: int
    block_tokens: int
    resident: list[str]
    adapter_load_s: float
    prefixes: list[int] | None
    headroom: float


class _Since(NamedTuple):
    """What was counted until a time."""

    at_s: float
    inference_s: float
    finished: int


class LoadReporter:
    """Makes reports of one engine, for one thread. busy_s: seconds that requests have taken so far. finished: outputs that have
    ended so far. live: outputs under way."""

    def __init__(
        self, config: EngineConfig, scheduler: HybridScheduler, pool: BlockPool, adapters: AdapterRegistry, *,
        busy_s: Callable[[], float], finished: Callable[[], int], live: Callable[[], int], clock: Callable[[], float],
    ) -> None:
        self._config, self._scheduler, self._pool, self._adapters = config, scheduler, pool, adapters
        self._busy_s, self._finished, self._live, self._clock = busy_s, finished, live, clock
        self._hashes = pool.watch_prefixes()
        self._prefixes_s = -PREFIXES_EVERY_S
        self._last = self._count(clock())
        self._ended = self._waited_s = 0.0
        """Ends of outputs, and the seconds in which they were, while others waited; both fade."""
        self._headroom = 1.0

    def report(self) -> EngineReport:
        """The figures of now; rates are since the report before."""
        now, last = self._clock(), self._last
        counted = self._last = self._count(now)
        past_s = max(now - last.at_s, 1e-6)
        limits, pool = self._config.scheduler, self._pool
        requests = list(self._scheduler.requests.values())
        running = [request for request in requests if request.running]
        waiting = max(0, self._live() - len(running))
        self._count_ends(counted.finished - last.finished, past_s, crowded=waiting > 0)
        free = 1 - (counted.inference_s - last.inference_s) / past_s
        self._headroom += min(1.0, past_s / HEADROOM_S) * (free - self._headroom)
        iteration_s, output_s, prefill_s = self._speeds(running)
        prefixes = None
        if now - self._prefixes_s >= PREFIXES_EVERY_S:
            prefixes, self._prefixes_s = self._hashes.collect(), now
        return EngineReport(
            queued_prompt_tokens=sum(request.prompt_left for request in requests), running=len(running), waiting=waiting,
            max_running=limits.max_num_seqs, max_waiting=self._config.max_waiting,
            end_s=self._waited_s / self._ended if self._ended >= 1 else 0.0, prefill_s_per_token=prefill_s,
            iteration_s=iteration_s, output_s=output_s, free_blocks=pool.num_free, num_blocks=pool.num_blocks,
            block_tokens=pool.block_tokens, resident=self._adapters.resident, adapter_load_s=self._adapters.load_s,
            prefixes=prefixes, headroom=min(1.0, max(0.0, self._headroom)),
        )

    def _count(self, now: float) -> _Since:
        return _Since(now, self._busy_s(), self._finished())

    def _count_ends(self, ended: int, past_s: float, *, crowded: bool) -> None:
        if crowded:
            keep = max(0.0, 1 - past_s / ENDS_S)
            self._ended, self._waited_s = self._ended * keep + ended, self._waited_s * keep + past_s

    def _speeds(self, running: list[RequestState]) -> tuple[float, float, float]:
        """Seconds of an iteration that gives each running request a token, what one more request adds to it, and what a token
        of a prompt takes beside them; as the latency model predicts now."""
        latency = self._scheduler.latency
        rows = max(1, len(running))
        context = sum(request.total for request in running)
        adapters = len({request.key for request in running if request.key.adapter is not None})
        decode = PassCost(rows, rows, rows, context, 0, 0, 0, 0, adapters)
        more = decode._replace(
            rows=rows + 1, head_rows=rows + 1, decode_rows=rows + 1, decode_context=context + context // rows
        )
        chunk = min(CHUNK_TOKENS, self._config.scheduler.max_num_batched_tokens)
        prompt = decode if running else PassCost(0, 0, 0, 0, 0, 0, 0, 0, 0)
        prompt = prompt._replace(
            rows=prompt.rows + chunk, head_rows=prompt.head_rows + 1, prefill_pairs=chunk * (chunk + 1) // 2, prefill_spans=1
        )
        iteration_s = latency.constant_seconds + latency.pass_seconds(decode)
        output_s = max(0.0, latency.constant_seconds + latency.pass_seconds(more) - iteration_s)
        return iteration_s, output_s, (latency.constant_seconds + latency.pass_seconds(prompt)) / chunk
