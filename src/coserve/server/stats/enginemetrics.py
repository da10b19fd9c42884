"""The engine's stats as metric families, and the same families under vLLM's names.

The values are read with each scrape. A counter falls to 0 when the engine restarts, which Prometheus takes into account.

Owns: which figure of Engine.metrics() becomes which metric, and which metrics mean the same as vLLM's of that name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from coserve.core import Slo


class _Row(NamedTuple):
    """A figure of the stats: its key there, its metric's name, and the text that explains the metric."""

    key: str
    name: str
    text: str


_COUNTER_ROWS = (
    _Row("iterations", "iterations", "Iterations of the engine."),
    _Row("inference_tokens", "inference_tokens", "Tokens that the engine sampled."),
    _Row("prompt_tokens", "prefill_tokens", "Prompt tokens that the engine computed."),
    _Row("finetune_tokens", "finetune_tokens", "Finetuning tokens; forward and backward count half each."),
    _Row("busy_s", "busy_seconds", "Time of the device in iterations."),
    _Row("inference_busy_s", "inference_busy_seconds", "Inference's part of it."),
    _Row("finetune_busy_s", "finetune_busy_seconds", "Finetuning's part of it."),
    _Row("host_s", "host_seconds", "Time of the engine's thread that is not waiting for the device."),
    _Row("preemptions", "num_preemptions", "Requests that lost their blocks and were computed again."),
)
COUNTERS = tuple(row.key for row in _COUNTER_ROWS)
"""Keys of those figures that only rise while the engine lives."""
_GAUGE_ROWS = (
    _Row("running", "num_requests_running", "Requests that run."),
    _Row("waiting", "num_requests_waiting", "Requests that wait."),
    _Row("jobs", "finetune_jobs_in_engine", "Finetuning jobs that the engine holds, paused ones too."),
    _Row("reserve", "iteration_time_reserve", "Share of an iteration's time that the scheduler keeps back."),
    _Row("adapter_versions", "adapter_versions", "Adapter versions in memory."),
)
_VLLM = frozenset((
    "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions", "prompt_tokens",
    "prompt_tokens_cached", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits", "request_success",
    "admission_rejections", "time_to_first_token_seconds", "inter_token_latency_seconds",
    "request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
    "request_prefill_time_seconds", "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_max_num_generation_tokens", "request_params_n", "request_params_max_tokens",
))
_SIGNAL_COUNTERS = ("chosen", "refused")
_VLLM_REASONS = {"cancelled": "abort"}

Labels = Mapping[str, str]


def _gauge(name: str, text: str, labels: Labels, values: Mapping[str, float], label: str | None = None) -> Metric:
    """A gauge with one value for each value of `label`; without a label, the only value has the key ''."""
    family = GaugeMetricFamily(f"coserve_{name}", text, labels=[*labels, *([label] if label else [])])
    for key, value in values.items():
        family.add_metric([*labels.values(), *([key] if label else [])], value)
    return family


def _counter(name: str, text: str, labels: Labels, value: float) -> Metric:
    family = CounterMetricFamily(f"coserve_{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def server_families(
    labels: Labels, objectives: Slo, attainment: Mapping[str, float | None], ready: bool, restarts: int,
    jobs: Mapping[str, int],
) -> Iterator[Metric]:
    """Metrics that are known without an engine too."""
    promised = {"tpot": objectives.tpot_s, "ttft": objectives.ttft_s}
    yield _gauge("slo_objective_seconds", "Objectives of requests that set none; absent for best effort.", labels,
                 {name: seconds for name, seconds in promised.items() if seconds < math.inf}, "objective")
    yield _gauge("engine_up", "1 if the engine takes requests.", labels, {"": float(ready)})
    yield _counter("engine_restarts", "Starts of the engine after the first.", labels, restarts)
    statuses = {status: float(jobs.get(status, 0)) for status in ("validating_files", "queued", "running", "paused")}
    yield _gauge("finetune_jobs", "Finetuning jobs that have not ended, by status.", labels, statuses, "status")
    known = {name: value for name, value in attainment.items() if value is not None}
    yield _gauge("slo_attainment", "Share of the last minute's requests that met an objective; absent without requests.",
                 labels, known, "objective")


def engine_families(labels: Labels, stats: Mapping[str, Any], share: float | None) -> Iterator[Metric]:
    """Metrics of the engine's stats. stats: Engine.metrics(), or empty. share: finetuning's share of the last minute."""
    for row in _COUNTER_ROWS:
        if row.key in stats:
            yield _counter(row.name, row.text, labels, stats[row.key])
    for row in _GAUGE_ROWS:
        if row.key in stats:
            yield _gauge(row.name, row.text, labels, {"": stats[row.key]})
    if share is not None:
        yield _gauge("finetune_share", "Finetuning's part of the last minute's time in iterations.", labels, {"": share})
    if "adapters" in stats:
        yield _gauge("adapters_loaded", "Adapters that requests can ask for.", labels, {"": len(stats["adapters"])})
    yield from _prediction_families(labels, stats.get("prediction_errors", {}))
    yield _unit_family(labels, stats.get("unit_shapes", ()))
    if "memory" in stats:
        yield from _memory_families(labels, stats["memory"])


