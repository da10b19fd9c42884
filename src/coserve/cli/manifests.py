"""What `coserve deploy` prints: Kubernetes objects for KubeRay, or a settings file and systemd units for machines without it.

KubeRay (ray.io/v1, 1.5.1 or newer): one RayCluster with three kinds of pods.

    head     Ray's own services, and nothing else
    server   `coserve serve`: it joins the cluster, listens, and places replicas. A Service leads to it
    engines  one replica each. Before such a pod ends, a hook has the replica hand over its jobs: Ray kills its host at once,
             and the replica ends with its host. Units of systemd have the same hook

The command runs in a pod of its own instead of in a RayJob on the head, so that with Redis behind Ray's state neither requests
nor replicas end with the head. There is no RayService: coserve's ingress listens itself, so that tokens don't go through Ray
Serve's proxy.

Owns: these texts. Does not own: the command that fills them in (deploy.py). A text from the command line is written as a JSON
string, which is one in YAML and in TOML too, and quoted for a shell where one reads it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from coserve.model.locate import DEFAULT_INSTALL

RAY_VERSION = "2.60.0"
"""The version that the fleet's tests run with; the image's must be the same."""
SERVER_PORT = 8000
_GRACE_S = 200
"""Seconds that pods and units get to end: 10 for requests, 120 to hand over jobs (DRAIN_S), 30 for engines, some more."""
DRAIN = (
    "pids=$(grep -lzxs \"coserve[.]server[.]replicas[.]main\" /proc/[0-9]*/cmdline | cut -d/ -f3); "
    f"kill $pids 2>/dev/null; for second in $(seq {_GRACE_S - 5}); do kill -0 $pids 2>/dev/null || break; sleep 1; done"
)
"""For bash: has the processes of a fleet on this machine drain, and waits for them. Neither grep nor the shell matches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What a cluster should be. gpus: of one replica; 0: it runs on `cpus` processors. database: the URL of PostgreSQL, without
    a password, which libpq takes from elsewhere. redis: HOST:PORT of a Redis that keeps Ray's state, if any. head: HOST:PORT of
    Ray's head on machines."""

    name: str
    image: str
    model: str | None
    replicas: int
    gpus: int
    cpus: int
    memory: str
    store: str
    database: str
    redis: str | None
    head: str

    @property
    def flags(self) -> list[str]:
        """Of `coserve serve`, without those that depend on where it runs."""
        device = ["--device", "cuda"] if self.gpus else ["--device", "cpu", "--threads", str(self.cpus)]
        ranks = ["--tensor-parallel-size", str(self.gpus)] if self.gpus > 1 else []
        model = [] if self.model is None else [self.model]
        places = ["--database-url", self.database, "--store", self.store]
        return [*model, "--replicas", str(self.replicas), "--ray-address", "auto", *device, *ranks, *places]


