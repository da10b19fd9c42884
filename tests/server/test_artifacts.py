"""The artifact store on a directory: what is visible when, what damaged, full, slow and absent stores do, the local copies."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from coserve.core import ConfigError, InvalidRequest, NotFound
from coserve.server.errors import Conflict, StorageRefused
from coserve.server.replicas import artifactcache
from coserve.server.replicas import objects as objects_module
from coserve.server.replicas.artifactcache import ArtifactCache, file_digest
from coserve.server.replicas.artifacts import ArtifactStore, file_manifest_digest, open_store
from coserve.server.replicas.objects import MARKER
from tests.server.faulty_files import faulty_objects

KEY = "jobs/ftjob-1/e1/step-00000002"


class Bench:
    """A store in `path`/store, with the cache of one machine, on a filesystem that fails when it is told to."""

    def __init__(self, path: Path, *, cache_bytes: int = 1 << 30, kept_s: float = 0.0, call_s: float = 5.0) -> None:
        self.root, self.cache_root = path / "store", path / "cache"
        objects, self.files = faulty_objects(str(self.root), call_s=call_s)
        self.store = ArtifactStore(objects, ArtifactCache(self.cache_root, cache_bytes, kept_s=kept_s))
        self.source = path / "source"

    def other(self, *, cache_bytes: int = 1 << 30, kept_s: float = 0.0, cache: str = "other") -> ArtifactStore:
        """Another process's view of the same store."""
        objects, _ = faulty_objects(str(self.root))
        return ArtifactStore(objects, ArtifactCache(self.cache_root.with_name(cache), cache_bytes, kept_s=kept_s))

    def write(self, **files: bytes) -> Path:
        for name, data in (files or {"a.bin": b"a" * 1000, "b.json": b"{}"}).items():
            target = self.source / name.replace("__", "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return self.source

    def objects_of(self, key: str) -> list[Path]:
        return [path for path in (self.root / key).rglob("*") if path.is_file()]

    @property
    def entries(self) -> list[str]:
        return sorted(entry.name for entry in (self.cache_root / "entries").iterdir())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_directories_and_files(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coserve.server.replicas.artifacts.CHUNK_BYTES", 100)  # several per file
    files = {"a.bin": b"a" * 250, "deep__er__b.bin": b"", "c": b"c" * 200}
    stored = bench.store.put_directory(KEY, bench.write(**files))
    assert (stored.key, stored.bytes) == (KEY, 450)
    found = bench.store.fetch(KEY, stored.sha256)
    assert contents(found) == contents(bench.source)
    assert not os.access(found / "a.bin", os.W_OK) or os.geteuid() == 0
    assert bench.store.fetch(KEY) == found and bench.store.exists(KEY)
    bench.source.joinpath("file").write_bytes(b"x" * 123)
    one = bench.store.put_file("files/file-1", bench.source / "file")
    path = bench.other().fetch("files/file-1")
    assert path.is_file() and path.read_bytes() == b"x" * 123 and one.bytes == 123
    assert one.sha256 == file_manifest_digest(123, file_digest(path))
    assert 450 < bench.store.size("jobs/ftjob-1") < 1500 and bench.store.size("jobs/ftjob-1") == bench.store.size("jobs")


def test_an_artifact_never_changes(bench: Bench) -> None:
    first = bench.store.put_directory(KEY, bench.write())
    again = bench.store.put_directory(KEY, bench.source)
    assert again == first and len(bench.objects_of(KEY)) == 3, "a second try leaves nothing"
    bench.write(more=b"1")
    with pytest.raises(Conflict):
        bench.store.put_directory(KEY, bench.source)
    assert len(bench.objects_of(KEY)) == 3
    assert bench.store.put_directory("elsewhere/x", bench.source).sha256 != first.sha256
    with pytest.raises(NotFound):
        bench.store.fetch("elsewhere/x", first.sha256.replace("0", "1"))


def test_a_sweep_keeps_what_it_is_told(bench: Bench) -> None:
    source = bench.write()
    names = ("start", "e1/step-1/adapter", "e1/step-1/state", "e1/step-10/adapter", "e2/model")
    keys = [f"jobs/ftjob-1/{name}" for name in names]
    for key in (*keys, "jobs/ftjob-10/start"):
        bench.store.put_directory(key, source)
    bench.store.sweep("jobs/ftjob-1", {"jobs/ftjob-1/e1/step-1", "jobs/ftjob-1/e2/model", "jobs/ftjob-1/e3/gone"})
    assert [bench.store.exists(key) for key in keys] == [False, True, True, False, True]
    bench.store.sweep("jobs/ftjob-1", ())
    assert bench.store.size("jobs/ftjob-1") == 0 and bench.store.exists("jobs/ftjob-10/start")


def test_strange_keys(bench: Bench) -> None:
    calls: tuple[Callable[[str], object], ...] = (
        lambda key: bench.store.put_directory(key, bench.source), bench.store.fetch, bench.store.delete, bench.store.size,
    )
    bench.write()
    for key in ("", "/a", "a/", "a//b", "../a", "a/../b", "a/_manifest.json", "a b", "a\n", "x" * 600, ".a", "ä"):
        for call in calls:
            with pytest.raises(InvalidRequest):
                call(key)


def test_sources_that_are_no_plain_files(bench: Bench) -> None:
    (bench.write() / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidRequest, match="link"):
        bench.store.put_directory(KEY, bench.source)
    with pytest.raises(FileNotFoundError):
        bench.store.put_directory(KEY, bench.source / "none")
    with pytest.raises(FileNotFoundError):
        bench.store.put_file(KEY, bench.source / "none")
    assert not bench.store.exists(KEY) and not bench.objects_of(KEY)


def test_what_is_not_there(bench: Bench) -> None:
    assert not bench.store.exists(KEY) and bench.store.size("jobs") == 0
    bench.store.delete("jobs/ftjob-1")
    with pytest.raises(NotFound):
        bench.store.fetch(KEY)
    with pytest.raises(NotFound), bench.store.hold(KEY, "0" * 64):
        pass


def test_deletion(bench: Bench) -> None:
    bench.store.put_directory(KEY, bench.write())
    kept = bench.store.put_directory("jobs/ftjob-10/e1/step-1", bench.source)
    bench.store.fetch(KEY)
    bench.store.delete("jobs/ftjob-1")
    assert not bench.store.exists(KEY) and not bench.objects_of("jobs/ftjob-1")
    assert bench.store.exists(kept.key)
    bench.store.delete("jobs/ftjob-10")
    assert not bench.entries, "a copy that nobody holds goes too"


def test_what_is_deleted_while_it_is_stored_can_be_stored_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the next holder of a job sweeps what this one, which has lost it, still sends."""
    source, flush = bench.write(), bench.store._objects.flush

    def delete_and_flush(key: str) -> None:
        bench.store._objects.remove("jobs/ftjob-1")
        flush(key)

    with monkeypatch.context() as patched:
        patched.setattr(bench.store._objects, "flush", delete_and_flush)
        with pytest.raises(StorageRefused, match="deleted while"):
            bench.store.put_directory(KEY, source)
    bench.store.put_directory(KEY, source)
    assert bench.store.exists(KEY)


# --- stores that fail ---

REFUSALS = [
    OSError(errno.ENOSPC, "full"),
    *(pytest.param(error, marks=pytest.mark.full)
      for error in (PermissionError(errno.EACCES, "no"), ConnectionResetError("cut"), TimeoutError("slow"))),
]


@pytest.mark.parametrize("error", REFUSALS)
@pytest.mark.parametrize(("verb", "part"), [
    ("read", MARKER), ("open", "a.bin"), ("write", "a.bin"), ("close", "b.json"), ("open", "_manifest"), ("write", "_manifest"),
    ("close", "_manifest"), ("mv", "_manifest"),
])
def test_nothing_is_half_visible(bench: Bench, verb: str, part: str, error: OSError) -> None:
    def refuse(called: str, path: str) -> None:
        if called == verb and part in path:
            raise error

    bench.files.before = refuse
    with pytest.raises(StorageRefused, match="artifact store"):
        bench.store.put_directory(KEY, bench.write())
    bench.files.before = lambda _verb, _path: None
    other = bench.other()
    assert not other.exists(KEY)
    with pytest.raises(NotFound):
        other.fetch(KEY)
    stored = bench.store.put_directory(KEY, bench.source)
    assert contents(other.fetch(KEY, stored.sha256)) == contents(bench.source)
    other.delete("jobs")
    assert not bench.objects_of("jobs")


def test_a_full_store_keeps_nothing_of_a_try(bench: Bench) -> None:
    bench.files.before = _refuse_when("write", "b.json", OSError(errno.ENOSPC, "full"))
    with pytest.raises(StorageRefused, match="full"):
        bench.store.put_directory(KEY, bench.write())
    assert not bench.objects_of(KEY)


def _refuse_when(verb: str, part: str, error: Exception) -> Callable[[str, str], None]:
    def refuse(called: str, path: str) -> None:
        if called == verb and part in path:
            raise error

    return refuse


@pytest.mark.parametrize("verb", ["read", "find", "rm"])
def test_reading_and_deleting_while_the_store_refuses(bench: Bench, verb: str) -> None:
    bench.store.put_directory(KEY, bench.write())
    bench.files.before = _refuse_when(verb, "", ConnectionRefusedError("away"))
    calls = {"read": (lambda: bench.store.fetch(KEY), lambda: bench.store.exists(KEY)),
             "find": (lambda: bench.store.size("jobs"), lambda: bench.store.delete("jobs")),
             "rm": (lambda: bench.store.delete("jobs"),)}[verb]
    for call in calls:
        with pytest.raises(StorageRefused):
            call()
    bench.files.before = lambda _verb, _path: None
    assert bench.store.exists(KEY)


def test_a_bug_of_ours_is_no_refusal(bench: Bench) -> None:
    bench.files.before = _refuse_when("read", "_manifest", ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        bench.store.fetch(KEY)


def test_a_store_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects_module, "_MAX_HANGING", 3)
    whole = Bench(tmp_path)
    kept = whole.store.put_directory("kept/x", whole.write())
    bench = Bench(tmp_path, call_s=0.3)
    bench.store.fetch(kept.key, kept.sha256)
    goes_on = threading.Event()

    def hang(_verb: str, _path: str) -> None:
        goes_on.wait(20)

    bench.files.before = hang
    for _ in range(5):  # more than may hang at once
        began = time.monotonic()
        with pytest.raises(StorageRefused, match="doesn't answer"):
            bench.store.put_directory(KEY, bench.source)
    assert time.monotonic() - began < 0.3, "the last ones don't wait"
    assert contents(bench.store.fetch(kept.key, kept.sha256)) == contents(bench.source), "copies need no store"
    bench.files.before = lambda _verb, _path: None
    goes_on.set()
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        with contextlib.suppress(StorageRefused):
            bench.store.put_directory(KEY, bench.source)
            break
    assert bench.other().exists(KEY)


@pytest.mark.parametrize("verb", ["open", *(pytest.param(verb, marks=pytest.mark.full) for verb in ("write", "close", "mv"))])
def test_a_late_write_of_a_try_that_was_given_up(tmp_path: Path, verb: str) -> None:
    bench = Bench(tmp_path, call_s=1.0)
    goes_on, hung = threading.Event(), iter([True])

    def hang(called: str, path: str) -> None:
        if called == verb and "_manifest" in path and next(hung, False):
            goes_on.wait(20)

    bench.files.before = hang
    with pytest.raises(StorageRefused):
        bench.store.put_directory(KEY, bench.write())
    stored = bench.store.put_directory(KEY, bench.source)
    goes_on.set()
    time.sleep(0.05)
    assert contents(bench.other().fetch(KEY, stored.sha256)) == contents(bench.source)


def test_a_store_that_is_not_mounted(bench: Bench) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    bench.root.rename(bench.root.with_name("elsewhere"))
    bench.root.mkdir()  # the empty mount point
    calls: tuple[Callable[[], object], ...] = (
        lambda: bench.store.put_directory("x/y", bench.source), lambda: bench.store.fetch(KEY, stored.sha256),
        lambda: bench.store.exists(KEY), lambda: bench.store.delete(KEY), lambda: bench.store.size("jobs"),
    )
    for call in calls:
        with pytest.raises(StorageRefused, match="away"):
            call()
    assert not list(bench.root.iterdir())


def test_damaged_bytes_are_read_again_once(bench: Bench) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    lies = iter([True])
    bench.files.change = lambda path, data: b"?" * len(data) if path.endswith("a.bin") and next(lies, False) else data
    assert contents(bench.store.fetch(KEY, stored.sha256)) == contents(bench.source)
    reads = [path for verb, path in bench.files.calls if verb == "read" and path.endswith("a.bin")]
    assert len(reads) == 2


@pytest.mark.parametrize("damage", ["other bytes", "cut", "missing", "other manifest", "no manifest"])
def test_an_artifact_that_stays_damaged(bench: Bench, damage: str) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    (place,) = [path for path in bench.objects_of(KEY) if path.name == "a.bin"]
    manifest = bench.root / KEY / "_manifest.json"
    if damage == "other bytes":
        place.write_bytes(b"b" * 1000)
    elif damage == "cut":
        place.write_bytes(b"a" * 999)
    elif damage == "missing":
        place.unlink()
    elif damage == "other manifest":
        manifest.write_bytes(manifest.read_bytes().replace(b"b.json", b"c.json"))
    else:
        manifest.write_bytes(manifest.read_bytes()[:-5])
    with pytest.raises(NotFound, match=KEY):
        bench.store.fetch(KEY, stored.sha256)
    assert not bench.entries and not list((bench.cache_root / "unfinished").iterdir())


def test_a_manifest_that_leads_out_of_the_cache(bench: Bench) -> None:
    bench.store.put_directory(KEY, bench.write())
    manifest = bench.root / KEY / "_manifest.json"
    for name in (b"../x.json", b"/x.json", b"a.bin/x", b"./x", b""):
        whole = manifest.read_bytes()
        manifest.write_bytes(whole.replace(b'"b.json"', b'"' + name + b'"'))
        with pytest.raises(NotFound):
            bench.store.fetch(KEY)
        manifest.write_bytes(whole)


# --- what is a store ---

def test_what_is_a_store(tmp_path: Path) -> None:
    def opened(url: str, **options: bool) -> ArtifactStore:
        return open_store(url, tmp_path / "cache", cache_bytes=1 << 20, **options)

    with pytest.raises(ConfigError, match="is it mounted"):
        opened(str(tmp_path / "new"), create=False)
    opened(str(tmp_path / "new" / "store"))
    opened(f"file://{tmp_path}/new/store", create=False)
    (tmp_path / "lost").mkdir()
    (tmp_path / "lost" / "lost+found").mkdir()
    opened(str(tmp_path / "lost"))
    for url, reason in (
        (str(tmp_path / "new"), "holds other things \\(store\\)"), ("ftp://x/y", "ftp:// isn't supported"), ("/", "of its own"),
        ("", "of its own"), ("s3://", "BUCKET|s3fs"),
    ):
        with pytest.raises(ConfigError, match=reason) as caught:
            opened(url)
        assert caught.value.param == "store"
    (tmp_path / "new" / "store" / MARKER).write_text('{"format": 2}')
    with pytest.raises(ConfigError, match="has format 2, and this coserve knows 1"):
        opened(str(tmp_path / "new" / "store"))
    (tmp_path / "new" / "store" / MARKER).write_text('{"for')
    with pytest.raises(ConfigError, match="has format None"):
        opened(str(tmp_path / "new" / "store"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="can't be used"):
        opened(str(tmp_path / "file"))


def test_starts_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        opening = [pool.submit(open_store, str(tmp_path / "s"), tmp_path / "cache", cache_bytes=1) for _ in range(8)]
        for one in opening:
            one.result()


# --- copies on this machine ---

def test_one_flight_for_many(bench: Bench) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    bench.files.before = lambda verb, _path: time.sleep(0.01) if verb == "read" else None
    with ThreadPoolExecutor(16) as pool:
        found = {one.result() for one in [pool.submit(bench.store.fetch, KEY, stored.sha256) for _ in range(16)]}
    assert len(found) == 1
    assert len([path for verb, path in bench.files.calls if verb == "read" and path.endswith("a.bin")]) == 1


def test_the_least_recently_used_copies_go_first(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cache_bytes=2500)
    stored = {}
    for name in "abcd":
        bench.write(**{"x.bin": name.encode() * 1000})
        stored[name] = bench.store.put_directory(f"things/{name}", bench.source)

    def fetch(name: str) -> Path:
        path = bench.store.fetch(f"things/{name}", stored[name].sha256)
        time.sleep(0.005)
        return path

    for name in "abac":
        fetch(name)
    assert bench.entries == sorted(stored[name].sha256 for name in "ac")
    with bench.store.hold("things/a", stored["a"].sha256) as held:
        fetch("c")
        fetch("d")
        assert bench.entries == sorted(stored[name].sha256 for name in "ad"), "a is older, but held"
        neighbour = bench.other(cache="cache", cache_bytes=1000)
        neighbour.fetch("things/b")
        assert held.joinpath("x.bin").read_bytes() == b"a" * 1000, "another process respects it too"
    fetch("d")
    fetch("c")
    assert stored["a"].sha256 not in bench.entries


def test_a_copy_stays_until_its_user_has_opened_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, cache_bytes=1, kept_s=60)
    paths = []
    for name in "ab":
        bench.store.put_directory(f"things/{name}", bench.write(x=name.encode()))
        paths.append(bench.store.fetch(f"things/{name}"))
    assert [path.joinpath("x").read_bytes() for path in paths] == [b"a", b"b"]


def test_a_damaged_copy_is_fetched_again(bench: Bench) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    path = bench.store.fetch(KEY, stored.sha256) / "a.bin"
    path.chmod(0o644)
    path.write_bytes(b"\0" * 1000)  # as after a power failure
    later = bench.other(cache="cache")
    assert contents(later.fetch(KEY, stored.sha256)) == contents(bench.source)
    path.unlink()
    assert contents(bench.other(cache="cache").fetch(KEY, stored.sha256)) == contents(bench.source)


def test_a_full_disk_here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(StorageRefused, match="data directory is full"):
            bench.store.fetch(KEY, stored.sha256)
    assert not bench.entries and not list((bench.cache_root / "unfinished").iterdir())
    bench.store.fetch(KEY, stored.sha256)


def test_copies_take_half_of_a_small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 10_000
    used = 0

    def usage(_: object) -> SimpleNamespace:
        held = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("x.bin"))
        return SimpleNamespace(free=size - used - held)

    monkeypatch.setattr(artifactcache.shutil, "disk_usage", usage)
    bench = Bench(tmp_path, cache_bytes=1 << 30)
    assert bench.store.cache.max_bytes == 5000

    def fetch(number: int) -> None:
        stored = bench.store.put_directory(f"things/{number}", bench.write(**{"x.bin": bytes([number]) * 1000}))
        bench.store.fetch(f"things/{number}", stored.sha256)

    for number in range(8):
        fetch(number)
    assert len(bench.entries) == 5
    used = 4000  # somebody else's
    fetch(9)
    assert len(bench.entries) == 3
    other = bench.other(cache="cache", cache_bytes=1 << 30)
    assert other.cache.max_bytes == 3000, "copies that are there count as room"


def test_a_full_disk_makes_room_for_a_new_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may have filled it."""
    old = [bench.store.put_directory(f"things/{name}", bench.write(x=name.encode())) for name in "ab"]
    for name, stored in zip("ab", old, strict=True):
        bench.store.fetch(f"things/{name}", stored.sha256)
    new = bench.store.put_directory(KEY, bench.write())
    chmod = Path.chmod

    def full(path: Path, mode: int) -> None:
        if len(bench.entries) > 1:
            raise OSError(errno.ENOSPC, "full")
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", full)
    with bench.store.hold("things/a", old[0].sha256):
        bench.store.fetch(KEY, new.sha256)
        assert bench.entries == sorted([old[0].sha256, new.sha256]), "what is held stays"
    assert not list((bench.cache_root / "unfinished").iterdir())


_FETCH_SLOWLY = """
import sys, time
from pathlib import Path
from coserve.server.replicas.artifactcache import ArtifactCache
from coserve.server.replicas.artifacts import ArtifactStore
from tests.server.faulty_files import faulty_objects

objects, files = faulty_objects(sys.argv[1], call_s=60)
store = ArtifactStore(objects, ArtifactCache(Path(sys.argv[2]), 1 << 30))
def slow(verb, path):
    if verb == "read" and path.endswith("b.json"):
        print("half", flush=True)
        time.sleep(60)
files.before = slow
store.fetch(sys.argv[3])
"""


@pytest.mark.full
def test_a_process_that_dies_while_it_fetches(bench: Bench) -> None:
    stored = bench.store.put_directory(KEY, bench.write())
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    with subprocess.Popen(
        [sys.executable, "-c", _FETCH_SLOWLY, str(bench.root), str(bench.cache_root), KEY], stdout=subprocess.PIPE,
        env=environment,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        neighbour = ThreadPoolExecutor(1).submit(bench.store.fetch, KEY, stored.sha256)
        time.sleep(0.3)
        assert not neighbour.done(), "it waits for the one that fetches already"
        assert len(list((bench.cache_root / "unfinished").iterdir())) == 1
        process.send_signal(signal.SIGKILL)
        assert contents(neighbour.result(10)) == contents(bench.source)
    assert not list((bench.cache_root / "unfinished").iterdir())


_SHARE_AND_KILL = """
import os, random, signal, sys, time, traceback
from pathlib import Path
from coserve.server.replicas.artifactcache import ArtifactCache
from coserve.server.replicas.artifacts import ArtifactStore
from tests.server.faulty_files import faulty_objects

def use_for_ever():
    objects, files = faulty_objects(sys.argv[1])
    store = ArtifactStore(objects, ArtifactCache(Path(sys.argv[2]), 250_000, kept_s=0.0))
    while True:
        number = random.randrange(10)
        with store.hold(f"things/{number}") as place:
            for name in ("a", "b"):
                assert (place / name).read_bytes() == bytes([number]) * 40_000, "half of it"

running = []

def kill(pid):
    running.remove(pid)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL

fine = True
for _ in range(12):
    while len(running) < 4:
        pid = os.fork()
        if not pid:
            try:
                random.seed(os.getpid())
                use_for_ever()
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        running.append(pid)
    time.sleep(0.3)
    fine = kill(random.choice(running)) and fine
for pid in list(running):
    fine = kill(pid) and fine
sys.exit(not fine)
"""


@pytest.mark.full
def test_processes_that_share_a_cache_and_are_killed(bench: Bench) -> None:
    """Ten artifacts, of which three fit, so that all of them come and go all the time."""
    for number in range(10):
        bench.store.put_directory(f"things/{number}", bench.write(a=bytes([number]) * 40_000, b=bytes([number]) * 40_000))
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    done = subprocess.run(
        [sys.executable, "-c", _SHARE_AND_KILL, str(bench.root), str(bench.cache_root)], capture_output=True, text=True,
        env=environment, timeout=120, check=False,
    )
    assert done.returncode == 0, done.stderr
    last = ArtifactStore(faulty_objects(str(bench.root))[0], ArtifactCache(bench.cache_root, 250_000, kept_s=0.0))
    for number in range(10):
        assert contents(last.fetch(f"things/{number}"))["a"] == bytes([number]) * 40_000
    assert len(bench.entries) == 3 and not list((bench.cache_root / "unfinished").iterdir())
