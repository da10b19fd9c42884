"""What the server measures: Prometheus metrics, and the figures of the web page.

Latencies are counted from a request's arrival in this process to the times that the engine gives its tokens, by the same clock.
No metric names a tenant's model, so /metrics needs no key.

Owns: names, buckets, objectives met or missed, one meter per request. Does not own: the engine's counters, which come with its
stats and get their names in enginemetrics.py; windows (livestats.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from coserve.config.settings import SamplingConfig
from coserve.config.values import SloMs
from coserve.core import Slo, percentile
from coserve.scheduler.slo import asked_slo
from coserve.server.link.messages import JobEnded, JobHappened, Tokens
from coserve.server.settings import ServerConfig
from coserve.server.stats.enginemetrics import COUNTERS, engine_families, fleet_families, server_families, vllm_aliases
from coserve.server.stats.livestats import Counters, Window

WINDOW_S = 60.0
"""Seconds that percentiles and attainment look back."""
RATE_S = 5.0
"""Seconds that rates look back."""
LABELS = ("model_name", "engine")
END_REASONS = ("stop", "length", "cancelled", "error")
_TTFT_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_COUNTS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_HISTOGRAMS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("time_to_first_token_seconds", "From a request's arrival to its first token.", _TTFT_S),
    ("inter_token_latency_seconds", "Gaps between an output's tokens, of all requests.", _TOKEN_S),
    ("request_time_per_output_token_seconds", "Per output, over its tokens after the first.", _TOKEN_S),
    ("e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_S),
    ("request_queue_time_seconds", "From a request's arrival to the first of its prompt's rows.", _TTFT_S),
    ("request_prefill_time_seconds", "From there to its first token.", _TTFT_S),
    ("request_decode_time_seconds", "From a request's first token to its last.", _REQUEST_S),
    ("request_inference_time_seconds", "From the first of its prompt's rows to its last token.", _REQUEST_S),
    ("request_prompt_tokens", "Prompt tokens per request.", _COUNTS),
    ("request_generation_tokens", "Output tokens per request, of all its outputs.", _COUNTS),
    ("request_max_num_generation_tokens", "Tokens of a request's longest output.", _COUNTS),
    ("request_params_n", "Outputs that requests asked for.", (1, 2, 5, 10, 20)),
    ("request_params_max_tokens", "Most output tokens that requests allowed.", _COUNTS),
)


class FleetState(NamedTuple):
    """What a fleet says beside the figures of all engines together.

    engines: Engine.metrics() of each replica that answers, by its id. replicas: what is known of each one, as the page shows
    it. signals: what an autoscaler may look at, by name.
    """

    engines: Mapping[str, Mapping[str, Any]]
    replicas: Sequence[Mapping[str, Any]]
    signals: Mapping[str, float]


class ServerState(NamedTuple):
    """What the engine's stats don't say.

    ready: whether the engine takes requests. It is shown as down all the same if it has given no stats. restarts: starts of the
    engine after the first. jobs: how many jobs are in each status, of those that have not ended. fleet: of an ingress.
    """

    ready: bool
    restarts: int = 0
    jobs: Mapping[str, int] = {}
    fleet: FleetState | None = None


class _Snapshot(Collector):
    """Metric families that are known already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self.families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self.families


