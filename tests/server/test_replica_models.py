"""The ingress's names of models: rows are the truth, versions change, nothing old is served for long, adapters from outside."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from coserve.core import CapacityError, ConfigError, InvalidRequest, NotFound
from coserve.server.errors import Forbidden, StorageRefused, TooLarge
from coserve.server.index.store import Store
from coserve.server.records import AdapterRecord
from coserve.server.replicas import models as models_module
from coserve.server.replicas.artifacts import ArtifactStore, open_store
from coserve.server.replicas.models import ReplicaModels, version_name
from coserve.server.replicas.usage import StoredBytes
from coserve.server.settings import ServerConfig
from tests.server.jobs_bench import FakeEngine
from tests.tiny_adapter import write_tiny_adapter, write_tiny_config

Story = Callable[[ReplicaModels], Coroutine[Any, Any, None]]


class Place:
    """A fleet's index and store in `path`; ingresses are made as often as a test likes."""

    def __init__(self, path: Path) -> None:
        self.path, self.root, self.now = path, path / "outside", 100.0
        self.root.mkdir()
        write_tiny_config(path)
        self.store = Store(f"sqlite:///{path / 'index.db'}")
        self.artifacts: ArtifactStore = open_store(str(path / "store"), path / "cache", cache_bytes=1 << 30)

    def make(self, name: str = "one", **settings: Any) -> ReplicaModels:
        config = ServerConfig(**{"adapter_root": str(self.root), **settings})
        return ReplicaModels(
            self.store, FakeEngine(self.path), config, self.artifacts, self.path / name, clock=lambda: self.now
        )

    def play(self, story: Story, **settings: Any) -> None:
        async def run() -> None:
            models = self.make(**settings)
            try:
                await story(models)
            finally:
                await models.close()

        asyncio.run(asyncio.wait_for(run(), 30))

    def record(self, name: str, digest: str = "1" * 64, tenant: str = "me", **fields: Any) -> AdapterRecord:
        return AdapterRecord(name=name, tenant=tenant, directory=f"jobs/{name}/model", created_at=7, sha256=digest, **fields)

    @property
    def num_adapters(self) -> int:
        return len(list((self.path / "store" / "adapters").iterdir()))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(models_module, "_DISCARD_S", 0.0)
    return Place(tmp_path)


def test_names_and_versions(place: Place) -> None:
    async def story(models: ReplicaModels) -> None:
        assert (await models.prepare("me", "some/Base-1")).adapter is None
        mine = place.record("mine", job="ftjob-1")
        models.add(mine)
        models.add(place.record("mine", "2" * 64, "them"))
        found = (await models.prepare("me", "mine")).adapter
        assert found is not None and (found.uri, found.sha256) == ("jobs/mine/model", "1" * 64)
        assert found.name == version_name(mine) == "me/mine@1111111111111111"
        assert [model.name for model in models.list("me")] == ["some/Base-1", "mine"]
        for name in ("other", "", "a\x00", "\ud800", "x" * 5000):
            with pytest.raises(NotFound) as caught:
                await models.prepare("me", name)
            assert caught.value.param == "model"
            with pytest.raises(NotFound):
                models.find("me", name)
        models.remove(mine)
        with pytest.raises(NotFound):
            await models.prepare("me", "mine")
        assert (await models.prepare("them", "mine")).adapter is not None

    place.play(story)


def test_what_another_process_writes_is_seen(place: Place) -> None:
    async def story(models: ReplicaModels) -> None:
        with pytest.raises(NotFound):
            await models.prepare("me", "tuned")
        place.store.put_adapter(place.record("tuned"))  # a job has succeeded somewhere else
        first = (await models.prepare("me", "tuned")).adapter
        place.store.put_adapter(place.record("tuned", "2" * 64))
        place.now += models_module.FRESH_S
        second = (await models.prepare("me", "tuned")).adapter
        assert first is not None and second is not None
        assert (first.sha256, second.sha256) == ("1" * 64, "2" * 64) and first.name != second.name
        place.store.delete_adapter("me", "tuned")
        place.now += models_module.FRESH_S
        with pytest.raises(NotFound):
            await models.prepare("me", "tuned")

    place.play(story)


