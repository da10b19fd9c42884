"""The hybrid scheduler on a fake clock: deadlines, memory, fairness, plans made ahead. The runner checks every plan."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from coserve.config.settings import SchedulerConfig
from coserve.core import Direction
from coserve.devices.bound import JobShape, OfferedLoad, fused_bound
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RAMP_TOKENS, RESERVES
from coserve.simulation.requests import SimulatedRequest
from tests.checked_engine import CheckedEngine
from tests.fake_machine import decoding, engine, law, step, whole

# --- budgets ---


def test_an_iteration_lasts_until_the_next_token_is_due() -> None:
    fake = engine()
    request = decoding(fake)
    fake.add_job([[2000]], elements=1000)
    due = request.state.deadline_s
    plan = step(fake)
    assert plan.units and due - 0.005 < fake.clock() <= due + 1e-9
    assert due == pytest.approx(request.token_times[0] + 0.1)


def test_slack_keeps_the_reserve() -> None:
    fake = engine()
    request = decoding(fake)
    for number in range(1, 30):
        ahead = RESERVES * 0.2 * min(1, number / RAMP_TOKENS)
        slack = request.token_times[0] + 0.1 * (number - ahead) - fake.clock()
        assert request.state.slack_s(fake.clock(), 0.2) == pytest.approx(slack)
        step(fake)


def test_slack_is_saved_up_only_to_the_itl_cap() -> None:
    fake = engine(itl_factor=1.5)
    request = decoding(fake)
    for _ in range(60):
        step(fake)
    assert request.state.deadline_s - fake.clock() > 3
    fake.add_job([[2000]])
    longest = max(step(fake).predicted_s for _ in range(10))
    assert 0.14 < longest <= 0.15 + 1e-9


def least_slack(fake: CheckedEngine, request: SimulatedRequest, steps: int) -> float:
    """Of the request, before the reserve, after each of so many iterations."""
    slack = []
    for _ in range(steps):
        step(fake)
        slack.append(request.state.deadline_s - fake.clock())
    return min(slack)


@pytest.mark.parametrize("reserve", [0.0, 0.25, 0.6])
def test_the_reserve_is_kept_once(reserve: float) -> None:
    fake = engine(reserve=reserve)
    request = decoding(fake)
    fake.add_job([[500]] * 40)
    for _ in range(RAMP_TOKENS):
        step(fake)
    kept = 0.1 + min(1.0, RESERVES * reserve) * 0.1  # the next token's whole TPOT, and the reserve
    assert kept - 1e-9 <= least_slack(fake, request, 30) < kept + 0.02


def test_without_a_number_the_reserve_is_the_models_own() -> None:
    fake = engine(reserve=None)
    request = decoding(fake)
    fake.add_job([[500]] * 40)
    for _ in range(RAMP_TOKENS):
        step(fake)
    assert least_slack(fake, request, 8) >= 0.1 + RESERVES * 0.1 * 0.1 - 1e-9  # 0.1 until there are enough iterations
    for _ in range(20):
        step(fake)
    assert least_slack(fake, request, 20) < 0.1 + RESERVES * 0.1 * 0.1


def test_alone_jobs_run_for_the_preemption_quantum() -> None:
    fake = engine(preemption_quantum_ms=80.0)
    fake.add_job([[2000]])
    plans = [step(fake) for _ in range(30)]
    assert all(plan.predicted_s <= 0.08 + 1e-9 for plan in plans)
    ends = 0
    for plan, following in pairwise(plan for plan in plans if plan.units):
        if plan.units[-1].unit.direction is following.units[0].unit.direction:
            layer = following.contents.units[0]._replace(layers=1)
            assert plan.predicted_s + fake.scheduler.latency.unit_seconds(layer) > 0.08  # not one layer more would have fitted
            ends += 1
    assert ends >= 20


def test_a_new_arrival_waits_for_one_quantum() -> None:
    fake = engine(preemption_quantum_ms=80.0)
    fake.add_job([[2000]])
    request = fake.submit(16, 4, at=1.0)
    fake.run(2.0)
    assert request.token_times[0] - 1.0 < 2 * 0.08 + 0.03


# --- prefill ---


@pytest.mark.parametrize("job", [False, True], ids=["alone", "job"])
def test_a_long_prompt_comes_in_chunks_that_running_requests_can_make_up_for(job: bool) -> None:
    fake = engine()
    request = decoding(fake)
    if job:
        fake.add_job([[500]] * 8)
    for _ in range(20):
        step(fake)
    long = fake.submit(1000, 4)
    start = fake.clock()
    while not long.token_times:
        assert step(fake).decode
    assert long.token_times[0] - start < 2 * 1.1, "twice what the prompt takes alone"
    fake.scheduler.remove_job(2)
    fake.jobs.clear()
    fake.run()
    assert request.met and long.met and all(gap <= 0.2 + 1e-9 for gap in gaps(request))


def test_a_short_prompt_is_not_cut_for_a_cap_that_nobody_asked_for() -> None:
    """The profile gives 26 ms per token, so that twice that is a cap of 52 ms; 200 tokens take 211 ms beside one request."""

    def chunks_of(num_tokens: int, own_tpot_s: float | None = None, **settings: Any) -> list[int]:
        fake = engine(ttft_ms=None, **settings)
        running = decoding(fake, **({} if own_tpot_s is None else {"tpot_s": own_tpot_s}))
        for _ in range(60):
            step(fake)
        prompt = fake.submit(num_tokens, 2)
        plans = []
        while not prompt.token_times:
            plans.append(step(fake))
        assert running.finished_s is None and all(plan.decode for plan in plans)
        return [span.length for plan in plans for span in plan.prefill]

    assert chunks_of(200, tpot_ms=None) == [200]
    assert chunks_of(700, tpot_ms=None) == [234, 233, 233], "even chunks within the quantum of 250 ms"
    assert len(chunks_of(200, tpot_ms=26)) > 2, "the server's objective"
    assert len(chunks_of(200, 0.02, tpot_ms=None)) > 2, "the running request's own"
    assert len(chunks_of(200, 0.03, tpot_ms=None)) > 2, "though it is longer than the profile's"


def gaps(request: SimulatedRequest) -> list[float]:
    return [b - a for a, b in zip(request.token_times, request.token_times[1:], strict=False)]


def test_a_prompt_that_waits_for_slack_takes_nothing_until_it_begins() -> None:
    """Its prefix is looked up, with every iteration that it waits, but it counts in the pool's figures once."""
    fake = engine(law(once=0.098))  # decoding leaves next to nothing of 0.1 s
    decoding(fake, 60)
    fake.add_job([[500]] * 4)
    before, request = fake.pool.stats(), fake.submit(64, 2, ttft_s=2.0)
    step(fake)
    for _ in range(10):
        assert not request.state.running and fake.pool.stats()[4:] == before[4:]
        step(fake)
    fake.run(fake.clock() + 8)
    assert request.finished_s is not None
    assert fake.pool.stats().queried_tokens == before.queried_tokens + 64


