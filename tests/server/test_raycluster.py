"""A fleet on Ray: three raylets on this machine, and processes that only pretend to serve."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from coserve.cli import manifests
from coserve.core import ConfigError
from coserve.server.replicas import raycluster
from coserve.server.replicas.raycluster import RayFleet, end_limits
from coserve.server.replicas.setup import DRAIN_S
from coserve.server.settings import ServerConfig
from coserve.server.tenants import digest_keys
from tests.server.test_processhost import FAKE, is_alive
from tests.tiny_directory import build_tiny_directory

pytest_plugins = ["tests.server.postgres"]
pytestmark = [pytest.mark.full, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]
SOURCE, ROOT = Path(__file__).parents[2] / "src", Path(__file__).parents[2]


class Fleet:
    """A fleet and what it has logged."""

    def __init__(self, config: ServerConfig, log: pytest.LogCaptureFixture) -> None:
        self.log, self.lines = log, list[str]()
        self.fleet = RayFleet(config, report=self.lines.append, module=FAKE)

    def until(self, condition: Callable[[], object], seconds: float = 40.0) -> None:
        limit = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < limit, "\n".join([*self.lines, *self.log.messages])
            self.fleet.look()

    def serving(self, name: str) -> list[tuple[int, int]]:
        """(host, child) of each time that the process served: its process's number is its child's parent."""
        found = re.findall(rf"^{name}: (?:engine|ingress) serves at .* with child (\d+)", "\n".join(self.log.messages), re.M)
        return [(parent_of(int(child)), int(child)) for child in found]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def config_of(address: str | None, **settings: Any) -> ServerConfig:
    given = {"replicas": 3, "database_url": "postgresql://h/d", "store": "/x", "threads": 1, "device": "cpu", "model": "serves",
             "dtype": "float32"}
    return ServerConfig(**{**given, "ray_address": address, **settings})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one processor each. The command's own is the head."""
    patch = pytest.MonkeyPatch()
    for name, value in {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2", "RAY_health_check_timeout_ms": "10000",
        "RAY_memory_monitor_refresh_ms": "0", "RAY_enable_metrics_collection": "0", "RAY_prestart_worker_first_driver": "0",
    }.items():
        patch.setenv(name, value)
    from ray.cluster_utils import Cluster  # which reads them

    node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        made.add_node(**{name: value for name, value in node.items() if name != "include_dashboard"})
    made.wait_for_nodes()
    yield made
    made.shutdown()
    patch.undo()


