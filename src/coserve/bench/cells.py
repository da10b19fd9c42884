"""Finished cells on disk, so that a stopped benchmark goes on where it was.

Owns: the files DIR/cells/LABEL-DIGEST.json. The digest is of the settings that a cell's result depends on: with other
settings it is another cell.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from coserve.bench.driver import Run, TokensDone
from coserve.bench.machine import MachineRecord
from coserve.bench.metrics import RequestRecord
from coserve.durable import write_file


class CellStore:
    """Cells of one benchmark. common: settings that all cells depend on; listen: told each cell's label before it is run."""

    def __init__(self, directory: Path, common: Mapping[str, Any], listen: Callable[[str, bool], None]) -> None:
        self._directory, self._common, self._listen = directory / "cells", dict(common), listen
        self.expected_s: float | None = None
        """Seconds that the next cell may take; None where that isn't known."""

    def get(self, label: str, settings: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The stored result of a cell, or `run`'s, stored. An unreadable file is run again."""
        key, path = self._key(label, settings), self.path(label, settings)
        try:
            stored = json.loads(path.read_text())["result"]
            self._listen(label, True)
            return dict(stored)
        except (OSError, ValueError, KeyError, TypeError):
            self._listen(label, False)
        result = run()
        self._directory.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps({"settings": json.loads(key), "result": result}) + "\n").encode(), cached=True)
        return result

    def path(self, label: str, settings: Mapping[str, Any]) -> Path:
        """Where a cell is stored."""
        name = "".join(c if c.isalnum() or c in "-." else "_" for c in label)
        digest = hashlib.sha256(self._key(label, settings).encode()).hexdigest()[:12]
        return self._directory / f"{name}-{digest}.json"

    def _key(self, label: str, settings: Mapping[str, Any]) -> str:
        return json.dumps({"label": label, **self._common, **settings}, sort_keys=True)


def record_to_dict(record: RequestRecord) -> dict[str, Any]:
    """Plain JSON types; times to a hundredth of a millisecond."""
    times = [round(at, 5) for at in record.token_times]
    return {**asdict(record), "due_s": round(record.due_s, 5), "token_times": times}


def record_from_dict(data: Mapping[str, Any]) -> RequestRecord:
    """Reads what `record_to_dict` wrote."""
    return RequestRecord(**{**data, "token_times": tuple(data["token_times"])})


def run_to_dict(run: Run) -> dict[str, Any]:
    """Plain JSON types."""
    data = asdict(replace(run, machine=None))
    data["records"] = [record_to_dict(record) for record in run.records]
    data["samples"] = [list(sample) for sample in run.samples]
    data["machine"] = None if run.machine is None else run.machine.to_dict()
    return data


def run_from_dict(data: Mapping[str, Any]) -> Run:
    """Reads what `run_to_dict` wrote."""
    records = tuple(map(record_from_dict, data["records"]))
    machine = None if data.get("machine") is None else MachineRecord.from_dict(data["machine"])
    samples = tuple(TokensDone(*s) for s in data["samples"])
    return Run(**{**data, "records": records, "samples": samples, "machine": machine})