def fleet_families(
    labels: Labels, engines: Mapping[str, Mapping[str, Any]], replicas: Iterable[Mapping[str, Any]],
    signals: Mapping[str, float], share: float | None,
) -> Iterator[Metric]:
    """Metrics of a fleet: those of each engine, labelled with its replica's id, which replicas there are, and what an
    autoscaler may look at. Parameters as the fields of FleetState; share as for `engine_families`."""
    merged: dict[str, Metric] = {}
    for id, stats in engines.items():
        for family in engine_families({**labels, "engine": id}, stats, None):
            known = merged.setdefault(family.name, family)
            if known is not family:
                known.samples += family.samples
    yield from merged.values()
    if share is not None:
        yield _gauge("finetune_share", "Finetuning's part of the last minute's time in iterations, of all engines.", labels,
                     {"": share})
    known_replicas = list(replicas)
    states = {
        "ready": sum(replica["ready"] and not replica["draining"] for replica in known_replicas),
        "draining": sum(bool(replica["draining"]) for replica in known_replicas),
        "lost": sum(bool(replica["lost"]) for replica in known_replicas),
    }
    yield _gauge("replicas", "Replicas that this ingress knows, by state.", labels,
                 {name: float(count) for name, count in states.items()}, "state")
    for name, value in signals.items():
        if name in _SIGNAL_COUNTERS:
            yield _counter(f"fleet_{name}", "Requests that this ingress has sent or refused.", labels, value)
        else:
            shown = f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
            yield _gauge(f"fleet_{shown}", "A signal for autoscaling; see docs/operations.md.", labels, {"": value})


def _prediction_families(labels: Labels, errors: Mapping[str, Mapping[str, float]]) -> Iterator[Metric]:
    names = [*labels, "kind"]
    counts = GaugeMetricFamily("coserve_predicted_iterations", "Iterations that the errors are of, by kind.", labels=names)
    ratios = GaugeMetricFamily("coserve_iteration_prediction_error_ratio",
                               "Predicted against measured iteration time, absolute and relative.",
                               labels=[*names, "quantile"])
    for kind, error in errors.items():
        counts.add_metric([*labels.values(), kind], error["iterations"])
        for quantile, key in (("0.5", "median"), ("0.95", "p95")):
            ratios.add_metric([*labels.values(), kind, quantile], error[key])
    yield counts
    yield ratios


def _unit_family(labels: Labels, shapes: Iterable[Mapping[str, Any]]) -> Metric:
    names = ("direction", "layers", "rows")
    family = CounterMetricFamily("coserve_finetune_units", "Units of finetuning that have run, by direction and size; layers "
                                 "and rows rounded up to a power of two.", labels=[*labels, *names])
    for shape in shapes:
        family.add_metric([*labels.values(), *(str(shape[name]) for name in names)], shape["count"])
    return family


def _memory_families(labels: Labels, memory: Mapping[str, int]) -> Iterator[Metric]:
    blocks = {state: float(memory[state]) for state in ("used", "cached", "free", "arena")}
    yield _gauge("kv_blocks", "Blocks of the pool by state; arena: lent to training.", labels, blocks, "state")
    yield _gauge("kv_block_bytes", "Bytes of a block.", labels, {"": memory["block_bytes"]})
    inference = blocks["used"] + blocks["cached"] + blocks["free"]
    yield _gauge("kv_cache_usage_perc", "Share of the blocks outside training arenas that requests hold, in [0, 1].", labels,
                 {"": blocks["used"] / inference if inference else 1.0})
    yield _counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", labels, memory["queried_tokens"])
    yield _counter("prefix_cache_hits", "Tokens found there.", labels, memory["hits_tokens"])


def vllm_aliases(families: Iterable[Metric]) -> list[Metric]:
    """The families that vLLM has too, under its names and with its words for finished_reason."""
    aliases = []
    for family in families:
        if family.name.removeprefix("coserve_") not in _VLLM:
            continue
        alias = Metric(_vllm(family.name), family.documentation, family.type)
        for sample in family.samples:
            labels = dict(sample.labels)
            if "finished_reason" in labels:
                labels["finished_reason"] = _VLLM_REASONS.get(labels["finished_reason"], labels["finished_reason"])
            alias.samples.append(Sample(_vllm(sample.name), labels, sample.value, sample.timestamp, sample.exemplar))
        aliases.append(alias)
    return aliases


def _vllm(name: str) -> str:
    return f"vllm:{name.removeprefix('coserve_')}"
