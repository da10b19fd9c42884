"""Agents' clients run against a server unmodified: openai's helpers, litellm, LangChain, OpenAI's Agents SDK.

What each does is in agent_clients.py, which runs as a process: in this environment where it has the client, else in the one
that `make agents` has installed.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.agent_clients import CASES
from tests.server.conftest import RunningServer
from tests.tiny_directory import build_tiny_directory

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("agent_clients.py")
PYTHON = Path(os.environ.get("COSERVE_AGENTS_PYTHON", ROOT / ".venv-agents" / "bin" / "python"))
"""Of the environment with these clients."""


@functools.cache
def python_with(module: str) -> str | None:
    """An interpreter that has a module."""
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    if not PYTHON.exists():
        return None
    tried = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True, check=False)
    return str(PYTHON) if tried.returncode == 0 else None


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Of a tiny model with room for tools and a few turns, which its vocabulary spells in small pieces."""
    root = tmp_path_factory.mktemp("agents")
    model = build_tiny_directory(root / "tiny")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    running = RunningServer(model, root / "data")
    yield running
    assert running.stop() == 0, running.log


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_client(server: RunningServer, case: str) -> None:
    module, _ = CASES[case]
    python = python_with(module)
    if python is None:
        pytest.skip(f"{module} is not installed; `make agents` does it")
    done = subprocess.run(
        [python, str(PROGRAM), case, f"{server.url}/v1", server.model_name], capture_output=True, text=True, timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
