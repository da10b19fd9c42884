"""The strictest test, extended to fused passes: training windows ride with requests, and neither is disturbed, in float64.

Two jobs of different adapters, unit by unit in random order, each in an arena of the pool that also holds requests' keys and
values; requests of the backbone and of two more adapters come, are fed in random chunks and go. Every gradient equals
autograd, every request's logits equal transformers' over its whole text, and rows of requests equal those of a pass without
the training window. All memory is NaN before it is written; in some cases one job's or one request's adapter is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coserve.config.settings import LINEAR_SITES, AdapterConfig, LoraConfig
from coserve.core import Direction, Unit
from coserve.kernels import attention as attention_kernels
from coserve.model.weights import ModelWeights
from coserve.peft.adapter import Adapter
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool, block_bytes
from coserve.runtime.executor import Executor, TrainExecutor
from coserve.runtime.fused import PassExecutor, TrainWindow
from coserve.runtime.microbatch import InFlight, microbatch_layout, pack
from coserve.runtime.plans import scoring_plan
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from tests import oracle
from tests.numerics.test_gradients import (
    AT_LENGTH,
    CPU,
    TOLERANCE,
    VARIANTS,
    Case,
    budgeted_plan,
    coefficients,
    pair,
    random_adapter,
    random_example,
    reference_gradients,
    train_by_units,
)
from tests.splits import backward_units, forward_units

NAN_BYTE = 255
"""Memory of these bytes is NaN in every dtype."""
LONGEST = 24
"""Tokens of a request."""
LIVE = 4
"""Requests at a time."""


@dataclass(frozen=True)
class Mix:
    """Two jobs and what runs beside them. poison: whose adapter is NaN, "job" (the first) or "request" (the first adapter)."""

    jobs: tuple[Case, Case]
    served: tuple[AdapterConfig, AdapterConfig]
    block_tokens: int
    poison: str | None
    seed: int


@st.composite
def lora_configs(draw: st.DrawFn) -> LoraConfig:
    names = draw(st.lists(st.sampled_from(LINEAR_SITES), min_size=1, max_size=7, unique=True))
    only_layer = draw(st.sampled_from([None, None, 0, 1, 2]))
    targets = names if only_layer is None else [f"layers.{only_layer}.mlp.down_proj", *names[:1]]
    return LoraConfig(
        r=draw(st.integers(1, 12)), alpha=draw(st.floats(1, 16)), target_modules=tuple(targets),
        rank_pattern=draw(st.sampled_from([{}, {names[0]: 3}])),
    )


@st.composite
def mixes(draw: st.DrawFn, configs: st.SearchStrategy[AdapterConfig] = lora_configs()) -> Mix:  # noqa: B008 a constant
    family, sliding_window = draw(st.sampled_from(VARIANTS))
    query_block, jobs = draw(st.sampled_from([2, 4, 256])), []
    for _ in range(2):
        objective = draw(st.sampled_from(["sft", "sft", "dpo"]))
        lengths = draw(st.lists(st.integers(2, 16), min_size=1, max_size=3))
        lengths = [*lengths, *reversed(lengths)] if objective == "dpo" else lengths
        seed = draw(st.integers(0, 2**32 - 1))
        rng = np.random.default_rng(seed)
        examples = tuple(random_example(rng, i, length) for i, length in enumerate(lengths))
        budget = draw(st.sampled_from([1.0, 0.6, 0.3, 0.0]))
        jobs.append(Case(family, sliding_window, draw(configs), examples, objective, query_block, seed, budget))
    return Mix(
        jobs=(jobs[0], jobs[1]), served=(draw(configs), draw(configs)),
        block_tokens=draw(st.sampled_from([1, 3, 4])), poison=draw(st.sampled_from([None, None, "job", "request"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


# --- jobs ---


class Training:
    """One job's micro-batch in an arena. `steps` are its units in order; fused ones ride in a pass."""

    def __init__(self, case: Case, adapter: Adapter, train: TrainExecutor, rng: Random) -> None:
        self.case, self.adapter, self.train, self.rng = case, adapter, train, rng
        self.batch = pack(case.examples, device=CPU, seed=case.seed, step=3)
        self.plan = budgeted_plan(train.weights, adapter, case.budget, case.compression)
        self.layout = microbatch_layout(self.plan, self.batch.num_tokens, train.arch, 8, forward_only=False)
        self.state: InFlight | None = None
        self.present: Adapter | None = None

    def steps(self, arena: Tensor) -> Iterator[tuple[Unit, bool]]:
        """(unit, whether it is fused). A DPO job's reference runs first, over the bare backbone."""
        references = None
        if self.case.objective == "dpo":
            scoring = scoring_plan(self.train.arch, None, itemsize=8)
            self.state = self.train.begin(self.batch, scoring, forward_only=True, buffer=arena)
            yield from self.forward()
            weighted = self.state.logprobs * self.batch.label_weights
            references = [float(weighted[first:end].sum()) for first, end in self.batch.label_bounds]
        self.present = self.adapter
        self.state = self.train.begin(self.batch, self.plan, buffer=arena)
        yield from self.forward()
        self.state.set_coefficients(coefficients(self.case, self.state, references))
        for unit in backward_units(self.rng, self.train.arch.num_layers, self.plan.lowest_trained, self.batch.num_tokens):
            yield unit, False
        assert self.state.finished

    def forward(self) -> Iterator[tuple[Unit, bool]]:
        """Random pieces, each a unit over all layers that is fused, or a random staircase."""
        layers, start = self.train.arch.num_layers, 0
        while start < self.batch.num_tokens:
            end = self.rng.randint(start + 1, self.batch.num_tokens)
            if self.rng.random() < 0.6:
                yield Unit(Direction.FORWARD, 0, layers, start, end), True
            else:
                for unit in forward_units(self.rng, layers, end - start):
                    yield unit._replace(start=unit.start + start, end=unit.end + start), False
            start = end

    def window(self, unit: Unit) -> TrainWindow:
        assert self.state is not None
        return TrainWindow(self.state, unit, self.present)