def test_the_earliest_deadline_is_prefilled_first() -> None:
    fake = engine(max_num_batched_tokens=64)
    relaxed = fake.submit(200, 2)
    urgent = fake.submit(200, 2, ttft_s=0.3)
    middle = fake.submit(200, 2, ttft_s=0.35)
    fake.run()
    assert urgent.token_times[0] < middle.token_times[0] < relaxed.token_times[0]


def test_a_prompt_that_is_late_keeps_its_place() -> None:
    fake = engine(max_num_batched_tokens=64)
    fake.submit(2000, 1, ttft_s=9.0)
    late = fake.submit(200, 1, ttft_s=0.5)
    while fake.clock() < 1:
        step(fake)
    kept = fake.submit(200, 1, ttft_s=2.0)
    fake.run()
    assert late.token_times[0] < kept.token_times[0]


def test_beside_a_job_a_prompt_waits_for_others_until_most_of_its_own_objective_has_passed() -> None:
    def waited(ttft_s: float) -> float:
        fake = engine(law(once=0.098))  # decoding leaves next to nothing of 0.1 s
        decoding(fake, 60)
        fake.add_job([[500]] * 4)
        request = fake.submit(64, 2, ttft_s=ttft_s)
        start = fake.clock()
        fake.run(start + 8)
        return request.token_times[0] - start

    for ttft_s in (2.0, 3.0):
        assert 0.8 * ttft_s < waited(ttft_s) < ttft_s


