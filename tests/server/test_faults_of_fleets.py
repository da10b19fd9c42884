"""Replicas behind one address, as plain processes over one PostgreSQL and one directory: what clients see, alone and while
processes are killed, stopped and cut off.

COSERVE_FAULTS: how many random faults (3); COSERVE_FAULT_SEED: which ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql

from tests.server.conftest import wait_until
from tests.server.fleets import Fleet, Network
from tests.server.postgres_cut import CutWay, way_to
from tests.tiny_directory import chat_lines

pytestmark = pytest.mark.full
pytest_plugins = ["tests.server.postgres"]

FAULTS = int(os.environ.get("COSERVE_FAULTS", "3"))
SEED = int(os.environ.get("COSERVE_FAULT_SEED", "0"))
EPOCHS, BATCH, LINES = 20, 4, 24
STEPS = EPOCHS * LINES // BATCH
ENDED = ("succeeded", "failed", "cancelled")
DATA = "".join(json.dumps(line) + "\n" for line in chat_lines(LINES)).encode()
LEASE_S = 20.0
STREAM_S = 5.0
"""Within so many seconds a stream begins, goes on, or ends by an error."""
AWAY_S = float(os.environ.get("COSERVE_DATABASE_AWAY_S", "12"))
"""How long the database can't be reached."""


@pytest.fixture
def way(postgres_url: str) -> Iterator[CutWay]:
    """To the database; it can be cut."""
    with way_to(postgres_url) as found:
        yield found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Path | None]:
    """A file system in memory for the store, so that it can be full; None where nothing can be mounted."""
    place = tmp_path / "fleet" / "store"
    place.mkdir(parents=True)
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, check=False, timeout=30
        )
    except FileNotFoundError:
        yield None
        return
    yield place if done.returncode == 0 else None
    if done.returncode == 0:
        subprocess.run(["umount", "--lazy", str(place)], check=False, timeout=30)


@pytest.fixture
def fleet(tiny_model: Path, tmp_path: Path, way: CutWay, store: Path | None) -> Iterator[Fleet]:
    del store
    network = Network() if Network.available() else None
    running = Fleet(tiny_model, tmp_path / "fleet", way.url, network=network, deterministic=True)
    yield running
    running.stop()
    if network is not None:
        network.close()
    assert "Traceback" not in running.logs, running.logs


