"""How many micro-batches of a job are in flight, and the plan that leaves memory for them.

One micro-batch's forward can ride in the passes of requests while another one's backward runs. That saves time, and takes the
memory of both. If memory is short, more micro-batches in flight means that backward runs more of forward again. The latency
model compares: the number is chosen that trains an optimizer step soonest beside a typical load.

    An iteration lasts for the TPOT objective T. A pass of typical requests leaves c seconds of it for units, and rows that ride
    save s seconds. With F and B for the seconds of a micro-batch's forward and backward:

    forward alone     F / (c + s) iterations          backward alone    B / c iterations
    both at once      (F + B) / (c + s) iterations, as long as there are rows to ride
    a step of m       one in flight: m forwards and m backwards alone
                      more: a forward alone, m - 1 times both at once, a backward alone

    With k in flight an iteration runs at most k - 1 backwards, so that small micro-batches need more than two.

Owns: this choice. Does not own: plans and their memory (budget.py), when units run (scheduler/).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from coserve.config.settings import FinetuneConfig, SchedulerConfig
from coserve.core import PassCost, UnitCost
from coserve.planning.budget import FittedPlan, JobPlans, plan_within, recompute_fraction
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.policies import Policy
from coserve.scheduler.riding import NO_FREE_ROWS, FreeRows, Riding
from coserve.scheduler.shapes import Shapes
from coserve.scheduler.slo import NUM_REQUESTS, NUM_TOKENS, asked_slo, profile_slo

CHOICES = (1, 2, 3, 4, 6, 8)
"""Micro-batches in flight that are compared."""
USUAL, USUAL_RIDING = 2, 4
"""In flight if more save nothing worth naming; the second where rows ride and the memory is small, so that there is always a
forward to ride and a backward to run."""
SMALL = 0.25
"""The memory is small if it is at most this share of what jobs may have."""
WORTH = 0.02
"""A choice with more micro-batches in flight, or more forward run again, must save this share of a step's time."""


class TypicalLoad(NamedTuple):
    """An iteration beside a typical load. seconds: its length. pass_s: of the pass in it. free: rows that ride in it."""

    seconds: float
    pass_s: float
    free: FreeRows

    @property
    def left_s(self) -> float:
        """What is left for units."""
        return max(self.seconds - self.pass_s, 1e-3 * self.seconds)


def typical_load(riding: Riding, scheduler: SchedulerConfig) -> TypicalLoad:
    """The load by which the profile's objectives are chosen (scheduler/slo.py). An iteration lasts for the TPOT objective of
    requests that set none, or for the profile's if those are best effort."""
    profile, policy = profile_slo(riding.shapes.latency), Policy(scheduler.policy)
    tpot_s = asked_slo(scheduler.tpot_ms, scheduler.ttft_ms, profile).tpot_s
    tpot_s = tpot_s if tpot_s < math.inf else profile.tpot_s
    cost = PassCost(NUM_REQUESTS, NUM_REQUESTS, NUM_REQUESTS, NUM_REQUESTS * NUM_TOKENS, 0, 0, 0, 0, 0)
    latency = riding.shapes.latency
    free = riding.free(cost, tpot_s) if policy.fuses else NO_FREE_ROWS
    return TypicalLoad(tpot_s, latency.constant_seconds + latency.pass_seconds(cost), free)


def step_seconds(
    load: TypicalLoad, forward_s: float, backward_s: float, *, tokens: int, microbatches: int, in_flight: int
) -> float:
    """Predicts an optimizer step of `microbatches` micro-batches of `tokens` tokens. forward_s, backward_s: seconds of one, as
    units over all layers."""
    left, saved = load.left_s, load.free.saved_s

    def lasts(work_s: float, iterations: float, riding: float) -> float:
        return iterations * load.pass_s + work_s - saved * riding

    first = max(1.0, forward_s / (left + saved))
    last = max(1.0, backward_s / left)
    alone = lasts(forward_s, first, first), lasts(backward_s, last, 0.0)
    if in_flight == 1 or microbatches == 1:
        return microbatches * sum(alone)
    most_riding = tokens / load.free.rows if load.free.rows else 0.0
    both = (forward_s + backward_s) / (left + saved)
    if both > most_riding:
        both = (forward_s + backward_s - saved * most_riding) / left
    both = max(both, 1 / (in_flight - 1))
    return sum(alone) + (microbatches - 1) * lasts(forward_s + backward_s, both, min(both, most_riding))


def plan_in_flight(
    plans: JobPlans, config: FinetuneConfig, room: int, latency: LatencyModel, scheduler: SchedulerConfig, *,
    remedy: str = "raise memory_bytes",
) -> FittedPlan:
    """The plan of a job in an engine, with the number of micro-batches in flight.

    room: bytes of the engine's pool that jobs may have. remedy: what gives more room. The number is 1 for a deterministic job,
    and `max_microbatches` if the settings of the scheduler name it; whether so many fit then shows when they begin. Raises
    CapacityError if not even one micro-batch fits.
    """
    single = plan_within(plans, config, room, remedy=remedy)
    if config.deterministic:
        return single
    if scheduler.max_microbatches is not None:
        return single._replace(in_flight=scheduler.max_microbatches)
    shapes = Shapes(latency, plans.num_layers, scheduler.max_window_tokens)
    load, asked = typical_load(Riding(shapes), scheduler), plans.asked(config)
    tokens, pairs = plans.num_tokens, plans.num_pairs
    ahead = latency.unit_seconds(UnitCost(False, tokens, plans.num_layers, pairs, tokens))

    def seconds(fitted: FittedPlan) -> float:
        again = recompute_fraction(fitted.plan)
        layers = plans.num_layers - fitted.plan.lowest_trained
        back = latency.unit_seconds(UnitCost(True, tokens, layers, pairs, 0, again))
        return step_seconds(
            load, ahead, back, tokens=tokens, microbatches=plans.microbatches, in_flight=fitted.in_flight)

    best, best_s = single, seconds(single)
    for count in CHOICES[1:]:
        found = plans.for_job(config, asked, room // count)._replace(in_flight=count)
        if count > plans.microbatches or found.num_bytes > room // count:
            break
        is_small = load.free.rows > 0 and count <= USUAL_RIDING and count * found.num_bytes <= SMALL * room
        is_usual = found.plan == single.plan and (count <= USUAL or is_small)
        if is_usual or seconds(found) < (1 - WORTH) * best_s:
            best, best_s = found, seconds(found)
    return best
