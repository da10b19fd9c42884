"""The index, on SQLite and on PostgreSQL: every query, the schema's versions, and files that can't be used."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import Connection, create_engine, make_url, text

from coserve.core import CapacityError, ConfigError, InvalidRequest, NotFound
from coserve.server.errors import Conflict
from coserve.server.index import database, tables
from coserve.server.index.store import Store
from coserve.server.records import AdapterRecord, CheckpointRecord, FileRecord, JobRecord, KeyRecord

pytest_plugins = ["tests.server.postgres"]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres_url"))
    return f"sqlite:///{tmp_path}/data/coserve.db"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = Store(url)
    yield store
    store.close()


def file(id: str, tenant: str = "a", created_at: int = 100, **fields: Any) -> FileRecord:
    values = {"filename": "train.jsonl", "purpose": "fine-tune", "bytes": 3_000_000_000, "sha256": "00"} | fields
    return FileRecord(id=id, tenant=tenant, created_at=created_at, **values)


def job(id: str, tenant: str = "a", created_at: int = 100, **fields: Any) -> JobRecord:
    values = {"base": "tiny", "training_file": "file-1", "config": {"rank": 8}, "method": {"type": "supervised"}} | fields
    return JobRecord(id=id, tenant=tenant, created_at=created_at, **values)


FULL_JOB = job(
    "ftjob-full", status="failed", paused=True, validation_file="file-2", start="ft:x", suffix="süß", seed=2**62,
    fine_tuned_model="ft:y", finished_at=5, started_at=4, error={"code": "c", "message": 'quo"te', "param": None},
    trained_tokens=2**40, step=3, num_steps=9, result_files=("file-3", "file-4"), integrations=({"type": "tensorboard"},),
    metadata={"a.b": "1", 'qu"ote': "x", "": "empty"}, settings={"rank": 4, "targets": ["q", "v"]}, priority=-2, weight=0.25,
    deadline=2**33,
)


def test_keys(store: Store) -> None:
    first = KeyRecord(id="key-1", tenant="a", prefix="sk-1234", digest="d1", created_at=1)
    store.add_key(first)
    store.add_key(dataclasses.replace(first, id="key-2", digest="d2"))
    assert [key.id for key in store.list_keys()] == ["key-1", "key-2"]
    assert store.find_key("d1") == first and store.find_key("d3") is None
    store.revoke_key("key-1", 50)
    store.revoke_key("key-1", 60)
    assert store.find_key("d1") == dataclasses.replace(first, revoked_at=50)
    with pytest.raises(NotFound):
        store.revoke_key("key-3", 60)
    with pytest.raises(Conflict):
        store.add_key(dataclasses.replace(first, id="key-3"))


def test_files_of_a_tenant(store: Store) -> None:
    store.add_file(file("file-1"))
    assert store.get_file("a", "file-1") == file("file-1")
    with pytest.raises(Conflict):
        store.add_file(file("file-1", tenant="b"))
    for call in (store.get_file, store.delete_file):
        with pytest.raises(NotFound):
            call("b", "file-1")
        with pytest.raises(NotFound):
            call("a", "file-2")
    store.add_file(file("file-3", bytes=2**40))
    assert store.count_file_bytes("a") == file("file-1").bytes + 2**40 and store.count_file_bytes("b") == 0
    store.delete_file("a", "file-3")
    store.delete_file("a", "file-1")
    assert store.list_files("a") == ([], False) and store.all_files() == []


def test_pages_of_files(store: Store) -> None:
    for number, time in enumerate((7, 5, 5, 9)):  # insertion breaks ties
        store.add_file(file(f"file-{number}", created_at=time, purpose="other" if number == 1 else "fine-tune"))
    store.add_file(file("file-b", tenant="b", created_at=6))

    def ids(**query: Any) -> tuple[list[str], bool]:
        records, has_more = store.list_files("a", **query)
        return [record.id for record in records], has_more

    assert ids() == (["file-3", "file-0", "file-2", "file-1"], False)
    assert ids(order="asc") == (["file-1", "file-2", "file-0", "file-3"], False)
    assert ids(limit=2) == (["file-3", "file-0"], True)
    assert ids(limit=2, after="file-0") == (["file-2", "file-1"], False)
    assert ids(order="asc", limit=2, after="file-1") == (["file-2", "file-0"], True)
    assert ids(purpose="other") == (["file-1"], False)
    assert ids(purpose="fine-tune", after="file-1", order="asc") == (["file-2", "file-0", "file-3"], False)
    assert ids(after="file-1") == ([], False)
    for other in ("file-b", "file-9"):
        with pytest.raises(InvalidRequest) as error:
            ids(after=other)
        assert error.value.param == "after"


def test_a_job_comes_back_as_it_was(store: Store) -> None:
    store.add_job(FULL_JOB)
    store.add_job(job("ftjob-plain"))
    assert store.get_job("a", "ftjob-full") == FULL_JOB
    assert store.get_job(None, "ftjob-plain") == job("ftjob-plain")
    with pytest.raises(NotFound):
        store.get_job("b", "ftjob-full")
    with pytest.raises(Conflict):
        store.add_job(FULL_JOB)


def test_update_job(store: Store) -> None:
    store.add_job(job("ftjob-1"))
    changed = store.update_job("ftjob-1", status="running", result_files=("file-9",), error={"message": "m"}, step=4)
    assert changed == job("ftjob-1", status="running", result_files=("file-9",), error={"message": "m"}, step=4)
    assert store.get_job("a", "ftjob-1") == changed
    assert store.update_job("ftjob-1", error=None).error is None and store.get_job("a", "ftjob-1").error is None
    assert store.update_job("ftjob-1") == store.get_job("a", "ftjob-1")
    with pytest.raises(NotFound):
        store.update_job("ftjob-2", step=1)
    with pytest.raises(TypeError):
        store.update_job("ftjob-1", colour="red")


def test_pages_of_jobs(store: Store) -> None:
    for number in range(5):
        metadata = {"team.x": "red" if number % 2 else "blue", 'q"': "1"}
        store.add_job(job(f"ftjob-{number}", created_at=100, metadata=metadata))
    store.add_job(job("ftjob-b", tenant="b"))

    def ids(**query: Any) -> tuple[list[str], bool]:
        records, has_more = store.list_jobs("a", **query)
        return [record.id for record in records], has_more

    assert ids(limit=2) == (["ftjob-4", "ftjob-3"], True)
    assert ids(limit=3, after="ftjob-3") == (["ftjob-2", "ftjob-1", "ftjob-0"], False)
    assert ids(metadata={"team.x": "red"}) == (["ftjob-3", "ftjob-1"], False)
    assert ids(metadata={"team.x": "blue", 'q"': "1"}, limit=1) == (["ftjob-4"], True)
    assert ids(metadata={"team.x": "blue"}, limit=2, after="ftjob-4") == (["ftjob-2", "ftjob-0"], False)
    assert ids(metadata={"team": "red"}) == ([], False)
    assert ids(metadata={}) == ids()
    with pytest.raises(InvalidRequest):
        ids(after="ftjob-b")


def test_unfinished_jobs_oldest_first(store: Store) -> None:
    for number, status in enumerate(("running", "succeeded", "queued", "failed", "cancelled", "validating_files")):
        store.add_job(job(f"ftjob-{number}", tenant="ab"[number % 2], created_at=100 - number, status=status))
    assert [record.id for record in store.unfinished_jobs()] == ["ftjob-5", "ftjob-2", "ftjob-0"]


def test_events_are_numbered_and_metrics_replaced(store: Store) -> None:
    store.add_job(job("ftjob-1"))
    store.add_job(job("ftjob-2"))

    def add(message: str, type: Any = "message", **fields: Any) -> Any:
        return store.add_event("ftjob-1", level="info", type=type, message=message, created_at=7, **fields)

    add("start")
    first = add("step 1", "metrics", step=1, data={"train_loss": 2.0})
    add("step 2", "metrics", step=2, data={"train_loss": 1.0})
    again = add("step 1", "metrics", step=1, data={"train_loss": 2.5, "x": float("nan")})
    add("note about step 1", step=1)
    add("another note about step 1", step=1)
    other = store.add_event("ftjob-2", level="warn", type="metrics", message="its own", created_at=8, step=1)
    assert (again.id, again.seq, other.seq) == (first.id, 2, 1)
    events, has_more = store.list_events("ftjob-1")
    assert [(event.seq, event.message) for event in events] == [
        (5, "another note about step 1"), (4, "note about step 1"), (3, "step 2"), (2, "step 1"), (1, "start"),
    ]
    assert not has_more and events[3].data == {"train_loss": 2.5, "x": None}
    assert [event.seq for event in store.list_events("ftjob-1", after=events[1].id, limit=2)[0]] == [3, 2]
    assert store.list_events("ftjob-1", after=events[1].id, limit=2)[1]
    assert store.list_events("ftjob-2") == ([other], False)
    with pytest.raises(InvalidRequest):
        store.list_events("ftjob-2", after=first.id)
    with pytest.raises(NotFound):
        store.add_event("ftjob-3", level="info", type="message", message="", created_at=1)


def test_events_of_many_threads(store: Store) -> None:
    store.add_job(job("ftjob-1"))

    def add(number: int) -> int:
        store.list_events("ftjob-1")
        return store.add_event(
            "ftjob-1", level="info", type="metrics" if number % 2 else "message", message=str(number), created_at=1,
            step=number // 10,
        ).seq

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(60)))
    events, _ = store.list_events("ftjob-1", limit=100)
    assert [event.seq for event in events] == list(range(36, 0, -1))  # 30 messages, 6 steps
    assert sorted(event.step for event in events if event.type == "metrics") == list(range(6))


def test_checkpoints(store: Store) -> None:
    store.add_job(job("ftjob-1"))
    made = [
        CheckpointRecord(id=f"ftckpt-{step}", job="ftjob-1", created_at=9, step=step, model=f"m:{step}", directory="d",
                         metrics={})
        for step in (10, 20, 30)
    ]
    assert [store.put_checkpoint(record) for record in made] == made
    again = dataclasses.replace(made[1], id="ftckpt-new", directory="e", metrics={"train_loss": 1.5})
    assert store.put_checkpoint(again) == dataclasses.replace(again, id="ftckpt-20")
    listed, has_more = store.list_checkpoints("ftjob-1", limit=2)
    assert [record.step for record in listed] == [30, 20] and has_more
    assert listed[1].metrics == {"train_loss": 1.5}
    assert store.list_checkpoints("ftjob-1", after="ftckpt-20") == ([made[0]], False)
    store.delete_checkpoint("ftckpt-10")
    assert len(store.list_checkpoints("ftjob-1")[0]) == 2
    with pytest.raises(NotFound):
        store.delete_checkpoint("ftckpt-10")
    with pytest.raises(NotFound):
        store.put_checkpoint(dataclasses.replace(again, job="ftjob-2"))


def test_adapters(store: Store) -> None:
    everybodys = AdapterRecord(name="x", tenant="", directory="d0", created_at=1)
    mine = AdapterRecord(name="x", tenant="a", directory="d1", created_at=2, job="ftjob-1")
    store.put_adapter(everybodys)
    assert store.find_adapter("a", "x") == everybodys
    store.put_adapter(mine)
    assert store.find_adapter("a", "x") == mine and store.find_adapter("b", "x") == everybodys
    assert store.find_adapter("a", "y") is None
    newer = dataclasses.replace(mine, directory="d2")
    store.put_adapter(newer)
    assert store.list_adapters("a") == [everybodys, newer] and store.list_adapters("b") == [everybodys]
    store.delete_adapter("a", "x")
    assert store.find_adapter("a", "x") == everybodys
    with pytest.raises(NotFound):
        store.delete_adapter("a", "x")


def test_it_is_all_there_after_a_restart(url: str) -> None:
    store = Store(url)
    store.add_job(FULL_JOB)
    store.close()
    store = Store(url)
    assert store.get_job("a", FULL_JOB.id) == FULL_JOB
    store.close()


@pytest.mark.parametrize("text", ["\ud800", "\0"])
def test_texts_that_a_database_cannot_hold(store: Store, text: str) -> None:
    calls = (
        lambda: store.get_file("a", f"file-{text}"), lambda: store.get_job("a", text),
        lambda: store.list_files("a", after=text),
    )
    for call in calls:
        with pytest.raises((InvalidRequest, NotFound)):
            call()
    assert store.list_files("a") == ([], False)


def test_numbers_that_a_database_cannot_hold(store: Store) -> None:
    with pytest.raises(InvalidRequest):
        store.add_job(job("ftjob-1", seed=2**70))
    assert store.list_jobs("a") == ([], False)


# --- schema versions ---


def _versions(url: str) -> list[int]:
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        found = [row[0] for row in connection.execute(text("SELECT version FROM schema_version"))]
    engine.dispose()
    return found


def _use_migrations(monkeypatch: pytest.MonkeyPatch, *migrations: tables.Migration) -> None:
    known = (*tables.MIGRATIONS, *migrations)
    monkeypatch.setattr(database, "prepare_schema", lambda connection: tables.prepare_schema(connection, known))


def _add_column(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE files ADD COLUMN note TEXT DEFAULT 'old'"))


def _fail(connection: Connection) -> None:
    _add_column(connection)
    raise RuntimeError("half way")


def test_an_older_index_is_brought_up_to_date(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(url)
    store.add_file(file("file-1"))
    store.close()
    assert _versions(url) == [3]
    _use_migrations(monkeypatch, _add_column)
    for _ in range(2):  # the second start has nothing to do
        store = Store(url)
        assert store.get_file("a", "file-1") == file("file-1")
        store.close()
        assert _versions(url) == [4]


def test_a_migration_that_fails_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Store(url).close()
    _use_migrations(monkeypatch, _fail)
    with pytest.raises(RuntimeError, match="half way"):
        Store(url)
    assert _versions(url) == [3]
    _use_migrations(monkeypatch, _add_column)  # fails if the column is there
    Store(url).close()
    assert _versions(url) == [4]


def test_a_newer_index_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _use_migrations(patch, _add_column)
        Store(url).close()
    with pytest.raises(ConfigError, match="schema version 4"):
        Store(url)


def test_two_starts_at_once(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for store in pool.map(lambda _: Store(url), range(4)):
            store.close()
    assert _versions(url) == [3]


def test_a_start_waits_while_another_turns_wal_on() -> None:
    """SQLite says so at once, without its busy timeout."""
    said: list[str] = []

    class Busy:
        def execute(self, text: str) -> sqlite3.Cursor:
            said.append(text)
            if len(said) < 3:
                raise sqlite3.OperationalError("database is locked")
            return sqlite3.connect(":memory:").execute("SELECT 1")

    database._execute_pragma(Busy(), "journal_mode = WAL")  # type: ignore[arg-type]  # as much of a connection as is used
    assert said == ["PRAGMA journal_mode = WAL"] * 3


# --- databases that can't be used ---


@pytest.mark.parametrize("url", ["nonsense", "mysql://host/name", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as error:
        Store(url)
    assert error.value.param == "database_url"


def test_a_password_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Store(f"postgresql://me:secret@/name?host={tmp_path}")
    assert "secret" not in str(error.value) and "***" in str(error.value)


def test_a_postgres_that_goes_away(postgres_url: str, postgres_server: Path) -> None:
    store = Store(postgres_url)
    store.add_file(file("file-1"))
    name = make_url(postgres_url).database
    with psycopg.connect(host=str(postgres_server), user="coserve", dbname="postgres", autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        assert store.get_file("a", "file-1") == file("file-1")  # by a new connection
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    with pytest.raises(CapacityError, match="can't be reached"):
        store.get_file("a", "file-1")
    with pytest.raises(ConfigError, match="can't be used"):
        Store(postgres_url)
    store.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "coserve.db").write_bytes(b"this is not a database" * 1000)
    with pytest.raises(ConfigError, match=r"damaged .*Move it .*away"):
        Store(f"sqlite:///{tmp_path}/coserve.db")


def test_a_damaged_page(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/coserve.db"
    store = Store(url)
    for number in range(200):
        store.add_file(file(f"file-{number}"))
    store.close()
    path = tmp_path / "coserve.db"
    data = bytearray(path.read_bytes())
    with sqlite3.connect(path) as connection:
        root = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'files'").fetchone()[0]
    connection.close()
    data[(root - 1) * 4096 : root * 4096] = os.urandom(4096)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="damaged"):
        Store(url)


def test_a_place_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ConfigError) as error:
        Store(f"sqlite:///{tmp_path}/data/coserve.db")
    assert error.value.param == "data_dir"


def test_a_full_disk_and_a_locked_database(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/coserve.db")
    with store.database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # no less than there are
        connection.exec_driver_sql("PRAGMA busy_timeout = 10")

    def fill() -> None:
        for number in range(1000):
            store.add_file(file(f"file-{number}"))

    with pytest.raises(CapacityError, match="disk of the data directory is full"):
        fill()
    kept, _ = store.list_files("a")
    assert kept  # reading goes on
    other = sqlite3.connect(tmp_path / "coserve.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(CapacityError, match="busy"):
        store.delete_file("a", kept[0].id)
    other.execute("ROLLBACK")
    other.close()
    store.delete_file("a", kept[0].id)
    store.close()
