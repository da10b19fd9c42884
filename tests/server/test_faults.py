"""What is left when processes are killed, and how a server ends. Each test has servers of its own."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import RunningServer, StartServer, is_alive, run_coserve, single_server, wait_until
from tests.tiny_directory import chat_lines, write_lines

pytestmark = pytest.mark.full


def chat_body(server: RunningServer, **fields: Any) -> dict[str, Any]:
    """A request that lasts: end of sequence (token 2) is excluded."""
    return {
        "model": server.model_name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 400,
        "logit_bias": {"2": -100}, **fields,
    }


def chat(server: RunningServer, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/chat/completions", json=chat_body(server, **fields), timeout=60)


class Stream:
    """A streamed request, read by a thread. events: its data lines, once it was closed; ended: when that was."""

    def __init__(self, server: RunningServer, **fields: Any) -> None:
        self.events: list[str] = []
        self.ended: float | None = None
        body = chat_body(server, stream=True, **fields)

        def read() -> None:
            with (
                contextlib.suppress(httpx.RemoteProtocolError),  # cut
                httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response,
            ):
                assert response.status_code == 200
                for line in response.iter_lines():
                    self.begun.set()
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
            self.ended = time.monotonic()

        self.begun = threading.Event()
        self.thread = threading.Thread(target=read, daemon=True)
        self.thread.start()
        assert self.begun.wait(30)


@contextmanager
def in_flight(server: RunningServer) -> Iterator[tuple[Stream, Any]]:
    """A stream and a plain request whose engine has been halted while it worked on them."""
    with ThreadPoolExecutor(1) as pool:
        stream = Stream(server, n=32)
        plain = pool.submit(chat, server, n=32)
        time.sleep(0.1)
        os.kill(server.engine_pid, signal.SIGSTOP)
        yield stream, plain


@single_server
def test_killing_the_engine_fails_what_runs_and_the_next_one_serves(start_server: StartServer) -> None:
    server = start_server()
    with in_flight(server) as (stream, plain):
        began = time.monotonic()
        killed = server.kill_engine()
        response = plain.result(timeout=10)
        assert time.monotonic() - began < 2
        assert response.status_code == 503, response.text
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert response.headers["retry-after"]
        stream.thread.join(10)
    assert stream.ended is not None and stream.ended - began < 2
    assert json.loads(stream.events[-1])["error"]["code"] == "engine_unavailable"
    wait_until(lambda: server.is_ready, 60)
    assert server.engine_pid != killed
    assert chat(server, max_tokens=3).status_code == 200


@single_server
def test_requests_while_the_engine_is_down_are_told_so_at_once(start_server: StartServer) -> None:
    server = start_server()
    server.kill_engine()
    wait_until(lambda: not server.is_ready, 5)
    began = time.monotonic()
    response = chat(server)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    assert time.monotonic() - began < 2
    assert httpx.get(f"{server.url}/v1/models", timeout=5).status_code == 200


def test_killing_the_api_ends_the_engine_and_frees_the_data(start_server: StartServer) -> None:
    server = start_server()
    engines = server.engine_pids
    stream = Stream(server)
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, engines)), 2)
    stream.thread.join(10)
    again = start_server(data_dir=server.data_dir)
    assert chat(again, max_tokens=3).status_code == 200


def test_killing_both_at_once(start_server: StartServer) -> None:
    server = start_server()
    server.kill_engine()
    os.kill(server.pid, signal.SIGKILL)
    again = start_server(data_dir=server.data_dir)
    assert chat(again, max_tokens=3).status_code == 200


@single_server
def test_a_second_server_on_the_same_data_is_refused(start_server: StartServer) -> None:
    server = start_server()
    second = run_coserve("serve", str(server.model), "--port", "0", "--data-dir", str(server.data_dir))
    assert second.returncode == 2
    assert second.stderr == (
        f"error: data_dir: {server.data_dir} is in use by process {server.pid}; stop that one, or give another data_dir\n"
    )
    assert server.is_ready


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_end_lets_a_stream_finish(start_server: StartServer, number: int) -> None:
    if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests run under nohup, which holds for the server too")
    server = start_server()
    engines = server.engine_pids
    stream = Stream(server, max_tokens=200)
    os.kill(server.pid, number)
    assert server.process.wait(30) == 0, server.log
    stream.thread.join(5)
    assert stream.events[-1] == "[DONE]"
    assert not any(map(is_alive, engines))
    assert "Traceback" not in server.log


def test_the_end_cuts_streams_that_last_too_long(start_server: StartServer) -> None:
    server = start_server("--shutdown-timeout", "0.1")
    stream = Stream(server, n=128)
    server.process.terminate()
    began = time.monotonic()
    assert server.process.wait(30) == 0, server.log
    assert time.monotonic() - began < 10
    stream.thread.join(5)
    assert json.loads(stream.events[-1])["error"]["message"] == "the server is ending"
    assert "Traceback" not in server.log


@single_server
def test_a_server_ends_while_its_next_engine_loads(start_server: StartServer) -> None:
    server = start_server()
    server.kill_engine()
    wait_until(lambda: not server.is_ready, 5)
    assert server.stop(15) == 0, server.log


def test_what_keeps_an_engine_from_starting_is_one_line(tmp_path: Path) -> None:
    result = run_coserve("serve", "./nowhere", "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert result.returncode == 2
    assert result.stderr == "error: model ./nowhere: no such directory or file\n"


def test_a_job_goes_on_after_the_engine_was_killed(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server()
    data = write_lines(tmp_path / "train.jsonl", chat_lines(24))
    with data.open("rb") as file:
        uploaded = httpx.post(f"{server.url}/v1/files", files={"file": file}, data={"purpose": "fine-tune"}, timeout=30)
    job = httpx.post(f"{server.url}/v1/fine_tuning/jobs", timeout=30, json={
        "model": server.model_name, "training_file": uploaded.json()["id"],
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 40, "batch_size": 4}}},
    }).json()
    path = f"{server.url}/v1/fine_tuning/jobs/{job['id']}"

    def get() -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(path, timeout=30).json()
        return found

    def has_checkpoint() -> bool:
        return bool(httpx.get(f"{path}/checkpoints", timeout=30).json()["data"])

    wait_until(has_checkpoint, 60)
    assert get()["status"] == "running"
    server.kill_engine()
    wait_until(lambda: get()["status"] in ("succeeded", "failed", "cancelled"), 120)
    ended = get()
    assert ended["status"] == "succeeded", ended
    answer = chat(server, model=ended["fine_tuned_model"], max_tokens=3)
    assert answer.status_code == 200, answer.text
    content = httpx.get(f"{server.url}/v1/files/{ended['result_files'][0]}/content", timeout=30).content
    steps = [int(line.split(",")[0]) for line in base64.b64decode(content).decode().splitlines()[1:]]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == 240
