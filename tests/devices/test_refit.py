"""The numbers of a device from points that its law gives, and how a law agrees with points."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace

import pytest

from coserve.core import Contents, PassCost, UnitCost
from coserve.devices.law import device_law
from coserve.devices.refit import ALL, FITTED, Agreement, agreement, mean_points, refit
from coserve.devices.table import DEVICES, device_text, find_device
from coserve.model.architecture import Architecture
from coserve.profiling.fit import profile_points
from coserve.scheduler.latency import LatencyModel

TRUTH = replace(
    DEVICES["H100"], bandwidth=1.7e12, efficiency=0.31, attention_efficiency=0.45, iteration_s=1e-3, launch_s=6e-3, unit_s=2e-4,
    unit_layer_s=3e-4, overlap=0.6, backward_rows=1.4, backward_pairs=3.3, kept_widths=25.0, update_bytes=60.0,
)


def points_of(arch: Architecture, noise: float) -> dict[Contents, float]:
    law, rng = device_law(arch, TRUTH), random.Random(0)
    return {
        point: law.seconds(point) * rng.uniform(1 - noise, 1 + noise) for point in profile_points(arch.num_layers, 4096)
    }


def test_the_numbers_come_back(archs: Mapping[str, Architecture]) -> None:
    found = refit(points_of(archs["llama-8b"], 0.0), archs["llama-8b"], DEVICES["H100"], itemsize=2)
    assert found.flops == pytest.approx(TRUTH.flops, rel=0.02)
    for name in FITTED:
        if name not in ("peak_flops", "iteration_s", "unit_s", "kept_widths", "update_bytes"):  # too small beside the others
            assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=0.15), name
    assert {name: getattr(found, name) for name in ("name", "memory_bytes", "link", "efficiency")} == {
        "name": "H100", "memory_bytes": 80e9, "link": TRUTH.link, "efficiency": 0.62,
    }


def test_the_launch_of_captured_passes_comes_back(archs: Mapping[str, Architecture]) -> None:
    arch, truth = archs["llama-8b"], replace(TRUTH, captured_launch_s=1.5e-3)
    law = device_law(arch, truth, captured=True)
    points = {point: law.seconds(point) for point in profile_points(arch.num_layers, 4096, gpu_seqs=256)}
    found = refit(points, arch, DEVICES["H100"], itemsize=2, captured=True)
    again = device_law(arch, found, captured=True)
    assert agreement(again, points)[ALL].median < 0.01
    assert again.uncaptured_seconds == pytest.approx(4.5e-3, rel=0.1)


def test_points_that_scatter_are_predicted(archs: Mapping[str, Architecture]) -> None:
    arch, points = archs["llama-8b"], points_of(archs["llama-8b"], 0.05)
    stalled = {point: seconds * (5 if place % 10 == 0 else 1) for place, (point, seconds) in enumerate(points.items())}
    before = agreement(device_law(arch, DEVICES["H100"]), points)[ALL].median
    after = agreement(device_law(arch, refit(stalled, arch, DEVICES["H100"], itemsize=2)), points)[ALL].median
    assert before > 0.4 and after < 0.06


def test_agreement_by_kind() -> None:
    law = LatencyModel({("inference", "once", 0): 1.0, ("backward", "once", 0): 1.0})
    decode, more = (Contents(PassCost(rows, rows, rows, 0, 0, 0, 0, 0, 0), (), 0) for rows in (1, 2))
    back = Contents(None, (UnitCost(True, 1, 1, 1, 0),), 0)
    assert agreement(law, {decode: 2.0, more: 1.0, back: 0.5}) == {
        ALL: (3, 0.5, pytest.approx(0.95), 1.0), "decode": (2, 0.25, pytest.approx(0.475), 0.75),
        "backward": Agreement(1, 1.0, 1.0, 2.0),
    }
    assert mean_points([(decode, 1.0), (back, 3.0), (decode, 2.0)]) == {decode: 1.5, back: 3.0}


def test_a_device_as_text_and_back() -> None:
    rounded = replace(TRUTH, name="custom", efficiency=0.31)
    again = find_device(device_text(rounded))
    assert replace(again, name="custom") == rounded
    assert "name" not in device_text(rounded) and "captured_launch_s" not in device_text(rounded)
