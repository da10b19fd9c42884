"""The command `coserve`, called in this process; tiny tokenizers of the two kinds."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from coserve.cli import main as cli
from coserve.cli.settings import read_settings
from coserve.config.settings import FinetuneConfig
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_tokenizer import build_sentencepiece_tokenizer, build_tiny_tokenizer


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def config_of(path: Path | None, given: dict[str, Any], kind: str | None = None) -> FinetuneConfig:
    """The settings of a job that a settings file and flags ask for."""
    return read_settings(path, given, kind).config


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
