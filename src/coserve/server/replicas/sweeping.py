"""Deletes what a job that has ended has left in the artifact store and no row names: the adapter that it continued, what lost
runs and a cancelled one had sent, checkpoints whose deletion the store refused.

Owns: what stays, trying again. Does not own: when a job has ended (jobs.py, desk.py), keys (parcels.py).
"""

from __future__ import annotations

import asyncio
import logging

from sqlalchemy import select

from coserve.server.errors import StorageRefused
from coserve.server.index.store import Store
from coserve.server.index.tables import adapters, checkpoints, jobs
from coserve.server.records import ENDED
from coserve.server.replicas.artifacts import ArtifactStore
from coserve.server.replicas.parcels import checkpoint_key, export_keys, job_key

PAUSES_S = (10.0, 60.0, 600.0)
"""Seconds between two tries while the store or the index refuses."""
_log = logging.getLogger(__name__)


async def sweep_job(store: Store, artifacts: ArtifactStore, job: str) -> None:
    """Deletes it, if the job has ended. To be called when nothing more of the job is being sent from here."""
    for pause_s in (*PAUSES_S, None):
        try:
            await asyncio.to_thread(_sweep, store, artifacts, job)
            return
        except StorageRefused as error:
            _log.warning("what the job has left in the artifact store can't be deleted: %s", error, extra={"job": job})
        if pause_s is not None:
            await asyncio.sleep(pause_s)


def _sweep(store: Store, artifacts: ArtifactStore, job: str) -> None:
    with store.database.read() as connection:
        row = connection.execute(select(jobs.c.status, jobs.c.epoch).where(jobs.c.id == job)).first()
        if row is None or row.status not in ENDED:
            return
        named = [
            key for table in (checkpoints, adapters)
            for key in connection.execute(select(table.c.directory).where(table.c.job == job)).scalars()
        ]
    artifacts.sweep(job_key(job), {*map(checkpoint_key, named), *export_keys(job, row.epoch)})
