"""Rows of results that can't be lost, and the course of one part's items in a process of its own. Standard library only.

A row is one line of JSON that is written whole, by one call, and forced to the disk. A part says first which items it has; each
item has a row when it begins and one when it ends. From these the process that started the part knows what was under way when
the part died.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_ROW_BYTES = 64 << 10
MAX_FILE_BYTES = 12 << 20
BROKEN_DEVICE = 3
"""Exit code of a part whose device answers every call with an error. What it had left to do needs another process."""
MAX_ERROR = 1500
"""Characters of an error that a row keeps: its beginning and its end."""


class Item(NamedTuple):
    """One thing that a part does. run: gives rows; a row with the key `failed` is a check that failed."""

    name: str
    run: Callable[[], Iterable[Mapping[str, Any]]]


class Rows:
    """Appends a part's rows to a file of JSON lines."""

    def __init__(self, path: Path, part: str) -> None:
        self.path, self.part = path, part

    def add(self, row: Mapping[str, Any]) -> None:
        """Writes a row and waits until the disk has it. What is too long for a row, or for the file, is replaced by a note."""
        line = json.dumps({"part": self.part, **row}, default=str) + "\n"
        if len(line) > MAX_ROW_BYTES:
            note = {name: row[name] for name in ("item", "event") if name in row}
            line = json.dumps({"part": self.part, **note, "failed": f"a row of {len(line)} bytes was left out"}) + "\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if os.fstat(handle).st_size + len(line) <= MAX_FILE_BYTES or "event" in row:
                os.write(handle, line.encode())
                os.fsync(handle)
        finally:
            os.close(handle)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file. A line that a dying process left unfinished is passed over."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def close_line(path: Path) -> None:
    """Ends a line that a process left unfinished, so that the next row begins on one of its own."""
    if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def told(error: BaseException) -> str:
    """An error's name and text, shortened in the middle."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= MAX_ERROR else f"{text[: MAX_ERROR // 2]} ... {text[-MAX_ERROR // 2 :]}"


def run_items(items: Sequence[Item], rows: Rows, *, skip: Collection[str], deadline: float, item_s: float) -> bool:
    """Runs the items that are not in `skip`; False if the device is broken and the rest needs another process.

    deadline: on `time.monotonic`; no item begins after it. item_s: an item that takes longer ends the process; where every
    thread was is then printed.
    """
    rows.add({"event": "items", "names": [item.name for item in items]})
    for item in items:
        if item.name in skip:
            continue
        if time.monotonic() >= deadline:
            rows.add({"item": item.name, "event": "end", "skipped": "no time left"})
            continue
        rows.add({"item": item.name, "event": "begin"})
        faulthandler.dump_traceback_later(max(0.5, min(item_s, deadline + 1 - time.monotonic())), exit=True)
        begin, failed = time.monotonic(), {}
        try:
            for row in item.run():
                rows.add({"item": item.name, **row})
        except Exception as error:
            traceback.print_exc()
            failed = {"failed": told(error)}
            error.__traceback__ = None  # it would keep the item's tensors
        finally:
            faulthandler.cancel_dump_traceback_later()
        broken = bool(failed) and device_is_broken()
        rows.add({"item": item.name, "event": "end", "seconds": round(time.monotonic() - begin, 3), **failed})
        if broken:
            return False
        release_memory()
    return True


def device_is_broken() -> bool:
    """Whether CUDA, where it is in use, has an error that stays."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception as error:
        return type(error).__name__ != "OutOfMemoryError"
    return False


def release_memory() -> None:
    """Gives back what nobody refers to any more, and restarts the count of peak memory."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
