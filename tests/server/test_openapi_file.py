"""docs/openapi.json is what the server says of itself."""

from __future__ import annotations

import json
from pathlib import Path

from coserve.server.app import create_app
from coserve.server.settings import ServerConfig

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_file_is_the_servers_own_description() -> None:
    described = create_app(ServerConfig()).openapi()
    assert json.loads(FILE.read_text(encoding="utf-8")) == described, "run `make openapi`"
