"""The engine as one replica's jobs see it: each run of a job has a name of its own there, JOB-eEPOCH.

So what a run says that this replica has lost isn't taken for words of the present one, and both may be in the engine at once,
as long as the engine needs to end the old one. A run's adapter has a name of its own too: nobody asks for it, since requests
use published versions. Owns: names of runs, which of them the engine has. Does not own: what becomes of jobs (runner.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from coserve.core import CoserveError
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.messages import JobEnded, JobHappened
from coserve.server.link.process import EngineEnd
from coserve.server.replicas.helping import JobHelp

_RUN = re.compile(r"(.+)-e(\d+)")


def run_name(job: str, epoch: int) -> str:
    """Of the run of a job under an epoch; its directory has this name too."""
    return f"{job}-e{epoch}"


class RunsEngine:
    """An engine, for a JobRunner. It belongs to the event loop. epochs: tells under which epoch this replica has a job. help:
    of other replicas with jobs that several may share; None: there is none."""

    def __init__(self, engine: EngineClient, epochs: Callable[[str], int | None], help: JobHelp | None = None) -> None:
        self._engine, self._epochs, self._help = engine, epochs, help
        self._listeners: list[Callable[[JobHappened | JobEnded], None]] = []
        self._runs: dict[str, asyncio.Event] = {}
        self._adapters: dict[str, str] = {}
        engine.on_job(self._hear)
        engine.supervisor.on_down(self._forget)

    @property
    def ready(self) -> bool:
        return self._engine.ready

    @property
    def generation(self) -> int:
        return self._engine.generation

    @property
    def supervisor(self) -> RunsEngine:
        return self

    @property
    def last_end(self) -> EngineEnd | None:
        """How the last process ended, with jobs in the place of runs. Those that this replica has lost are left out."""
        end = self._engine.supervisor.last_end
        if end is None:
            return None
        return end._replace(jobs=tuple(job for run in end.jobs if (job := self._job_of(run)) is not None))

    def on_down(self, listener: Callable[[], None]) -> None:
        """As Supervisor's."""
        self._engine.supervisor.on_down(listener)

    def on_job(self, listener: Callable[[JobHappened | JobEnded], None]) -> None:
        """As EngineClient's, for the jobs that this replica has."""
        self._listeners.append(listener)

    async def start_job(
        self, *, members: int = 1, note: Callable[[str], None] = lambda line: None, **fields: Any
    ) -> None:
        """As EngineClient's. The job's directory names the run. members: replicas that may share it. note: takes lines about
        them."""
        run, job = Path(fields["directory"]).parent.name, str(fields["id"])
        adapter = f"{fields['adapter']}@{run}"
        epoch = self._epochs(job)
        if members > 1 and self._help is not None and epoch is not None:
            fields["share"] = self._help.host(run, job, epoch, members, note)
        self._runs[run], self._adapters[run] = asyncio.Event(), adapter
        starting = asyncio.ensure_future(self._engine.start_job(**fields | {"id": run, "adapter": adapter}))
        starting.add_done_callback(lambda done: self._end(run) if done.cancelled() or done.exception() else None)
        await asyncio.shield(starting)  # whoever waits may give up, and the engine has the run all the same

    def act_job(self, job: str, action: str) -> None:
        """As EngineClient's."""
        epoch = self._epochs(job)
        if epoch is not None:
            self._engine.act_job(run_name(job, epoch), action)

    def has(self, run: str) -> bool:
        """Whether the engine has a run, or is about to get it."""
        return run in self._runs

    async def end_run(self, run: str) -> None:
        """Ends a run, if it hasn't ended. Returns when the engine has nothing of it any more, neither work nor adapter."""
        ended = self._runs.get(run)
        if ended is not None:
            with contextlib.suppress(CoserveError):  # the engine is down, and so is the run
                self._engine.act_job(run, "cancel")
            await ended.wait()
        adapter = self._adapters.pop(run, None)
        if adapter is not None and self._engine.ready:
            with contextlib.suppress(CoserveError):  # it has published none
                await self._engine.unload_adapter(adapter)

    def _job_of(self, run: str) -> str | None:
        """The job of a run that is the present one."""
        match = _RUN.fullmatch(run)
        return match[1] if match and self._epochs(match[1]) == int(match[2]) else None

    def _hear(self, message: JobHappened | JobEnded) -> None:
        job = self._job_of(message.id)
        if isinstance(message, JobEnded):
            self._end(message.id)
        if job is not None:
            told = msgspec.structs.replace(message, id=job)
            for listener in self._listeners:
                listener(told)

    def _end(self, run: str) -> None:
        if self._help is not None:
            self._help.end(run)
        ended = self._runs.pop(run, None)
        if ended is not None:
            ended.set()

    def _forget(self) -> None:
        for run in list(self._runs):
            self._end(run)
        self._adapters.clear()
