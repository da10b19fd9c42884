"""A job's manifest, jobs/ID/request.json: the truth about the job, from which the index can be rebuilt.

After a crash there is either the old file or the new one. Owns: the form of the file. Does not own: when it is written
(jobs/service.py), what else is in a job's directory (jobs/outputs.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from coserve.core import InvalidRequest
from coserve.durable import write_file
from coserve.server.index.disk import storage_errors
from coserve.server.records import JobRecord

MANIFEST_FILE = "request.json"
SCHEMA_VERSION = 1
_JOB_ID = re.compile(r"ftjob-[0-9a-f]{24}")
_log = logging.getLogger(__name__)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What the file holds."""

    schema_version: int
    job: JobRecord


def is_job_id(text: str) -> bool:
    """Whether a text can be the id of a job."""
    return _JOB_ID.fullmatch(text) is not None


def write_manifest(directory: Path, record: JobRecord) -> None:
    """Replaces the manifest in an existing directory. Raises CapacityError if it can't be written; the old one stays."""
    data = msgspec.json.format(msgspec.json.encode(Manifest(schema_version=SCHEMA_VERSION, job=record)), indent=2)
    with storage_errors():
        write_file(directory / MANIFEST_FILE, data + b"\n")


def read_manifest(directory: Path) -> JobRecord:
    """The job of the manifest in a directory. Raises InvalidRequest if there is none, or it can't be read."""
    try:
        manifest = msgspec.json.decode((directory / MANIFEST_FILE).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidRequest(f"{directory / MANIFEST_FILE} can't be read ({error})") from error
    if manifest.schema_version != SCHEMA_VERSION or manifest.job.id != directory.name:
        raise InvalidRequest(
            f"{directory / MANIFEST_FILE} is of schema version {manifest.schema_version} and job {manifest.job.id}; expected "
            f"version {SCHEMA_VERSION} and job {directory.name}"
        )
    return manifest.job


def find_manifests(root: Path) -> Iterator[JobRecord]:
    """All jobs below `root` by their manifests, oldest first. One that can't be read is logged and left out."""
    records = []
    for directory in root.glob("ftjob-*"):
        if not is_job_id(directory.name) or not (directory / MANIFEST_FILE).exists():
            continue  # a creation that was cut short: nobody was told of the job
        try:
            records.append(read_manifest(directory))
        except InvalidRequest as error:
            _log.warning("a job is left out: %s", error)
    yield from sorted(records, key=lambda record: (record.created_at, record.id))