def test_a_hopeless_request_leaves_the_minimum() -> None:
    fake = engine()
    hopeless = decoding(fake, 20)
    kept = decoding(fake, 200)
    fake.clock.advance(2.5)  # 20 tokens were due after 1.9 s
    for _ in range(40):
        step(fake)
    assert not hopeless.met
    fake = engine()
    hopeless = decoding(fake, 400, tpot_s=0.011)
    fake.clock.advance(5.0)
    kept = decoding(fake, 200)
    fake.add_job([[2000]])
    plan = step(fake)
    assert plan.units and plan.predicted_s <= 0.022 + 1e-9  # the cap stays that of all
    assert kept.state.deadline_s > fake.clock()


def test_a_request_that_is_late_but_can_make_it_gets_all() -> None:
    fake = engine()
    late = decoding(fake, 100)
    fake.add_job([[2000]])
    fake.clock.advance(1.0)
    while late.state.deadline_s < fake.clock():
        plan = step(fake)
        assert not plan.units
    fake.run(30.0)
    assert late.met and fake.runner.units


# --- memory ---


@pytest.mark.parametrize("lag", [0, 1])
def test_the_latest_arrival_is_preempted_and_computed_again(lag: int) -> None:
    fake = engine(num_blocks=12, lag=lag)
    requests = [fake.submit(30, 60, at=0.001 * i) for i in range(4)]
    fake.run()
    assert all(map(whole, requests)) and fake.scheduler.admission.num_preemptions > 0
    assert requests[0].state.preemptions == 0
    for state in (request.state for request in requests):
        assert state.begun_s is not None and state.first_token_s is not None
        assert state.arrival_s <= state.begun_s <= state.first_token_s, "the first time counts, not the one after a preemption"
    assert [r.finished_s for r in requests] == sorted(r.finished_s or 0 for r in requests)
    assert fake.pool.num_used == 0
    fake.pool.check_integrity()


