"""pytest tests/gpu, in several processes where pytest-xdist is there: a row for each failure as it comes, and counts.

Without CUDA the tests are only collected. tests/conftest.py is left out: it imports the server, whose packages a machine with a
GPU may lack.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpu_clock import device_of
from gpu_rows import Item, Rows

ROOT = Path(__file__).resolve().parents[1]
MAX_PROCESSES = 8
"""On one device. Most of the tests' time is compilation, on the host."""
MAX_FAILURES = 40
"""Failures that get a row of their own."""
COUNTED_EVERY_S = 2.0
REPORT_CHARS = 1500


class Reporter:
    """A pytest plugin: writes rows while tests run."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self._counted = rows, time.monotonic()
        self.counts = {"passed": 0, "num_failed": 0, "num_skipped": 0, "collected": 0}

    def pytest_collection_finish(self, session: Any) -> None:
        self.counts["collected"] = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.counts["collected"] = len(ids)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._failure(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failure(report)
        elif report.skipped:
            self.counts["num_skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        if time.monotonic() - self._counted > COUNTED_EVERY_S:
            self._counted = time.monotonic()
            self._rows.add({"item": "pytest", **self.counts})

    def _failure(self, report: Any) -> None:
        self.counts["num_failed"] += 1
        if self.counts["num_failed"] <= MAX_FAILURES:
            text = str(report.longrepr)
            shown = text if len(text) <= REPORT_CHARS else f"{text[:300]} ... {text[-REPORT_CHARS + 300 :]}"
            self._rows.add({"item": "pytest", "test": report.nodeid, "failed": f"{report.nodeid}: {shown}"})


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The counts, once all have run."""
    reporter = Reporter(Rows(options.rows, options.part))
    cuda = device_of(options).type == "cuda"
    arguments = ["tests/gpu", "-q", "-rfE", "--noconftest"]
    for plugin in ("no:cacheprovider", "no:faulthandler", "gpu_standins"):
        arguments += ["-p", plugin]
    arguments += ["-m", "gpu"] if cuda else ["--collect-only", "-qq"]
    processes = min(MAX_PROCESSES, os.cpu_count() or 1)
    if cuda and processes > 1 and importlib.util.find_spec("xdist") is not None:
        arguments += ["--numprocesses", str(processes), "--dist", "worksteal"]
    os.chdir(ROOT)
    code = int(pytest.main(arguments, plugins=[reporter]))
    row = {"command": " ".join(["pytest", *arguments]), "returncode": code, **reporter.counts}
    yield row if code == 0 else {**row, "failed": f"pytest ended with {code}: {reporter.counts}"}


def items(options: argparse.Namespace) -> list[Item]:
    """One item."""
    return [Item("pytest", lambda: run(options))]
