"""What a host does with its process, on a process that only pretends to serve."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coserve.server.replicas import processhost
from coserve.server.replicas.hostreport import HostReport, read_report
from coserve.server.replicas.memoryshare import share_memory
from coserve.server.replicas.processhost import ProcessHost, undo_niceness
from coserve.server.replicas.setup import FleetSetup, read_setup, with_absolute_paths, write_setup
from coserve.server.settings import ServerConfig
from tests.arch.test_imports import imports

FAKE = (str(Path(__file__).parent / "fleet_process.py"),)
MakeHost = Callable[[str], ProcessHost]


@pytest.fixture
def host() -> Iterator[MakeHost]:
    made: list[ProcessHost] = []

    def make(model: str) -> ProcessHost:
        setup = write_setup(FleetSetup(config=ServerConfig(model=model, data_dir=Path("/tmp/x"))))
        made.append(ProcessHost("engine", setup, towards="localhost", module=FAKE, pauses_s=(0.0, 0.05)))
        return made[-1]

    yield make
    for one in made:
        one.stop()
        until(one, lambda report: report.ended)


def until(host: ProcessHost, condition: Callable[[HostReport], bool], seen: int = 0) -> HostReport:
    limit = time.monotonic() + 20
    while not condition(report := read_report(host.look(seen))):
        assert time.monotonic() < limit, report
        time.sleep(0.01)
    return report


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def child_of(report: HostReport) -> int:
    line = next(line.message for line in reversed(report.lines) if "with child" in line.message)
    return int(line.partition("with child ")[2].split()[0])


def test_a_process_serves_is_killed_and_serves_again_and_drains(host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    one = host("serves")
    report = until(one, lambda report: report.serves)
    assert (report.starts, report.problem, report.node, report.first) == (1, "", socket.gethostname(), 0)
    line = report.lines[-1]
    assert line.message.startswith("engine serves at tcp://127.0.0.1:1") and line.fields == {"job": "j"}
    assert "token False" in report.lines[-1].message, "the process has no use for Ray's token"
    child, seen = child_of(report), len(report.lines)
    os.kill(report.pid, signal.SIGKILL)
    report = until(one, lambda report: report.serves and report.starts == 2, seen)
    assert report.first == seen and report.lines[0].level == logging.WARNING
    assert "was ended by signal 9; starting another in 0 s" in report.lines[0].message
    assert not is_alive(child)
    one.stop()
    report = until(one, lambda report: report.ended)
    assert [line.message for line in report.lines[-2:]] == ["draining", "drained"]
    assert report.starts == 2 and not report.serves and not is_alive(child_of(report))


def test_a_replica_that_was_told_to_drain_is_not_started_again_at_once(host: MakeHost) -> None:
    """By a hook of its pod or its service, which is about to end."""
    one = host("serves")
    os.kill(until(one, lambda report: report.serves).pid, signal.SIGTERM)
    report = until(one, lambda report: report.serves and report.starts == 2)
    assert any("ended with exit code 0; starting another in 0.05 s" in line.message for line in report.lines)


def test_what_keeps_it_from_starting_is_told(host: MakeHost) -> None:
    report = until(host("refuses"), lambda report: report.starts > 2)
    assert report.problem == "model: there is no such model" and not report.serves
    crash = until(host("crashes"), lambda report: report.starts > 2)
    assert crash.problem == "" and any("ZeroDivisionError" in line.message for line in crash.lines)


def test_the_hosts_directory_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raylet runs wherever somebody has typed `ray start`."""
    (tmp_path / "json.py").write_text("raise SystemExit('from the wrong place')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    setup = write_setup(FleetSetup(config=ServerConfig(model="serves")))
    one = ProcessHost("engine", setup, module=("-m", "tests.server.fleet_process"))
    try:
        assert until(one, lambda report: report.starts > 1 or report.serves).serves
    finally:
        one.stop()
        until(one, lambda report: report.ended)


def test_an_installation_does_not_change_what_a_host_says(host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    one = host("serves")
    package = until(one, lambda report: report.serves).package
    monkeypatch.setattr(processhost, "version", lambda name: "9.9")
    assert read_report(one.look(0)).package == package != "9.9"


def test_it_is_tried_again_where_there_was_no_room_for_a_process(host: MakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, start = [], subprocess.Popen

    def full_at_first(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        calls.append(args)
        if len(calls) == 1:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start(*args, **options)

    monkeypatch.setattr(processhost.subprocess, "Popen", full_at_first)
    report = until(host("serves"), lambda report: report.serves)
    assert report.starts == 1 and report.lines[0].level == logging.WARNING
    assert re.search(r"can't be started .*BlockingIOError.*; starting another in 0 s", report.lines[0].message)


def test_a_process_whose_output_cant_be_read_is_ended_and_started_again(
    host: MakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, read = list[bytes](), processhost._read_line

    def no_memory_at_first(data: bytes) -> dict[str, Any]:
        calls.append(data)
        if len(calls) == 1:
            raise MemoryError
        return read(data)

    monkeypatch.setattr(processhost, "_read_line", no_memory_at_first)
    report = until(host("serves"), lambda report: report.serves)
    assert report.starts == 2 and "MemoryError" in report.lines[0].message
    (child,) = re.findall(rb"with child (\d+)", calls[0])
    limit = time.monotonic() + 10
    while is_alive(int(child)):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_the_process_ends_with_a_host_that_is_killed(tmp_path: Path) -> None:
    """Its own child too, which stands for the engine."""
    program = (
        "import json, runpy, sys, time\n"
        f"ProcessHost = runpy.run_path({processhost.__file__!r})['ProcessHost']\n"
        f"host = ProcessHost('engine', sys.stdin.buffer.readline(), module={FAKE!r})\n"
        "while not (report := json.loads(host.look(0)))['serves']: time.sleep(0.01)\n"
        "print(report['pid'], report['lines'][-1]['message'], flush=True)\n"
        "time.sleep(60)\n"
    )
    setup = write_setup(FleetSetup(config=ServerConfig(model="serves")))
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(setup)
        process.stdin.flush()
        line = process.stdout.readline().decode()
        pids = [int(line.split()[0]), int(line.partition("with child ")[2].split()[0])]
        assert all(map(is_alive, pids))
        process.kill()
    limit = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_a_setup_survives_its_way() -> None:
    setup = FleetSetup(config=ServerConfig(model="m", data_dir=Path("/x"), api_key=("k",), slo_tpot_ms="none"), sharers=2)
    assert read_setup(write_setup(setup)) == setup


def test_relative_paths_count_from_the_commands_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    given = ServerConfig(
        model="models/m", data_dir=Path("d"), store="s", lora_modules=(("a", "adapters/a"),), adapter_root="adapters"
    )
    found = with_absolute_paths(given)
    at = str(tmp_path)
    assert (found.model, found.served_model_name) == (f"{at}/models/m", ("models/m",)), "clients use the name that was given"
    assert (str(found.data_dir), found.store, found.adapter_root) == (f"{at}/d", f"{at}/s", f"{at}/adapters")
    assert found.lora_modules == (("a", f"{at}/adapters/a"),)
    assert with_absolute_paths(found) == found and with_absolute_paths(given) == found
    named = with_absolute_paths(ServerConfig(model="models/m", served_model_name=("n",), store="file://s"))
    assert (named.served_model_name, named.store) == (("n",), f"{at}/s")
    for model, store in (("org/model", "s3://b/p"), (None, None)):
        other = with_absolute_paths(ServerConfig(model=model, store=store))
        assert (other.model, other.served_model_name, other.store) == (model, (), store)


def test_engines_of_one_machine_share_its_memory() -> None:
    plain = ServerConfig(device="cpu")
    assert share_memory(plain, 1) == plain
    half, third = (share_memory(plain, count).kv_cache_memory_bytes for count in (2, 3))
    assert half is not None and third is not None and 1.3 < half / third < 1.7
    given = ServerConfig(device="cpu", kv_cache_memory_bytes=1 << 20)
    assert share_memory(given, 3) == given and share_memory(ServerConfig(device="cuda"), 3).kv_cache_memory_bytes is None


def test_a_host_needs_python_only() -> None:
    source = Path(str(processhost.__file__)).read_text()
    assert {found.name.split(".")[0] for found in imports(source)} <= sys.stdlib_module_names


def test_rays_low_priority_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes inherit their host's priority; engines of fleets ran at niceness 15."""
    given: list[int] = []
    monkeypatch.delenv("RAY_worker_niceness", raising=False)
    monkeypatch.setattr("os.getpriority", lambda which, who: 15)
    monkeypatch.setattr("os.setpriority", lambda which, who, priority: given.append(priority))
    assert undo_niceness() == "" and given == [0]

    def refuse(which: int, who: int, priority: int) -> None:
        raise PermissionError

    monkeypatch.setattr("os.setpriority", refuse)
    assert "RAY_worker_niceness=0" in undo_niceness()
    monkeypatch.setenv("RAY_worker_niceness", "5")
    assert undo_niceness() == ""
