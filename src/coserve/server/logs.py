"""The log of both processes: lines for people or JSON for machines, with the ids of what they are about, repeats folded.

    text   2026-01-31T12:00:00.123Z WARNING api the record of a job can't be written [job=ftjob-1 tenant=alice]
    json   {"time": "2026-01-31T12:00:00.123Z", "level": "warning", "process": "api", "message": "...", "job": "ftjob-1", ...}

Levels below warning go to standard output, the others to standard error. The ids of the request and of its tenant come from the
context; the caller gives others by `extra={"job": ...}`. `extra` may also have `fold`, which is False for a line that is
written every time, and `fields`, a dictionary of more fields for JSON lines.

Owns: formats, context, folding. Does not own: what is logged.
"""

from __future__ import annotations

import contextvars
import io
import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

IDS = ("request", "tenant", "job")
"""Whose ids a line can have."""
FOLD_S = (10.0, 60.0, 600.0)
"""Seconds for which a line that was just written is only counted. If it came again meanwhile, the next window is longer."""
_MAX_FOLDED = 256
"""The most different lines that are remembered to be counted."""
_CONTINUED = "| "
_UNSHOWN = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, break a line or turn the order of letters around, or that UTF-8 doesn't have."""
_present: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("present")
"""The ids of the request that is being answered and, once it is known, of its tenant."""


@contextmanager
def about_request(request: str) -> Iterator[None]:
    """Lines that are logged inside this context get the request's id."""
    token = _present.set({"request": request})
    try:
        yield
    finally:
        _present.reset(token)


def note_tenant(tenant: str) -> None:
    """Lines about the present request get the tenant's id from now on."""
    if (ids := _present.get(None)) is not None:
        ids["tenant"] = tenant


def present_request() -> str:
    """The request that is being answered, or ''."""
    return _present.get({}).get("request", "")


class _Context(logging.Filter):
    """Puts the context's ids into records that have none, and lets all records pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, id in _present.get({}).items():
            if not hasattr(record, name):
                setattr(record, name, id)
        return True


def _ids(record: logging.LogRecord) -> dict[str, str]:
    return {name: str(value) for name in IDS if (value := getattr(record, name, None))}


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _trace(record: logging.LogRecord) -> str:
    return "".join(traceback.format_exception(*record.exc_info)).rstrip() if record.exc_info and record.exc_info[1] else ""


def _message_lines(record: logging.LogRecord) -> list[str]:
    """The lines of a record's message: at least one, which may be empty."""
    return record.getMessage().splitlines() or [""]


def _shown(line: str) -> str:
    """A line in which characters that must not reach a terminal are written as escapes, as in Python's strings."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), line)


class TextFormatter(logging.Formatter):
    """Every line of a record begins with time, level and process, those of a traceback too. After that, all lines but the first
    have a '| ', so that text from users can't pass for a record."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        head = f"{_time(record)} {record.levelname} {self._process} "
        ids = " ".join(f"{name}={value}" for name, value in _ids(record).items())
        first, *rest = _message_lines(record)
        lines = [f"{first} [{ids}]" if ids else first]
        lines += [_CONTINUED + line for line in (*rest, *_trace(record).splitlines())]
        return "\n".join(head + _shown(line) for line in lines)


