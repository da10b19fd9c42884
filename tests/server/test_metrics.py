"""What requests measure, what Prometheus reads, what the page shows; with a clock in the test's hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coserve.config.settings import SamplingConfig
from coserve.core import Slo, percentile
from coserve.server.link.messages import JobEnded, Tokens, merge_tokens
from coserve.server.settings import ServerConfig
from coserve.server.stats.enginemetrics import COUNTERS
from coserve.server.stats.livestats import Counters, Window
from coserve.server.stats.metrics import RequestMeter, ServerMetrics, ServerState

DASHBOARD = Path(__file__).resolve().parents[2] / "docs" / "grafana.json"


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Room:
    """Metrics of a server with objectives of 500 ms and 100 ms."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Clock()
        self.objectives = Slo(tpot_s=0.1, ttft_s=0.5)
        self.metrics = ServerMetrics(ServerConfig(**settings), "tiny", lambda: self.objectives, clock=self.clock)

    def begin(
        self, prompt_tokens: int = 7, model: str = "tiny", own: Mapping[str, Any] = MappingProxyType({}), **params: Any
    ) -> RequestMeter:
        """own: the request's own objectives."""
        return self.metrics.begin(
            model=model, prompt_tokens=prompt_tokens, sampling=SamplingConfig(**params), arrival_s=self.clock.now, **own
        )

    def serve(self, times_s: list[float], reason: str = "stop") -> None:
        """A request whose tokens come so long after its arrival."""
        meter = self.begin()
        start = self.clock.now
        for time_s in times_s:
            self.clock.now = start + time_s
            meter.tokens(tokens(self.clock.now))
        meter.end(reason)

    def samples(self, stats: dict[str, Any] | None = None, state: ServerState | None = None) -> dict[str, float]:
        """{'name' or 'name{label="value",...}': value}, without the labels that every metric has."""
        found = {}
        for family in text_string_to_metric_families(self.metrics.expose(stats, state).decode()):
            for sample in family.samples:
                own = {key: value for key, value in sample.labels.items() if key not in ("model_name", "engine")}
                found[sample.name + (json.dumps(own, sort_keys=True) if own else "")] = sample.value
        return found


def tokens(time_s: float, *, index: int = 0, count: int = 1, cached: int = 0, begun_s: float | None = None) -> Tokens:
    return Tokens(
        id="r", index=index, text="x" * count, token_ids=[1] * count, time_s=time_s, cached_tokens=cached, begun_s=begun_s
    )


def stats(time_s: float, **values: Any) -> dict[str, Any]:
    """As EngineClient.stats()."""
    return {
        **dict.fromkeys(COUNTERS, 0.0), "time_s": time_s, "running": 2, "waiting": 3, "jobs": 1, "reserve": 0.1,
        "adapters": ["a", "b"], "adapter_versions": 4,
        "unit_shapes": [{"direction": "backward", "layers": 4, "rows": 512, "count": 7}],
        "prediction_errors": {"decode": {"iterations": 50, "median": 0.04, "p95": 0.2}},
        "memory": {"used": 30, "cached": 10, "free": 20, "arena": 40, "hits_tokens": 64, "queried_tokens": 256,
                   "block_bytes": 4096},
        **values,
    }


# --- requests ---


def test_latencies_are_counted_from_the_arrival_and_pooled() -> None:
    room = Room()
    room.serve([0.3, 0.35, 0.45])
    found = room.samples()
    assert found["coserve_time_to_first_token_seconds_sum"] == pytest.approx(0.3)
    assert found["coserve_inter_token_latency_seconds_count"] == 2
    assert found["coserve_inter_token_latency_seconds_sum"] == pytest.approx(0.15)
    assert found["coserve_request_time_per_output_token_seconds_sum"] == pytest.approx(0.075)
    assert found["coserve_e2e_request_latency_seconds_sum"] == pytest.approx(0.45)
    assert found["coserve_request_decode_time_seconds_sum"] == pytest.approx(0.15)
    assert found["coserve_prompt_tokens_total"] == 7
    assert found["coserve_generation_tokens_total"] == 3
    assert found['coserve_request_success_total{"finished_reason": "stop"}'] == 1


