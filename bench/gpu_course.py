"""The course of bench/gpu.sh: its parts one after another, each in a process of its own that can cost only itself.

    course --starts--> gpu_child.py PART --appends rows--> gpu_rows.jsonl
       |  <--what it prints, bounded--  |
       +-- gpu_log.txt, gpu_summary.json, gpu_table.txt, each up to date after every part

A part that runs out of its time is killed with every process that it started. A part that dies in one of its items is started
again for the items that it had not begun, while its time lasts. Standard library only: nothing that a part breaks is in use.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gpu_rows import BROKEN_DEVICE, close_line, read_rows

KEPT_HEAD = 256 << 10
"""Bytes of a part's output that go to the log as they come."""
KEPT_TAIL = 32 << 10
"""Bytes of the end of a part's output that are kept if there is more."""
LEAST_SHARE = 0.6
"""A part is skipped where less than this share of its planned time is left."""
LEAST_RESTART_S = 5.0
"""Seconds that must be left of a part for its remaining items to be tried in another process."""
KILLED_S = 10.0
"""Longest wait for a killed process to be gone: one that is inside the driver may take a while."""
TAIL_SHOWN = 3000
"""Characters of a failed part's output in the summary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """seconds: that it should take. limit_s: after so many it is killed. item_s: the same for one of its items. command: starts
    it; PART, --rows, --limit, --item-s and --skip are appended."""

    name: str
    seconds: float
    command: tuple[str, ...]
    limit_s: float
    item_s: float = 600.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a part. status: ok, failed or skipped. items: status by name. tail: the end of what it printed."""

    name: str
    planned_s: float
    status: str = "skipped"
    seconds: float = 0.0
    attempts: int = 0
    reasons: list[str] = field(default_factory=list)
    items: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    tail: str = ""


class Output:
    """Reads what a process prints, so that it never waits for a reader. The beginning goes to the log as it comes; of the rest
    only the end is kept."""

    def __init__(self, pipe: BinaryIO, log: Path) -> None:
        self._pipe, self._log, self._tail = pipe, log, deque[bytes]()
        self.total = self._logged = self._kept = 0
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._log.open("ab", buffering=0) as log:
            while data := self._pipe.read1(1 << 16):  # type: ignore[attr-defined]
                self.total += len(data)
                if self._logged < KEPT_HEAD:
                    self._logged += log.write(data[: KEPT_HEAD - self._logged])
                self._tail.append(data)
                self._kept += len(data)
                while self._kept - len(self._tail[0]) >= KEPT_TAIL:
                    self._kept -= len(self._tail.popleft())

    def end(self) -> str:
        """The end of the output. A process that left its group may hold the pipe open: it is not waited for."""
        self._thread.join(2.0)
        tail = b"".join(list(self._tail))[-KEPT_TAIL:]
        if self.total > self._logged:
            between = self.total - self._logged - len(tail)
            with self._log.open("ab") as log:
                log.write(b"\n... %d bytes ...\n" % max(0, between) + tail[-(self.total - self._logged) :])
        return tail.decode(errors="replace")


