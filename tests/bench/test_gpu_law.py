"""The prediction of bench/gpu_law.py: what launches cost in it, and that few of them are better."""

from __future__ import annotations

from collections.abc import Mapping

import gpu_law
import pytest
from gpu_law import GAP_S, HOST_S, LAUNCH_S, LaunchLaw, LayerLaunches

from coserve.core import Contents, PassCost, UnitCost
from coserve.model.architecture import Architecture

MANY = LayerLaunches(decode=33, prompts=47, fused=75, forward=46, backward=136)
DECODE = PassCost(64, 64, 64, 64 * 350, 0, 0, 0, 0, 0)
FUSED = DECODE._replace(rows=96, fused_rows=32)


@pytest.fixture(scope="module")
def arch() -> Architecture:
    return gpu_law.read_shape(gpu_law.MODEL)


def test_parts_take_the_longer_of_device_and_launches(arch: Architecture) -> None:
    law, layers = LaunchLaw(arch, MANY, hides_host=False), arch.num_layers
    bare = LaunchLaw(arch, LayerLaunches(decode=0, prompts=0, fused=0, forward=0, backward=0), hides_host=False)
    assert law.pass_seconds(DECODE) == pytest.approx(bare.pass_seconds(DECODE) + layers * 33 * GAP_S), "a graph"
    assert law.pass_seconds(FUSED) == pytest.approx(layers * 75 * LAUNCH_S), "launch by launch"
    large = FUSED._replace(rows=2112, fused_rows=2048)
    assert law.pass_seconds(large) == pytest.approx(bare.pass_seconds(large) + layers * 75 * GAP_S)
    unit = UnitCost(True, 64, 4, 0, 0)
    assert law.unit_seconds(unit) == pytest.approx(4 * 136 * LAUNCH_S)
    assert law.unit_seconds(unit._replace(recompute_fraction=0.5)) == pytest.approx(4 * (136 + 23) * LAUNCH_S)


def test_units_hide_the_host(arch: Architecture) -> None:
    before, after = (LaunchLaw(arch, MANY, hides_host=hides) for hides in (False, True))
    unit = UnitCost(True, 2048, 8, 0, 0)
    alone, together = Contents(DECODE, (), 0), Contents(DECODE, (unit,), 0)
    assert before.seconds(alone) == after.seconds(alone) == pytest.approx(before.pass_seconds(DECODE) + HOST_S)
    assert after.seconds(together) == pytest.approx(after.pass_seconds(DECODE) + after.unit_seconds(unit))
    assert before.seconds(together) == pytest.approx(after.seconds(together) + HOST_S)
    assert before.seconds(Contents(None, (unit,), 0)) == before.unit_seconds(unit)


@pytest.mark.full
def test_fewer_launches_train_more() -> None:
    found = gpu_law.run(gpu_law.parser().parse_args(["--seconds", "3"]))
    for name in (gpu_law.ALONE, *gpu_law.POLICIES):
        before, after = (found[side][name]["finetune_tokens_per_s"] for side in ("before", "after"))
        assert 1.02 * before < after
    rows: Mapping[str, list[int]] = {side: found[side]["launch_bound_rows"] for side in found}
    assert rows["before"] > rows["after"]
    assert "| predicted, not measured | before | after |" in gpu_law.table(found, 20.0)
