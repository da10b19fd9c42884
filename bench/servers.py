"""Processes that a benchmark measures: servers started, waited for and ended; halted while another one is measured.

A process leads a group of its own (setsid). `ProcessGroup.halt` stops the whole group (SIGSTOP), so that it keeps its memory
and takes no processor time; `resume` lets it go on, and checks that it has taken none.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

START_S = 600.0
"""Longest wait for a server to become healthy: vLLM compiles at its first start."""
STOP_S = 60.0
"""Longest wait for a server to end by itself."""
HALT_S = 10.0
"""Longest wait for the threads of a group to stop: each does when it next runs and its system call ends."""
HALTED_S = 0.05
"""Processor seconds that a halted group may take, since they are counted in hundredths."""
LOG_BYTES = 4000
"""How much of a log an error quotes."""
_STATE, _GROUP, _USER, _SYSTEM = 0, 2, 11, 12


def _stat(directory: Path) -> list[str]:
    """What the system says of a process or thread, from its state on (proc(5)); empty if it has ended."""
    try:
        return (directory / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _command(pid: int) -> str:
    """What a process runs; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]
    except OSError:
        return ""


def processor_seconds(pid: int) -> float:
    """Of a process and all its threads so far; 0 if it has ended."""
    fields = _stat(Path(f"/proc/{pid}"))
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def busy_seconds() -> float:
    """Of all the machine's processors so far, whoever used them."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """The processes that a process and its descendants have started and that have not ended."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended
            for child in map(int, children.read_text().split()):
                found += [child, *descendants(child)]
    return found


class ProcessGroup:
    """A process that leads a group, with all that it starts. pid: the leader's."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._halted_at: dict[int, float] | None = None

    def processor_seconds(self) -> float:
        """Of the leader and its descendants so far, whatever group those are in."""
        return sum(self._by_process().values())

    def _by_process(self) -> dict[int, float]:
        return {pid: processor_seconds(pid) for pid in (self.pid, *descendants(self.pid))}

    def halt(self) -> None:
        """Stops the group until `resume`, and waits until all its threads have stopped."""
        self._signal(signal.SIGSTOP)
        deadline = time.monotonic() + HALT_S
        while not self._stopped() and time.monotonic() < deadline:
            time.sleep(0.005)
        self._halted_at = self._by_process()

    def resume(self) -> None:
        """Lets a halted group go on. Raises RuntimeError if the processes used a processor meanwhile: what was measured beside
        them is worth nothing."""
        if self._halted_at is None:
            return
        before, now, self._halted_at = self._halted_at, self._by_process(), None
        self._signal(signal.SIGCONT)
        used = {pid: seconds - before.get(pid, 0.0) for pid, seconds in now.items()}
        if sum(used.values()) > HALTED_S:
            most = ", ".join(f"process {pid} ({_command(pid)}) {seconds:.2f} s" for pid, seconds in used.items() if seconds)
            raise RuntimeError(f"something let halted processes go on, and they used the processors: {most}")

    def _stopped(self) -> bool:
        """Whether no thread of the group runs or waits to run on. A descendant that has left the group doesn't count here."""
        for pid in (self.pid, *descendants(self.pid)):
            process = Path(f"/proc/{pid}")
            fields = _stat(process)
            if not fields or int(fields[_GROUP]) != self.pid:
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                threads = [_stat(thread) for thread in (process / "task").iterdir()]
                if any(thread and thread[_STATE] not in "TtZX" for thread in threads):
                    return False
        return True

    def kill(self) -> None:
        """Ends the group at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@dataclass(frozen=True, slots=True)
class Server:
    """A healthy server. log: the file with all that it prints."""

    url: str
    group: ProcessGroup
    log: Path


@contextlib.contextmanager
def running_server(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Starts a server at a free port, waits until /health says 200, and ends it afterwards.

    command: gets `--port PORT` at its end. environment: None is this process's. Raises RuntimeError with the log's end if the
    server doesn't start.
    """
    port = free_port()
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port)], env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )
    group = ProcessGroup(process.pid)
    server = Server(f"http://127.0.0.1:{port}", group, log)
    try:
        _wait_until_healthy(server, process)
        yield server
    finally:
        with contextlib.suppress(RuntimeError):  # what it used while halted changes nothing any more
            group.resume()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        group.kill()  # what is left of it
        process.wait()


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_end(log: Path) -> str:
    """The last characters of a log."""
    return log.read_text(errors="replace")[-LOG_BYTES:]


def _wait_until_healthy(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log_end(server.log)}")
        time.sleep(0.5)