class ServerMetrics:
    """The server's metrics."""

    def __init__(
        self, config: ServerConfig, model_name: str, objectives: Callable[[], Slo], *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """model_name: the base model's, which labels all metrics. objectives: gives those that the engine has at present for
        requests that set none. clock: gives seconds, as the engine's clock does."""
        self.config, self.model_name, self.objectives, self.clock = config, model_name, objectives, clock
        self.started_s = clock()
        self.registry = CollectorRegistry()
        labels = (model_name, "0")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"coserve_{name}", text, (*LABELS, *more), registry=self.registry)

        self.histograms = {
            name: Histogram(f"coserve_{name}", text, LABELS, buckets=buckets, registry=self.registry).labels(*labels)
            for name, text, buckets in _HISTOGRAMS
        }
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests that got a first token.").labels(*labels)
        self.cached_tokens = counter("prompt_tokens_cached", "Those of them that the prefix cache had.").labels(*labels)
        self.generation_tokens = counter("generation_tokens", "Tokens given to requests.").labels(*labels)
        received = counter("requests_received", "Requests handed to the engine.", "target")
        self.received = {target: received.labels(*labels, target) for target in ("base", "adapter")}
        ended = counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self.ended = {reason: ended.labels(*labels, reason) for reason in END_REASONS}
        self._rejections = counter("admission_rejections", "Requests refused, by reason.", "reason")
        judged = counter("slo_requests", "Requests held against an objective.", "objective", "met")
        self._judged = {(name, met): judged.labels(*labels, name, str(met).lower())
                        for name in ("ttft", "tpot", "both") for met in (True, False)}
        jobs = counter("finetune_jobs_ended", "Finetuning jobs that ended.", "status")
        self._jobs = {status: jobs.labels(*labels, status) for status in ("succeeded", "failed", "cancelled")}
        self.ttft_s, self.tpot_s, self.arrivals = Window(WINDOW_S), Window(WINDOW_S), Window(WINDOW_S)
        self.met = {name: Window(WINDOW_S) for name in ("ttft", "tpot", "both")}
        self._counters = Counters(WINDOW_S)

    def begin(
        self, *, model: str, prompt_tokens: int, sampling: SamplingConfig, arrival_s: float,
        ttft_ms: SloMs | None = None, tpot_ms: SloMs | None = None,
    ) -> RequestMeter:
        """A request goes to the engine. arrival_s: by this object's clock. ttft_ms, tpot_ms: None is the server's objective."""
        is_base = model in (self.model_name, *self.config.served_model_name)
        self.received["base" if is_base else "adapter"].inc()
        self.histograms["request_params_n"].observe(sampling.n)
        self.histograms["request_params_max_tokens"].observe(sampling.max_tokens)
        self.arrivals.add(arrival_s, 1.0)
        return RequestMeter(self, prompt_tokens, arrival_s, asked_slo(tpot_ms, ttft_ms, self.objectives()))

    def rejected(self, reason: str) -> None:
        """A request was refused. reason: one of a few words, since it becomes a label."""
        self._rejections.labels(self.model_name, "0", reason).inc()

    def on_job(self, message: JobHappened | JobEnded) -> None:
        """Counts a job that has ended; a listener for EngineClient.on_job."""
        if isinstance(message, JobEnded):
            self._jobs[message.status].inc()

    def judge(self, objectives: Slo, time_s: float, ttft_s: float | None, tpot_s: float | None, failed: bool) -> None:
        """Counts whether a request that ended has met its objectives. A request that failed has missed them all. One with a
        single token has no tpot_s, and can't miss that objective. Best effort is neither met nor missed."""
        met = {}
        if objectives.ttft_s < math.inf:
            met["ttft"] = not failed and ttft_s is not None and ttft_s <= objectives.ttft_s
        if objectives.tpot_s < math.inf:
            met["tpot"] = not failed and (tpot_s is None or tpot_s <= objectives.tpot_s)
        if met:
            met["both"] = all(met.values())
        for name, value in met.items():
            self._judged[name, value].inc()
            self.met[name].add(time_s, float(value))

    def expose(self, stats: Mapping[str, Any] | None, state: ServerState | None = None) -> bytes:
        """All metrics as Prometheus text. stats: what EngineClient.stats() gave; None while the engine is down."""
        self._sample(stats)
        state = state or ServerState(ready=stats is not None)
        now, labels = self.clock(), {"model_name": self.model_name, "engine": "0"}
        attainment = {name: window.mean(now) for name, window in self.met.items()}
        families = [
            *self.registry.collect(),
            *server_families(
                labels, self.objectives(), attainment, state.ready and stats is not None, state.restarts, state.jobs
            ),
        ]
        if state.fleet is None:
            families += engine_families(labels, stats or {}, self._share())
        else:
            families += fleet_families(labels, state.fleet.engines, state.fleet.replicas, state.fleet.signals, self._share())
        if self.config.vllm_metrics:
            families += vllm_aliases(families)
        return generate_latest(_Snapshot(families))

    def live(self, stats: Mapping[str, Any] | None, state: ServerState | None = None) -> dict[str, Any]:
        """What the web page shows.

        Latencies are in milliseconds, of the last minute, with the number of values. Rates and finetuning's share are of the
        last RATE_S seconds. None stands where nothing was measured, and for an objective of best effort.
        """
        self._sample(stats)
        state = state or ServerState(ready=stats is not None)
        known, now = stats or {}, self.clock()
        pool = known.get("memory", {})
        blocks = {f"{name}_blocks": int(pool.get(name, 0)) for name in ("used", "cached", "free", "arena")}
        tpot_ms, ttft_ms = self.objectives().in_ms
        return {
            "objectives": {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms},
            "window_s": WINDOW_S,
            "inference": {
                "tokens_per_s": self._rate("inference_tokens"), "prompt_tokens_per_s": self._rate("prompt_tokens"),
                "running": int(known.get("running", 0)), "waiting": int(known.get("waiting", 0)),
                "ttft_ms": _percentiles_ms(self.ttft_s, now), "tpot_ms": _percentiles_ms(self.tpot_s, now),
                "attainment": self.met["both"].mean(now), "judged": len(self.met["both"].values(now)),
                "requests_last_minute": len(self.arrivals.values(now)),
            },
            "finetuning": {
                "tokens_per_s": self._rate("finetune_tokens"), "share": self._share(RATE_S), "jobs": int(known.get("jobs", 0)),
                "jobs_by_status": dict(state.jobs),
            },
            "memory": {**blocks, "num_blocks": sum(blocks.values()), "block_bytes": int(pool.get("block_bytes", 0))},
            "engine": {
                "ready": state.ready and stats is not None, "restarts": state.restarts,
                "policy": self.config.policy, "model": self.model_name, "uptime_s": now - self.started_s,
            },
            "prediction_errors": known.get("prediction_errors", {}),
            "replicas": [] if state.fleet is None else [
                {**replica, **_brief(state.fleet.engines.get(replica["id"], {}))} for replica in state.fleet.replicas
            ],
            "signals": {} if state.fleet is None else dict(state.fleet.signals),
        }

    def _sample(self, stats: Mapping[str, Any] | None) -> None:
        if stats is None:
            self._counters.clear()
        else:
            self._counters.add(stats["time_s"], {name: float(stats[name]) for name in COUNTERS if name in stats})

    def _rate(self, name: str) -> float | None:
        risen = self._counters.rises(RATE_S)
        return None if risen is None else risen[1].get(name, 0.0) / risen[0]

    def _share(self, span_s: float = WINDOW_S) -> float | None:
        """Finetuning's share of the time in which the engine worked, in the last `span_s` seconds; 0 if it did not work."""
        risen = self._counters.rises(span_s)
        if risen is None:
            return None
        busy = risen[1].get("busy_s", 0.0)
        return risen[1].get("finetune_busy_s", 0.0) / busy if busy > 0 else 0.0