def test_a_fleet_serves_loses_processes_hosts_and_a_machine_and_ends(
    cluster: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cluster was started without the variable that holds keys, and in another directory: only the command has them."""
    monkeypatch.setenv("COSERVE_API_KEYS", "alice=hers")
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO)
    made = Fleet(config_of(cluster.address, api_key=("secret",), data_dir=Path("data")), caplog)
    names = ("replica 1", "replica 2", "replica 3")
    with made.fleet as fleet:
        fleet.start()
        made.until(lambda: fleet.ready)
        assert fleet.serving == 3 == fleet.replicas
        assert "replica 3 serves" in made.lines[-1] or any("3 of 3 replicas are ready" in line for line in made.lines)
        served = {name: made.serving(name)[-1] for name in (*names, "ingress")}
        texts = "\n".join(caplog.messages)
        keys = [*digest_keys(["secret", ("alice", "hers")]).items()]
        assert "ingress: ingress serves" in texts and f"keys {keys} token False" in texts
        assert texts.count(f"token False data {tmp_path}/data") == 4
        assert len(re.findall(r"^replica \d: engine serves at .* keys \[\] token False data .*$", texts, re.M)) == 3
        hosts = {name: parent_of(pid) for name, (pid, _) in served.items()}
        assert hosts["ingress"] == os.getpid()
        raylets = {name: parent_of(hosts[name]) for name in names}
        assert len(set(raylets.values())) == 3, "one on each node"

        os.kill(served["replica 1"][0], signal.SIGKILL)  # the process
        made.until(lambda: len(made.serving("replica 1")) == 2 and fleet.ready)
        assert not is_alive(served["replica 1"][1])

        os.kill(hosts["replica 2"], signal.SIGKILL)  # its host
        made.until(lambda: len(made.serving("replica 2")) == 2 and fleet.ready)
        assert not is_alive(served["replica 2"][1])

        head = cluster.head_node.all_processes["raylet"][0].process.pid
        lost = next(name for name in names if raylets[name] != head)
        before, stays = made.serving(lost)[-1], [name for name in names if name != lost]
        os.kill(raylets[lost], signal.SIGKILL)  # a machine
        made.until(lambda: not is_alive(before[1]), 10)
        assert all(is_alive(pid) for name in stays for pid in made.serving(name)[-1])
        made.until(lambda: not fleet.ready)
        assert fleet.serving == 2
        cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 << 20)  # another one
        made.until(lambda: fleet.ready)
        assert parent_of(parent_of(made.serving(lost)[-1][0])) not in raylets.values()

        cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=80 << 20)
        fleet.add()
        made.until(lambda: fleet.serving == 4)
        last = made.serving("replica 4")[-1]
        fleet.remove()
        made.until(lambda: "replica 4: drained" in caplog.messages and not any(map(is_alive, last)))
        assert (fleet.serving, fleet.replicas, fleet.ready) == (3, 3, True)

        pids = [pid for name in (*names, "ingress") for pid in made.serving(name)[-1]]
        fleet.stop()
        assert not any(map(is_alive, pids))
        order = [line for line in caplog.messages if line.endswith("drained")]
        assert order[1] == "ingress: drained" and {*order[2:]} == {f"{name}: drained" for name in names}


def test_replicas_have_time_to_hand_over_their_jobs() -> None:
    """The command ended them after 45 s."""
    limits = end_limits(config_of(None, shutdown_timeout=10.0))
    assert [*limits] == ["ingress", "engine"] and limits["engine"] > 10.0 + DRAIN_S
    assert sum(limits.values()) < manifests._GRACE_S, "pods and units get as long"


def test_secrets_that_ray_would_keep_are_warned_of(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    for settings, count in (
        ({"database_url": "postgresql://u:secret@h/d", "api_key": ("secret",)}, 2),
        ({"database_url": "postgresql://h/d?password=secret"}, 1), ({"database_url": "postgresql://u@h/d"}, 0),
    ):
        caplog.clear()
        with Fleet(config_of(cluster.address, replicas=1, **settings), caplog).fleet as fleet:
            fleet.start()
        warnings = [record.getMessage() for record in caplog.records if record.name == raycluster.__name__]
        assert len([line for line in warnings if "Ray keeps" in line]) == count and "secret" not in caplog.text


def test_what_keeps_a_process_from_starting_ends_the_start(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = Fleet(config_of(cluster.address, model="refuses", replicas=1), caplog)
    with made.fleet as fleet:
        fleet.start()
        with pytest.raises(ConfigError, match="model: there is no such model"):
            made.until(lambda: fleet.ready)


def test_another_version_ends_the_start_but_nothing_that_runs(
    cluster: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine's coserve is replaced while the fleet runs: hosts that start there afterwards have another one."""
    caplog.set_level(logging.INFO)
    made = Fleet(config_of(cluster.address, replicas=1), caplog)
    with made.fleet as fleet:
        fleet.start()
        made.until(lambda: fleet.ready)
        monkeypatch.setattr(raycluster, "version", lambda name: "9.9")
        fleet.look()
        fleet._package = "9.8"
        for _ in range(3):
            fleet.look()
        warnings = [line for line in caplog.messages if "this command 9.8" in line]
        assert len(warnings) == 2 and fleet.ready, "one of each process"
    late = Fleet(config_of(cluster.address, replicas=1), caplog)
    with late.fleet as fleet:
        fleet.start()
        with pytest.raises(ConfigError, match=r"has coserve .*, this command 9\.9"):
            late.until(lambda: fleet.ready)


def test_the_ingress_runs_where_ray_offers_no_processors(
    cluster: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a head of `ray start --head --num-cpus=0`, and in the command's pod on Kubernetes."""
    from ray.cluster_utils import Cluster

    node = {"num_gpus": 0, "object_store_memory": 80 << 20}
    other = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0, "include_dashboard": False})
    try:
        other.add_node(num_cpus=1, **node)
        caplog.set_level(logging.INFO)
        made = Fleet(config_of(other.address, replicas=1), caplog)
        with made.fleet as fleet:
            fleet.start()
            made.until(lambda: fleet.ready)
            fleet.stop()
    finally:
        other.shutdown()


