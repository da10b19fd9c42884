"""Websites against a server without keys, in headless Chromium: another origin's page, and a page whose name was rebound to the
server's address. What they get is nothing, and nothing of what they send reaches a route.

Needs Chromium and playwright; skipped without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import HTMLResponse

from tests.server.browsers import launch
from tests.server.conftest import RunningServer
from tests.server.fakes import serve
from tests.server.test_origins import Guarded

ATTACK = """
async base => {
  const got = [];
  const tell = (what, value) => got.push([what, String(value)]);
  const chat = JSON.stringify({messages: [{role: "user", content: "Hi"}]});
  const tries = {
    read: () => fetch(base + "/v1/files"),
    metrics: () => fetch(base + "/metrics", {mode: "no-cors"}),
    health: () => fetch(base + "/health"),
    text: () => fetch(base + "/v1/chat/completions", {method: "POST", body: chat, mode: "no-cors"}),
    untyped: () => fetch(base + "/v1/completions", {method: "POST", body: new Blob([chat]), mode: "no-cors"}),
    json: () => fetch(base + "/v1/completions", {method: "POST", body: chat, headers: {"content-type": "application/json"}}),
    ping: () => fetch(base + "/ping", {method: "POST", mode: "no-cors"}),
    remove: () => fetch(base + "/v1/files/file-1", {method: "DELETE"}),
    upload: () => { const form = new FormData(); form.append("purpose", "fine-tune");
      form.append("file", new Blob(["{}"]), "a.jsonl");
      return fetch(base + "/v1/files", {method: "POST", body: form, mode: "no-cors"}); },
    cancel: () => fetch(base + "/v1/fine_tuning/jobs/x/cancel", {method: "POST", mode: "no-cors", credentials: "include"}),
  };
  for (const [name, send] of Object.entries(tries)) {
    try {
      const answer = await send();
      tell(name, answer.type + " " + answer.status + " " + (await answer.text()).slice(0, 200));
    } catch (error) { tell(name, "refused"); }
  }
  tell("beacon", navigator.sendBeacon(base + "/v1/completions", chat));
  const load = (tag, set) => new Promise(done => { const element = document.createElement(tag); set(element);
    element.onload = () => done("loaded"); element.onerror = () => done("refused"); document.body.append(element);
    setTimeout(() => done("nothing"), 2000); });
  tell("image", await load("img", e => e.src = base + "/page/icon.svg"));
  tell("script", await load("script", e => e.src = base + "/page/app.js"));
  await load("iframe", e => e.src = base + "/metrics");
  await new Promise(done => {
    const events = new EventSource(base + "/v1/fine_tuning/jobs/ftjob-1/events?stream=true");
    events.onerror = () => { events.close(); done(); };
    events.onopen = () => { tell("events", "open"); events.close(); done(); };
  });
  const form = document.createElement("form"); const target = document.createElement("iframe"); target.name = "target";
  form.method = "POST"; form.action = base + "/v1/fine_tuning/jobs"; form.enctype = "text/plain"; form.target = "target";
  document.body.append(target, form);
  await new Promise(done => { target.onload = done; form.submit(); setTimeout(done, 2000); });
  return got;
}
"""


def blank_site() -> FastAPI:
    app = FastAPI()

    @app.get("/{path:path}", response_class=HTMLResponse)
    async def page(path: str) -> str:
        return "<!doctype html><body>attack</body>"

    return app


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Names of .test are looked up as a rebinding attacker's would be: all are this machine."""
    with launch("--host-resolver-rules=MAP *.test 127.0.0.1") as found:
        yield found


def attack(browser: Any, page_url: str, base: str) -> dict[str, str]:
    """What a page at page_url gets from the server at `base`. The page is the attacker's, wherever its name leads by then."""
    page = browser.new_page()
    page.route(page_url, lambda route: route.fulfill(content_type="text/html", body="<!doctype html><body>attack</body>"))
    page.goto(page_url)
    page.unroute(page_url)
    got = dict(page.evaluate(ATTACK, base))
    page.close()
    return got


