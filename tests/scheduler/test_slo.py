"""Objectives from a machine's profile, best effort in settings, and what either is called in words and in JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coserve.bench.sharing import SharingConfig
from coserve.config.settings import SamplingConfig, SchedulerConfig
from coserve.core import ConfigError, Slo
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.slo import LEAST, describe_slo, profile_slo
from coserve.server.link.messages import Generate, decode_to_engine, encode
from coserve.server.link.setup import EngineSetup, read_setup, write_setup
from coserve.server.settings import ServerConfig, read_settings
from tests.checked_engine import CheckedEngine
from tests.fake_machine import law

NONE = math.inf
WRONG: tuple[Any, ...] = (
    0, -1, 0.0, -5.5, math.inf, -math.inf, math.nan, True, False, "None", "inf", "fast", "", [1], {}, 1 << 70,
)


def test_objectives_follow_from_eight_typical_requests() -> None:
    """law: 10 ms a pass and 1 ms for each row after the first, so that 8 rows take 17 ms and 520 rows 529 ms."""
    found = profile_slo(law())
    assert found == Slo(tpot_s=0.026, ttft_s=4.3)  # 1.5 x 17 = 25.5 ms and 8 x 529 = 4232 ms, rounded up


def test_a_stall_while_a_large_pass_was_measured_does_not_count() -> None:
    """Prompts come in chunks of 128 or 64 then, at 1 ms a row and 17 ms for each pass with its decode rows."""
    model = law()
    stalled = {name: (20 if name[1] == "rows" and name[2] >= 256 else 1) * value for name, value in model.coefficients.items()}
    assert profile_slo(LatencyModel(stalled)) == Slo(tpot_s=0.026, ttft_s=4.7)  # 8 x 4 x (17 + 128) = 4640 ms


@pytest.mark.parametrize(("factor", "expected"), [
    (1.0, (0.026, 4.3)), (10.0, (0.26, 43)), (100.0, (2.6, 430)), (0.4, (0.011, 1.7)), (0.1, LEAST), (0.0, LEAST),
])
def test_a_slower_machine_promises_less_and_a_fast_one_no_more_than_is_of_use(
    factor: float, expected: tuple[float, float]
) -> None:
    model = law()
    assert profile_slo(LatencyModel({name: factor * value for name, value in model.coefficients.items()})) == expected


def test_two_digits_are_kept_where_they_are_exact() -> None:
    for milliseconds in range(10, 100):
        model = LatencyModel({("iteration", "once", 0): milliseconds / 1.5e3})
        assert profile_slo(model).tpot_s == milliseconds / 1e3


def test_settings_go_before_the_profile() -> None:
    def default(**settings: Any) -> Slo:
        return CheckedEngine(SchedulerConfig(**settings), law()).scheduler.slo

    assert default() == (0.026, 4.3)
    assert default(tpot_ms=60) == (0.06, 4.3)
    assert default(ttft_ms=0.5) == (0.026, 0.0005)
    assert default(tpot_ms="none") == (NONE, 4.3)
    assert default(tpot_ms="none", ttft_ms="none") == (NONE, NONE)


@pytest.mark.parametrize(("objectives", "given", "text"), [
    ((0.085, 3.2), (None, None), "85 ms per token, 3.2 s to the first (from this machine's profile; set A, B)"),
    ((0.085, 3.2), (85, None), "85 ms per token, 3.2 s to the first (from this machine's profile; set B)"),
    ((0.085, 3.2), (None, 3200), "85 ms per token (from this machine's profile; set A), 3.2 s to the first"),
    ((1.4, 0.25), (1400, 250), "1.4 s per token, 250 ms to the first"),
    ((NONE, 3.2), ("none", 3200), "best effort per token, 3.2 s to the first"),
    ((0.0125, NONE), (12.5, "none"), "12.5 ms per token, best effort to the first"),
    ((NONE, NONE), ("none", "none"), "best effort"),
])
def test_objectives_in_words(objectives: tuple[float, float], given: tuple[Any, Any], text: str) -> None:
    assert describe_slo(Slo(*objectives), given, ("A", "B")) == text


def test_words_without_the_settings_names() -> None:
    text = "85 ms per token, 3 s to the first (from this machine's profile)"
    assert describe_slo(Slo(0.085, 3.0), (None, None)) == text


def test_json_has_no_infinity() -> None:
    assert Slo(NONE, NONE).in_ms == (None, None)
    assert json.dumps(Slo(0.07, 0.57).in_ms) == "[70.0, 570.0]"


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_an_objective_is_a_positive_number_or_none(value: Any) -> None:
    said = 'must be a positive number of milliseconds or "none"'
    for name in ("tpot_ms", "ttft_ms"):
        with pytest.raises(ConfigError, match=f"^{name}: {said}") as caught:
            SchedulerConfig(**{name: value})
        assert caught.value.param == name
        with pytest.raises(ConfigError, match=f"^slo_{name}: {said}") as caught:
            read_settings(None, {f"slo_{name}": value})
        assert caught.value.param == f"slo_{name}"


def test_a_server_is_told_by_text_or_by_toml(tmp_path: Path) -> None:
    assert read_settings(None, {}).slo_tpot_ms is None
    given = read_settings(None, {"slo_tpot_ms": "62.5", "slo_ttft_ms": "none"})
    assert (given.slo_tpot_ms, given.slo_ttft_ms) == (62.5, "none")
    file = tmp_path / "server.toml"
    file.write_text('slo-tpot-ms = "none"\nslo-ttft-ms = 900\n')
    read = read_settings(file, {})
    assert (read.slo_tpot_ms, read.slo_ttft_ms) == ("none", 900)
    scheduler = read.engine_config(1 << 30).scheduler
    assert (scheduler.tpot_ms, scheduler.ttft_ms) == ("none", 900)


@pytest.mark.parametrize("value", [None, "none", 60, 0.25])
def test_best_effort_reaches_the_engine_s_process(value: Any) -> None:
    config = ServerConfig(slo_tpot_ms=value)
    line = write_setup(EngineSetup(address="a", config=config))
    assert b"nfinity" not in line and read_setup(line).config.slo_tpot_ms == value
    asked = Generate(id="r", prompt_ids=[1], sampling=SamplingConfig(), arrival_s=0.0, tpot_ms=value)
    assert decode_to_engine(encode(asked)) == asked
    with pytest.raises(msgspec.ValidationError):
        decode_to_engine(encode(msgspec.structs.replace(asked, ttft_ms="never")))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_a_benchmark_of_sharing_needs_objectives(value: float) -> None:
    for name in ("tpot_ms", "ttft_ms"):
        with pytest.raises(ConfigError, match=f"^{name}: "):
            replace(SharingConfig(), **{name: value})
