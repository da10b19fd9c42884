"""The programs that are measured: coserve, and vLLM beside transformers + peft on the same processors.

Owns: starting them, letting one configuration run while all others are halted, ending them. Does not own: what is asked of them
and when (observe.py, versus.py). A configuration is started when it is first measured, and stays: halted, its processes keep
their memory and take no processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coserve.bench.loads import CompletionClient, PromptLoad, Send, run_load
from coserve.bench.metrics import SloInMs
from coserve.bench.observe import Trainer
from coserve.bench.servers import ProcessGroup, last_words, running_process, running_server, served_model
from coserve.bench.trainers import CoserveTrainer, JobData, PeftTrainer
from coserve.bench.vllmserver import vllm_command, vllm_variables
from coserve.cachedir import CACHE_VARIABLE

COSERVE, VLLM = "coserve", "vllm"
SERVE = (sys.executable, "-m", "coserve", "serve")
PEFT_TRAIN = (sys.executable, "-m", "coserve.bench.pefttrain")
WARMUP_TOKENS = 8
"""Output tokens of the requests after a start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What serves (COSERVE or VLLM), and on which processors it and the training run.

    pinned: both are tied to theirs; else only vLLM's threads are. peft has a thread for each of its processors; coserve trains
    itself.
    """

    name: str
    server: str
    serve_cores: tuple[int, ...]
    train_cores: tuple[int, ...]
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalSetup:
    """What all configurations have in common."""

    model: Path
    """A directory in Hugging Face's format."""
    vllm: Path | str | None
    """Its environment, the URL of one that runs, or None."""
    data: JobData
    directory: Path
    """For logs and data; it exists."""
    dtype: str
    objectives: SloInMs
    timeout_s: float
    """A request that takes longer has failed."""
    warmup: tuple[tuple[int, ...], ...]
    """Prompts that a server is sent at once after its start."""
    serve: tuple[str, ...] = SERVE
    """The command `coserve serve`."""
    peft_train: tuple[str, ...] = PEFT_TRAIN
    """The command of bench/pefttrain.py."""


class RivalMissing(RuntimeError):
    """A configuration that can't be measured; the message says why, in one line."""


class Rival(NamedTuple):
    """A configuration that has been started. servers: the server's processes, which are known unless it was there before."""

    send: Send
    servers: tuple[ProcessGroup, ...]
    trainer: Trainer

    def processor_seconds(self) -> float:
        """Of all its processes so far."""
        training = (self.trainer.group,) if isinstance(self.trainer, PeftTrainer) else ()
        return sum(group.processor_seconds() for group in (*self.servers, *training))


class Rivals:
    """All configurations of a measurement; leaving the context ends their processes."""

    def __init__(self, setup: RivalSetup) -> None:
        self._setup = setup
        self._stack = contextlib.ExitStack()
        self._started: dict[str, Rival] = {}

    def __enter__(self) -> Rivals:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def running(self, configuration: Configuration) -> Iterator[Rival]:
        """Lets a configuration run inside the block, with its training under way.

        Raises RivalMissing if vLLM can't be started, RuntimeError if coserve can't, if training ends, or if a process that was
        halted used a processor.
        """
        name = configuration.name
        rival = self._started[name] = self._started.get(name) or self._start(configuration)
        try:
            for group in rival.servers:
                group.resume()
            rival.trainer.start()
            yield rival
            rival.trainer.stop()
        finally:
            for group in rival.servers:
                group.halt()

    def _start(self, configuration: Configuration) -> Rival:
        """Its server, which has answered requests, and then its trainer, if that is a process of its own."""
        setup = self._setup
        with contextlib.ExitStack() as stack:
            if configuration.server == COSERVE:
                url, servers = self._coserve(configuration, stack)
            else:
                url, servers = self._vllm(configuration, stack)
            client = CompletionClient(url, served_model(url), setup.timeout_s)
            load = PromptLoad(prompts=setup.warmup, output_tokens=WARMUP_TOKENS, clients=len(setup.warmup))
            records = asyncio.run(run_load(client.send, load, time.monotonic))
            if not any(record.finished for record in records):
                failure = RuntimeError if configuration.server == COSERVE else RivalMissing
                raise failure(f"{configuration.server} at {url} answered none of the {len(records)} requests after its start")
            trainer: Trainer = (
                CoserveTrainer(url, served_model(url), setup.data) if configuration.server == COSERVE
                else self._peft(configuration, stack)
            )
            self._stack.push(stack.pop_all())
        return Rival(client.send, servers, trainer)

    def _coserve(self, configuration: Configuration, stack: contextlib.ExitStack) -> tuple[str, tuple[ProcessGroup, ...]]:
        """Its URL and processes. The objectives and the dtype are what is compared; all else is its default. It measures at its
        start what rows and units cost: a profile in the cache may stem from a busier hour."""
        setup = self._setup
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coserve-data-", dir=setup.directory)))
        command = [
            *setup.serve, str(setup.model), "--device", "cpu", "--dtype", setup.dtype,
            "--slo-tpot-ms", f"{setup.objectives.tpot_ms:g}", "--slo-ttft-ms", f"{setup.objectives.ttft_ms:g}",
            "--data-dir", str(place / "data"),
        ]
        variables = {**os.environ, CACHE_VARIABLE: str(place / "cache")}
        server = stack.enter_context(running_server(command, self._file(configuration, "server.log"), variables))
        return server.url, (server.group,)

    def _vllm(self, configuration: Configuration, stack: contextlib.ExitStack) -> tuple[str, tuple[ProcessGroup, ...]]:
        """Its URL, and its processes if it is started here. Raises RivalMissing."""
        setup, log = self._setup, self._file(configuration, "server.log")
        assert setup.vllm is not None
        if isinstance(setup.vllm, str):
            return setup.vllm, ()
        cores = configuration.serve_cores
        try:
            server = stack.enter_context(running_server(
                vllm_command(setup.vllm, setup.model, setup.dtype), log, vllm_variables(cores),
                cores if configuration.pinned else None,
            ))
        except (OSError, RuntimeError) as error:
            raise RivalMissing(f"vLLM did not start: {last_words(log)} (all that it said: {log})") from error
        return server.url, (server.group,)

    def _peft(self, configuration: Configuration, stack: contextlib.ExitStack) -> PeftTrainer:
        setup, cores = self._setup, configuration.train_cores
        output, log = self._file(configuration, "peft.jsonl"), self._file(configuration, "peft.log")
        output.unlink(missing_ok=True)
        command = [
            *setup.peft_train, str(setup.model), str(setup.data.path), str(output), "--threads", str(len(cores)),
            "--dtype", setup.dtype, "--batch", str(setup.data.batch_size),
        ]
        process = stack.enter_context(running_process(command, log, cores=cores if configuration.pinned else None))
        return PeftTrainer(ProcessGroup(process.pid), output, log)

    def _file(self, configuration: Configuration, kind: str) -> Path:
        name = "".join(letter if letter.isalnum() else "-" for letter in configuration.name)
        return self._setup.directory / f"{name}-{kind}"
