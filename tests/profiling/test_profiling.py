"""Measuring a machine takes a bounded time: what a fit needs comes first, and what is left out follows from one layer."""

from __future__ import annotations

import pytest
import torch

from coserve.core import Contents, PassCost, UnitCost
from coserve.engine.engine import Engine
from coserve.profiling import measure as profiling
from coserve.profiling.fit import ProfilePoint, fit, needed_points, profile_points, row_layers
from coserve.profiling.measure import Profiler
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.latency import LatencyModel
from tests.tiny_engine import MakeEngine, build_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return build_model(tmp_path_factory.mktemp("profiling") / "model")


class SlowMachine:
    """A clock, and points that take so many seconds per row and layer."""

    def __init__(self, profiler: Profiler, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.seconds, self.layers = 0.0, seconds, profiler.arch.num_layers
        self.ran: list[Contents] = []
        monkeypatch.setattr(profiler, "_run", self.run)
        monkeypatch.setattr(profiling.time, "perf_counter", lambda: self.now)

    def takes(self, point: Contents) -> float:
        return 1e-4 + self.seconds * row_layers(point, self.layers)

    def run(self, point: Contents) -> list[ProfilePoint]:
        taken = self.takes(point)
        self.ran.append(point)
        self.now += taken
        return [(point, taken)]


def profiler_of(engine: Engine) -> Profiler:
    return Profiler(engine.device.passes, engine.device.train, engine.blocks)


@pytest.mark.parametrize("seconds", [1e-6, 1e-3, 1.0])
def test_a_profile_takes_a_bounded_time(
    model: LoadedModel, engines: MakeEngine, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    profiler = profiler_of(engines())
    layers, rows = profiler.arch.num_layers, profiler.arch.max_position_embeddings
    needed, points = (
        [Profiler._without_adapters(point) for point in listed(layers, rows)] for listed in (needed_points, profile_points)
    )
    machine = SlowMachine(profiler, seconds, monkeypatch)
    samples = profiler.measure(2048, limit_s=5.0)
    ran = machine.ran[1:]
    assert ran[: len(needed)] == needed
    sizes = [row_layers(point, layers) for point in ran[len(needed) :]]
    assert sizes == sorted(sizes), "the dearest come last"
    assert machine.now <= max(5.0, sum(machine.takes(point) for point in needed)) + machine.takes(machine.ran[0])
    assert {1e-6: set(ran) == set(points), 1e-3: set(needed) < set(ran) < set(points), 1.0: ran == needed}[seconds]
    assert [contents for contents, _ in samples[: len(ran)]] == ran
    assert all(contents in points and contents not in ran for contents, _ in samples[len(ran) :])


def test_a_gpu_is_profiled_further(model: LoadedModel, engines: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    profiler = profiler_of(engines())
    machine = SlowMachine(profiler, 1e-9, monkeypatch)
    monkeypatch.setattr(profiler, "device", torch.device("cuda"))
    layers, rows = profiler.arch.num_layers, profiler.arch.max_position_embeddings
    profiler.measure(8192, max_seqs=100)
    wanted = {Profiler._without_adapters(point) for point in profile_points(layers, rows, gpu_seqs=100)}
    assert set(machine.ran[1:]) == wanted and len(wanted) > len(profile_points(layers, rows))
    machine.ran.clear()
    profiler.measure(8192, limit_s=0.0, max_seqs=100)
    assert machine.ran[1:] == [Profiler._without_adapters(point) for point in needed_points(layers, rows)]


def test_without_time_for_more_a_law_comes_out(model: LoadedModel, engines: MakeEngine) -> None:
    """A real profile: the points that are needed run on the pool's memory, which is free again afterwards."""
    profiler = profiler_of(engines())
    samples = profiler.measure(256, limit_s=0.0)
    needed = [Profiler._without_adapters(point) for point in needed_points(profiler.arch.num_layers, 256)]
    timed = [contents for contents, _ in samples]
    assert set(needed) <= set(timed) < {Profiler._without_adapters(p) for p in profile_points(profiler.arch.num_layers, 256)}
    law = fit(samples)
    assert all(law.seconds(contents) > 0 for contents in needed)
    assert profiler.blocks.num_used == profiler.blocks.num_arena == 0


def test_the_fit_counts_shares_of_forward_that_run_again_and_the_first_row_that_rides() -> None:
    terms = {
        ("iteration", "once", 0): 1e-3, ("inference", "once", 0): 0.02, ("inference", "rows", 1): 1e-3,
        ("inference", "fused_rows", 0): 0.03, ("inference", "fused_rows", 1): 5e-4, ("forward", "rows", 0): 1e-4,
        ("backward", "rows", 0): 2e-4,
    }
    law = LatencyModel(terms)
    passes = [PassCost(4 + rows, 4, 4, 100, 0, rows, 0, 0, 0) for rows in (0, 1, 2, 16, 40)]
    again = [UnitCost(True, rows, 2, 100, 0, share) for rows in (30, 100) for share in (0.0, 0.4, 1.0)]
    points = [*(Contents(cost, (), 0) for cost in passes), *(Contents(None, (unit,), 0) for unit in again),
              *(Contents(None, (unit._replace(backward=False, recompute_fraction=0.0),), 0) for unit in again)]
    found = fit([(point, law.seconds(point)) for point in points])
    assert [found.seconds(point) for point in points] == [pytest.approx(law.seconds(point), rel=0.01) for point in points]
