"""Where coserve keeps what it can make again: converted models, measured profiles, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "COSERVE_CACHE"


def cache_directory() -> Path:
    """$COSERVE_CACHE, else coserve under $XDG_CACHE_HOME, else under ~/.cache. It may not exist yet."""
    root = os.environ.get(CACHE_VARIABLE)
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coserve"