def kuberay(asked: Deployment) -> str:
    """YAML for `kubectl apply -f -`. The passwords of PostgreSQL and of Redis, if there is one, are in secrets, whose commands
    stand in the comment above. So no password is on a command line or goes through Ray."""
    return f"""{_kuberay_head(asked)}apiVersion: ray.io/v1
kind: RayCluster
metadata:
  name: {_text(asked.name)}
  annotations:
    ray.io/overwrite-container-cmd: "true"  # the containers' commands are those below
spec:
  rayVersion: {_text(RAY_VERSION)}
  authOptions:
    mode: token  # KubeRay makes a token and gives it to every pod; coserve refuses a cluster without
{_redis(asked)}  headGroupSpec:
    rayStartParams:
      num-cpus: "0"  # nothing runs beside Ray's own services
    template:
      spec:
        containers:
          - name: ray-head
            image: {_text(asked.image)}
            command: ["/bin/bash", "-c", "--"]
            args: [{_text(_ray_only())}]
            env:
              - {{name: RAY_USAGE_STATS_ENABLED, value: "0"}}
            ports:
              - {{containerPort: 6379, name: gcs-server}}
            resources: {_resources("1", "4Gi")}
  workerGroupSpecs:
    - groupName: server
      replicas: 1
      minReplicas: 1
      maxReplicas: 1
      rayStartParams:
        num-cpus: "0"
        num-gpus: "0"
      template:
        spec:
          terminationGracePeriodSeconds: {_GRACE_S}
          containers:
            - name: ray-worker
              image: {_text(asked.image)}
              command: ["/bin/bash", "-c", "--"]
              args: [{_text(_serve(asked))}]
              env:
{_database_password(asked)}
{_environment(asked)}
              ports:
                - {{containerPort: {SERVER_PORT}, name: http}}
              readinessProbe:
                httpGet: {{path: /health, port: http}}
                periodSeconds: 5
              resources: {_resources("2", "4Gi")}
    - groupName: engines
      replicas: {asked.replicas}
      minReplicas: {asked.replicas}
      maxReplicas: {asked.replicas}
      rayStartParams: {{}}
      template:
        spec:
          terminationGracePeriodSeconds: {_GRACE_S}
          containers:
            - name: ray-worker
              image: {_text(asked.image)}
              command: ["/bin/bash", "-c", "--"]
              args: [{_text(_ray_only())}]
              env:
{_database_password(asked)}
                - {{name: RAY_memory_monitor_refresh_ms, value: "0"}}  # an engine uses the memory that it may use
                - {{name: RAY_worker_niceness, value: "0"}}  # an engine runs at the usual priority
{_environment(asked)}
              lifecycle:  # the replica hands over its jobs and ends; then Ray does
                preStop: {{exec: {{command: ["/bin/bash", "-c", {_text(DRAIN)}]}}}}
              resources: {_resources(str(asked.cpus), asked.memory, asked.gpus)}
---
apiVersion: v1
kind: Service
metadata:
  name: {_text(asked.name)}
spec:
  selector:
    ray.io/cluster: {_text(asked.name)}
    ray.io/group: server
  ports:
    - {{name: http, port: 80, targetPort: {SERVER_PORT}}}
"""


def _kuberay_head(asked: Deployment) -> str:
    name = asked.name
    lines = [
        "coserve on Kubernetes, by KubeRay 1.5.1 or newer. The image needs Ray and coserve. For example, in a clone of it:",
        f"  FROM rayproject/ray:{RAY_VERSION}-py311{'-gpu' if asked.gpus else ''}",
        "  COPY . coserve",
        "  RUN pip install './coserve[ray]'",
        *([f"  RUN {DEFAULT_INSTALL}  # the default model"] if asked.model is None else []),
        "Before `kubectl apply`:",
        f"  kubectl create secret generic {name}-database --from-literal=password=PASSWORD",
    ]
    if asked.redis is not None:
        lines.append(f"  kubectl create secret generic {name}-redis --from-literal=password=PASSWORD")
    lines += [
        "and, if the store or a model from the hub asks for them (any of these, and AWS_ENDPOINT_URL and others):",
        f"  kubectl create secret generic {name}-environment --from-literal=AWS_ACCESS_KEY_ID=ID "
        "--from-literal=AWS_SECRET_ACCESS_KEY=KEY --from-literal=HF_TOKEN=TOKEN",
        "Then make keys, and use the service from inside the cluster, or put an ingress with TLS before it:",
        f"  kubectl exec $(kubectl get pod -o name -l ray.io/cluster={name},ray.io/group=server) -- "
        f"coserve keys add TENANT --database-url {shlex.quote(asked.database)}",
        "Ray's token crosses the cluster's network unencrypted; keep others out by a NetworkPolicy.",
    ]
    if PurePosixPath(asked.store).is_absolute():
        lines.append(f"{asked.store} must be one volume (ReadWriteMany) in all pods: add volumes and volumeMounts.")
    return "".join(f"# {line}\n" for line in lines)


def _database_password(asked: Deployment) -> str:
    return f"""                - name: PGPASSWORD
                  valueFrom:
                    secretKeyRef: {{name: {_text(asked.name + "-database")}, key: password}}"""


def _environment(asked: Deployment) -> str:
    return f"""              envFrom:
                - secretRef: {{name: {_text(asked.name + "-environment")}, optional: true}}"""


def _redis(asked: Deployment) -> str:
    if asked.redis is None:
        return "  # without gcsFaultToleranceOptions (--redis) all pods start again if the head's does\n"
    return f"""  gcsFaultToleranceOptions:
    redisAddress: {_text(asked.redis)}
    redisPassword:
      valueFrom:
        secretKeyRef: {{name: {_text(asked.name + "-redis")}, key: password}}
"""


