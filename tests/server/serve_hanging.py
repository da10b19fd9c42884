"""`coserve serve` whose engine process is tests/server/hanging_engine.py."""

from __future__ import annotations

from coserve.cli.main import main
from coserve.server.link import process

if __name__ == "__main__":
    process.ENGINE_MODULE = "tests.server.hanging_engine"
    main()
