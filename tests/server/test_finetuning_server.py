"""Jobs on whole servers that die at chosen moments: while paused, and while a cancellation waits.

Random moments: test_kills.py.
"""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import RunningServer, StartServer, single_server, wait_until
from tests.tiny_directory import chat_lines

pytestmark = pytest.mark.full
STEPS = 120


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=8, timeout=30)


def start_job(server: RunningServer, **extra: Any) -> str:
    client = client_of(server)
    data = "".join(json.dumps(line) + "\n" for line in chat_lines(40)).encode()
    file = client.files.create(file=("facts.jsonl", data), purpose="fine-tune")
    body = {"rank": 4, "max_steps": STEPS, "checkpoint_steps": 7, **extra}
    return client.fine_tuning.jobs.create(
        model=server.model_name, training_file=file.id, seed=1, hyperparameters={"batch_size": 4}, extra_body=body).id


def step_of(server: RunningServer, job: str) -> int:
    """Its step; -1 while the server doesn't answer."""
    try:
        found = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job}", timeout=5).json()
        return STEPS if found["status"] == "succeeded" else int(found["step"])
    except (httpx.HTTPError, KeyError):
        return -1


def finish(server: RunningServer, job: str) -> None:
    """Waits for success, and for a model that answers; each step was told once."""
    client = client_of(server)
    wait_until(lambda: client.fine_tuning.jobs.retrieve(job).status not in ("queued", "running", "validating_files"), 120)
    done = client.fine_tuning.jobs.retrieve(job)
    assert done.status == "succeeded", done
    events = [event for event in client.fine_tuning.jobs.list_events(job, limit=100) if event.type == "metrics"]
    assert sorted(event.data["step"] for event in events) == list(range(1, STEPS + 1))  # type: ignore[index]
    assert client.chat.completions.create(
        model=done.fine_tuned_model or "", messages=[{"role": "user", "content": "Where?"}], max_tokens=2).choices


@single_server
def test_a_damaged_checkpoint_is_passed_over(start_server: StartServer) -> None:
    server = start_server("--deterministic")
    job = start_job(server)
    wait_until(lambda: step_of(server, job) >= 20, 120)
    client_of(server).fine_tuning.jobs.pause(job)
    server.process.kill()
    server.process.wait()
    time.sleep(0.5)
    newest = sorted(server.data_dir.glob(f"jobs/{job}/output/checkpoints/step-*"))[-1]
    (newest / "optimizer.safetensors").write_bytes(b"nothing")
    server = start_server("--deterministic", data_dir=server.data_dir)
    client = client_of(server)
    assert client.fine_tuning.jobs.retrieve(job).model_extra["paused"]  # type: ignore[index]
    client.fine_tuning.jobs.resume(job)
    finish(server, job)
    warnings = [event.message for event in client.fine_tuning.jobs.list_events(job, limit=100) if event.level == "warn"]
    assert any("is damaged" in warning and "using the one before" in warning for warning in warnings), warnings


def test_cancelling_while_the_engine_is_down(start_server: StartServer) -> None:
    server = start_server()
    job = start_job(server)
    wait_until(lambda: step_of(server, job) >= 10, 120)
    server.kill_engine()
    assert client_of(server).fine_tuning.jobs.cancel(job).status == "cancelled"
    wait_until(lambda: server.is_ready, 120)
    step = step_of(server, job)
    time.sleep(1)
    assert client_of(server).fine_tuning.jobs.retrieve(job).status == "cancelled"
    assert step_of(server, job) == step
