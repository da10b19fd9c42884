"""Every wrong training file that the server's tests know is refused by the reader too, and a check of it goes to its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from coserve.config.settings import FinetuneConfig
from coserve.core import InvalidRequest
from coserve.finetune.datacheck import check_data
from coserve.finetune.datasets import load_training
from coserve.text.tokenizer import ChatTokenizer
from tests.server.badfiles import BadFile, training_files

_SMALL = 50_000
"""Bytes; a server reads the larger ones too, in tests/server/test_malformed.py."""


def config_of(bad: BadFile) -> FinetuneConfig:
    return FinetuneConfig(objective="dpo" if "dpo" in str(bad.method) else "sft")


def test_wrong_files(tokenizer: ChatTokenizer, tmp_path: Path) -> None:
    path, count = tmp_path / "train.jsonl", 0
    for bad in (one for one in training_files() if len(one.content) < _SMALL):
        path.write_bytes(bad.content)
        with pytest.raises(InvalidRequest) as caught:
            load_training(path, tokenizer, config_of(bad), max_length=512)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 1000, bad.name
        assert bad.line is None or f"line {bad.line}:" in message, (bad.name, message)
        found = check_data(path, tokenizer, config_of(bad), max_length=512, num_shown=2, max_chars=500)
        assert found.num_problems, bad.name
        told = found.problems[0]
        assert told.message in message or "no usable example" in message, (bad.name, told, message)
        assert bad.line is None or told.line == bad.line, bad.name
        count += 1
    assert count > 350