def _resources(cpus: str, memory: str, gpus: int = 0) -> str:
    amounts = {"cpu": cpus, "memory": memory, **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return json.dumps({"limits": amounts, "requests": amounts})


def _ray_only() -> str:
    return "ulimit -n 65536; $KUBERAY_GEN_RAY_START_CMD"


def _serve(asked: Deployment) -> str:
    """Ray in the background, and the command in the place of the shell, so that it gets the pod's signals."""
    flags = [*asked.flags, "--host", "0.0.0.0", "--port", str(SERVER_PORT)]
    return (
        "ulimit -n 65536; $KUBERAY_GEN_RAY_START_CMD & until ray health-check >/dev/null 2>&1; do sleep 1; done; "
        f"exec coserve serve {_shell(flags)}"
    )


def machines(asked: Deployment) -> str:
    """A settings file and systemd units for machines without Kubernetes, with what to do with each."""
    settings = {
        **({} if asked.model is None else {"model": asked.model}), "host": "0.0.0.0", "replicas": asked.replicas,
        "ray-address": "auto", "database-url": asked.database, "store": asked.store,
        "device": "cuda" if asked.gpus else "cpu", **({} if asked.gpus else {"threads": asked.cpus}),
        **({"tensor-parallel-size": asked.gpus} if asked.gpus > 1 else {}), "data-dir": "/var/lib/coserve",
    }
    toml = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    redis = [] if asked.redis is None else [f"Environment=RAY_REDIS_ADDRESS={asked.redis}"]
    default = f"#   /opt/coserve/bin/{DEFAULT_INSTALL}\n" if asked.model is None else ""
    head = ["--head", f"--port={asked.head.rpartition(':')[2]}", "--include-dashboard=false"]
    return f"""# coserve on machines that run Ray without Kubernetes. coserve's ingress listens itself, so that there is no
# configuration of Ray Serve.
#
# On every machine, as a user `coserve`, with one environment in /opt/coserve:
#   /opt/coserve/bin/pip install '.[ray]'   in a clone of coserve
{default}#   ~/.ray/auth_token: the same file everywhere, made once by
#     umask 077; RAY_AUTH_MODE=token ray get-auth-token --generate
#   ~/.pgpass (mode 0600): HOST:5432:coserve:coserve:PASSWORD
#   /etc/coserve.env (mode 0600), if needed: AWS_ACCESS_KEY_ID=..., AWS_SECRET_ACCESS_KEY=..., HF_TOKEN=..., a line each

# --- /etc/systemd/system/coserve-ray.service on the first machine ---
{_unit("Ray for coserve, with its head", _ray_start(head), [*_RAY_STOP, *redis])}
# --- /etc/systemd/system/coserve-ray.service on each other machine ---
{_unit("Ray for coserve", _ray_start([f"--address={asked.head}"]), _RAY_STOP)}
# --- /etc/systemd/system/coserve.service on the machine that clients talk to, which may be any of them ---
{_unit("coserve", ["/opt/coserve/bin/coserve", "serve", "--config", "/etc/coserve.toml"], behind="coserve-ray")}
# --- /etc/coserve.toml there ---
{toml}"""


_RAY_STOP = (f"ExecStop=/bin/bash -c '{DRAIN.replace('$', '$$')}'",)
"""systemd would end the host of a replica, and so the replica, at the same time."""


def _ray_start(options: Sequence[str]) -> list[str]:
    return ["/opt/coserve/bin/ray", "start", *options, "--block", "--disable-usage-stats"]


def _unit(title: str, command: Sequence[str], extra: Sequence[str] = (), behind: str = "") -> str:
    order = "network-online.target" + (f" {behind}.service" if behind else "")
    lines = [
        "[Unit]", f"Description={title}", f"After={order}", f"Wants={order}", "", "[Service]", "User=coserve",
        "Environment=RAY_AUTH_MODE=token RAY_memory_monitor_refresh_ms=0 RAY_worker_niceness=0 RAY_enable_metrics_collection=0",
        "EnvironmentFile=-/etc/coserve.env", "StateDirectory=coserve", "StateDirectoryMode=0700", *extra,
        f"ExecStart={_shell(command)}", "Restart=always", "RestartSec=2", f"TimeoutStopSec={_GRACE_S}",
        "LimitNOFILE=65536", "", "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _shell(words: Sequence[str]) -> str:
    return " ".join(map(shlex.quote, words))


def _text(value: str) -> str:
    return json.dumps(value)
