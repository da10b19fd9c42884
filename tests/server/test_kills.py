"""Jobs on a server whose processes are killed again and again, on a disk that is full, read-only, or has lied.

COSERVE_KILLS: how many kills (3); COSERVE_KILL_SEED: which ones; COSERVE_KILL_MODEL: a model's directory (a tiny model). What
counts: every job ends, each of its steps is on record once, and its losses are those of a run that nobody disturbed, to the
last bit.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.conftest import RunningServer, StartServer, is_alive, run_coserve, wait_until
from tests.tiny_directory import chat_lines

pytestmark = pytest.mark.full
pytest_plugins = ["tests.server.postgres"]

KILLS = int(os.environ.get("COSERVE_KILLS", "3"))
SEED = int(os.environ.get("COSERVE_KILL_SEED", "0"))
MODEL = os.environ.get("COSERVE_KILL_MODEL")
EPOCHS, BATCH, LINES = 20 if MODEL is None else 4, 4, 24
STEPS = EPOCHS * LINES // BATCH
ENDED = ("succeeded", "failed", "cancelled")
LINES_OF = "".join(json.dumps(line) + "\n" for line in chat_lines(LINES)).encode()
Row = dict[str, str]


@pytest.fixture
def start_server(start_server: StartServer) -> StartServer:
    """Servers of COSERVE_KILL_MODEL, if it is set."""

    def start(*options: str, data_dir: Path | None = None) -> RunningServer:
        return start_server(*options, "--kv-cache-memory-bytes", str(1 << 30), data_dir=data_dir, model=Path(str(MODEL)))

    return start_server if MODEL is None else start


class Jobs:
    """The jobs of one server, over its restarts."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.seeds: dict[str, int] = {}

    def get(self, path: str, **query: Any) -> Any:
        response = httpx.get(self.server.url + path, params=query, timeout=60)
        assert response.status_code == 200, (path, response.text)
        return response.json()

    def upload(self, content: bytes = LINES_OF) -> httpx.Response:
        files = {"file": ("train.jsonl", content)}
        return httpx.post(f"{self.server.url}/v1/files", files=files, data={"purpose": "fine-tune"}, timeout=60)

    def post(self, file: str, seed: int, **fields: Any) -> httpx.Response:
        body = {
            "model": self.server.model_name, "training_file": file, "seed": seed, "rank": 4, "checkpoint_steps": 7,
            "keep_checkpoints": 3,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}}},
            **fields,
        }
        return httpx.post(f"{self.server.url}/v1/fine_tuning/jobs", json=body, timeout=60)

    def create(self, seed: int, **fields: Any) -> str:
        sent = self.upload()
        assert sent.status_code == 200, sent.text
        made = self.post(sent.json()["id"], seed, **fields)
        assert made.status_code == 200, made.text
        id: str = made.json()["id"]
        self.seeds[id] = seed
        return id

    def status(self, id: str) -> str:
        found: str = self.get(f"/v1/fine_tuning/jobs/{id}")["status"]
        return found

    def checkpoints(self, id: str) -> list[Path]:
        return sorted((self.server.data_dir / "jobs" / id / "output" / "checkpoints").glob("step-*"))

    def unfinished(self) -> list[str]:
        return [id for id in self.seeds if self.status(id) not in ENDED]

    def events(self, id: str) -> list[dict[str, Any]]:
        """All, newest first."""
        found: list[dict[str, Any]] = []
        more = True
        while more:
            query = {"after": found[-1]["id"]} if found else {}
            page = self.get(f"/v1/fine_tuning/jobs/{id}/events", limit=100, **query)
            found += page["data"]
            more = page["has_more"]
        return found

    def rows(self, id: str) -> list[Row]:
        """The engine's metrics, without the time that steps took."""
        with (self.server.data_dir / "jobs" / id / "output" / "metrics.csv").open(newline="") as file:
            return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]

    def check(self, id: str, expected: list[Row]) -> None:
        """The job succeeded and is on record once, everywhere."""
        job = self.get(f"/v1/fine_tuning/jobs/{id}")
        assert job["status"] == "succeeded", (job, self.events(id))
        rows = self.rows(id)
        assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1))
        assert rows == expected
        events = self.events(id)
        told = [event["data"] for event in events if event["type"] == "metrics"][::-1]
        assert [data["step"] for data in told] == list(range(1, STEPS + 1))
        assert [data["train_loss"] for data in told] == [float(row["train_loss"]) for row in rows]
        assert sum(event["message"] == "The job has successfully completed" for event in events) == 1
        (result,) = job["result_files"]
        content = httpx.get(f"{self.server.url}/v1/files/{result}/content", timeout=30).content
        assert len(base64.b64decode(content).splitlines()) == STEPS + 1
        models = [model["id"] for model in self.get("/v1/models")["data"]]
        assert models.count(job["fine_tuned_model"]) == 1
        body = {"model": job["fine_tuned_model"], "prompt": "x", "max_tokens": 2}
        assert httpx.post(f"{self.server.url}/v1/completions", json=body, timeout=60).status_code == 200

    def check_disk(self) -> None:
        """Nothing half-written stays, and every result is there once."""
        left = [path for path in self.server.data_dir.rglob("*") if path.name.endswith(".tmp") or ".tmp" in path.suffixes]
        assert left == []
        results = self.get("/v1/files", purpose="fine-tune-results")["data"]
        assert len(results) == len(self.seeds)


