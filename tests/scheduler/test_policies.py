"""Policies on a fake clock: whose turn an iteration is, and what it then holds."""

from __future__ import annotations

import pytest

from coserve.config.settings import POLICIES, SchedulerConfig
from coserve.core import ConfigError, Direction
from tests.checked_engine import CheckedEngine
from tests.fake_machine import engine


def test_inference_only_trains_nothing() -> None:
    fake = engine(policy="inference-only")
    request = fake.submit(100, 20)
    fake.add_job([[100]])
    fake.run(10.0)
    assert request.met and not fake.runner.units


def test_finetune_only_serves_nobody() -> None:
    fake = engine(policy="finetune-only")
    request = fake.submit(100, 20)
    job = fake.add_job([[100]], steps=5)
    fake.run(10.0)
    assert job.steps_done == 5 and not request.token_times


def turns(fake: CheckedEngine) -> list[str]:
    """Runs of plans in words: 'I5' is five inference iterations, 'M' one whole micro-batch, 'O' only optimizer slices."""
    words: list[str] = []
    inference = 0
    under_way: tuple[int, int] | None = None
    for _, plan in fake.plans:
        assert not (plan.spans and plan.units), "a turn is for one of the two"
        if plan.spans:
            assert under_way is None, "a micro-batch is cut off"
            inference += 1
            continue
        if inference:
            words.append(f"I{inference}")
            inference = 0
        if not plan.units:
            words.append("O")
            continue
        owner, = {work.microbatch for work in plan.units}
        assert under_way is None or under_way[0] == owner
        last = plan.units[-1].unit
        under_way = (owner, 0)
        if last.direction is Direction.BACKWARD and last.layer_start == 0 and last.start == 0:
            words.append("M")
            under_way = None
    return words


@pytest.mark.parametrize("interval", [1, 5, 16])
def test_temporal_runs_whole_microbatches_between_so_many_iterations(interval: int) -> None:
    fake = engine(policy=f"temporal:{interval}")
    fake.submit(30, 2000)
    fake.add_job([[300, 100], [200], [100]])
    fake.run(40.0)
    words = turns(fake)
    assert words[:10] == [f"I{interval}", "M"] * 3 + [f"I{interval}", "O", "M", f"I{interval}"]


def test_dynamic_temporal_waits_until_every_request_can() -> None:
    fake = engine(policy="dynamic-temporal")
    request = fake.submit(30, 300)
    fake.add_job([[1000], [1000]])
    fake.run(40.0)
    words = turns(fake)
    assert words.count("M") > 20 and request.met
    assert all(gap < 2.0 for gap in (b - a for a, b in zip(request.token_times, request.token_times[1:], strict=False)))


def test_dynamic_temporal_takes_optimizer_steps_though_a_request_runs_all_the_time() -> None:
    fake = engine(policy="dynamic-temporal")
    request = fake.submit(30, 4000)
    job = fake.add_job([[1000], [1000]], elements=100_000_000)
    fake.run(30.0)
    assert job.steps_done > 2 and len(request.token_times) > 200


@pytest.mark.parametrize("policy", [name.replace(":N", ":3") for name in POLICIES if name != "finetune-only"])
def test_every_policy_serves_without_a_job_and_with_a_paused_one(policy: str) -> None:
    fake = engine(policy=policy)
    first = fake.submit(50, 30)
    fake.run()
    job = fake.add_job([[500]] * 3)
    job.work.paused = True
    second = fake.submit(50, 30, at=3.0)
    fake.run()
    assert first.met and second.met


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("policy", ["temporal:2", "dynamic-temporal"])
def test_turns_end_when_a_microbatch_waits_for_another(policy: str, lag: int) -> None:
    fake = engine(policy=policy, lag=lag)
    requests = [fake.submit(30, 60, at=0.3 * i) for i in range(10)]
    job = fake.add_job([[100], [200]], grouped=True, steps=4)
    fake.run()
    assert job.steps_done == 4 and all(request.finished_s for request in requests)


@pytest.mark.parametrize("name", [
    "", "fast", "coserve:", "coserve:3", "temporal", "temporal:", "temporal:0", "temporal:1.5", "temporal:²", "temporal:N",
])
def test_other_policies_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"policy: must be one of coserve, .*temporal:N.* \(N: a whole number from 1\)"):
        SchedulerConfig(policy=name)
