"""Whole servers on a tiny model, as `coserve serve` starts them: a process for the API, which has one for the engine.

COSERVE_TEST_FLEET: the URL of a PostgreSQL database beside which others can be made. Servers are then fleets of two replicas on
Ray, so that what holds for one server is tried through the address of a fleet; tests of a server's own processes and files
have no meaning there.

`server` is shared by all tests of a run; `start_server` gives a test its own, to be killed or told otherwise. `site` has the
routes of inference without an engine: on fakes, in the test's own process. `play` runs stories of jobs on a fake engine.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import make_url

from coserve.cachedir import cache_directory
from coserve.text.tokenizer import ChatTokenizer
from tests.server.jobs_bench import play_stories
from tests.server.sites import Site, open_site
from tests.tiny_directory import build_tiny_directory
from tests.tiny_tokenizer import build_tiny_tokenizer

START_S = 120.0
_PROGRAM = "from coserve.cli.main import main; main()"
FLEET = os.environ.get("COSERVE_TEST_FLEET")
single_server = pytest.mark.skipif(FLEET is not None, reason="is about the processes or files of a single server")
_SETTINGS = ("--dtype", "float32", "--threads", "1", "--kv-cache-memory-bytes", str(32 << 20), "--max-file-bytes", str(4 << 20))


def run_coserve(*arguments: str, timeout: float = START_S) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started and that live."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that these have."""
    return [found for child in children(pid) for found in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    """Whether there is such a process, one that waits to be buried aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_of(module: str, pids: Iterable[int]) -> list[int]:
    """Those of some processes that run a module of this name."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it may have ended
            found += [pid] * (module.encode() in Path(f"/proc/{pid}/cmdline").read_bytes())
    return found


def resident_bytes(pid: int) -> int:
    """A process's memory that is not swapped out."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """How long it took; fails if it takes longer than `seconds`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - began


_PATH = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Some programs of tests are in tests/: the engine's process must find them too."""


def fleet_options(data_dir: Path) -> list[str]:
    """Options of a fleet over a database and a store of the data directory's own; none without COSERVE_TEST_FLEET."""
    if FLEET is None:
        return []
    url = make_url(FLEET)
    name = f"test_{zlib.crc32(str(data_dir).encode())}"
    with psycopg.connect(url.render_as_string(hide_password=False), autocommit=True) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone() is None:
            connection.execute(f"CREATE DATABASE {name}")
    database = url.set(database=name).render_as_string(hide_password=False)
    return ["--replicas", "2", "--database-url", database, "--store", str(data_dir / "store")]


class RunningServer:
    """One server. url: without /v1; log: what it has printed."""

    def __init__(self, model: Path, data_dir: Path, *options: str, program: Sequence[str] = ("-c", _PROGRAM)) -> None:
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        self.model, self.data_dir = model, data_dir
        self._log_path = data_dir.with_name(f"{data_dir.name}-{time.monotonic_ns()}.log")
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *program, "serve", str(model), "--port", "0", "--data-dir", str(data_dir), *_SETTINGS,
                 *fleet_options(data_dir), *options],
                stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _PATH},
            )
        try:
            wait_until(lambda: "OpenAI(base_url=" in self.log or self.process.poll() is not None, START_S)
        except BaseException:
            self.process.kill()
            raise
        assert self.process.poll() is None, self.log
        self.url = self.log.replace('\\"', '"').partition('OpenAI(base_url="')[2].partition('/v1"')[0]

    @property
    def log(self) -> str:
        return self._log_path.read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pids(self) -> list[int]:
        """Of the engines' processes, whichever they are now: one, or one per replica."""
        if FLEET is not None:
            return sorted(processes_of("enginemain", descendants(self.pid)))
        own = children(self.pid)
        return sorted({*own} - {*processes_of("checkmain", own)})  # some tests have engines of another program

    @property
    def engine_pid(self) -> int:
        """Of the engine's process, or of one replica's."""
        return self.engine_pids[0]

    @property
    def is_ready(self) -> bool:
        """Whether its engine takes requests."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def model_name(self) -> str:
        """The base model's."""
        name: str = httpx.get(f"{self.url}/v1/models", timeout=30).json()["data"][0]["id"]
        return name

    def kill_engine(self) -> int:
        """kill -9; the number it had."""
        pid = self.engine_pid
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self, timeout: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout)
            raise


StartServer = Callable[..., RunningServer]
Play = Callable[..., None]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory; the profile of its speed is kept for the session, compiled kernels and converted models for all."""
    cache = tmp_path_factory.mktemp("cache")
    for name in ("kernels", "models"):
        (cache_directory() / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(cache_directory() / name)
    os.environ["COSERVE_CACHE"] = str(cache)
    return build_tiny_directory(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The server that tests share: no keys, a small pool, adapters below its data directory."""
    data_dir = tmp_path_factory.mktemp("server") / "data"
    running = RunningServer(tiny_model, data_dir, "--adapter-root", str(data_dir))
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture
def start_server(tiny_model: Path, tmp_path: Path) -> Iterator[StartServer]:
    """start_server(*options, data_dir=None, model=None): servers that end with the test; of the tiny model by default."""
    running: list[RunningServer] = []

    def start(*options: str, data_dir: Path | None = None, model: Path | None = None, **how: Any) -> RunningServer:
        running.append(RunningServer(model or tiny_model, data_dir or tmp_path / "data", *options, **how))
        return running[-1]

    yield start
    for one in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and no weights, which is what the API process reads of a model."""
    return build_tiny_tokenizer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def play(model: Path, tmp_path: Path) -> Play:
    """play(*stories, **settings): as `play_stories`, over a data directory of the test's own."""
    return partial(play_stories, model, tmp_path / "data")


@pytest.fixture(scope="module")
def running_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The one that a file's tests share."""
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    with open_site(tokenizer) as site:
        yield site


@pytest.fixture
def site(running_site: Site) -> Iterator[Site]:
    """A site on which nothing has been asked yet. Every request of the test must have been counted as ended."""
    running_site.reset()
    yield running_site
    assert all(meter.ends for meter in running_site.metrics.meters), "a request was never counted as ended"
