"""Wrong requests and files: each is refused in OpenAI's form, and the server is afterwards as it was before.

The tables are in malformed.py and badfiles.py; more comes from the OpenAPI document, by schemathesis.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.server.badfiles import BOUNDARY, FILE_NAMES, GOOD, STREAMS, BadFile, forms, readable_files, training_files
from tests.server.conftest import FLEET, RunningServer, resident_bytes, wait_until
from tests.server.malformed import (
    ID_ROUTES,
    IDS,
    JSON_ROUTES,
    QUERIES,
    bomb,
    raw_bodies,
    wrong_fields,
)

JSON = {"content-type": "application/json"}
MAX_BODY, MAX_FILE = 16 << 20, 4 << 20
JOBS = "/v1/fine_tuning/jobs"


class Answer(NamedTuple):
    status: int
    error: dict[str, Any]


def metrics(server: RunningServer) -> dict[str, float]:
    """Values by name, those of all labels added."""
    found: Counter[str] = Counter()
    for line in httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name.partition("{")[0]] += float(value)
    return found


def greedy(server: RunningServer) -> list[dict[str, Any]]:
    body = {"prompt": ["Where is the bakery?", [5, 6, 7]], "max_tokens": 24, "temperature": 0, "logprobs": 1}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


@pytest.fixture(autouse=True)
def untouched(server: RunningServer) -> Iterator[None]:
    """The engine is the same process, nothing runs, the same question has the same answer."""
    process, before = server.engine_pids, greedy(server)
    yield
    wait_until(lambda: not running(server), 60)
    assert server.engine_pids == process
    values = metrics(server)
    assert values["coserve_engine_restarts_total"] == 0
    assert server.is_ready
    assert greedy(server) == before
    assert "Traceback" not in server.log


def running(server: RunningServer) -> float:
    values = metrics(server)
    return values["coserve_num_requests_running"] + values["coserve_num_requests_waiting"]


@pytest.fixture
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as found:
        yield found


def read(response: httpx.Response) -> Answer:
    """An error in OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"}, response.text
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and len(error["message"]) < 1000
    return Answer(response.status_code, error)


def test_every_wrong_field_is_named(server: RunningServer, client: httpx.Client) -> None:
    num = 0
    for wrong in wrong_fields(server.model_name):
        status, error = read(client.post(wrong.path, content=json.dumps(wrong.body), headers=JSON))
        shown = (wrong.path, wrong.field, str(wrong.body.get(wrong.field))[:200], error)
        assert status == wrong.status, shown
        assert (error["param"] or "").startswith(wrong.field), shown
        num += 1
    assert num > 500


def test_bodies_that_are_no_json(client: httpx.Client) -> None:
    for path in JSON_ROUTES:
        for name, body in raw_bodies().items():
            status, error = read(client.post(path, content=body, headers=JSON))
            assert status == 400, (path, name, error)


def test_wrong_content_types(client: httpx.Client) -> None:
    body = json.dumps({"lora_name": "a"})
    for path in JSON_ROUTES:
        for kind in ("text/plain", "application/xml", "multipart/form-data", "application/x-www-form-urlencoded", "\x7f", ""):
            assert read(client.post(path, content=body, headers={"content-type": kind})).status in (400, 403, 404, 415)


def test_names_in_paths(client: httpx.Client, server: RunningServer) -> None:
    for method, route in ID_ROUTES:
        for name in IDS:
            status, error = read(client.request(method, server.url + route.format(name)))
            assert status == 404, (method, route, name, error)


def test_query_parameters(client: httpx.Client) -> None:
    for path, query, name in QUERIES:
        status, error = read(client.get(f"{path}?{query}"))
        assert (status, error["param"]) == (400, name), (path, query, error)


