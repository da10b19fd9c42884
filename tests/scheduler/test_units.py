"""Which units are picked under which latency law, and how policies take turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from coserve.core import Direction, PassCost, StepPlan, Unit, WorkUnit
from coserve.scheduler.shapes import ROUND_ROWS, Shapes, window_sizes
from coserve.scheduler.units import OVERDUE, PATIENCE, STUCK_PATIENCE, UnitPicker
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase
from tests.checked_engine import CheckedEngine
from tests.fake_machine import decoding, engine, law, step


def row_layers(works: Sequence[WorkUnit]) -> int:
    """Rows x layers of units."""
    return sum((w.unit.end - w.unit.start) * (w.unit.layer_end - w.unit.layer_start) for w in works)


def run_beside_requests(fake: CheckedEngine, iterations: int = 120) -> list[StepPlan]:
    """Iterations of a job beside two requests that decode."""
    decoding(fake, 1000)
    decoding(fake, 1000)
    fake.add_job([[1000]] * 4)
    return [step(fake) for _ in range(iterations)]


def test_rows_that_are_efficient_in_large_windows_go_in_large_windows_over_few_layers() -> None:
    plans = run_beside_requests(engine(law(layers=0.004, row_layer=0.00002), num_layers=30))
    units = [work for plan in plans for work in plan.units]
    large = [u for u in units if u.unit.end - u.unit.start >= 500]
    assert row_layers(large) > 0.8 * row_layers(units)
    assert all(u.unit.layer_end - u.unit.layer_start < 10 for u in large) and not any(u.fused for u in units)


def test_where_rows_of_a_pass_are_nearly_free_forward_windows_are_fused() -> None:
    plans = run_beside_requests(engine(law(once=0.05, row=1e-6, layers=0.002, row_layer=0.00002), num_layers=30))
    forward = [w for plan in plans for w in plan.units if w.unit.direction is Direction.FORWARD]
    fused = [work for work in forward if work.fused]
    assert row_layers(fused) > 0.4 * row_layers(forward)  # one window rides in a pass; what time is left takes others
    assert max(work.unit.end - work.unit.start for work in fused) >= 256


def test_layer_sliced_never_fuses() -> None:
    plans = run_beside_requests(engine(law(once=0.05, row=1e-6), policy="layer-sliced"))
    assert any(plan.units for plan in plans) and not any(plan.fused for plan in plans)


def test_a_window_is_never_larger_than_the_limit() -> None:
    plans = run_beside_requests(engine(max_window_tokens=128))
    assert {w.unit.end - w.unit.start for plan in plans for w in plan.units} <= set(range(129))


def test_small_microbatches_do_not_wait_for_efficiency_they_can_not_have() -> None:
    fake = engine(law(layers=0.002, row_layer=0.00001))  # 40 rows take 6 times what they would in a large window
    decoding(fake, 1000)
    fake.add_job([[40]] * 8, elements=1000)
    plans = [step(fake) for _ in range(60)]
    assert all(plan.units or plan.optimizer for plan in plans)


def test_optimizer_slices_fill_the_time_and_cover_the_step() -> None:
    fake = engine(law(elements=1e-7), preemption_quantum_ms=50.0)
    job = fake.add_job([[50]], elements=2_000_000, steps=2)
    fake.run(20.0)
    parts = [part for _, plan in fake.plans for part in plan.optimizer]
    assert job.steps_done == 2 and sum(part.end - part.start for part in parts) == 4_000_000
    assert len(parts) >= 8 and all(plan.predicted_s <= 0.05 + 1e-9 for _, plan in fake.plans)


def test_optimizer_slices_leave_time_for_what_follows_from_them() -> None:
    """A step's norms take 300 ms: they come slice by slice, each as predicted, and no iteration is stretched."""
    fake = engine(law(elements=1e-7), preemption_quantum_ms=50.0)
    job = fake.add_job([[50]], elements=2_000_000, steps=2)
    job.work.refresh_seconds = 0.3
    fake.run(20.0)
    steps = [(plan, sum(part.end - part.start for part in plan.optimizer)) for _, plan in fake.plans if plan.optimizer]
    assert job.steps_done == 2 and sum(elements for _, elements in steps) == 4_000_000
    for plan, elements in steps:
        assert 1e-7 * elements + 0.3 * elements / 2_000_000 <= plan.predicted_s <= 0.05 + 1e-9


