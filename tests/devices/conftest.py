"""Architectures of large models, read once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from coserve.model.architecture import Architecture
from tests.devices.models import CONFIGS, read_model


@pytest.fixture(scope="session")
def archs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Architecture]:
    """By the names of CONFIGS."""
    return {name: read_model(name, Path(tmp_path_factory.mktemp(name))) for name in CONFIGS}
