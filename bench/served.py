"""A `coserve serve` of the default model in a process of its own, for benchmarks over HTTP."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import httpx

START_S = 180.0


class Served(NamedTuple):
    """url: without /v1; pid: of the API process."""

    url: str
    pid: int


@contextlib.contextmanager
def serve(directory: Path, *options: str, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """A server that takes requests; it is ended afterwards. Exits with its log if it doesn't start within START_S.

    directory: for its data and its log. env: beside this process's variables.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "coserve", "serve", "--port", str(port), "--data-dir", str(directory / "data"), *options]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"the server did not start:\n{(directory / 'log').read_text()}")
            time.sleep(0.5)
        yield Served(f"http://127.0.0.1:{port}", process.pid)
    finally:
        process.terminate()
        process.wait(60)