@pytest.mark.parametrize("beside_requests", [False, True])
def test_a_slice_that_never_fits_runs_all_the_same(beside_requests: bool) -> None:
    """The norms of a small adapter come in one piece, which takes longer than an iteration may."""
    fake = engine(law(elements=1e-7), preemption_quantum_ms=50.0)
    job = fake.add_job([[50]], elements=1000, steps=2)
    job.work.refresh_seconds = 0.3
    if beside_requests:
        decoding(fake, 2000)
    fake.run(20.0)
    assert job.steps_done == 2


@pytest.mark.parametrize("microbatch_tokens", [10, 50])
def test_where_even_the_smallest_unit_takes_too_long_jobs_go_on_while_nothing_runs(microbatch_tokens: int) -> None:
    fake = engine(law(layers=0.3), preemption_quantum_ms=50.0)
    job = fake.add_job([[microbatch_tokens]], elements=1000, steps=1)
    fake.run(60.0)
    assert job.steps_done == 1


# --- patience: an inefficient unit waits, since slack that is not used adds up ---


def small_slack(fake: CheckedEngine) -> tuple[UnitPicker, list[JobWork], PassCost]:
    """A picker with one job, whose units are efficient over many rows only, beside a pass."""
    work = MicrobatchWork(id=1, job=1, num_tokens=2000, num_layers=4, lowest=0, bounds=[(0, 2000)], label_rows=range(2000))
    job = JobWork(id=1, tenant="")
    job.microbatches[1] = work
    return fake.scheduler.picker, [job], PassCost(4, 4, 4, 400, 0, 0, 0, 0, 0)


def test_an_inefficient_unit_waits_for_eight_iterations_and_no_longer() -> None:
    fake = engine(law(layers=0.002, row_layer=0.00002))
    little = 0.002 + 100 * 0.00002  # a window of under 100 rows through one layer: half the best rate
    for _ in range(2):  # the patience comes back with every unit
        picker, jobs, cost = small_slack(fake)
        for _ in range(PATIENCE):
            assert not picker.pick(jobs, little, cost).units
        unit, = picker.pick(jobs, little, cost).units
        assert unit.unit.end - unit.unit.start < 100


def test_an_efficient_unit_does_not_wait() -> None:
    picker, jobs, cost = small_slack(engine(law(layers=0.002, row_layer=0.00002)))
    assert not picker.pick(jobs, 0.004, cost).units
    found = picker.pick(jobs, 0.1, cost).units
    assert found and found[0].unit.end - found[0].unit.start >= 500


def test_nothing_waits_where_no_pass_is_to_gain_slack() -> None:
    picker, jobs, _ = small_slack(engine(law(layers=0.002, row_layer=0.00002)))
    assert picker.pick(jobs, 0.004, None, patient=False).units


def test_a_backward_that_runs_forward_again_gets_fewer_layers_in_the_same_time() -> None:
    """Half of forward again, at forward's cost; and it is no less efficient for that, so that it doesn't wait."""
    layers = []
    for again in (0.0, 0.5):
        picker, jobs, cost = small_slack(engine(law(layers=0.002, row_layer=0.00002), num_layers=4))
        work = jobs[0].microbatches[1]
        work.recompute_fraction, work.phase, work.start, work.end = again, Phase.BACKWARD, 2000, 2000
        found, = (u.unit for u in picker.pick(jobs, 0.2, cost).units[:1])
        layers.append(found.layer_end - found.layer_start)
        assert (found.direction, found.end - found.start) == (Direction.BACKWARD, 2000)
    assert layers[1] < layers[0]


