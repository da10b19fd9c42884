"""Ray's part in a fleet: on which machines its processes run, and that they run again when their machine is lost.

    coserve serve --replicas 3                        this machine: RayFleet, and in it the ingress's host --> the ingress
      |-- Ray: actors, one host per replica -->       any machine:  a replica's host --> the replica --> its engine
      `-- every half second: what has become of each  (processhost.py)

Nothing that users send and no token goes through Ray: processes find each other in PostgreSQL and talk over sockets of their
own. The actors end with this command, and each process with its host.

    who dies                       what follows
    a process                      its host starts another one
    a replica's host, a machine    Ray starts the host again, on another machine if it has room
    this command                   all of it ends; the next start goes on from PostgreSQL and the store

Owns: joining or starting Ray, what must hold before anything is started there, actors, the order of the end. Does not own:
which machine a replica goes to (placement.py), what a host does (processhost.py), the processes themselves (main.py). It is the
only module that imports Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import msgspec

from coserve.config.values import require
from coserve.core import ConfigError, CoserveError, one_line
from coserve.server.link.setup import STOP_S
from coserve.server.replicas import processhost
from coserve.server.replicas.fleetdtype import with_settled_dtype
from coserve.server.replicas.fleetsettings import check_fleet, shown_secrets
from coserve.server.replicas.hostreport import HostReport, read_report
from coserve.server.replicas.placement import Machine, Needs, check_room, needs_of, place, sharers
from coserve.server.replicas.processhost import PROCESS_MODULE, ProcessHost
from coserve.server.replicas.setup import DRAIN_S, FleetSetup, with_absolute_paths, write_setup
from coserve.server.settings import ServerConfig
from coserve.server.tenants import KEYS_VARIABLE, digest_keys, read_keys

LEAST_RAY = (2, 52)
"""The first version with token authentication."""
_LOCAL_VARIABLES: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_enable_metrics_collection": "0",  # coserve has metrics of its own
    "RAY_memory_monitor_refresh_ms": "0",  # it would end replicas where the machine's memory is used as it should be
    "RAY_prestart_worker_first_driver": "0",  # a process per core, for tasks that never come
    "RAY_worker_niceness": "0",  # else all that the machine does comes before replicas
}
"""Variables of a Ray that is started here, where they are not set."""
_OBJECT_STORE_BYTES = 80 << 20
"""Nothing is stored in it. Ray asks for 75 MiB at least."""
_LOOK_EVERY_S = 0.5
_ASK_S = 10.0
"""Seconds until a host that has not answered is said to be lost, or to be waited for."""
_END_S = 5.0
"""Seconds that processes get to end beyond those that they are allowed."""
_PROBE = ("-m", "ray.scripts.scripts", "health-check", "--address")
"""Asks a cluster whether it is well. Without a token that must fail, for the reason of `_REFUSAL`."""
_REFUSAL = b"AuthenticationError"
_PROBE_S = 60.0
_log = logging.getLogger(__name__)


def import_ray() -> Any:
    """Raises ConfigError where the extra is missing or too old."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise ConfigError(f"replicas: Ray is missing ({error}): pip install 'coserve[ray]'", param="replicas") from error
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    require(found >= LEAST_RAY, "replicas", f"Ray {ray.__version__} has no token authentication; it takes "
                                            f"{'.'.join(map(str, LEAST_RAY))} or newer: pip install -U 'coserve[ray]'")
    return ray


def _set_variables() -> None:
    """Sets the variables of a Ray that is started here, which reads them when it is imported. It gets a token of its own, since
    other users of this machine could reach it."""
    for name, value in _LOCAL_VARIABLES.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def end_limits(config: ServerConfig) -> dict[str, float]:
    """Seconds that processes get to end, by their kinds in the order in which they end."""
    ingress_s = config.shutdown_timeout + _END_S
    return {"ingress": ingress_s, "engine": ingress_s + DRAIN_S + STOP_S}


@dataclass(slots=True)
class _Hosted:
    """A process of the fleet.

    name: for the log. node: where it is, if that is known. host: its host, if that is in this process; None: `actor` is. seen:
    how many lines of its log have been written. asked, asked_s: the question under way, and since when. known: its last report.
    lost: whether its host doesn't answer. gone: whether it ended when it was asked to. package: another coserve's version that
    its machine has, if that was said.
    """

    kind: str
    name: str
    node: str | None
    actor: Any = None
    host: ProcessHost | None = None
    seen: int = 0
    asked: Any = None
    asked_s: float = 0.0
    known: HostReport | None = None
    lost: bool = False
    stopping: bool = False
    gone: bool = False
    package: str = ""

    @property
    def serves(self) -> bool:
        return self.known is not None and self.known.serves