def test_methods(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for method in ("PUT", "PATCH", "DELETE", "POST", "GET"):
            if method.lower() not in operations and not path.endswith("{model}") and path != "/ping":
                status, error = read(client.request(method, path.replace("{", "").replace("}", "")))
                assert status in (404, 405), (method, path, error)


def test_sizes(client: httpx.Client) -> None:
    """More than is taken, told before and not; and a limit's worth of JSON."""
    def pieces(size: int) -> Iterator[bytes]:
        for _ in range(size >> 20):
            yield b" " * (1 << 20)
        yield b"{}"

    for path in JSON_ROUTES:
        assert read(client.post(path, content=b" " * (MAX_BODY + 1), headers=JSON)).status == 413
        assert read(client.post(path, content=pieces(MAX_BODY), headers=JSON)).status == 413
        assert read(client.post(path, content=pieces(MAX_BODY - (1 << 20)), headers=JSON)).status == 400


def test_prompts_of_megabytes_are_refused_before_they_are_tokenized(client: httpx.Client, server: RunningServer) -> None:
    text = "x" * (MAX_BODY - 1000)
    before = resident_bytes(server.pid)
    began = time.monotonic()
    for path, body, field in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/v1/responses", {"input": text}, "input"),
        ("/v1/completions", {"prompt": text}, "prompt"), ("/v1/completions", {"prompt": ["a", text]}, "prompt"),
        ("/tokenize", {"prompt": text}, "prompt"),
    ):
        status, error = read(client.post(path, json=body))
        assert (status, error["param"]) == (400, field) and "context length" in error["message"]
    assert time.monotonic() - began < 20
    assert resident_bytes(server.pid) - before < 512 << 20


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x-gzip", "compress", "\x7f"])
def test_compressed_bodies(client: httpx.Client, encoding: str) -> None:
    data = bomb()
    for path in (*JSON_ROUTES, "/v1/files"):
        status, _ = read(client.post(path, content=data, headers={**JSON, "content-encoding": encoding}))
        assert status == 415


def upload(client: httpx.Client, content: bytes, name: str = "a.jsonl") -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"})


