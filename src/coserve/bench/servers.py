"""Processes that a benchmark measures: servers started, waited for and ended; halted while another one is measured.

Owns: processes and their processor time. Does not own: which there are, what is asked of them (loads.py).

A process leads a group of its own (setsid). `ProcessGroup.halt` stops the whole group (SIGSTOP), so that it keeps its memory
and takes no processor time; `resume` lets it go on, and checks that it has taken none.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coserve.core import one_line

ANSWER_S = 5.0
"""Longest wait for a server's answer to whether it is healthy."""
LOOK_S = 0.1
"""Between two such questions."""
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
REASON_CHARACTERS = 200
_STATE, _GROUP, _USER, _SYSTEM = 0, 2, 11, 12


def _stat(directory: Path) -> list[str]:
    """What the system says of a process or thread, from its state on (proc(5)); empty if it has ended."""
    try:
        return (directory / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def command_of(pid: int) -> str:
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

    def alive(self) -> bool:
        """Whether the leader runs or is halted."""
        fields = _stat(Path(f"/proc/{self.pid}"))
        return bool(fields) and fields[_STATE] not in "ZX"

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
            most = ", ".join(f"process {pid} ({command_of(pid)}) {seconds:.2f} s" for pid, seconds in used.items() if seconds)
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

    def go_on(self) -> None:
        """Lets a halted group go on, without a check."""
        self._halted_at = None
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Ends the group at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


@dataclass(frozen=True, slots=True)
class HealthyServer:
    """A healthy server. log: the file with all that it prints."""

    url: str
    group: ProcessGroup
    log: Path


@contextlib.contextmanager
def running_process(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, cores: Sequence[int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Starts the leader of a new group, and ends the group afterwards.

    log: gets all that it prints. environment: None is this process's. cores: the processors that it may run on; None: those
    that this process may run on.
    """
    with log.open("w") as file, _running_on(cores):
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    group = ProcessGroup(process.pid)
    try:
        yield process
    finally:
        group.go_on()
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        group.kill()  # what is left of it
        process.wait()


@contextlib.contextmanager
def _running_on(cores: Sequence[int] | None) -> Iterator[None]:
    """Ties this thread to processors for a while: a process that it starts meanwhile is tied to them for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cores is None else cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def running_server(
    command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, cores: Sequence[int] | None = None
) -> Iterator[HealthyServer]:
    """Starts a server at a free port, waits until /health says 200, and ends it afterwards.

    command: gets `--port PORT` at its end. The rest is as for `running_process`. Raises RuntimeError with the log's end if the
    server doesn't start.
    """
    port = free_port()
    with running_process([*command, "--port", str(port)], log, environment, cores) as process:
        server = HealthyServer(f"http://127.0.0.1:{port}", ProcessGroup(process.pid), log)
        _wait_until_healthy(server, process)
        yield server


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def log_end(log: Path) -> str:
    """The last characters of a log."""
    return log.read_text(errors="replace")[-LOG_BYTES:]


def last_words(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log_end(log).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    return one_line(ValueError((errors or lines or ["it said nothing"])[-1]), REASON_CHARACTERS)


def healthy(url: str) -> bool:
    """Whether a server's /health says 200. url: http://HOST:PORT."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError, http.client.HTTPException):  # an answer of 400 or above is an OSError
        return False


def served_model(url: str) -> str:
    """The name of the first model that a server lists. Raises OSError, ValueError."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=ANSWER_S) as answer:
        try:
            return str(json.load(answer)["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{url}/v1/models lists no model") from error


def _wait_until_healthy(server: HealthyServer, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while not healthy(server.url):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start:\n{log_end(server.log)}")
        time.sleep(LOOK_S)
