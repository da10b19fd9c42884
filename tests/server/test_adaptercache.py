"""Which adapters a replica's engine is told to load and unload, and when their copies on this machine may go."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from coserve.core import InvalidRequest, NotFound
from coserve.server.errors import EngineUnavailable, StorageRefused
from coserve.server.link.messages import AdapterRef
from coserve.server.replicas.adaptercache import AdapterCache
from coserve.server.replicas.artifactcache import ArtifactCache
from coserve.server.replicas.artifacts import ArtifactStore
from tests.server.faulty_files import faulty_objects
from tests.server.jobs_bench import FakeEngine, write_adapter


class UsingEngine(FakeEngine):
    """An engine that reads what requests use, and takes a moment for each call. used: directories that requests use."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.unloads: list[str] = []
        self.used: set[str] = set()
        self.in_load: Callable[[], None] = lambda: None

    async def load_adapter(self, name: str, directory: str) -> list[str]:
        generation = self.generation
        await asyncio.sleep(0.001)
        self.in_load()
        if self.refusal is not None:
            raise self.refusal
        if generation != self.generation:
            raise EngineUnavailable("the engine has died")
        return [*await super().load_adapter(name, directory), *self.used]

    async def unload_adapter(self, name: str) -> list[str]:
        await asyncio.sleep(0.001)
        self.unloads.append(name)
        return [*await super().unload_adapter(name), *self.used]


class Bench:
    """A replica's cache over a store with adapters a, b, c, d of 100 bytes and more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        objects, self.files = faulty_objects(str(path / "store"))
        self.artifacts = ArtifactStore(objects, ArtifactCache(path / "cache", 1, kept_s=0.0))
        self.engine = UsingEngine(path)
        self.refs = {}
        for name in "abcd":
            stored = self.artifacts.put_directory(f"adapters/{name}", write_adapter(path / "made" / name))
            self.refs[name] = AdapterRef(name=f"me/{name}@{stored.sha256[:16]}", uri=stored.key, sha256=stored.sha256)
            self.num_bytes = stored.bytes

    def cache(self, **options: Any) -> AdapterCache:
        engine: Any = self.engine
        return AdapterCache(engine, self.artifacts, **{"kept_s": 0.0, "max_bytes": 1 << 30, **options})

    def is_copied(self, name: str) -> bool:
        return self.artifacts.cache.find(self.refs[name].sha256) is not None

    @property
    def loads(self) -> list[str]:
        return [name.partition("/")[2].partition("@")[0] for name, _ in self.engine.loads]

    @property
    def unloads(self) -> list[str]:
        return [name.partition("/")[2].partition("@")[0] for name in self.engine.unloads]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def test_a_version_is_loaded_once(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache()
        await asyncio.gather(*(cache.ensure(bench.refs["a"]) for _ in range(20)))
        await cache.ensure(bench.refs["a"])
        await cache.ensure(AdapterRef(name="me/published"))  # the engine knows it by itself
        assert bench.loads == ["a"] and cache.names == (bench.refs["a"].name,)
        assert Path(bench.engine.loads[0][1]).joinpath("adapter_model.safetensors").read_bytes() == b"weights of a"
        await cache.close()

    play(story())


def test_a_new_engine_gets_it_again(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache()
        await cache.ensure(bench.refs["a"])
        bench.engine.die()
        bench.engine.adapters.clear()
        await bench.engine.rise()
        assert cache.names == ()
        await cache.ensure(bench.refs["b"])
        await cache.ensure(bench.refs["a"])
        assert bench.loads == ["a", "b", "a"]

        def die_once() -> None:
            bench.engine.in_load = lambda: None
            bench.engine.generation += 1

        bench.engine.in_load = die_once
        with pytest.raises(EngineUnavailable):
            await cache.ensure(bench.refs["c"])
        await cache.ensure(bench.refs["c"])
        await cache.close()

    play(story())


def test_a_request_that_goes_away_takes_no_load_along(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache()
        first = asyncio.create_task(cache.ensure(bench.refs["a"]))
        second = asyncio.create_task(cache.ensure(bench.refs["a"]))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert bench.loads == ["a"]
        await cache.close()

    play(story())


def test_the_least_recently_used_ones_are_unloaded(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache(max_loaded=2)
        for name in "abac":
            await cache.ensure(bench.refs[name])
        await cache.ensure(bench.refs["b"])  # it is being unloaded, and is loaded after that
        assert bench.unloads[0] == "b" and bench.loads == ["a", "b", "c", "b"]
        assert bench.refs["b"].name in bench.engine.adapters
        await cache.close()
        assert len(bench.engine.adapters) == 2

    play(story())


def test_bytes_are_a_limit_too(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache(max_bytes=2 * bench.num_bytes)
        for name in "abcd":
            await cache.ensure(bench.refs[name])
        await cache.close()
        assert bench.unloads == ["a", "b"]
        small = bench.cache(max_bytes=1)
        await small.ensure(bench.refs["a"])
        assert bench.refs["a"].name in bench.engine.adapters, "one always fits"
        await small.close()

    play(story())


def test_what_was_asked_for_just_now_stays(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache(max_loaded=1, kept_s=60)
        for name in "abc":
            await cache.ensure(bench.refs[name])
        assert bench.unloads == [] and len(cache.names) == 3
        await cache.close()

    play(story())


def test_copies_stay_while_the_engine_may_read_them(bench: Bench) -> None:
    """The machine's cache has room for nothing, so that only what is held stays."""
    async def story() -> None:
        cache = bench.cache(max_loaded=1)
        await cache.ensure(bench.refs["a"])
        used = dict(bench.engine.loads)[bench.refs["a"].name]
        bench.engine.used = {used}  # by a request, which goes on
        await cache.ensure(bench.refs["b"])
        await cache.ensure(bench.refs["c"])
        assert bench.unloads[0] == "a" and bench.is_copied("a") and bench.is_copied("c")
        bench.engine.used = set()
        await cache.ensure(bench.refs["d"])
        await cache.close()
        bench.artifacts.put_directory("adapters/e", write_adapter(bench.path / "made" / "e"))
        bench.artifacts.fetch("adapters/e")
        assert not bench.is_copied("a"), "nothing holds it any more"

    play(story())


def test_errors_name_the_model(bench: Bench) -> None:
    async def story() -> None:
        cache = bench.cache()
        gone = AdapterRef(name="me/gone@0", uri="adapters/gone", sha256="0" * 64)
        for _ in range(2):
            with pytest.raises(NotFound, match="model: gone can't be loaded") as caught:
                await asyncio.gather(*(cache.ensure(gone) for _ in range(3)))
            assert caught.value.param == "model"
        bench.engine.refusal = InvalidRequest("adapter: rank 128 is over max_lora_rank=64", param="adapter")
        with pytest.raises(InvalidRequest, match="model: a can't be loaded: rank 128"):
            await cache.ensure(bench.refs["a"])
        bench.engine.refusal = None

        def full(verb: str, _path: str) -> None:
            if verb == "read":
                raise OSError(errno.EIO, "no")

        bench.files.before = full
        with pytest.raises(StorageRefused):
            await cache.ensure(bench.refs["b"])
        bench.files.before = lambda _verb, _path: None
        await cache.ensure(bench.refs["a"])
        await cache.ensure(bench.refs["b"])
        await cache.close()

    play(story())
