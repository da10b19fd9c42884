"""The engine on a virtual clock: what it counts is what the plans hold, jobs take and give back their memory, belief learns."""

from __future__ import annotations

import random

import pytest

from coserve.core import Contents, Direction, StepPlan
from coserve.scheduler.blocks import BlockPool
from coserve.simulation.disturbance import Disturbance
from coserve.simulation.engine import SimulatedEngine
from coserve.simulation.jobs import SimulatedBatch
from tests.checked_engine import CheckedEngine
from tests.fake_machine import engine, law

RIDING = law(once=0.05, row=1e-6, layers=0.002, row_layer=0.00002)
"""Rows that ride in a pass are nearly free."""


def loaded(fake: CheckedEngine, seed: int = 0) -> CheckedEngine:
    """Requests at random times beside a job of four steps."""
    rng = random.Random(seed)
    for _ in range(40):
        fake.submit(rng.randrange(1, 200), rng.randrange(1, 60), at=rng.uniform(0, 4))
    fake.add_job([[300, 200], [256], [100]], steps=4, recompute_fraction=0.25)
    fake.run()
    return fake


@pytest.mark.parametrize("lag", [0, 1])
def test_trained_tokens_are_those_of_the_units_that_ran(lag: int) -> None:
    fake = loaded(engine(RIDING, lag=lag, num_layers=8))
    tokens = 4 * (300 + 200 + 256 + 100)
    rows = fake.runner.rows
    assert sum(fake.runner.trained.values()) == pytest.approx(tokens)
    assert (rows.forward, rows.backward) == (pytest.approx(tokens), pytest.approx(tokens))
    assert rows.fused == sum(u.unit.end - u.unit.start for u in fake.runner.units if u.fused) > 0
    assert all(u.unit.direction is Direction.FORWARD for u in fake.runner.units if u.fused)


def test_the_truth_counts_a_plan_as_the_scheduler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, parts = engine(RIDING, num_layers=8), set[str]()
    count = fake.runner.contents

    def compared(plan: StepPlan) -> Contents:
        assert count(plan) == plan.contents
        parts.update(plan.kind.split("+"))
        return plan.contents

    monkeypatch.setattr(fake.runner, "contents", compared)
    loaded(fake)
    assert parts == {"decode", "prefill", "fused", "forward", "backward", "optimizer"}


def test_exact_belief_predicts_every_iteration_and_wrong_belief_learns() -> None:
    exact = loaded(engine(num_layers=8))
    assert all(error.p95 < 1e-9 for error in exact.scheduler.latency.errors().values())
    steep = CheckedEngine(exact.scheduler.config, law(), num_layers=8, slope=1.5)
    loaded(steep)
    assert steep.scheduler.latency.corrections["backward"] > 1.1
    assert steep.clock() > exact.clock() and steep.runner.busy_s > 1.1 * exact.runner.busy_s


def test_equal_seeds_give_equal_runs() -> None:
    first, second, other = (
        loaded(CheckedEngine(engine().scheduler.config, law(), noise=0.1, seed=seed)).clock() for seed in (1, 1, 2)
    )
    assert first == second != other


# --- memory ---


def arenas(blocks: int, guaranteed: int = 10) -> SimulatedEngine:
    fake = engine()
    pool = BlockPool(blocks, 16, guaranteed_blocks=guaranteed)
    return SimulatedEngine(fake.scheduler.config, law(), pool=pool)


@pytest.mark.parametrize(("blocks", "most"), [(100, 2), (65, 1)])
def test_microbatches_in_flight_hold_their_arenas(blocks: int, most: int) -> None:
    """Two arenas of 40 blocks fit beside 10 guaranteed blocks into 100, but not into 65."""
    fake = arenas(blocks)
    job = fake.start_job(SimulatedBatch(microbatches=[[200]] * 4, arena_blocks=[40] * 4), steps=3)
    held = set()
    while fake.run_once() and not job.finished:
        assert fake.pool.num_arena == 40 * len(job.arenas) == 40 * len(job.waiting)
        fake.pool.check_integrity()
        held.add(len(job.arenas))
    assert max(held) == most and fake.pool.num_arena == 0


def test_a_job_that_is_removed_gives_its_memory_back() -> None:
    fake = arenas(100)
    job = fake.start_job(SimulatedBatch(microbatches=[[200]] * 4, arena_blocks=[40] * 4))
    fake.run_once()
    assert fake.pool.num_arena == 80
    fake.remove_job(job)
    assert fake.pool.num_arena == 0 and fake.idle
    request = fake.submit(50, 20)
    fake.run()
    assert request.met


def test_a_request_can_be_cancelled_before_and_after_it_arrives() -> None:
    fake = arenas(100)
    early, late, stays = fake.submit(30, 50, at=1.0), fake.submit(30, 5000), fake.submit(30, 20)
    fake.cancel(early)
    fake.run_once()
    fake.cancel(late)
    fake.run()
    assert early.cancelled and not early.token_times and late.cancelled and late.finished_s is None and stays.met
    assert fake.idle and fake.pool.num_used == 0


def test_the_host_s_part_is_in_every_iteration() -> None:
    fake = SimulatedEngine(engine().scheduler.config, law(), disturbance=Disturbance(host_s=0.005))
    fake.submit(1, 10)
    fake.run()
    assert fake.clock() == pytest.approx(10 * (0.010 + 0.005)) and fake.runner.finetune_s == 0
