"""A replica as a process of its own: an engine and the jobs of it, without requests. SIGTERM drains it.

    python -m tests.server.replica_process '{"name": ..., "url": ..., "store": ..., "root": ..., "model": ..., "headroom": ...}'
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from pathlib import Path
from typing import Any

from coserve.cluster.leases import LeaseTiming
from coserve.server.index.store import Store
from coserve.server.link.engineclient import EngineClient
from coserve.server.replicas import jobsearch
from coserve.server.replicas.artifacts import ArtifactStore, open_store
from coserve.server.replicas.jobs import ReplicaJobs
from coserve.server.settings import ServerConfig

TIMING = LeaseTiming(lease_s=3.0, renew_s=0.5, retry_s=0.2, safe_s=2.0, claim_delay_s=0.5)
SETTINGS: dict[str, Any] = {"dtype": "float32", "threads": 1, "kv_cache_memory_bytes": 32 << 20, "served_model_name": ("tiny",)}


async def main(name: str, url: str, store: str, root: str, model: str, headroom: float) -> None:
    """Runs until SIGTERM."""
    jobsearch.POLL_S = 0.2
    place = Path(root) / name
    config = ServerConfig(model=model, data_dir=place, **SETTINGS)
    place.mkdir(parents=True, exist_ok=True)
    engine, index = EngineClient(config, report=lambda line: None), Store(url)
    artifacts: ArtifactStore = open_store(store, place / "cache", cache_bytes=1 << 30)
    await engine.supervisor.start()
    jobs = ReplicaJobs(
        index, artifacts, engine, config, name, place / "scratch", headroom=lambda: headroom, timing=TIMING
    )
    await jobs.start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", engine.supervisor.pid, flush=True)
    await ended.wait()
    await jobs.drain()
    await jobs.stop()
    await engine.supervisor.stop()
    index.close()
    print("drained", flush=True)


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
