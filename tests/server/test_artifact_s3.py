"""The artifact store on S3: moto's server, in a process of its own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coserve.core import ConfigError, NotFound
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.replicas import artifacts as artifacts_module
from coserve.server.replicas.artifacts import ArtifactStore, open_store
from coserve.server.replicas.objects import MARKER

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = pytest.mark.full

KEY = "jobs/ftjob-1/e1/step-00000002"
BUCKET = "artifacts"


class S3:
    """A server of S3, with one bucket."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def make_bucket(self) -> int:
        """The status of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("PUT", f"/{BUCKET}")
            return connection.getresponse().status
        finally:
            connection.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    try:
        for _ in range(1200):
            try:
                assert server.make_bucket() == 200
                break
            except (ConnectionRefusedError, TimeoutError):
                assert server.process.poll() is None
                time.sleep(0.05)
        else:
            raise TimeoutError("the server of S3 does not answer")
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def place(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tests")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    return tmp_path


def opened(place: Path, prefix: str, cache: str = "cache", **options: bool) -> ArtifactStore:
    return open_store(f"s3://{BUCKET}/{prefix}", place / cache, cache_bytes=1 << 30, **options)


def write(place: Path, **files: bytes) -> Path:
    for name, data in files.items():
        target = place / "source" / name.replace("__", "/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    return place / "source"


def _files() -> Any:
    """The bucket, past the store."""
    return pytest.importorskip("s3fs").S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_artifacts(place: Path) -> None:
    store = opened(place, "one")
    source = write(place, a=b"a" * 1000, deep__er__b=b"", large=os.urandom(21 << 20))  # three parts
    stored = store.put_directory(KEY, source)
    assert store.put_directory(KEY, source) == stored
    assert contents(opened(place, "one", "other", create=False).fetch(KEY, stored.sha256)) == contents(source)
    assert store.size("jobs") > stored.bytes
    assert store.size("jobs/ftjob-1") < stored.bytes + 2000, "the second try left nothing"
    one = store.put_file("files/file-1/x", source / "a")
    assert store.fetch(one.key, one.sha256).read_bytes() == b"a" * 1000
    write(place, a=b"other")
    with pytest.raises(Conflict):
        store.put_directory(KEY, source)
    store.put_directory("jobs/ftjob-10/e1", source)
    store.delete("jobs/ftjob-1")
    assert not store.exists(KEY) and store.exists("jobs/ftjob-10/e1") and store.size("jobs/ftjob-1") == 0
    store.delete("jobs/ftjob-1")
    with pytest.raises(NotFound):
        store.fetch(KEY, stored.sha256.replace(stored.sha256[0], "0"))


def test_an_upload_that_breaks_off(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(place, "two")
    source = write(place, large=b"x" * (20 << 20))

    class Cut(Exception):
        pass

    opens = Path.open

    def cut(self: Path, *args: str) -> object:
        if self.name != "large":
            return opens(self, *args)
        store_reads = iter([b"x" * (8 << 20), b"x" * (8 << 20)])

        class Reader:
            def read(self, _size: int) -> bytes:
                chunk = next(store_reads, None)
                if chunk is None:
                    raise Cut
                return chunk

            def __enter__(self) -> Reader:
                return self

            def __exit__(self, *_: object) -> None:
                pass

        return Reader()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", cut)
        with pytest.raises(Cut):
            store.put_directory(KEY, source)
    assert not store.exists(KEY) and store.size("jobs") == 0
    assert not _files().call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads"), "its parts are gone too"
    assert store.put_directory(KEY, source).bytes == 20 << 20


def test_damage(place: Path) -> None:
    store = opened(place, "three")
    stored = store.put_file(KEY, write(place, a=b"a" * 1000) / "a")
    (key,) = [key for key in store._objects.sizes("jobs") if key.endswith("/content")]
    _files().pipe_file(f"{BUCKET}/three/{key}", b"b" * 1000)
    with pytest.raises(NotFound, match="other bytes"):
        store.fetch(KEY, stored.sha256)
    _files().rm_file(f"{BUCKET}/three/{key}")
    with pytest.raises(NotFound, match="missing"):
        store.fetch(KEY, stored.sha256)
    assert artifacts_module.file_manifest_digest(1000, "0" * 64) != stored.sha256


def test_what_is_a_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="is it mounted"):
        opened(place, "four", create=False)
    opened(place, "four")
    _files().pipe_file(f"{BUCKET}/four/{MARKER}", b'{"format": 9}')
    with pytest.raises(ConfigError, match="has format 9"):
        opened(place, "four")
    _files().pipe_file(f"{BUCKET}/five/notes.txt", b"x")
    with pytest.raises(ConfigError, match=r"holds other things \(notes.txt\)"):
        opened(place, "five")
    with pytest.raises(ConfigError, match="can't be used"):
        open_store("s3://no-such-bucket/x", place / "cache", cache_bytes=1)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(place))
    with pytest.raises(ConfigError, match=r"can't be used: .*redentials"):
        opened(place, "four")


def test_a_server_that_hangs_or_is_away(place: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(place, "six")
    stored = store.put_file(KEY, write(place, a=b"a") / "a")
    store.fetch(KEY, stored.sha256)
    monkeypatch.setattr(store._objects, "_call_s", 0.3)
    s3.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(StorageRefused, match="doesn't answer"):
            store.exists(KEY)
        with pytest.raises(StorageRefused):
            store.put_file("x/y", place / "source" / "a")
        assert store.fetch(KEY, stored.sha256).read_bytes() == b"a"
    finally:
        s3.process.send_signal(signal.SIGCONT)
    monkeypatch.setattr(store._objects, "_call_s", 30.0)
    assert store.put_file("x/y", place / "source" / "a")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="can't be used: Could not connect"):
        opened(place, "six")