def undisturbed(start_server: StartServer, directory: Path, seeds: list[int], *options: str) -> dict[int, list[Row]]:
    """Metrics of the same jobs on a server that is left alone, by seed."""
    server = start_server("--deterministic", *options, data_dir=directory)
    jobs = Jobs(server)
    for seed in seeds:
        jobs.create(seed)
    wait_until(lambda: not jobs.unfinished(), 120 + 30 * len(seeds))
    found = {seed: jobs.rows(id) for id, seed in jobs.seeds.items()}
    assert server.stop() == 0, server.log
    return found


def kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(params=["sqlite", "postgresql"])
def index(request: pytest.FixtureRequest) -> list[str]:
    """Options of a server whose index lies in such a database."""
    if request.param == "sqlite":
        return []
    return ["--database-url", str(request.getfixturevalue("postgres_url"))]


@pytest.mark.timeout(600 + 60 * KILLS)
def test_random_kills_lose_and_repeat_nothing(start_server: StartServer, tmp_path: Path, index: list[str]) -> None:
    draw = random.Random(SEED)
    server = start_server("--deterministic", *index)
    jobs = Jobs(server)
    seeds = iter(range(1000))
    for _ in range(KILLS):
        while len(jobs.unfinished()) < 2:
            jobs.create(next(seeds))
        time.sleep(draw.uniform(0, 2.5))
        target = draw.choice(("engine", "server", "both", "stop"))
        engine = server.engine_pid
        if target == "engine":
            kill(engine)
            wait_until(lambda: bool({*server.engine_pids} - {engine}), 90)  # noqa: B023  # before, it may not know yet
            wait_until(lambda: server.is_ready, 90)  # noqa: B023
            continue
        if target == "stop":
            assert server.stop() == 0, server.log
        elif target == "server":
            kill(server.pid)
        else:
            kill(*(server.pid, engine) if draw.random() < 0.5 else (engine, server.pid))
        server.process.wait(10)
        wait_until(lambda: not is_alive(engine), 30)  # noqa: B023  # one that is still importing looks at its parent after that
        jobs.server = server = start_server("--deterministic", *index, data_dir=server.data_dir)
    wait_until(lambda: not jobs.unfinished(), 240)
    expected = undisturbed(start_server, tmp_path / "reference", list(jobs.seeds.values()))
    for id, seed in jobs.seeds.items():
        jobs.check(id, expected[seed])
    jobs.check_disk()
    assert "Traceback" not in server.log


def test_a_damaged_checkpoint_is_passed_over(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--deterministic")
    jobs = Jobs(server)
    id = jobs.create(0)
    wait_until(lambda: len(jobs.checkpoints(id)) >= 2, 60)
    engine = server.engine_pid
    kill(engine, server.pid)
    server.process.wait(10)
    wait_until(lambda: not is_alive(engine), 5)
    newest = jobs.checkpoints(id)[-1]
    file = newest / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    jobs.server = start_server("--deterministic", data_dir=server.data_dir)
    wait_until(lambda: jobs.status(id) in ENDED, 120)
    warnings = [event["message"] for event in jobs.events(id) if event["level"] == "warn"]
    assert any(newest.name in warning and "using the one before" in warning for warning in warnings), warnings
    jobs.check(id, undisturbed(start_server, tmp_path / "reference", [0])[0])
    jobs.check_disk()


# --- disks ---


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """mount(path, options): a file system in memory, until the test ends."""
    mounted: list[Path] = []

    def run(path: Path, options: str) -> None:
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, check=False, timeout=30)
        except FileNotFoundError:
            pytest.skip("there is no command to mount a file system")
        if done.returncode:
            pytest.skip(f"a file system can't be mounted here: {done.stderr.decode().strip()}")
        mounted.append(path)

    yield run
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", str(path)], check=False, timeout=30)