class JsonFormatter(logging.Formatter):
    """Writes a record as one line with one JSON object."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": _time(record), "level": record.levelname.lower(), "process": self._process, "logger": record.name,
            "message": record.getMessage(), **_ids(record), **getattr(record, "fields", {}),
        }
        if trace := _trace(record):
            fields["exception"] = trace
        return json.dumps(fields, default=str)  # all of it ASCII: any stream takes it, nothing steers a terminal


@dataclass(slots=True)
class _Folded:
    """A line that was written.

    until_s, began_s: end and begin of the window in which it is only counted, by the monotonic clock.
    window: which of FOLD_S the window's length is.
    count: how often the line came in the window.
    """

    record: logging.LogRecord
    until_s: float
    began_s: float
    window: int = 0
    count: int = 0


class FoldingHandler(logging.Handler):
    """Writes records to two streams. A record with the same text and ids as one just before is only counted. The count is
    written when the window ends, or at the end of the process."""

    def __init__(self, out: TextIO, error: TextIO) -> None:
        super().__init__()
        self._out, self._error = out, error
        self._folded: dict[tuple[str, ...], _Folded] = {}
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Writes or counts the record. The logging module calls this while it holds the handler's lock."""
        try:
            if not getattr(record, "fold", True):
                self._write(record)
                return
            now, trace = time.monotonic(), _trace(record)
            key = (record.levelname, record.name, record.getMessage(), trace, *_ids(record).values())
            known = self._folded.get(key)
            if known is not None and now < known.until_s:
                known.count += 1
                self._wake(known.until_s - now)
                return
            if known is None and len(self._folded) >= _MAX_FOLDED:
                self._sweep(now, everything=True)
            if known is not None and known.count:
                self._write_count(known, now)
            self._folded[key] = _Folded(record, now + FOLD_S[0], now)
            self._write(record)
        except Exception:
            self.handleError(record)

    def _write(self, record: logging.LogRecord) -> None:
        stream = self._error if record.levelno >= logging.WARNING else self._out
        line = self.format(record) + "\n"
        with suppress(OSError):  # a pipe that nobody reads any more, a full disk: the server goes on without this line
            stream.write(line)
            stream.flush()

    def _write_count(self, folded: _Folded, now: float) -> None:
        same = folded.record
        times = "once more" if folded.count == 1 else f"{folded.count} times"
        text = f"repeated {times} within {now - folded.began_s:.0f} s: {_message_lines(same)[0]}"
        line = logging.LogRecord(same.name, same.levelno, same.pathname, same.lineno, "%s", (text,), None)
        for name in IDS:
            if hasattr(same, name):
                setattr(line, name, getattr(same, name))
        line.fields = {"repeated": folded.count}
        self._write(line)

    def _wake(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = threading.Timer(seconds + 0.05, self._on_timer)
            self._timer.daemon = True
            self._timer.start()

    def _on_timer(self) -> None:
        with self.lock:  # type: ignore[union-attr]
            self._timer = None
            now = time.monotonic()
            self._sweep(now)
            left = [folded.until_s - now for folded in self._folded.values() if folded.count or folded.window]
            if left:
                self._wake(max(0.0, min(left)))

    def _sweep(self, now: float, *, everything: bool = False) -> None:
        """Writes the counts of windows that have ended. A line that came again in its window gets a longer one."""
        for key, folded in list(self._folded.items()):
            if now < folded.until_s and not everything:
                continue
            if folded.count:
                self._write_count(folded, now)
            if everything or not folded.count:
                del self._folded[key]
                continue
            folded.window = min(folded.window + 1, len(FOLD_S) - 1)
            folded.until_s, folded.began_s, folded.count = now + FOLD_S[folded.window], now, 0

    def close(self) -> None:
        """Writes all counts."""
        with self.lock:  # type: ignore[union-attr]
            if self._timer is not None:
                self._timer.cancel()
            self._sweep(time.monotonic(), everything=True)
        super().close()


def configure(process: str, *, format: str = "text", level: str = "info") -> FoldingHandler:
    """Sends the log of this process to standard output and standard error.

    process: api or engine, for the lines. format: text or json. level: the lowest level that is written; lines of other
    packages below warning are written only if it is debug.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where the locale has no such letter
    handler = FoldingHandler(sys.stdout, sys.stderr)
    handler.setFormatter(JsonFormatter(process) if format == "json" else TextFormatter(process))
    handler.addFilter(_Context())
    least = getattr(logging, level.upper())
    logging.basicConfig(level=least if level == "debug" else max(least, logging.WARNING), handlers=[handler], force=True)
    logging.getLogger("coserve").setLevel(least)
    logging.captureWarnings(True)

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        logging.getLogger("coserve").critical("an unexpected error: %r", error, exc_info=(kind, error, trace))

    def uncaught_in_thread(failure: threading.ExceptHookArgs) -> None:
        if failure.exc_value is not None:
            name = "a thread" if failure.thread is None else f"thread {failure.thread.name}"
            logging.getLogger("coserve").critical(
                "%s failed: %r", name, failure.exc_value,
                exc_info=(failure.exc_type, failure.exc_value, failure.exc_traceback),
            )

    sys.excepthook, threading.excepthook = uncaught, uncaught_in_thread
    return handler
