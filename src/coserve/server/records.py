"""Rows of the job index, as plain frozen records. Times are Unix seconds."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Literal

JobStatus = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
ENDED: tuple[JobStatus, ...] = ("succeeded", "failed", "cancelled")


def new_id(prefix: str) -> str:
    """'file-...', 'ftjob-...': 24 random characters of [0-9a-f]."""
    return f"{prefix}-{secrets.token_hex(12)}"


def now() -> int:
    """Unix seconds."""
    return int(time.time())


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """An uploaded or resulting file; its bytes are at files/ID/content below the data directory."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A finetuning job.

    base: the model's name as the user gave it.
    config: a FinetuneConfig as a dictionary.
    method: OpenAI's object of this name, as it was given or from defaults.
    settings: the fields of the request's body that OpenAI doesn't have, as they were given.
    start: the adapter that training starts from; None: a new one.
    """

    id: str
    tenant: str
    created_at: int
    base: str
    training_file: str
    config: dict[str, Any]
    method: dict[str, Any]
    status: JobStatus = "validating_files"
    paused: bool = False
    validation_file: str | None = None
    start: str | None = None
    suffix: str | None = None
    seed: int = 0
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    started_at: int | None = None
    error: dict[str, Any] | None = None
    trained_tokens: int | None = None
    step: int = 0
    num_steps: int = 0
    result_files: tuple[str, ...] = ()
    integrations: tuple[dict[str, Any], ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    priority: int = 0
    weight: float = 1.0
    deadline: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """Something that happened in a job. seq: rises within the job. step: a metrics event's; each step has only one."""

    id: str
    job: str
    seq: int
    created_at: int
    level: Literal["info", "warn", "error"]
    type: Literal["message", "metrics"]
    message: str
    data: dict[str, Any] | None = None
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint that is whole on disk, and that is served as a model of its own.

    Of a replica's job, directory is the key of its adapter in the artifact store, and its digests are kept. state_sha256: of
    what the job goes on from. epoch: of the job. bytes: of that state; the adapter's own count in its row.
    """

    id: str
    job: str
    created_at: int
    step: int
    model: str
    directory: str
    metrics: dict[str, Any]
    epoch: int = 0
    sha256: str = ""
    state_sha256: str = ""
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """A model name that stands for an adapter. tenant: '' for everybody (--lora-modules). job: which one made it, or None.

    Of replicas, directory is a key of the artifact store. version: rises whenever the name gets other files. sha256: of the
    files. epoch: of the job that made it. bytes: of the files.
    """

    name: str
    tenant: str
    directory: str
    created_at: int
    job: str | None = None
    version: int = 0
    sha256: str = ""
    epoch: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """An API key: only its digest is kept. prefix: its first characters, to tell keys apart."""

    id: str
    tenant: str
    prefix: str
    digest: str
    created_at: int
    revoked_at: int | None = None
