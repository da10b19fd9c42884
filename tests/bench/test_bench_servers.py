"""Processes that the serving benchmark measures: halted, resumed, waited for, ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coserve.bench.servers import ProcessGroup, busy_seconds, descendants, processor_seconds, running_server

BUSY = "while True: pass"
SPAWN = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BUSY!r}]{{}}); print(1, flush=True)"


@contextlib.contextmanager
def process(code: str) -> Iterator[ProcessGroup]:
    """A group whose leader runs the code; it has printed a line."""
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        yield ProcessGroup(child.pid)
    finally:
        ProcessGroup(child.pid).kill()
        child.communicate()


def test_a_halted_group_takes_no_processor() -> None:
    with process(f"{SPAWN.format('')}\n{BUSY}") as group:
        until(lambda: group.processor_seconds() > processor_seconds(group.pid) > 0)  # a child runs too
        group.halt()
        before = group.processor_seconds()
        time.sleep(0.3)
        assert group.processor_seconds() == before, "all threads have stopped when `halt` returns"
        group.resume()
        group.resume()  # one that isn't halted goes on
        until(lambda: group.processor_seconds() - before > 0.1)


def test_what_a_process_uses_is_among_what_all_use() -> None:
    machine = busy_seconds()
    with process(f"print(1, flush=True)\n{BUSY}") as group:
        until(lambda: group.processor_seconds() > 0.2)
        assert busy_seconds() - machine > 0.15


def test_a_process_that_leaves_the_group_is_noticed() -> None:
    with process(f"{SPAWN.format(', start_new_session=True')}\nimport time\ntime.sleep(60)") as group:
        (child,) = descendants(group.pid)
        try:
            group.halt()
            before = processor_seconds(child)
            until(lambda: processor_seconds(child) - before > 0.3)
            with pytest.raises(RuntimeError, match=r"halted processes go on.*: process .*while True"):
                group.resume()
        finally:
            ProcessGroup(child).kill()


def test_a_server_is_waited_for_and_ended(tmp_path: Path) -> None:
    code = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
print("here")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""
    with running_server([sys.executable, "-u", "-c", code], tmp_path / "log") as server:
        server.group.halt()
        assert server.url.startswith("http://127.0.0.1:") and "here" in server.log.read_text()
    assert not Path(f"/proc/{server.group.pid}").exists(), "also one that was halted"


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no room')"]
    with pytest.raises(RuntimeError, match="did not start:\nno room"), running_server(command, tmp_path / "log"):
        pass


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
