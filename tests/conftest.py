"""Tiny models run on one thread: faster, and indifferent to what else the machine does. Real ones take all (default_model).

COSERVE_TESTS_UNTIL, in seconds since 1970: tests that would begin later are skipped, and the summary says how many. CI sets
it, so that a slow machine tells what it found in the time that it has.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from coserve.cli import main as cli
from coserve.runtime.loaded import LoadedModel
from coserve.server.logs import FoldingHandler
from coserve.text.tokenizer import ChatTokenizer
from tests.commands import Ran, Run
from tests.tiny_engine import MakeEngine, build_model, tracked_engines
from tests.tiny_tokenizer import build_sentencepiece_tokenizer, build_tiny_tokenizer

UNTIL = float(os.environ.get("COSERVE_TESTS_UNTIL", "inf"))


def pytest_runtest_setup() -> None:
    if time.time() > UNTIL:
        pytest.skip("there was no time left for it (COSERVE_TESTS_UNTIL)")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    """A command that sends the log to this test's streams doesn't send later tests' lines there, where they are closed."""
    root, hooks = logging.getLogger(), (sys.excepthook, threading.excepthook)
    levels = {name: logging.getLogger(name).level for name in ("root", "coserve")}
    yield
    for handler in [one for one in root.handlers if isinstance(one, FoldingHandler)]:
        root.removeHandler(handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)
    sys.excepthook, threading.excepthook = hooks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model. A file, or a folder's conftest, may have another one under this name."""
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def engines(model: LoadedModel) -> Iterator[MakeEngine]:
    """Makes engines for the `model` that the test file sees."""
    yield from tracked_engines(model)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*args: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "argv", ["coserve", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code: Any = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Ran(int(code or 0), captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """Byte-level, with a few merges."""
    return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """With byte fallback, and a space before the first word."""
    return ChatTokenizer.load(build_sentencepiece_tokenizer(tmp_path_factory.mktemp("spm")))
