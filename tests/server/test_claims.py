"""Claims, leases and fenced writes on a real PostgreSQL, by many replicas at once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from coserve.core import ConfigError
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.index.database import Database, PostgresLimits
from coserve.server.index.rows import NewEvent
from coserve.server.index.store import Store
from coserve.server.records import AdapterRecord, CheckpointRecord, FileRecord, JobRecord
from coserve.server.replicas import deskrows as deskrows_module
from coserve.server.replicas.claims import JobClaims
from coserve.server.replicas.deskrows import DeskStore
from coserve.server.replicas.fenced import Fenced, FencedStore
from coserve.server.replicas.members import Member, Members

pytest_plugins = ["tests.server.postgres"]
LEASE_S = 30.0


@pytest.fixture
def desk(postgres_url: str) -> Iterator[DeskStore]:
    desk = DeskStore(postgres_url)
    yield desk
    desk.close()


@pytest.fixture
def claims(desk: DeskStore) -> Iterator[JobClaims]:
    claims = JobClaims(desk.database, "a", LEASE_S)
    yield claims
    claims.close()


def job(id: str, tenant: str = "me", **fields: object) -> JobRecord:
    values = {"created_at": 100, "base": "tiny", "training_file": "file-1", "config": {}, "method": {}, "status": "queued"}
    return JobRecord(id=id, tenant=tenant, **values | fields)  # type: ignore[arg-type]


def add(desk: DeskStore, *records: JobRecord) -> None:
    for record in records:
        desk.create_job(record, None, ())


def end_lease(desk: DeskStore, id: str) -> None:
    with desk.database.write() as connection:
        connection.execute(text("UPDATE jobs SET lease_until = 0 WHERE id = :id"), {"id": id})


def test_sqlite_is_refused(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/index.db")
    with pytest.raises(ConfigError, match="replicas need PostgreSQL") as error:
        JobClaims(database, "a", LEASE_S)
    assert error.value.param == "database_url"
    database.close()


def test_the_order_of_claims(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("old", priority=5), job("soon", priority=5, deadline=2_000_000_000, created_at=101),
        job("sooner", priority=5, deadline=1_900_000_000, created_at=102), job("first", priority=-1, created_at=103),
        job("theirs", "them", priority=9), job("again", "me", status="running", priority=9), job("waits", paused=True),
        job("new", "you", status="validating_files", priority=-9))
    order = []
    while (claimed := claims.claim(0.0)) is not None:
        order.append(claimed.record.id)
        assert (claimed.epoch, claimed.before, claimed.strikes) == (1, None, 0)
        if claimed.record.status == "queued":
            desk.update_job(claimed.record.id, status="running")
    assert order == ["again", "theirs", "first", "sooner", "soon", "old", "new"]


def test_what_a_replica_has_room_for(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("run"), job("read", status="validating_files"), job("sleeps", status="validating_files", paused=True))
    assert claims.claim(0.0, may_run=False, may_validate=False) is None
    assert claims.claim(60.0) is None, "it is left to replicas with more headroom for a while"
    assert claims.claim(0.0, may_run=False, but=["sleeps"]).record.id == "read"  # type: ignore[union-attr]
    assert claims.claim(0.0, may_validate=False).record.id == "run"  # type: ignore[union-attr]
    assert claims.claim(0.0).record.id == "sleeps"  # type: ignore[union-attr]
    assert claims.claim(0.0) is None


def test_many_claim_at_once_and_each_job_is_had_once(desk: DeskStore) -> None:
    add(desk, *(job(f"job-{number}", f"tenant-{number % 3}") for number in range(40)))
    replicas = [JobClaims(desk.database, f"replica-{number}", LEASE_S) for number in range(8)]

    def claim_all(claims: JobClaims) -> list[str]:
        got = []
        while (claimed := claims.claim(0.0)) is not None:
            got.append(claimed.record.id)
        return got

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(claim_all, replicas))
    assert sorted(id for ids in found for id in ids) == sorted(f"job-{number}" for number in range(40))
    assert sum(bool(ids) for ids in found) > 1
    for claims in replicas:
        claims.close()


def test_renewals_and_returns(desk: DeskStore, claims: JobClaims) -> None:
    other = JobClaims(desk.database, "b", LEASE_S)
    add(desk, job("one"), job("two"))
    assert {claims.claim(0.0).record.id for _ in range(2)} == {"one", "two"}  # type: ignore[union-attr]
    assert claims.renew({"one": 1, "two": 1, "three": 1}) == {"one": (1, False), "two": (1, False)}
    assert claims.renew({"one": 2}) == {} and other.renew({"one": 1}) == {}
    desk.set_paused("me", "two", True)
    assert claims.renew({"two": 1}) == {"two": (1, True)}
    end_lease(desk, "one")
    assert claims.renew({"one": 1}), "nobody has claimed it"
    assert other.claim(0.0) is None
    end_lease(desk, "one")
    taken = other.claim(0.0)
    assert taken is not None and (taken.record.id, taken.epoch, taken.before) == ("one", 2, "a")
    assert claims.renew({"one": 1, "two": 1}).keys() == {"two"}
    claims.give_back("one", 1)
    assert other.renew({"one": 2}), "what isn't had can't be given back"
    other.give_back("one", 2)
    back = claims.claim(0.0)
    assert back is not None and (back.epoch, back.before) == (3, None)
    assert other.renew({"one": 2}) == {}
    claims.abandon()
    assert other.claim(0.0).record.id == "one"  # type: ignore[union-attr]
    other.close()


def test_deaths_that_nobody_explains_count(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one", status="running", step=3))
    strikes = []
    for step in (3, 3, 3, 5, 5):
        claimed = claims.claim(0.0)
        assert claimed is not None
        strikes.append((claimed.strikes, claimed.struck_at))
        desk.update_job("one", step=step)
        end_lease(desk, "one")
    assert strikes == [(0, -1), (1, 3), (2, 3), (3, 3), (1, 5)]
    claims.claim(0.0)
    claims.give_back("one", 6)
    assert claims.claim(0.0).strikes == 2, "what is given back is no death"  # type: ignore[union-attr]


def test_replicas_claim_jobs_of_their_own_base(desk: DeskStore, claims: JobClaims) -> None:
    for id, base in (("ours", "f"), ("theirs", "g"), ("old", "")):
        desk.create_job(job(id), None, (), base)
    found = [claims.claim(0.0, fingerprint="f") for _ in range(3)]
    assert [None if one is None else one.record.id for one in found] == ["ours", "old", None]


def _seen(desk: DeskStore, id: str, fingerprint: str) -> None:
    info = {"fingerprint": fingerprint}
    Members(desk.database).join(Member(id=id, kind="engine", address="", public_key="", node="", info=info))


def test_a_job_that_no_live_replica_can_take_is_claimed_to_be_failed(desk: DeskStore, claims: JobClaims) -> None:
    desk.create_job(job("one", status="running"), None, (), "f")
    store, epochs = FencedStore(desk.database, lambda id: epochs.get(id)), {"one": 1}
    assert claims.claim(0.0, fingerprint="f") is not None
    store.put_declined("one", "other kernels")
    claims.give_back("one", 1)
    _seen(desk, "a", "f")
    _seen(desk, "b", "f")
    assert not claims.find_hopeless("f") and claims.claim_hopeless("f", ["one"]) is None, "another one is there, perhaps busy"
    Members(desk.database).leave("b")
    _seen(desk, "c", "g")
    assert claims.find_hopeless("f") == {"one": False} and claims.claim_hopeless("f", ["two"]) is None
    hopeless = claims.claim_hopeless("f", ["one"])
    assert hopeless is not None and hopeless.hopeless == "no replica can go on with the job: other kernels"
    assert hopeless.epoch == 2 and not claims.find_hopeless("f") and claims.claim_hopeless("f", ["one"]) is None


def test_a_job_whose_base_nobody_has_is_claimed_to_be_failed(desk: DeskStore, claims: JobClaims) -> None:
    desk.create_job(job("one"), None, (), "g")
    _seen(desk, "b", "g")
    assert not claims.find_hopeless("f") and claims.claim_hopeless("f", ["one"]) is None
    Members(desk.database).leave("b")
    assert claims.find_hopeless("f") == {"one": True}
    hopeless = claims.claim_hopeless("f", ["one"])
    assert hopeless is not None and "another base model" in str(hopeless.hopeless)


def test_deaths_while_data_are_read_count_too(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one", status="validating_files"))
    strikes = []
    for _ in range(3):
        claimed = claims.claim(0.0)
        assert claimed is not None
        strikes.append(claimed.strikes)
        end_lease(desk, "one")
    assert strikes == [0, 1, 2]


@pytest.mark.parametrize("taken", [True, False])
def test_a_creation_whose_answer_is_lost_makes_one_job(desk: DeskStore, monkeypatch: pytest.MonkeyPatch, taken: bool) -> None:
    write, tries = desk.database.write, list[int]()

    @contextmanager
    def lossy() -> Iterator[Connection]:
        tries.append(1)
        if len(tries) == 1 and not taken:
            raise StorageRefused("away")
        with write() as connection:
            yield connection
        if len(tries) == 1:
            raise StorageRefused("away")

    monkeypatch.setattr(deskrows_module, "RETRY_S", 0.01)
    monkeypatch.setattr(desk.database, "write", lossy)
    desk.create_job(job("one"), None, [NewEvent(message="made")])
    assert len(tries) == 2 and [one.id for one in desk.list_jobs("me")[0]] == ["one"]
    assert [event.message for event in desk.list_events("one")[0]] == ["made"]
    with pytest.raises(Conflict):
        desk.create_job(job("one"), None, ())
    monkeypatch.setattr(deskrows_module, "CREATE_S", -1.0)
    tries.clear()
    with pytest.raises(StorageRefused):
        desk.create_job(job("two"), None, ())


# --- fenced writes ---


EVENT = NewEvent(message="step", data={"step": 1}, step=1)


def checkpoint(step: int, epoch: int = 1, digest: str = "d") -> tuple[CheckpointRecord, AdapterRecord]:
    key, model = f"jobs/one/e{epoch}/step-{step}/adapter", f"m:ckpt-step-{step}"
    return (
        CheckpointRecord(id=f"c{step}-{epoch}", job="one", created_at=1, step=step, model=model, directory=key, metrics={},
                         sha256=digest, state_sha256="s", bytes=7),
        AdapterRecord(name=model, tenant="me", directory=key, created_at=1, job="one", sha256=digest, bytes=3),
    )


def test_every_write_says_its_epoch(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one"))
    claims.claim(0.0)
    epochs, fenced = {"one": 1}, list[str]()
    store = FencedStore(desk.database, epochs.get, fenced.append)
    writes = {
        "update": lambda: store.update_job("one", status="running"),
        "event": lambda: store.add_event("one", level="info", type="message", message="m", created_at=1),
        "step": lambda: store.put_step("one", 1, 9, EVENT, {"trained_tokens": 5}),
        "strikes": lambda: store.put_strikes("one", 2, 1),
        "checkpoint": lambda: store.commit_checkpoint(*checkpoint(1), 3, "made"),
        "end": lambda: store.end_job("one", {"status": "succeeded"}, [NewEvent(message="done")], checkpoint(1)[1], FileRecord(
            id="file-9", tenant="me", filename="r", purpose="fine-tune-results", bytes=1, sha256="x", created_at=1)),
    }
    for name in list(writes)[:-1]:
        writes[name]()
    assert not fenced and desk.get_job("me", "one").status == "running"
    assert desk.progress_of(["one"]) == {"one": {"trained_tokens": 5}} and desk.count_artifact_bytes("me") == 10
    end_lease(desk, "one")
    claims.claim(0.0)

    def everything() -> object:
        return (desk.get_job("me", "one"), desk.list_events("one"), desk.list_checkpoints("one"), desk.list_adapters("me"),
                desk.list_files("me"))

    before = everything()
    for name, write in writes.items():
        with pytest.raises(Fenced):
            write()
        assert fenced.pop() == "one" and before == everything(), name
    epochs.clear()
    with pytest.raises(Fenced):
        writes["update"]()
    assert not fenced, "that is known already"
    epochs["one"] = 2
    for _ in range(2):  # once more, where nobody knows whether it was written
        writes["end"]()
    assert [event.message for event in desk.list_events("one")[0]].count("done") == 1
    assert desk.list_files("me")[0][0].id == "file-9" and desk.get_job("me", "one").status == "succeeded"
    assert claims.renew({"one": 2}) == {}, "who has ended a job holds it no more"
    assert claims.claim(0.0) is None


def test_checkpoints_are_kept_over_all_epochs(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one"))
    claims.claim(0.0)
    epochs = {"one": 1}
    store = FencedStore(desk.database, epochs.get)
    for step in (2, 4, 9):
        assert store.commit_checkpoint(*checkpoint(step), 2, f"step {step}") == [] or step == 9
    end_lease(desk, "one")
    claims.claim(0.0)
    epochs["one"] = 2
    gone = store.commit_checkpoint(*checkpoint(6, 2), 2, "step 6")  # step 9 was damaged, and the job went on from 4
    assert [(one.step, one.epoch) for one in gone] == [(9, 1)]
    found = desk.list_checkpoints("one")[0]
    assert [(one.step, one.epoch) for one in found] == [(6, 2), (4, 1)]
    assert {adapter.name for adapter in desk.list_adapters("me")} == {"m:ckpt-step-6", "m:ckpt-step-4"}
    assert store.commit_checkpoint(*checkpoint(6, 2), 2, "step 6") == [], "done again, nothing changes"
    assert [event.message for event in desk.list_events("one")[0]][::-1] == ["step 2", "step 4", "step 9", "step 6"]
    assert [one.step for one in store.commit_checkpoint(*checkpoint(5, 2), 2, "step 5")] == [4], "6 is of this run, and stays"
    assert [(one.step, one.epoch) for one in desk.list_checkpoints("one")[0]] == [(6, 2), (5, 2)]
    found = desk.list_checkpoints("one")[0]
    assert desk.list_checkpoints("one", after="c9-1")[0] == found, "a page begins after a checkpoint that is gone"


def test_a_step_of_an_earlier_epoch_replaces_nothing(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one"))
    claims.claim(0.0)
    epochs = {"one": 1}
    store = FencedStore(desk.database, epochs.get)
    store.put_step("one", 1, 9, EVENT, {})
    (first,), _ = desk.list_events("one")
    end_lease(desk, "one")
    claims.claim(0.0)
    epochs["one"] = 2
    store.put_step("one", 1, 9, EVENT._replace(message="again"), {})
    (second,), _ = desk.list_events("one")
    assert second == dataclasses.replace(first, message="again", created_at=second.created_at)
    late = Store(desk.database).add_event(  # a writer without an epoch, as an older coserve would be
        "one", level="info", type="metrics", message="late", step=1, created_at=5)
    assert late == second and desk.list_events("one")[0] == [second]


def test_cancel_fences_the_holder(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one"))
    claims.claim(0.0)
    store = FencedStore(desk.database, {"one": 1}.get)
    store.put_step("one", 1, 9, EVENT, {"trained_tokens": 40})
    ended = desk.cancel_job("me", "one")
    assert (ended.status, ended.trained_tokens, ended.step) == ("cancelled", 40, 1) and ended == desk.get_job("me", "one")
    with pytest.raises(Fenced):
        store.end_job("one", {"status": "succeeded"}, ())
    for change in (lambda: desk.cancel_job("me", "one"), lambda: desk.set_paused("me", "one", True)):
        with pytest.raises(Conflict):
            change()
    assert claims.claim(0.0) is None and claims.renew({"one": 1}) == {}


# --- connections ---


def test_a_transaction_that_is_left_open_locks_nobody_out(desk: DeskStore, claims: JobClaims) -> None:
    """A process that is stopped (SIGSTOP) within a transaction holds the row's lock: PostgreSQL ends the transaction."""
    add(desk, job("one"))
    limits = PostgresLimits(idle_s=1.0, lock_s=0.2)
    stopped, waiting = (Database(desk.database.url, limits) for _ in range(2))
    with pytest.raises(StorageRefused), stopped.write() as connection:  # noqa: PT012
        connection.execute(text("SELECT 1 FROM jobs WHERE id = 'one' FOR UPDATE"))
        with pytest.raises(StorageRefused, match="busy"), waiting.write() as other:
            other.execute(text("SELECT 1 FROM jobs WHERE id = 'one' FOR UPDATE"))
        waiting.close()
        time.sleep(1.2)
        assert desk.cancel_job("me", "one").status == "cancelled"
        connection.execute(text("UPDATE jobs SET status = 'running' WHERE id = 'one'"))
    stopped.close()
    assert desk.get_job("me", "one").status == "cancelled"


def test_no_write_keeps_a_renewal_waiting(desk: DeskStore, claims: JobClaims) -> None:
    add(desk, job("one"))
    claims.claim(0.0)
    busy = Database(desk.database.url, PostgresLimits(connections=1, wait_s=0.2))
    with busy.write() as connection:
        connection.execute(text("SELECT 1"))
        with pytest.raises(StorageRefused, match="busy"), busy.read():
            pass
        assert claims.renew({"one": 1})
    busy.close()