# --- requests ---


@dataclass
class Request:
    """A text that is fed in chunks. slot: its adapter's, or NO_ADAPTER; logits: of its rows so far."""

    tokens: list[int]
    slot: int
    table: list[int] = field(default_factory=list)
    done: int = 0
    logits: list[Tensor] = field(default_factory=list)


class Traffic:
    """Requests that come and go in the lower blocks of a pool; blocks are used again in random order."""

    def __init__(self, rng: Random, num_blocks: int, block_tokens: int, slots: Sequence[int]) -> None:
        self.rng, self.block_tokens, self.slots = rng, block_tokens, slots
        self.free = list(range(num_blocks))
        self.live: list[Request] = []
        self.all: list[Request] = []

    def batch(self) -> tuple[list[Request], list[RowSpan], list[RowSpan]]:
        """(requests in batch order, decode spans, prefill spans): some live requests, each with its next tokens."""
        while len(self.live) < LIVE:
            tokens = [self.rng.randrange(97) for _ in range(self.rng.randint(1, LONGEST))]
            self.live.append(Request(tokens, self.rng.choice(self.slots)))
            self.all.append(self.live[-1])
        parts: tuple[list[tuple[Request, RowSpan]], list[tuple[Request, RowSpan]]] = ([], [])
        chosen = self.rng.sample(self.live, self.rng.randint(1, len(self.live)))
        for request in sorted(chosen, key=lambda r: r.slot):
            decodes = request.done > 0 and self.rng.random() < 0.6
            end = request.done + 1 if decodes else self.rng.randint(request.done + 1, len(request.tokens))
            while len(request.table) * self.block_tokens < end:
                request.table.append(self.free.pop(self.rng.randrange(len(self.free))))
            parts[0 if decodes else 1].append((request, RowSpan(request.done, end, list(request.table), request.slot)))
        requests = [request for part in parts for request, _ in part]
        return requests, [span for _, span in parts[0]], [span for _, span in parts[1]]

    def commit(self, requests: Sequence[Request], spans: Sequence[RowSpan], logits: Tensor) -> None:
        """Notes what a pass gave; a request at its end leaves its blocks to others."""
        rows = logits.split([span.end - span.start for span in spans])
        for request, span, part in zip(requests, spans, rows, strict=True):
            request.done = span.end
            request.logits.append(part)
            if request.done == len(request.tokens):
                self.live.remove(request)
                self.free += request.table


def nan_pool(weights: ModelWeights, num_blocks: int, block_tokens: int) -> KeyValuePool:
    pool = KeyValuePool(weights.architecture, num_blocks, block_tokens, torch.float64, CPU)
    pool.buffer.fill_(NAN_BYTE)
    assert pool.rows.isnan().all()
    return pool


# --- both together ---


