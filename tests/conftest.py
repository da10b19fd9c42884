"""Tiny models run on one thread: faster, and indifferent to what else the machine does. Real ones take all (default_model)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from coserve.runtime.loaded import LoadedModel
from tests.tiny_engine import MakeEngine, build_model, tracked_engines


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model. A file, or a folder's conftest, may have another one under this name."""
    return build_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def engines(model: LoadedModel) -> Iterator[MakeEngine]:
    """Makes engines for the `model` that the test file sees."""
    yield from tracked_engines(model)
