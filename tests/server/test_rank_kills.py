"""A server whose model two processes share, when one of them dies or hangs: the service comes back, and jobs go on.

What counts is as in test_kills.py, whose settings (COSERVE_KILLS, COSERVE_KILL_SEED) hold here too, for half as many kills:
a start takes twice as long.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import RunningServer, StartServer, children, is_alive, wait_until
from tests.server.test_kills import KILLS, SEED, Jobs, kill, undisturbed

pytestmark = pytest.mark.full
RANK_KILLS = (KILLS + 1) // 2
RANKS = ("--tensor-parallel-size", "2")


def rank_pid(server: RunningServer) -> int:
    """Of the second rank, a child of the engine's process, once it is there."""
    def ranks() -> list[int]:
        return [rank for engine in children(server.pid) for rank in children(engine)]

    wait_until(lambda: len(ranks()) == 1, 90)
    return ranks()[0]


def answer(server: RunningServer) -> str:
    body = {"model": server.model_name, "prompt": "The tower", "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_a_killed_rank_is_named_and_the_service_comes_back(start_server: StartServer) -> None:
    server = start_server(*RANKS)
    before, rank = answer(server), rank_pid(server)
    engine = server.engine_pid
    kill(rank)
    wait_until(lambda: not is_alive(engine), 15)
    ranks = [rank_pid(server)]
    wait_until(lambda: server.is_ready, 60)
    assert "rank 1 ended by signal 9" in server.log
    assert answer(server) == before
    assert server.stop() == 0, server.log
    wait_until(lambda: not any(map(is_alive, ranks)), 10)
    assert "Traceback" not in server.log


def test_a_rank_that_hangs_is_noticed_and_ended(start_server: StartServer) -> None:
    """The system kills it with the engine's process, though it is stopped."""
    server = start_server(*RANKS, "--watchdog-timeout", "3")
    before, rank, engine = answer(server), rank_pid(server), server.engine_pid
    os.kill(rank, signal.SIGSTOP)
    body = {"model": server.model_name, "prompt": "The tower", "max_tokens": 8}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 503
    wait_until(lambda: not is_alive(rank), 15)
    wait_until(lambda: bool({*server.engine_pids} - {engine}), 60)
    wait_until(lambda: server.is_ready, 60)
    assert answer(server) == before
    assert "it hangs" in server.log


@pytest.mark.timeout(600 + 90 * RANK_KILLS)
def test_random_kills_of_any_rank_lose_and_repeat_nothing(start_server: StartServer, tmp_path: Path) -> None:
    draw = random.Random(SEED)
    server = start_server("--deterministic", *RANKS)
    jobs, seeds = Jobs(server), iter(range(1000))
    for _ in range(RANK_KILLS):
        while len(jobs.unfinished()) < 2:
            jobs.create(next(seeds))
        time.sleep(draw.uniform(0, 4))
        rank = rank_pid(server)
        engine = server.engine_pid
        target = draw.choice(("rank", "rank", "engine", "server"))
        kill({"rank": rank, "engine": engine, "server": server.pid}[target])
        if target == "server":
            server.process.wait(10)
        wait_until(lambda: not is_alive(engine) and not is_alive(rank), 30)  # noqa: B023
        if target == "server":
            jobs.server = server = start_server("--deterministic", *RANKS, data_dir=server.data_dir)
    wait_until(lambda: not jobs.unfinished(), 300)
    expected = undisturbed(start_server, tmp_path / "reference", list(jobs.seeds.values()), *RANKS)
    for id, seed in jobs.seeds.items():
        jobs.check(id, expected[seed])
    jobs.check_disk()


def test_a_template_of_the_server_s_own_on_several_ranks(start_server: StartServer) -> None:
    """The ranks know the model by its identity, so the template must not make another model of it."""
    server = start_server(*RANKS, "--chat-template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    body = {"messages": [{"role": "user", "content": "The tower"}], "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert response.json()["choices"][0]["message"]["content"] == answer(server)
