"""OpenMP's teams: while an engine serves, only its own thread has one."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.tiny_directory import build_tiny_directory, chat_lines, write_lines

PROGRAM = """
    import json, os, sys, threading, time
    from pathlib import Path
    import torch
    torch.set_num_threads(2)

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    def work() -> None:
        x = torch.randn(512, 512)
        for _ in range(20):
            (x @ x).exp()

    def in_thread(action) -> None:
        thread = threading.Thread(target=action)
        thread.start()
        thread.join()

    from coserve import EngineConfig, FinetuneConfig, SamplingConfig, load_model
    from coserve.engine.engine import Engine
    from coserve.engine.threads import SideThreads, give_team_back
    from coserve.scheduler.latency import LatencyModel
    model = load_model(sys.argv[1], device="cpu", dtype="float32")
    give_team_back()
    alone = threads() - len(threading.enumerate())
    found = {}
    work()
    found["multiplied"] = threads() - len(threading.enumerate()) - alone
    engine = Engine(model, EngineConfig(memory_bytes=64 << 20), latency=LatencyModel({}))
    side = SideThreads(1)
    with engine:
        found["started"] = threads() - len(threading.enumerate()) - alone
        side.submit(work).result()
        job = engine.finetune(sys.argv[2], sys.argv[3], FinetuneConfig(max_steps=2))
        engine.load_adapter("tuned", job.result(60))
        engine.generate([[1, 2, 3] * 100], SamplingConfig(max_tokens=4), adapter="tuned")
        deadline = time.monotonic() + 10
        while threads() - len(threading.enumerate()) - alone > 1 and time.monotonic() < deadline:
            time.sleep(0.01)  # the last write of the job gives its team back
        found["served"] = threads() - len(threading.enumerate()) - alone
    print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads of a process in /proc")
def test_only_the_engines_thread_keeps_a_team(tmp_path: Path) -> None:
    model = build_tiny_directory(tmp_path / "model")
    data = write_lines(tmp_path / "train.jsonl", chat_lines(8))
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    arguments = [str(script), str(model), str(data), str(tmp_path / "job")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith('{"multiplied": 1, "started": 0, "served": 1}'), done.stdout
