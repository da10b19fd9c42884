"""bench/true_size.py with few layers of small widths: every part gives a row, whose figures are what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.default_model import needs_bfloat16, needs_default_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
@needs_default_model
@needs_bfloat16
def test_every_part_gives_a_row(tmp_path: Path) -> None:
    """Weights are so few that memory tells nothing here: it is the libraries'."""
    output = tmp_path / "true_size.json"
    env = {**os.environ, "COSERVE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, str(ROOT / "bench" / "true_size.py"), "--quick", "--directory", str(tmp_path / "models"),
        "--output", str(output),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rows = {row["part"]: row for row in json.loads(output.read_text())["results"]}
    assert list(rows) == ["load", "tokens", "gradients", "steps", "serve", "qwen"]
    assert rows["tokens"]["equal"] + rows["tokens"]["near_ties"] == rows["tokens"]["tokens"] == 64
    assert rows["gradients"]["error"] <= 2 * rows["gradients"]["error_of_peft"] < 0.05
    assert rows["serve"]["job"]["status"] == "succeeded" and rows["serve"]["chat_beside_job_s"]
    assert all(rows[part]["peak_bytes"] > 0 for part in ("steps", "serve", "qwen"))
