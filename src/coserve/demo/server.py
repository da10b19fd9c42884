"""`coserve serve` as a child process of the demo.

Owns: its command, its lines, that it never outlives the demo. Does not own: what is asked of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from coserve.core import CoserveError

START_S = 300.0
"""The first start on a machine measures what it can do."""
STOP_S = 20.0
_PAGE = re.compile(r"^(?:\S+ INFO api )?page\s+(http://\S+?)/$")
_LAST_LINES = 5
_T = TypeVar("_T")


class DemoFailed(CoserveError):
    """The demo can't go on; the message says why."""


class Server:
    """A server that listens. url: without /v1."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, report: Callable[[str], None]) -> None:
        self._process, self._log, self._report = process, log, report
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._listens = asyncio.Event()
        self.url = ""

    async def read(self) -> None:
        """Takes its lines to the log, and to `report` until it listens; then raises DemoFailed, as it has ended."""
        assert self._process.stdout is not None
        with self._log.open("w", encoding="utf-8") as log:
            async for raw in self._process.stdout:
                line = raw.decode(errors="replace").rstrip()
                self._last.append(line)
                log.write(f"{line}\n")
                log.flush()
                if not self._listens.is_set():
                    self._report(line)
                page = _PAGE.match(line)
                if page is not None:
                    self.url = page[1]
                    self._listens.set()
        code = await self._process.wait()
        said = " / ".join(line for line in self._last if line) or "nothing"
        raise DemoFailed(f"the server ended with exit code {code}; it said last: {said} (all of it: {self._log})")

    async def wait_ready(self, seconds: float) -> None:
        """Until it listens. Raises DemoFailed."""
        try:
            await asyncio.wait_for(self._listens.wait(), seconds)
        except TimeoutError as error:
            raise DemoFailed(f"the server was not ready after {seconds:.0f} s (its lines: {self._log})") from error

    async def stop(self, seconds: float = STOP_S) -> None:
        """Asks it to end, and makes it end if it doesn't."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), seconds)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def serve_command(arguments: Sequence[str]) -> list[str]:
    """`coserve serve ARGUMENTS` at a free port."""
    return [sys.executable, "-P", "-m", "coserve", "serve", "--port", "0", *arguments]


@contextlib.asynccontextmanager
async def open_server(command: Sequence[str], log: Path, report: Callable[[str], None]) -> AsyncIterator[Server]:
    """Spawns a server (see `serve_command`); stops it at the end, whatever happens.

    report: takes its start-up lines. Whoever enters must run `read` beside everything else (see `beside`).
    """
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    server = Server(process, log, report)
    try:
        yield server
    finally:
        await server.stop()


async def beside(main: Coroutine[Any, Any, _T], *others: Coroutine[Any, Any, None]) -> _T:
    """The result of `main`, with others running as long as it does. An error of any ends all and is raised."""
    first = asyncio.create_task(main)
    tasks = [first, *(asyncio.create_task(other) for other in others)]
    try:
        pending = set(tasks)
        while not first.done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {first}:
                task.result()
        return first.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
