"""Chat templates that come with requests: foreign code, which a process of its own renders with little time and memory.

    this process                                   renderer.py
    ForeignTemplate -> TemplateProcess  --JSON-->  Jinja's sandbox, limits of memory and processor time
                                        <--JSON--

A template that loops for ever, or makes gigabytes of text, ends with an error for its request; the process is started again for
the next one. Nothing of such a template is compiled in this process: Jinja computes constants when it compiles. Templates take
turns, so a slow one holds up other requests that bring a template, and nobody else.

Owns: that process. Does not own: who may bring a template.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from coserve.chat.template import NO_EXTRAS, ChatExtras, ChatTemplate, Message, no_template, too_long
from coserve.core import CapacityError, InvalidRequest

TIMEOUT_S = 5.0
"""Seconds that a template may take to render a conversation."""
MEMORY_BYTES = 512 << 20
"""Memory that it may take meanwhile."""
_START_S = 60.0
_RETRY_S = 10.0
_PROGRAM = Path(__file__).with_name("renderer.py")
_FIELD = "chat_template"
_READ_BYTES = 1 << 20


class _Failed(Exception):
    """What a template has raised, as a text."""


class TemplateProcess:
    """The process, started when it is first needed. Any thread may use it; questions wait for each other."""

    def __init__(self, *, timeout_s: float = TIMEOUT_S, memory_bytes: int = MEMORY_BYTES) -> None:
        self._timeout_s, self._memory_bytes = timeout_s, memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._turn = threading.Lock()
        self._closed = False

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer (renderer.py). Raises InvalidRequest if it takes too long or ends the process, CapacityError if
        the process doesn't start."""
        line = json.dumps(question).encode() + b"\n"
        with self._turn:
            process = self._running()
            try:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
                found = _read_line(process, self._timeout_s)
            except OSError:
                found = b""
            if not found:
                self._end()
                raise InvalidRequest(
                    f"{_FIELD}: takes more than {self._timeout_s:g} s, or too much memory, to render the conversation; make it "
                    "simpler", param=_FIELD,
                )
        answer: dict[str, Any] = json.loads(found)
        return answer

    def close(self) -> None:
        """Ends the process. It isn't started again."""
        with self._turn:
            self._closed = True
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            if self._closed:
                raise CapacityError("the server is ending")
            arguments = [sys.executable, "-P", str(_PROGRAM), str(self._memory_bytes), str(self._timeout_s)]
            kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}  # no keys
            self._process = subprocess.Popen(
                arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**kept, "PYTHONIOENCODING": "utf-8"},
            )
            if not _read_line(self._process, _START_S):
                self._end()
                raise CapacityError("the process that renders chat templates of requests doesn't start; try again later")
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):  # what was not written to a process that has ended
                        pipe.close()


class ForeignTemplate(ChatTemplate):
    """A template that a request brings."""

    owner = "the request's"

    def __init__(
        self, source: str, special_tokens: Mapping[str, Any], call_format: str | None = None, *, process: TemplateProcess
    ) -> None:
        super().__init__(source, special_tokens, call_format)
        self._process = process
        self._failed_s, self._failure = -math.inf, ""

    @functools.cached_property
    def written(self) -> str:
        return str(self._look.get("written", ""))

    @functools.cached_property
    def reads(self) -> frozenset[str]:
        return frozenset(self._look.get("reads", ()))

    @functools.cached_property
    def _look(self) -> dict[str, Any]:
        return self._ask({})

    def check(self) -> None:
        if "error" in self._look:
            raise no_template(self._look["error"])

    def _write(self, variables: Mapping[str, Any], max_chars: int | None) -> str:
        found = self._ask({"variables": variables, "max_chars": max_chars})
        if "too_long" in found and max_chars is not None:
            raise too_long(max_chars)
        if "error" in found:
            raise _Failed(found["error"])
        return str(found["text"])

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer about this template. One that has just taken too long isn't tried again at once: a request
        renders it several times."""
        if time.monotonic() - self._failed_s < _RETRY_S:
            raise InvalidRequest(self._failure, param=_FIELD)
        try:
            return self._process.ask({"source": self.source, **question})
        except InvalidRequest as error:
            self._failed_s, self._failure = time.monotonic(), str(error)
            raise

    def render_generated(
        self, messages: Sequence[Message], *, now: datetime | None = None, extras: ChatExtras = NO_EXTRAS
    ) -> tuple[str, list[tuple[int, int]]]:
        raise InvalidRequest(f"{_FIELD}: a request's template is for requests, not for training", param=_FIELD)


def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
    """The next line of a process's output; nothing if it takes longer or the output ends."""
    assert process.stdout is not None
    descriptor, deadline, parts = process.stdout.fileno(), time.monotonic() + timeout_s, list[bytes]()
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while not (parts and parts[-1].endswith(b"\n")):
        left_ms = (deadline - time.monotonic()) * 1e3
        if left_ms <= 0 or not poller.poll(left_ms):
            return b""
        part = os.read(descriptor, _READ_BYTES)
        if not part:
            return b""
        parts.append(part)
    return b"".join(parts)
