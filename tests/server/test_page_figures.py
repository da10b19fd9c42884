"""What the web page says of its figures, models and events: in a headless browser over the fake backend of test_page.py, and
the figures themselves without one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest

from coserve.core import Slo
from coserve.server.jobs.objects import event_object
from coserve.server.records import EventRecord, JobRecord
from coserve.server.settings import ServerConfig
from coserve.server.stats.metrics import RATE_S, ServerMetrics, ServerState
from tests.server.fake_page_backend import BASE, TUNED
from tests.server.test_page import Site, browser, open_page, until

__all__ = ["browser"]  # a fixture
PROMISED = Slo(tpot_s=0.1, ttft_s=3.0)


# --- the figures ---


def test_finetunings_share_is_of_the_same_seconds_as_its_rate() -> None:
    """After a job's end both are 0, though a minute ago the engine trained most of the time."""
    metrics = ServerMetrics(ServerConfig(), BASE, lambda: PROMISED)
    names = ("inference_tokens", "prompt_tokens", "finetune_tokens", "busy_s", "finetune_busy_s")
    counters: dict[str, float] = dict.fromkeys(names, 0)
    live: Mapping[str, Any] = {}
    for second in range(40 + 2 * int(RATE_S)):
        if second < 40:
            counters = {**counters, "finetune_tokens": second * 600, "busy_s": second * 1.0, "finetune_busy_s": second * 0.8}
        else:
            counters = {**counters, "busy_s": counters["busy_s"] + 0.1}
        live = metrics.live({**counters, "time_s": float(second), "jobs": 0}, ServerState(True, 0, {}))
        if second == 39:
            assert live["finetuning"]["share"] == pytest.approx(0.8)
    assert (live["finetuning"]["tokens_per_s"], live["finetuning"]["share"]) == (0, 0)


def test_percentiles_come_with_their_number_of_values() -> None:
    now = [100.0]
    metrics = ServerMetrics(ServerConfig(), BASE, lambda: PROMISED, clock=lambda: now[0])
    for i in range(6):
        metrics.ttft_s.add(100.0, 0.1 * i)
    live = metrics.live(None)["inference"]
    assert (live["ttft_ms"]["count"], live["tpot_ms"]["count"], live["judged"]) == (6, 0, 0)
    now[0] += 1000
    assert metrics.live(None)["inference"]["ttft_ms"] == {"count": 0, "p50": None, "p99": None}


# --- in a browser ---


def changed(live: dict[str, Any], **parts: dict[str, Any]) -> dict[str, Any]:
    """/api/live with other values in its parts."""
    return {**live, **{name: {**live[name], **values} for name, values in parts.items()}}


class Fixed(Site):
    """A backend whose /api/live is changed before it is sent."""

    def __init__(self, **parts: dict[str, Any]) -> None:
        super().__init__()
        original = self.backend.metrics.live
        self.parts = parts
        self.backend.metrics.live = lambda *given: changed(original(*given), **self.parts)  # type: ignore[method-assign]


@pytest.mark.full
def test_few_requests_are_counted_and_never_red(browser: Any) -> None:
    few = {"p50": 900.0, "p99": 9000.0, "count": 6}
    with Fixed(inference={"ttft_ms": few, "tpot_ms": few, "attainment": 0.5, "judged": 6}) as site:
        page, complaints = open_page(browser, site)
        until(lambda: page.text_content("#of-ttft") == "p99 of 6")
        assert page.text_content("#note-attainment") == "of 6 requests in 60 s"
        assert "over the objective" in page.text_content("#note-ttft")
        assert page.locator(".tile.late").count() == 0
        many = {**few, "count": 200}
        site.parts = {"inference": {"ttft_ms": many, "tpot_ms": many, "attainment": 0.5, "judged": 200}}
        until(lambda: page.locator(".tile.late").count() == 3)
        assert page.text_content("#of-ttft") == "p99"
        assert not complaints
        page.context.close()


@pytest.mark.full
def test_best_effort_is_named_and_never_red(browser: Any) -> None:
    many = {"p50": 900.0, "p99": 9000.0, "count": 200}
    parts = {"ttft_ms": many, "tpot_ms": many, "attainment": None, "judged": 0}
    with Fixed(objectives={"ttft_ms": None, "tpot_ms": 100.0}, inference=parts) as site:
        page, complaints = open_page(browser, site)
        until(lambda: page.text_content("#note-ttft") == "best effort")
        assert page.text_content("#note-tpot") == "over the objective of 100 ms"
        assert page.text_content("#note-attainment") == "no request with objectives ended lately"
        assert page.locator(".tile.late").count() == 1
        until(lambda: page.locator("#chart-ttft [aria-label$='best effort']").count() == 1)
        until(lambda: page.locator("#chart-ttft").get_by_text("Objective").is_hidden())
        assert page.locator("#chart-tpot").get_by_text("Objective").is_visible()
        assert not complaints
        page.context.close()


