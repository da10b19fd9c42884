"""The log: every line has its time, level and ids, in text and in JSON; repeats are counted instead of written."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
import time
from collections.abc import Iterator

import pytest

from coserve.server import logs
from coserve.server.logs import FoldingHandler, JsonFormatter, TextFormatter, about_request, note_tenant
from tests.server.conftest import wait_until

HEAD = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) api ")


class Log:
    """A logger with its own handler, and what it has written."""

    def __init__(self, kind: str) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.handler = FoldingHandler(self.out, self.err)
        self.handler.setFormatter(JsonFormatter("api") if kind == "json" else TextFormatter("api"))
        self.handler.addFilter(logs._Context())
        self.logger = logging.Logger("coserve.test")
        self.logger.addHandler(self.handler)

    @property
    def lines(self) -> list[str]:
        return (self.out.getvalue() + self.err.getvalue()).splitlines()


@pytest.fixture(params=["text", "json"])
def log(request: pytest.FixtureRequest) -> Iterator[Log]:
    log = Log(request.param)
    yield log
    log.handler.close()


def test_each_line_has_its_time_level_and_ids(log: Log) -> None:
    with about_request("r-1"):
        note_tenant("alice")
        log.logger.info("hello")
        try:
            raise ValueError("several\nlines")
        except ValueError:
            log.logger.exception("it failed", extra={"job": "ftjob-1"})
    log.logger.warning("outside")
    if isinstance(log.handler.formatter, JsonFormatter):
        first, second, third = map(json.loads, log.lines)
        assert (first["level"], first["request"], first["tenant"], "job" in first) == ("info", "r-1", "alice", False)
        assert second["job"] == "ftjob-1" and "ValueError: several\nlines" in second["exception"]
        assert "request" not in third and third["message"] == "outside"
    else:
        assert all(HEAD.match(line) for line in log.lines), "lines of a traceback too"
        assert log.lines[0].endswith("hello [request=r-1 tenant=alice]")
        assert "[request=r-1 tenant=alice job=ftjob-1]" in log.lines[1]
        assert any(line.endswith("ValueError: several") for line in log.lines)
        assert log.lines[-1].endswith("outside")
    assert "hello" in log.out.getvalue() and "outside" in log.err.getvalue()


def test_a_line_break_in_what_users_give_makes_no_line_of_its_own() -> None:
    log = Log("text")
    log.logger.warning("name: %s", "x\n2026-01-01T00:00:00.000Z ERROR api forged")
    assert all(HEAD.match(line) for line in log.lines) and log.lines[1].count("WARNING") == 1
    assert HEAD.sub("", log.lines[1]).startswith("| "), "it is seen to belong to the line before"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\rb", "a\x85b", "\x9b31m", "\u202eabc", "\u2028x", "\x00", "\ud800", "a\x08"])
def test_what_steers_a_terminal_or_cant_be_written_is_written_out(log: Log, text: str) -> None:
    log.logger.warning("path: %s", text, extra={"job": f"id {text}\n"})
    try:
        raise ValueError(text)
    except ValueError:
        log.logger.exception("it failed")
    written = log.err.getvalue()
    written.encode()
    assert all(letter.isprintable() or letter == "\n" for letter in written), written
    if isinstance(log.handler.formatter, JsonFormatter):
        assert json.loads(log.lines[0])["message"] == f"path: {text}"


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_stream_that_nobody_reads_costs_lines_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    log = Log("text")
    log.handler._out = _Gone()
    log.logger.info("lost")
    log.logger.warning("kept")
    assert "kept" in log.err.getvalue() and capsys.readouterr() == ("", "")


def test_repeats_are_counted(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    monkeypatch.setattr(logs, "FOLD_S", (0.5, 0.6))
    for _ in range(54):
        log.logger.error("no room", extra={"job": "a"})
    log.logger.error("no room", extra={"job": "b"})
    log.logger.error("something else")
    assert len(log.lines) == 3
    wait_until(lambda: len(log.lines) == 4, 10)  # told when the window ends, though nothing else is logged
    assert "repeated 53 times within" in log.lines[-1] and "no room" in log.lines[-1]
    if isinstance(log.handler.formatter, JsonFormatter):
        assert json.loads(log.lines[-1])["repeated"] == 53
        assert json.loads(log.lines[-1])["job"] == "a"
    time.sleep(0.8)
    log.logger.error("no room", extra={"job": "a"})
    assert len(log.lines) == 5, "after a quiet while it is written again"


def test_what_was_counted_is_told_at_the_end() -> None:
    log = Log("text")
    for _ in range(3):
        log.logger.warning("again")
    log.handler.close()
    assert len(log.lines) == 2 and "repeated 2 times" in log.lines[1]


def test_many_different_lines_take_no_more_memory() -> None:
    log = Log("text")
    for number in range(2000):
        log.logger.info("line %d", number)
    assert len(log.lines) == 2000 and len(log.handler._folded) <= 257


def test_threads_write_whole_lines() -> None:
    log = Log("json")

    def write(name: int) -> None:
        for number in range(200):
            log.logger.info("%d %d", name, number)

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({json.loads(line)["message"] for line in log.lines}) == 800


def test_an_empty_message_is_folded_like_any_other(log: Log) -> None:
    for _ in range(3):
        log.logger.warning("")
    log.handler.close()
    assert len(log.lines) == 2 and "repeated 2 times" in log.lines[1]