@dataclass
class Run:
    """What ran. adapters: those of requests, by slot; disturbed: the largest difference that a training window made to the
    hidden rows of a pass, relative."""

    trainings: list[Training]
    requests: list[Request]
    adapters: dict[int, Adapter]
    disturbed: float
    num_fused: int


def relative(own: Tensor, expected: Tensor) -> float:
    """||own - expected|| / ||expected||; NaN must lie at the same places."""
    if not torch.equal(own.isnan(), expected.isnan()):
        return float("inf")
    own, expected = own.nan_to_num(), expected.nan_to_num()
    return float((own - expected).norm()) / max(float(expected.norm()), 1e-300)


def run_mix(mix: Mix) -> Run:
    """All units of both jobs, with passes before, between and around them."""
    weights = pair(mix.jobs[0].family, mix.jobs[0].sliding_window).weights
    arch, rng = weights.architecture, Random(mix.seed)
    executor = Executor(weights)
    train = TrainExecutor(executor)
    slots = AdapterSlots(arch, torch.float64, CPU, max_slots=2, max_rank=16)
    served = [random_adapter(weights, config, mix.seed + number) for number, config in enumerate(mix.served)]
    trained = [random_adapter(weights, case.config, case.seed) for case in mix.jobs]
    if mix.poison is not None:
        poisoned = {"job": trained, "request": served}[mix.poison][0]
        poisoned.flat.fill_(torch.nan)
        poisoned.refresh()
    adapters = {slots.place(number, adapter): adapter for number, adapter in enumerate(served)}
    trainings = [Training(case, adapter, train, rng) for case, adapter in zip(mix.jobs, trained, strict=True)]

    num_blocks = LIVE * -(-LONGEST // mix.block_tokens)
    sizes = [-(-training.layout.total // block_bytes(arch, mix.block_tokens, 8)) for training in trainings]
    pool = nan_pool(weights, num_blocks + sum(sizes), mix.block_tokens)
    passes = PassExecutor(executor, train, pool, slots)
    alone = Executor(weights)
    undisturbed = PassExecutor(alone, TrainExecutor(alone), nan_pool(weights, num_blocks, mix.block_tokens), slots)
    traffic = Traffic(rng, num_blocks, mix.block_tokens, [NO_ADAPTER, *adapters])
    run = Run(trainings, traffic.all, adapters, 0.0, 0)

    def run_pass(window: TrainWindow | None) -> None:
        requests, decode, prefill = traffic.batch()
        spans = [*decode, *prefill]
        ids = [t for r, s in zip(requests, spans, strict=True) for t in r.tokens[s.start : s.end]]
        hidden = passes.run(torch.tensor(ids), decode, prefill, window)
        expected = undisturbed.run(torch.tensor(ids), decode, prefill, None)
        run.disturbed = max(run.disturbed, relative(hidden, expected))
        traffic.commit(requests, spans, passes.logits(hidden))

    steps, end = [], pool.num_blocks
    for training, size in zip(trainings, sizes, strict=True):
        steps.append((training, training.steps(pool.arena(end - size, end))))
        end -= size
    while steps:
        training, units = chosen = rng.choice(steps)
        step = next(units, None)
        if step is None:
            steps.remove(chosen)
            continue
        unit, fused = step
        run.num_fused += fused
        if fused:
            run_pass(training.window(unit))
            continue
        if rng.random() < 0.5:
            run_pass(None)
        window = training.window(unit)
        train.run(window.state, unit, window.adapter)
    run_pass(None)
    return run


def request_error(mix: Mix, run: Run) -> float:
    """The worst relative error of any request's logits against transformers, one adapter at a time."""
    reference = pair(mix.jobs[0].family, mix.jobs[0].sliding_window).reference
    worst = 0.0
    for slot in (NO_ADAPTER, *run.adapters):
        texts = [request for request in run.requests if request.slot == slot and request.done]
        if not texts:
            continue
        poisoned = slot != NO_ADAPTER and bool(run.adapters[slot].flat.isnan().any())
        model = reference if slot == NO_ADAPTER or poisoned else oracle.with_adapter(reference, run.adapters[slot])
        for request in texts:
            own = torch.cat(request.logits)
            if poisoned:  # whatever they hold, it is theirs
                continue
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([request.tokens[: request.done]])).logits[0]
            worst = max(worst, relative(own, logits))
        if model is not reference:
            model.unload()
    return worst


def check(mix: Mix) -> None:
    """Runs a mix and holds all of it against transformers and peft."""
    attention_kernels.QUERY_BLOCK, whole = mix.jobs[0].query_block, attention_kernels.QUERY_BLOCK
    try:
        run = run_mix(mix)
    finally:
        attention_kernels.QUERY_BLOCK = whole
    assert run.disturbed <= TOLERANCE, "a training window changed rows of requests"
    assert request_error(mix, run) <= TOLERANCE
    for number, training in enumerate(run.trainings):
        case = mix.jobs[number]
        if mix.poison == "job" and number == 0:
            assert training.adapter.grad is not None and training.adapter.grad.isnan().any()
            continue
        reference = pair(case.family, case.sliding_window).reference
        expected = reference_gradients(case, reference, training.adapter)
        assert oracle.worst_error(oracle.own_gradients(training.adapter), expected) <= TOLERANCE


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes())
def test_fused_training_and_requests_equal_the_oracle(mix: Mix) -> None:
    check(mix)


@pytest.mark.full
@settings(max_examples=AT_LENGTH // 6, deadline=None, suppress_health_check=list(HealthCheck))
@given(mix=mixes())
def test_fused_training_and_requests_equal_the_oracle_at_length(mix: Mix) -> None:
    check(mix)


def fixed_mix(family: str, sliding_window: int | None, **changes: object) -> Mix:
    """All sites everywhere, so that every copy and every product matters."""
    rng = np.random.default_rng(7)
    jobs = [
        Case(family, sliding_window, LoraConfig(r=r, alpha=6), tuple(random_example(rng, i, n) for i, n in enumerate(lengths)),
             objective, 4, 30 + r)
        for r, lengths, objective in ((4, (14, 6, 14), "sft"), (11, (9, 12), "dpo"))
    ]
    mix = Mix((jobs[0], jobs[1]), (LoraConfig(r=3, alpha=5), LoraConfig(r=9, alpha=9)), 3, None, 5)
    return replace(mix, **changes)


@pytest.mark.parametrize(("family", "sliding_window"), VARIANTS)
def test_every_family(family: str, sliding_window: int | None) -> None:
    check(fixed_mix(family, sliding_window))


@pytest.mark.parametrize("poison", ["job", "request"])
def test_nan_stays_with_its_owner(poison: str) -> None:
    check(fixed_mix("qwen3", 6, poison=poison))


@pytest.mark.parametrize("trained", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_requests_whose_adapters_have_sites_that_the_job_lacks(family: str, trained: str) -> None:
    """What the job keeps has other neighbours in the program that it shares."""
    mix = fixed_mix(family, None)
    jobs = tuple(replace(case, config=LoraConfig(r=5, alpha=3, target_modules=(trained,))) for case in mix.jobs)
    check(replace(mix, jobs=jobs))


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("qwen3", 2), ("mistral", 3)])
def test_dropout_is_the_same_fused_and_unfused(family: str, seed: int) -> None:
    """Masks belong to rows, not to passes; requests have none, also at sites where the job drops."""
    mix = fixed_mix(family, None, seed=seed)
    jobs = tuple(
        replace(case, config=replace(case.config, dropout=0.3), objective="sft", seed=seed + number)
        for number, case in enumerate(mix.jobs)
    )
    check_against_unfused(replace(mix, jobs=jobs))


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("qwen3", 2), ("mistral", 3)])
@pytest.mark.parametrize("budget", [1.0, 0.4])
def test_fp8_is_the_same_fused_and_unfused(family: str, seed: int, budget: float) -> None:
    """What is kept is rounded row by row, in whatever pass a row is; requests' rows are not."""
    mix = fixed_mix(family, None, seed=seed)
    jobs = tuple(replace(case, compression="fp8", budget=budget) for case in mix.jobs)
    check_against_unfused(replace(mix, jobs=jobs))


def check_against_unfused(mix: Mix) -> None:
    """Gradients of fused training are those of the same jobs alone; requests' logits are right."""
    run = run_mix(mix)
    assert run.num_fused >= 2
    assert run.disturbed <= TOLERANCE
    assert request_error(mix, run) <= TOLERANCE
    weights = pair(mix.jobs[0].family, None).weights
    for case, training in zip(mix.jobs, run.trainings, strict=True):
        adapter = random_adapter(weights, case.config, case.seed)
        train_by_units(case, weights, adapter)
        assert oracle.worst_error(oracle.own_gradients(training.adapter), oracle.own_gradients(adapter)) <= 1e-12
