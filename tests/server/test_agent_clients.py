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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.agent_clients import CASES
from tests.server.conftest import RunningServer, wait_until
from tests.tiny_directory import build_tiny_directory

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("agent_clients.py")
PYTHON = Path(os.environ.get("COSERVE_AGENTS_PYTHON", ROOT / ".venv-agents" / "bin" / "python"))
"""Of the environment with these clients."""
TIME_S = 600.0
"""For all cases, which take less than a tenth of it on two idle cores."""


LEAVER = """
import os, sys, openai
url, model = sys.argv[1:]
tool = {"type": "function", "function": {"name": "note", "parameters": {
    "type": "object", "properties": {"text": {"type": "string", "minLength": 3000}}, "required": ["text"]}}}
for chunk in openai.OpenAI(base_url=url, api_key="EMPTY").chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Hi"}], tools=[tool], tool_choice="required", stream=True,
):
    for call in chunk.choices[0].delta.tool_calls or []:
        print(call.function.arguments, flush=True)
"""
"""Reads a call that is long."""


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
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    running = RunningServer(model, root / "data")
    yield running
    assert running.stop() == 0, running.log


@pytest.fixture(scope="module")
def outcomes(server: RunningServer) -> dict[str, str | None]:
    """{case: its traceback, None if it went well}, of the cases that could run: each environment's in one process."""
    programs = []
    for python in dict.fromkeys(map(python_with, dict.fromkeys(module for module, _ in CASES.values()))):
        if python is not None:
            names = [name for name, (module, _) in CASES.items() if python_with(module) == python]
            programs.append((names, subprocess.Popen(
                [python, str(PROGRAM), f"{server.url}/v1", server.model_name, *names],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )))
    found: dict[str, str | None] = {}
    until = time.monotonic() + TIME_S
    for names, program in programs:
        try:
            output, errors = program.communicate(timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            program.kill()
            output, errors = program.communicate()
            errors += f"\nnot within {TIME_S:g} s"
        found |= dict.fromkeys(names, errors[-4000:])
        lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"case": ')]
        found |= {line["case"]: line["error"] for line in lines}
    return found


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_a_client(case: str, request: pytest.FixtureRequest) -> None:
    module, _ = CASES[case]
    if python_with(module) is None:
        pytest.skip(f"{module} is not installed; `make agents` does it")
    error = request.getfixturevalue("outcomes")[case]
    assert error is None, error


@pytest.mark.full
def test_a_client_that_is_killed_while_it_reads_a_call(server: RunningServer) -> None:
    """Its request ends with it, and the engine goes on."""
    engine = server.engine_pids
    with subprocess.Popen(
        [sys.executable, "-c", LEAVER, f"{server.url}/v1", server.model_name], stdout=subprocess.PIPE, text=True
    ) as client:
        assert client.stdout is not None and client.stdout.readline()
        assert _running(server) == 1
        client.kill()
        wait_until(lambda: _running(server) == 0, 10)
    asked: Any = {
        "model": server.model_name, "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required", "parallel_tool_calls": False,
    }
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).json()
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    assert server.engine_pids == engine


def _running(server: RunningServer) -> int:
    """Requests in the engine."""
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    return sum(int(float(line.split()[-1])) for line in lines if line.startswith("coserve_num_requests_running"))
