"""One engine process as the API process sees it: how it is started, what is said to it, what is known of its end.

Owns: the command, its environment, the socket, asking for stacks. Does not own: what the messages are about (engineclient.py),
when a process is started or ended (supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import zmq
import zmq.asyncio

from coserve.core import InvalidRequest
from coserve.server.link.activity import ActivityPage
from coserve.server.link.messages import Ack, FromEngine, ToEngine, decode_from_engine, encode
from coserve.server.link.setup import ACTIVITY_FILE, STACKS_FILE, STACKS_SIGNAL, EngineSetup, write_setup
from coserve.server.settings import ServerConfig

ENGINE_ENVIRONMENT: Mapping[str, str] = {
    # Linux: malloc asks for huge pages. Decoding reads all weights once per token, page by page of the processor's tables.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment variables of the engine's process, where the user has not set them."""
_STACKS_WAIT_S = 1.0
"""Seconds that the process gets to write its stacks."""
_MAX_STACKS_BYTES = 1 << 16
_AT_ONCE = 64
"""Messages that are read before others have a turn of the event loop."""
ENGINE_MODULE = "coserve.server.link.enginemain"
"""The module that runs in the process."""
_MAX_PATH_BYTES = 100
"""The longest path of a socket; the system's own limit is 104 or 108 bytes."""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


class EngineEnd(NamedTuple):
    """How a process ended.

    reason: why, in words. jobs: the jobs that it worked on at that time. guilty: whether its work may be the cause: it hung,
    crashed or ran out of memory, and was not killed from outside. alone: whether its work held no requests beside the jobs.
    hung: whether it was killed because it hung.
    """

    reason: str
    jobs: tuple[str, ...] = ()
    guilty: bool = False
    alone: bool = True
    hung: bool = False


def count_oom_kills() -> int:
    """How many processes the system has ended for lack of memory since it started; 0 where it doesn't say."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill ")), 0)


class EngineProcess:
    """One process and its socket. Every process has a socket of its own, so that no message of a dead one is taken for the next
    one's. page: what the threads of the process are doing."""

    def __init__(
        self, process: asyncio.subprocess.Process, socket: zmq.asyncio.Socket, directory: Path, page: ActivityPage, stacks: int
    ) -> None:
        self._process, self._socket, self._directory = process, socket, directory
        self.page, self._stacks = page, stacks
        self._oom_kills = count_oom_kills()

    @classmethod
    async def spawn(cls, config: ServerConfig, context: zmq.asyncio.Context) -> EngineProcess:
        """Starts a process. Raises OSError and zmq.ZMQError."""
        with contextlib.ExitStack() as undo:  # takes back what was made, if anything below fails
            directory = Path(tempfile.mkdtemp(prefix="coserve-"))  # only its owner can look into a temporary directory
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            socket = context.socket(zmq.PAIR)
            undo.callback(socket.close, linger=0)
            socket.set_hwm(0)  # both ends always read
            path = directory / "engine"
            usable = zmq.has("ipc") and len(os.fsencode(path)) <= _MAX_PATH_BYTES
            socket.bind(f"ipc://{path}" if usable else "tcp://127.0.0.1:*")
            page = ActivityPage(directory / ACTIVITY_FILE, create=True)
            undo.callback(page.close)
            stacks = os.open(directory / STACKS_FILE, os.O_RDONLY | os.O_CREAT, 0o600)
            undo.callback(os.close, stacks)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", ENGINE_MODULE, stdin=asyncio.subprocess.PIPE,
                env={**ENGINE_ENVIRONMENT, **os.environ},
            )
            assert process.stdin is not None
            address = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            process.stdin.write(write_setup(EngineSetup(address=address, config=config, watch=str(directory))))
            # The process's input stays open. Its end tells the engine that this process has gone (enginemain.py).
            undo.pop_all()
            return cls(process, socket, directory, page, stacks)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    async def wait(self) -> int:
        """Waits until the process has ended. Returns the exit code, or minus the number of the signal that ended it."""
        return await self._process.wait()

    def hide(self) -> None:
        """Deletes the directory, once the process has connected: nothing is left behind then if this process is killed."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def kill(self) -> None:
        """Ends the process at once."""
        if self._process.returncode is None:
            self._process.kill()

    async def ask_stacks(self) -> str:
        """The stacks of the process's threads, as far as it can still write them within a second."""
        before = os.fstat(self._stacks).st_size
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(STACKS_SIGNAL)
        limit, size = time.monotonic() + _STACKS_WAIT_S, before
        while time.monotonic() < limit:
            await asyncio.sleep(0.1)
            grown = os.fstat(self._stacks).st_size
            if grown == size > before:
                break
            size = grown
        return self.read_stacks()

    def read_stacks(self) -> str:
        """The stacks that the process has written, because they were asked for or because it crashed."""
        return os.pread(self._stacks, _MAX_STACKS_BYTES, 0).decode(errors="replace")

    def send(self, message: ToEngine) -> None:
        """Raises InvalidRequest if a number in the message is too large to travel."""
        try:
            data = encode(message)
        except OverflowError as error:
            raise InvalidRequest(f"a number is too large ({error})") from error
        self._socket.send(data)

    async def read(self, on_message: Callable[[FromEngine], None]) -> None:
        """Calls `on_message` with every message of the process, in order, until this is cancelled. Raises what `on_message`
        raises, and msgspec.ValidationError."""
        while True:
            for number, part in enumerate(await self._socket.recv_multipart(), start=1):
                on_message(decode_from_engine(part))
                if number % _AT_ONCE == 0:
                    await asyncio.sleep(0)  # whoever waits for one of these messages goes on first
            self._socket.send(encode(Ack()))

    def describe_work(self) -> str:
        """What the process's threads are doing, in words."""
        now = time.monotonic()
        return " | ".join(
            f"{reading.activity} (for {now - reading.begun_s:.1f} s, predicted {reading.predicted_s:.2f} s)"
            for reading in self.page.read()
        ) or "nothing"

    def describe_end(self, code: int, known: str | None, *, hung: bool) -> EngineEnd:
        """How this process ended. code: what `wait` returned. known: the reason, if it is known."""
        busy = [reading.activity for reading in self.page.read()]
        jobs = tuple(dict.fromkeys(job for activity in busy for job in activity.jobs))
        alone = not any(activity.requests for activity in busy)
        out_of_memory = code == -signal.SIGKILL and count_oom_kills() > self._oom_kills
        reason = known
        if reason is None:
            reason = f"it was ended by signal {_signal_name(-code)}" if code < 0 else f"it ended with exit code {code}"
            reason += ", as the machine ran out of memory" if out_of_memory else ""
        guilty = hung or out_of_memory or code != -signal.SIGKILL
        return EngineEnd(reason, jobs, guilty, alone, hung)

    def close(self) -> None:
        """Frees the socket, the page and the directory of a process that has ended."""
        self._socket.close(linger=0)
        self.page.close()
        os.close(self._stacks)
        self.hide()
