"""A body that creates a job, as the job's record.

Owns: what a new record holds, which files it may name, what is told of too many bytes. Does not own: what the body's fields
mean (spec.py), where records and files go (service.py, and server/replicas/desk.py).
"""

from __future__ import annotations

import dataclasses
import datetime

from coserve.config.data import to_dict
from coserve.config.settings import FinetuneConfig
from coserve.core import InvalidRequest, NotFound
from coserve.server.index.files import FINE_TUNE
from coserve.server.index.store import Store
from coserve.server.jobs.body import CreateJob
from coserve.server.jobs.spec import JobSpec
from coserve.server.records import FileRecord, JobRecord, new_id, now


def new_job(tenant: str, body: CreateJob, spec: JobSpec, *, continues: bool) -> JobRecord:
    """The record of a new job, whose files have to be validated. continues: whether body.model names an adapter."""
    created_at = now()
    config = dated(spec.config, created_at)
    return JobRecord(
        id=new_id("ftjob"), tenant=tenant, created_at=created_at, base=body.model, training_file=body.training_file,
        validation_file=body.validation_file, config=to_dict(config), method=spec.method, settings=spec.settings,
        start=body.model if continues else None, suffix=body.suffix, seed=config.seed, integrations=spec.integrations,
        metadata=body.metadata or {}, priority=body.priority or 0, weight=body.weight or 1.0, deadline=body.deadline,
    )


def dated(config: FinetuneConfig, created_at: int) -> FinetuneConfig:
    """The settings with a date for chat templates: the day of the job's creation, however late its data is read."""
    if config.template_date is not None:
        return config
    return dataclasses.replace(config, template_date=datetime.date.fromtimestamp(created_at).isoformat())


def find_data(store: Store, tenant: str, id: str, param: str) -> FileRecord:
    """The file that a field of a job's body names. Raises InvalidRequest naming the field."""
    try:
        record = store.get_file(tenant, id)
    except NotFound as error:
        raise InvalidRequest(f"{param}: there is no file {id[:64]}", param=param) from error
    if record.purpose != FINE_TUNE:
        raise InvalidRequest(f"{param}: {id} is of purpose {record.purpose}, not {FINE_TUNE}", param=param)
    return record


def disk_problem(held: int, most: int) -> str | None:
    """What to tell a tenant whose files, jobs and adapters take more bytes than they may; None if they don't."""
    if held <= most:
        return None
    return (f"your files, your jobs' checkpoints and adapters and the adapters you loaded take {held} bytes of the {most} "
            "that they may have together; delete files or models, or unload adapters, that you no longer need")
