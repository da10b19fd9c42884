"""A fleet on this machine, as plain processes without Ray: replicas and an ingress over one PostgreSQL and one directory."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from coserve.server.replicas.setup import FleetSetup, write_setup
from coserve.server.settings import ServerConfig, read_settings
from tests.server.conftest import children, processes_of, wait_until

START_S = 300.0
"""Several processes start at once, each of which imports for seconds."""
_ROOT = Path(__file__).parents[2]
_SETTINGS: dict[str, Any] = {
    "dtype": "float32", "threads": 1, "kv_cache_memory_bytes": 32 << 20, "max_file_bytes": 4 << 20, "shutdown_timeout": 5.0,
}


class Network:
    """A machine of its own for a process: a network namespace with one cable to this one, which can be pulled. Needs root and
    the command ip; `available` tells."""

    _numbers = itertools.count(1)

    def __init__(self) -> None:
        number = os.getpid() % 200 * 100 + next(self._numbers)
        self.name, self._cable = f"coserve{number}", f"cs{number}"
        net = f"10.{77 + number // 250 % 100}.{number % 250}"
        self.address = f"{net}.2"
        for command in (
            f"ip netns add {self.name}",
            f"ip link add {self._cable} type veth peer name eth0 netns {self.name}",
            f"ip addr add {net}.1/24 dev {self._cable}", f"ip link set {self._cable} up",
            f"ip -n {self.name} addr add {self.address}/24 dev eth0", f"ip -n {self.name} link set eth0 up",
            f"ip -n {self.name} link set lo up",
        ):
            subprocess.run(command.split(), check=True, capture_output=True, timeout=30)

    @staticmethod
    def available() -> bool:
        """Whether namespaces can be made here."""
        try:
            Network().close()
        except (OSError, subprocess.SubprocessError):
            return False
        return True

    @property
    def prefix(self) -> tuple[str, ...]:
        """The command that runs another one inside."""
        return ("ip", "netns", "exec", self.name)

    def pull(self) -> None:
        """Nothing passes any more; no side is told."""
        subprocess.run(["ip", "link", "set", self._cable, "down"], check=True, timeout=30)

    def plug(self) -> None:
        """All is as before."""
        subprocess.run(["ip", "link", "set", self._cable, "up"], check=True, timeout=30)

    def close(self) -> None:
        """Removes it; its processes must have ended."""
        subprocess.run(["ip", "netns", "delete", self.name], check=False, capture_output=True, timeout=30)


class FleetProcess:
    """A replica ("engine") or an ingress. name: of its machine, for the others. network: where it runs; None: here."""

    def __init__(self, kind: str, config: ServerConfig, log: Path, name: str = "here", network: Network | None = None) -> None:
        self.kind, self.name, self.network, self._log = kind, name, network, log
        prefix, host = ((), "127.0.0.1") if network is None else (network.prefix, network.address)
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "coserve.server.replicas.main", kind], stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join((str(_ROOT / "src"), str(_ROOT)))},
            )
        assert self.process.stdin is not None
        self.process.stdin.write(write_setup(FleetSetup(config=config, host=host, node=name)))
        self.process.stdin.flush()

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def engine_pid(self) -> int | None:
        """Of a replica's engine process, if there is one now."""
        return next(iter(processes_of("enginemain", children(self.pid))), None)

    def send(self, number: signal.Signals, *, family: bool = False) -> None:
        """A signal to it; family: to its engine too."""
        engine = self.engine_pid if family else None
        for pid in (self.pid, *([] if engine is None else [engine])):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)


class Fleet:
    """Replicas and an ingress. root: for logs, private directories and the store. network: where the first replica runs."""

    def __init__(
        self, model: Path, root: Path, database_url: str, *, replicas: int = 2, network: Network | None = None, **settings: Any
    ) -> None:
        self.network = network
        root.mkdir(parents=True, exist_ok=True)
        self.root, self.store, self._numbers = root, root / "store", 0
        self.settings = {
            **_SETTINGS, "model": str(model), "database_url": database_url, "store": str(self.store), "replicas": replicas,
            "data_dir": root / "data", "port": 0, **settings,
        }
        self.replicas: list[FleetProcess] = []
        self.ingress: FleetProcess | None = None
        self.url = ""
        for number in range(replicas):
            self.add_replica(None if number else network)
        self.start_ingress()
        wait_until(lambda: len(self.ready) == replicas, START_S)

    def config(self, **changes: Any) -> ServerConfig:
        """The settings of one process."""
        return read_settings(None, {**self.settings, **changes})

    def add_replica(self, network: Network | None = None) -> FleetProcess:
        """One more replica, which starts. network: where it runs; None: beside the ingress."""
        self._numbers += 1
        log, node = self.root / f"replica-{self._numbers}.log", f"node{self._numbers}"
        replica = FleetProcess("engine", self.config(), log, node, network)
        self.replicas.append(replica)
        return replica

    def start_ingress(self) -> None:
        """Starts the ingress, at the port of the one before."""
        self._numbers += 1
        port = int(self.url.rpartition(":")[2]) if self.url else 0
        self.ingress = ingress = FleetProcess("ingress", self.config(port=port), self.root / f"ingress-{self._numbers}.log")
        wait_until(lambda: "OpenAI(base_url=" in ingress.log or not ingress.alive, START_S)
        assert ingress.alive, self.logs
        self.url = ingress.log.partition('OpenAI(base_url="')[2].partition('/v1"')[0]

    @property
    def ready(self) -> list[dict[str, Any]]:
        """Replicas that take requests, as the ingress sees them."""
        with contextlib.suppress(httpx.HTTPError, KeyError):
            states = httpx.get(f"{self.url}/api/live", timeout=10).json()["replicas"]
            return [state for state in states if state["ready"] and not state["draining"]]
        return []

    @property
    def logs(self) -> str:
        """What all processes have printed."""
        parts = [*self.replicas, *([] if self.ingress is None else [self.ingress])]
        return "\n".join(f"--- {part.kind} {part.name}\n{part.log}" for part in parts)

    def stop(self) -> None:
        """Ends all of it, in order."""
        parts = [*([] if self.ingress is None else [self.ingress]), *self.replicas]
        for part in parts:
            part.send(signal.SIGCONT, family=True)
            with contextlib.suppress(ProcessLookupError):
                part.process.terminate()
        limit = time.monotonic() + 60
        for part in parts:
            try:
                part.process.wait(max(1.0, limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                part.send(signal.SIGKILL, family=True)
                part.process.wait(10)