def assert_nothing(got: dict[str, str]) -> None:
    assert len(got) >= 13, got
    assert "secret" not in str(got), got
    for name, outcome in got.items():
        if name != "beacon":  # which only tells that it was queued
            assert outcome == "refused" or outcome.startswith("opaque 0 ") or " 403 " in outcome, (name, outcome)


def test_another_website_gets_nothing_and_causes_nothing(browser: Any) -> None:
    guarded = Guarded()
    with serve(guarded.app) as port, serve(blank_site()) as other:
        for page in (f"http://evil.test:{other}/", f"http://127.0.0.1:{other}/", f"http://localhost:{port}/attack"):
            assert_nothing(attack(browser, page, f"http://127.0.0.1:{port}"))
            time.sleep(0.3)  # the beacon
            own = ["/favicon.ico"] if "localhost" in page else []  # the browser's own wish for such a page
            assert [path for path in guarded.reached if path not in own] == [], page


def test_a_rebound_name_gets_nothing_and_causes_nothing(browser: Any) -> None:
    guarded = Guarded()
    with serve(guarded.app) as port:
        assert_nothing(attack(browser, f"http://rebound.test:{port}/attack", f"http://rebound.test:{port}"))
        time.sleep(0.3)
        assert guarded.reached == []


def test_a_sandboxed_frame_gets_nothing(browser: Any) -> None:
    guarded = Guarded()
    with serve(guarded.app) as port, serve(blank_site()) as other:
        page = browser.new_page()
        page.goto(f"http://evil.test:{other}/")
        page.evaluate("""base => new Promise(done => {
          const frame = document.createElement("iframe");
          frame.sandbox = "allow-scripts";
          frame.onload = () => setTimeout(done, 500);
          frame.srcdoc = `<script>fetch("${base}/ping", {method: "POST", mode: "no-cors"});
            fetch("${base}/v1/files")<\\/script>`;
          document.body.append(frame); })""", f"http://127.0.0.1:{port}")
        page.close()
        assert guarded.reached == []


def test_the_own_page_and_allowed_websites_go_on_working(browser: Any) -> None:
    send = """async base => { const sent = await fetch(base + "/v1/chat/completions", {method: "POST", body: "{}",
      headers: {"content-type": "application/json", "authorization": "Bearer x"}});
      return (await sent.text()) + (await (await fetch(base + "/v1/files")).text()); }"""
    with serve(blank_site()) as other:
        website = f"http://app.test:{other}"
        guarded = Guarded(origins=(website,))
        with serve(guarded.app) as port:
            for page_url, base in (
                (f"http://127.0.0.1:{port}/", ""), (f"http://localhost:{port}/", ""),
                (f"{website}/", f"http://127.0.0.1:{port}"),
            ):
                page = browser.new_page()
                page.goto(page_url)
                assert page.evaluate(send, base) == "secretsecret", page_url
                page.close()


@pytest.mark.full
def test_a_whole_server_is_left_alone(browser: Any, server: RunningServer) -> None:
    port = server.url.rpartition(":")[2]

    def state() -> tuple[Any, Any, str]:
        with httpx.Client(base_url=server.url, timeout=30) as client:
            lines = client.get("/metrics").text.splitlines()
            received = [line for line in lines if line.startswith("coserve_requests_received")]
            return client.get("/v1/files").json(), client.get("/v1/fine_tuning/jobs").json(), "".join(received)

    before = state()
    with serve(blank_site()) as other:
        assert_nothing(attack(browser, f"http://evil.test:{other}/", server.url))
    assert_nothing(attack(browser, f"http://rebound.test:{port}/attack", f"http://rebound.test:{port}"))
    time.sleep(0.5)
    assert state() == before
    page = browser.new_page()
    page.goto(server.url)
    assert page.evaluate("async () => (await fetch('/v1/models')).status") == 200
    page.close()
