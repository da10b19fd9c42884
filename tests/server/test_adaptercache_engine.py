"""AdapterCache with a real engine: more adapters than it may know, requests on all of them, and its death meanwhile."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest

from coserve.config.settings import SamplingConfig
from coserve.server.errors import EngineUnavailable
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.messages import AdapterRef, merge_tokens
from coserve.server.replicas.adaptercache import AdapterCache
from coserve.server.replicas.artifacts import open_store
from coserve.server.settings import ServerConfig
from tests.server.conftest import children, processes_of
from tests.tiny_adapter import write_tiny_adapter

GREEDY = SamplingConfig(max_tokens=24, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7, 8]
NUM_ADAPTERS, NUM_REQUESTS = 10, 80


@pytest.mark.full
def test_requests_on_more_adapters_than_an_engine_may_know(tiny_model: Path, tmp_path: Path) -> None:
    """Two slots, three names, copies that go as soon as nobody holds them: every request gets its own adapter's tokens."""
    store = open_store(str(tmp_path / "store"), tmp_path / "cache", cache_bytes=1)
    store.cache._kept_s = 0.0
    refs = []
    for number in range(NUM_ADAPTERS):
        made = write_tiny_adapter(tmp_path / f"made-{number}", seed=number, scale=0.5)
        stored = store.put_directory(f"adapters/{number}", made)
        refs.append(AdapterRef(name=f"me/{number}@{stored.sha256[:16]}", uri=stored.key, sha256=stored.sha256))
    data = tmp_path / "data"
    data.mkdir()
    engine = EngineClient(ServerConfig(
        model=str(tiny_model), data_dir=data, dtype="float32", threads=1, kv_cache_memory_bytes=32 << 20, max_loras=2,
    ))
    cache = AdapterCache(engine, store, max_loaded=3, max_bytes=1 << 30, kept_s=0.0)

    async def ask(ref: AdapterRef) -> tuple[int, ...]:
        await cache.ensure(ref)
        stream = engine.generate(prompt_ids=PROMPT, sampling=GREEDY, adapter=ref)
        return tuple(merge_tokens([chunk async for chunk in stream]).token_ids)

    async def insist(ref: AdapterRef) -> tuple[int, ...]:
        while True:
            try:
                return await ask(ref)
            except EngineUnavailable:
                await asyncio.sleep(0.05)

    async def story() -> None:
        await engine.supervisor.start()
        try:
            expected = [await ask(ref) for ref in refs]
            assert len({*expected}) == NUM_ADAPTERS, "adapters differ"
            chosen = [random.Random(number).randrange(NUM_ADAPTERS) for number in range(NUM_REQUESTS)]
            found = await asyncio.gather(*(ask(refs[number]) for number in chosen))
            assert found == [expected[number] for number in chosen]
            asking = asyncio.gather(*(insist(refs[number]) for number in chosen))
            await asyncio.sleep(0.2)
            for pid in processes_of("enginemain", children(os.getpid())):
                os.kill(pid, signal.SIGKILL)
            assert await asking == [expected[number] for number in chosen]
            assert engine.generation == 2 and len(cache.names) <= 3 + 1
        finally:
            await engine.supervisor.stop()
            await cache.close()

    asyncio.run(asyncio.wait_for(story(), 300))
