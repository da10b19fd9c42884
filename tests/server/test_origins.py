"""Websites and a server without keys: which headers are let through. What pages in a real browser get and cause is in
test_origins_browser.py."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from coserve.core import ConfigError
from coserve.server.hostnames import OwnNames, check_allowed, is_own_origin, parse_host
from coserve.server.origins import OriginGuard
from coserve.server.settings import read_settings

Headers = dict[str, str]


class Guarded:
    """An application behind the guard that notes what reaches it."""

    def __init__(
        self, *, bound: str = "127.0.0.1", hosts: tuple[str, ...] = (), origins: tuple[str, ...] = (), keys: bool = False
    ) -> None:
        self.reached: list[str] = []
        self.app = FastAPI(openapi_url=None)

        @self.app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
        async def anything(request: Request) -> Response:
            self.reached.append(request.url.path)
            return PlainTextResponse("secret")

        async def asks_for_keys() -> bool:
            return keys

        if origins:
            self.app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        self.app.add_middleware(OriginGuard, names=OwnNames(bound, hosts), origins=origins, asks_for_keys=asks_for_keys)

    def ask(self, method: str = "GET", path: str = "/v1/models", headers: Headers | None = None) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(send())


ROUTES = (
    ("GET", "/"), ("HEAD", "/"), ("GET", "/page/app.js"), ("GET", "/health"), ("POST", "/ping"), ("GET", "/metrics"),
    ("GET", "/version"), ("GET", "/openapi.json"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/files"), ("GET", "/v1/files/file-1/content"), ("DELETE", "/v1/files/file-1"), ("OPTIONS", "/v1/files"),
    ("POST", "/v1/fine_tuning/jobs/ftjob-1/cancel"), ("GET", "/v1/fine_tuning/jobs/ftjob-1/events"), ("GET", "/nothing"),
)
HOST = {"host": "127.0.0.1:8000"}
OF_PAGES: dict[str, Headers] = {
    "another website's script": {**HOST, "origin": "https://evil.example", "sec-fetch-site": "cross-site"},
    "without Sec-Fetch": {**HOST, "origin": "https://evil.example"},
    "a sandboxed page": {**HOST, "origin": "null", "sec-fetch-site": "cross-site"},
    "a file": {**HOST, "origin": "null"},
    "an extension": {**HOST, "origin": "chrome-extension://abcdefgh"},
    "another port": {**HOST, "origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-site"},
    "another name of the machine": {**HOST, "origin": "http://localhost:8000", "sec-fetch-site": "cross-site"},
    "no port": {**HOST, "origin": "http://127.0.0.1"},
    "a longer name": {**HOST, "origin": "http://127.0.0.1:8000.evil.example"},
    "a user's name": {**HOST, "origin": "http://127.0.0.1:8000@evil.example"},
    "two": {**HOST, "origin": "http://127.0.0.1:8000, https://evil.example"},
    "nothing in it": {**HOST, "origin": ""},
    "another scheme": {**HOST, "origin": "ftp://127.0.0.1:8000"},
    "an image": {**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"},
    "a frame": {**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"},
    "an image of another port": {**HOST, "sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"},
    "contradictory": {**HOST, "origin": "https://evil.example", "sec-fetch-site": "same-origin"},
    "a value that no browser sends": {**HOST, "sec-fetch-site": "none, cross-site"},
    "a rebound name": {"host": "evil.example:8000"},
    "a rebound name's own script": {"host": "evil.example:8000", "origin": "http://evil.example:8000"},
    "a rebound name, as its own site": {"host": "evil.example:8000", "sec-fetch-site": "same-origin"},
    "a name that begins like ours": {"host": "localhost.evil.example:8000"},
    "a name that ends like ours": {"host": "evil-localhost:8000"},
    "an address in a name": {"host": "127.0.0.1.nip.io:8000"},
    "a name of the machine": {"host": "workstation:8000"},
    "an address of somebody else": {"host": "203.0.113.7:8000"},
}


@pytest.mark.parametrize("headers", OF_PAGES.values(), ids=OF_PAGES.keys())
def test_a_website_reaches_nothing(headers: Headers) -> None:
    guarded = Guarded()
    for method, path in ROUTES:
        answer = guarded.ask(method, path, headers)
        assert answer.status_code == 403, (method, path)
        assert not any(name.startswith("access-control") for name in answer.headers)
        if method != "HEAD":
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error" and error["param"] in ("host", "origin", "sec-fetch-site")
    assert guarded.reached == []


@pytest.mark.parametrize("host", ["", "a b", "evil.example:8000:80", "127.0.0.1:99999", "[::1", "a/b", "a@b", "ü"])
def test_a_host_header_that_is_none(host: str) -> None:
    guarded = Guarded()

    async def send() -> int:
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def collect(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "http_version": "1.1",
                 "headers": [(b"host", host.encode())], "scheme": "http", "server": ("127.0.0.1", 8000)}
        await guarded.app(scope, receive, collect)
        return int(sent[0]["status"])

    assert asyncio.run(send()) in (400, 403)
    assert guarded.reached == []


OF_OTHERS: dict[str, Headers] = {
    "curl": HOST,
    "by name": {"host": "localhost:8000"},
    "in capitals": {"host": "LOCALHOST:8000", "origin": "http://localhost:8000"},
    "another address of the loop": {"host": "127.0.0.2:8000"},
    "IPv6": {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
    "IPv4 in IPv6": {"host": "[::ffff:127.0.0.1]:8000"},
    "as other servers print it": {"host": "0.0.0.0:8000"},
    "through a forwarded port": {"host": "localhost:9000", "origin": "http://localhost:9000"},
    "the page's script": {**HOST, "origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"},
    "the page's reading": {**HOST, "sec-fetch-site": "same-origin"},
    "typed by the user": {**HOST, "sec-fetch-site": "none", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"},
    "through a proxy with TLS": {"host": "localhost", "origin": "https://localhost"},
    "the scheme's port": {"host": "localhost:443", "origin": "https://localhost"},
}


@pytest.mark.parametrize("headers", OF_OTHERS.values(), ids=OF_OTHERS.keys())
def test_programs_and_the_own_page_go_on_working(headers: Headers) -> None:
    guarded = Guarded()
    for method, path in ROUTES:
        answer = guarded.ask(method, path, headers)
        assert answer.status_code == 200, (method, path, answer.text)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert len(guarded.reached) == len(ROUTES)


def test_a_link_leads_to_the_page_and_nowhere_else() -> None:
    guarded = Guarded()
    link = {**HOST, "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert guarded.ask("GET", "/", link).status_code == 200
    for method, path in (("POST", "/"), ("GET", "/metrics"), ("GET", "/v1/files/x/content"), ("GET", "/?x=1")):
        assert guarded.ask(method, path, link).status_code == 403


def test_listening_everywhere_takes_every_address_but_no_name() -> None:
    for bound in ("0.0.0.0", "::", ""):
        guarded = Guarded(bound=bound)
        for host in ("192.168.1.5:8000", "[2001:db8::1]:8000", "localhost:8000", "203.0.113.7"):
            assert guarded.ask(headers={"host": host}).status_code == 200, host
        for host in ("workstation:8000", "evil.example:8000"):
            assert guarded.ask(headers={"host": host}).status_code == 403, host
        assert not OwnNames(bound, ()).is_local
    assert all(OwnNames(bound, ()).is_local for bound in ("127.0.0.1", "::1", "localhost", "127.0.0.5"))
    assert not any(OwnNames(bound, ("*",)).is_local for bound in ("192.168.1.5", "ai.example.com"))
    assert Guarded(bound="ai.example.com").ask(headers={"host": "ai.example.com:8000"}).status_code == 200
    assert Guarded(bound="192.168.1.5").ask(headers={"host": "192.168.1.5:8000"}).status_code == 200


def test_allowed_hosts() -> None:
    guarded = Guarded(hosts=("coserve", "*.example.com"))
    for host, status in (
        ("coserve:8000", 200), ("a.example.com", 200), ("a.b.EXAMPLE.com:443", 200), ("example.com", 403),
        ("evil-example.com", 403), ("coserve.evil.net", 403),
    ):
        assert guarded.ask(headers={"host": host}).status_code == status, host
    page = {"host": "a.example.com", "origin": "https://a.example.com", "sec-fetch-site": "same-origin"}
    assert guarded.ask("POST", headers=page).status_code == 200
    assert guarded.ask("POST", headers={**page, "origin": "https://b.example.com"}).status_code == 403
    everybody = Guarded(hosts=("*",))
    assert everybody.ask(headers={"host": "whatever:1"}).status_code == 200
    assert everybody.ask(headers={"host": "whatever:1", "origin": "http://evil.example"}).status_code == 403


def test_allowed_origins_may_ask_and_read() -> None:
    guarded = Guarded(origins=("https://app.example.com",))
    ours = {**HOST, "origin": "https://app.example.com", "sec-fetch-site": "cross-site"}
    preflight = {**ours, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = guarded.ask("OPTIONS", headers=preflight)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example.com")
    assert guarded.reached == [], "a preflight is answered before the routes"
    answer = guarded.ask("POST", headers=ours)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://app.example.com")
    for origin in ("https://app.example.com.evil.net", "http://app.example.com", "https://app.example.com:444", "null"):
        answer = guarded.ask("OPTIONS", headers={**preflight, "origin": origin})
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    rebound = {**ours, "host": "evil.example:8000"}
    assert guarded.ask("POST", headers=rebound).status_code == 403


def test_where_keys_are_asked_for_nothing_is_refused_here() -> None:
    """A website has no key, and gets no permission to read what needs none."""
    guarded = Guarded(keys=True)
    for headers in OF_PAGES.values():
        answer = guarded.ask(headers=headers)
        assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


def test_names_and_origins_are_read_as_browsers_write_them() -> None:
    assert parse_host("[::1]:80") == ("::1", 80) and parse_host("A.b") == ("a.b", None)
    for text in ("", ":80", "a:", "a b", "[::1", "a:1:2"):
        assert parse_host(text) is None, text
    host = parse_host("a.example:80")
    assert host is not None and is_own_origin("http://a.example", host) and not is_own_origin("https://a.example", host)
    for blank in ("\xa0", "\x85", "\v"):  # Python strips them, HTTP doesn't
        assert parse_host(f"a.b{blank}") is None and not is_own_origin(f"http://a.example{blank}", host)


@pytest.mark.parametrize(("hosts", "origins"), [
    (["http://a"], []), (["a:80"], []), (["*a"], []), (["a/b"], []), ([""], []),
    ([], ["a.example"]), ([], ["null"]), ([], ["https://a/b"]), ([], ["ftp://a"]), ([], [""]),
])
def test_settings_that_are_no_names(hosts: list[str], origins: list[str]) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts" if hosts else "allowed_origins"):
        check_allowed(hosts, origins)


def test_settings_are_taken_in_vllm_s_form_too() -> None:
    given = read_settings(None, {"allowed_origins": ['["https://a.example", "*"]'], "allowed_hosts": ["a", "b"]})
    assert given.allowed_origins == ("https://a.example", "*") and given.allowed_hosts == ("a", "b")


