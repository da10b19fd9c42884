"""The engine's process: python -m coserve.server.link.enginemain. It reads an EngineSetup from its standard input.

The input stays open: its end says that the API process has gone, and then this process ends at once. An error in the engine's
thread ends this process too, and the API process starts another one. Owns: this process's life: the lock on the data directory,
loading, the order of ending.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

from coserve.config.settings import EngineConfig
from coserve.config.values import require
from coserve.core import CoserveError, RankFailed
from coserve.engine.engine import Engine
from coserve.engine.poolsize import pool_bytes
from coserve.model.checkpoint import expected_shapes
from coserve.model.memory import weight_bytes
from coserve.runtime.loaded import LoadedModel, dtype_name, load_model
from coserve.server import logs
from coserve.server.link.activity import ENGINE, SOCKET, ActivityPage, CallPlaces, start_pulse
from coserve.server.link.enginehost import EngineHost, make_problem
from coserve.server.link.mailbox import Mailbox
from coserve.server.link.messages import Progress, Ready, Replied, ToEngine
from coserve.server.link.setup import (
    ACTIVITY_FILE,
    STACKS_FILE,
    STACKS_SIGNAL,
    START_CALL,
    STOP_S,
    STOP_SIGNALS,
    EngineSetup,
    end_with,
    read_setup,
)
from coserve.server.locks import hold
from coserve.server.settings import ServerConfig

LOCK_FILE = "engine.lock"
LOCK_WAIT_S = 30.0
"""Seconds that the engine before this one gets to end."""
_log = logging.getLogger(__name__)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def max_model_len(engine: Engine, asked: int | None) -> int:
    """The most tokens of prompt and output together that a request may have. Raises ConfigError if more are asked for."""
    blocks = engine.blocks
    limits = {
        "the model's positions": engine.model.architecture.max_position_embeddings,
        "what the key-value cache guarantees": blocks.guaranteed_blocks * blocks.block_tokens,
    }
    for what, limit in limits.items():
        require(asked is None or asked <= limit, "max_model_len", f"{asked} exceeds {what}, {limit} tokens; lower it")
    return min([*limits.values(), *([] if asked is None else [asked])])


def make_ready(engine: Engine, asked: int | None, start_s: float) -> Ready:
    """What the API process learns of a started engine. Raises ConfigError as `max_model_len`."""
    model, blocks, size = engine.model, engine.blocks, engine.device.pool.block_bytes
    arch, weights = model.architecture, model.weights
    return Ready(
        model=model.name, directory=str(model.directory), fingerprint=model.fingerprint, architecture=arch.model_type,
        num_parameters=sum(math.prod(shape) for shape in expected_shapes(arch).values()), vocab_size=arch.vocab_size,
        max_model_len=max_model_len(engine, asked), hidden_size=arch.hidden_size, device=weights.device.type,
        dtype=dtype_name(weights.dtype), quantization=weights.quantization, threads=torch.get_num_threads(), start_s=start_s,
        objectives=engine.objectives,
        memory={
            "weights": weight_bytes(weights.architecture, weights.dtype.itemsize, weights.quantization),
            "pool": blocks.num_blocks * size, "inference": blocks.guaranteed_blocks * size,
            "training": (blocks.num_blocks - blocks.guaranteed_blocks) * size,
        },
    )


class EngineProcessMain:
    """What the process does. page: where threads say what they do. failure: the error that has ended a thread."""

    def __init__(self, config: ServerConfig, mailbox: Mailbox, page: ActivityPage) -> None:
        self.config, self.mailbox, self.page = config, mailbox, page
        self.failure: BaseException | None = None

    def report(self, line: str) -> None:
        """Sends a line about the start at once."""
        self.mailbox.post(Progress(line=line))
        self.mailbox.flush()

    def load(self) -> LoadedModel:
        """The model that the settings name."""
        config = self.config
        torch.set_num_threads(config.threads or num_cores())
        self.report(f"loading {config.model or 'the default model'} ...")
        model = load_model(
            config.model, device=config.device, dtype=config.dtype, report=self.report,
            tensor_parallel_size=config.tensor_parallel_size, quantization=config.quantization,
        )
        if config.chat_template is not None:  # for the data of jobs. Ranks know the model by its identity: no copy will do
            model.tokenizer.use_template(config.chat_template)
        return model

    def run(self) -> None:
        """Loads the model, then serves until Shutdown or until a thread fails. Raises what keeps the engine from starting."""
        began = time.monotonic()
        model = self.load()
        config = self.config
        pool = pool_bytes(
            model, config.engine_config(on_gpu=model.device.type == "cuda"), gpu_share=config.gpu_memory_utilization,
            report=self.report,
        )
        settings = config.engine_config(pool, on_gpu=model.device.type == "cuda")
        engine = self.make_engine(model, settings)
        engine.grammars.prepare()  # which keeps Python's lock for a moment
        ready = make_ready(engine, self.config.max_model_len, time.monotonic() - began)
        threading.excepthook = self._thread_failed
        host = EngineHost(engine, self.mailbox.post, self.mailbox.stop, self.mailbox.watch_load, CallPlaces(self.page))
        place = self.page.place(SOCKET)

        def on_message(message: ToEngine) -> None:
            place.begin(f"taking a message ({type(message).__name__})")
            host.on_message(message)
            place.end()

        with contextlib.closing(model), engine:
            start_pulse(self.page)
            self.mailbox.post(ready)
            self.mailbox.flush()
            self.mailbox.run(on_message)
            place.begin("the end: jobs write their checkpoints", STOP_S)
        host.close()

    def make_engine(self, model: LoadedModel, settings: EngineConfig) -> Engine:
        """The engine that is served."""
        return Engine(model, settings, clock=time.monotonic, report=self.report, watcher=self.page.place(ENGINE))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        name = "a thread" if failure.thread is None else f"thread {failure.thread.name}"
        error = failure.exc_value or failure.exc_type()
        self.failure = error
        if isinstance(error, RankFailed):
            _log.critical("%s", error)
            self.mailbox.post(Replied(call=START_CALL, problem=make_problem(error)))
        else:
            _log.critical("%s of the engine process failed: %r", name, error, exc_info=error)
        self.mailbox.stop()


def open_page(setup: EngineSetup) -> ActivityPage:
    """The page on which this process's threads say what they do. From now on STACKS_SIGNAL writes their stacks.

    A crash writes the stack of its own thread only: another one may run on and change its frames while they are read, so that
    reading them crashes too.
    """
    if not setup.watch:
        return ActivityPage(None)
    directory = Path(setup.watch)
    stacks = os.open(directory / STACKS_FILE, os.O_WRONLY | os.O_APPEND)  # open to the end
    faulthandler.enable(stacks, all_threads=False)
    faulthandler.register(STACKS_SIGNAL, stacks, all_threads=True)
    return ActivityPage(directory / ACTIVITY_FILE)


def main(process_of: type[EngineProcessMain] = EngineProcessMain) -> int:
    """Returns the exit code: 0 after Shutdown, 1 otherwise. process_of: a subclass, in tests of hangs."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    setup = read_setup(sys.stdin.buffer.readline())
    end_with(sys.stdin.buffer, setup.watch)
    logs.configure("engine", format=setup.config.log_format, level=setup.config.log_level)
    page = open_page(setup)
    with Mailbox(setup.address) as mailbox:
        process = process_of(setup.config, mailbox, page)
        try:
            lock, waits = setup.config.data_dir / LOCK_FILE, "waiting for the engine before this one to end ..."
            with hold(lock, timeout_s=LOCK_WAIT_S, waiting=lambda: process.report(waits)):
                process.run()
        except Exception as error:
            if not isinstance(error, (CoserveError, OSError)):
                _log.critical("the engine process failed: %r", error, exc_info=error)
            mailbox.post(Replied(call=START_CALL, problem=make_problem(error)))
            return 1
    if isinstance(process.failure, RankFailed) and process.failure.signal == signal.SIGKILL:
        os.kill(os.getpid(), signal.SIGKILL)  # this process ends as its rank: whatever it worked on is not to blame
    return 0 if process.failure is None else 1


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # a call may still run in the pool; nobody waits for it