class RayFleet:
    """The processes of one server: an ingress on this machine and replicas anywhere. A context manager: at its end everything
    is ended. report: takes a line about the start. module: what Python runs as a process.

    API keys, also those in the environment of this command, travel to the ingress as digests: processes of a cluster have the
    environment of its `ray start`, and its directory: so paths are made absolute too."""

    def __init__(
        self, config: ServerConfig, *, report: Callable[[str], None] = _log.info, module: Sequence[str] = ("-m", PROCESS_MODULE)
    ) -> None:
        check_fleet(config)
        self._keys = digest_keys([*config.api_key, *read_keys(os.environ.get(KEYS_VARIABLE, ""))])
        self._secrets = shown_secrets(config)
        self.config = with_absolute_paths(replace(config, api_key=()))
        self.report, self._module = report, list(module)
        if config.ray_address is None:
            _set_variables()
        self._ray = import_ray()
        self._ray.cloudpickle.register_pickle_by_value(processhost)
        self._hosted: list[_Hosted] = []
        self._package = version("coserve")  # as it is now: somebody may install another one while this runs
        self._numbers = 0
        self._needs = Needs(1, 0)
        self._served: set[str] = set()

    def __enter__(self) -> RayFleet:
        return self

    def __exit__(self, *_: object) -> None:
        for hosted in self._hosted:
            self._kill(hosted)
        self._ray.shutdown()

    # --- the start ---

    def start(self) -> None:
        """Joins or starts Ray, and places the processes; `look` says what becomes of them. Raises ConfigError, CapacityError,
        and NotFound or InvalidRequest for a model that can't be used."""
        config = self.config
        assert config.replicas is not None
        if config.ray_address is None:
            self._start_ray()
        else:
            self._join(config.ray_address)
        machines = self._machines()
        self._needs = needs_of(config, machines)
        if config.ray_address is None:
            check_room(machines, config.replicas, self._needs)
        if not self._needs.gpus:
            self.config = with_settled_dtype(config, self.report)
        self.report(f"Ray {self._ray.__version__} with {len(machines)} nodes; {config.replicas} replicas of {self._needs} each")
        own = self._ray.get_runtime_context().get_node_id()
        # Its address is this machine's, and it ends with this command: an actor would only cost processor time.
        setup = write_setup(FleetSetup(config=self.config, keys=self._keys))
        ingress = ProcessHost("ingress", setup, towards=self._towards, module=self._module, place=lambda: str(own))
        self._hosted.append(_Hosted("ingress", "ingress", own, host=ingress))
        self.add(config.replicas)

    def _start_ray(self) -> None:
        self.report("starting Ray on this machine ...")
        self._init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES,
                   num_cpus=len(os.sched_getaffinity(0)))
        # It takes processor time, and nobody reads what it finds. ray.init has no option to leave it out. Ray doesn't promise
        # to keep this name; without it, the log monitor just runs.
        with contextlib.suppress(Exception):
            self._ray._private.worker._global_node.kill_log_monitor(check_alive=False)

    def _join(self, address: str) -> None:
        require(os.environ.get("RAY_AUTH_MODE", "").lower() in ("token", "k8s"), "ray_address", (
            "a cluster without token authentication lets everybody who reaches it run programs on all its machines. Make a "
            "token (`ray get-auth-token --generate`), copy ~/.ray/auth_token to each machine, and set RAY_AUTH_MODE=token both "
            "where `ray start` runs and here"))
        for problem in self._secrets:
            _log.warning("%s", problem)
        self.report(f"joining the Ray cluster at {address} ...")
        self._init(address=address)
        found = self._ray.get_runtime_context().gcs_address
        self._check_asks_for_token(found)

    def _init(self, **options: Any) -> None:
        try:
            self._ray.init(
                namespace="coserve", log_to_driver=False, logging_level="WARNING", configure_logging=False, **options)
        except (ConnectionError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            where = "starting Ray failed" if self.config.ray_address is None else \
                f"can't join the Ray cluster at {self.config.ray_address}"
            raise ConfigError(f"ray_address: {where}: {one_line(error, 600)}", param="ray_address") from error

    def _check_asks_for_token(self, address: str) -> None:
        """Raises ConfigError unless the cluster refuses a question without a token. That this command has one says nothing: a
        cluster without authentication takes it too."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        try:
            done = subprocess.run(
                [sys.executable, "-P", *_PROBE, address], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=_PROBE_S, check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"ray_address: the Ray cluster at {address} doesn't answer", param="ray_address") from error
        require(done.returncode != 0, "ray_address", (
            f"the Ray cluster at {address} takes commands without a token: set RAY_AUTH_MODE=token where `ray start` runs, on "
            "each machine, and start it again"))
        last = done.stdout.decode("utf-8", "replace").strip().rpartition("\n")[2]
        require(_REFUSAL in done.stdout, "ray_address",
                f"whether the Ray cluster at {address} asks for a token can't be told: {last}")

    def _machines(self) -> list[Machine]:
        alive = [(node, node["Resources"]) for node in self._ray.nodes() if node["Alive"]]
        return [
            Machine(node["NodeID"], node["NodeManagerAddress"], has.get("CPU", 0), has.get("GPU", 0)) for node, has in alive
        ]

    @property
    def _towards(self) -> str:
        """An address that every machine of the fleet reaches."""
        if self.config.ray_address is None:
            return "127.0.0.1"  # nobody else needs to reach what is here
        return str(self._ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]"))

    def _actor(self, setup: FleetSetup, **options: Any) -> Any:
        actor = self._ray.remote(ProcessHost).options(max_restarts=-1, max_concurrency=1, **options)

        def here() -> str:
            import ray  # in the actor

            return str(ray.get_runtime_context().get_node_id())

        return actor.remote(
            "engine", write_setup(setup), towards=self._towards, module=self._module, with_parent=True, place=here)

    # --- replicas ---

    @property
    def replicas(self) -> int:
        """How many are there, without those that are ending."""
        return sum(hosted.kind == "engine" and not hosted.stopping for hosted in self._hosted)

    @property
    def serving(self) -> int:
        """How many of them take requests."""
        return sum(hosted.kind == "engine" and hosted.serves and not hosted.stopping for hosted in self._hosted)

    @property
    def ready(self) -> bool:
        """Whether every process has started."""
        return all(hosted.serves for hosted in self._hosted if not hosted.stopping)

    def add(self, count: int = 1) -> None:
        """Places more replicas. Those that no machine has room for wait until one has."""
        machines = self._machines()
        taken = [hosted.node for hosted in self._hosted if hosted.kind == "engine" and hosted.node is not None]
        places = place(machines, count, self._needs, taken)
        config = replace(self.config, threads=self._threads())
        setup = FleetSetup(config=config, sharers=sharers(machines, [*taken, *places]))
        strategies = self._ray.util.scheduling_strategies
        for node in places:
            self._numbers += 1
            name = f"replica {self._numbers}"
            strategy = "SPREAD" if node is None else strategies.NodeAffinitySchedulingStrategy(node, soft=True)
            actor = self._actor(
                setup, num_cpus=self._needs.cpus, num_gpus=self._needs.gpus, scheduling_strategy=strategy)
            self._hosted.append(_Hosted("engine", name, node, actor))
            if node is None:
                self.report(f"{name} waits for a machine with {self._needs}")

    def remove(self) -> None:
        """Has the newest replica drain and end; the last one stays."""
        replicas = [hosted for hosted in self._hosted if hosted.kind == "engine" and not hosted.stopping]
        if len(replicas) > 1:
            self._stop(replicas[-1])

    def _threads(self) -> int | None:
        return self.config.threads if self._needs.gpus else self._needs.cpus

    # --- what becomes of them ---

    def look(self) -> None:
        """Asks every host what has become of its process, for half a second at most, and writes the processes' logs. Raises
        ConfigError if a process can't start, or its machine has another coserve, where none of its kind has started before."""
        now = time.monotonic()
        for hosted in self._hosted:
            if hosted.host is not None:
                self._take(hosted, read_report(hosted.host.look(hosted.seen)))
            elif hosted.asked is None:
                hosted.asked, hosted.asked_s = hosted.actor.look.remote(hosted.seen), now
        questions = [hosted.asked for hosted in self._hosted if hosted.host is None]
        done, _ = self._ray.wait(questions, num_returns=len(questions), timeout=_LOOK_EVERY_S) if questions else ([], [])
        for hosted in [one for one in self._hosted if one.host is None]:
            if hosted.asked in done:
                self._hear(hosted)
            elif not hosted.lost and time.monotonic() - hosted.asked_s > _ASK_S:
                hosted.lost = True
                self.report(f"{hosted.name} is not there yet: Ray has no machine for it, or its machine does not answer")
        for hosted in [one for one in self._hosted if one.gone]:
            self._kill(hosted)
            self._hosted.remove(hosted)
        time.sleep(max(0.0, _LOOK_EVERY_S - (time.monotonic() - now)))

    def _hear(self, hosted: _Hosted) -> None:
        """Takes a host's answer."""
        question, hosted.asked = hosted.asked, None
        try:
            report = read_report(self._ray.get(question))
        except self._ray.exceptions.RayError as error:
            self._miss(hosted, error)
        else:
            self._take(hosted, report)

    def _take(self, hosted: _Hosted, report: HostReport) -> None:
        """Takes a report of what has become of a process."""
        if report.first < hosted.seen or (hosted.known is not None and hosted.known.starts > report.starts):
            hosted.seen = 0  # the host is another one
        if hosted.lost:
            hosted.lost = False
            self.report(f"{hosted.name} is there, on {report.node}")
        for line in report.lines[max(0, hosted.seen - report.first) :]:
            _log.log(line.level, "%s: %s", hosted.name, line.message,
                     extra={"fold": False, "fields": {**line.fields, "member": hosted.name}})
        hosted.seen = report.first + len(report.lines)
        began = report.serves and not hosted.serves
        hosted.known, hosted.node, hosted.gone = report, report.place, hosted.stopping and report.ended
        self._check_package(hosted, report)
        self._served |= {hosted.kind} if report.serves else set()
        if report.problem and hosted.kind not in self._served:
            raise ConfigError(f"{hosted.name} on {report.node}: {report.problem}")
        if began and hosted.kind == "engine" and not hosted.stopping:
            self.report(f"{hosted.name} serves on {report.node}: {self.serving} of {self.replicas} replicas are ready")

    def _check_package(self, hosted: _Hosted, report: HostReport) -> None:
        """Raises ConfigError if a machine has another coserve, but only before a process of this kind has served: what runs is
        not ended by an installation."""
        if report.package in (self._package, hosted.package):
            return
        hosted.package = report.package
        problem = (f"{report.node} has coserve {report.package}, this command {self._package}; install the same version on "
                   "every machine, in the environment that `ray start` runs in")
        require(hosted.kind in self._served, "ray_address", problem)
        _log.warning("%s: %s, and start the command again", hosted.name, problem)

    def _miss(self, hosted: _Hosted, error: Exception) -> None:
        """A host did not answer."""
        exceptions = self._ray.exceptions
        if hosted.stopping:
            hosted.gone = True
            return
        never = isinstance(error, exceptions.ActorUnschedulableError)
        if never or (isinstance(error, exceptions.ActorDiedError) and hosted.known is None):
            where = "Ray has no place for it" if never else "can't start"
            raise ConfigError(f"ray_address: {hosted.name}: {where}: {one_line(error, 600)}", param="ray_address") from error
        if not hosted.lost:
            hosted.lost, hosted.seen = True, 0
            hosted.node = None  # it may be started on another one
            if hosted.known is not None:
                hosted.known = msgspec.structs.replace(hosted.known, serves=False)
            _log.warning("%s was lost with its host; Ray starts it again", hosted.name)

    # --- the end ---

    def stop(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Ends all in order: the ingress takes no new connections and answers what it has, then replicas hand over their jobs.
        Each of the two gets the time that the settings allow. hurry: whether to wait no longer."""
        for kind, limit in end_limits(self.config).items():
            those = [hosted for hosted in self._hosted if hosted.kind == kind]
            for hosted in those:
                self._stop(hosted)
            until = time.monotonic() + limit
            while any(hosted in self._hosted for hosted in those) and time.monotonic() < until and not hurry():
                try:
                    self.look()
                except CoserveError as error:
                    _log.warning("%s", error)

    def _stop(self, hosted: _Hosted) -> None:
        hosted.stopping, hosted.gone = True, hosted.known is None  # where there is nothing yet, nothing has to drain
        if hosted.host is not None:
            hosted.host.stop()
        else:
            hosted.actor.stop.remote()

    def _kill(self, hosted: _Hosted) -> None:
        if hosted.host is not None:
            hosted.host.kill()
            return
        try:
            self._ray.kill(hosted.actor, no_restart=True)
        except (self._ray.exceptions.RayError, ValueError) as error:
            _log.warning("%s can't be ended: %s", hosted.name, one_line(error))
