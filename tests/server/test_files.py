"""/v1/files over a real socket, with the openai client and with malformed requests."""

from __future__ import annotations

import gzip
import hashlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import httpx
import openai
import pytest
from fastapi import FastAPI

from coserve.server.handlers import install_handlers
from coserve.server.index.files import FileService
from coserve.server.index.store import Store
from coserve.server.records import JobRecord
from coserve.server.routes import files as routes
from coserve.server.services import Services
from coserve.server.settings import ServerConfig
from coserve.server.tenants import Tenants
from tests.server.fakes import serve

MAX_BYTES, MAX_TENANT_BYTES = 100_000, 1_000_000
LINE = '{"messages": [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi"}]}'
CONTENT = f"{LINE}\n{LINE}\n".encode()


class Running(NamedTuple):
    url: str
    store: Store
    files: FileService
    directory: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The files' routes alone, with three tenants, on a port of this machine."""
    root = tmp_path_factory.mktemp("server")
    store = Store(f"sqlite:///{root}/coserve.db")
    files = FileService(root / "files", store, MAX_BYTES, MAX_TENANT_BYTES)
    none = cast(Any, None)
    services = Services(
        config=ServerConfig(max_file_bytes=MAX_BYTES), engine=none, tokenizer=none, store=store,
        tenants=Tenants(store, [("alice", "key-a"), ("bob", "key-b"), ("carol", "key-c")]), files=files, jobs=none, models=none,
        metrics=none, draw_seed=none,
    )
    app = FastAPI()
    app.state.services = services
    app.include_router(routes.router)
    install_handlers(app)
    with serve(app) as port:
        yield Running(f"http://127.0.0.1:{port}", store, files, root / "files")
    store.close()