def test_a_prompt_that_is_only_scored_has_its_tokens_counted_and_misses_no_objective() -> None:
    room = Room()
    meter = room.begin(max_tokens=0, n=2)
    room.clock.now += 100
    first = tokens(room.clock.now, count=0, cached=3, begun_s=room.clock.now - 1)
    meter.tokens(msgspec.structs.replace(first, finish_reason="length"))
    meter.tokens(msgspec.structs.replace(tokens(room.clock.now, index=1, count=0), finish_reason="length"))
    meter.end("length")
    found = room.samples()
    assert (found["coserve_prompt_tokens_total"], found["coserve_generation_tokens_total"]) == (7, 0)
    assert found['coserve_request_success_total{"finished_reason": "length"}'] == 1
    assert room.metrics.met["both"].mean(room.clock.now) is None


@pytest.mark.parametrize("begun_s", [0.12, None])
def test_the_parts_of_a_latency(begun_s: float | None) -> None:
    room = Room(vllm_metrics=True)
    meter, start = room.begin(), room.clock.now
    meter.tokens(tokens(start + 0.3, begun_s=None if begun_s is None else start + begun_s))
    meter.tokens(tokens(start + 0.45))
    meter.end("stop")
    found = room.samples()
    for prefix in ("coserve_", "vllm:"):
        for part, seconds in (("queue", 0.12), ("prefill", 0.18), ("inference", 0.33)):
            name = f"{prefix}request_{part}_time_seconds"
            assert found[f"{name}_count"] == (begun_s is not None)
            assert found[f"{name}_sum"] == pytest.approx(0.0 if begun_s is None else seconds)


def test_gaps_are_per_output_when_there_are_several() -> None:
    room = Room()
    meter = room.begin(n=2)
    start = room.clock.now
    for time_s, index in ((0.1, 0), (0.2, 1), (0.3, 0), (0.5, 1)):
        meter.tokens(tokens(start + time_s, index=index))
    meter.end("length")
    found = room.samples()
    assert found["coserve_time_to_first_token_seconds_count"] == 1
    assert found["coserve_time_to_first_token_seconds_sum"] == pytest.approx(0.1)
    assert found["coserve_inter_token_latency_seconds_sum"] == pytest.approx(0.2 + 0.3)
    assert found["coserve_request_time_per_output_token_seconds_count"] == 2
    assert found["coserve_request_params_n_sum"] == 2
    assert found["coserve_prompt_tokens_total"] == 7, "the prompt is computed once"


def test_a_chunk_of_several_tokens_is_one_gap_and_several_tokens() -> None:
    room = Room()
    meter = room.begin()
    start = room.clock.now
    meter.tokens(tokens(start + 0.1, cached=5))
    meter.tokens(tokens(start + 0.4, count=3))
    meter.end("stop")
    found = room.samples()
    assert found["coserve_inter_token_latency_seconds_count"] == 1
    assert found["coserve_request_time_per_output_token_seconds_sum"] == pytest.approx(0.1)
    assert found["coserve_prompt_tokens_cached_total"] == 5


def test_chunks_that_were_merged_are_measured_from_their_first_to_their_last_token() -> None:
    """While the API process is behind, it hears many tokens at once."""
    times_s = [0.3, 0.5, 0.7, 0.9, 1.1]
    apart, together = Room(), Room()
    for room, parts in ((apart, [[time_s] for time_s in times_s]), (together, [times_s[:3], times_s[3:]])):
        meter = room.begin()
        for part in parts:
            chunks = [tokens(1000 + time_s, begun_s=1000.1 if time_s == times_s[0] else None) for time_s in part]
            half = len(chunks) // 2
            meter.tokens(merge_tokens([merge_tokens(chunks[:half]), *chunks[half:]] if half else chunks))
        meter.end("stop")
    for name in (
        "time_to_first_token", "request_time_per_output_token", "request_prefill_time", "request_decode_time",
        "e2e_request_latency",
    ):
        name = f"coserve_{name}_seconds_sum"
        assert together.samples()[name] == pytest.approx(apart.samples()[name]), name
    name = 'coserve_slo_requests_total{"met": "false", "objective": "tpot"}'
    assert together.samples()[name] == apart.samples()[name] == 1, "200 ms per token, of 100"


def test_a_request_is_held_against_its_own_objectives() -> None:
    room = Room()
    meter = room.metrics.begin(
        model="tiny", prompt_tokens=7, sampling=SamplingConfig(), arrival_s=room.clock.now, ttft_ms=50, tpot_ms=1000
    )
    for delay in (0.1, 0.5):
        meter.tokens(tokens(room.clock.now + delay))
    meter.end("stop")
    found = room.samples()
    assert found['coserve_slo_requests_total{"met": "false", "objective": "ttft"}'] == 1, "100 ms meet the server's alone"
    assert found['coserve_slo_requests_total{"met": "true", "objective": "tpot"}'] == 1, "400 ms miss the server's"


