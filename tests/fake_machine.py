"""An engine on a fake clock under a latency law of a few numbers, for tests of the scheduler."""

from __future__ import annotations

from typing import Any

from coserve.config.settings import SchedulerConfig
from coserve.core import StepPlan
from coserve.scheduler.latency import LatencyModel
from coserve.simulation.requests import SimulatedRequest, simulated_token
from tests.checked_engine import CheckedEngine

PASS, ROW, UNIT, ROW_LAYER = 0.010, 0.001, 0.001, 0.00002
"""Seconds: of a pass, of each row in it after the first, of a unit per layer, of each row and layer."""


def law(**changes: float) -> LatencyModel:
    """A latency law of a few numbers. once, row: of a pass; layers, row_layer: of units, backward twice that; elements."""
    values = {"once": PASS, "row": ROW, "layers": UNIT, "row_layer": ROW_LAYER, "elements": 1e-9, "head": 0.0, **changes}
    terms = {("inference", "once", 0): values["once"], ("optimizer", "elements", 0): values["elements"]}
    terms |= {("inference", "rows", knot): values["row"] for knot in (1, 2, 4, 16, 64, 256, 1024)}
    terms |= {("inference", "head_rows", knot): values["head"] for knot in (0, 1, 16, 256)}
    for group, factor in (("forward", 1), ("backward", 2)):
        terms[group, "layers", 0] = factor * values["layers"]
        terms |= {(group, "rows", knot): factor * values["row_layer"] for knot in (0, 32, 128, 512)}
    return LatencyModel(terms)


def engine(model: LatencyModel | None = None, **options: Any) -> CheckedEngine:
    """An engine with objectives of 0.1 s per token and 3 s to the first, without a reserve. options: of the scheduler's
    configuration, else of the engine."""
    names = set(SchedulerConfig.__dataclass_fields__)
    config = {"tpot_ms": 100.0, "ttft_ms": 3000.0, "reserve": 0.0}
    config |= {name: options.pop(name) for name in list(options) if name in names}
    return CheckedEngine(SchedulerConfig(**config), model or law(), **options)  # type: ignore[arg-type]


def step(fake: CheckedEngine) -> StepPlan:
    plan = fake.step()
    assert plan is not None
    return plan


def whole(request: SimulatedRequest) -> bool:
    """Whether all its tokens came, each once."""
    state = request.state
    return state.output == [simulated_token(state.id, len(state.prompt) + i) for i in range(request.stop_at)]


def decoding(fake: CheckedEngine, tokens: int = 200, **options: Any) -> SimulatedRequest:
    """A request whose first token has come."""
    request = fake.submit(8, tokens, **options)
    while not request.token_times:
        step(fake)
    return request
