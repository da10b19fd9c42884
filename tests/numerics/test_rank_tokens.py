"""What several processes say with one model, against one process, in float32."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
import torch

from coserve.config.settings import SamplingConfig
from coserve.engine.generation import Generator
from coserve.runtime.loaded import load_model
from tests.tiny_directory import build_tiny_directory


@pytest.mark.full
@pytest.mark.parametrize(("family", "size"), [("qwen2", 2), ("qwen3", 2), ("smollm2", 3)])
def test_greedy_tokens_are_those_of_one_rank(tmp_path: Path, family: str, size: int) -> None:
    """SmolLM2 has 9 query and 3 key-value heads: 3 is the only number of ranks beside 1."""
    torch.set_num_threads(1)
    name = None if family == "smollm2" else str(build_tiny_directory(tmp_path / family, family))
    found = []
    for ranks in (1, size):
        with closing(load_model(name, device="cpu", dtype="float32", tensor_parallel_size=ranks)) as model:
            prompts = [model.tokenizer.encode(text) for text in ("The tower by the harbour", "Two and two", "A")]
            found.append(Generator(model).generate(prompts, SamplingConfig(temperature=0, max_tokens=32)))
    assert found[1] == found[0]
