"""Lists by pages while their entries are deleted: the next page goes on where the last one ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, text

from coserve.core import InvalidRequest
from coserve.server.index import rows as module
from coserve.server.index.store import Store
from coserve.server.records import CheckpointRecord
from tests.server.test_store import file, job


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(f"sqlite:///{tmp_path}/coserve.db")
    for number in range(9):  # three of each second
        made.add_file(file(f"file-{number}", created_at=number // 3))
    yield made
    made.close()


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4])
def test_deleting_every_page_once_it_was_read(store: Store, limit: int, order: str) -> None:
    """As a client does that cleans up."""
    seen: list[str] = []
    more, after = True, None
    while more:
        page, more = store.list_files("a", after=after, limit=limit, order=order)  # type: ignore[arg-type]
        seen += [record.id for record in page]
        after = page[-1].id
        for record in page:
            store.delete_file("a", record.id)
    expected = [f"file-{number}" for number in range(9)]
    assert seen == (expected if order == "asc" else expected[::-1])
    assert store.list_files("a") == ([], False)
    assert store.list_files("a", after=after) == ([], False)


def test_new_files_come_before_a_deleted_place(store: Store) -> None:
    store.delete_file("a", "file-4")
    store.add_file(file("file-new", created_at=1))
    assert [record.id for record in store.list_files("a", after="file-4")[0]] == [f"file-{i}" for i in (3, 2, 1, 0)]
    up = [record.id for record in store.list_files("a", after="file-4", order="asc")[0]]
    assert up == ["file-5", "file-new", "file-6", "file-7", "file-8"]
    assert store.list_files("a", purpose="other", after="file-4") == ([], False)


def test_a_place_is_known_after_a_restart_and_only_to_its_owner(store: Store, tmp_path: Path) -> None:
    store.add_file(file("file-b", tenant="b", created_at=1))
    store.delete_file("a", "file-4")
    store.close()
    again = Store(f"sqlite:///{tmp_path}/coserve.db")
    assert len(again.list_files("a", after="file-4")[0]) == 4
    for tenant, after in (("b", "file-4"), ("a", "file-b"), ("a", "file-99")):
        with pytest.raises(InvalidRequest) as error:
            again.list_files(tenant, after=after)
        assert error.value.param == "after"
    again.close()


def test_an_id_that_is_used_again_stands_where_it_stands_now(store: Store) -> None:
    store.delete_file("a", "file-0")
    store.add_file(file("file-0", created_at=9))
    assert len(store.list_files("a", after="file-0")[0]) == 8
    store.delete_file("a", "file-0")
    assert len(store.list_files("a", after="file-0")[0]) == 8


def test_checkpoints_that_are_pruned_between_pages(store: Store) -> None:
    store.add_job(job("ftjob-1"))
    store.add_job(job("ftjob-2"))
    for step in range(1, 6):
        store.put_checkpoint(CheckpointRecord(
            id=f"ftckpt-{step}", job="ftjob-1", created_at=9, step=step, model=f"m:{step}", directory="d", metrics={}))
    page, _ = store.list_checkpoints("ftjob-1", limit=2)
    for record in page:
        store.delete_checkpoint(record.id)
    assert [record.step for record in store.list_checkpoints("ftjob-1", after=page[-1].id)[0]] == [3, 2, 1]
    with pytest.raises(InvalidRequest):
        store.list_checkpoints("ftjob-2", after=page[-1].id)


def test_places_are_forgotten_after_a_month(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0] * 2 + [100.0 + module._REMEMBERED_S + 1] * 2)
    monkeypatch.setattr(module, "now", lambda: int(next(clock)))
    store.delete_file("a", "file-4")
    store.delete_file("a", "file-5")
    with pytest.raises(InvalidRequest):
        store.list_files("a", after="file-4")
    assert len(store.list_files("a", after="file-5")[0]) == 4


def _drop(path: Path) -> None:
    """An index as an older coserve made it."""
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE removed"))
    engine.dispose()


def test_an_index_of_an_older_coserve_is_taken(store: Store, tmp_path: Path) -> None:
    store.close()
    _drop(tmp_path / "coserve.db")
    again = Store(f"sqlite:///{tmp_path}/coserve.db")
    again.delete_file("a", "file-4")
    assert len(again.list_files("a", after="file-4")[0]) == 4
    again.close()


@pytest.mark.parametrize("count", [1, 200])
def test_a_full_disk_does_not_keep_files_from_being_deleted(store: Store, count: int) -> None:
    for number in range(9, 9 + count):
        store.add_file(file(f"file-{number}", created_at=number))
    with store.database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    limit_pages(store, pages)
    for number in range(9 + count):
        store.delete_file("a", f"file-{number}")
    assert store.list_files("a") == ([], False)


def limit_pages(store: Store, pages: int) -> None:
    """No connection may make the index larger."""
    def limit(connection: Callable[..., object], *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[attr-defined]

    event.listen(store.database.engine, "connect", limit)
    store.database.engine.dispose()