def test_a_process_that_ray_will_never_place_ends_the_command(cluster: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = Fleet(config_of(cluster.address, replicas=1), caplog)
    with made.fleet as fleet:
        place = fleet._actor

        def elsewhere(setup: Any, **options: Any) -> Any:
            strategies = fleet._ray.util.scheduling_strategies
            gone = strategies.NodeAffinitySchedulingStrategy("e" * 56, soft=False)
            return place(setup, **{**options, "scheduling_strategy": gone})

        fleet._actor = elsewhere  # type: ignore[method-assign]
        fleet.start()
        with pytest.raises(ConfigError, match="ray_address: replica 1: Ray has no place for it"):
            made.until(lambda: fleet.ready)


def test_a_cluster_without_tokens_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Both where this command has none, and where only this command has one."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with RayFleet(config_of("127.0.0.1:1")) as fleet, pytest.raises(ConfigError, match="without token authentication"):
        fleet.start()
    monkeypatch.setenv("RAY_enable_metrics_collection", "0")
    open_to_all = Cluster(initialize_head=True, head_node_args={
        "num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False})
    try:
        program = (
            "from tests.server.test_raycluster import *\n"
            f"with RayFleet(config_of({open_to_all.address!r}), module=FAKE) as fleet:\n"
            "    try: fleet.start()\n"
            "    except ConfigError as error: print(error)\n"
        )
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 64, "PYTHONPATH": f"{SOURCE}:{ROOT}"}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False, timeout=180)
        assert done.stdout.startswith("ray_address: ") and "takes commands without a token" in done.stdout, done
    finally:
        with contextlib.suppress(Exception):
            open_to_all.shutdown()


def test_nothing_is_left_of_a_command_that_is_killed(tmp_path: Path) -> None:
    """With a Ray of its own."""
    program = (
        "import functools\n"
        "from coserve.cli import fleet, main\n"
        "from coserve.server.replicas import raycluster\n"
        f"fleet.RayFleet = functools.partial(raycluster.RayFleet, module={FAKE!r})\n"
        "main.main()\n"
    )
    command = [
        sys.executable, "-c", program, "serve", "serves", "--database-url", "postgresql://h/d", "--store", str(tmp_path),
        "--device", "cpu", "--dtype", "float32", "--threads", "1", "--replicas", "1",
    ]
    log = tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen(
        command, env=own_ray(), stdout=output, stderr=output, cwd=tmp_path
    ) as process:
        wait_for(lambda: "all 1 replicas and the ingress are ready" in log.read_text(), process, log)
        process.kill()
    children = [int(found) for found in re.findall(r"with child (\d+)", log.read_text())]
    limit = time.monotonic() + 20
    while any(map(is_alive, children)):
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert len(children) == 2


def own_ray() -> dict[str, str]:
    """The environment of a command that starts a Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {"PYTHONPATH": str(SOURCE)}


def test_real_replicas_behind_one_address(tmp_path: Path, postgres_url: str) -> None:
    """The whole command on a Ray of its own: requests are answered, also after a replica was killed; there is one more on a
    signal; all ends in order at a terminal's Ctrl-C."""
    model = build_tiny_directory(tmp_path / "model")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        sys.executable, "-m", "coserve", "serve", str(model), "--replicas", "1", "--database-url", postgres_url,
        "--store", str(tmp_path / "store"), "--data-dir", str(tmp_path / "data"), "--device", "cpu", "--dtype", "float32",
        "--threads", "1", "--port", str(port), "--api-key", "k", "--kv-cache-memory-bytes", str(64 << 20),
    ]
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one processor")
    log = tmp_path / "log"
    with log.open("wb") as output, subprocess.Popen(
        command, env=own_ray(), stdout=output, stderr=output, start_new_session=True
    ) as process:
        try:
            wait_for(lambda: "fleet Ray" in log.read_text(), process, log)
            process.send_signal(signal.SIGTTIN)
            wait_for(lambda: "all 2 replicas and the ingress are ready" in log.read_text(), process, log)
            text = complete(port, str(model))
            engines = those_below(process.pid, b"coserve.server.link.enginemain")
            assert len(engines) == 2
            assert those_below(process.pid, b"raylet") and not those_below(process.pid, b"log_monitor")
            os.kill(parent_of(engines[0]), signal.SIGKILL)  # a replica: its engine's parent
            assert complete(port, str(model)) == text
            wait_for(lambda: not is_alive(engines[0]), process, log)  # it notices by itself; the request may be faster
            wait_for(lambda: log.read_text().count("2 of 2 replicas are ready") == 2, process, log)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
            assert not is_alive(engines[1])
        finally:
            process.kill()
    assert "Traceback" not in log.read_text(), log.read_text()


def complete(port: int, model: str) -> str:
    """A greedy completion."""
    body = json.dumps({"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0}).encode()
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return str(json.loads(reply.read())["choices"][0]["text"])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, log.read_text()
        time.sleep(0.2)


def those_below(ancestor: int, name: bytes) -> list[int]:
    """Processes among a process's descendants with a name in their commands, in order of their numbers."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if name not in (place / "cmdline").read_bytes():
                continue
            pid = parent = int(place.name)
            while parent > 1 and parent != ancestor:
                parent = parent_of(parent)
            found += [pid] * (parent == ancestor)
    return sorted(found)
