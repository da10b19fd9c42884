"""Reports of an engine's load on their way: asked for, merged where they can't be sent, posted at even distances."""

from __future__ import annotations

import asyncio
import queue
import time
from types import SimpleNamespace
from typing import Any

from coserve.cluster.load import Load
from coserve.engine.report import EngineReport
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.enginehost import EngineHost
from coserve.server.link.mailbox import _Batch
from coserve.server.link.messages import (
    ChargeTenants,
    EngineLoad,
    FromEngine,
    ToEngine,
    Tokens,
    WatchLoad,
    decode_from_engine,
    decode_to_engine,
    encode,
    merge_loads,
)
from coserve.server.settings import ServerConfig


def report(**changes: Any) -> EngineReport:
    fields: dict[str, Any] = {
        "queued_prompt_tokens": 0, "running": 0, "waiting": 0, "max_running": 4, "max_waiting": 4, "end_s": 0.0,
        "prefill_s_per_token": 1e-4, "iteration_s": 0.01, "output_s": 0.0, "free_blocks": 1, "num_blocks": 1,
        "block_tokens": 16, "resident": ["a"], "adapter_load_s": 0.1, "prefixes": [2**64 - 1], "headroom": 1.0,
        **changes,
    }
    return EngineReport(**fields)


def message(number: int, **changes: Any) -> EngineLoad:
    return EngineLoad(load=Load(number=number, **report(**changes)._asdict()))


def test_messages_travel() -> None:
    assert decode_from_engine(encode(message(1))) == message(1)
    for sent in (WatchLoad(every_s=0.1), ChargeTenants(tokens={"t": 5})):
        assert decode_to_engine(encode(sent)) == sent


def test_reports_that_wait_become_one() -> None:
    merged = merge_loads(message(1), message(2, prefixes=None, running=2))
    assert merged == message(2, prefixes=[2**64 - 1], running=2)
    assert merge_loads(message(1), message(2, prefixes=[7])) == message(2, prefixes=[7])
    batch = _Batch()
    for number in range(1, 5):
        batch.add(message(number))
        batch.add(Tokens(id="r", index=0, text="x", token_ids=[number], time_s=0.0))
    tokens, load = map(decode_from_engine, batch.parts())
    assert isinstance(tokens, Tokens) and tokens.token_ids == [1, 2, 3, 4]
    assert load == message(4)


def test_an_engine_reports_only_while_it_is_asked_to() -> None:
    posts, charged = queue.SimpleQueue[FromEngine](), list[Any]()
    engine: Any = SimpleNamespace(load_report=report, closed=False, charge_tenants=charged.append)
    host = EngineHost(engine, posts.put, lambda: None)
    host.on_message(ChargeTenants(tokens={"t": 1}))
    time.sleep(0.05)
    assert posts.empty() and charged == [{"t": 1}]
    host.on_message(WatchLoad(every_s=0.01))
    numbers = []
    for _ in range(3):
        load = posts.get(timeout=5)
        assert isinstance(load, EngineLoad)
        numbers.append(load.load.number)
    assert numbers == [1, 2, 3]
    host.on_message(WatchLoad(every_s=0.0))
    time.sleep(0.05)
    while not posts.empty():
        posts.get()
    time.sleep(0.05)
    assert posts.empty()
    host.on_message(WatchLoad(every_s=0.01))
    assert posts.get(timeout=5)
    engine.closed = True
    host.close()


def test_a_table_that_changes_while_it_is_read_costs_one_report() -> None:
    posts, tries = queue.SimpleQueue[FromEngine](), iter([True, False])

    def load_report() -> EngineReport:
        if next(tries, False):
            raise RuntimeError("dictionary changed size during iteration")
        return report()

    engine: Any = SimpleNamespace(load_report=load_report, closed=False)
    host = EngineHost(engine, posts.put, lambda: None)
    host.on_message(WatchLoad(every_s=0.01))
    first = posts.get(timeout=5)
    assert isinstance(first, EngineLoad) and first.load.number == 1
    engine.closed = True
    host.close()


def test_an_engine_that_starts_again_is_asked_again() -> None:
    client, sent = EngineClient(ServerConfig()), list[ToEngine]()
    supervisor: Any = client.supervisor
    supervisor.send = sent.append
    asyncio.run(supervisor._notify_up())
    assert not sent, "nobody has asked"
    client.watch_load(0.1)
    assert not sent, "there is no engine"
    supervisor.ready = True
    asyncio.run(supervisor._notify_up())
    client.watch_load(0.0)
    asyncio.run(supervisor._notify_up())
    assert sent == [WatchLoad(every_s=0.1), WatchLoad(every_s=0.0)]
    loads: list[Load] = []
    client.on_load(loads.append)
    client._on_message(message(1))
    assert [load.number for load in loads] == [1]
