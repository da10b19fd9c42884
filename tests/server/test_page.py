"""The web page: its files and headers, and, in a headless browser, what a user sees and does.

The browser's tests need Chromium and the packages playwright and axe-playwright-python; without them they are skipped. The
screenshots are left in the directory that COSERVE_SHOTS names.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

import pytest
from fastapi.testclient import TestClient

from coserve.server.routes.page import assets
from tests.server.browsers import launch
from tests.server.fake_page_backend import BASE, TUNED, FakeBackend, create_app
from tests.server.fakes import serve

WIDTHS = (390, 820, 1440)
OWN = [path for path in assets() if not path.startswith("vendor/")]


# --- files and headers ---


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(FakeBackend()))


def test_the_page_has_strict_headers(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.strip().partition(" ")[::2] for rule in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'" and policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "http" not in answer.headers["content-security-policy"] and "unsafe" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_files_are_asked_about_by_their_tag(client: TestClient) -> None:
    first = client.get("/page/app.js")
    assert first.headers["content-type"] == "text/javascript; charset=utf-8"
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and not again.content
    changed = client.get("/page/app.js", headers={"If-None-Match": '"another"'})
    assert changed.status_code == 200


@pytest.mark.parametrize("path", [
    "/page/nothing.js", "/page/../routes/page.py", "/page/%2e%2e/routes/page.py", "/page/..%2fmetrics.py", "/page//etc/passwd",
    "/page/vendor", "/page/", "/page/app.js%00", "/page/APP.JS",
])
def test_nothing_but_the_page_s_files_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_everything_that_is_referred_to_exists_and_nothing_comes_from_elsewhere() -> None:
    page = files("coserve.server") / "page"
    html = (page / "index.html").read_text()
    for reference in re.findall(r'(?:src|href)="(page/[^"]+)"', html):
        assert reference.removeprefix("page/") in assets()
    assert not re.search(r"<script(?![^>]* src=)|\s(on\w+|style)=", html), "the policy forbids these"
    ids = set(re.findall(r'id="([^"]+)"', html))
    for path in OWN:
        text = (page / path).read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path
        for imported in re.findall(r'from "\./([^"]+)"', text):
            assert imported in assets(), f"{path} imports {imported}"
        for name in re.findall(r'byId\("([^"]+)"\)', text):
            assert name in ids, f"{path} asks for #{name}"
        assert len(text.splitlines()) < 400, path


def test_vendored_files_come_with_their_licence() -> None:
    assert "vendor/uPlot.LICENSE" in assets() and b"MIT" in assets()["vendor/uPlot.LICENSE"].content


# --- in a browser ---


class Site:
    """The fake backend on a port of its own."""

    def __init__(self, api_key: str | None = None) -> None:
        self.backend = FakeBackend(api_key)
        self._serving = serve(create_app(self.backend))

    def __enter__(self) -> Self:
        self.url = f"http://127.0.0.1:{self._serving.__enter__()}/"
        return self

    def __exit__(self, *reason: Any) -> None:
        self._serving.__exit__(*reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch() as found:
        yield found


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as found:
        yield found


def open_page(browser: Any, site: Site, width: int = 1440, scheme: str = "light") -> tuple[Any, list[str]]:
    """(page, complaints of its scripts), once figures and jobs are there."""
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(site.url) else complaints.append(request.url))
    page.goto(site.url)
    page.wait_for_selector('#engine-state[data-state="ok"]')
    page.wait_for_selector("#jobs-body tr")
    page.wait_for_selector('#chat-right option[value^="ft:"]', state="attached")
    return page, complaints


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_both_workloads_are_drawn(
    browser: Any, site: Site, tmp_path: Path, width: int, scheme: str
) -> None:
    page, complaints = open_page(browser, site, width, scheme)
    page.fill("#chat-text", "Who tends the lighthouse at Vellmoor?")
    page.press("#chat-text", "Enter")
    page.wait_for_timeout(2000)
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
    for name in ("inference", "finetuning"):  # a dash, until two looks at the figures are there
        until(lambda: float(re.sub(r"[^\d.]", "", page.text_content(f"#tile-{name}")) or 0) > 0)  # noqa: B023
    for figure in ("rate", "ttft", "tpot", "loss"):
        until(functools.partial(_inked, page, f"#chart-{figure} canvas"))
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", ground)) > 380) is (scheme == "light")
    shots = Path(os.environ.get("COSERVE_SHOTS", tmp_path))
    page.screenshot(path=shots / f"page-{width}-{scheme}.png", full_page=True)
    assert not complaints
    page.context.close()


def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    """Waits. (The page's policy forbids playwright's own way, which evaluates text.)"""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{condition} did not come true"
        time.sleep(0.05)


def _inked(page: Any, selector: str) -> bool:
    """Whether a canvas holds a line, which is in a colour."""
    return bool(page.evaluate(
        """(selector) => {
          const canvas = document.querySelector(selector);
          if (canvas === null) return false;  // not drawn yet
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let count = 0;
          for (let i = 0; i < data.length; i += 4) {
            const [r, g, b, a] = data.slice(i, i + 4);
            if (a > 200 && Math.max(r, g, b) - Math.min(r, g, b) > 80) count += 1;
          }
          return count > 40;
        }""", selector))


@pytest.mark.full
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1440, "light"), (1440, "dark")])
def test_axe_finds_nothing(browser: Any, site: Site, width: int, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page, _ = open_page(browser, site, width, scheme)
    page.fill("#chat-text", "Hello")
    page.click("#chat-send")
    page.click("#new-job")
    page.click("#job-submit")
    page.set_input_files("#job-training_file", [a_file("bad.jsonl")])
    page.wait_for_selector("#data-problems")
    page.wait_for_timeout(1500)
    found = axe.Axe().run(page).response["violations"]
    serious = [(item["id"], [node["html"][:120] for node in item["nodes"]]) for item in found]
    assert not serious
    page.context.close()


@pytest.mark.full
def test_a_job_starts_from_a_dropped_file_and_is_steered(browser: Any, tmp_path: Path) -> None:
    data = tmp_path / "harbour.jsonl"
    data.write_text('{"messages": []}\n')
    with Site() as site:
        page, complaints = open_page(browser, site)
        transfer = page.evaluate_handle("""() => {
          const transfer = new DataTransfer();
          transfer.items.add(new File(['{"messages": []}'], "harbour.jsonl"));
          return transfer;
        }""")
        page.dispatch_event("#jobs", "drop", {"dataTransfer": transfer})
        page.fill("#job-suffix", "dropped")
        page.fill("#job-rank", "128")
        page.fill("#job-n_epochs", "2")
        page.click("#job-submit")
        page.wait_for_selector("#job-rank[aria-invalid]")
        assert "--max-lora-rank 64" in page.text_content("#error-rank")
        assert page.evaluate("document.activeElement.id") == "job-rank"
        page.fill("#job-rank", "8")
        page.click("#job-submit")
        page.wait_for_selector("#job-form", state="hidden")
        (body,) = site.backend.created
        assert (body.suffix, body.rank, body.model) == ("dropped", 8, BASE)
        assert site.backend.files[body.training_file] == "harbour.jsonl"
        assert len(site.backend.files) == 3, "the file is uploaded once"
        row = page.locator("#jobs-body tr").first
        page.wait_for_selector("#job-detail dd:has-text('harbour.jsonl')")
        row.get_by_text("Pause").click()
        page.wait_for_selector("#jobs-body tr:first-child .status:has-text('Paused')")
        row.get_by_text("Resume").click()
        page.wait_for_selector("#jobs-body tr:first-child .status:has-text('Running')")
        row.get_by_text("Cancel").click()
        assert site.backend.jobs["ftjob-new1"].status == "running", "the first press only asks"
        row.get_by_text("Sure?").click()
        page.wait_for_selector("#jobs-body tr:first-child .status:has-text('Cancelled')")
        assert [text for text in complaints if "400" not in text] == []
        page.context.close()


@pytest.mark.full
def test_thoughts_are_shown_apart_from_the_answer(browser: Any, site: Site) -> None:
    page, complaints = open_page(browser, site)
    page.fill("#chat-text", "Think: who tends the lighthouse?")
    page.press("#chat-text", "Enter")
    until(lambda: page.is_enabled("#chat-send"))
    assert page.locator(".answer .thoughts p").all_text_contents() == ["Who keeps <i>lamps</i>?"] * 2
    left, right = page.locator(".answer .text").all_text_contents()
    assert "lighthouse" in left and right == ""
    notes = page.locator(".answer .note").all_text_contents()
    assert "tokens/s" in notes[0] and notes[1] == "It ended in its thoughts."
    assert not complaints
    page.context.close()


def a_file(name: str) -> dict[str, Any]:
    """A file that a browser chooses. The fake backend tells of its data by its name."""
    return {"name": name, "mimeType": "application/jsonl", "buffer": b'{"messages": []}\n'}


@pytest.mark.full
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")])
def test_data_are_shown_before_a_job_starts(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    shots = Path(os.environ.get("COSERVE_SHOTS", tmp_path))
    with Site() as site:
        page, complaints = open_page(browser, site, width, scheme)
        page.click("#new-job")
        assert not page.is_visible("#job-data")
        page.set_input_files("#job-training_file", [a_file("harbour.jsonl")])
        page.wait_for_selector("#data-examples")
        assert "412" in page.text_content("#data-facts") and "61,208" in page.text_content("#data-facts")
        first = page.locator("#data-example-list pre").first
        assert first.locator("mark").all_text_contents()[1] == "Fog over the harbour, as ever.<|im_end|>"
        assert "Weather <b>here</b>?" in first.text_content(), "markup is shown as text"
        assert not page.is_visible("#data-problems") and not page.is_visible("#data-warnings")
        page.set_input_files("#job-validation_file", [a_file("valid.jsonl")])
        page.wait_for_selector("#data-facts dt:has-text('For validation')")
        page.locator("#job-form").screenshot(path=shots / f"data-{width}-{scheme}.png")
        before = len(site.backend.files)
        page.set_input_files("#job-training_file", [a_file("bad.jsonl")])
        page.wait_for_selector("#data-problems")
        assert page.text_content("#data-problems-title") == "42 problems: a job would be refused"
        problems = page.locator("#data-problem-list li").all_text_contents()
        assert problems[0].startswith("line 3: messages: no assistant message")
        assert problems[-1] == "and 32 more"
        assert page.text_content("#data-status") == "The file is long: this tells of its first 25.0%."
        assert "3 examples are the same" in page.text_content("#data-warning-list")
        until(lambda: len(site.backend.files) == before)  # the file that was chosen before is gone
        assert "harbour.jsonl" not in site.backend.files.values()
        assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out"
        page.locator("#job-form").screenshot(path=shots / f"data-bad-{width}-{scheme}.png")
        page.click("#job-submit")
        page.wait_for_selector("#job-form", state="hidden")
        (body,) = site.backend.created
        assert site.backend.files[body.training_file] == "bad.jsonl"
        assert body.validation_file is not None
        page.click("#new-job")
        assert not page.is_visible("#job-data")
        assert complaints == []
        page.context.close()


@pytest.mark.full
def test_both_models_answer_side_by_side_and_can_be_stopped(browser: Any, site: Site) -> None:
    page, complaints = open_page(browser, site)
    assert page.input_value("#chat-left") == BASE
    assert page.input_value("#chat-right").startswith("ft:")
    page.fill("#chat-text", "Who tends the lighthouse at Vellmoor?")
    page.press("#chat-text", "Enter")
    until(lambda: [("tokens/s" in note) for note in page.locator(".answer .note").all_text_contents()] == [True, True])
    left, right = page.locator(".answer .text").all_text_contents()
    assert "<b>Lighthouses</b>" in left, "markup is shown as text"
    assert "Odile Pratt" in right
    page.fill("#chat-text", "And now?")
    page.press("#chat-text", "Enter")
    until(lambda: [bool(text) for text in page.locator(".answer .text").all_text_contents()[2:]] == [True] * 2)
    page.click("#chat-stop")
    until(lambda: page.locator(".answer .note").all_text_contents()[2:] == ["Stopped."] * 2)
    assert page.is_enabled("#chat-send")
    assert not complaints
    page.context.close()


@pytest.mark.full
def test_thoughts_and_calls_are_shown_and_results_given(browser: Any, site: Site) -> None:
    page, complaints = open_page(browser, site)
    page.click("#chat-more > summary")
    page.fill("#chat-text", "Is it raining?")
    page.fill("#chat-tools", "{no JSON")
    page.click("#chat-send")
    assert page.inner_text("#chat-error") == "Tools are a JSON list."
    page.fill("#chat-tools", '[{"type": "function", "function": {"name": "weather"}}]')
    page.click("#chat-send")
    until(lambda: page.locator(".call button, .answer button").count() == 2)
    assert page.locator(".call code").all_text_contents() == ['weather {"city": "Oslo"}'] * 2
    assert page.locator(".thoughts p").all_text_contents()[0] == "They want the weather."
    page.locator(".call input").first.fill("rain")
    page.locator(".answer button").first.click()
    until(lambda: "It says rain." in page.locator(".answer .text").all_text_contents())
    assert page.locator(".answer button").count() == 1, "the other side's call still waits"
    page.fill("#chat-tools", "")
    page.click("#chat-more > summary")
    assert not complaints
    page.context.close()


@pytest.mark.full
def test_a_long_conversation_scrolls_and_a_model_that_goes_is_replaced(browser: Any) -> None:
    with Site() as site:
        page, _ = open_page(browser, site, 390)
        page.select_option("#chat-right", f"{TUNED}:ckpt-step-60")
        before = page.evaluate("document.documentElement.scrollHeight")
        for i in range(8):
            page.fill("#chat-text", f"Question {i}")
            page.press("#chat-text", "Enter")
            until(lambda: page.is_enabled("#chat-send") and page.input_value("#chat-text") == "")
        assert page.evaluate("document.documentElement.scrollHeight") < before + 500, "only the log grows, up to its limit"
        assert page.input_value("#chat-right") == f"{TUNED}:ckpt-step-60"
        site.backend.gone.add(f"{TUNED}:ckpt-step-60")
        until(lambda: page.input_value("#chat-right") == TUNED)
        page.context.close()


@pytest.mark.full
def test_a_job_s_result_and_its_failure_are_shown(browser: Any, site: Site) -> None:
    page, _ = open_page(browser, site)
    page.click("tr[data-status=failed] button.link")
    page.wait_for_selector("#detail-error:has-text('line 17')")
    page.get_by_role("button", name="harbour-guide", exact=True).click()
    page.wait_for_selector("#event-list li:has-text('Checkpoint of step 80')")
    page.click("#detail-chat")
    assert page.input_value("#chat-right") == TUNED
    assert page.evaluate("document.activeElement.id") == "chat-text"
    page.context.close()


@pytest.mark.full
def test_a_key_is_asked_for_once(browser: Any) -> None:
    with Site(api_key="sk-right") as site:
        page = browser.new_context().new_page()
        page.goto(site.url)
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-input", "sk-wrong")
        page.press("#key-input", "Enter")
        page.wait_for_selector("#key-message:has-text('does not know this key')")
        page.fill("#key-input", "sk-right")
        page.press("#key-input", "Enter")
        page.wait_for_selector('#engine-state[data-state="ok"]')
        page.wait_for_selector("#jobs-body tr")
        assert page.evaluate("Object.values(sessionStorage)") == ["sk-right"]
        page.reload()
        page.wait_for_selector('#engine-state[data-state="ok"]')
        assert not page.is_visible("#key-dialog")
        page.context.close()


@pytest.mark.full
def test_a_server_that_went_away_is_said_in_words(browser: Any) -> None:
    with Site() as site:
        page, _ = open_page(browser, site)
    page.wait_for_selector('#engine-state:has-text("Server not reachable")', timeout=15_000)
    page.fill("#chat-text", "Hello?")
    page.click("#chat-send")
    page.wait_for_selector(".answer .note:has-text('be reached')")
    assert page.is_enabled("#chat-send")
    page.context.close()
