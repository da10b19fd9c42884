"""A job's way from validating_files to queued: its data are read, and every 'auto' becomes a number.

Owns: which jobs are being read, what their events say, trying again while the disk refuses. Does not own: reading (data.py),
what 'auto' means (spec.py), the job's changes (runner.py).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from coserve.config.data import finetune_config_from_dict, to_dict
from coserve.core import CoserveError
from coserve.server.errors import StorageRefused
from coserve.server.jobs.data import DataReader
from coserve.server.jobs.journal import RETRY_S
from coserve.server.jobs.outputs import JobOutputs
from coserve.server.jobs.queue import UnfinishedJob
from coserve.server.jobs.runner import JobRunner
from coserve.server.jobs.spec import resolve
from coserve.server.link.messages import Ready

_log = logging.getLogger(__name__)


class DataValidation:
    """Reads the data of a runner's jobs. It belongs to the event loop. info: tells what the engine has said of itself."""

    def __init__(self, runner: JobRunner, outputs: JobOutputs, reader: DataReader, info: Callable[[], Ready]) -> None:
        self._runner, self._outputs, self._reader, self._info = runner, outputs, reader, info
        self._reading: set[str] = set()

    def begin(self, live: UnfinishedJob) -> None:
        """Begins to read a job's data, unless they are being read. Afterwards the job is queued, or it has failed."""
        if live.record.id not in self._reading:
            self._reading.add(live.record.id)
            self._runner.spawn(self._read(live), live)

    def cancel(self, job: str) -> None:
        """Ends the reading of a job's data."""
        self._reader.cancel(job)

    async def _again(self, live: UnfinishedJob) -> None:
        """Tries again after a while, since the disk or the index refuses for now, which is no fault of the job."""
        await asyncio.sleep(RETRY_S)
        if self._runner.live.get(live.record.id) is live and live.record.status == "validating_files":
            self.begin(live)

    async def _read(self, live: UnfinishedJob) -> None:
        record, runner, info = live.record, self._runner, self._info()

        def begin() -> None:
            for kind, id in (("training", record.training_file), ("validation", record.validation_file)):
                if id is not None:
                    runner.note(record.id, f"Validating {kind} file: {id}")

        try:
            await asyncio.to_thread(self._outputs.prepare, record)
            training, validation = await asyncio.to_thread(self._outputs.data_files, record)
            config = finetune_config_from_dict(record.config)
            report = await self._reader.read(
                record.id, record.tenant, Path(info.directory), config, training, validation, begin=begin
            )
            if report is None:
                return  # cancelled
            start = self._outputs.start_directory(record)
            continued = None if start is None else await asyncio.to_thread(self._outputs.continued, start)
            resolved = resolve(config, report.num_examples, continued=continued, hidden_size=info.hidden_size or None)
        except StorageRefused as error:
            _log.warning("the files of a job can't be validated yet: %s", error, extra={"job": record.id})
            runner.spawn(self._again(live))
            return
        except CoserveError as error:
            await runner.fail(live, error)
            return
        finally:
            self._reading.discard(record.id)
        if runner.live.get(record.id) is not live:
            return  # cancelled meanwhile
        for warning in report.warnings:
            runner.note(record.id, warning, level="warn")
        runner.note(record.id, f"Files validated, moving job to queued state: {report.summary}")
        runner.change(
            live, manifest=True, status="queued", config=to_dict(resolved.config), method=resolved.method,
            num_steps=resolved.num_steps,
        )
        runner.advance()
