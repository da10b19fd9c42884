"""Tests of Triton kernels on CPU tensors, through Triton's interpreter.

The interpreter has to be chosen before Triton is first imported, and would spoil a process that uses a device. So one test of
such a file runs the file again in a process of its own (`run_in_the_interpreter`), and its tests marked `interpreted` skip
anywhere else.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from coserve.kernels import triton as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not kernels.available(), reason="needs triton")
interpreted = pytest.mark.skipif(not (INTERPRETED and kernels.available()), reason="run by test_all_in_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETED, reason="has nothing to interpret")
LIMIT_S = 840


def run_in_the_interpreter(file: str, **environment: str) -> None:
    """Runs a file's tests again, in the interpreter."""
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(file).relative_to(root))]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def import_without_triton(*modules: str) -> None:
    """Imports modules of `coserve.kernels.triton` where there is no Triton."""
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "from coserve.kernels import triton as kernels\n"
        f"from coserve.kernels.triton import {', '.join(modules)}\n"
        "assert not kernels.available()"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(kernels.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