def test_a_stuck_unit_waits_then_stops_others_then_lets_them_go_on() -> None:
    """One job's unit never fits, whatever it may stretch to. Another job has small units."""
    picker, (small,), cost = small_slack(engine(law(layers=0.002, row_layer=0.00002)))
    long = MicrobatchWork(id=2, job=2, num_tokens=2000, num_layers=4, lowest=0, bounds=[(0, 2000)], label_rows=[], grid=2000)
    stuck, asked = JobWork(id=2, tenant="", microbatches={2: long}), list[bool]()

    def stretch(overdue: bool) -> float:
        asked.append(overdue)
        return 0.0

    ran = []
    for _ in range(OVERDUE + 2):
        small.microbatches[1].start = small.microbatches[1].end = small.microbatches[1].layer = small.microbatches[1].row = 0
        ran.append(bool(picker.pick([stuck, small], 0.03, cost, stretch=stretch).units))
    assert ran == [True] * STUCK_PATIENCE + [False] * (OVERDUE - STUCK_PATIENCE) + [True] * 2
    assert asked == [False] * (OVERDUE - STUCK_PATIENCE) + [True] * 2
    assert picker.pick([stuck, small], 0.03, cost, stretch=lambda overdue: 1.0).units[0].microbatch == 2
    assert picker.pick([stuck, small], 0.03, cost, stretch=stretch).units[0].microbatch == 1, "it counts anew"


# --- a deterministic job's grid ---


def on_the_grid(fake: CheckedEngine, tokens: int, grid: int) -> None:
    """Every window is the next one of the grid, whole through each layer, and none is fused."""
    for work in fake.runner.units:
        start, end = work.unit.start, work.unit.end
        assert not work.fused
        assert (start % grid == 0 and end == min(start + grid, tokens)), work


@pytest.mark.parametrize("tokens", [100, 128, 700, 1024])
@pytest.mark.parametrize("lag", [0, 1])
def test_windows_are_on_the_grid_under_any_load(tokens: int, lag: int) -> None:
    rng = random.Random(tokens + lag)
    fake = engine(law(once=0.03, row=1e-5), lag=lag, num_layers=6)  # rows that ride in the pass would be nearly free
    job = fake.add_job([[tokens]] * 3, grid=128, steps=6)
    for _ in range(80):
        fake.submit(rng.randrange(1, 300), rng.randrange(1, 60), at=rng.uniform(0, 8), tpot_s=rng.choice([0.05, 0.1, 0.4]))
    fake.run()
    assert job.steps_done == 6
    on_the_grid(fake, tokens, 128)
    ranges = {work.unit.layer_end - work.unit.layer_start for work in fake.runner.units}
    assert len(ranges) > 1, "layer ranges follow the load"


def test_a_unit_over_the_quantum_runs_where_nobody_waits() -> None:
    fake = engine(law(row_layer=0.004))  # 128 rows through one layer: half a second, and a quantum is a quarter
    job = fake.add_job([[300]], grid=128, steps=2)
    fake.run()
    assert job.steps_done == 2
    on_the_grid(fake, 300, 128)


def test_a_unit_over_the_itl_cap_waits_for_slack_and_harms_nobody() -> None:
    """128 rows through one layer take 0.26 s forward and 0.52 s backward; the cap is 0.2 s."""
    fake = engine(law(row_layer=0.002))
    requests = [fake.submit(20, 150, at=0.5 * i) for i in range(60)]
    job = fake.add_job([[300]], grid=128)
    fake.run(25.0)
    assert job.steps_done >= 1
    assert all(request.met for request in requests if request.finished_s is not None)
    assert max(plan.predicted_s for _, plan in fake.plans) > 0.5
    on_the_grid(fake, 300, 128)


def test_a_stuck_job_has_its_turn_beside_one_that_takes_all_slack() -> None:
    fake = engine(law(row_layer=0.001))
    for i in range(10):
        fake.submit(20, 300, at=0.5 * i)
    fixed, free = fake.add_job([[256]], grid=128), fake.add_job([[256]])
    fake.run(25.0)
    assert fixed.steps_done >= 1
    assert fake.runner.trained[fixed.work.id] > 0.25 * fake.runner.trained[free.work.id]


