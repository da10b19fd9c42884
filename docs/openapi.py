"""Writes openapi.json, the description of the server's routes, beside this file: `make openapi`."""

from __future__ import annotations

import json
from pathlib import Path

from coserve.server.app import create_app
from coserve.server.settings import ServerConfig


def render() -> str:
    """The document of a server with default settings, in a fixed order of keys."""
    return json.dumps(create_app(ServerConfig()).openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("openapi.json").write_text(render(), encoding="utf-8")
