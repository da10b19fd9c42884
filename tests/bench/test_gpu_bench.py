"""bench/gpu.sh as it runs on a GPU machine, on the CPU with a tiny model: every part gives rows, and no part fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_directory import build_tiny_directory

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("tests", "ceilings", "kernels", "row-cost", "inference", "finetune", "sharing", "peer")


def run_bench(tmp_path: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON, what was printed)."""
    output = tmp_path / "gpu.json"
    env = {**os.environ, "PYTHON": sys.executable, "COSERVE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--device", "cpu", "--quick", "--output", str(output), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=600)
    return done.returncode, json.loads(output.read_text()), done.stdout + done.stderr


@pytest.mark.full
def test_every_part_gives_rows(tmp_path: Path) -> None:
    directory = build_tiny_directory(tmp_path / "model")
    code, data, printed = run_bench(tmp_path, "--model", str(directory))
    failed = [row for row in data["results"] if "failed" in row]
    assert code == 0 and not failed, f"{failed}\n{printed[-4000:]}"
    assert {"device", "date", "versions", "command", "results"} <= data.keys() and "torch" in data["versions"]
    rows = {name: [row for row in data["results"] if row["experiment"] == name] for name in PARTS}
    assert all(len(found) >= 2 and found[0]["model"] == "model" for found in rows.values())
    assert all(row["relative_error"] < 1e-5 for row in rows["kernels"] if "relative_error" in row)
    assert {row.get("kind") for row in rows["row-cost"]} >= {"pass", "forward", "backward"}
    assert {row["kind"] for row in rows["inference"] if "kind" in row} == {"decode", "prefill"}
    (finetune,) = (row for row in rows["finetune"] if "kind" in row)
    assert finetune["finetune_tokens_per_s"] > 0 and finetune["attention_flops"] > finetune["recomputation_flops"] > 0
    sharing = {row["policy"]: row for row in rows["sharing"] if "policy" in row}
    assert sharing["coserve"]["finetune_tokens_per_s"] > 0 and sharing["coserve"]["num_requests"] >= 1
    assert "finetune_tokens_per_s" not in sharing["inference-only"]
    assert any(row.get("finetune_tokens_per_s", 0) > 0 for row in rows["peer"])


@pytest.mark.full
def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path: Path) -> None:
    code, data, _ = run_bench(tmp_path, "--model", str(tmp_path / "nowhere"), "--parts", "kernels,ceilings")
    assert code == 1
    results = data["results"]
    assert "NotFound" in results[0]["failed"] and results[0]["experiment"] == "kernels"
    assert any("matmul_flops" in row for row in results)


@pytest.mark.full
def test_what_has_no_time_left_says_so(tmp_path: Path) -> None:
    code, data, _ = run_bench(tmp_path, "--parts", "kernels", "--budget-s", "0")
    assert code == 0 and data["results"][0]["skipped"] == "no time left"
