"""Tiny models run on one thread: faster, and indifferent to what else the machine does. Real ones take all (default_model)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coserve.engine.model import LoadedModel
from tests.tiny_engine import MakeEngine, tracked_engines


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def engines(model: LoadedModel) -> Iterator[MakeEngine]:
    """Makes engines for the test file's own `model`."""
    yield from tracked_engines(model)
