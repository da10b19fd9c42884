"""One run: requests are injected into an engine in process, on one thread, while a job may train.

Owns: the loop, what is counted and when. Does not own: which runs there are (sharing.py), how engines are made (engines.py).

    0 ----------- window_start ------------------------- window_end -------------- drained
    warm-up          requests due here are counted,        no arrivals, the job goes on;
    requests         finetuning is counted here            what is unfinished at the limit is cancelled and has missed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from coserve.bench.arrivals import Arrival
from coserve.bench.machine import MachineRecord
from coserve.bench.metrics import RequestRecord, SloInMs, meets
from coserve.config.settings import FinetuneConfig, SamplingConfig
from coserve.core import CoserveError, JobFailed

LONGEST_SLEEP_S = 1e-3
ENDED_WELL = ("length", "stop")


class Handle(Protocol):
    """A request in the engine. token_times: the engine's clock, seconds, one per output token."""

    @property
    def finished(self) -> bool: ...
    @property
    def finish_reason(self) -> str | None: ...
    @property
    def token_times(self) -> Sequence[float]: ...
    def cancel(self) -> None: ...


class DrivenJob(Protocol):
    """A finetuning job in the engine. error: why it failed."""

    @property
    def finished(self) -> bool: ...
    @property
    def error(self) -> CoserveError | None: ...
    def cancel(self) -> None: ...


class LoadEngine(Protocol):
    """What a run needs of an engine."""

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Handle: ...
    def step(self) -> bool: ...
    def now(self) -> float: ...
    def metrics(self) -> Mapping[str, Any]: ...


class BenchEngine(LoadEngine, Protocol):
    """What a benchmark needs of an engine that trains from files; coserve.engine.engine.Engine has it."""

    def finetune(self, data_path: Path, output_dir: Path, config: FinetuneConfig, *, name: str) -> DrivenJob: ...
    def machine(self) -> MachineRecord | None: ...
    def close(self) -> None: ...


class TokensDone(NamedTuple):
    """Finetuning done until a time: seconds from the window's start, forward-token equivalents."""

    time_s: float
    finetune_tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How long a run is and when it ends. Seconds from its start."""

    window_start_s: float
    window_end_s: float
    drain_s: float = 60.0
    """Longest wait for requests after the window."""
    sample_s: float | None = None
    """Finetuning is sampled so often over the window; None: at its start and end."""
    give_up: tuple[SloInMs, int] | None = None
    """Stop as soon as more than so many requests have missed these objectives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """records: the counted requests, their times from the window's start. busy_s, iterations, rows: of the whole run;
    rows: prompt and output tokens. inference_tokens: output tokens in the window. prediction_errors: by kind of iteration,
    an ErrorSummary's fields (scheduler/latency.py). fused_share: of the forward rows of finetuning, those that rode in a pass
    with requests; None where there were none, or the engine doesn't count them. start_s: of the run, on the engine's clock.
    machine: None where that isn't known."""

    records: tuple[RequestRecord, ...]
    window_s: float
    inference_tokens: int
    samples: tuple[TokensDone, ...]
    busy_s: float
    iterations: int
    rows: int
    gave_up: bool = False
    peak_memory_bytes: int | None = None
    fused_share: float | None = None
    prediction_errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    start_s: float = 0.0
    machine: MachineRecord | None = None

    @property
    def finetune_tokens_per_s(self) -> float:
        """Between the samples nearest to the window's ends: an iteration in flight there is counted with its time."""
        first, last = self.samples[0], self.samples[-1]
        return (last.finetune_tokens - first.finetune_tokens) / max(last.time_s - first.time_s, 1e-9)


class _Injected(NamedTuple):
    """A request that was due; handle: None where the engine refused it."""

    arrival: Arrival
    handle: Handle | None


