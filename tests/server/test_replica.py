"""A replica's life around its engine's, in this process."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from coserve.core import CoserveError
from coserve.server.link import supervisor
from coserve.server.replicas.replica import run_replica
from coserve.server.settings import ServerConfig
from tests.server.conftest import children, processes_of
from tests.tiny_directory import build_tiny_directory

pytest_plugins = ["tests.server.postgres"]


@pytest.mark.full
def test_a_replica_ends_when_its_engine_is_given_up(
    tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model vanishes. The replica's host then starts another process, with growing pauses."""
    monkeypatch.setattr(supervisor, "MAX_FAILURES", 1)
    model = build_tiny_directory(tmp_path / "model")
    config = ServerConfig(
        model=str(model), data_dir=tmp_path / "data", database_url=postgres_url, store=str(tmp_path / "store"), replicas=1,
        device="cpu", dtype="float32", threads=1, kv_cache_memory_bytes=32 << 20,
    )

    async def story() -> None:
        serves, lines = asyncio.Event(), list[str]()

        def report(line: str) -> None:
            lines.append(line)
            if re.search("replica .* serves at", line):
                serves.set()

        async with asyncio.timeout(120):
            running = asyncio.create_task(run_replica(config, stop=asyncio.Event(), report=report))
            await asyncio.wait([running, asyncio.create_task(serves.wait())], return_when=asyncio.FIRST_COMPLETED)
            (engine,) = processes_of("enginemain", children(os.getpid()))
            model.rename(tmp_path / "gone")
            os.kill(engine, signal.SIGKILL)
            with pytest.raises(CoserveError, match="the engine's process died 1 times before it was ready"):
                await running

    asyncio.run(story())
    assert not list((tmp_path / "data" / "replicas").iterdir()), "nothing of it is left"
