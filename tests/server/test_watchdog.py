"""An engine process that hangs: it is seen, told in the log with what ran, and started again; nothing is lost."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq
import zmq.asyncio

from coserve.core import CoserveError
from coserve.server.jobs.queue import UnfinishedJob
from coserve.server.link import setup
from coserve.server.link.activity import (
    ENGINE,
    FIRST_CALL,
    PLACE_BYTES,
    PLACES,
    PULSE,
    ActivityPage,
    CallPlaces,
    start_pulse,
)
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.process import EngineProcess
from coserve.server.link.watchdog import FACTOR, Watchdog
from coserve.server.records import JobRecord
from coserve.server.settings import ServerConfig
from tests.server.conftest import RunningServer, StartServer, is_alive, wait_until
from tests.server.hanging_engine import HANG, LOADING
from tests.tiny_adapter import write_tiny_adapter
from tests.tiny_directory import chat_lines

PROGRAM = ("-m", "tests.server.serve_hanging")
LINES = "".join(json.dumps(line) + "\n" for line in chat_lines(24)).encode()


# --- the page and its bounds ---


def look_for(dog: Watchdog, seconds: float, *, start: float = 0.0, **options: Any) -> list[str]:
    """A look per second for so long; what hung."""
    found = []
    for second in range(int(seconds) + 1):
        hang = dog.look(now=start + second, **options)
        if hang is not None:
            found.append(f"{hang.reading.activity} after {hang.seconds:.0f}")
    return found


def test_what_does_not_end_is_a_hang_after_the_timeout_and_not_before(tmp_path: Path) -> None:
    page = ActivityPage(tmp_path / "page", create=True)
    other = ActivityPage(tmp_path / "page")  # as the other process sees it
    (tmp_path / "page").unlink()
    page.place(ENGINE).begin("an iteration (decode)", 0.1, jobs=["ftjob-1"], requests=["r1", "r2"])
    dog = Watchdog(other, 60)
    assert look_for(dog, 60) == []
    assert look_for(dog, 0, start=61) == ["an iteration (decode); jobs ftjob-1; requests r1, r2 after 61"]


def test_the_page_has_its_room_on_the_disk(tmp_path: Path) -> None:
    ActivityPage(tmp_path / "page", create=True).close()
    taken = (tmp_path / "page").stat().st_blocks * 512
    assert taken >= PLACES * PLACE_BYTES, "a full disk would end whoever writes to it by SIGBUS"


@pytest.mark.parametrize(("code", "reason"), [
    (-9, "it was ended by signal SIGKILL"), (-40, "it was ended by signal 40"), (3, "it ended with exit code 3"),
])
def test_every_end_of_a_process_has_a_reason(tmp_path: Path, code: int, reason: str) -> None:
    nothing: Any = None
    process = EngineProcess(nothing, nothing, tmp_path, ActivityPage(None), 0)
    assert process.describe_end(code, None, hung=False).reason == reason


def test_a_server_that_was_killed_leaves_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(setup.os, "_exit", ended.append)
    (tmp_path / "coserve-1").mkdir()
    setup.end_with(io.BytesIO(), str(tmp_path / "coserve-1"))
    wait_until(lambda: ended == [1], 5)
    assert not (tmp_path / "coserve-1").exists()


def test_a_start_that_gets_no_socket_fails_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def spawn(*_: object) -> EngineProcess:
        raise zmq.ZMQError(errno.EMFILE)

    monkeypatch.setattr(EngineProcess, "spawn", spawn)
    client = EngineClient(ServerConfig(data_dir=tmp_path))
    with pytest.raises(CoserveError, match="can't start: Too many open files"):
        asyncio.run(asyncio.wait_for(client.supervisor.start(), 10))


def test_a_process_that_cannot_be_started_leaves_no_open_file_and_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory for another process")

    def num_open() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    async def play() -> tuple[int, int]:
        context = zmq.asyncio.Context()
        counts = []
        for _ in range(4):  # the first one starts the context's own threads
            with pytest.raises(OSError, match="no memory"):
                await EngineProcess.spawn(ServerConfig(data_dir=tmp_path), context)
            await asyncio.sleep(0.05)
            counts.append(num_open())
        last = counts[-1]
        for _ in range(100):  # sockets are closed by the context's thread
            if last <= counts[0]:
                break
            await asyncio.sleep(0.05)
            last = num_open()
        context.destroy(linger=0)
        return counts[0], last

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", refuse)
    first, last = asyncio.run(play())
    assert last <= first and not list(tmp_path.glob("coserve-*"))


def test_what_is_predicted_to_take_long_gets_a_multiple_of_that() -> None:
    page = ActivityPage(None)
    page.place(ENGINE).begin("an iteration (prefill)", 10.0)
    dog = Watchdog(page, 60)
    assert look_for(dog, FACTOR * 10) == []
    assert len(look_for(dog, 0, start=FACTOR * 10 + 1)) == 1


def test_many_short_things_are_no_hang_and_neither_is_idleness() -> None:
    page = ActivityPage(None)
    place, dog = page.place(ENGINE), Watchdog(page, 60)
    for second in range(200):
        place.begin("an iteration")
        assert dog.look(now=second) is None
    place.end()
    assert look_for(dog, 500, start=200) == []


def test_time_in_which_the_watcher_did_not_run_does_not_count() -> None:
    """Both processes were halted for an hour, or the machine slept."""
    page = ActivityPage(None)
    page.place(ENGINE).begin("an iteration")
    dog = Watchdog(page, 60)
    dog.look(now=0)
    dog.look(now=1)
    assert dog.look(now=3600) is None
    assert look_for(dog, 56, start=3601) == []
    assert len(look_for(dog, 5, start=3658)) > 0


def test_texts_of_any_size_and_kind_are_read_back() -> None:
    page = ActivityPage(None)
    place = page.place(PLACES - 1)
    place.begin("ü🙂" * 4000, 1.0, jobs=["j"] * 500, requests=(f"request-{n}" for n in range(500)))
    (reading,) = page.read()
    assert reading.activity.num_requests == 500 and len(reading.activity.requests) == 64
    assert str(reading.activity).endswith("and 436 more")
    place.begin("x", requests=["r" * 100_000])
    assert page.read()[0].activity.num_requests == 1


def test_a_page_that_is_read_while_it_is_written_is_never_torn() -> None:
    page, done = ActivityPage(None), threading.Event()

    def write() -> None:
        place = page.place(ENGINE)
        while not done.is_set():
            for text in ("a" * 500, "b"):
                place.begin(text)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3000):
            for reading in page.read():
                assert reading.activity.what in ("a" * 500, "b")
    finally:
        done.set()
        thread.join()


def test_calls_have_places_of_their_own_and_more_calls_than_places_are_no_error() -> None:
    page = ActivityPage(None)
    places, inside, leave = CallPlaces(page), threading.Semaphore(0), threading.Event()
    count = PLACES - FIRST_CALL + 2

    def call(number: int) -> None:
        with places.doing(f"call {number}", 1.0, jobs=[f"ftjob-{number}"]):
            inside.release()
            leave.wait(10)

    with ThreadPoolExecutor(count) as pool:
        for number in range(count):
            pool.submit(call, number)
        for _ in range(count):
            inside.acquire()
        assert len(page.read()) == PLACES - FIRST_CALL
        leave.set()
    assert page.read() == []


def test_the_pulse_falls_silent_with_the_process() -> None:
    page = ActivityPage(None)
    start_pulse(page)
    wait_until(lambda: bool(page.read()), 5)
    first = page.read()[0]
    assert first.place == PULSE
    wait_until(lambda: page.read()[0].number != first.number, 5)


# --- a job that ends the engine again and again ---


def live_job() -> UnfinishedJob:
    return UnfinishedJob(JobRecord(
        id="ftjob-1", tenant="me", created_at=1, base="b", training_file="file-1", validation_file=None, config={},
        method={}, settings={}, start=None, suffix=None, seed=0, integrations=(), metadata={}, priority=0, weight=1.0,
        deadline=None,
    ))


def test_a_job_is_given_up_after_three_ends_at_the_same_step() -> None:
    job = live_job()
    job.furthest = 7
    assert [job.strike(alone=True) for _ in range(3)] == [False, False, True]


def test_steps_between_two_ends_speak_for_the_job() -> None:
    job = live_job()
    for step in range(20):
        job.furthest = step
        assert not job.strike(alone=True)


def test_work_that_also_held_requests_counts_half() -> None:
    job = live_job()
    assert [job.strike(alone=False) for _ in range(6)] == [False] * 5 + [True]


# --- whole servers ---


@pytest.fixture
def start(start_server: StartServer) -> Callable[..., RunningServer]:
    def run(*options: str, **how: Any) -> RunningServer:
        return start_server("--watchdog-timeout", "3", *options, program=PROGRAM, **how)

    return run


def order(server: RunningServer, text: str) -> Path:
    path = server.data_dir / HANG
    path.write_text(text)
    return path


def complete(server: RunningServer, request: str = "innocent", **fields: Any) -> httpx.Response:
    body = {"prompt": "x", "max_tokens": 40, "logit_bias": {"2": -100}, **fields}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, headers={"x-request-id": request})


def create_job(server: RunningServer, **fields: Any) -> str:
    file = httpx.post(
        f"{server.url}/v1/files", files={"file": ("t.jsonl", LINES)}, data={"purpose": "fine-tune"}, timeout=30).json()
    body = {
        "model": server.model_name, "training_file": file["id"], "checkpoint_steps": 1000,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 20, "batch_size": 4}}}, **fields,
    }
    found: str = httpx.post(f"{server.url}/v1/fine_tuning/jobs", json=body, timeout=30).json()["id"]
    return found


def get_job(server: RunningServer, id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{id}", timeout=30).json()
    return found


def messages(server: RunningServer, id: str) -> list[str]:
    """Oldest first."""
    found, query = [], {"limit": 100}
    while True:
        page = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{id}/events", params=query, timeout=30).json()
        found += page["data"]
        if not page["has_more"]:
            return [event["message"] for event in found][::-1]
        query["after"] = found[-1]["id"]


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.parametrize("how", ["gil", "sleep"])
def test_a_request_that_hangs_the_engine(start: Callable[..., RunningServer], how: str) -> None:
    server = start()
    engine, orders, began = server.engine_pid, order(server, f"{how} wicked"), time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, server, "wicked")
        reasons = []
        while is_alive(engine):
            response = httpx.get(f"{server.url}/health", timeout=5)
            if response.status_code == 503:
                reasons.append(response.json()["reason"])
            assert time.monotonic() - began < 20
            time.sleep(0.05)
        assert answer.result(10).status_code == 503
    orders.unlink()
    assert any("it hangs" in reason and "wicked" in reason for reason in reasons), "told before the restart"
    wait_until(lambda: server.is_ready, 60)
    assert complete(server).status_code == 200
    (line, *_) = [line for line in server.log.splitlines() if "ERROR api the engine process hangs" in line]
    assert "an iteration (prefill)" in line and "requests wicked#" in line
    assert "hanging_engine.py" in server.log and "in hang" in server.log, "the stack of the engine's thread"


@pytest.mark.full
@pytest.mark.alone
def test_an_adapter_that_hangs_the_engine_while_it_is_loaded(start: Callable[..., RunningServer], tmp_path: Path) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapters" / "wicked")
    server = start("--adapter-root", str(adapter.parent))
    engine, orders = server.engine_pid, order(server, LOADING)
    body = {"lora_name": "wicked", "lora_path": str(adapter)}
    response = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)
    assert response.status_code == 503, response.text
    orders.unlink()
    wait_until(lambda: not is_alive(engine) and server.is_ready, 60)
    assert "load adapter" in server.log
    assert complete(server).status_code == 200


@pytest.mark.full
@pytest.mark.alone
def test_a_job_that_hangs_the_engine_is_given_up_and_others_go_on(start: Callable[..., RunningServer]) -> None:
    server = start("--max-jobs", "2")
    job = create_job(server)
    wait_until(lambda: get_job(server, job)["step"] > 3, 60)
    orders = order(server, f"sleep {job}")
    wait_until(lambda: get_job(server, job)["status"] == "failed", 120)
    orders.unlink()
    error = get_job(server, job)["error"]["message"]
    assert "the engine has stopped 3 times or more while it worked on this job" in error and "it hangs" in error
    told = messages(server, job)
    assert any("begins again at step 1" in message and "again:" in message for message in told)
    wait_until(lambda: server.is_ready, 60)
    other = create_job(server, checkpoint_steps=50)
    wait_until(lambda: get_job(server, other)["status"] == "succeeded", 90)


@pytest.mark.full
@pytest.mark.alone
def test_a_crash_writes_the_stacks_into_the_log(start: Callable[..., RunningServer]) -> None:
    server = start("--log-format", "json", "--enable-log-requests")
    orders = order(server, "crash wicked")
    assert complete(server, "wicked").status_code == 503
    orders.unlink()
    wait_until(lambda: server.is_ready, 60)
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert all({"time", "level", "message", "process"} <= line.keys() for line in lines)
    (crash,) = [line for line in lines if "the engine process crashed" in line["message"]]
    assert crash["level"] == "error" and "hanging_engine.py" in crash["message"]
    (access,) = [line for line in lines if line.get("path") == "/v1/completions"]
    assert (access["request"], access["tenant"], access["status"]) == ("wicked", "default", 503)
    assert all(line["process"] in ("api", "engine") for line in lines)
    assert any("SIGSEGV" in line["message"] for line in lines)


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.parametrize("how", ["gil", "sleep", "stopped"])
def test_the_end_does_not_wait_for_an_engine_that_hangs(start: Callable[..., RunningServer], how: str) -> None:
    server = start("--watchdog-timeout", "600", "--shutdown-timeout", "1")
    engine = server.engine_pid
    order(server, f"{how} wicked")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, server, "wicked")
        time.sleep(1)
        if how == "stopped":
            os.kill(engine, signal.SIGSTOP)
        began = time.monotonic()
        server.process.terminate()
        assert server.process.wait(30) == 0, server.log
        assert time.monotonic() - began < 1 + 2 + 5 + 4
        assert how == "stopped" or answer.result(5).status_code == 503
    assert not is_alive(engine)
    assert "at the end the engine process hangs and is killed" in server.log


@pytest.mark.full
@pytest.mark.alone
def test_sigterm_between_checkpoints_loses_no_step(start: Callable[..., RunningServer]) -> None:
    server = start()
    job = create_job(server)
    wait_until(lambda: get_job(server, job)["step"] > 5, 60)
    began = time.monotonic()
    assert server.stop(30) == 0, server.log
    assert time.monotonic() - began < 8
    (table,) = server.data_dir.glob("jobs/*/output/metrics.csv")
    shown = len(table.read_text().splitlines()) - 1
    (checkpoint,) = (table.parent / "checkpoints").iterdir()
    assert checkpoint.name == f"step-{shown:08d}", "the last whole step"
    again = start(data_dir=server.data_dir)
    wait_until(lambda: get_job(again, job)["status"] == "succeeded", 90)
    told = messages(again, job)
    assert f"resumed after step {shown} from step-{shown:08d}" in told
    assert not [message for message in told if "steps run again" in message or "runs again" in message]
