"""coserve.Engine without HTTP, in a process of its own: takes loads over a pipe and answers with records.

The process's main thread loads the model and runs the engine's iterations, so that it has one team of OpenMP threads. The
requests of a load are tasks of the same thread, which get their turn between two iterations.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from coserve import Engine, SamplingConfig, load_model
from coserve.bench.loads import PromptLoad, Reply, run_load
from coserve.bench.metrics import RequestRecord
from coserve.bench.servers import START_S, ProcessGroup
from coserve.core import CoserveError

IDLE_S = 1e-3
"""Between two looks for work."""


@dataclass(frozen=True, slots=True)
class EngineChild:
    """The process, from outside."""

    group: ProcessGroup
    connection: Connection

    def run(self, load: PromptLoad) -> list[RequestRecord]:
        """Runs a load. Raises EOFError if the process has died."""
        self.connection.send(load)
        records: list[RequestRecord] = self.connection.recv()
        return records


@contextlib.contextmanager
def running_engine(dtype: str) -> Iterator[EngineChild]:
    """Starts the process with the default model, waits until it takes loads, and ends it afterwards. Raises RuntimeError."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_loads, args=(theirs, dtype), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    child = EngineChild(ProcessGroup(process.pid), ours)
    try:
        try:
            ready = ours.poll(START_S) and ours.recv() == "ready"
        except EOFError:
            ready = False
        if not ready:
            raise RuntimeError("the process of the engine without HTTP did not start; its error is printed above")
        yield child
    finally:
        process.kill()
        process.join()
        ours.close()


def serve_loads(connection: Connection, dtype: str) -> None:
    """The process's whole life: says "ready", then answers each load with its records until the pipe is closed."""
    os.setsid()
    with contextlib.closing(Engine(load_model(device="cpu", dtype=dtype))) as engine:
        connection.send("ready")
        with contextlib.suppress(EOFError):
            while True:
                connection.send(asyncio.run(run_in_process(engine, connection.recv())))


async def run_in_process(engine: Engine, load: PromptLoad) -> list[RequestRecord]:
    """Runs a load through an engine that has no thread of its own."""

    async def send(prompt: Sequence[int], output_tokens: int) -> Reply:
        try:
            handle = engine.submit(prompt, SamplingConfig(max_tokens=output_tokens, temperature=0.0, ignore_eos=True))
        except CoserveError as error:
            return Reply((), str(error))
        while not handle.finished:
            await asyncio.sleep(0)
        return Reply(tuple(handle.token_times), None if handle.error is None else str(handle.error))

    async def iterate() -> None:
        while True:
            await asyncio.sleep(0 if engine.step() else IDLE_S)

    async with asyncio.TaskGroup() as group:  # an error of the engine ends the load too
        iterations = group.create_task(iterate())
        records = await run_load(send, load, engine.now)
        iterations.cancel()
    return records
