"""One process of a fleet as its host sees it: started, watched, started again, ended.

    raycluster.py --(Ray actor)--> ProcessHost --standard input--> the process --standard input--> its engine's process

A replica's host is all that runs inside a Ray actor, and the ingress's is in the command: what a process says to others goes
past Ray. Each process ends with whoever started it, since its standard input ends then: a host that Ray kills leaves nothing
behind. An actor whose raylet was killed lives on beside the one that Ray starts elsewhere (seen with 2.60); so such a host ends
with its parent, which is the raylet.

Owns: the process, pauses between starts, its last lines. Does not own: what the process does (main.py), where hosts are placed
(raycluster.py), what its reports mean there (hostreport.py). This file needs Python's own library only and is sent to actors
as it is, so that a host is small and there at once: importing coserve would bring torch. Of what users send, only what the
process logs goes through it, as JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PROCESS_MODULE = "coserve.server.replicas.main"
"""What runs in the process, by `python -m`. Its argument is the kind of process: engine or ingress."""
SERVES = " serves at "
"""In the line with which a process logs that it has started, before its address."""
REFUSED = 2
"""The exit code of a process that its settings, or what they name, keep from starting. The last error in its log says why."""
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a process that has ended is started again, by how many before it ended soon."""
_LONG_S = 60.0
"""A process that has served for so long did not end soon."""
_PARENT_EVERY_S = 0.25
_MAX_LINES = 1000
"""Lines of the log that are kept until they are asked for."""
_WRITTEN_AGAIN = ("time", "process", "logger")
"""Fields of a line of the log that whoever writes it has too."""
_SECRETS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables that the process has no use for."""


_NICENESS = "RAY_worker_niceness"


def undo_niceness() -> str:
    """Takes back that Ray starts actors at a low priority (15 by default), which their processes and engines would inherit:
    whatever else the machine does would come before them. Where RAY_worker_niceness is set, it holds. Returns what is wrong, if
    the system does not let it."""
    found = os.getpriority(os.PRIO_PROCESS, 0)
    if found <= 0 or _NICENESS in os.environ:
        return ""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, 0)
    except OSError:
        return f"Ray runs processes at the low priority {found}; set {_NICENESS}=0 where `ray start` runs"
    return ""


def address_towards(other: str) -> str:
    """This machine's address on the network that leads to another one. Nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


class ProcessHost:
    """Runs a process until `stop`. Any thread may call its methods; none waits."""

    def __init__(
        self, kind: str, setup: bytes, *, towards: str = "127.0.0.1", module: Sequence[str] = ("-m", PROCESS_MODULE),
        pauses_s: Sequence[float] = PAUSES_S, with_parent: bool = False, place: Callable[[], str] = str,
    ) -> None:
        """kind: engine or ingress. setup: a FleetSetup's line; host and node, which are this machine's, are put into it.
        towards: an address that the others reach too. module: what Python runs; it imports nothing from the directory that the
        host happens to be in. with_parent: whether the host is in a Ray actor, which ends with the process that has started it.
        place: says which node of the cluster this is."""
        if with_parent:
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="coserve-parent", daemon=True).start()
        self.node, self._package = socket.gethostname(), _package()
        told = json.loads(setup)
        self.address, self.place = address_towards(towards), place()
        told |= {"host": self.address, "node": self.node}
        told["config"]["log_format"] = "json"
        self._setup = json.dumps(told).encode() + b"\n"
        self._kind, self._command, self._pauses_s = kind, [sys.executable, "-P", *module, kind], pauses_s
        self._lines: deque[dict[str, Any]] = deque(maxlen=_MAX_LINES)
        self._num_lines = self._starts = 0
        self._serves = self._ended = False
        self._problem = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        if with_parent and (problem := undo_niceness()):
            self._add(_line(logging.WARNING, problem))
        threading.Thread(target=self._run, name="coserve-process", daemon=True).start()

    def look(self, seen: int) -> bytes:
        """A HostReport as JSON, with the lines from number `seen` on."""
        with self._lock:
            first = max(0, min(seen, self._num_lines))
            kept = min(self._num_lines - first, len(self._lines))
            return json.dumps({
                "first": self._num_lines - kept, "lines": list(self._lines)[len(self._lines) - kept :], "serves": self._serves,
                "ended": self._ended, "problem": self._problem, "starts": self._starts,
                "pid": 0 if self._process is None else self._process.pid, "package": self._package, "node": self.node,
                "address": self.address, "place": self.place,
            }).encode()

    def stop(self) -> None:
        """Has the process drain and end; it isn't started again."""
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends the process at once; it isn't started again."""
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                self._process.kill()

    # --- the thread ---

    def _run(self) -> None:
        soon = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            code = 1
            try:
                code = self._run_once()
                how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            except Exception as error:  # no processes, memory or files are left: it is tried again all the same
                how = f"can't be started or read ({type(error).__name__}: {error})"
            if self._stopping.is_set():
                break
            soon = 0 if self._serves and time.monotonic() - began > _LONG_S else soon + 1
            pause = self._pauses_s[min(soon, len(self._pauses_s)) - 1] if soon else 0.0
            if code == 0 and self._serves and self._kind == "engine":  # it was told to drain: its machine is about to end
                pause = self._pauses_s[-1]
            with self._lock:
                self._serves = False
                if code == REFUSED:
                    errors = [line["message"] for line in self._lines if line["level"] >= logging.ERROR]
                    self._problem = errors[-1] if errors else how
                self._add(_line(logging.WARNING, f"the process {how}; starting another in {pause:g} s"))
            self._stopping.wait(pause)
        with self._lock:
            self._serves, self._ended = False, True

    def _run_once(self) -> int:
        """Runs a process to its end, and returns its exit code, which is negative for a signal. Raises OSError if there can't
        be a process."""
        environment = {name: value for name, value in os.environ.items() if name not in _SECRETS}
        with self._lock:
            if self._stopping.is_set():
                return 0
            process = self._process = subprocess.Popen(  # a session of its own: a terminal's Ctrl-C is for the command
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )
            self._starts += 1
        assert process.stdin is not None and process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), process.stdout:
                process.stdin.write(self._setup)
                process.stdin.flush()
                for data in process.stdout:
                    line = _read_line(data)
                    with self._lock:
                        self._add(line)
                        if SERVES in line["message"]:
                            self._serves, self._problem = True, ""
            return process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()

    def _add(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self._num_lines += 1


def _end_with_parent(parent: int) -> None:
    """Ends this process when another one has become its parent."""
    while os.getppid() == parent:
        time.sleep(_PARENT_EVERY_S)
    os._exit(1)


def _package() -> str:
    """coserve's version on this machine, as it is installed now."""
    try:
        return version("coserve")
    except PackageNotFoundError:
        return "none"


def _line(level: int, message: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """As a LogLine."""
    return {"level": level, "message": message, "fields": fields or {}}


def _read_line(data: bytes) -> dict[str, Any]:
    """A line of the process's log; one that isn't of the log, such as a crash's, is a warning."""
    text = data.decode("utf-8", "backslashreplace").rstrip()
    try:
        fields = dict(json.loads(text))
        level, message = logging.getLevelNamesMapping()[str(fields.pop("level")).upper()], str(fields.pop("message"))
    except (ValueError, TypeError, KeyError):
        return _line(logging.WARNING, text)
    return _line(level, message, {name: value for name, value in fields.items() if name not in _WRITTEN_AGAIN})
