"""Which place holds the bytes that an index names: every other one is refused, before anything is deleted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coserve.core import ConfigError
from coserve.server.errors import StorageRefused
from coserve.server.index.place import PLACE_FILE, check_data_directory
from coserve.server.index.store import Store
from coserve.server.records import AdapterRecord, FileRecord
from coserve.server.replicas.objects import MARKER
from coserve.server.replicas.storeplace import open_own_store
from coserve.server.settings import ServerConfig
from tests.server.conftest import run_coserve
from tests.server.fleets import FleetProcess

pytest_plugins = ["tests.server.postgres"]
FILE = FileRecord(id="file-1", tenant="me", filename="f", purpose="fine-tune", bytes=3, sha256="0", created_at=1)


@pytest.fixture
def index(postgres_url: str) -> Iterator[Store]:
    index = Store(postgres_url)
    yield index
    index.close()


def config_of(root: Path, store: str = "store", data: str = "data") -> ServerConfig:
    return ServerConfig(store=str(root / store), data_dir=root / data, replicas=2)


def test_all_processes_of_a_fleet_agree_on_its_store(index: Store, postgres_url: str, tmp_path: Path) -> None:
    """Also when they start at the same time on an empty index."""
    indexes = [Store(postgres_url) for _ in range(6)]
    with ThreadPoolExecutor(len(indexes)) as pool:
        ids = {store.id for store in pool.map(lambda one: open_own_store(config_of(tmp_path), one), indexes)}
    for one in indexes:
        one.close()
    assert ids == {index.find_place()}


def test_a_process_that_is_refused_while_another_one_chooses_asks_again(
    index: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle, tries = index.settle_place, list[int]()

    def busy(choose: Callable[[], str]) -> str:
        tries.append(1)
        if len(tries) < 3:
            raise StorageRefused("the index is busy; try again")
        return settle(choose)

    monkeypatch.setattr(index, "settle_place", busy)
    assert open_own_store(config_of(tmp_path), index).id == index.find_place() and len(tries) == 3


def test_a_machine_whose_store_is_not_mounted_is_refused(index: Store, tmp_path: Path) -> None:
    """An index without any rows says so too."""
    own = open_own_store(config_of(tmp_path), index)
    with pytest.raises(ConfigError, match=r"is empty, but the index .* is it mounted") as empty:
        open_own_store(config_of(tmp_path, "unmounted"), index)
    assert empty.value.param == "store" and not (tmp_path / "unmounted" / MARKER).exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MARKER).write_text('{"format": 1, "id": "store-2"}')
    with pytest.raises(ConfigError, match=rf"another store .*{own.id}; here is store-2"):
        open_own_store(config_of(tmp_path, "other"), index)
    (tmp_path / "other" / MARKER).write_text('{"format": 1}')
    with pytest.raises(ConfigError, match="here is one without an id"):
        open_own_store(config_of(tmp_path, "other"), index)


def test_a_store_and_an_index_of_an_older_coserve_are_taken_as_they_are(index: Store, tmp_path: Path) -> None:
    index.add_file(FILE)
    with pytest.raises(ConfigError, match="is it mounted"):
        open_own_store(config_of(tmp_path), index)
    (tmp_path / "store").mkdir(exist_ok=True)
    (tmp_path / "store" / MARKER).write_text('{"format": 1}')
    first = open_own_store(config_of(tmp_path), index)
    assert first.id is not None and open_own_store(config_of(tmp_path), index).id == first.id == index.find_place()


def test_adapters_count_as_bytes_that_must_be_there(index: Store, tmp_path: Path) -> None:
    assert not index.names_bytes()
    index.put_adapter(AdapterRecord(tenant="me", name="a", directory="adapters/x", created_at=1, job=None))
    assert index.names_bytes()
    with pytest.raises(ConfigError, match="is it mounted"):
        open_own_store(config_of(tmp_path), index)


def test_data_directories(index: Store, tmp_path: Path) -> None:
    index.add_file(FILE)
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
    for _ in range(2):
        check_data_directory(index, first)
    with pytest.raises(ConfigError, match=f"no {PLACE_FILE}") as refused:
        check_data_directory(index, second)
    assert refused.value.param == "data_dir"
    text = str(refused.value)
    (second / PLACE_FILE).write_text(text[text.index("{") : text.rindex("}") + 1])  # as it says for a restored one
    check_data_directory(index, second)
    (second / PLACE_FILE).write_text(json.dumps({"id": "data-2"}))
    with pytest.raises(ConfigError, match="has data-2"):
        check_data_directory(index, second)
    (second / PLACE_FILE).write_text("{")
    with pytest.raises(ConfigError, match="can't be read"):
        check_data_directory(index, second)
    with pytest.raises(ConfigError, match=r"belongs to a single server.* Give them a new database") as fleet:
        open_own_store(config_of(tmp_path), index)
    assert fleet.value.param == "database_url" and not (tmp_path / "store").exists()


@pytest.mark.full
def test_a_single_server_on_the_database_of_a_fleet_deletes_nothing(
    index: Store, postgres_url: str, tmp_path: Path, tiny_model: Path
) -> None:
    open_own_store(config_of(tmp_path), index)
    index.add_file(FILE)
    done = run_coserve("serve", str(tiny_model), "--database-url", postgres_url, "--data-dir", str(tmp_path / "single"))
    assert done.returncode == 2 and "error: database_url: this database belongs to several replicas" in done.stderr, done
    assert index.get_file("me", "file-1") == FILE


@pytest.mark.full
def test_the_second_of_two_replicas_with_different_stores_is_refused(
    index: Store, postgres_url: str, tmp_path: Path, tiny_model: Path
) -> None:
    open_own_store(config_of(tmp_path), index)  # as the first one
    config = ServerConfig(
        model=str(tiny_model), database_url=postgres_url, store=str(tmp_path / "unmounted"), data_dir=tmp_path / "data",
        replicas=2, device="cpu", dtype="float32", threads=1, kv_cache_memory_bytes=32 << 20,
    )
    replica = FleetProcess("engine", config, tmp_path / "log")
    assert replica.process.wait(60) == 2 and "ERROR engine store: " in replica.log, replica.log
