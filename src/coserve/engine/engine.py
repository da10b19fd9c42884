"""The engine: requests and finetuning jobs on one model. Each iteration: schedule -> execute -> commit.

    any thread: submit, cancel, finetune --commands--> the engine's thread: step() --handles--> the callers

Call `step` repeatedly, or `start` a thread that does. Owns: the public methods, the step. Does not own: what an iteration holds
(scheduler/), how it runs (step.py), the thread (loop.py), the course of requests (requesttable.py) and of jobs (jobtable.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from coserve.config.settings import EngineConfig, FinetuneConfig, SamplingConfig
from coserve.config.values import SloMs
from coserve.core import (
    CapacityError,
    ConfigError,
    CoserveError,
    InvalidRequest,
    RankFailed,
    Slo,
    StepPlan,
    StepResult,
)
from coserve.engine.adapters import AdapterRegistry
from coserve.engine.exchange import Exchange
from coserve.engine.jobhandle import JobHandle
from coserve.engine.jobtable import JobTable
from coserve.engine.loop import EngineLoop
from coserve.engine.makedevice import make_device
from coserve.engine.report import EngineReport, LoadReporter
from coserve.engine.requests import Chunk, RequestHandle
from coserve.engine.requesttable import RequestTable
from coserve.engine.sharing import refuse_sharing
from coserve.engine.step import Lookup, StepRunner
from coserve.engine.threads import borrowed_team, give_team_back
from coserve.engine.watching import Watcher
from coserve.finetune.job import JobEvent
from coserve.grammar.matcher import Grammars
from coserve.kernels.choose import flash_note
from coserve.kernels.native import compiled_kernels, compiles_for
from coserve.peft.adapter import Adapter
from coserve.profiling.measure import latency_model
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.admission import Seats
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.slo import asked_slo, describe_slo
from coserve.training.finetuning import prepare
from coserve.training.request import JobRequest

_IDLE_S = 1.0
"""Seconds without work after which the engine prepares what later work will need."""


class PlanRunner(Protocol):
    """Executes step plans. Tests have one without tensors."""

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        """Runs one iteration."""


class Engine:
    """Serves and finetunes on `model`.

    latency: predicts iteration times; None measures the machine once (cached). clock: monotonic, in seconds. runner: executes
    plans; None runs them on the device. report: called with lines for the log. watcher: called with what the engine's thread
    does. Raises ConfigError, CapacityError.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig | None = None, *, latency: LatencyModel | None = None,
        clock: Callable[[], float] = time.perf_counter, runner: PlanRunner | None = None,
        report: Callable[[str], None] = lambda _: None, watcher: Watcher | None = None,
    ) -> None:
        self.model, self.config, self.clock = model, config or EngineConfig(), clock
        if compiles_for(model.dtype, model.device):
            report(compiled_kernels().note)
        if model.device.type == "cuda":
            report(flash_note(model.device))
        trains = latency is None or self.config.scheduler.policy != "inference-only"
        device = self.device = make_device(model, self.config, trains=trains, report=report)
        num_blocks, blocks = device.pool.num_blocks, device.pool.block_tokens
        pool = self.blocks = BlockPool(
            num_blocks, blocks, guaranteed_blocks=math.ceil(num_blocks * self.config.inference_share),
            caching=self.config.prefix_caching,
        )
        loop = self._loop = EngineLoop(watcher)
        self.adapters = AdapterRegistry(
            device.slots, lambda version: pool.forget(version.name, version.number), load=device.load_adapter,
            post=lambda command: loop.post(command, "an adapter was read"),
        )
        self.grammars = Grammars(model.tokenizer, model.architecture.vocab_size)
        self.runner: PlanRunner = runner or StepRunner(device, clock, grammars=self.grammars)
        if latency is None:
            latency = latency_model(device.make_profiler(self.blocks), self.config.scheduler, model.fingerprint, report)
        settings = self.config.scheduler
        self.scheduler = HybridScheduler(settings, latency, self.blocks, model.architecture.num_layers)
        report(f"objectives: {describe_slo(self.objectives, (settings.tpot_ms, settings.ttft_ms))}")
        numbers = itertools.count(1).__next__
        self.requests = RequestTable(model, self.blocks, self.scheduler, self.adapters, numbers, clock)
        self.jobs = JobTable(device, self.config, self.blocks, self.scheduler, self.adapters, numbers)
        self._counts: dict[str, float] = dict.fromkeys(
            ("iterations", "inference_tokens", "prompt_tokens", "finetune_tokens", "busy_s", "inference_busy_s",
             "finetune_busy_s", "host_s"), 0.0,
        )
        self._device_free_s = -math.inf
        """When the device will have done what it was told, by the engine's clock and as predicted."""
        self._idle_since_s = math.inf
        self._reporter: LoadReporter | None = None

    # --- requests ---

    @property
    def objectives(self) -> Slo:
        """For requests that set no objectives: those of the settings, or if the settings have none, from the profile."""
        return self.scheduler.slo

    def now(self) -> float:
        """The engine's clock, in seconds."""
        return self.clock()

    def submit(
        self, prompt: Sequence[int] | str, sampling: SamplingConfig | None = None, *, adapter: str | None = None,
        tenant: str = "", tpot_ms: SloMs | None = None, ttft_ms: SloMs | None = None,
        arrival_s: float | None = None, label: str = "", emitted: Sequence[Sequence[int]] = (),
    ) -> RequestHandle:
        """Accepts a request: token ids, or a text to continue. Thread-safe.

        tpot_ms, ttft_ms: its objectives in milliseconds; "none" is best effort; None takes the engine's. arrival_s: the time on
        the engine's clock from which TTFT counts; default now. tenant: whose fair share and prefix cache it uses. label: its
        name for the watcher. A grammar is compiled first, which takes milliseconds for most. Raises ConfigError (objectives),
        InvalidRequest, NotFound (adapter), CapacityError (too many).

        emitted: for each output the ids that an engine has already given for the same prompt and settings; empty: none. Each
        output goes on as if it had been preempted behind them: with the same noise, which depends on the seed and the position,
        and with the same limits, penalties, stop strings and grammar, which count them. The handle and its chunks hold only
        what follows. The first text is what comes behind the text that a stream had given with the last of those ids: what was
        held back then, as the start of a stop string or of a character, comes now. An output that they have ended does not run;
        it ends again, by a chunk without ids or text. Log-probabilities of the prompt come again unless an output has ended.
        """
        objectives = asked_slo(tpot_ms, ttft_ms, self.objectives)
        sampling, limits = sampling or SamplingConfig(), self.config.scheduler
        ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        self.requests.check(ids, sampling)
        matchers = [] if sampling.grammar is None else self.grammars.new_matchers(sampling.grammar, sampling.n)
        if adapter is not None:
            self.adapters.find(adapter)
        present = len(self.requests.live) + len(self._loop)
        if present >= self.config.max_waiting + limits.max_num_seqs:
            raise CapacityError(f"{present} requests are running or waiting; try again later", param="max_waiting")
        starts = self.requests.begin_outputs(ids, sampling, matchers, emitted)
        numbers: list[int] = []
        handle = RequestHandle(
            ids, sampling, self.now() if arrival_s is None else arrival_s,
            lambda: self._loop.post(lambda: self.requests.cancel(numbers), f"cancel request {label}"),
        )
        handle.label = label

        def admit() -> None:
            try:
                self.requests.admit(handle, adapter, tenant, objectives, numbers, starts)
            except Exception as error:  # a bug, which ends the engine: the request must end with an error
                self.requests.refuse(handle, CoserveError(f"the engine stopped: {error!r}"))
                raise

        self._loop.post(admit, f"admit request {label}")
        return handle

    def generate(
        self, prompts: Sequence[Sequence[int] | str], sampling: SamplingConfig | None = None, **options: Any
    ) -> list[RequestHandle]:
        """Submits prompts and waits for all of them. options: as for `submit`. Raises the error of the first that has one."""
        handles: list[RequestHandle] = []
        try:
            for prompt in prompts:
                handles.append(self.submit(prompt, sampling, **options))
            for handle in handles:
                while not handle.finished:
                    self._step_or_wait()
                if handle.error is not None:
                    raise handle.error
        except BaseException:  # the caller gets no handles
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def stream(self, prompt: Sequence[int] | str, sampling: SamplingConfig | None = None, **options: Any) -> Iterator[Chunk]:
        """Submits a prompt and yields its chunks as they come. Leaving the iterator early cancels the request."""
        handle = self.submit(prompt, sampling, **options)
        try:
            yield from handle.chunks(None if self._loop.has_thread else self._step_or_wait)
        finally:
            handle.cancel()

    async def astream(
        self, prompt: Sequence[int] | str, sampling: SamplingConfig | None = None, **options: Any
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio. The engine must have been started."""
        if not self._loop.has_thread:
            raise ConfigError("astream: start() the engine first: it needs a thread of its own")
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Chunk]()
        if sampling is None or sampling.grammar is None:
            handle = self.submit(prompt, sampling, **options)
        else:  # which may take long to compile
            submitting = asyncio.ensure_future(asyncio.to_thread(self.submit, prompt, sampling, **options))
            try:
                handle = await asyncio.shield(submitting)
            except asyncio.CancelledError:
                submitting.add_done_callback(lambda done: None if done.exception() else done.result().cancel())
                raise

        def notify(chunk: Chunk) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                loop.call_soon_threadsafe(inbox.put_nowait, chunk)

        handle.listen(notify)
        left = len(handle.outputs)
        try:
            while left:
                chunk = await inbox.get()
                left -= chunk.finish_reason is not None
                yield chunk
            if handle.error is not None:
                raise handle.error
        finally:
            handle.cancel()

    def charge_tenants(self, tokens: Mapping[str, int]) -> None:
        """Tenants were served so many tokens by other engines, which counts for their turns here. Thread-safe. Raises
        CoserveError if the engine is closed."""
        self._loop.post(lambda: self.scheduler.charge_elsewhere(tokens), "charge tenants")

    # --- adapters and jobs ---

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Loads an adapter in PEFT's format under a name for requests. If the name exists, this becomes its newest version. The
        files must not change: they are read again when the adapter is needed after others took its slot.

        Raises NotFound, InvalidRequest; the name then keeps its present version.
        """
        place = Path(directory).absolute()
        began = time.perf_counter()
        with borrowed_team():
            adapter = self.device.load_adapter(place)
        self.adapters.note_load(time.perf_counter() - began)
        self._loop.call(lambda: self.adapters.publish(name, adapter, place), f"publish adapter {name}")

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Like `load_adapter`, but from memory, where the adapter stays. `adapter` must not change afterwards. Raises
        InvalidRequest where several ranks share the model."""
        if self.device.group is not None:
            raise InvalidRequest(
                "adapter: several processes share the model, and each needs its part; save the adapter and load it from its "
                "directory", param="adapter",
            )
        self._loop.call(lambda: self.adapters.publish(name, adapter), f"publish adapter {name}")

    def unload_adapter(self, name: str) -> None:
        """Removes an adapter's name. New requests can't use it; running ones go on. Raises NotFound."""
        self._loop.call(lambda: self.adapters.remove(name), f"remove adapter {name}")

    @property
    def adapter_directories(self) -> list[str]:
        """Directories that adapters may still be read from. Thread-safe."""
        return self.adapters.directories

    def finetune(
        self, data: str | Path, output: str | Path, config: FinetuneConfig | None = None, *, name: str | None = None,
        validation: str | Path | None = None, start: str | Path | None = None, resume: bool = False, tenant: str = "",
        weight: float = 1.0, listen: Callable[[JobEvent], None] = lambda event: None, label: str = "",
        exchange: Exchange | None = None,
    ) -> JobHandle:
        """Starts a finetuning job beside the requests, which can use its newest checkpoint and its result as adapter `name`.

        data, validation: JSON Lines files. output: the job's directory. config: settings; those that are 'auto' are chosen from
        the data, and an event tells them. start: directory of an adapter to continue. resume: continue the job in `output`.
        weight: its share among jobs. listen: called with every event. label: its name for the watcher. exchange: this engine's
        place among those that share the job; where it isn't the primary, nothing is written or published, and `output` is not
        made. Raises InvalidRequest, NotFound, ConfigError, CapacityError before anything is written.
        """
        directory = Path(output)
        handle = JobHandle(
            name or directory.name, directory,
            lambda action: self._loop.post(lambda: self.jobs.act(handle, action), f"{action} job {handle.label}"),
        )
        handle.label = label or handle.name

        def notify(event: JobEvent) -> None:
            handle.listen(event)
            listen(event)

        request = JobRequest.of(data, directory, config, validation=validation, start=start, resume=resume, listen=notify)
        if exchange is not None:
            group = self.device.group
            refuse_sharing(deterministic=request.config.deterministic, num_ranks=1 if group is None else group.size)
            request = dataclasses.replace(request, follows=not exchange.primary)
            exchange.on_news(self._wake)
        with borrowed_team():
            request = request.read_start(self.model)
            self.jobs.check(request, handle.name)
            job = request.resolve(self.model, group=self.device.group)
            fitted = self.jobs.choose_plan(job)
            prepared = prepare(job, self.model, fitted)
            for plan in (prepared.trainer.plan, prepared.trainer.scoring):
                self.device.train.prepare(plan)
        handle.num_steps, handle.step = prepared.job.num_steps, prepared.job.cursor.step
        self._loop.post(lambda: self.jobs.begin(prepared, handle, tenant, weight, exchange), f"begin job {handle.label}")
        return handle

    def _wake(self) -> None:
        """Lets jobs look at once whether there is news for them."""
        with contextlib.suppress(CoserveError):  # the engine is closed
            self._loop.post(lambda: None, "news for a job")

    # --- iterations ---

    def step(self) -> bool:
        """Runs one iteration; False if there was nothing to do. Must not be called while the engine has a thread. Raises
        RankFailed."""
        watcher = self._loop.watcher
        with self._loop.lock:
            began = self.now()
            self._loop.drain()
            self.device.check()
            waiting = self.now()
            self.jobs.advance(watcher)  # which reads what queued units leave
            waiting = self.now() - waiting if self.device.is_cuda else 0.0
            watcher.begin("planning an iteration")
            plan = self.scheduler.schedule(max(self.now(), self._device_free_s))  # when it will begin
            if plan.empty:
                return self._use_idle_time(began)
            self._idle_since_s = math.inf
            requests, jobs = self._holds(plan)
            watcher.begin(f"an iteration ({plan.kind})", plan.predicted_s, jobs=jobs, requests=requests)
            lookup = Lookup(
                self.requests.live, self.blocks.packed_table, self.jobs.microbatches, self.jobs.jobs, self.jobs.owners
            )
            result = self.runner.run(plan, lookup)
            watcher.begin("taking what an iteration gave", requests=requests)
            self._commit(plan, result)
            self._counts["host_s"] += self.now() - began - waiting - result.waited_s
            return True

    def _use_idle_time(self, now: float) -> bool:
        """After a while without work, prepares what later work will need, piece by piece; False if there is nothing to do."""
        self._idle_since_s = min(self._idle_since_s, now)
        if not self.device.is_cuda or now - self._idle_since_s < _IDLE_S:
            return False
        self._loop.watcher.begin("capturing a decode pass")
        return self.device.capture_next()

    def _holds(self, plan: StepPlan) -> tuple[list[str], list[str]]:
        """Labels of the requests and of the jobs in a plan, without repeats."""
        live, jobs, owners = self.requests.live, self.jobs.jobs, self.jobs.owners
        requests = {live[span.request].handle.label: None for span in plan.spans if span.request in live}
        numbers = [owners.get(work.microbatch, -1) for work in plan.units]
        numbers += [part.job for part in plan.optimizer] + [copy.job for copy in plan.copies]
        return list(requests), list({jobs[number].handle.label: None for number in numbers if number in jobs})

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        now = self.now()
        ids = {number: [sampled.token for sampled in tokens] for number, tokens in result.tokens.items()}
        self.scheduler.commit(plan, ids, now)
        self._count(plan, result)
        for ended in result.ended:
            self.scheduler.observe(*ended)
            self._count_time(*ended)
        if any(ended.plan is plan for ended in result.ended):
            self._device_free_s = now
        elif ids:  # its pass is over
            self._device_free_s = now + self.scheduler.rest_seconds(plan)
        else:  # the one before is over, or nothing ran
            self._device_free_s = now + plan.predicted_s
        self.requests.apply(plan, result, now)

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        counts = self._counts
        counts["iterations"] += 1
        counts["inference_tokens"] += sum(map(len, result.tokens.values()))
        counts["prompt_tokens"] += sum(span.length for span in plan.prefill)
        counts["finetune_tokens"] += self.jobs.count(plan)

    def _count_time(self, plan: StepPlan, seconds: float) -> None:
        counts, share = self._counts, plan.finetune_share
        counts["busy_s"] += seconds
        counts["finetune_busy_s"] += share * seconds
        counts["inference_busy_s"] += (1 - share) * seconds

    def start(self) -> Engine:
        """Gives the engine a thread of its own; returns the engine."""
        give_team_back()  # the OpenMP threads with which the calling thread loaded the model and measured
        self._loop.start(self.step, self._fail)
        return self

    def close(self) -> None:
        """Stops the thread, cancels requests, makes each job write a checkpoint to resume from, waits until files are written,
        and frees the pool's memory."""
        self._loop.stop()
        with self._loop.lock:
            self._loop.close()
            self.requests.cancel(list(self.requests.live))
            self.jobs.stop_all()
        self.adapters.close()
        self.grammars.close()
        self.scheduler.admission.seats = Seats()
        self.jobs.close()
        with contextlib.suppress(RankFailed):  # what it held has gone with it
            self.device.release()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fail(self, error: CoserveError) -> None:
        self.requests.fail_all(error)
        self.jobs.fail_all(error)

    def _step_or_wait(self) -> None:
        """Runs an iteration, or leaves a moment to the engine's thread."""
        if self._loop.has_thread or not self.step():
            time.sleep(1e-3)

    # --- what is going on ---

    @property
    def closed(self) -> bool:
        """Whether the engine accepts no more requests or jobs: it was closed, or an error stopped it."""
        return self._loop.closed

    @property
    def failure(self) -> CoserveError | None:
        """The error that ended the engine's thread, or None. When `wait_failed` returns, all requests and jobs have it."""
        return self._loop.failure

    def wait_failed(self, timeout: float | None = None) -> bool:
        """Blocks until an error ends the engine's thread: True. False if it is closed first, or after `timeout` seconds."""
        return self._loop.ended.wait(timeout) and self._loop.failure is not None

    @property
    def idle(self) -> bool:
        """Whether there is no request and no job."""
        return not self.requests.live and not self.jobs.jobs and not len(self._loop)

    def load_report(self) -> EngineReport:
        """What one more request would wait here, and what the engine holds; rates are since the report before. For one thread
        at a time, beside the engine's own, whose iterations go on meanwhile."""
        if self._reporter is None:
            self._reporter = LoadReporter(
                self.config, self.scheduler, self.blocks, self.adapters, busy_s=lambda: self._counts["inference_busy_s"],
                finished=lambda: self.requests.num_finished + self.requests.num_cancelled,
                live=lambda: len(self.requests.live) + len(self._loop), clock=self.now,
            )
        return self._reporter.report()

    def metrics(self) -> dict[str, Any]:
        """Counters since the start, and the present state. finetune_tokens: as JobProgress.trained_tokens. *_s: seconds.
        prediction_errors: relative, by kind of iteration. unit_shapes: how many units of each shape have run."""
        pool = self.blocks.stats()
        return {
            **self._counts, "requests_finished": self.requests.num_finished, "requests_cancelled": self.requests.num_cancelled,
            "running": self.scheduler.num_running, "waiting": self.scheduler.num_waiting, "jobs": len(self.jobs.jobs),
            "preemptions": self.scheduler.admission.num_preemptions,
            "prediction_errors": {kind: e._asdict() for kind, e in self.scheduler.latency.errors().items()},
            "reserve": self.scheduler.latency.reserve(),
            "unit_shapes": [{**shape._asdict(), "count": count} for shape, count in self.jobs.shapes.copy().items()],
            "adapters": list(self.adapters.names), "adapter_versions": self.adapters.num_versions,
            "adapters_resident": self.adapters.num_resident, "adapters_waiting": self.adapters.num_waiting,
            "memory": {**pool._asdict(), "block_bytes": self.device.pool.block_bytes},
        }
