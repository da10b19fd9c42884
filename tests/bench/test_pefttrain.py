"""The trainer with transformers + peft, on a tiny model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from coserve.bench.pefttrain import PeftPeer, train
from coserve.config.settings import FinetuneConfig
from coserve.finetune.datasets import load_training
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_directory import build_tiny_directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_directory(tmp_path_factory.mktemp("peft") / "model")


def test_it_tells_of_the_tokens_of_each_micro_batch_without_padding(model: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    texts = ["one two three four five six seven", "eight", "nine ten", "eleven twelve thirteen"]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train(model, data, output, dtype=torch.float32, batch_size=4, micro_batch=2, num_steps=2)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    total = load_training(data, ChatTokenizer.load(model), FinetuneConfig(), max_length=512).report.num_tokens
    assert len(lines) == 4 and lines[1]["tokens"] == total and lines[3]["tokens"] == 2 * total
    assert lines[0]["tokens"] < total / 2, "the shortest examples come first, together"
    assert all(a["time_s"] < b["time_s"] for a, b in itertools.pairwise(lines))


def test_micro_batches_of_any_size_make_the_same_step(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": "word " * count}) + "\n" for count in (3, 9, 5)))
    groups = load_training(data, ChatTokenizer.load(model), FinetuneConfig(), max_length=512).groups
    examples = [example for group in groups for example in group.examples]
    losses = []
    for size in (1, 2, 3):
        torch.manual_seed(0)
        peer = PeftPeer(model)
        losses.append([peer.step(examples, size) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[0][2] < losses[0][0], "it learns"
