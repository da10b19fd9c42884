"""Model names: whose they are, when the engine gets the adapter behind one, which directories can be loaded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from coserve.core import ConfigError, InvalidRequest, NotFound
from coserve.server.errors import Forbidden
from coserve.server.index.store import Store
from coserve.server.link.messages import AdapterRef
from coserve.server.models import ModelRegistry, engine_name
from coserve.server.records import AdapterRecord
from coserve.server.settings import ServerConfig
from tests.server.jobs_bench import FakeEngine
from tests.tiny_adapter import write_tiny_adapter as write_adapter
from tests.tiny_adapter import write_tiny_config

Story = Callable[[ModelRegistry, FakeEngine], Coroutine[Any, Any, None]]


class Place:
    """A directory of models over an index in `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self.root = path, path / "adapters"
        self.root.mkdir()
        write_tiny_config(path)
        self.store = Store(f"sqlite:///{path / 'index.db'}")

    def make(self, **settings: Any) -> tuple[ModelRegistry, FakeEngine]:
        engine: Any = FakeEngine(self.path)
        config = ServerConfig(**{"adapter_root": str(self.root), "data_dir": self.path / "data", **settings})
        return ModelRegistry(self.store, engine, config), engine

    def play(self, story: Story, **settings: Any) -> None:
        async def run() -> None:
            await story(*self.make(**settings))

        asyncio.run(asyncio.wait_for(run(), 30))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def adapter(place: Place, name: str, tenant: str = "me", job: str | None = None) -> AdapterRecord:
    directory = write_adapter(place.path / "made" / name)
    return AdapterRecord(name=name, tenant=tenant, directory=str(directory), created_at=7, job=job)


def test_names_of_the_base(place: Place) -> None:
    models, _ = place.make()
    assert models.base_names == ("some/Base-1",)
    models, _ = place.make(served_model_name=("a", "b"))
    for name in ("a", "b"):
        found = models.find("me", name)
        assert (found.name, found.adapter) == (name, None)
    with pytest.raises(NotFound) as caught:
        models.find("me", "some/Base-1")
    assert caught.value.param == "model"


def test_adapters_belong_to_tenants(place: Place) -> None:
    models, _ = place.make()
    models.add(adapter(place, "mine"))
    models.add(adapter(place, "both", "me"))
    models.add(adapter(place, "both", "them"))
    found = models.find("me", "mine")
    assert (found.adapter, found.created) == (AdapterRef(name="me/mine"), 7)
    assert models.find("me", "both").adapter == AdapterRef(name="me/both")
    assert models.find("them", "both").adapter == AdapterRef(name="them/both")
    with pytest.raises(NotFound):
        models.find("them", "mine")
    assert [model.name for model in models.list("them")] == ["some/Base-1", "both"]


@pytest.mark.parametrize("name", ["", "a\x00", "\ud800", "x" * 5000, "../etc"])
def test_strange_names_are_not_found(place: Place, name: str) -> None:
    models, _ = place.make()
    with pytest.raises(NotFound) as caught:
        models.find("me", name)
    str(caught.value).encode()


def test_engine_names_are_unique() -> None:
    pairs = [("a", "b/c"), ("a/b", "c"), ("", "a/b"), ("a", "/b"), ("", "/a/b")]
    assert len({engine_name(tenant, name) for tenant, name in pairs}) == len(pairs)


def test_an_adapter_is_loaded_once_per_engine(place: Place) -> None:
    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        record = adapter(place, "mine")
        models.add(record)
        await asyncio.gather(*(models.prepare("me", "mine") for _ in range(5)))
        ((name, directory),) = engine.loads
        assert name == "me/mine" and Path(directory).parent == place.path / "data/adapters"
        assert models.find_record("me", "mine").directory == directory != record.directory
        engine.die()
        await engine.rise()
        assert (await models.prepare("me", "mine")).adapter == AdapterRef(name="me/mine")
        assert len(engine.loads) == 2
        assert (await models.prepare("me", "some/Base-1")).adapter is None

    place.play(story)


def test_an_adapter_whose_files_are_gone(place: Place) -> None:
    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        models.add(AdapterRecord(name="gone", tenant="me", directory=str(place.path / "none"), created_at=1))
        with pytest.raises(InvalidRequest, match="there is no directory none") as caught:
            await models.prepare("me", "gone")
        assert str(place.path) not in str(caught.value)

    place.play(story)


def test_modules_of_the_command_line(place: Place) -> None:
    directory = write_adapter(place.path / "shared")

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        assert models.find("me", "shared").adapter == AdapterRef(name="/shared")
        assert (await models.prepare("them", "shared")).adapter == AdapterRef(name="/shared")
        assert len(engine.loads) == 1
        with pytest.raises(Forbidden):
            await models.unload("me", "shared")
        write_adapter(place.root / "x")
        with pytest.raises(InvalidRequest, match="choose another"):
            await models.load("me", "shared", "x", replace=True)

    place.play(story, lora_modules=(("shared", str(directory)),))
    models, _ = place.make()
    with pytest.raises(NotFound):
        models.find("me", "shared")  # no longer on the command line
    with pytest.raises(ConfigError, match="there is no directory none"):
        place.make(lora_modules=(("none", str(place.path / "none")),))


def test_loading_and_unloading_at_run_time(place: Place) -> None:
    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        directory = write_adapter(place.root / "a")
        assert await models.load("me", "x", str(directory)) == ()
        ((name, first),) = engine.loads
        assert name == "me/x" and Path(first).parent == place.path / "data/adapters"
        await models.prepare("me", "x")
        assert len(engine.loads) == 1
        with pytest.raises(InvalidRequest, match="already been loaded"):
            await models.load("me", "x", "a")
        write_adapter(place.root / "b", seed=1)
        await models.load("me", "x", "b", replace=True)
        assert models.find_record("me", "x").directory == engine.loads[-1][1] != first
        assert not Path(first).exists()
        await models.load("them", "x", "a")
        with pytest.raises(NotFound):
            await models.unload("nobody", "x")
        await models.unload("me", "x")
        assert list(engine.adapters) == ["them/x"]
        with pytest.raises(NotFound):
            models.find("me", "x")
        assert [str(path) for path in (place.path / "data/adapters").iterdir()] == [engine.adapters["them/x"]]

    place.play(story)


def test_what_can_not_be_loaded(place: Place) -> None:
    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        outside = write_adapter(place.path / "outside")
        (place.root / "link").symlink_to(outside)
        sly = write_adapter(place.root / "sly")
        (sly / "adapter_model.safetensors").unlink()
        (sly / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
        (place.root / "circle").symlink_to(place.root / "circle")
        (place.root / "empty").mkdir()
        for path in (str(outside), "../outside", "link", "sly", "/", "..", f"{place.root}/../outside"):
            with pytest.raises(Forbidden, match="--adapter-root"):
                await models.load("me", "x", path)
        for path in ("none", "", "a\x00b", "\ud800", "x" * 5000, "empty", "circle"):
            with pytest.raises(InvalidRequest) as caught:
                await models.load("me", "x", path)
            assert caught.value.param == "lora_path"
        write_adapter(place.root / "good")
        for name in ("some/Base-1", "", "a\nb", "x" * 257):
            with pytest.raises(InvalidRequest) as caught:
                await models.load("me", name, "good")
            assert caught.value.param == "lora_name"
        models.add(adapter(place, "tuned", job="ftjob-1"))
        with pytest.raises(InvalidRequest, match="finetuning job"):
            await models.load("me", "tuned", "good", replace=True)
        with pytest.raises(Forbidden, match="DELETE"):
            await models.unload("me", "tuned")
        assert not engine.loads

    place.play(story)


def test_loading_is_off_without_a_root(place: Place) -> None:
    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        with pytest.raises(Forbidden, match="--adapter-root"):
            await models.load("me", "x", "a")

    place.play(story, adapter_root=None)