@pytest.mark.parametrize("lag", [0, 1])
def test_partly_prefilled_prompts_that_fill_the_pool_get_through(lag: int) -> None:
    fake = engine(num_blocks=16, max_num_batched_tokens=32, lag=lag)
    requests = [
        fake.submit(200, 20, tenant=tenant, ttft_s=ttft, at=0.01 * i)
        for i, (tenant, ttft) in enumerate([("a", 9.0), ("b", 8.0), ("a", 0.01), ("b", 0.02), ("c", 2.0)])
    ]
    fake.run(max_steps=3000)
    assert all(map(whole, requests))


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_random_lives_in_a_small_pool(seed: int, lag: int) -> None:
    """Requests that share prefixes, end early, are cancelled or want prompt logprobs, beside jobs."""
    rng = random.Random(seed)
    fake = engine(
        num_blocks=rng.choice([14, 20, 40]), block_tokens=rng.choice([4, 16]), max_num_seqs=rng.choice([3, 8]), lag=lag,
        max_num_batched_tokens=rng.choice([16, 64, 256]), policy=rng.choice(["coserve", "layer-sliced", "temporal:3"]),
    )
    room = fake.pool.num_blocks * fake.pool.block_tokens
    requests = []
    for _ in range(30):
        prompt = [rng.randrange(2)] * min(rng.randrange(1, 60), room // 2)
        prompt += [rng.randrange(9) for _ in range(rng.randrange(1, 6))]
        tokens = rng.randrange(1, room - len(prompt) + 1 if room - len(prompt) < 40 else 40)
        at = rng.uniform(0, 6)
        requests.append(fake.submit(
            prompt, tokens, at=at, stop_at=rng.choice([None, rng.randrange(1, tokens + 1)]),
            cancel_at=rng.choice([None, None, None, at + rng.uniform(0, 2)]), tenant=rng.choice("abc"),
            ttft_s=rng.choice([0.02, 1.0, math.inf]), tpot_s=rng.choice([0.01, 0.1, math.inf]), every_logit=rng.random() < 0.2,
            key=PrefixKey("", *rng.choice([(None, 0), ("x", 1), ("x", 2)])),
        ))
    fake.add_job([[100, 50], [30]], steps=3, elements=200_000)
    fake.add_job([[64, 64]], steps=2, tenant="b", grouped=True, elements=10_000)
    fake.run(max_steps=20_000)
    for request in requests:
        if request.cancel_at is None:
            assert whole(request)
        if request.state.every_logit and request.finished_s is not None:
            assert request.logit_rows == list(range(len(request.state.prompt)))
    assert all(job.steps_done == job.steps for job in fake.jobs.values())
    assert fake.pool.num_used == 0
    fake.pool.check_integrity()


def test_prompt_logprobs_are_given_once_though_preempted() -> None:
    fake = engine(num_blocks=12)
    fake.submit(60, 100)
    request = fake.submit(60, 40, at=0.001, every_logit=True)
    fake.run()
    assert request.state.preemptions > 0 and whole(request) and request.logit_rows == list(range(60))


def test_rows_through_the_head_count_in_a_chunks_prediction() -> None:
    fake = engine(law(head=0.004))
    decoding(fake)
    for _ in range(60):
        step(fake)
    fake.submit(400, 2, every_logit=True)
    assert step(fake).predicted_s <= 0.2 + 1e-9


def test_no_more_than_max_num_seqs_run() -> None:
    fake = engine(max_num_seqs=3)
    requests = [fake.submit(100, 5) for _ in range(9)]
    fake.run()  # the runner counts
    assert all(map(whole, requests))


# --- plans made ahead ---


def test_a_plan_may_be_made_before_the_last_is_committed() -> None:
    outputs = []
    for lag in (0, 1):
        fake = engine(lag=lag)
        requests = [fake.submit(20 + 7 * i, 30, at=0.05 * i, stop_at=[30, 11, 1][i % 3]) for i in range(12)]
        fake.add_job([[300, 200]] * 3, steps=3)
        fake.run()
        outputs.append([r.state.output for r in requests])
        assert all(map(whole, requests)) and all(job.steps_done == 3 for job in fake.jobs.values())
    assert outputs[0] == outputs[1]


# --- fairness ---


def test_jobs_share_by_weight() -> None:
    fake = engine()
    heavy, light = fake.add_job([[2000]] * 8, weight=3.0), fake.add_job([[1800]] * 6, weight=1.0)
    fake.run(60.0)
    assert fake.runner.trained[heavy.work.id] / fake.runner.trained[light.work.id] == pytest.approx(3, rel=0.1)


def test_tenants_share_whatever_the_number_of_their_jobs() -> None:
    fake = engine()
    many = [fake.add_job([[500]] * 4, tenant="many") for _ in range(3)]
    one = fake.add_job([[700]] * 2, tenant="one")
    fake.run(60.0)
    trained = fake.runner.trained
    assert sum(trained[job.work.id] for job in many) / trained[one.work.id] == pytest.approx(1, rel=0.05)
    assert trained[many[0].work.id] == pytest.approx(trained[many[1].work.id], rel=0.1)


def test_a_job_that_was_paused_has_saved_up_nothing() -> None:
    fake = engine()
    first, second = fake.add_job([[500]] * 4), fake.add_job([[500]] * 4)
    second.work.paused = True
    fake.run(20.0)
    assert second.work.id not in fake.runner.trained
    second.work.paused = False
    before = fake.runner.trained[first.work.id]
    fake.run(40.0)
    assert fake.runner.trained[first.work.id] - before == pytest.approx(fake.runner.trained[second.work.id], rel=0.1)


def test_tenants_prompts_take_turns() -> None:
    fake = engine(max_num_batched_tokens=100)
    flood = [fake.submit(100, 1, tenant="flood") for _ in range(20)]
    few = [fake.submit(100, 1, tenant="few") for _ in range(3)]
    fake.run()
    place = sorted(r.finished_s or 0 for r in (*flood, *few))
    assert place.index(few[-1].finished_s or 0) <= 6


def attainment(requests: Sequence[SimulatedRequest]) -> float:
    return sum(request.met for request in requests) / len(requests)


@pytest.mark.parametrize(("blocks", "lag"), [(4096, 0), (4096, 1), (400, 0)], ids=["roomy", "lag", "tight"])
def test_a_flooding_tenant_harms_itself_only(blocks: int, lag: int) -> None:
    """500 requests at once, whose half could not make it anyway, beside one per second and a job. tight: the flood's running
    requests need more blocks than there are, so that some are preempted all the time."""
    fake = engine(num_blocks=blocks, lag=lag, check_cache=False)
    flood = [fake.submit(200, 120, tenant="flood") for _ in range(500)]
    light = [fake.submit(100, 60, tenant="light", at=0.5 + i) for i in range(20)]
    fake.add_job([[500]] * 4, tenant="trains")
    fake.run(30.0)
    assert attainment(light) >= 0.95
    assert sum(request.finished_s is not None for request in flood) > 20, "the flood is served too"
    assert attainment(flood) < 0.5, "there is more than can be served"
    assert (fake.scheduler.admission.num_preemptions > 10) == (blocks == 400)


def test_a_tenant_does_not_hold_all_places_while_another_waits() -> None:
    """Without it the other tenant would wait until one of the flood's long outputs has ended."""
    fake = engine(max_num_seqs=8, num_blocks=1 << 14)
    flood = [fake.submit(20, 800, tenant="flood", tpot_s=9.0) for _ in range(40)]
    for _ in range(60):
        step(fake)
    assert fake.scheduler.num_running == 8
    few = [fake.submit(20, 10, tenant="few") for _ in range(6)]
    start = fake.clock()
    while not all(request.finished_s for request in few):
        step(fake)
        assert sum(r.state.running for r in flood) >= 4, "the flood keeps its own share"
    assert all(request.met for request in few) and fake.clock() - start < 2
    while not all(request.finished_s for request in flood[:2]):
        step(fake)
    assert all(whole(request) for request in flood if request.finished_s)


def test_a_tenant_that_is_behind_and_asks_again_keeps_what_it_is_owed() -> None:
    fake = engine()
    tenants = fake.scheduler.tenants
    decoding(fake, 50, tenant="few")
    for _ in range(4):
        decoding(fake, 50, tenant="many")
    for _ in range(20):
        step(fake)
    before = tenants.served("few")
    assert before < 0.5 * tenants.served("many")
    fake.submit(10, 5, tenant="few")
    step(fake)
    assert tenants.served("few") <= before + 12, "its own tokens, and no lift"


def test_the_most_served_tenants_latest_request_is_preempted() -> None:
    fake = engine(num_blocks=14)
    old = [decoding(fake, 150, tenant="much") for _ in range(2)]
    new = decoding(fake, 60, tenant="little")
    fake.run()
    assert old[1].state.preemptions > 0 and not new.state.preemptions and not old[0].state.preemptions
    assert all(map(whole, [*old, new]))


def test_a_tenants_own_job_does_not_put_its_requests_behind_a_flood() -> None:
    fake = CheckedEngine(
        SchedulerConfig(tpot_ms=100.0, ttft_ms=3000.0, reserve=0.05), law(once=0.004, row=0.0005, layers=1e-5, row_layer=1e-7),
        check_cache=False,
    )
    for _ in range(2000):
        fake.submit(20, 64, tenant="flood")
    fake.add_job([[256] * 4] * 4, tenant="few")
    few = [fake.submit(30, 16, tenant="few", at=8.0 + i / 3) for i in range(20)]
    fake.run(20.0)
    assert sum(fake.runner.trained.values()) > 20_000, "its job has had a lot"
    assert all(request.met for request in few)


def test_the_least_share_is_kept_though_deadlines_are_missed() -> None:
    shares = {}
    for floor in (0.0, 0.02, 0.2):
        fake = engine(law(once=0.25), finetune_min_share=floor)  # a pass takes longer than the ITL cap
        for i in range(4):
            fake.submit(50, 400, at=0.01 * i)
        fake.add_job([[600]] * 2)
        fake.run(60.0)
        shares[floor] = fake.runner.finetune_s / fake.clock()
    assert shares[0.02] >= 0.019 and shares[0.2] >= 0.19
    assert shares[0.0] < 0.015 and shares[0.2] < 0.25


# --- several jobs and micro-batches at once ---


def test_forward_and_backward_of_several_microbatches_in_one_iteration() -> None:
    fake = engine(preemption_quantum_ms=100.0)
    for _ in range(2):
        fake.add_job([[600], [500], [400]])
    kinds, microbatches = set(), 0
    for _ in range(40):
        plan = step(fake)
        kinds.add(plan.kind)
        microbatches = max(microbatches, len({unit.microbatch for unit in plan.units}))
    assert "forward+backward" in kinds and microbatches >= 3


def test_validation_has_no_backward() -> None:
    fake = engine()
    job = fake.add_job([[300], [200]], forward_only=True, steps=2)
    fake.run(20.0)
    assert job.steps_done == 2
    assert all(unit.unit.direction is Direction.FORWARD for unit in fake.runner.units)


def test_lower_layers_without_adapters_have_no_backward() -> None:
    fake = engine()
    fake.add_job([[300]], lowest=2, steps=2)
    fake.run(20.0)
    lowest = min(u.unit.layer_start for u in fake.runner.units if u.unit.direction is Direction.BACKWARD)
    assert lowest == 2


# --- bursts ---


def test_finetuning_yields_to_a_burst_within_one_iteration_and_comes_back() -> None:
    fake = engine()
    fake.add_job([[1000]] * 4)
    for i in range(30):
        fake.submit(60, 40, at=5.0 + 0.001 * i)
    before = after = 0.0
    yielded = None
    while fake.clock() < 30:
        plan, start = step(fake), fake.plans[-1][0]
        waiting = fake.scheduler.num_waiting
        share = plan.finetune_share
        before, after = (before + share * plan.predicted_s, after) if start < 5 else (before, after + share)
        if waiting and start >= 5.05:
            yielded = share if yielded is None else max(yielded, share)
    assert yielded is not None and yielded < 0.2
    assert before > 4.9
    ends = max(r.finished_s or 99.0 for r in fake.requests.values())
    assert all(r.met for r in fake.requests.values())
    assert all(plan.units or plan.optimizer for start, plan in fake.plans if start > ends + 0.25)


# --- ten minutes ---

CPU_LAYERS = 30


def cpu_law() -> LatencyModel:
    """Like a processor of two cores: rows are never free."""
    return law(once=0.02, row=0.0011, layers=0.002, row_layer=0.000025)


def ten_minutes(
    policy: str, rate: float, *, noise: float = 0.0, seconds: float = 600.0
) -> tuple[CheckedEngine, int]:
    """Poisson arrivals beside a job; the engine, and how many requests missed an objective."""
    fake = CheckedEngine(
        SchedulerConfig(policy=policy, tpot_ms=157.0, ttft_ms=3000.0, reserve=0.05), cpu_law(), num_layers=CPU_LAYERS,
        noise=noise, check_cache=False,
    )
    rng, arrival = random.Random(1), 0.0
    while rate and (arrival := arrival + rng.expovariate(rate)) < seconds - 20:
        fake.submit(128, 64, at=arrival)
    fake.add_job([[256] * 4] * 4, elements=5_000_000)
    fake.run(seconds)
    return fake, sum(not request.met for request in fake.requests.values())


CAPACITY = 3.7
"""Requests per second: inference alone keeps 99% of objectives up to about here."""
HALF_CAPACITY = CAPACITY / 2


def left_share(fake: CheckedEngine) -> float:
    """Share of time that inference leaves: its rows, and a pass per token of objective while anything runs."""
    rows = sum(span.length for _, plan in fake.plans for span in plan.spans)
    return 1 - (rows * 0.0011 / fake.clock() + 0.02 / 0.157)


def test_exact_predictions_miss_nothing_and_leave_jobs_the_rest() -> None:
    fake, missed = ten_minutes("coserve", HALF_CAPACITY)
    assert missed == 0 and len(fake.requests) > 1000
    assert fake.runner.finetune_s / fake.clock() >= 0.9 * left_share(fake)


@pytest.mark.parametrize("load", [0.25, 0.5, 0.75])
def test_exact_predictions_reach_the_bound_of_a_perfect_scheduler(load: float) -> None:
    """The benchmarks' bound (bench/machine.py), by the law itself. What a machine stays below it is not the policy's."""
    job = JobShape(tokens=1024, pairs=4 * 256 * 257 // 2, labels=1024)
    left, all_of_it = (
        fused_bound(cpu_law(), CPU_LAYERS, OfferedLoad(rate=rate, prompt_tokens=128, output_tokens=64), 0.157, job, 0.25)
        for rate in (load * CAPACITY, 0.0)
    )
    alone, _ = ten_minutes("finetune-only", 0.0, seconds=200.0)
    beside, missed = ten_minutes("coserve", load * CAPACITY, seconds=200.0)
    assert missed == 0
    trained = [sum(fake.runner.trained.values()) / fake.clock() for fake in (beside, alone)]
    share = 0.9 * left / all_of_it + 0.1  # nothing arrives in the last 20 s
    assert 0.95 * share <= trained[0] / trained[1] <= 1.02 * share


def test_noisy_times_miss_at_most_two_in_a_hundred() -> None:
    fake, missed = ten_minutes("coserve", HALF_CAPACITY, noise=0.05)
    assert missed <= 0.02 * len(fake.requests)
    assert fake.runner.finetune_s / fake.clock() >= 0.9 * left_share(fake)
