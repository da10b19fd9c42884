"""What a runner of jobs needs of the engine and of the models around it. A single server has EngineClient and ModelRegistry; a
replica of a fleet has its own (server/replicas/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from coserve.server.link.messages import JobEnded, JobHappened
from coserve.server.link.process import EngineEnd
from coserve.server.records import AdapterRecord


class EngineLife(Protocol):
    """The life of the engine's process, as Supervisor tells it."""

    @property
    def last_end(self) -> EngineEnd | None:
        """How the last process ended."""

    def on_down(self, listener: Callable[[], None]) -> None:
        """The listener is called when a process that was ready has died or is ended."""


class JobEngine(Protocol):
    """The engine that jobs run in, as EngineClient tells it."""

    @property
    def ready(self) -> bool:
        """Whether it takes jobs."""

    @property
    def generation(self) -> int:
        """The number of starts."""

    @property
    def supervisor(self) -> EngineLife:
        """The life of its process."""

    def on_job(self, listener: Callable[[JobHappened | JobEnded], None]) -> None:
        """The listener is called with every event of every job."""

    async def start_job(self, **fields: Any) -> None:
        """Returns when the job may get units. fields: those of StartJob, without `call`."""

    def act_job(self, job: str, action: str) -> None:
        """Pauses, resumes, cancels or hands over a job."""


class JobModels(Protocol):
    """The names of models, and which adapters the engine holds."""

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base model."""

    def note_loaded(self, record: AdapterRecord, generation: int) -> None:
        """The engine has the adapter already, because a job has published it."""

    async def drop_loaded(self, tenant: str, name: str) -> None:
        """Unloads an adapter from the engine, if it is there."""