class Client:
    """What a user of a fleet does over HTTP."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.http = httpx.Client(timeout=60)
        self.jobs: dict[str, int] = {}

    def get(self, path: str, **query: Any) -> Any:
        response = self.http.get(self.fleet.url + path, params=query)
        assert response.status_code == 200, (path, response.text)
        return response.json()

    @property
    def model(self) -> str:
        return str(self.get("/v1/models")["data"][0]["id"])

    def complete(self, prompt: str, model: str, tokens: int = 24) -> str:
        """The whole text of a greedy completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        response = self.http.post(f"{self.fleet.url}/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return str(response.json()["choices"][0]["text"])

    def create(self, seed: int) -> str:
        """A deterministic job, which has STEPS steps."""
        files = {"file": ("train.jsonl", DATA)}
        sent = self.http.post(f"{self.fleet.url}/v1/files", files=files, data={"purpose": "fine-tune"})
        assert sent.status_code == 200, sent.text
        body = {
            "model": self.model, "training_file": sent.json()["id"], "seed": seed, "rank": 4, "checkpoint_steps": 7,
            "keep_checkpoints": 3,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": EPOCHS, "batch_size": BATCH}}},
        }
        made = self.http.post(f"{self.fleet.url}/v1/fine_tuning/jobs", json=body)
        assert made.status_code == 200, made.text
        id = str(made.json()["id"])
        self.jobs[id] = seed
        return id

    def job(self, id: str) -> Any:
        return self.get(f"/v1/fine_tuning/jobs/{id}")

    def unfinished(self) -> list[str]:
        return [id for id in self.jobs if self.job(id)["status"] not in ENDED]

    def losses(self, id: str) -> list[tuple[int, float]]:
        """(step, loss) of each metrics event, in order of time."""
        found: list[dict[str, Any]] = []
        more = True
        while more:
            page = self.get(f"/v1/fine_tuning/jobs/{id}/events", limit=100, **({"after": found[-1]["id"]} if found else {}))
            found += page["data"]
            more = page["has_more"]
        return [(event["data"]["step"], event["data"]["train_loss"]) for event in found[::-1] if event["type"] == "metrics"]


def test_one_address_for_two_replicas(fleet: Fleet) -> None:
    client = Client(fleet)
    model = client.model
    texts = {client.complete("abc", model) for _ in range(6)}
    assert len(texts) == 1, "every replica gives the same tokens"
    job = client.create(0)
    wait_until(lambda: client.job(job)["status"] in ENDED, 120)
    ended = client.job(job)
    assert ended["status"] == "succeeded", (ended, fleet.logs)
    assert [step for step, _ in client.losses(job)] == list(range(1, STEPS + 1))
    tuned = ended["fine_tuned_model"]
    assert tuned in [entry["id"] for entry in client.get("/v1/models")["data"]]
    threads = [threading.Thread(target=client.complete, args=("abc", tuned, 64)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert client.complete("abc", tuned) not in texts, "the adapter changes what the model says"
    states = client.get("/api/live")["replicas"]
    assert [state["ready"] for state in states] == [True, True]
    metrics = httpx.get(f"{fleet.url}/metrics", timeout=30).text
    assert all(f'engine="{state["id"]}"' in metrics for state in states), "figures of each replica"


class Streams:
    """Greedy streams that run one after another in threads, each compared with what it should say."""

    def __init__(self, client: Client, count: int = 3, tokens: int = 200) -> None:
        self.url, self.model, self.tokens = client.fleet.url, client.model, tokens
        prompts = ("abc " * 12, "hello " * 10, "x y z")  # longer than a block of the prefix cache, and shorter
        self.expected = {prompt: client.complete(prompt, self.model, tokens) for prompt in prompts}
        self.whole = self.broken = 0
        self.errors: list[tuple[str, str]] = []
        self.wrong: list[str] = []
        self.fault = "none yet"
        self.longest_gap = 0.0, ""  # in seconds, and behind which fault
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        while not self._end.is_set():
            prompt = draw.choice(list(self.expected))
            try:
                self._stream(prompt)
            except httpx.HTTPError:  # the ingress was killed, or is not back yet
                self.broken += 1
                time.sleep(0.5)

    def _stream(self, prompt: str) -> None:
        body = {"model": self.model, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0, "ignore_eos": True,
                "stream": True}
        text, failed, last = "", False, time.monotonic()
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=30) as response:
            if response.status_code != 200:
                self.errors.append((self.fault, response.read().decode()))
                time.sleep(0.5)
                return
            for line in response.iter_lines():
                now = time.monotonic()
                self.longest_gap, last = max(self.longest_gap, (now - last, self.fault)), now
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    self.errors.append((self.fault, line))
                    failed = True
                elif event["choices"]:
                    text += event["choices"][0]["text"]
        if failed:
            right = self.expected[prompt].startswith(text)
        else:
            self.whole += 1
            right = text == self.expected[prompt]
        if not right:
            self.wrong.append(f"{prompt!r}: {text!r} for {self.expected[prompt]!r}")


def undisturbed(client: Client, seeds: set[int]) -> dict[int, list[tuple[int, float]]]:
    """Losses of the same jobs on the same fleet, when it is left alone, by seed."""
    ids = {client.create(seed): seed for seed in seeds}
    wait_until(lambda: not client.unfinished(), 240)
    return {seed: client.losses(id) for id, seed in ids.items()}


@pytest.mark.timeout(900 + 120 * FAULTS)
def test_random_faults_lose_and_repeat_nothing(
    fleet: Fleet, way: CutWay, store: Path | None, postgres_url: str
) -> None:
    draw = random.Random(SEED)
    client = Client(fleet)
    streams = Streams(client)
    seeds = iter(range(1000))

    def kill_engine() -> None:
        pid = draw.choice(fleet.replicas).engine_pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    def kill_replica() -> None:
        lost = draw.choice(fleet.replicas)
        lost.send(signal.SIGKILL)
        lost.process.wait(10)
        fleet.replicas.remove(lost)
        fleet.add_replica(lost.network)  # as Ray does

    def kill_ingress() -> None:
        assert fleet.ingress is not None
        fleet.ingress.send(signal.SIGKILL)
        fleet.ingress.process.wait(10)
        fleet.start_ingress()

    def freeze_replica() -> None:
        frozen = draw.choice(fleet.replicas)
        frozen.send(signal.SIGSTOP, family=True)
        time.sleep(LEASE_S + 5)
        frozen.send(signal.SIGCONT, family=True)

    def freeze_engine() -> None:
        pid = draw.choice(fleet.replicas).engine_pid
        if pid is not None:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(LEASE_S)
            os.kill(pid, signal.SIGCONT)

    def make_database_read_only() -> None:
        """As when its disk is full, or another server has become the primary one."""
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            set_default = sql.SQL("ALTER DATABASE {} {} default_transaction_read_only").format
            name = sql.Identifier(connection.info.dbname)
            end_others = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid()"
            )
            connection.execute(sql.SQL("{} = on").format(set_default(name, sql.SQL("SET"))))
            connection.execute(end_others)
            time.sleep(AWAY_S)
            connection.execute(set_default(name, sql.SQL("RESET")))
            connection.execute(end_others)

    def drain_replica() -> None:
        leaving = draw.choice(fleet.replicas)
        fleet.add_replica(leaving.network)
        wait_until(lambda: len(fleet.ready) > 2, 90)
        assert leaving.stop() == 0, leaving.log
        fleet.replicas.remove(leaving)

    def cut_database() -> None:
        way.cut() if draw.random() < 0.5 else way.silence()
        time.sleep(AWAY_S)
        way.mend()

    def cut_network() -> None:
        assert fleet.network is not None
        fleet.network.pull()
        time.sleep(draw.uniform(4, 10))
        fleet.network.plug()

    def fill_store() -> None:
        assert store is not None
        filler = store / "filler"
        with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        time.sleep(6)
        filler.unlink()

    kinds: list[Callable[[], None]] = [
        *([cut_network] if fleet.network else []), kill_replica, freeze_replica, cut_database, kill_engine, freeze_engine,
        make_database_read_only, kill_ingress, drain_replica, *([fill_store] if store else []),
    ]
    begun: list[str] = []
    try:
        for number in range(FAULTS):
            while len(client.unfinished()) < 2:
                client.create(next(seeds))
            time.sleep(draw.uniform(0, 3))
            fault = draw.choice(kinds) if number >= len(kinds) else kinds[number]
            begun.append(fault.__name__)
            streams.fault = f"{number}: {fault.__name__}"
            fault()
            wait_until(lambda: len(fleet.ready) == 2, 120)
        wait_until(lambda: not client.unfinished(), 300)
    finally:
        streams.stop()
    assert not streams.wrong, (begun, streams.wrong)
    print(f"{streams.whole} streams came through, {len(streams.errors)} ended by an error, "
          f"{streams.broken} connections were cut")
    print("the longest wait in a stream:", *streams.longest_gap, *streams.errors, sep="\n")
    assert streams.longest_gap[0] < STREAM_S, (begun, streams.longest_gap)
    assert streams.whole, "some streams must have come through"
    disturbed = dict(client.jobs)
    expected = undisturbed(client, set(disturbed.values()))
    for id, seed in disturbed.items():
        assert client.job(id)["status"] == "succeeded", (begun, client.job(id))
        assert client.losses(id) == expected[seed], (begun, "each step once, and the same losses to the last bit")


def test_a_store_that_has_vanished_is_refused_at_the_start(fleet: Fleet) -> None:
    client = Client(fleet)
    sent = client.http.post(f"{fleet.url}/v1/files", files={"file": ("train.jsonl", DATA)}, data={"purpose": "fine-tune"})
    assert sent.status_code == 200, sent.text
    fleet.settings["store"] = str(fleet.root / "another")
    late = fleet.add_replica()
    assert late.process.wait(60) == 2, late.log
    assert "ERROR engine store: " in late.log and "Traceback" not in late.log, late.log