def _brief(stats: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of one replica's figures; None stands for what isn't known."""
    pool = stats.get("memory", {})
    blocks = sum(int(pool.get(name, 0)) for name in ("used", "cached", "free"))
    counts = {name: stats.get(name) for name in ("running", "waiting", "jobs", "inference_tokens", "finetune_tokens")}
    return {**counts, "kv_used": pool["used"] / blocks if blocks else None}


def _percentiles_ms(window: Window, now_s: float) -> dict[str, float | None]:
    values = window.values(now_s)
    p50, p99 = (percentile(values, share) * 1e3 if values else None for share in (0.5, 0.99))
    return {"count": len(values), "p50": p50, "p99": p99}


@dataclass(slots=True)
class _Output:
    """One of a request's outputs so far: the times of its first and last token, and how many tokens it has."""

    first_s: float
    last_s: float
    num_tokens: int

    @property
    def tpot_s(self) -> float | None:
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


class RequestMeter:
    """Follows one request to its end."""

    def __init__(self, metrics: ServerMetrics, prompt_tokens: int, arrival_s: float, objectives: Slo) -> None:
        self._metrics, self._prompt_tokens, self._arrival_s, self._objectives = metrics, prompt_tokens, arrival_s, objectives
        self._begun_s: float | None = None
        self._outputs: dict[int, _Output] = {}
        self._ended = False

    def tokens(self, message: Tokens) -> None:
        """Measures a chunk; chunks come in order. One without tokens counts nothing, except the prompt's tokens where only the
        prompt was wanted."""
        metrics, count = self._metrics, len(message.token_ids)
        if self._ended:
            return
        only_prompt = message.finish_reason == "length" and message.begun_s is not None
        if not self._outputs and (count or only_prompt):
            metrics.prompt_tokens.inc(self._prompt_tokens)
            metrics.cached_tokens.inc(message.cached_tokens)
        if not count:
            return
        first_s = message.time_s if message.first_s is None else message.first_s
        if not self._outputs:
            ttft_s = first_s - self._arrival_s
            metrics.histograms["time_to_first_token_seconds"].observe(ttft_s)
            metrics.ttft_s.add(first_s, ttft_s)
            self._begun_s = message.begun_s
            if message.begun_s is not None:
                metrics.histograms["request_queue_time_seconds"].observe(message.begun_s - self._arrival_s)
                metrics.histograms["request_prefill_time_seconds"].observe(first_s - message.begun_s)
        metrics.generation_tokens.inc(count)
        output = self._outputs.get(message.index)
        if output is None:
            self._outputs[message.index] = _Output(first_s, message.time_s, count)
            return
        metrics.histograms["inter_token_latency_seconds"].observe(first_s - output.last_s)
        output.last_s = message.time_s
        output.num_tokens += count

    def end(self, reason: str) -> None:
        """The request is over, for one of END_REASONS. Later calls change nothing."""
        if self._ended:
            return
        self._ended = True
        metrics, outputs = self._metrics, list(self._outputs.values())
        metrics.ended[reason].inc()
        now = metrics.clock()
        ttft_s = min(output.first_s for output in outputs) - self._arrival_s if outputs else None
        tpots_s = [output.tpot_s for output in outputs if output.tpot_s is not None]
        for tpot_s in tpots_s:
            metrics.histograms["request_time_per_output_token_seconds"].observe(tpot_s)
            metrics.tpot_s.add(now, tpot_s)
        wanted = bool(outputs) or reason != "length"  # a prompt that is only scored has no token to be in time
        if reason != "cancelled" and wanted:  # the caller's choice says nothing about the server
            metrics.judge(self._objectives, now, ttft_s, max(tpots_s, default=None), failed=reason == "error")
        self._observe_sizes(outputs, reason)

    def _observe_sizes(self, outputs: list[_Output], reason: str) -> None:
        if not outputs or reason == "error":
            return
        histograms, last_s = self._metrics.histograms, max(output.last_s for output in outputs)
        counts = [output.num_tokens for output in outputs]
        histograms["e2e_request_latency_seconds"].observe(last_s - self._arrival_s)
        histograms["request_decode_time_seconds"].observe(last_s - min(output.first_s for output in outputs))
        if self._begun_s is not None:
            histograms["request_inference_time_seconds"].observe(last_s - self._begun_s)
        histograms["request_prompt_tokens"].observe(self._prompt_tokens)
        histograms["request_generation_tokens"].observe(sum(counts))
        histograms["request_max_num_generation_tokens"].observe(max(counts))
