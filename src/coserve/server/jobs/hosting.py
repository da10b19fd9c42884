"""What jobs need of the engine, the models and the files around them. A single server has EngineClient, ModelRegistry and
FileService; a replica of a fleet has its own (server/replicas/)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from coserve.server.link.messages import JobEnded, JobHappened
from coserve.server.link.process import EngineEnd
from coserve.server.records import AdapterRecord, FileRecord


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

    def add(self, record: AdapterRecord) -> None:
        """Serves a name from now on."""

    def remove(self, record: AdapterRecord) -> None:
        """Serves a name no longer."""

    def note_loaded(self, record: AdapterRecord, generation: int) -> None:
        """The engine has the adapter already, because a job has published it."""

    async def drop_loaded(self, tenant: str, name: str) -> None:
        """Unloads an adapter from the engine, if it is there."""


class JobFiles(Protocol):
    """Files that tenants have uploaded, and files that jobs have made."""

    def path(self, record: FileRecord) -> Path:
        """Where a file's bytes are."""

    def save_result(self, tenant: str, filename: str, content: bytes, *, id: str | None = None) -> FileRecord:
        """Keeps a file that a job has made. id: the new file's; a file with this id stays as it is."""