def test_a_stuck_job_takes_what_leaves_hope_when_slack_never_suffices() -> None:
    """New requests come so often that the least slack stays small; each may still lose half a second of its sixty."""
    fake = engine(law(once=0.06, row_layer=0.002), max_num_seqs=8)
    requests = [fake.submit(5, 600, at=0.3 * i, stop_at=12) for i in range(300)]
    job = fake.add_job([[128]], grid=128)
    fake.run(80.0)
    assert job.steps_done >= 1 and len(fake.runner.units) >= 8
    assert all(request.finished_s is not None for request in requests[:200])


def test_the_least_share_reaches_a_job_whose_units_are_long() -> None:
    fake = engine(law(once=0.25, row_layer=0.004), finetune_min_share=0.1)
    for i in range(4):
        fake.submit(50, 400, at=0.01 * i)
    job = fake.add_job([[128]], grid=128)
    fake.run(60.0)
    assert len(fake.runner.units) >= 2 and job.work.id in fake.runner.trained


# --- a micro-batch's progress ---


def work_of(num_tokens: int, num_layers: int = 3) -> MicrobatchWork:
    return MicrobatchWork(
        id=1, job=1, num_tokens=num_tokens, num_layers=num_layers, lowest=0, bounds=[(0, 4), (4, num_tokens)],
        label_rows=[1, 3, 7],
    )


def test_pairs_and_labels_of_a_window() -> None:
    work = work_of(10)
    assert work.pairs(0, 4) == 10 and work.pairs(4, 10) == 21 and work.pairs(2, 6) == 3 + 4 + 1 + 2
    assert [work.labels(0, 10), work.labels(1, 3), work.labels(3, 7), work.labels(8, 10)] == [3, 1, 1, 0]


def test_forward_then_the_objective_then_backward() -> None:
    work = work_of(10)
    for unit in [(0, 2, 0, 6), (2, 3, 0, 4), (2, 3, 4, 6), (0, 3, 6, 10)]:
        assert work.phase is Phase.FORWARD and work.ready
        work.advance(Unit(Direction.FORWARD, *unit))
    assert work.phase is Phase.OBJECTIVE and not work.ready
    work.on_objective()
    for unit in [(2, 3, 5, 10), (2, 3, 0, 5), (0, 2, 0, 10)]:
        assert work.phase is Phase.BACKWARD
        work.advance(Unit(Direction.BACKWARD, *unit))
    assert work.phase is Phase.DONE


def test_while_nothing_runs_windows_are_not_cut() -> None:
    fake = engine(law(layers=0.004, row_layer=0.00002), num_layers=30)
    fake.add_job([[1000]] * 2)
    units = [work.unit for _ in range(60) for work in step(fake).units]
    assert {unit.direction for unit in units} == {Direction.FORWARD, Direction.BACKWARD}
    assert all(unit.end - unit.start == 1000 for unit in units)


def test_windows_that_are_cut_have_few_sizes() -> None:
    """The first product of a size is slow. Between two sizes lies at most an eighth, so that little time is left unused."""
    shapes, found = Shapes(law(layers=0.004, row_layer=0.00002), 30, 2048), set()
    for backward in (False, True):
        work = MicrobatchWork(id=1, job=1, num_tokens=2000, num_layers=30, lowest=0, bounds=[(0, 2000)], label_rows=[])
        if backward:
            work.phase, work.start, work.end, work.row = Phase.BACKWARD, 2000, 2000, 2000
        for milliseconds in range(4, 44):
            candidate = shapes.next_unit(work, milliseconds / 1e3)
            if candidate is not None:
                found.add(candidate.unit.unit.end - candidate.unit.unit.start)
    assert len(found) > 10 and found <= set(window_sizes(2048))
    sizes = window_sizes(2048)
    assert sizes[0] == ROUND_ROWS and sizes[-1] == 2048 and len(sizes) <= 48
    assert all(size % ROUND_ROWS == 0 for size in sizes)
    assert all(larger - size <= max(ROUND_ROWS, size / 8) for size, larger in pairwise(sizes))
