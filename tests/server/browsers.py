"""Headless Chromium for tests of pages, which are skipped where Chromium or the package playwright is missing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_FLAGS = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def launch(*flags: str) -> Iterator[Any]:
    """playwright's Browser. flags: of Chromium's, beside the usual ones."""
    api = pytest.importorskip("playwright.sync_api")
    if _CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=_CHROMIUM, chromium_sandbox=False, args=[*_FLAGS, *flags])
        yield found
        found.close()
