"""Jobs, events and checkpoints as OpenAI's objects, and the words of a job's events.

Owns: their fields, what a job is called, metrics of a step. Does not own: rows (records.py), when something happens
(service.py).
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coserve.core import CapacityError, ConfigError, CoserveError, InvalidRequest, JobFailed, NotFound
from coserve.finetune.job import StepRow
from coserve.server.records import CheckpointRecord, EventRecord, JobRecord

_RESULT_COLUMNS = {
    "step": "step", "train_loss": "train_loss", "train_accuracy": "train_mean_token_accuracy", "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy", "learning_rate": "learning_rate", "grad_norm": "grad_norm",
    "tokens": "tokens", "seconds": "seconds",
}
"""Columns of a result file, and StepRow's fields."""
_ERROR_CODES: tuple[tuple[type[CoserveError], str], ...] = (
    (JobFailed, "job_failed"), (CapacityError, "insufficient_memory"), (ConfigError, "invalid_hyperparameters"),
    (InvalidRequest, "invalid_request"), (NotFound, "not_found"),
)
_FILE_CODES = {"training_file": "invalid_training_file", "validation_file": "invalid_validation_file"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a running job is. finish: its estimated end in Unix seconds."""

    tokens_per_second: float
    finish: int


def tuned_name(record: JobRecord, base: str, organization: str) -> str:
    """ft:BASE:ORGANIZATION:SUFFIX:ID. Slashes and colons of the base's name are left out; dots of the suffix become dashes."""
    suffix = (record.suffix or "").replace(".", "-")
    last = base.rstrip("/").rpartition("/")[2]
    return f"ft:{re.sub(r'[^A-Za-z0-9._-]', '-', last)}:{organization}:{suffix}:{record.id[-8:]}"


def job_object(record: JobRecord, organization: str, pace: Pace | None) -> dict[str, Any]:
    """OpenAI's fine_tuning.job, with fields of ours behind it. pace: None where it isn't known."""
    numbers = record.method[record.method["type"]]["hyperparameters"]
    return {
        "id": record.id, "object": "fine_tuning.job", "created_at": record.created_at, "model": record.base,
        "status": record.status, "fine_tuned_model": record.fine_tuned_model, "finished_at": record.finished_at,
        "error": record.error, "organization_id": organization, "result_files": list(record.result_files), "seed": record.seed,
        "trained_tokens": record.trained_tokens, "training_file": record.training_file,
        "validation_file": record.validation_file, "estimated_finish": None if pace is None else pace.finish,
        "integrations": [dict(item) for item in record.integrations], "metadata": dict(record.metadata),
        "method": dict(record.method),
        "hyperparameters": {name: numbers[name] for name in ("batch_size", "learning_rate_multiplier", "n_epochs")},
        "suffix": record.suffix, "paused": record.paused, "step": record.step, "num_steps": record.num_steps,
        "tokens_per_second": None if pace is None else pace.tokens_per_second, "started_at": record.started_at,
        "priority": record.priority, "weight": record.weight, "deadline": record.deadline, "settings": dict(record.settings),
    }


def event_object(record: EventRecord) -> dict[str, Any]:
    """OpenAI's fine_tuning.job.event."""
    return {
        "id": record.id, "object": "fine_tuning.job.event", "created_at": record.created_at, "level": record.level,
        "message": record.message, "type": record.type, "data": record.data,
    }


def checkpoint_object(record: CheckpointRecord) -> dict[str, Any]:
    """OpenAI's fine_tuning.job.checkpoint."""
    return {
        "id": record.id, "object": "fine_tuning.job.checkpoint", "created_at": record.created_at,
        "fine_tuned_model_checkpoint": record.model, "fine_tuning_job_id": record.job, "step_number": record.step,
        "metrics": dict(record.metrics),
    }


def step_metrics(row: Mapping[str, float | int | None]) -> dict[str, Any]:
    """A checkpoint's metrics from a StepRow's fields. Validation is always on the whole file, so its names are full_valid_*."""
    names = ("step", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
    found = {name: row[name] for name in names if row.get(name) is not None}
    return found | {f"full_{name}": value for name, value in found.items() if name.startswith("valid_")}


def step_data(row: Mapping[str, float | int | None], num_steps: int) -> dict[str, Any]:
    """The data of a metrics event."""
    return {**step_metrics(row), "learning_rate": row.get("learning_rate"), "total_steps": num_steps}


def step_message(row: Mapping[str, float | int | None], num_steps: int) -> str:
    """'Step 3/40: training loss=1.2345', and the validation loss if there is one."""
    valid = "" if row.get("valid_loss") is None else f", validation loss={row['valid_loss']:.4f}"
    return f"Step {row['step']}/{num_steps}: training loss={row['train_loss']:.4f}{valid}"


def error_object(error: CoserveError) -> dict[str, Any]:
    """Why a job failed: {code, message, param}."""
    code = _FILE_CODES.get(error.param or "") if isinstance(error, InvalidRequest | NotFound) else None
    code = code or next((code for kind, code in _ERROR_CODES if isinstance(error, kind)), "server_error")
    return {"code": code, "message": str(error), "param": error.param}


def result_csv(rows: Iterable[StepRow]) -> bytes:
    """The result file: a line per optimizer step."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_RESULT_COLUMNS)
    for row in rows:
        values = (getattr(row, name) for name in _RESULT_COLUMNS.values())
        writer.writerow(["" if value is None else repr(value) for value in values])
    return text.getvalue().encode()