@pytest.fixture
def alice(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-a", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def bob(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-b", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": "Bearer key-a"}, timeout=20) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever happens, there are whole files on disk and nothing else."""
    yield
    if "server" in request.fixturenames:
        server: Running = request.getfixturevalue("server")
        assert {path.name for path in server.directory.iterdir()} == {record.id for record in server.store.all_files()}


def upload(client: openai.OpenAI, content: bytes = CONTENT, name: str = "train.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="fine-tune")


# --- the openai client ---


def test_the_life_of_a_file(server: Running, alice: openai.OpenAI) -> None:
    before = time.time()
    made = upload(alice)
    assert made.id.startswith("file-") and made.object == "file" and made.status == "processed"
    assert (made.bytes, made.filename, made.purpose) == (len(CONTENT), "train.jsonl", "fine-tune")
    assert before - 2 < made.created_at < time.time() + 2
    assert made.model_dump()["expires_at"] is None
    assert alice.files.retrieve(made.id) == made
    assert alice.files.wait_for_processing(made.id) == made
    assert alice.files.content(made.id).read() == CONTENT
    record = server.store.get_file("alice", made.id)
    assert record.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert server.files.path(record).read_bytes() == CONTENT
    deleted = alice.files.delete(made.id)
    assert (deleted.id, deleted.object, deleted.deleted) == (made.id, "file", True)
    for call in (alice.files.retrieve, alice.files.content, alice.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_lists_in_pages(alice: openai.OpenAI, bob: openai.OpenAI) -> None:
    ids = [upload(alice, name=f"{number}.jsonl").id for number in range(5)]
    upload(bob)
    page = alice.files.list(limit=2)
    assert [file.id for file in page.data] == [ids[4], ids[3]] and page.has_more
    assert [file.id for file in page] == ids[::-1]  # the client follows `after`
    assert [file.id for file in alice.files.list(order="asc", limit=3)] == ids
    assert [file.id for file in alice.files.list(after=ids[1])] == [ids[0]]
    assert len(alice.files.list(purpose="fine-tune").data) == 5
    assert alice.files.list(purpose="batch").data == []
    for id in ids:
        alice.files.delete(id)
    assert alice.files.list().data == []


def test_the_shape_of_a_list(http: httpx.Client) -> None:
    empty = http.get("/v1/files").json()
    assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("query", ["limit=0", "limit=-1", "limit=10001", "limit=x", "order=up", "after=file-9", "limit=1e9"])
def test_bad_queries(http: httpx.Client, query: str) -> None:
    assert http.get(f"/v1/files?{query}").status_code == 400


def test_tenants_do_not_see_each_other(alice: openai.OpenAI, bob: openai.OpenAI) -> None:
    made = upload(alice)
    assert made.id not in [file.id for file in bob.files.list()]
    for call in (bob.files.retrieve, bob.files.content, bob.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)
    with pytest.raises(openai.BadRequestError):
        bob.files.list(after=made.id)
    assert alice.files.content(made.id).read() == CONTENT


def test_nobody_without_a_key(server: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer nope"}):
        for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/x"), ("GET", "/x/content")):
            answer = httpx.request(method, f"{server.url}/v1/files{path}", headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"


def test_a_file_in_use_stays(server: Running, alice: openai.OpenAI) -> None:
    train, validation = upload(alice), upload(alice)
    server.store.add_job(JobRecord(
        id="ftjob-1", tenant="alice", created_at=1, base="tiny", training_file=train.id, validation_file=validation.id,
        config={}, method={}, status="running",
    ))
    for made in (train, validation):
        with pytest.raises(openai.ConflictError, match="ftjob-1"):
            alice.files.delete(made.id)
        assert alice.files.content(made.id).read() == CONTENT
    server.store.update_job("ftjob-1", status="succeeded")
    for made in (train, validation):
        assert alice.files.delete(made.id).deleted


@pytest.mark.parametrize(("sent", "kept"), [
    ("../../etc/passwd", "passwd"), ("/etc/passwd", "passwd"), ("..\\..\\evil.jsonl", "evil.jsonl"),
    ("ü \"quoted\";x.jsonl", None),
    ("日本\u3000語.jsonl", None), ("file-000.tmp", "file-000.tmp"), ("a" * 255, "a" * 255), ("%2e%2e%2fx", None),
    (".hidden", ".hidden"),
])
def test_file_names_are_only_data(server: Running, alice: openai.OpenAI, sent: str, kept: str | None) -> None:
    made = upload(alice, name=sent)
    assert kept is None or made.filename == kept
    assert "/" not in made.filename and "\\" not in made.filename
    answer = alice.files.content(made.id).response
    assert answer.read() == CONTENT
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith("attachment; ") and disposition.isascii() and disposition.count('"') in (0, 2)
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("id", [
    "..", "..%2ffiles", "%2e%2e", "..%2f..%2fcoserve.db", "file-%00", "file-%ff", "x" * 3000, "%F0%9F%98%80",
])
def test_ids_that_are_paths(http: httpx.Client, id: str) -> None:
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content"):
        assert http.get(path).status_code in (400, 404)
    assert http.delete(f"/v1/files/{id}").status_code in (400, 404, 405)


# --- uploads that are refused ---


@pytest.mark.parametrize("content", [
    b"", b"\n\n\n", b"hello\nworld\n", b"[1, 2]\n3\n", b"\x80abc\n", CONTENT + b"\xc3", CONTENT + b"\xff\xfe",
    LINE.encode("utf-16"), LINE.encode("utf-16-le"), gzip.compress(CONTENT, mtime=0), b"PK\x03\x04" + bytes(100), bytes(5000),
    b"[" * 50_000, b'{"a":' * 10_000, b"9" * 50_000,
])
def test_contents_that_are_no_json_lines(alice: openai.OpenAI, content: bytes) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        upload(alice, content)
    assert error.value.param == "file"


@pytest.mark.parametrize("content", [b"{}", b"\r\n\r\n" + LINE.encode() + b"\r\n", b"not json\n{}\n"])
def test_contents_that_the_job_will_judge(alice: openai.OpenAI, content: bytes) -> None:
    assert upload(alice, content).bytes == len(content)


@pytest.mark.parametrize("purpose", ["batch", "fine-tune-results", "", "x" * 70_000, "fine-tune\0"])
def test_purposes(alice: openai.OpenAI, purpose: Any) -> None:
    with pytest.raises(openai.BadRequestError):
        alice.files.create(file=("a.jsonl", CONTENT), purpose=purpose)
    with pytest.raises(openai.BadRequestError) as error:
        alice.files.create(file=("a.jsonl", CONTENT), purpose="assistants")
    assert error.value.param == "purpose"


def test_the_size_limit(alice: openai.OpenAI) -> None:
    padding = b" " * (MAX_BYTES - len(CONTENT))
    assert upload(alice, CONTENT + padding).bytes == MAX_BYTES
    for more in (1, 200_000, 30_000_000):
        with pytest.raises(openai.APIStatusError) as error:
            upload(alice, CONTENT + padding + b" " * more)
        assert error.value.status_code == 413 and error.value.param == "file"


def test_the_limit_of_a_tenants_files(server: Running, bob: openai.OpenAI) -> None:
    padding = b" " * (MAX_BYTES - len(CONTENT))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="key-c", max_retries=0, timeout=20) as carol:
        made = [upload(carol, CONTENT + padding) for _ in range(MAX_TENANT_BYTES // MAX_BYTES)]
        with pytest.raises(openai.APIStatusError, match="delete files that you no longer need") as error:
            upload(carol, b"{}")
        assert error.value.status_code == 413 and error.value.param == "file"
        assert upload(bob).bytes == len(CONTENT), "others have limits of their own"
        carol.files.delete(made[0].id)
        assert upload(carol, CONTENT + padding).bytes == MAX_BYTES


def test_the_size_limit_without_a_content_length(http: httpx.Client) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + CONTENT
        for _ in range(100):
            sent += 1
            yield bytes(65536)

    answer = http.post("/v1/files", content=body(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 413


def test_expiry_is_refused_unless_it_says_nothing(http: httpx.Client, alice: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        alice.files.create(
            file=("a.jsonl", CONTENT), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600},
        )
    assert error.value.param == "expires_after"
    answer = http.post("/v1/files", files={"file": ("a", CONTENT)}, data={"purpose": "fine-tune", "expires_after": ""})
    assert answer.status_code == 200


def test_fields(http: httpx.Client) -> None:
    file = ("a.jsonl", CONTENT)
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"files": {"file": file}}, "purpose"),
        ({"files": {"x": ("", b"1")}, "data": {"purpose": "fine-tune"}}, "x"),
        ({"files": [("purpose", (None, b"fine-tune")), ("file", (None, CONTENT))]}, "file"),
        ({"files": {"file": file, "purpose": ("p.txt", b"fine-tune")}}, None),
        ({"files": [("file", file), ("file", file)], "data": {"purpose": "fine-tune"}}, None),
        ({"files": {"file": file}, "data": {"purpose": ["fine-tune", "fine-tune"]}}, "purpose"),
        ({"files": {"file": file}, "data": {"purpose": "fine-tune", "colour": "red"}}, "colour"),
        ({"files": {"file": file}, "data": {"purpose": "fine-tune"} | {f"f{n}": "" for n in range(50)}}, None),
        ({"files": {"file": ("", CONTENT)}, "data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": ("a" * 256, CONTENT)}, "data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": ("..", CONTENT)}, "data": {"purpose": "fine-tune"}}, "file"),
        ({"json": {"file": "x", "purpose": "fine-tune"}}, "file"),
        ({"data": {"file": "x", "purpose": "fine-tune"}}, "file"),
        ({}, "file"),
    ]
    for arguments, param in cases:
        answer = http.post("/v1/files", **arguments)
        assert answer.status_code == 400, arguments
        assert answer.json()["error"]["param"] == param, (arguments, answer.json())


def _multipart(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + end


_PURPOSE = b'Content-Disposition: form-data; name="purpose"\r\n\r\nfine-tune'
_FILE = b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + CONTENT


@pytest.mark.parametrize("body", [
    b"", b"--b", b"--b--", b"garbage", bytes(1000), _multipart(_FILE, _PURPOSE, end=b""), _multipart(_PURPOSE),
    _multipart(b"\r\n\r\nx"), _multipart(b"Content-Disposition: form-data\r\n\r\nx"), _multipart(b"X: y\r\n\r\nx", _PURPOSE),
    _multipart(_FILE.replace(b"a.jsonl", b"a\0b.jsonl"), _PURPOSE),
    _multipart(_FILE.replace(b"a.jsonl", b"a\x01.jsonl"), _PURPOSE),
    _multipart(_FILE.replace(b'name="file"', b'name="file'), _PURPOSE), _multipart(b": \r\n\r\n", _FILE),
    _multipart(b"A" * 70_000 + b": b\r\n\r\n", _FILE), _multipart(*[_PURPOSE] * 1000), _multipart(b"no colon\r\n\r\nx", _FILE),
    gzip.compress(_multipart(_FILE, _PURPOSE), mtime=0),
])
def test_malformed_multipart(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/files", content=body, headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("kind", [
    "multipart/form-data", "multipart/form-data; boundary=", 'multipart/form-data; boundary="', "multipart/mixed; boundary=b",
    "text/plain", "", "multipart/form-data; boundary=" + "b" * 5000, "multipart/form-data; boundary=\xff",
])
def test_content_types(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/files", content=_multipart(_FILE, _PURPOSE), headers={"Content-Type": kind.encode("latin-1")})
    assert answer.status_code == 400, answer.text


def test_compressed_bodies_are_not_opened(http: httpx.Client) -> None:
    bomb = gzip.compress(_multipart(_FILE + bytes(20_000_000), _PURPOSE))
    headers = {"Content-Type": "multipart/form-data; boundary=b", "Content-Encoding": "gzip"}
    answer = http.post("/v1/files", content=bomb, headers=headers)
    assert answer.status_code == 400 and "content-encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize("charset", ["klingon", "undefined", "idna", "unicode_escape", "base64", "utf-16"])
def test_only_utf8(http: httpx.Client, charset: str) -> None:
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    body = _multipart(_FILE, _PURPOSE, b'Content-Disposition: form-data; name="\\ud800"\r\n\r\nx')
    assert http.post("/v1/files", content=body, headers=headers).status_code == 400


def test_a_client_that_leaves_during_the_upload(server: Running, alice: openai.OpenAI) -> None:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer key-a\r\nContent-Length: 50000\r\n"
            b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + _multipart(_FILE, end=b""),
        )
    assert alice.files.retrieve(upload(alice).id).bytes == len(CONTENT)
