"""Reports of an engine's load on their way: asked for, sent with what leaves anyway or else by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import zmq

from coserve.cluster.load import Load
from coserve.engine.report import EngineReport
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.enginehost import EngineHost
from coserve.server.link.mailbox import EARLY, MAX_UNACKED, Mailbox
from coserve.server.link.messages import (
    Ack,
    ChargeTenants,
    EngineLoad,
    FromEngine,
    Progress,
    ToEngine,
    WatchLoad,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from coserve.server.settings import ServerConfig
from tests.server.conftest import wait_until


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


@contextlib.contextmanager
def serving(engine: Any) -> Iterator[tuple[zmq.Socket[bytes], Mailbox]]:
    """The API's end, and the mailbox at which an EngineHost of the engine works."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as api, Mailbox(
        f"tcp://127.0.0.1:{api.bind_to_random_port('tcp://127.0.0.1')}"
    ) as mailbox:
        host = EngineHost(engine, mailbox.post, mailbox.stop, mailbox.watch_load)
        thread = threading.Thread(target=mailbox.run, args=(host.on_message,), daemon=True)
        thread.start()
        yield api, mailbox
        mailbox.stop()
        thread.join(5)
        host.close()


def read(api: zmq.Socket[bytes]) -> list[FromEngine]:
    """The next batch, which is acknowledged."""
    assert api.poll(5000)
    parts = [decode_from_engine(part) for part in api.recv_multipart()]
    api.send(encode(Ack()))
    return parts


def read_numbers(api: zmq.Socket[bytes], count: int) -> list[int]:
    """Numbers of the next reports."""
    batches = [read(api) for _ in range(count)]
    return [load.load.number for (load,) in batches if isinstance(load, EngineLoad)]


def test_an_engine_reports_only_while_it_is_asked_to() -> None:
    charged = list[Any]()
    with serving(SimpleNamespace(load_report=report, charge_tenants=charged.append)) as (api, _):
        api.send(encode(ChargeTenants(tokens={"t": 1})))
        wait_until(lambda: charged == [{"t": 1}], 5)
        assert not api.poll(50)
        api.send(encode(WatchLoad(every_s=0.01)))
        assert read_numbers(api, 3) == [1, 2, 3]
        api.send(encode(WatchLoad(every_s=0.0)))
        while api.poll(300):  # what was on its way
            read(api)
        api.send(encode(WatchLoad(every_s=0.01)))
        assert read_numbers(api, 1)


def test_a_report_travels_with_what_leaves_at_about_its_time() -> None:
    with serving(SimpleNamespace(load_report=report)) as (api, mailbox):
        api.send(encode(WatchLoad(every_s=2.0)))
        mailbox.post(Progress(line="too early for one"))
        assert len(read(api)) == 1
        time.sleep(EARLY * 2.0)
        mailbox.post(Progress(line="about right"))
        line, load = read(api)
        assert isinstance(line, Progress) and isinstance(load, EngineLoad)


def test_no_report_is_made_while_it_could_not_be_sent() -> None:
    with serving(SimpleNamespace(load_report=report)) as (api, _):
        api.send(encode(WatchLoad(every_s=0.01)))
        for _ in range(MAX_UNACKED):
            assert api.poll(5000)
            api.recv_multipart()
        assert not api.poll(200)
        api.send(encode(Ack()))
        assert read_numbers(api, 1) == [MAX_UNACKED + 1]


def test_a_table_that_changes_while_it_is_read_costs_one_report() -> None:
    tries = iter([True, False])

    def load_report() -> EngineReport:
        if next(tries, False):
            raise RuntimeError("dictionary changed size during iteration")
        return report()

    with serving(SimpleNamespace(load_report=load_report)) as (api, _):
        api.send(encode(WatchLoad(every_s=0.01)))
        assert read_numbers(api, 1) == [1]


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
