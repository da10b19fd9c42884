"""Each script of examples/ runs, as somebody would run it.

COSERVE_LONG_EXAMPLES: set to run tune_for_tools.py too, which takes five minutes on two cores.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coserve import LoraConfig, load_model
from coserve.bench.servers import running_server
from coserve.peft.format import save_adapter
from coserve.peft.lora import LoraAdapter
from tests.default_model import needs_default_model

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = [pytest.mark.full, pytest.mark.alone, needs_default_model]


def output_of(name: str, *arguments: str, seconds: float = 840.0) -> str:
    """What an example prints. Fails if it does."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_chat_while_training() -> None:
    said = output_of("chat_while_training.py")
    assert said.count("base: ") == said.count("tuned:") == 3
    assert "tuned: Old Marta keeps the lighthouse." in said


def test_dpo() -> None:
    said = output_of("dpo.py")
    assert said.count("base: ") == said.count("tuned: ") == 3


def test_tuned_model_by_client(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coserve", "serve", "--data-dir", str(tmp_path / "data")]
    with running_server(command, tmp_path / "log") as server:
        said = output_of("tuned_model_by_client.py", f"{server.url}/v1")
    assert "Old Marta keeps the lighthouse." in said.partition("ft:")[2]


@pytest.mark.skipif("COSERVE_LONG_EXAMPLES" not in os.environ, reason="it takes five minutes; set COSERVE_LONG_EXAMPLES")
def test_tune_for_tools(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "coserve", "serve", "--data-dir", str(tmp_path / "data")]
    with running_server(command, tmp_path / "log") as server:
        said = output_of("tune_for_tools.py", f"{server.url}/v1")
    right = [(int(found[1]), int(found[2])) for found in re.finditer(r": (\d+) of (\d+) right", said)]
    (base, count), (tuned, _) = right
    assert base < 0.1 * count and tuned >= 0.8 * count, said


def test_serve_peft_adapter(tmp_path: Path) -> None:
    model = load_model(device="cpu")
    adapter = LoraAdapter.create(
        model.architecture, LoraConfig(r=4, alpha=8), dtype=torch.float32, device=torch.device("cpu"), seed=0
    )
    adapter.flat.copy_(0.02 * torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter, adapter.flat, base_name=model.name, fingerprint=model.fingerprint)
    said = output_of("serve_peft_adapter.py", str(tmp_path / "adapter"))
    assert "base: " in said and "mine: " in said


def test_plan_70b() -> None:
    said = output_of("plan_70b.py", "20GB")
    assert "Llama-3.1-70B" in said and "bfloat16" in said and "activation_memory" in said