class Course:
    """Runs parts. folder: where the files go; budget_s: seconds for all of them; listen: called after each part."""

    def __init__(
        self, parts: Sequence[Part], folder: Path, budget_s: float, *, environment: Mapping[str, str],
        listen: Callable[[Course], None] = lambda course: None,
    ) -> None:
        self.parts, self.folder, self.listen = parts, folder, listen
        self.rows_path, self.log_path = folder / "gpu_rows.jsonl", folder / "gpu_log.txt"
        self.outcomes = [Outcome(name=part.name, planned_s=part.seconds) for part in parts]
        self.started, self.budget_s, self._environment = time.monotonic(), budget_s, dict(environment)
        self.running: str | None = None

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.started

    def run(self) -> int:
        """Runs all parts; 0: each is ok, 1: one failed, 2: none failed but one was skipped."""
        for part, outcome in zip(self.parts, self.outcomes, strict=True):
            left = self.budget_s - self.seconds
            if left < LEAST_SHARE * part.seconds:
                outcome.reasons.append(f"{left:.0f} s were left of {self.budget_s:.0f}")
            else:
                self.running = part.name
                self._part(part, outcome, min(part.limit_s, left))
                self.running = None
            self.listen(self)
        states = {outcome.status for outcome in self.outcomes}
        return 1 if "failed" in states else 2 if "skipped" in states else 0

    def _part(self, part: Part, outcome: Outcome, limit_s: float) -> None:
        begin = time.monotonic()
        accidents: list[str] = []
        try:
            while True:
                left = limit_s - (time.monotonic() - begin)
                before, outcome.attempts = len(outcome.items), outcome.attempts + 1
                ended = self._attempt(part, outcome, left)
                self._read(part, outcome)
                if ended is not None:
                    accidents.append(ended)
                left = limit_s - (time.monotonic() - begin)
                got_on = ended is not None and len(outcome.items) > before
                if not got_on or left < LEAST_RESTART_S or not self._to_do(outcome):
                    break
        finally:
            outcome.seconds = time.monotonic() - begin
            self._conclude(part, outcome, accidents)

    def _to_do(self, outcome: Outcome) -> set[str]:
        """Items that have not been begun."""
        named = {name for row in outcome.rows if row.get("event") == "items" for name in row["names"]}
        return named - outcome.items.keys()

    def _attempt(self, part: Part, outcome: Outcome, limit_s: float) -> str | None:
        """Runs a part's process to its end; how it ended, where that was an accident."""
        command = [
            *part.command, part.name, "--rows", str(self.rows_path), "--limit", f"{limit_s:.1f}",
            "--item-s", f"{part.item_s:g}", "--skip", ",".join(outcome.items),
        ]
        with self.log_path.open("a") as log:
            log.write(f"\n===== {part.name}, attempt {outcome.attempts}, at {self.seconds:.1f} s\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **self._environment},
        )
        assert process.stdout is not None
        output = Output(process.stdout, self.log_path)  # type: ignore[arg-type]
        late = False
        try:
            process.wait(max(0.1, limit_s))
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also what an ended process has left behind
            gone = True
            try:
                process.wait(KILLED_S)
            except subprocess.TimeoutExpired:
                gone = False
            outcome.tail = output.end()
            close_line(self.rows_path)
        if late:
            return f"killed after {limit_s:.0f} s" + ("" if gone else ", and it is not gone")
        return self._accident(process.returncode, outcome.tail)

    @staticmethod
    def _accident(code: int, tail: str) -> str | None:
        if code == 0:
            return None
        if code == BROKEN_DEVICE:
            return "the device's error stays: the process had to end"
        if code == -signal.SIGKILL:
            return "killed by SIGKILL: the machine may be out of memory"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if "Timeout (" in tail[-20_000:]:
            return "an item took too long"
        return f"ended with exit code {code}"

    def _read(self, part: Part, outcome: Outcome) -> None:
        """Takes the part's rows from the file, and from them what its items came to."""
        outcome.rows = [row for row in read_rows(self.rows_path) if row.get("part") == part.name]
        items: dict[str, str] = {}
        for row in outcome.rows:
            name, event = row.get("item"), row.get("event")
            if name is None:
                continue
            if "failed" in row:
                items[name] = "failed"
            elif "skipped" in row:
                items[name] = "skipped"
            elif event == "begin":
                items[name] = "died"
            elif event == "end" and items.get(name) == "died":
                items[name] = "ok"
        outcome.items = items

    def _conclude(self, part: Part, outcome: Outcome, accidents: Sequence[str]) -> None:
        self._read(part, outcome)
        died = [name for name, state in outcome.items.items() if state == "died"]
        failed = [f"{row.get('item', part.name)}: {row['failed']}" for row in outcome.rows if "failed" in row]
        never = sorted(self._to_do(outcome))
        reasons = [*failed, *accidents]
        reasons += [f"died in {', '.join(died)}"] if died else []
        reasons += [f"not begun: {', '.join(never)}"] if never else []
        outcome.reasons = reasons
        skipped = {row["skipped"] for row in outcome.rows if "skipped" in row}
        if reasons or not outcome.items:
            outcome.status = "failed"
            outcome.reasons = reasons or ["it gave no rows"]
        else:
            outcome.status = "skipped" if set(outcome.items.values()) == {"skipped"} else "ok"
            outcome.reasons = sorted(f"skipped in it: {reason}" for reason in skipped)
        outcome.tail = outcome.tail[-TAIL_SHOWN:]