def test_wrong_uploads(client: httpx.Client, server: RunningServer) -> None:
    before = client.get("/v1/files").json()["data"]
    kind = f"multipart/form-data; boundary={BOUNDARY.decode()}"
    for name, body in forms().items():
        status, error = read(client.post("/v1/files", content=body, headers={"content-type": kind}))
        assert status == 400, (name, error)
    for other in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/mixed; boundary=--b", "text/plain",
                  f"{kind}; charset=utf-7", f"{kind}; charset=nothing", "multipart/form-data; boundary=" + "x" * 5000):
        assert read(client.post("/v1/files", content=forms()["cut"], headers={"content-type": other})).status == 400, other
    assert read(upload(client, b"{}\n" * (MAX_FILE // 3 + 1))).status == 413
    assert read(upload(client, b"{}\n" * MAX_FILE)).status == 413
    assert client.get("/v1/files").json()["data"] == before
    assert not list((server.data_dir / "files").glob("*.tmp"))


def test_file_names_make_no_paths(client: httpx.Client, server: RunningServer) -> None:
    for name in FILE_NAMES:
        found = upload(client, GOOD, name)
        assert found.status_code == 200, found.text
        file = found.json()
        assert "/" not in file["filename"] and "\\" not in file["filename"]
        content = client.get(f"/v1/files/{file['id']}/content")
        assert content.content == GOOD and content.headers["content-disposition"].startswith("attachment")
        if FLEET is None:  # a store's files have names of their own
            kept = (server.data_dir / "files" / file["id"]).iterdir()
            assert sorted(entry.name for entry in kept) == ["content", "meta.json"]
        assert client.delete(f"/v1/files/{file['id']}").json()["deleted"]


def create(client: httpx.Client, file: str, method: str = "supervised") -> httpx.Response:
    model = client.get("/v1/models").json()["data"][0]["id"]
    return client.post(JOBS, json={"model": model, "training_file": file, "method": {"type": method}})


def wait_for(client: httpx.Client, job: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def ended() -> bool:
        found.update(client.get(f"{JOBS}/{job}").json())
        return done(found)

    wait_until(ended, 60)
    return found


def refuse(client: httpx.Client, bad: BadFile) -> None:
    """Refused as an upload, or the job fails and says why."""
    sent = upload(client, bad.content)
    if sent.status_code != 200:
        answer = read(sent)
        assert (answer.status, answer.error["param"]) == (400, "file"), (bad.name, answer)
        return
    created = create(client, sent.json()["id"], bad.method)
    assert created.status_code == 200, (bad.name, created.text)
    job = wait_for(client, created.json()["id"], lambda found: found["status"] in ("succeeded", "failed", "cancelled"))
    assert job["status"] == "failed", (bad.name, job)
    error = job["error"]
    assert error["param"] == "training_file", (bad.name, error)
    assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 1000, (bad.name, error)
    if bad.line is not None:
        assert f"line {bad.line}:" in error["message"], (bad.name, error)


FILES = list(training_files())


def test_some_wrong_training_files(client: httpx.Client) -> None:
    for bad in FILES[::12]:
        refuse(client, bad)


@pytest.mark.full
def test_all_wrong_training_files(client: httpx.Client) -> None:
    assert len(FILES) > 300
    problems = []
    for bad in FILES:
        try:
            refuse(client, bad)
        except AssertionError as error:
            problems.append(str(error)[:300])
    assert problems == []


@pytest.mark.parametrize("name", readable_files())
def test_unusual_training_files_are_read(client: httpx.Client, name: str) -> None:
    job = create(client, upload(client, readable_files()[name]).json()["id"]).json()
    found = wait_for(client, job["id"], lambda found: found["status"] != "validating_files")
    assert found["status"] in ("queued", "running", "succeeded"), found
    client.post(f"{JOBS}/{job['id']}/cancel")
    wait_for(client, job["id"], lambda found: found["status"] in ("succeeded", "cancelled"))


def exchange(server: RunningServer, data: bytes, *, close: bool = True, seconds: float = 10) -> bytes:
    """What comes back for some bytes. close: says that no more follow."""
    host, port = server.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        try:
            connection.sendall(data)
            if close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                answer += part
        except OSError:
            pass  # refused in the middle, or kept open: either is an answer
    return answer


@pytest.mark.parametrize("name", STREAMS)
def test_bytes_that_are_hardly_http(server: RunningServer, name: str) -> None:
    answer = exchange(server, STREAMS[name])
    for line in answer.split(b"\r\n"):
        if line.startswith(b"HTTP/1."):
            assert 200 <= int(line.split()[1]) < 500, (name, answer[:500])
    assert b"root:" not in answer and b"Traceback" not in answer


def test_half_open_connections(server: RunningServer) -> None:
    """Hundreds that say a little, or nothing, and stay: others are served, and they cost nothing once they are gone."""
    host, port = server.url.removeprefix("http://").split(":")
    beginnings = (STREAMS["half a head"], STREAMS["body cut"], STREAMS["one byte"], b"")
    held = [socket.create_connection((host, int(port)), timeout=10) for _ in range(200)]
    for number, connection in enumerate(held):
        connection.sendall(beginnings[number % len(beginnings)])
    began = time.monotonic()
    greedy(server)
    assert time.monotonic() - began < 5
    for connection in held:
        connection.close()


@pytest.mark.full
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_what_schemathesis_makes_of_the_document(server: RunningServer, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen: Counter[int] = Counter()

    def check(case: schemathesis.Case) -> None:
        if "stream" in (case.query or {}):
            case.query.pop("stream")
        response = case.call(base_url=server.url, timeout=60)
        seen[response.status_code] += 1
        shown = (case.method, case.formatted_path, response.status_code, response.text[:300])
        assert response.status_code < 500, shown
        if response.status_code >= 400:
            body = response.json()
            assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, shown

    for operation in schema.get_all_operations():
        strategy = operation.ok().as_strategy(generation_mode=mode)
        run = settings(
            max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(case=strategy)(check))
        try:
            run()
        except Unsatisfiable:
            continue  # an operation that takes nothing can't be given anything wrong
        except Exception as error:
            error.add_note(operation.ok().label)
            raise
    assert sum(seen.values()) > 300, seen
