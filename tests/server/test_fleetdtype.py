"""One dtype for all replicas of a fleet."""

from __future__ import annotations

from pathlib import Path

import pytest

from coserve.core import NotFound
from coserve.kernels.processor import Bfloat16Products
from coserve.runtime import loaded
from coserve.server.replicas.fleetdtype import with_settled_dtype
from coserve.server.settings import ServerConfig
from tests.tiny_directory import build_tiny_directory


def test_auto_becomes_what_the_commands_machine_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(model=str(build_tiny_directory(tmp_path / "tiny")))
    lines: list[str] = []
    monkeypatch.setattr(loaded, "bfloat16_products", lambda: Bfloat16Products(True, "it multiplies it"))
    for speed, dtype in ((2.0, "bfloat16"), (0.5, "float32")):
        monkeypatch.setattr(loaded, "bfloat16_speed", lambda speed=speed: speed)
        assert with_settled_dtype(config, lines.append).dtype == dtype
        assert lines[-1].startswith(f"{dtype}: ")
    named = ServerConfig(model="./nowhere", dtype="float64")
    assert with_settled_dtype(named, lines.append) is named
    with pytest.raises(NotFound, match="nowhere"):
        with_settled_dtype(ServerConfig(model="./nowhere"), lines.append)
