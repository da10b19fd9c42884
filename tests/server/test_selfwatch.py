"""The API process's own watch: a loop that stands still, a journal that does not get on."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from coserve.server.selfwatch import SelfWatch


def test_a_loop_that_stands_still_is_logged_with_its_stack_and_at_last_ends_the_process(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(logging, "shutdown", lambda: None)

    async def run() -> None:
        with SelfWatch(asyncio.get_running_loop(), lambda: 0.0, 0.1, leave=left.append, look_every_s=0.02):
            for _ in range(20):
                await asyncio.sleep(0.02)
            assert not caplog.records and not left
            time.sleep(0.4)  # the loop stands still
            await asyncio.sleep(0.05)
            assert not left
            limit = time.monotonic() + 10
            while not left and time.monotonic() < limit:
                time.sleep(0.05)

    asyncio.run(run())
    told = [record.getMessage() for record in caplog.records]
    assert "stands still" in told[0] and "time.sleep(0.4)" in told[0]
    assert left and left[0] == 1


def test_a_journal_that_does_not_get_on_is_a_problem_but_no_end(caplog: pytest.LogCaptureFixture) -> None:
    busy = 0.0

    async def run() -> None:
        nonlocal busy
        with SelfWatch(asyncio.get_running_loop(), lambda: busy, 60, look_every_s=0.01) as watch:
            assert watch.problem is None
            busy = 61.0
            async with asyncio.timeout(5):
                while not caplog.records:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)  # for more looks
            assert watch.problem is not None and "for 61 s" in watch.problem
            busy = 0.0
            assert watch.problem is None

    asyncio.run(run())
    assert len(caplog.records) == 1, "told once"


def test_zero_watches_nothing() -> None:
    async def run() -> None:
        with SelfWatch(asyncio.get_running_loop(), lambda: 1e9, 0) as watch:
            assert watch.problem is None and not watch._thread.is_alive()

    asyncio.run(run())