def fill(directory: Path) -> Path:
    """A file that takes what is left, and more if there is more by now."""
    path = directory / "filler"
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return path


def answers(server: RunningServer) -> None:
    """It serves as ever."""
    body = {"prompt": "x", "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert server.is_ready
    for path in ("/v1/files", "/v1/models", "/v1/fine_tuning/jobs", "/metrics"):
        assert httpx.get(server.url + path, timeout=60).status_code == 200, path


def refused(response: httpx.Response, word: str) -> None:
    assert response.status_code == 429, (response.status_code, response.text)
    assert word in response.json()["error"]["message"]
    assert response.headers["retry-after"]


def test_a_full_disk_stops_writing_and_nothing_else(
    start_server: StartServer, tmp_path: Path, mount: Callable[..., None]
) -> None:
    mount(tmp_path / "data", "size=12m")
    server = start_server()
    engine = server.engine_pid
    jobs = Jobs(server)
    file = jobs.upload().json()["id"]
    running = jobs.create(0, checkpoint_steps=1, keep_checkpoints=2)
    wait_until(lambda: len(jobs.checkpoints(running)) > 0, 60)
    filler = fill(server.data_dir)
    time.sleep(1)  # the job has taken back an old checkpoint and been stopped by the next
    fill(server.data_dir)
    refused(jobs.upload(LINES_OF * 20), "full")
    refused(jobs.post(file, 1), "full")
    answers(server)
    time.sleep(2)
    answers(server)
    assert server.engine_pid == engine
    assert jobs.status(running) == "running"
    paused = httpx.post(f"{server.url}/v1/fine_tuning/jobs/{running}/pause", timeout=10)
    assert (paused.status_code, paused.json()["paused"]) == (200, True), "steered while it waits"
    assert jobs.get(f"/v1/fine_tuning/jobs/{running}")["paused"]
    assert not httpx.post(f"{server.url}/v1/fine_tuning/jobs/{running}/resume", timeout=10).json()["paused"]
    filler.unlink()
    wait_until(lambda: jobs.status(running) in ENDED, 60)
    ended = jobs.get(f"/v1/fine_tuning/jobs/{running}")
    assert ended["status"] == "succeeded", ended
    assert [int(row["step"]) for row in jobs.rows(running)] == list(range(1, STEPS + 1))
    told = [event["message"] for event in jobs.events(running)]
    assert sum("the disk is full: the job waits" in message for message in told) == 1, told
    assert jobs.upload().status_code == 200
    again = jobs.create(2)
    wait_until(lambda: jobs.status(again) in ENDED, 90)
    assert jobs.status(again) == "succeeded"
    assert not [path for path in server.data_dir.rglob("*") if path.name.endswith(".tmp")]
    assert (server.engine_pid, server.stop()) == (engine, 0), server.log


def test_a_read_only_disk_stops_writing_and_nothing_else(
    start_server: StartServer, tmp_path: Path, mount: Callable[..., None]
) -> None:
    server = start_server()
    engine = server.engine_pid
    jobs = Jobs(server)
    file = jobs.upload().json()["id"]
    mount(server.data_dir / "jobs", "ro")
    refused(jobs.post(file, 0), "can't be written")
    mount(server.data_dir / "files", "ro")
    refused(jobs.upload(), "can't be written")
    answers(server)
    assert server.engine_pid == engine


def test_a_server_does_not_start_on_a_read_only_disk(tmp_path: Path, mount: Callable[..., None], tiny_model: Path) -> None:
    mount(tmp_path / "data", "ro")
    result = run_coserve("serve", str(tiny_model), "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: data_dir: ") and result.stderr.count("\n") == 1, result.stderr
