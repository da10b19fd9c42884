"""Engines for the benchmark: one per policy, and `spatial`, which is two processes on one machine.

Owns: how an engine is made for a policy, the second process and what is told about it. `spatial` serves in this process and
trains in a child with a model of its own, each with its own threads; on a GPU each takes its own part of the memory.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from coserve.bench.driver import BenchEngine, DrivenJob, Handle
from coserve.bench.machine import MachineRecord
from coserve.bench.metrics import SloInMs
from coserve.bench.recording import RecordedEngine
from coserve.bench.sharing import SPATIAL
from coserve.config.settings import EngineConfig, FinetuneConfig, SamplingConfig, SchedulerConfig
from coserve.core import CoserveError, JobFailed
from coserve.engine.engine import Engine
from coserve.runtime.loaded import LoadedModel, load_model

START_S = 300.0
"""Longest wait for the child to load its model and start its job."""
GPU_SHARE = 0.45
"""Of the GPU memory that is free before both start, for each of the two processes' pools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """What to load, in load_model's words, and the threads of all processes that share it."""

    name: str | None
    device: str
    dtype: str
    threads: int
    tensor_parallel_size: int = 1
    quantization: str = "none"

    def set_threads(self, model: LoadedModel) -> None:
        """Gives each of the processes that share the model its part of the threads."""
        count = max(1, self.threads // self.tensor_parallel_size)
        if model.processes is None:
            torch.set_num_threads(count)
        else:
            model.processes.call(torch.set_num_threads, count)


class EngineMaker:
    """Makes an engine per policy over one loaded model. spatial_threads: of inference and of finetuning."""

    def __init__(self, model: LoadedModel, choice: ModelChoice, spatial_threads: tuple[int, int]) -> None:
        self.model, self.choice, self.spatial_threads = model, choice, spatial_threads

    def __call__(self, policy: str, objectives: SloInMs) -> BenchEngine:
        self.choice.set_threads(self.model)
        gc.collect()  # the last engine's pool is free when the engine, a web of references, is collected
        if policy != SPATIAL:
            return RecordedEngine(Engine(self.model, _config(policy, objectives)))
        serving, training = self.spatial_threads
        memory = None
        if self.model.weights.device.type == "cuda":
            memory = int(torch.cuda.mem_get_info(self.model.weights.device)[0] * GPU_SHARE)
        replace(self.choice, threads=serving).set_threads(self.model)
        engine = Engine(self.model, _config("inference-only", objectives, memory))
        return SpatialEngine(engine, replace(self.choice, threads=training), objectives, memory)


def _config(policy: str, objectives: SloInMs, memory_bytes: int | None = None) -> EngineConfig:
    scheduler = SchedulerConfig(policy=policy, tpot_ms=objectives.tpot_ms, ttft_ms=objectives.ttft_ms)
    return EngineConfig(scheduler=scheduler, memory_bytes=memory_bytes)


class SpatialEngine:
    """Serves here, trains in a child: the interface of one engine over both."""

    def __init__(self, engine: Engine, child: ModelChoice, objectives: SloInMs, memory_bytes: int | None) -> None:
        self._engine, self._child, self._objectives, self._memory_bytes = engine, child, objectives, memory_bytes
        self._job: ChildJob | None = None

    def submit(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Handle:
        return self._engine.submit(prompt_ids, sampling)

    def step(self) -> bool:
        return self._engine.step()

    def finetune(self, data_path: Path, output_dir: Path, config: FinetuneConfig, *, name: str) -> DrivenJob:
        """Starts the child and waits until it trains. Raises JobFailed if it doesn't."""
        engine_config = _config("finetune-only", self._objectives, self._memory_bytes)
        self._job = ChildJob(self._child, engine_config, data_path, output_dir, config)
        return self._job

    def now(self) -> float:
        return self._engine.now()

    def metrics(self) -> Mapping[str, Any]:
        return {**self._engine.metrics(), "finetune_tokens": self._job.tokens if self._job is not None else 0.0}

    def machine(self) -> MachineRecord | None:
        """None: neither process has the machine for itself."""
        return None

    def close(self) -> None:
        if self._job is not None:
            self._job.cancel()
        self._engine.close()


class ChildJob:
    """A finetune-only engine in a process of its own."""

    def __init__(
        self, choice: ModelChoice, engine_config: EngineConfig, data_path: Path, output_dir: Path, config: FinetuneConfig
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._tokens = context.Value("d", 0.0)
        self._stop, training = context.Event(), context.Event()
        arguments = (choice, engine_config, str(data_path), str(output_dir), config, self._tokens, training, self._stop)
        self._process: SpawnProcess = context.Process(target=train_in_child, args=arguments, daemon=True)
        self._process.start()
        waited = 0.0
        while not training.wait(0.5):
            waited += 0.5
            if waited > START_S or not self._process.is_alive():
                self.cancel()
                raise JobFailed("bench: the finetuning process of policy spatial did not start training")

    @property
    def tokens(self) -> float:
        return float(self._tokens.value)

    @property
    def finished(self) -> bool:
        return not self._process.is_alive()

    @property
    def error(self) -> CoserveError | None:
        return JobFailed("the finetuning process has ended") if self.finished else None

    def cancel(self) -> None:
        """Asks the child to end, and ends it if it doesn't."""
        self._stop.set()
        self._process.join(10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()


def train_in_child(
    choice: ModelChoice, engine_config: EngineConfig, data_path: str, output_dir: str, config: FinetuneConfig,
    tokens: Any, training: Any, stop: Any,
) -> None:
    """The child's whole life: load, train until told to stop, and tell how far it is after each iteration."""
    torch.set_num_threads(choice.threads)
    model = load_model(
        choice.name, device=choice.device, dtype=choice.dtype, tensor_parallel_size=choice.tensor_parallel_size,
        quantization=choice.quantization,
    )
    with contextlib.closing(model), contextlib.closing(Engine(model, engine_config)) as engine:
        job = engine.finetune(Path(data_path), Path(output_dir), config, name="bench")
        while not stop.is_set() and not job.finished:
            engine.step()
            tokens.value = float(engine.metrics()["finetune_tokens"])
            if tokens.value > 0:
                training.set()
        job.cancel()