def test_units_are_counted_by_shape() -> None:
    room = Room()
    labels = json.dumps({"direction": "backward", "layers": "4", "rows": "512"}, sort_keys=True)
    assert room.samples(stats(1.0))[f"coserve_finetune_units_total{labels}"] == 7


def test_end_counts_once_and_nothing_is_measured_after_it() -> None:
    room = Room()
    meter = room.begin()
    meter.tokens(tokens(room.clock.now + 0.1))
    meter.end("stop")
    meter.end("error")
    meter.tokens(tokens(room.clock.now + 0.2))
    found = room.samples()
    assert found['coserve_request_success_total{"finished_reason": "error"}'] == 0
    assert found["coserve_generation_tokens_total"] == 1


def test_a_request_that_got_nothing_measures_no_latency() -> None:
    room = Room()
    meter = room.begin()
    meter.tokens(Tokens(id="r", index=0, text="", token_ids=[], time_s=room.clock.now, finish_reason="cancelled"))
    meter.end("cancelled")
    found = room.samples()
    assert found["coserve_time_to_first_token_seconds_count"] == 0
    assert found["coserve_e2e_request_latency_seconds_count"] == 0
    assert found["coserve_prompt_tokens_total"] == 0
    assert found['coserve_request_success_total{"finished_reason": "cancelled"}'] == 1


def test_names_of_models_are_no_labels() -> None:
    room = Room(served_model_name=("tiny", "alias"))
    for model in ("tiny", "alias", "secret-adapter"):
        room.begin(model=model).end("error")
    found = room.samples()
    assert found['coserve_requests_received_total{"target": "base"}'] == 2
    assert found['coserve_requests_received_total{"target": "adapter"}'] == 1
    assert b"secret-adapter" not in room.metrics.expose(stats(1.0, adapters=["tenant/secret-adapter"]))


# --- objectives ---


def test_attainment_is_the_share_that_met_both_objectives() -> None:
    room = Room()
    room.serve([0.2, 0.25, 0.3])  # met
    room.serve([0.6, 0.65])  # late first token
    room.serve([0.2, 0.5])  # slow tokens
    room.serve([0.4])  # a single token can't be slow
    found = room.samples()
    assert found['coserve_slo_attainment{"objective": "ttft"}'] == 0.75
    assert found['coserve_slo_attainment{"objective": "tpot"}'] == 0.75
    assert found['coserve_slo_attainment{"objective": "both"}'] == 0.5
    assert found['coserve_slo_requests_total{"met": "true", "objective": "both"}'] == 2
    assert room.metrics.live(None)["inference"]["attainment"] == 0.5


def test_exactly_the_objective_is_met_and_an_error_is_missed_and_a_cancellation_is_nothing() -> None:
    room = Room()
    room.metrics.judge(room.objectives, room.clock.now, 0.5, 0.1, failed=False)
    room.begin().end("error")
    room.begin().end("cancelled")
    found = room.samples()
    assert found['coserve_slo_requests_total{"met": "true", "objective": "both"}'] == 1
    assert found['coserve_slo_requests_total{"met": "false", "objective": "both"}'] == 1


def test_the_slowest_of_several_outputs_is_held_against_the_objective() -> None:
    room = Room()
    meter = room.begin(n=2)
    start = room.clock.now
    for time_s, index in ((0.1, 0), (0.1, 1), (0.15, 0), (0.5, 1)):
        meter.tokens(tokens(start + time_s, index=index))
    meter.end("stop")
    assert room.samples()['coserve_slo_attainment{"objective": "tpot"}'] == 0