def test_known_rows_are_not_read_again_at_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    find = place.store.find_adapter

    def counted(tenant: str, name: str) -> AdapterRecord | None:
        reads.append(name)
        time.sleep(0.005)
        return find(tenant, name)

    monkeypatch.setattr(place.store, "find_adapter", counted)
    place.store.put_adapter(place.record("tuned"))

    async def story(models: ReplicaModels) -> None:
        await asyncio.gather(*(models.prepare("me", "tuned") for _ in range(50)))
        assert models.find("me", "tuned").created == 7
        assert reads == ["tuned"]

    place.play(story)


def test_a_change_during_a_reading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reading gives that began before a change is not kept."""
    old, goes_on, began = place.record("tuned"), threading.Event(), threading.Event()
    find, slow = place.store.find_adapter, iter([True])

    def late(tenant: str, name: str) -> AdapterRecord | None:
        found = find(tenant, name)
        if next(slow, False):
            began.set()
            goes_on.wait(10)
        return found

    place.store.put_adapter(old)
    monkeypatch.setattr(place.store, "find_adapter", late)

    async def story(models: ReplicaModels) -> None:
        asking = asyncio.create_task(models.prepare("me", "tuned"))
        await asyncio.to_thread(began.wait, 10)
        await asyncio.to_thread(models.add, place.record("tuned", "2" * 64))
        goes_on.set()
        await asking
        found = (await models.prepare("me", "tuned")).adapter
        assert found is not None and found.sha256 == "2" * 64

    place.play(story)


def test_requests_go_on_while_the_index_is_away(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.store.put_adapter(place.record("tuned"))
    monkeypatch.setattr(models_module, "_PATIENCE_S", 0.05)
    goes_on = threading.Event()

    def refuse(_tenant: str, _name: str) -> AdapterRecord | None:
        raise StorageRefused("the index's database can't be reached; try again")

    def hang(_tenant: str, _name: str) -> AdapterRecord | None:
        goes_on.wait(10)
        raise StorageRefused("the index's database can't be reached; try again")

    async def story(models: ReplicaModels) -> None:
        known = await models.prepare("me", "tuned")
        for away in (refuse, hang):
            monkeypatch.setattr(place.store, "find_adapter", away)
            place.now += 10
            assert await models.prepare("me", "tuned") == known
            assert await asyncio.to_thread(models.find, "me", "tuned") == known
        goes_on.set()
        monkeypatch.setattr(place.store, "find_adapter", refuse)
        await asyncio.sleep(0.05)
        with pytest.raises(StorageRefused):
            await models.prepare("me", "unknown")
        place.now += 1000
        with pytest.raises(StorageRefused):
            await models.prepare("me", "tuned")

    place.play(story)


def test_a_client_that_goes_away_while_a_row_is_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.store.put_adapter(place.record("tuned"))
    find = place.store.find_adapter
    monkeypatch.setattr(place.store, "find_adapter", lambda *key: (time.sleep(0.05), find(*key))[1])

    async def story(models: ReplicaModels) -> None:
        first = asyncio.create_task(models.prepare("me", "tuned"))
        await asyncio.sleep(0.01)
        first.cancel()
        assert (await models.prepare("me", "tuned")).adapter is not None

    place.play(story)


def test_an_adapter_of_a_single_server(place: Place) -> None:
    place.store.put_adapter(AdapterRecord(name="old", tenant="me", directory="/var/lib/x", created_at=1))

    async def story(models: ReplicaModels) -> None:
        assert models.find("me", "old").name == "old"
        with pytest.raises(InvalidRequest, match="old was made by a server without replicas"):
            await models.prepare("me", "old")
        with pytest.raises(NotFound, match="gone or damaged"):
            models.find_files(models.find_record("me", "old"))

    place.play(story)


def test_adapters_from_outside(place: Place) -> None:
    write_tiny_adapter(place.root / "x")

    async def story(models: ReplicaModels) -> None:
        await models.load("me", "mine", "x")
        first = (await models.prepare("me", "mine")).adapter
        assert first is not None
        record = models.find_record("me", "mine")
        assert models.copied_bytes("me") == record.bytes > 1000 and models.copied_bytes("them") == 0
        directory = Path(models.find_files(record).directory)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in directory.iterdir()}
        assert list((place.path / "one" / "adapters").iterdir()) == [], "nothing of it stays here"
        with pytest.raises(InvalidRequest, match="already been loaded"):
            await models.load("me", "mine", "x")
        write_tiny_adapter(place.root / "x", seed=1)
        await models.load("me", "mine", "x", replace=True)
        second = (await models.prepare("me", "mine")).adapter
        assert second is not None and second.name != first.name and models.find_record("me", "mine").version == 1
        async with asyncio.timeout(10):
            while place.num_adapters != 1 or place.artifacts.exists(first.uri):
                await asyncio.sleep(0.01)
        await models.unload("me", "mine")
        for call in (models.unload("me", "mine"), models.prepare("me", "mine")):
            with pytest.raises(NotFound):
                await call
        await models.close()
        assert place.num_adapters == 0

    place.play(story)


def test_adapters_that_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_adapter(place.root / "x")
    write_tiny_adapter(place.root / "large", rank=64)

    async def story(models: ReplicaModels) -> None:
        models.add(place.record("tuned", job="ftjob-1"))
        for name, path, error, reason in (
            ("a", "none", InvalidRequest, "no such directory"), ("a", "../x", Forbidden, "below --adapter-root"),
            ("some/Base-1", "x", InvalidRequest, "base model's name"), ("", "x", InvalidRequest, "printable"),
            ("tuned", "x", InvalidRequest, "finetuning job"), ("a", "large", InvalidRequest, "max_lora_rank"),
        ):
            with pytest.raises(error, match=reason):
                await models.load("me", name, path)
        with pytest.raises(Forbidden, match="DELETE"):
            await models.unload("me", "tuned")
        models.held_bytes = lambda tenant: 1 << 50
        with pytest.raises(TooLarge):
            await models.load("me", "a", "x")
        models.held_bytes = models.copied_bytes

        def refuse(*_: Any) -> Any:
            raise StorageRefused("the artifact store is full")

        with monkeypatch.context() as patch:
            patch.setattr(place.artifacts, "put_directory", refuse)
            with pytest.raises(CapacityError, match="full"):
                await models.load("me", "a", "x")
        assert list((place.path / "one" / "adapters").iterdir()) == []
        with pytest.raises(NotFound):
            await models.prepare("me", "a")
        await models.load("me", "a", "x")

    place.play(story, max_lora_rank=8)


def test_a_limit_of_loaded_adapters(place: Place) -> None:
    write_tiny_adapter(place.root / "x")

    async def story(models: ReplicaModels) -> None:
        await models.load("me", "a", "x")
        with pytest.raises(TooLarge, match="1 adapters"):
            await models.load("me", "b", "x")
        await models.load("me", "a", "x", replace=True)
        await models.load("them", "b", "x")

    place.play(story, max_tenant_files=1)


def test_modules_of_the_command_line(place: Place) -> None:
    shared = write_tiny_adapter(place.path / "shared")

    async def story(models: ReplicaModels) -> None:
        found = (await models.prepare("them", "shared")).adapter
        assert found is not None and found.uri.startswith("modules/") and found.name.startswith("/shared@")
        again = place.make("two", lora_modules=(("shared", str(shared)), ("also", str(shared))))
        assert (await again.prepare("me", "shared")).adapter == found
        await again.close()
        assert len(list((place.path / "store" / "modules").iterdir())) == 1, "the same files are there once"
        with pytest.raises(Forbidden, match="--lora-modules"):
            await models.unload("me", "shared")

    place.play(story, lora_modules=(("shared", str(shared)),))
    write_tiny_adapter(shared, seed=3)
    place.make("three", lora_modules=(("shared", str(shared)),))
    assert len(list((place.path / "store" / "modules").iterdir())) == 1
    models = place.make("four")
    with pytest.raises(NotFound):
        models.find("me", "shared")
    assert list((place.path / "store" / "modules").iterdir()) == []
    with pytest.raises(ConfigError, match="there is no directory none"):
        place.make("five", lora_modules=(("none", str(place.path / "none")),))


def test_bytes_of_a_tenant(place: Place) -> None:
    store, disk = place.store, StoredBytes(place.store)
    store.put_adapter(place.record("tuned", bytes=100))
    store.put_adapter(AdapterRecord(
        name="twin", tenant="me", directory="jobs/tuned/model", created_at=7, sha256="1" * 64, bytes=100,
    ))
    store.put_adapter(place.record("other", bytes=10))
    store.put_adapter(place.record("theirs", tenant="them", bytes=1000))
    assert (disk.bytes_of("me"), disk.bytes_of("them"), disk.bytes_of("nobody")) == (110, 1000, 0)
