"""API keys: who gets in, as whom, and when no longer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coserve.core import ConfigError
from coserve.server import tenants
from coserve.server.errors import StorageRefused, Unauthorized
from coserve.server.index.store import Store
from coserve.server.tenants import Tenants, digest_key, digest_keys, make_key, read_keys


class FakeClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/coserve.db")
    yield store
    store.close()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_digests_of_keys_are_enough(store: Store) -> None:
    tenants = Tenants(store, ["plain"], digests=digest_keys([("alice", "hers")]))
    assert (tenants.identify("Bearer hers"), tenants.identify("Bearer plain")) == ("alice", "default")
    assert refused(tenants, "Bearer " + digest_key("hers")) and not tenants.is_open()
    assert not Tenants(store, (), digests=digest_keys(["k"])).is_open()


def refused(tenants: Tenants, authorization: str | None) -> bool:
    try:
        tenants.identify(authorization)
    except Unauthorized:
        return True
    return False


def test_without_keys_everybody_is_the_default_tenant(store: Store) -> None:
    tenants = Tenants(store, ())
    for authorization in (None, "", "Bearer anything", "Basic eDp5", "Bearer"):
        assert tenants.identify(authorization) == "default"


def test_configured_keys(store: Store) -> None:
    tenants = Tenants(store, ["plain", ("alice", "hers"), ("bob", "his")])
    assert tenants.identify("Bearer plain") == "default"
    assert tenants.identify("bearer  hers ") == "alice"
    assert tenants.identify("BEARER his") == "bob"
    for authorization in (
        None, "", "Bearer", "Bearer ", "plain", "Basic plain", "Bearer plai", "Bearer plain2", "Bearer PLAIN",
        "Bearer plain plain", "Bearer \xff\ud800",
    ):
        assert refused(tenants, authorization), authorization


def test_keys_of_the_store(store: Store, clock: FakeClock) -> None:
    tenants = Tenants(store, (), clock=clock)
    assert tenants.identify(None) == "default"
    key, record = make_key("alice")
    store.add_key(record)
    clock.now += 1.01  # the first key closes the server within a second
    assert refused(tenants, None) and refused(tenants, "Bearer other")
    assert tenants.identify(f"Bearer {key}") == "alice"
    other, record = make_key("bob")
    store.add_key(record)
    assert tenants.identify(f"Bearer {other}") == "bob"


def test_a_revoked_key_is_refused_and_the_last_one_opens_nothing(store: Store, clock: FakeClock) -> None:
    key, record = make_key("alice")
    store.add_key(record)
    tenants = Tenants(store, (), clock=clock)
    assert tenants.identify(f"Bearer {key}") == "alice"
    store.revoke_key(record.id, 5)
    clock.now += 1.01
    for _ in range(2):
        assert refused(tenants, f"Bearer {key}")
        assert refused(tenants, None)
    assert refused(Tenants(store, ()), None)


def test_a_key_that_was_not_used_lately_is_refused_at_once(store: Store) -> None:
    key, record = make_key("alice")
    store.add_key(record)
    tenants = Tenants(store, ())
    assert refused(tenants, "Bearer x")
    store.revoke_key(record.id, 5)
    assert refused(tenants, f"Bearer {key}")


def test_only_the_digest_of_a_key_is_kept(store: Store) -> None:
    key, record = make_key("alice")
    store.add_key(record)
    assert key.startswith("sk-") and len(key) > 40
    assert record.digest == digest_key(key) and key.startswith(record.prefix) and len(record.prefix) < 10
    assert key not in repr(store.list_keys())
    assert make_key("alice")[0] != key


def test_keys_of_the_environment() -> None:
    assert read_keys("") == ()
    assert read_keys("alice=sk-1, bob=sk=2,") == (("alice", "sk-1"), ("bob", "sk=2"))
    for text in ("alice", "alice=", "=sk-1", "a=b,c"):
        with pytest.raises(ConfigError):
            read_keys(text)


def test_keys_that_cannot_be(store: Store) -> None:
    for keys in (
        [""], ["two words"], ["schlüssel"], [("", "key")], [("a/b", "key")], [("..", "key")], [("a", "k"), ("b", "k")],
    ):
        with pytest.raises(ConfigError):
            Tenants(store, keys)
    assert Tenants(store, [("a", "k"), ("a", "k")]).identify("Bearer k") == "a"
    with pytest.raises(ConfigError):
        make_key("a b")


def test_while_the_index_is_away_what_was_last_read_counts(
    store: Store, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, record = make_key("alice")
    opened, closed = Tenants(store, (), clock=clock), Tenants(store, ["a-key"], clock=clock)
    assert opened.is_open()
    store.add_key(record)
    assert closed.identify(f"Bearer {key}") == "alice"

    def refuse(*_: object) -> None:
        raise StorageRefused("the index's database can't be reached; try again")

    monkeypatch.setattr(store, "list_keys", refuse)
    monkeypatch.setattr(store, "find_key", refuse)
    clock.now += 30
    assert opened.is_open()
    assert closed.identify(f"Bearer {key}") == "alice"
    with pytest.raises(StorageRefused):
        closed.identify("Bearer another")
    clock.now += 300
    with pytest.raises(StorageRefused):
        opened.is_open()
    with pytest.raises(StorageRefused):
        closed.identify(f"Bearer {key}")


def test_an_index_that_does_not_answer_holds_up_a_known_key_for_a_moment_only(
    store: Store, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, record = make_key("alice")
    opened, closed = Tenants(store, (), clock=clock), Tenants(store, ["a-key"], clock=clock)
    assert opened.is_open()
    store.add_key(record)
    assert closed.identify(f"Bearer {key}") == "alice"
    answers = threading.Event()
    monkeypatch.setattr(tenants, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(store, "list_keys", lambda: answers.wait(10) and [])
    monkeypatch.setattr(store, "find_key", lambda digest: answers.wait(10) and record)
    clock.now += 30
    began = time.monotonic()
    for _ in range(3):
        assert opened.is_open()
        assert closed.identify(f"Bearer {key}") == "alice"
    assert time.monotonic() - began < 2
    answers.set()
    assert closed.identify(f"Bearer {key}") == "alice"
