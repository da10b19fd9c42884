"""How vLLM is started on a CPU: from a virtual environment of its own, tied to processors.

Owns: its command, its variables, its versions. Does not own: the process (servers.py).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from coserve.core import ConfigError, one_line

MAX_MODEL_LEN = 2048
_VARIABLES = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_CPU_KVCACHE_SPACE": "2"}
_VERSIONS = "from importlib.metadata import version as v; print(v('vllm'), v('torch'))"
_MOST = 200
"""Characters of an error that are quoted."""


def vllm_command(environment: Path, model: Path, dtype: str) -> list[str]:
    """Of a server of a model directory, without its port."""
    return [str(environment / "bin" / "vllm"), "serve", str(model), "--dtype", dtype, "--max-model-len", str(MAX_MODEL_LEN),
            "--host", "127.0.0.1"]


def vllm_variables(cores: Sequence[int]) -> dict[str, str]:
    """This process's variables and vLLM's own: a thread of OpenMP on each of the processors, and no reports to others."""
    return {**_own_variables(), **_VARIABLES, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def vllm_versions(environment: Path) -> dict[str, str]:
    """Of vLLM and its torch. Raises ConfigError for an environment that has none."""
    if not (environment / "bin" / "vllm").is_file():
        raise ConfigError(
            f"--vllm: {environment} has no bin/vllm; give a virtual environment in which vLLM for CPUs is installed, or leave "
            "the option out", param="vllm",
        )
    python = environment / "bin" / "python"
    try:
        done = subprocess.run(
            [python, "-c", _VERSIONS], env=_own_variables(), check=True, capture_output=True, text=True, timeout=120)
        vllm, its_torch = done.stdout.split()
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        last = str(said).strip().splitlines()[-1:] or ["nothing"]
        raise ConfigError(
            f"--vllm: {python} can't tell its versions of vllm and torch ({one_line(ValueError(last[0]), _MOST)})", param="vllm"
        ) from error
    return {"vllm": vllm, "vllm's torch": its_torch}


def _own_variables() -> Mapping[str, str]:
    """Without the path of this process's packages, which are not for another environment."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
