"""Adapters from outside in the server: checked before anything uses them, with the real reason and without the server's paths.
A copy is served, so that files which change later change nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from coserve.core import ConfigError, CoserveError, InvalidRequest, NotFound
from coserve.server.errors import TooLarge
from coserve.server.index.store import Store
from coserve.server.models import ModelRegistry
from coserve.server.records import AdapterRecord
from coserve.server.settings import ServerConfig
from tests.server.conftest import RunningServer
from tests.server.jobs_bench import FakeEngine
from tests.tiny_adapter import tensor_of, write_tiny_adapter, write_tiny_config

Story = Callable[[ModelRegistry, FakeEngine], Coroutine[Any, Any, None]]
WEIGHTS = "adapter_model.safetensors"


def with_nan(directory: Path) -> Path:
    tensors = load_file(directory / WEIGHTS)
    tensors[tensor_of(0, "q_proj", "A")][0, 0] = float("nan")
    save_file(tensors, directory / WEIGHTS)
    return directory


def cut(directory: Path) -> Path:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-100])
    return directory


def nested(directory: Path) -> Path:
    (directory / "adapter_config.json").write_text('{"a":' * 50_000)
    return directory


def of_another_base(directory: Path) -> Path:
    (directory / "coserve.json").write_text('{"base_fingerprint": "another"}')
    return directory


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "huge alpha": (lambda path: write_tiny_adapter(path, lora_alpha=1e308), "lora_alpha"),
    "endless alpha": (lambda path: write_tiny_adapter(path, lora_alpha=10**400), "lora_alpha"),
    "huge pattern": (lambda path: write_tiny_adapter(path, alpha_pattern={"q_proj": 1e308}), "alpha_pattern"),
    "infinite pattern": (lambda path: write_tiny_adapter(path, alpha_pattern={"q_proj": float("inf")}), "Infinity"),
    "a kind that is a list": (lambda path: write_tiny_adapter(path, peft_type=["LORA"]), "peft_type"),
    "rank over the limit": (lambda path: write_tiny_adapter(path, rank=65), "max_lora_rank=64"),
    "another rank": (lambda path: write_tiny_adapter(path, r=8), "rank 8"),
    "not a number": (lambda path: with_nan(write_tiny_adapter(path)), "NaN"),
    "cut": (lambda path: cut(write_tiny_adapter(path)), "promises"),
    "nested": (lambda path: nested(write_tiny_adapter(path)), "adapter_config.json"),
    "another base": (lambda path: of_another_base(write_tiny_adapter(path)), "another base"),
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[ModelRegistry, FakeEngine]]:
    write_tiny_config(tmp_path / "base")
    (tmp_path / "root").mkdir()
    store = Store(f"sqlite:///{tmp_path / 'index.db'}")

    def models(**settings: Any) -> tuple[ModelRegistry, FakeEngine]:
        engine: Any = FakeEngine(tmp_path / "base")
        config = ServerConfig(adapter_root=str(tmp_path / "root"), data_dir=tmp_path / "data", **settings)
        return ModelRegistry(store, engine, config), engine

    return models


def play(made: tuple[ModelRegistry, FakeEngine], story: Story) -> None:
    asyncio.run(asyncio.wait_for(story(*made), 60))


@pytest.mark.parametrize(("write", "reason"), BAD.values(), ids=BAD.keys())
def test_a_bad_adapter_is_refused_everywhere_with_its_reason(
    tmp_path: Path, make: Callable[..., Any], write: Callable[[Path], object], reason: str
) -> None:
    write(tmp_path / "root" / "bad")
    with pytest.raises(ConfigError, match=r"^lora_modules: mine=") as at_start:
        make(lora_modules=(("mine", str(tmp_path / "root" / "bad")),))
    assert reason in str(at_start.value)

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        write_tiny_adapter(tmp_path / "root" / "good")
        await models.load("me", "x", "good")
        before = models.find_record("me", "x")
        with pytest.raises(InvalidRequest) as caught:
            await models.load("me", "x", "bad", replace=True)
        assert caught.value.param == "lora_path" and reason in str(caught.value) and str(tmp_path) not in str(caught.value)
        assert models.find_record("me", "x") == before and len(engine.loads) == 1, "the old version stays"
        models.add(AdapterRecord(name="old", tenant="me", directory=str(tmp_path / "root" / "bad"), created_at=1))
        with pytest.raises(InvalidRequest) as caught:
            await models.prepare("me", "old")
        assert reason in str(caught.value) and str(tmp_path) not in str(caught.value)
        assert len(list((tmp_path / "data/adapters").iterdir())) == 1

    play(make(), story)


def test_what_is_served_is_a_copy(tmp_path: Path, make: Callable[..., Any]) -> None:
    source = write_tiny_adapter(tmp_path / "root" / "a", alpha_pattern={"(q|v)_proj": 4}, later_field=[1])

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        await models.load("me", "x", "a")
        copy = Path(models.find_record("me", "x").directory)
        fields = json.loads((copy / "adapter_config.json").read_text())
        assert fields["alpha_pattern"] == {"q_proj": 4.0, "v_proj": 4.0} and "later_field" not in fields
        shutil.rmtree(source)
        engine.die()
        await engine.rise()
        await models.prepare("me", "x")
        assert engine.loads[-1] == ("me/x", str(copy))

    play(make(), story)
    models, _ = make()
    kept = models.find_record("me", "x").directory
    assert [str(path) for path in (tmp_path / "data/adapters").iterdir()] == [kept], "a start deletes what no name stands for"


def test_copies_go_with_their_names(tmp_path: Path, make: Callable[..., Any]) -> None:
    for seed in range(3):
        write_tiny_adapter(tmp_path / "root" / str(seed), seed=seed)

    def copies() -> set[str]:
        return {str(path) for path in (tmp_path / "data/adapters").iterdir()}

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        for seed in range(3):
            await models.load("me", "x", str(seed), replace=True)
            assert copies() == {models.find_record("me", "x").directory}
        await models.unload("me", "x")
        assert not copies()
        await asyncio.gather(*(models.load("me", "x", str(seed), replace=True) for seed in range(3)))
        assert copies() == {models.find_record("me", "x").directory} == {engine.adapters["me/x"]}

    play(make(), story)


def test_warnings_are_in_the_answer_and_in_the_log(
    tmp_path: Path, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_adapter(tmp_path / "root" / "a", target_modules=["q_proj", "v_proj", "c_attn"])

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        (warning,) = await models.load("me", "x", "a")
        assert "no module called c_attn" in warning and warning in caplog.text

    play(make(), story)
    make(lora_modules=(("mine", str(tmp_path / "root" / "a")),))
    assert caplog.text.count("no module called c_attn") == 2


def test_a_directory_in_the_place_of_one_is_checked_when_a_job_continues_it(tmp_path: Path, make: Callable[..., Any]) -> None:
    models, _ = make()
    source = write_tiny_adapter(tmp_path / "outside")
    models.add(AdapterRecord(name="old", tenant="me", directory=str(source), created_at=1))
    found = models.find_files(models.find_record("me", "old"))
    assert Path(found.directory).parent == tmp_path / "data/adapters" and models.find_record("me", "old") == found
    with_nan(source)
    models.add(AdapterRecord(name="old", tenant="me", directory=str(source), created_at=1))
    with pytest.raises(CoserveError, match="NaN"):
        models.find_files(models.find_record("me", "old"))


def copies_of(data_dir: Path) -> set[str]:
    return {str(path) for path in (data_dir / "adapters").iterdir()}


def test_copies_count_for_the_disk_of_their_tenant(tmp_path: Path, make: Callable[..., Any]) -> None:
    for rank in (4, 8):
        write_tiny_adapter(tmp_path / "root" / f"rank-{rank}", rank=rank)
    _models, _ = make(lora_modules=(("everybodys", str(tmp_path / "root/rank-4")),))
    (copy,) = (tmp_path / "data/adapters").iterdir()
    size = sum(path.stat().st_size for path in copy.iterdir())

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        assert models.copied_bytes("a") == models.copied_bytes("") - size == 0
        await models.load("a", "x", "rank-4")
        await models.load("a", "y", "rank-4")
        assert models.copied_bytes("a") == 2 * size and models.copied_bytes("b") == 0
        before = copies_of(tmp_path / "data")
        for name, path, replace in (("z", "rank-4", False), ("y", "rank-8", True)):
            with pytest.raises(TooLarge, match="unload adapters") as caught:
                await models.load("a", name, path, replace=replace)
            assert caught.value.param == "lora_path" and copies_of(tmp_path / "data") == before
        await models.load("a", "y", "rank-4", replace=True)  # in the room of the one that goes
        await models.load("b", "z", "rank-4")  # others have room of their own
        engine.adapters["a request's"] = models.find_record("a", "y").directory
        await models.unload("a", "y")
        assert models.copied_bytes("a") == 2 * size, "a request still needs it"
        del engine.adapters["a request's"]
        await models.unload("a", "x")
        assert models.copied_bytes("a") == 0
        await models.load("a", "z", "rank-8")

    play(make(lora_modules=(("everybodys", str(tmp_path / "root/rank-4")),), max_tenant_file_bytes=int(2.5 * size)), story)


def test_a_tenant_has_only_so_many_adapters(tmp_path: Path, make: Callable[..., Any]) -> None:
    write_tiny_adapter(tmp_path / "root" / "a")

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        await models.load("a", "x", "a")
        with pytest.raises(TooLarge, match="you have 1 adapters"):
            await models.load("a", "y", "a")
        await models.load("a", "x", "a", replace=True)
        await models.load("b", "y", "a")

    play(make(max_tenant_files=1), story)


def test_adapters_that_are_loaded_at_the_same_time_count_too(tmp_path: Path, make: Callable[..., Any]) -> None:
    write_tiny_adapter(tmp_path / "root" / "a")

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        load_adapter = engine.load_adapter

        async def slow(name: str, directory: str) -> list[str]:
            await asyncio.sleep(0.2)
            return await load_adapter(name, directory)

        engine.load_adapter = slow  # type: ignore[method-assign]
        made = await asyncio.gather(*(models.load("me", f"x{n}", "a") for n in range(4)), return_exceptions=True)
        assert sum(isinstance(error, TooLarge) for error in made) == 3
        assert len(await asyncio.to_thread(models.list, "me")) == 2, "the base and one adapter"

    play(make(max_tenant_files=1), story)


def test_loading_and_unloading_at_once_leaves_nothing_behind(tmp_path: Path, make: Callable[..., Any]) -> None:
    write_tiny_adapter(tmp_path / "root" / "a")

    async def try_to(what: Coroutine[Any, Any, Any]) -> None:
        with contextlib.suppress(InvalidRequest, NotFound):
            await what

    async def story(models: ModelRegistry, engine: FakeEngine) -> None:
        await asyncio.gather(*(
            try_to(models.load("me", "x", "a", replace=bool(number % 2)) if number % 3 else models.unload("me", "x"))
            for number in range(24)
        ))
        rows = {record.directory for record in models._store.list_adapters("me")}
        assert copies_of(tmp_path / "data") == rows == set(engine.adapters.values())
        for number in range(50):
            await try_to(models.load("me", f"n{number}", "nothing"))
            await try_to(models.load("me", f"n{number}", "a/.."))
        assert len(models._locks._locks) == 0, "names that were tried take no memory"

    play(make(), story)


def test_a_row_that_is_read_while_it_is_replaced_is_not_kept(
    tmp_path: Path, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    models, _ = make()
    old, new = (AdapterRecord(name="x", tenant="me", directory=name, created_at=1) for name in ("old", "new"))
    models.add(old)
    read = models._store.find_adapter

    def read_slowly(tenant: str, name: str) -> AdapterRecord | None:
        found = read(tenant, name)
        monkeypatch.undo()
        models.add(new)
        return found

    monkeypatch.setattr(models._store, "find_adapter", read_slowly)
    assert models.find_record("me", "x") == old
    assert models.find_record("me", "x") == new


def test_a_copy_may_be_retired_while_others_are_deleted(tmp_path: Path, make: Callable[..., Any]) -> None:
    models, _ = make()
    shelf = models._shelf

    class Held(list[str]):
        def __contains__(self, directory: object) -> bool:
            shelf.retire(str(shelf.root / f"{Path(str(directory)).name}+"), "me")
            return False

    shelf.retire(str(shelf.root / "a"), "me")
    shelf.sweep(Held())
    assert shelf.retired("me") == [str(shelf.root / "a+")]


# --- a real server ---


def load(server: RunningServer, name: str, path: str) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path}, timeout=60)


def complete(server: RunningServer, model: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 4}, timeout=60
    )


def test_a_running_server_is_not_harmed(server: RunningServer) -> None:
    engine = server.engine_pids
    for number, (write, reason) in enumerate(BAD.values()):
        write(server.data_dir / "foreign" / str(number))
        refused = load(server, f"bad-{number}", f"foreign/{number}")
        assert refused.status_code == 400, refused.text
        assert reason in refused.text and str(server.data_dir) not in refused.text
    write_tiny_adapter(
        server.data_dir / "foreign/slow", alpha_pattern={"([a-z._0-9]+)+!": 4}, target_modules=["q_proj", "v_proj", "c_attn"]
    )
    began = time.monotonic()
    taken = load(server, "slow", "foreign/slow")
    assert taken.status_code == 200 and taken.text.startswith("Success: LoRA adapter 'slow' added successfully\nWarning: ")
    assert "c_attn" in taken.text and "matches no module" in taken.text
    assert complete(server, "slow").status_code == 200 and complete(server, server.model_name).status_code == 200
    assert time.monotonic() - began < 30 and server.engine_pids == engine
    (server.data_dir / "foreign/slow/adapter_model.safetensors").write_bytes(b"gone")
    assert complete(server, "slow").status_code == 200
    httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "slow"}, timeout=60).raise_for_status()