@pytest.mark.full
def test_without_a_job_the_tile_says_so(browser: Any) -> None:
    with Fixed(finetuning={"tokens_per_s": 0.0, "share": 0.0, "jobs": 0}) as site:
        page, _ = open_page(browser, site)
        until(lambda: page.text_content("#note-finetuning") == "no job is training")
        page.context.close()


@pytest.mark.full
def test_each_workload_has_an_axis_of_its_own_and_the_header_no_jargon(browser: Any) -> None:
    with Site() as site:
        page, _ = open_page(browser, site)
        titles = page.locator("#more-figures figcaption h3").all_text_contents()
        assert titles[:2] == ["Inference, tokens/s", "Finetuning, tokens/s"]
        header = page.text_content(".top")
        assert "Policy" not in header and "error" not in header
        until(lambda: "coserve" in page.text_content("#fact-policy") and "%" in page.text_content("#fact-error"))
        page.context.close()


@pytest.mark.full
def test_a_phone_begins_with_jobs_and_chat_and_shows_charts_on_request(browser: Any) -> None:
    with Site() as site:
        page, _ = open_page(browser, site, 390)
        tops = [page.locator(name).bounding_box()["y"] for name in ("#jobs", "#chat", "#live")]
        assert tops == sorted(tops)
        assert not page.is_visible("#chart-rate")
        page.click("#more-figures > summary")
        until(lambda: page.locator("#chart-rate canvas").count() == 1)
        page.set_viewport_size({"width": 1440, "height": 900})
        until(lambda: page.locator("#live").bounding_box()["y"] < page.locator("#jobs").bounding_box()["y"])
        assert page.is_visible("#chart-training") and not page.is_visible("#more-figures > summary")
        page.context.close()


@pytest.mark.full
def test_models_are_named_by_what_tells_them_apart(browser: Any) -> None:
    with Site() as site:
        page, _ = open_page(browser, site)
        labels = page.locator("#chat-right optgroup[label=Tuned] option")
        assert labels.all_text_contents() == ["harbour-guide 5f1c2a", "harbour-guide 5f1c2a, step 60"]
        assert labels.first.get_attribute("title") == labels.first.get_attribute("value") == TUNED
        page.click("#new-job")
        assert page.locator("#job-model option").all_text_contents()[:2] == [BASE, "harbour-guide 5f1c2a"]
        page.context.close()


@pytest.mark.full
def test_a_model_that_comes_later_is_offered(browser: Any) -> None:
    with Site() as site:
        page, complaints = open_page(browser, site)
        page.fill("#chat-text", "Hello?")
        page.press("#chat-text", "Enter")  # from now on the right side stays
        site.backend.change("ftjob-77aa", status="succeeded", fine_tuned_model=f"ft:{BASE}:coserve:tone:77aa")
        until(lambda: page.is_visible("#chat-offer"), seconds=20)
        assert page.text_content("#chat-offer-text") == "New: tone 77aa."
        assert page.input_value("#chat-right") == TUNED
        page.click("#chat-offer-take")
        assert page.input_value("#chat-right").endswith(":tone:77aa")
        assert not page.is_visible("#chat-offer")
        assert not complaints
        page.context.close()


@pytest.mark.full
def test_validation_is_in_the_legend_only_where_there_is_some(browser: Any) -> None:
    with Site() as site:
        original = site.backend.events

        def events(job: JobRecord) -> list[dict[str, Any]]:
            found = original(job)
            for event in found:
                if event["data"]:
                    event["data"] = {name: value for name, value in event["data"].items() if "valid" not in name}
            return found

        site.backend.events = events  # type: ignore[method-assign]
        page, _ = open_page(browser, site)
        until(lambda: page.locator("#chart-loss canvas").count() == 1)
        legend = page.locator("#chart-loss .legend li")
        assert [legend.nth(i).is_visible() for i in range(2)] == [True, False]
        site.backend.events = original  # type: ignore[method-assign]
        page.get_by_role("button", name="harbour-guide", exact=True).click()
        until(lambda: legend.nth(1).is_visible())
        page.context.close()


@pytest.mark.full
def test_events_stand_in_the_servers_order(browser: Any) -> None:
    """Many come in one second, and a clock may go back."""
    with Site() as site:
        now, told = int(time.time()), ["Created", "Checked", "Started", "Step", "Clock went back", "Ended"]
        times = [now, now, now, now, now - 60, now]

        def events(job: JobRecord) -> list[dict[str, Any]]:
            count = 6 if job.paused else 4
            return [event_object(EventRecord(id=f"e{job.id}-{i}", job=job.id, seq=i, created_at=times[i], level="info",
                                             type="message", message=told[i], data=None)) for i in reversed(range(count))]

        site.backend.events = events  # type: ignore[method-assign]
        page, _ = open_page(browser, site)
        shown = page.locator("#event-list li span")
        until(lambda: shown.all_text_contents() == told[3::-1])
        page.locator("#jobs-body tr.selected").get_by_text("Pause").click()
        until(lambda: shown.all_text_contents() == told[::-1])
        page.context.close()