@pytest.mark.parametrize("of", ["server", "request"])
def test_best_effort_neither_meets_nor_misses_an_objective(of: str) -> None:
    room = Room()
    own: dict[str, Any] = {}
    if of == "server":
        room.objectives = Slo(tpot_s=math.inf, ttft_s=math.inf)
    else:
        own = {"tpot_ms": "none", "ttft_ms": "none"}
    for reason in ("stop", "error"):
        meter = room.begin(own=own)
        meter.tokens(tokens(room.clock.now + 9))
        meter.tokens(tokens(room.clock.now + 19))
        meter.end(reason)
    found = room.samples()
    assert not any(value for name, value in found.items() if name.startswith("coserve_slo_requests_total"))
    assert not [name for name in found if name.startswith("coserve_slo_attainment")]
    assert found["coserve_request_time_per_output_token_seconds_sum"] == pytest.approx(20), "but it is measured"
    live = room.metrics.live(None)
    assert live["inference"]["attainment"] is None and live["inference"]["judged"] == 0
    assert live["objectives"] == ({"tpot_ms": None, "ttft_ms": None} if of == "server" else {"tpot_ms": 100, "ttft_ms": 500})
    shown = [name for name in found if name.startswith("coserve_slo_objective_seconds")]
    assert len(shown) == (0 if of == "server" else 2), "an objective that there isn't is absent"
    json.dumps(live, allow_nan=False)


def test_a_request_with_one_objective_is_held_against_that_one() -> None:
    room = Room()
    for late, tpot_ms, ttft_ms in ((0.2, "none", None), (0.9, "none", None), (9.0, None, "none")):
        meter = room.begin(own={"tpot_ms": tpot_ms, "ttft_ms": ttft_ms})
        meter.tokens(tokens(room.clock.now + late))
        meter.tokens(tokens(room.clock.now + late + 0.05))
        meter.end("stop")
    found = room.samples()
    counts = {name: [found[f'coserve_slo_requests_total{{"met": "{met}", "objective": "{name}"}}'] for met in ("true", "false")]
              for name in ("ttft", "tpot", "both")}
    assert counts == {"ttft": [1, 1], "tpot": [1, 0], "both": [2, 1]}


def test_objectives_are_those_of_the_present_engine() -> None:
    room = Room()
    assert room.samples()['coserve_slo_objective_seconds{"objective": "tpot"}'] == 0.1
    room.objectives = Slo(tpot_s=0.25, ttft_s=math.inf)
    found = room.samples()
    assert found['coserve_slo_objective_seconds{"objective": "tpot"}'] == 0.25
    assert 'coserve_slo_objective_seconds{"objective": "ttft"}' not in found
    room.serve([0.1, 0.3])
    assert room.samples()['coserve_slo_requests_total{"met": "true", "objective": "both"}'] == 1


def test_attainment_forgets_after_a_minute_and_is_absent_without_requests() -> None:
    room = Room()
    room.serve([0.6])
    room.clock.now += 61
    assert not [name for name in room.samples() if name.startswith("coserve_slo_attainment")]
    live = room.metrics.live(None)["inference"]
    assert live["attainment"] is None and live["ttft_ms"]["p99"] is None and live["requests_last_minute"] == 0


# --- the engine ---


def test_engine_figures_become_metrics() -> None:
    room = Room()
    found = room.samples(stats(5.0, finetune_tokens=640.0, preemptions=3), ServerState(True, 2, {"running": 1, "paused": 2}))
    assert found["coserve_engine_up"] == 1
    assert found["coserve_engine_restarts_total"] == 2
    assert found['coserve_finetune_jobs{"status": "paused"}'] == 2
    assert found['coserve_finetune_jobs{"status": "queued"}'] == 0
    assert found["coserve_finetune_tokens_total"] == 640
    assert found["coserve_num_preemptions_total"] == 3
    assert found["coserve_num_requests_running"] == 2
    assert found["coserve_adapters_loaded"] == 2
    assert found["coserve_kv_cache_usage_perc"] == pytest.approx(30 / 60), "blocks in arenas are not the cache's"
    assert found['coserve_kv_blocks{"state": "arena"}'] == 40
    assert found["coserve_prefix_cache_hits_total"] == 64
    assert found['coserve_iteration_prediction_error_ratio{"kind": "decode", "quantile": "0.95"}'] == 0.2


def test_metrics_without_an_engine() -> None:
    room = Room()
    room.serve([0.2])
    found = room.samples(None, ServerState(False, 1, {}))
    assert found["coserve_engine_up"] == 0
    assert found["coserve_generation_tokens_total"] == 1
    assert "coserve_num_requests_running" not in found


def test_a_pool_that_training_holds_wholly_is_in_full_use() -> None:
    memory = {"used": 0, "cached": 0, "free": 0, "arena": 8, "hits_tokens": 0, "queried_tokens": 0, "block_bytes": 1}
    assert Room().samples(stats(1.0, memory=memory))["coserve_kv_cache_usage_perc"] == 1


