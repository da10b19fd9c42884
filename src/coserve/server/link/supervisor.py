"""The engine's process as the API process sees it: how it is started, how its death is noticed, when the next one starts.

    spawn -> Ready -> ... -> dies -> spawn -> ...        dies before Ready: wait longer each time, at most MAX_FAILURES in a row

Owns: the command, its environment, the socket's address, the delays. Does not own: what is said over it (engineclient.py).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import zmq
import zmq.asyncio

from coserve.server.link.setup import Setup, write_setup
from coserve.server.settings import ServerConfig

ENGINE_ENVIRONMENT: Mapping[str, str] = {
    # Every thread that has multiplied has an OpenMP team of its own: the one that loads the weights, the engine's. A waiting
    # team that spins takes the core that the other one needs: with active waiting two threads are slower than one.
    "OMP_WAIT_POLICY": "passive",
}
"""Of the engine's process, unless the user has set them."""
DELAYS_S = (0.0, 1.0, 2.0, 5.0, 10.0)
"""Before a restart, by how many processes in a row have died before they were ready."""
MAX_FAILURES = 5
_LONGEST_PATH = 100
"""Of a socket in the file system; the system's own limit is 104 or 108 bytes."""


def restart_delay_s(failures: int) -> float | None:
    """Seconds before the next start after so many deaths before Ready in a row; None: give up."""
    return None if failures >= MAX_FAILURES else DELAYS_S[min(failures, len(DELAYS_S) - 1)]


class EngineProcess:
    """One process, with a socket of its own: nothing that a dead one has sent can be taken for the next one's."""

    def __init__(self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, directory: Path) -> None:
        self._process, self.socket, self._directory = process, socket, directory

    @classmethod
    async def spawn(cls, config: ServerConfig, context: zmq.asyncio.Context) -> EngineProcess:
        """Starts one. Raises OSError."""
        directory = Path(tempfile.mkdtemp(prefix="coserve-"))  # only its owner can look into it
        socket = context.socket(zmq.PAIR)
        socket.set_hwm(0)  # both ends always read
        try:
            path = directory / "engine"
            usable = zmq.has("ipc") and len(os.fsencode(path)) <= _LONGEST_PATH
            socket.bind(f"ipc://{path}" if usable else "tcp://127.0.0.1:*")
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "coserve.server.link.enginemain", stdin=asyncio.subprocess.PIPE,
                env={**ENGINE_ENVIRONMENT, **os.environ},
            )
            assert process.stdin is not None
            address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            process.stdin.write(write_setup(Setup(address=address, config=config)))  # and it stays open: see enginemain.py
        except BaseException:
            socket.close(linger=0)
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return cls(process, socket, directory)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """The exit code, below 0 for a signal, once it has ended."""
        return await self._process.wait()

    def hide(self) -> None:
        """The process has connected: the address goes, so that nothing is left of it should this process be killed."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Ends it at once."""
        if self._process.returncode is None:
            self._process.kill()

    def close(self) -> None:
        """Frees what it had; it has ended."""
        self.socket.close(linger=0)
        self.hide()
