"""The engine: requests and finetuning jobs on one model, in one process. Each iteration: schedule -> execute -> commit.

    any thread: submit, cancel, finetune --inbox--> the engine's thread: step() --handles--> whoever waits

Drive it by calling `step`, or `start` a thread. Owns: the life of requests and jobs. Does not own: what an iteration holds
(scheduler/), how it runs (step.py), how a job proceeds (jobs.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Executor as ThreadExecutor
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingConfig
from coserve.core import (
    AdapterCopy,
    CapacityError,
    ConfigError,
    CoserveError,
    InvalidRequest,
    NotFound,
    StepPlan,
    StepResult,
)
from coserve.engine.adapters import AdapterRegistry
from coserve.engine.batchwork import Microbatch
from coserve.engine.budget import GIB, available_bytes, shape_adapter
from coserve.engine.finetuning import PreparedJob, prepare_beside
from coserve.engine.jobs import JobHandle, LiveJob
from coserve.engine.model import LoadedModel
from coserve.engine.profiling import latency_model
from coserve.engine.requests import Chunk, LiveRequest, RequestHandle
from coserve.engine.step import Lookup, StepRunner
from coserve.finetune.datasets import Dataset
from coserve.finetune.job import JobEvent
from coserve.peft.lora import LoraAdapter
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.cache import KeyValuePool, block_bytes
from coserve.runtime.executor import TrainExecutor
from coserve.runtime.fused import PassExecutor
from coserve.runtime.microbatch import microbatch_layout
from coserve.runtime.plans import scoring_plan, training_plan
from coserve.runtime.spans import NO_ADAPTER
from coserve.scheduler.arenas import Arena
from coserve.scheduler.blocks import BlockPool
from coserve.scheduler.hybrid import HybridScheduler
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.scheduler.work import MicrobatchWork
from coserve.textstream import TextStream

DEFAULT_POOL_SHARE = 0.4
"""Share of the free memory that the pool takes if nothing is said."""
SMALLEST_WINDOW = 32
_IDLE_WAIT_S = 0.05


class Runner(Protocol):
    """What executes plans; tests have one without tensors."""

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        """One iteration."""


class Engine:
    """Serves and finetunes on `model`.

    latency: the model of iteration times; None profiles the machine once (cached). clock: seconds, rising. runner: None runs on
    the device. Raises ConfigError, CapacityError.
    """

    def __init__(
        self, model: LoadedModel, config: EngineConfig | None = None, *, latency: LatencyModel | None = None,
        clock: Callable[[], float] = time.perf_counter, runner: Runner | None = None,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.config, self.clock = model, config or EngineConfig(), clock
        arch, weights, blocks = model.architecture, model.weights, self.config.block_tokens
        size = block_bytes(arch, blocks, weights.dtype.itemsize)
        num_blocks = self._pool_bytes() // size
        if num_blocks < 1:
            raise CapacityError(f"memory_bytes: one block of the key-value cache takes {size} bytes", param="memory_bytes")
        self.blocks = BlockPool(
            num_blocks, blocks, guaranteed_blocks=-(-int(num_blocks * self.config.inference_share * 1000) // 1000),
            caching=self.config.prefix_caching,
        )
        self.pool = KeyValuePool(arch, num_blocks, blocks, weights.dtype, weights.device)
        slots = AdapterSlots(
            arch, weights.dtype, weights.device, max_slots=self.config.max_adapters, max_rank=self.config.max_lora_rank
        )
        self.adapters = AdapterRegistry(slots, lambda version: self.blocks.forget(version.name, version.number))
        self.train = TrainExecutor(model.executor)
        self.passes = PassExecutor(model.executor, self.train, self.pool, slots, cuda_graphs=self.config.cuda_graphs)
        self.runner: Runner = runner or StepRunner(self.passes, self.train, clock)
        if latency is None:
            latency = latency_model(self.passes, self.train, self.blocks, self.config.scheduler, model.fingerprint, report)
        self.scheduler = HybridScheduler(self.config.scheduler, latency, self.blocks, arch.num_layers)
        self._requests: dict[int, LiveRequest] = {}
        self._jobs: dict[int, LiveJob] = {}
        self._microbatches: dict[int, Microbatch] = {}
        self._owners: dict[int, int] = {}
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._numbers = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = self._closed = False
        self._host = _JobHost(self)
        self._counts: dict[str, float] = dict.fromkeys(
            ("iterations", "inference_tokens", "prompt_tokens", "finetune_tokens", "busy_s", "inference_busy_s",
             "finetune_busy_s", "requests_finished", "requests_cancelled"), 0.0,
        )

    def _pool_bytes(self) -> int:
        if self.config.memory_bytes is not None:
            return self.config.memory_bytes
        available = available_bytes(self.model.weights.device)
        if available is None:
            raise ConfigError("memory_bytes: the free memory can't be told here; give it", param="memory_bytes")
        return int(available * DEFAULT_POOL_SHARE)

    # --- requests ---

    def now(self) -> float:
        """The engine's clock, in seconds."""
        return self.clock()

    def submit(
        self, prompt: Sequence[int] | str, sampling: SamplingConfig | None = None, *, adapter: str | None = None,
        tenant: str = "", tpot_ms: float | None = None, ttft_ms: float | None = None, arrival_s: float | None = None,
    ) -> RequestHandle:
        """Takes a request: token ids, or a text to continue. Thread-safe.

        tpot_ms, ttft_ms: its own objectives. arrival_s: when it is counted from; default now. tenant: whose fair share it uses
        and whose prefixes it may share. Raises InvalidRequest, NotFound (adapter), CapacityError (too many wait).
        """
        config, limits = sampling or SamplingConfig(), self.config.scheduler
        ids = self.model.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
        self._check(ids, config)
        if adapter is not None and adapter not in self.adapters.names:
            raise NotFound(
                f"adapter: there is no {adapter!r}; loaded: {', '.join(self.adapters.names) or 'none'}", param="adapter"
            )
        present = len(self._requests) + len(self._inbox)
        if present >= self.config.max_waiting + limits.max_num_seqs:
            raise CapacityError(f"{present} requests are running or waiting; try again later", param="max_waiting")
        numbers: list[int] = []
        handle = RequestHandle(
            ids, config, self.now() if arrival_s is None else arrival_s, lambda: self._post(lambda: self._cancel(numbers))
        )
        objectives = ((tpot_ms or limits.tpot_ms) / 1e3, (ttft_ms or limits.ttft_ms) / 1e3)
        self._post(lambda: self._admit(handle, adapter, tenant, objectives, numbers))
        return handle

    def generate(
        self, prompts: Sequence[Sequence[int] | str], sampling: SamplingConfig | None = None, **options: Any
    ) -> list[RequestHandle]:
        """Submits prompts and waits for all of them. options: as for `submit`. Raises the first error of any."""
        handles: list[RequestHandle] = []
        try:
            for prompt in prompts:
                handles.append(self.submit(prompt, sampling, **options))
            for handle in handles:
                self._drive(lambda handle=handle: handle.finished)  # type: ignore[misc]
                if handle.error is not None:
                    raise handle.error
        except BaseException:  # nobody will ask for the others
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def stream(self, prompt: Sequence[int] | str, sampling: SamplingConfig | None = None, **options: Any) -> Iterator[Chunk]:
        """Submits a prompt; yields its chunks as they come. Leaving the iterator early cancels the request."""
        handle = self.submit(prompt, sampling, **options)
        try:
            yield from handle.chunks(None if self._thread is not None else self._step_or_wait)
        finally:
            handle.cancel()

    async def astream(
        self, prompt: Sequence[int] | str, sampling: SamplingConfig | None = None, **options: Any
    ) -> AsyncIterator[Chunk]:
        """`stream` for asyncio. The engine must have been started."""
        if self._thread is None:
            raise ConfigError("astream: start() the engine first: it needs a thread of its own")
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Chunk]()
        handle = self.submit(prompt, sampling, **options)

        def hear(chunk: Chunk) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(inbox.put_nowait, chunk)

        handle.listen(hear)
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

    def _check(self, ids: Sequence[int], config: SamplingConfig) -> None:
        arch = self.model.architecture
        if not ids:
            raise InvalidRequest("prompt: is empty; give at least one token", param="prompt")
        if min(ids) < 0 or max(ids) >= arch.vocab_size:
            raise InvalidRequest(f"prompt: token ids must be from 0 to {arch.vocab_size - 1}", param="prompt")
        for name, tokens in (("logit_bias", config.logit_bias), ("stop_token_ids", config.stop_token_ids)):
            if any(not 0 <= token < arch.vocab_size for token in tokens):
                raise InvalidRequest(f"{name}: token ids must be from 0 to {arch.vocab_size - 1}", param=name)
        total = len(ids) + config.max_tokens
        if total > arch.max_position_embeddings:
            raise InvalidRequest(
                f"prompt: {len(ids)} tokens and max_tokens {config.max_tokens} exceed the model's "
                f"{arch.max_position_embeddings}; shorten one of them", param="max_tokens",
            )
        room = self.blocks.guaranteed_blocks * self.blocks.block_tokens
        if total > room:
            raise InvalidRequest(
                f"prompt: {len(ids)} tokens and max_tokens {config.max_tokens} exceed the {room} tokens that the key-value "
                "cache is guaranteed; shorten one of them, or raise memory_bytes", param="max_tokens",
            )

    # --- adapters and jobs ---

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Loads an adapter in PEFT's format under a name that requests may ask for; a newer version if the name exists.

        Raises NotFound, InvalidRequest.
        """
        adapter = self.model.load_adapter(Path(directory))
        self._call(lambda: self.adapters.publish(name, adapter))

    def add_adapter(self, name: str, adapter: LoraAdapter) -> None:
        """The same from memory; `adapter` must not change afterwards."""
        self._call(lambda: self.adapters.publish(name, adapter))

    def unload_adapter(self, name: str) -> None:
        """Requests can't ask for it any more; those that use it go on. Raises NotFound."""
        self._call(lambda: self.adapters.remove(name))

    def finetune(
        self, data: str | Path, output: str | Path, config: FinetuneConfig | None = None, *, name: str | None = None,
        validation: str | Path | None = None, start: str | Path | None = None, resume: bool = False, tenant: str = "",
        weight: float = 1.0, listen: Callable[[JobEvent], None] = lambda event: None,
    ) -> JobHandle:
        """Starts a finetuning job beside the requests. Each checkpoint and the result can be asked for as adapter `name`.

        data, validation: JSON Lines files; output: the job's directory; start: an adapter to continue from; weight: its share
        among jobs. Raises InvalidRequest, NotFound, ConfigError, CapacityError before anything is written.
        """
        config, directory = config or FinetuneConfig(), Path(output)
        handle = JobHandle(name or directory.name, directory, lambda action: self._post(lambda: self._act(handle, action)))

        def hear(event: JobEvent) -> None:
            handle.listen(event)
            listen(event)

        if config.deterministic:
            raise ConfigError(
                "deterministic: an engine's windows follow its load; leave it out, or use coserve.finetune",
                param="deterministic",
            )
        lora = config.lora if start is None else self.model.load_adapter(Path(start)).config
        self._check_rank(lora)
        if any(job.handle.name == handle.name for job in list(self._jobs.values())):
            raise InvalidRequest(f"name: a job called {handle.name!r} is running; name another", param="name")
        prepared = prepare_beside(
            self.model, data, directory, config, validation=validation, start=start, resume=resume, listen=hear,
            check=lambda train, held_out: self._check_arenas(train, held_out, config, lora),
        )
        for plan in (prepared.trainer.plan, prepared.trainer.scoring):
            self.train.prepare(plan)
        handle.num_steps, handle.step = prepared.job.num_steps, prepared.job.cursor.step
        self._post(lambda: self._begin_job(prepared, handle, tenant, weight))
        return handle

    def _check_rank(self, lora: LoraConfig) -> None:
        """Refuses a job whose adapter could not be served."""
        rank = max((site.rank for site in shape_adapter(self.model.architecture, lora).sites), default=0)
        if rank > self.config.max_lora_rank:
            raise ConfigError(
                f"r: rank {rank} is over max_lora_rank={self.config.max_lora_rank}; raise that, or lower r", param="r"
            )

    def _check_arenas(self, train: Dataset, held_out: Dataset | None, config: FinetuneConfig, lora: LoraConfig) -> None:
        """Refuses a job whose largest micro-batch can't fit beside what inference is guaranteed."""
        arch, itemsize = self.model.architecture, self.model.weights.dtype.itemsize
        adapter = shape_adapter(arch, lora)
        largest = sorted((group.num_tokens for group in train.groups), reverse=True)[: config.batch_size]
        self._check_arena(config, sum(largest), training_plan(arch, adapter, itemsize=itemsize), forward_only=False)
        if held_out is not None:
            total = sum(group.num_tokens for group in held_out.groups)
            self._check_arena(config, total, scoring_plan(arch, adapter, itemsize=itemsize), forward_only=True)

    def _check_arena(self, config: FinetuneConfig, num_tokens: int, plan: ModelPlan, *, forward_only: bool) -> None:
        tokens = min(config.max_microbatch_tokens, num_tokens)
        itemsize = self.model.weights.dtype.itemsize
        needed = microbatch_layout(plan, tokens, self.model.architecture, itemsize, forward_only=forward_only).total
        room = (self.blocks.num_blocks - self.blocks.guaranteed_blocks) * self.pool.block_bytes
        if needed > room:
            raise CapacityError(
                f"max_microbatch_tokens: a micro-batch of {tokens} tokens needs {needed / GIB:.2f} GiB and jobs may have "
                f"{room / GIB:.2f} GiB of the pool; lower max_microbatch_tokens, or raise memory_bytes",
                param="max_microbatch_tokens",
            )

    def _begin_job(self, prepared: PreparedJob, handle: JobHandle, tenant: str, weight: float) -> None:
        self._numbers += 1
        job = LiveJob(self._numbers, prepared, handle, self._host, tenant=tenant, weight=weight)
        self._jobs[job.number] = job
        self.scheduler.add_job(job.work)

    def _act(self, handle: JobHandle, action: str) -> None:
        job = next((j for j in self._jobs.values() if j.handle is handle), None)
        if job is None or handle.finished:
            return
        if action == "cancel":
            job.cancel()
            self._remove_job(job)
            return
        job.work.paused = action == "pause"
        handle.status = "paused" if job.work.paused else "running"

    def _remove_job(self, job: LiveJob) -> None:
        del self._jobs[job.number]
        self.scheduler.remove_job(job.number)

    # --- iterations ---

    def step(self) -> bool:
        """One iteration; False if there was nothing to do. Not to be called while the engine has a thread."""
        with self._lock:
            self._drain()
            for job in list(self._jobs.values()):
                if not job.pump():
                    self._remove_job(job)
            plan = self.scheduler.schedule(self.now())
            if plan.empty:
                return False
            result = self.runner.run(plan, self._lookup())
            self._commit(plan, result)
            return True

    def _lookup(self) -> Lookup:
        return Lookup(self._requests, self.blocks.table, self._microbatches, self._jobs, self._owners)

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        now = self.now()
        ids = {number: [sampled.token for sampled in tokens] for number, tokens in result.tokens.items()}
        self.scheduler.commit(plan, ids, now, result.seconds)
        self._count(plan, result)
        starts = {span.request: span.start for span in plan.spans}
        for number, logprobs in result.prompt_logprobs.items():
            have = self._requests[number].handle.prompt_logprobs
            have += logprobs[len(have) - starts[number] :]  # after a preemption the prompt's rows run again
        for number, tokens in result.tokens.items():
            request = self._requests[number]
            if request.index == 0 and not request.handle.token_ids:
                request.handle.cached_tokens = request.state.cached_tokens
            for sibling in request.siblings:
                self.scheduler.add_request(sibling.state)
            request.siblings.clear()
            if request.accept(tokens, now):
                self._end_request(number)
                self._counts["requests_finished"] += 1

    def _count(self, plan: StepPlan, result: StepResult) -> None:
        counts, layers = self._counts, self.model.architecture.num_layers
        counts["iterations"] += 1
        counts["inference_tokens"] += sum(len(tokens) for tokens in result.tokens.values())
        counts["prompt_tokens"] += sum(span.length for span in plan.prefill)
        for work in plan.units:
            unit = work.unit
            tokens = (unit.end - unit.start) * (unit.layer_end - unit.layer_start) / layers / 2
            counts["finetune_tokens"] += tokens
            job = self._jobs.get(self._owners.get(work.microbatch, -1))
            if job is not None:
                job.handle.trained_tokens += tokens
        counts["busy_s"] += result.seconds
        share = self.scheduler.finetune_share_of(plan)
        counts["finetune_busy_s"] += share * result.seconds
        counts["inference_busy_s"] += (1 - share) * result.seconds

    def start(self) -> Engine:
        """Gives the engine a thread of its own; returns the engine."""
        if self._thread is None:
            self._closing = False
            self._thread = threading.Thread(target=self._loop, name="coserve-engine", daemon=True)
            self._thread.start()
        return self

    def close(self) -> None:
        """Stops the thread, cancels what is left and waits for files being written."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with self._wake:
                self._closing = True
                self._wake.notify()
            thread.join()
        with self._lock:
            with self._wake:
                self._closed = True
            self._drain()
            for job in list(self._jobs.values()):
                job.cancel()
                self._remove_job(job)
            self._cancel(list(self._requests))
        self._host.writer.shutdown()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loop(self) -> None:
        while not self._closing:
            try:
                worked = self.step()
            except Exception as error:  # a bug: nobody may wait for ever
                self._fail_all(error)
                raise
            if not worked:
                with self._wake:
                    if not self._inbox and not self._closing:
                        self._wake.wait(_IDLE_WAIT_S)

    def _fail_all(self, error: Exception) -> None:
        wrapped = error if isinstance(error, CoserveError) else CoserveError(f"the engine stopped: {error!r}")
        with self._wake:
            self._closed = True
        self._drain()
        for number in list(self._requests):
            request = self._requests[number]
            request.handle.error = wrapped
            request.end("error", self.now())
            self._end_request(number)
        for job in self._jobs.values():
            job.handle.close("failed", wrapped)

    def _drive(self, done: Callable[[], bool]) -> None:
        """Runs or waits until done."""
        while not done():
            self._step_or_wait()

    def _step_or_wait(self) -> None:
        if self._thread is not None or not self.step():
            time.sleep(1e-3)

    def _post(self, command: Callable[[], None]) -> None:
        """Has the engine's thread run a command before its next iteration."""
        with self._wake:
            if self._closed:
                raise CoserveError("the engine is closed")
            self._inbox.append(command)
            self._wake.notify()

    def _call(self, command: Callable[[], object]) -> None:
        """Runs a command between two iterations; raises what it raises."""
        if self._thread is None:
            with self._lock:
                command()
            return
        done: Future[object] = Future()  # a busy engine hardly ever leaves its lock to others

        def run() -> None:
            try:
                done.set_result(command())
            except Exception as error:
                done.set_exception(error)

        self._post(run)
        done.result()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    # --- the life of a request ---

    def _admit(
        self, handle: RequestHandle, adapter: str | None, tenant: str, objectives: tuple[float, float], numbers: list[int]
    ) -> None:
        config, arch = handle.config, self.model.architecture
        ending = frozenset(config.stop_token_ids) | (frozenset() if config.ignore_eos else frozenset(arch.eos_token_ids))
        lives: list[LiveRequest] = []
        for index in range(config.n):
            try:
                version, slot = (None, NO_ADAPTER) if adapter is None else self.adapters.acquire(adapter)
            except CoserveError as error:
                handle.error = error
                for live in lives:
                    self._release(live)
                for output in range(config.n):
                    handle.push(Chunk(index=output, text="", finish_reason="error"), self.now())
                return
            self._numbers += 1
            key = PrefixKey(tenant, None, 0) if version is None else PrefixKey(tenant, version.name, version.number)
            every_logit = config.prompt_logprobs is not None and index == 0
            state = RequestState(
                id=self._numbers, tenant=tenant, prompt=handle.prompt_ids, max_tokens=config.max_tokens, key=key,
                arrival_s=handle.arrival_s, tpot_s=objectives[0], ttft_s=objectives[1],
                cacheable=not every_logit, every_logit=every_logit,
            )
            stream = TextStream(self.model.tokenizer, config.stop)
            lives.append(LiveRequest(
                handle=handle, index=index, state=state, config=config, stream=stream, ending=ending, version=version, slot=slot
            ))
        numbers += [live.state.id for live in lives]
        self._requests |= {live.state.id: live for live in lives}
        lives[0].siblings += lives[1:]
        self.scheduler.add_request(lives[0].state)

    def _cancel(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            request = self._requests.get(number)
            if request is not None:
                request.end("cancelled", self.now())
                self._end_request(number)
                self._counts["requests_cancelled"] += 1

    def _end_request(self, number: int) -> None:
        request = self._requests.pop(number)
        self.scheduler.remove_request(number)
        for sibling in request.siblings:
            if sibling.state.id in self._requests:
                self.scheduler.add_request(sibling.state)
        self._release(request)

    def _release(self, request: LiveRequest) -> None:
        if request.version is not None:
            self.adapters.release(request.version)

    # --- what is going on ---

    @property
    def idle(self) -> bool:
        """Whether there is no request and no job."""
        return not self._requests and not self._jobs and not self._inbox

    def metrics(self) -> dict[str, Any]:
        """Counters since the start and the present state. finetune_tokens: forward-token equivalents, forward and backward
        counting half each; *_s: seconds; prediction_errors: by kind of iteration, relative."""
        pool = self.blocks.stats()
        return {
            **self._counts,
            "running": self.scheduler.num_running, "waiting": self.scheduler.num_waiting, "jobs": len(self._jobs),
            "preemptions": self.scheduler.num_preemptions,
            "prediction_errors": {kind: e._asdict() for kind, e in self.scheduler.latency.errors().items()},
            "reserve": self.scheduler.latency.reserve(),
            "adapters": list(self.adapters.names), "adapter_versions": self.adapters.num_versions,
            "memory": {**pool._asdict(), "block_bytes": self.pool.block_bytes},
        }


class _JobHost:
    """The engine as jobs see it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.max_microbatches = engine.config.scheduler.max_microbatches
        self.writer: ThreadExecutor = ThreadPoolExecutor(1, "coserve-writer")

    def reserve(self, num_bytes: int) -> tuple[Arena, Tensor] | None:
        engine = self.engine
        try:
            arena, moves = engine.blocks.reserve_arena(-(-num_bytes // engine.pool.block_bytes))
        except CapacityError:
            return None
        engine.pool.move(moves)
        return arena, engine.pool.arena(arena.first, arena.end)

    def release(self, arena: Arena) -> None:
        self.engine.blocks.release_arena(arena)

    def new_number(self) -> int:
        self.engine._numbers += 1
        return self.engine._numbers

    def microbatch_begun(self, number: int, micro: Microbatch, work: MicrobatchWork) -> None:
        self.engine._microbatches[number] = micro
        self.engine._owners[number] = work.job
        self.engine.scheduler.add_microbatch(work)

    def microbatch_closed(self, number: int) -> None:
        del self.engine._microbatches[number]
        job = self.engine.scheduler.jobs.get(self.engine._owners.pop(number))
        if job is not None:
            job.microbatches.pop(number, None)

    def copy_adapter(self, copy: AdapterCopy) -> None:
        self.engine.scheduler.copy_adapter(copy)

    def publish(self, name: str, adapter: LoraAdapter) -> None:
        self.engine.adapters.publish(name, adapter)

    def shrink_windows(self) -> bool:
        picker = self.engine.scheduler.picker
        if picker.max_window // 2 < SMALLEST_WINDOW:
            return False
        picker.max_window //= 2
        return True