def test_vllm_names_only_on_demand_and_with_its_words() -> None:
    plain = Room()
    plain.serve([0.2])
    assert not [name for name in plain.samples(stats(1.0)) if name.startswith("vllm:")]
    room = Room(vllm_metrics=True)
    room.serve([0.2], reason="cancelled")
    found = room.samples(stats(1.0))
    assert found['vllm:request_success_total{"finished_reason": "abort"}'] == 1
    assert found["vllm:time_to_first_token_seconds_count"] == 1
    assert found["vllm:num_requests_running"] == 2
    assert found["vllm:kv_cache_usage_perc"] == 0.5
    assert not [name for name in found if name.startswith("vllm:finetune")]


def test_ended_jobs_and_rejections_are_counted() -> None:
    room = Room()
    room.metrics.on_job(JobEnded(id="j", status="succeeded", step=4, trained_tokens=10))
    room.metrics.rejected("capacity")
    found = room.samples()
    assert found['coserve_finetune_jobs_ended_total{"status": "succeeded"}'] == 1
    assert found['coserve_admission_rejections_total{"reason": "capacity"}'] == 1


# --- the page's figures ---


def test_rates_are_of_the_last_seconds_however_many_look() -> None:
    room = Room()
    for i in range(41):  # two viewers: 20 times a second between them
        live = room.metrics.live(stats(i * 0.25, inference_tokens=i * 10.0, finetune_tokens=i * 100.0, busy_s=i * 0.2,
                                       finetune_busy_s=i * 0.05))
        again = room.metrics.live(stats(i * 0.25 + 0.01, inference_tokens=i * 10.0, finetune_tokens=i * 100.0, busy_s=i * 0.2,
                                        finetune_busy_s=i * 0.05))
        assert again == live
    assert live["inference"]["tokens_per_s"] == pytest.approx(40)
    assert live["finetuning"]["tokens_per_s"] == pytest.approx(400)
    assert live["finetuning"]["share"] == pytest.approx(0.25)
    assert live["memory"]["num_blocks"] == 100


def test_rates_begin_anew_after_a_restart() -> None:
    room = Room()
    room.metrics.live(stats(1.0, inference_tokens=500.0))
    assert room.metrics.live(stats(2.0, inference_tokens=3.0))["inference"]["tokens_per_s"] is None
    assert room.metrics.live(stats(4.0, inference_tokens=23.0))["inference"]["tokens_per_s"] == pytest.approx(10)
    assert room.metrics.live(None)["inference"]["tokens_per_s"] is None


def test_who_looks_seldom_sees_the_rate_since_the_last_look() -> None:
    room = Room()
    room.metrics.live(stats(10.0))
    assert room.metrics.live(stats(30.0, inference_tokens=100.0))["inference"]["tokens_per_s"] == pytest.approx(5)


def test_live_is_json_with_and_without_an_engine() -> None:
    room = Room()
    room.serve([0.2, 0.3])
    for values in (None, stats(1.0), stats(9.0)):
        live = json.loads(json.dumps(room.metrics.live(values)))
        assert live["objectives"] == {"ttft_ms": 500, "tpot_ms": 100}
        assert live["inference"]["ttft_ms"]["p50"] == pytest.approx(200)
        assert live["engine"]["ready"] is (values is not None)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.51, 0.75, 0.99, 1])
@pytest.mark.parametrize("values", [[7.0], [4.0, 1.0, 3.0, 2.0], [0.1 * i * i for i in range(101)]])
def test_percentile_is_numpys(share: float, values: list[float]) -> None:
    assert percentile(iter(values), share) == pytest.approx(np.percentile(values, 100 * share), rel=1e-12)


def test_windows_forget() -> None:
    window = Window(10)
    for time_s in (1.0, 5.0, 4.9, 12.0):
        window.add(time_s, time_s)
    assert window.values(12.0) == [5.0, 4.9, 12.0]
    assert window.mean(30.0) is None
    counters = Counters(10)
    for time_s in range(40):
        counters.add(float(time_s), {"a": 2.0 * time_s})
    assert counters.rises(100) == (10.0, {"a": 20.0})


# --- the dashboard ---


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    room = Room()
    room.serve([0.2, 0.3])
    room.metrics.rejected("capacity")
    room.metrics.live(stats(1.0))
    names = {name.partition("{")[0] for name in room.samples(stats(9.0))}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {name for panel in panels for target in panel.get("targets", ())
             for name in re.findall(r"coserve_\w+", target["expr"])}
    assert len(asked) > 20
    assert asked - names == set()


def test_the_dashboard_s_panels_don_t_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
