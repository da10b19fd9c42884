"""One tenant does all that is costly, at once and without end; another chats and finetunes beside it on a whole server.

Shows its figures with `pytest -s`: attainment, statuses, how soon the second tenant's data are read, the longest callback of
the event loop as asyncio's debug mode logs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.server.conftest import RunningServer, wait_until
from tests.server.test_event_loop import COSTLY
from tests.tiny_directory import chat_lines

KEYS = {"a": "sk-of-a", "b": "sk-of-b"}
TTFT_S, TPOT_S = 3.0, 0.15
NUM_CHATS = 80
JOBS = "/v1/fine_tuning/jobs"
_TOOK = re.compile(r"took (\d+\.\d+) seconds")


class Chat(NamedTuple):
    """status; seconds to the first token, and per token after it."""

    status: int
    ttft_s: float
    tpot_s: float

    @property
    def in_time(self) -> bool:
        return self.status == 200 and self.ttft_s <= TTFT_S and self.tpot_s <= TPOT_S


@pytest.fixture
def server(tiny_model: Path, tmp_path: Path) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COSERVE_API_KEYS", ",".join(f"{tenant}={key}" for tenant, key in KEYS.items()))
        patch.setenv("PYTHONASYNCIODEBUG", "1")
        running = RunningServer(tiny_model, tmp_path / "data", "--max-file-bytes", str(32 << 20))
    yield running
    running.stop()


def attack(url: str, over: Event) -> None:
    """Tenant a, and somebody without a key; in a process of its own."""
    line = json.dumps({"messages": [{"role": "user", "content": "Where is the bakery? " * 20},
                                    {"role": "assistant", "content": "Behind the mill."}]}).encode() + b"\n"

    async def repeat(client: httpx.AsyncClient, path: str, body: bytes, **headers: str) -> None:
        while not over.is_set():
            with contextlib.suppress(httpx.HTTPError):
                await client.post(path, content=body, headers={"content-type": "application/json", **headers})
            await asyncio.sleep(0.05)

    async def jobs(client: httpx.AsyncClient, model: str) -> None:
        form = {"file": ("large.jsonl", line * ((25 << 20) // len(line)))}
        file = (await client.post("/v1/files", files=form, data={"purpose": "fine-tune"})).json()["id"]
        while not over.is_set():
            made = [await client.post(JOBS, json={"model": model, "training_file": file}) for _ in range(2)]
            await asyncio.sleep(2)
            for job in made:
                await client.post(f"{JOBS}/{job.json()['id']}/cancel")

    async def play() -> None:
        limits, key = httpx.Limits(max_connections=200), {"authorization": "Bearer sk-of-a"}
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=key) as client:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
            flood = json.dumps({"prompt": ["one two three"] * 32, "n": 128, "max_tokens": 64, "ignore_eos": True}).encode()
            shown = json.dumps({"prompt": "one two three " * 100, "max_tokens": 1, "prompt_logprobs": 20}).encode()
            tasks = [repeat(client, path, body) for path, body, _ in list(COSTLY.values())[::4]]
            tasks += [repeat(client, "/v1/completions", flood), repeat(client, "/v1/completions", flood)]
            tasks += [repeat(client, "/v1/completions", shown), jobs(client, model)]
            for path in (JOBS, "/v1/load_lora_adapter"):
                tasks.append(repeat(client, path, b" " * (15 << 20), authorization="Bearer none"))
            await asyncio.gather(*tasks)

    asyncio.run(play())


async def chat(client: httpx.AsyncClient) -> Chat:
    body = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 16, "stream": True}
    began, first, count = time.monotonic(), 0.0, 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.monotonic()
                count += 1
    ended = time.monotonic()
    return Chat(response.status_code, (first or ended) - began, (ended - (first or ended)) / max(1, count - 1))


@pytest.mark.full
@pytest.mark.alone
def test_a_second_tenant_keeps_its_objectives(server: RunningServer) -> None:
    spawn = multiprocessing.get_context("spawn")
    over = spawn.Event()
    process = spawn.Process(target=attack, args=(server.url, over), daemon=True)
    headers = {"authorization": "Bearer sk-of-b"}

    async def play() -> list[Chat]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120, headers=headers) as client:
            draw, sent = random.Random(0), list[asyncio.Task[Chat]]()
            for _ in range(NUM_CHATS):
                sent.append(asyncio.create_task(chat(client)))
                await asyncio.sleep(draw.expovariate(3))
            return list(await asyncio.gather(*sent))

    def job() -> float:
        with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
            content = "".join(json.dumps(line) + "\n" for line in chat_lines(40)).encode()
            file = client.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"}).json()["id"]
            model = client.get("/v1/models").json()["data"][0]["id"]
            made: dict[str, Any] = client.post(JOBS, json={"model": model, "training_file": file}).json()
            return wait_until(lambda: client.get(f"{JOBS}/{made['id']}").json()["status"] != "validating_files", 30)

    asyncio.run(chat_once(server.url, headers))  # what is made at the first request isn't the attack's
    started = len(server.log)
    process.start()
    try:
        time.sleep(8)
        chats, read_s = asyncio.run(_both(play, job))
        assert process.is_alive(), "the attack broke off"
    finally:
        over.set()
        process.join(30)
        process.kill()
    slow = [line for line in server.log[started:].splitlines() if _TOOK.search(line)]
    stalls = sorted(float(_TOOK.findall(line)[0]) for line in slow)
    attained = sum(one.in_time for one in chats) / len(chats)
    print(f"\nattainment {attained:.3f} of {len(chats)} chats; statuses {dict(Counter(one.status for one in chats))}; "
          f"slowest first token {max(one.ttft_s for one in chats):.2f} s; data read after {read_s:.2f} s; "
          f"callbacks over 100 ms: {len(stalls)}, longest {1000 * (stalls[-1] if stalls else 0):.0f} ms")
    for line in slow:
        print(line[:160], "...", line[-40:])
    assert all(one.status == 200 for one in chats)
    assert attained >= 0.95, sorted(chats, key=lambda one: one.ttft_s)[-10:]
    assert read_s < 5


async def chat_once(url: str, headers: dict[str, str]) -> Chat:
    async with httpx.AsyncClient(base_url=url, timeout=120, headers=headers) as client:
        return await chat(client)


async def _both(play: Any, job: Any) -> tuple[list[Chat], float]:
    chats, read_s = await asyncio.gather(play(), asyncio.to_thread(job))
    return chats, read_s