def run_load(
    engine: LoadEngine, arrivals: Sequence[Arrival], prompt: Callable[[int], Sequence[int]], config: RunConfig, *,
    sleep: Callable[[float], None], job: DrivenJob | None = None,
) -> Run:
    """Injects the arrivals (sorted by due time) and steps the engine until all is done. prompt: token ids of a length.

    Raises JobFailed if the job ends before the window: its throughput would be that of a job that isn't there.
    """
    prompts = [prompt(arrival.prompt_tokens) for arrival in arrivals]
    before = engine.metrics()
    start = engine.now()
    injected: list[_Injected] = []
    samples: list[TokensDone] = []
    gave_up, next_check = False, 0.0
    while True:
        now = engine.now() - start
        while len(injected) < len(arrivals) and arrivals[len(injected)].due_s <= now:
            injected.append(_submit(engine, arrivals[len(injected)], prompts[len(injected)]))
        _sample(engine, config, now, samples)
        if now >= config.window_end_s and len(injected) == len(arrivals):
            if now >= config.window_end_s + config.drain_s or all(i.handle is None or i.handle.finished for i in injected):
                break
        elif job is not None and job.finished:
            raise JobFailed(f"bench: the finetuning job ended before the measured window did ({job.error or 'no error'})")
        if config.give_up is not None and now >= next_check:
            next_check = now + 1.0
            gave_up = _num_missed(injected, config.give_up[0], start, now) > config.give_up[1]
            if gave_up:
                break
        if not engine.step():
            coming = arrivals[len(injected)].due_s if len(injected) < len(arrivals) else now + LONGEST_SLEEP_S
            sleep(min(LONGEST_SLEEP_S, max(coming - now, 0.0)))
    done = engine.metrics()
    records = [_record(item, start + config.window_start_s, config.window_start_s) for item in injected]
    _cancel(engine, injected)
    window_s = config.window_end_s - config.window_start_s
    return Run(
        records=tuple(r for r in records if r.due_s > 0),
        window_s=window_s,
        inference_tokens=sum(0 <= t <= window_s for r in records for t in r.token_times),
        samples=tuple(samples),
        busy_s=float(done["busy_s"] - before["busy_s"]), iterations=int(done["iterations"] - before["iterations"]),
        rows=sum(r.prompt_tokens + len(r.token_times) - 1 for r in records if r.token_times),
        gave_up=gave_up, peak_memory_bytes=done["memory"].get("peak_bytes"), fused_share=_fused_share(before, done),
        prediction_errors=engine.metrics().get("prediction_errors", {}), start_s=start,
    )


def _fused_share(before: Mapping[str, Any], done: Mapping[str, Any]) -> float | None:
    forward, fused = (done.get(name, 0.0) - before.get(name, 0.0) for name in ("forward_rows", "fused_rows"))
    return float(fused / forward) if forward else None


def _submit(engine: LoadEngine, arrival: Arrival, prompt_ids: Sequence[int]) -> _Injected:
    sampling = SamplingConfig(max_tokens=arrival.output_tokens, ignore_eos=True, temperature=0.0)
    try:
        return _Injected(arrival, engine.submit(prompt_ids, sampling))
    except CoserveError:  # a refused request has missed its objectives, and the run goes on
        return _Injected(arrival, None)


def _sample(engine: LoadEngine, config: RunConfig, now: float, samples: list[TokensDone]) -> None:
    """Takes the sample that is due: one at the window's start, one at its end, and between them every `sample_s`."""
    time_s = now - config.window_start_s
    window_s = config.window_end_s - config.window_start_s
    if time_s < 0 or (samples and samples[-1].time_s >= window_s):
        return
    wanted = window_s if config.sample_s is None else config.sample_s + (samples[-1].time_s if samples else 0.0)
    if not samples or time_s >= min(wanted, window_s):
        samples.append(TokensDone(time_s, float(engine.metrics().get("finetune_tokens", 0.0))))


def _record(item: _Injected, origin: float, window_start_s: float) -> RequestRecord:
    """origin: the window's start on the engine's clock."""
    handle = item.handle
    return RequestRecord(
        due_s=item.arrival.due_s - window_start_s, prompt_tokens=item.arrival.prompt_tokens,
        token_times=() if handle is None else tuple(t - origin for t in handle.token_times),
        finished=handle is not None and handle.finished and handle.finish_reason in ENDED_WELL,
    )


def _num_missed(injected: Sequence[_Injected], objectives: SloInMs, start: float, now: float) -> int:
    """Requests that can't meet the objectives any more."""
    missed = 0
    for item in injected:
        record = _record(item, start, 0.0)
        if item.handle is None or item.handle.finished:
            missed += not meets(record, objectives)
        else:
            missed += not record.token_times and (now - record.due_s) * 1e3 > objectives.ttft_ms
    return missed


def _cancel(engine: LoadEngine, injected: Sequence[_Injected]) -> None:
    """Cancels what is unfinished and lets the engine see to it, so that the next run starts in an idle engine."""
    live = [item.handle for item in injected if item.handle is not None and not item.handle.finished]
    for handle in live:
        handle.cancel()
    while any(not handle.finished for handle in live) and engine.step():
        pass
