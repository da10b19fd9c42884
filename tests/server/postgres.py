"""A private PostgreSQL server for tests, where it is installed: a plugin, `pytest_plugins = ["tests.server.postgres"]`.

`postgres_server` starts one for the session; `postgres_url` is a new, empty database in it.
"""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

_START_S = 60.0
_STOP_S = 20.0
_USERS = ("postgres", "nobody")
"""PostgreSQL refuses to run as root."""
_numbers = itertools.count()


def _find_program(name: str) -> str | None:
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(name, path=os.pathsep.join(places))


def _unprivileged() -> tuple[dict[str, Any], pwd.struct_passwd | None]:
    """What Popen needs to run as somebody who isn't root, and who that is."""
    if os.geteuid() != 0:
        return {}, None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    account = next((known[name] for name in _USERS if name in known), None)
    if account is None:
        pytest.skip("PostgreSQL does not run as root, and there is no account for it")
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}, account


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Path]:
    """The directory of a running server's socket."""
    initdb, postgres = _find_program("initdb"), _find_program("postgres")
    if initdb is None or postgres is None:
        pytest.skip("PostgreSQL is not installed")
    identity, account = _unprivileged()
    directory = Path(tempfile.mkdtemp(prefix="coserve-pg-"))  # a socket's path has to be short, and its owner is another user
    data, log = directory / "data", directory / "log"
    try:
        if account is not None:
            os.chown(directory, account.pw_uid, account.pw_gid)
        subprocess.run(
            [initdb, "-D", data, "-U", "coserve", "-A", "trust", "-N", "--no-locale", "-E", "UTF8"],
            check=True, stdout=subprocess.DEVNULL, timeout=_START_S, cwd=directory, **identity,
        )
        options = ["-k", str(directory), "-c", "listen_addresses=", "-c", "fsync=off"]
        with log.open("wb") as output:
            server = subprocess.Popen(
                [postgres, "-D", data, *options], stdout=output, stderr=subprocess.STDOUT, cwd=directory, **identity,
            )
        try:
            _wait_until_up(server, directory, log)
            yield directory
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            server.wait(_STOP_S)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def postgres_url(postgres_server: Path) -> str:
    """URL of an empty database."""
    name = f"test{next(_numbers)}"
    with _connect(postgres_server) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://coserve@/{name}?host={postgres_server}"


def _connect(directory: Path) -> Any:
    return psycopg.connect(host=str(directory), user="coserve", dbname="postgres", autocommit=True)


def _wait_until_up(server: subprocess.Popen[bytes], directory: Path, log: Path) -> None:
    limit = time.monotonic() + _START_S
    while True:
        try:
            return _connect(directory).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}") from None
        time.sleep(0.05)
