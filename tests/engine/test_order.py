"""The order of an iteration: sampling right behind the pass, and a device that is still at it while the engine goes on.

A CPU has done what a call told it when the call returns. `LateMark` makes it look like a device that works beside the host: the
end of an iteration is not known before the next one's tokens are.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from coserve.config.settings import FinetuneConfig, SamplingConfig, SchedulerConfig
from coserve.core import StepPlan, StepResult
from coserve.engine.engine import Engine
from coserve.engine.marks import RunningSteps
from coserve.engine.step import Lookup, StepRunner
from coserve.finetune.job import JobEvent
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import MakeEngine, drive, prompt


class LateMark:
    """A mark that is passed when it is waited for, or when a later one of the same device has been."""

    made: list[LateMark]
    clock_s = 0.0

    def __init__(self) -> None:
        self.number, self.reached = len(LateMark.made), False
        LateMark.made.append(self)
        LateMark.clock_s += 1e-3
        self.time_s = LateMark.clock_s

    def passed(self) -> bool:
        return self.reached

    def wait(self) -> None:
        for mark in LateMark.made[: self.number + 1]:
            mark.reached = True

    def seconds_since(self, earlier: LateMark) -> float:
        assert self.reached and earlier.reached
        return self.time_s - earlier.time_s


class LateRunner(StepRunner):
    """A runner on such a device: reading tokens is what waits for the marks before them."""

    def __init__(self, engine: Engine) -> None:
        LateMark.made = []
        super().__init__(engine.device, mark=LateMark)
        self.lag: list[int] = []

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        before = LateMark.made[-1] if LateMark.made else None
        if before is not None and any(span.samples for span in plan.spans):
            before.wait()  # the tokens come behind it
        result = super().run(plan, lookup)
        self.lag.append(len(self._running))
        return result


def run(engine: Engine, directory: Path) -> tuple[list[list[int]], list[float]]:
    """The tokens of some requests, and the losses of a job beside them."""
    losses: list[float] = []

    def listen(event: JobEvent) -> None:
        if event.row is not None:
            losses.append(event.row.train_loss)

    directory.mkdir()
    job = engine.finetune(
        write_lines(directory / "data.jsonl", chat_lines(6)), directory / "out",
        FinetuneConfig(max_steps=3, batch_size=2, deterministic=True, window_tokens=16), listen=listen,
    )
    sampled = SamplingConfig(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    greedy = SamplingConfig(max_tokens=9, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    handles = [engine.submit(prompt(20 + number), sampled if number % 2 else greedy) for number in range(5)]
    drive(engine)
    assert job.status == "succeeded", job.error
    return [handle.token_ids for handle in handles], losses


def test_tokens_and_losses_do_not_depend_on_the_devices_lag(engines: MakeEngine, tmp_path: Path) -> None:
    """The same bits, whether the end of an iteration is known at once or one iteration later."""
    expected = run(engines(), tmp_path / "once")
    engine = engines()
    engine.runner = runner = LateRunner(engine)
    assert run(engine, tmp_path / "late") == expected
    assert max(runner.lag) == 1, "with tokens at most one iteration is under way"
    measured = engine.metrics()
    assert 0 < measured["busy_s"] <= 1e-3 * (measured["iterations"] + 1)


def test_an_iteration_without_requests_is_waited_for(engines: MakeEngine, tmp_path: Path) -> None:
    """Else its seconds would be those of launching it, and a request that comes would find a queue."""
    engine = engines()
    engine.runner = runner = LateRunner(engine)
    engine.finetune(write_lines(tmp_path / "data.jsonl", chat_lines(4)), tmp_path / "out", FinetuneConfig(max_steps=1))
    drive(engine)
    assert set(runner.lag) == {0}


def test_a_plan_begins_when_the_device_is_free(engines: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler counts slack from there, else requests would be late by what is queued."""
    engine = engines(scheduler=SchedulerConfig(tpot_ms=500, ttft_ms=3000))
    engine.runner = LateRunner(engine)
    engine.clock = lambda: 7.0  # the host takes no time
    begins: list[float] = []
    schedule = engine.scheduler.schedule
    monkeypatch.setattr(engine.scheduler, "schedule", lambda now: begins.append(now) or schedule(now))
    engine.finetune(write_lines(tmp_path / "data.jsonl", chat_lines(8)), tmp_path / "out", FinetuneConfig(max_steps=2))
    engine.submit(prompt(9), SamplingConfig(max_tokens=30, temperature=0, ignore_eos=True))
    drive(engine)
    assert min(begins) == 7.0
    assert 7.0 < max(begins) < 7.5, "units of the iteration before are still to run, and nothing before them"


def test_sampling_comes_before_units(engines: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    engine = engines(scheduler=SchedulerConfig(tpot_ms=500, ttft_ms=3000))
    device = engine.device

    def watched(name: str, run: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **options: calls.append(name) or run(*args, **options)

    for name in ("logits", "run_unit"):
        monkeypatch.setattr(device, name, watched(name, getattr(device, name)))
    run(engine, tmp_path / "job")
    assert ("logits", "run_unit") in set(pairwise(calls))


def test_iterations_that_are_over_are_given_once_and_in_order() -> None:
    LateMark.made = []
    steps, plans = RunningSteps(), [StepPlan(number=number) for number in range(3)]
    for plan in plans:
        steps.add(plan, LateMark(), LateMark())
    assert not list(steps.take_ended())
    steps.wait_for_all_but(1)
    assert [ended.plan.number for ended in steps.take_ended()] == [0, 1]
    steps.wait_for_all_but(0)
    assert [ended.plan.number for ended in steps.take_ended()] == [2]
    assert not len(steps)
