"""What trains beside a server: a job of coserve's own, or transformers + peft in a process of its own.

Owns: letting it train, what it has trained so far. Does not own: the processes (rivals.py), the window (observe.py). Both count
the data's tokens without padding. peft's count once their forward and backward pass are done; coserve's count half after
forward and half after backward, which take about as long.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

from coserve.bench.counters import read_counters
from coserve.bench.driver import TokensDone
from coserve.bench.observe import SILENT_S
from coserve.bench.servers import REASON_CHARACTERS, ProcessGroup, last_words
from coserve.bench.workload import ALPHA, LEARNING_RATE, RANK
from coserve.core import one_line

FINETUNE_TOKENS = "coserve_finetune_tokens_total"
LOOK_S = 0.2
ENDLESS = 100_000
"""Optimizer steps: more than any measurement takes."""


class JobData(NamedTuple):
    """What a job trains on: a JSON Lines file, and its examples per optimizer step."""

    path: Path
    batch_size: int


class PeftTrainer:
    """bench/pefttrain.py in a process of its own, which is halted when it isn't wanted. output: its lines of progress."""

    def __init__(self, group: ProcessGroup, output: Path, log: Path) -> None:
        self.group, self._output, self._log = group, output, log
        self._read = 0

    def start(self) -> None:
        self.group.resume()
        self.poll()
        known, deadline = self._read, time.monotonic() + SILENT_S
        while self._size() == known:
            if time.monotonic() > deadline:
                raise RuntimeError(f"transformers + peft has trained nothing in {SILENT_S:.0f} s")
            self._require_alive()
            time.sleep(LOOK_S)

    def poll(self) -> list[TokensDone]:
        self._require_alive()
        if not self._output.exists():
            return []
        with self._output.open() as file:
            file.seek(self._read)
            lines = file.read().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        self._read += sum(map(len, whole))
        return [TokensDone(entry["time_s"], entry["tokens"]) for entry in map(json.loads, whole)]

    def stop(self) -> None:
        self._require_alive()
        self.group.halt()

    def _size(self) -> int:
        return self._output.stat().st_size if self._output.exists() else 0

    def _require_alive(self) -> None:
        if not self.group.alive():
            raise RuntimeError(f"transformers + peft has ended: {last_words(self._log)}")


class CoserveTrainer:
    """A job of a server, created through its API with the openai client; a new one each time."""

    def __init__(self, url: str, model: str, data: JobData) -> None:
        from openai import OpenAI

        self._url, self._model, self._data = url, model, data
        self._client = OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0, timeout=SILENT_S)
        self._file: str | None = None
        self._job: str | None = None

    def start(self) -> None:
        if self._file is None:
            self._file = self._client.files.create(file=self._data.path, purpose="fine-tune").id
        before = self._tokens()
        self._job = self._client.fine_tuning.jobs.create(
            model=self._model, training_file=self._file,
            method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": self._data.batch_size}}},
            extra_body={"rank": RANK, "alpha": ALPHA, "learning_rate": LEARNING_RATE, "max_steps": ENDLESS,
                        "checkpoint_steps": ENDLESS, "too_long": "truncate"},
        ).id
        deadline = time.monotonic() + SILENT_S
        while self._tokens() == before:
            if time.monotonic() > deadline:
                raise RuntimeError(f"coserve has trained nothing in {SILENT_S:.0f} s")
            time.sleep(LOOK_S)

    def poll(self) -> list[TokensDone]:
        tokens = self._tokens()
        return [TokensDone(time.monotonic(), tokens)]

    def stop(self) -> None:
        job = self._client.fine_tuning.jobs.retrieve(self._job or "")
        if job.status != "running":
            said = "" if job.error is None else f": {one_line(ValueError(job.error.message), REASON_CHARACTERS)}"
            raise RuntimeError(f"coserve's job was {job.status} at the end of the window{said}")
        self._client.fine_tuning.jobs.cancel(job.id)
        deadline = time.monotonic() + SILENT_S
        while self._client.fine_tuning.jobs.retrieve(job.id).status == "running" and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def _tokens(self) -> float:
        try:
            return read_counters(self._url, [FINETUNE_TOKENS])[FINETUNE_TOKENS]
        except (OSError, KeyError) as error:
            raise RuntimeError(f"coserve's /metrics tells no {FINETUNE_TOKENS}: {one_line(error)}") from error
