"""The pool of engines: where requests go, and how they go on when a replica dies, hangs, ends or is cut off. Replicas are links
of this process over real sockets; their engines are played."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import zmq.asyncio

from coserve.cluster.load import Load
from coserve.config.settings import SamplingConfig
from coserve.core import CapacityError, CoserveError, InvalidRequest, Slo
from coserve.scheduler.prefixhash import prompt_hashes
from coserve.server.errors import EngineUnavailable, StorageRefused
from coserve.server.link.messages import AdapterRef, Generate, Ready, Tokens
from coserve.server.link.streams import RequestStream, StreamMaker
from coserve.server.replicas import links, members, pool
from coserve.server.replicas.members import Member, OwnRow, describe_engine
from coserve.server.replicas.pool import EnginePool
from coserve.server.replicas.replicalink import ReplicaLink
from coserve.server.replicas.wire import Door, KeyPair, ServerSocket
from coserve.server.stats.fleetstats import merge_stats

INFO = Ready(
    model="m", directory="/nowhere", fingerprint="f", architecture="llama", num_parameters=1, vocab_size=100, max_model_len=100,
    device="cpu", dtype="float32", threads=1, memory={}, objectives=Slo(tpot_s=float("inf"), ttft_s=1.0), start_s=0.0,
)
LOAD = Load(prefill_s_per_token=1e-5, iteration_s=1e-3, free_blocks=10, num_blocks=10, block_tokens=16)


def token(seed: int, position: int) -> int:
    """What every engine gives there."""
    return (seed * 31 + position * 7) % 97


class PlayedEngine:
    """Gives a token every pace_s, from what was emitted on. hold: gives none. broken: every request is refused by it.
    fate: every request fails by it once it was taken. num_refused: how many were refused."""

    def __init__(self) -> None:
        self.ready, self.info, self.generation = True, INFO, 1
        self.supervisor = SimpleNamespace(num_restarts=0, trouble=None)
        self.asked: list[Generate] = []
        self.pace_s, self.hold, self.num_refused = 0.002, False, 0
        self.broken: CoserveError | None = None
        self.fate: CoserveError | None = None
        self.streams: list[RequestStream] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def stats(self) -> dict[str, Any]:
        return {"running": 1, "memory": {"used": 1, "block_bytes": 4}}

    def charge_tenants(self, tokens: dict[str, int]) -> None:
        """Every second; nobody has turns here."""

    def relay(self, message: Generate, make: StreamMaker) -> RequestStream:
        if self.broken is not None:
            self.num_refused += 1
            raise self.broken
        self.asked.append(message)
        stream = make(message.id, message.sampling.n, lambda _: None)
        self.streams.append(stream)
        if self.fate is not None:
            asyncio.get_running_loop().call_soon(stream.fail, self.fate)
            return stream
        task = asyncio.get_running_loop().create_task(self._run(message, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def die(self) -> None:
        """Fails all requests, and refuses those that follow, as while another process starts."""
        self.broken = EngineUnavailable("the engine process is being started again")
        for stream in self.streams:
            if not stream.ended:
                stream.fail(EngineUnavailable("the engine process died"))

    def end_cancelled(self) -> None:
        """Ends all requests as an engine does that ends by itself: the last tokens come with the end."""
        for message, stream in zip(self.asked, self.streams, strict=True):
            if not stream.ended:
                stream.push(Tokens(id=message.id, index=0, text="last", token_ids=[96], finish_reason="cancelled", time_s=0.0))
        self.broken = EngineUnavailable("the engine ends")

    async def _run(self, message: Generate, stream: RequestStream) -> None:
        most = message.sampling.max_tokens
        emitted = message.emitted or [[] for _ in range(message.sampling.n)]
        for index, given in enumerate(emitted):
            for position in range(len(given), most):
                while self.hold:
                    await asyncio.sleep(0.001)
                await asyncio.sleep(self.pace_s)
                if stream.ended:
                    return
                id = token(message.sampling.seed + index, position)
                stream.push(Tokens(
                    id=message.id, index=index, text=f"{id} ", token_ids=[id], time_s=asyncio.get_running_loop().time(),
                    finish_reason="length" if position == most - 1 else None,
                ))


class Played:
    """One replica."""

    def __init__(self, context: zmq.asyncio.Context, number: int, info: Ready = INFO) -> None:
        self.engine, self.keys, self.nudged = PlayedEngine(), KeyPair.make(), list[str]()
        self.ensured: list[AdapterRef] = []
        self.load, self.missing = LOAD, False
        self.refuses_after_s: float | None = None

        async def ensure(ref: AdapterRef) -> None:
            self.ensured.append(ref)
            if self.missing:  # as when the store doesn't answer
                await asyncio.Event().wait()
            if self.refuses_after_s is not None:
                await asyncio.sleep(self.refuses_after_s)
                raise StorageRefused("the store is away")

        self.socket = ServerSocket(context, "127.0.0.1", self.keys, lambda peer, data: self.link.on_message(peer, data))
        engine: Any = self.engine
        self.link = ReplicaLink(
            engine, ensure=ensure, nudge=self.nudged.append, send=self.socket.send_to
        )
        self.member = Member(
            id=f"replica-{number}", kind="engine", address=self.socket.address, public_key=self.keys.public.decode(),
            node="here", info=describe_engine(info),
        )
        self.number, self.frozen = 0, False
        self.reader = asyncio.create_task(self.socket.read())
        self.beater = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        while True:
            self.number += 1
            self.link.on_load(msgspec.structs.replace(self.load, number=self.number))
            await asyncio.sleep(0.02)

    def freeze(self) -> None:
        """As SIGSTOP: nothing is read or said any more."""
        self.reader.cancel()
        self.beater.cancel()
        self.engine.hold = self.frozen = True

    def thaw(self) -> None:
        self.engine.hold = self.frozen = False
        self.reader, self.beater = asyncio.create_task(self.socket.read()), asyncio.create_task(self._beat())

    async def close(self) -> None:
        self.freeze()
        await asyncio.gather(self.reader, self.beater, return_exceptions=True)
        await self.link.close()
        self.socket.close()


class Site:
    """A pool over so many replicas."""

    def __init__(self) -> None:
        self.replicas: list[Played] = []
        self.lines: list[str] = []
        self.away = False  # the database by which keys are known

    async def open(self, stack: AsyncExitStack, count: int) -> None:
        context: zmq.asyncio.Context = zmq.asyncio.Context()
        stack.callback(context.destroy, linger=0)
        self.keys, self.context = KeyPair.make(), context

        async def knows(key: str) -> bool:
            if self.away:
                raise StorageRefused("the index's database can't be reached; try again")
            return key == self.keys.public.decode()

        door = Door(context, knows)
        door.start()
        stack.callback(door.stop)
        self.pool = EnginePool(self.keys, Path("/model"), report=self.lines.append)
        stack.push_async_callback(self.pool.stop)
        for number in range(count):
            replica = Played(context, number)
            self.replicas.append(replica)
            stack.push_async_callback(replica.close)
        self.pool.start()
        self.see()
        await until(lambda: sum(state["ready"] for state in self.pool.states()) == count)
        await asyncio.sleep(0.05)  # for reports

    def see(self) -> None:
        """Tells the pool of all replicas."""
        self.pool.see([replica.member for replica in self.replicas])

    @property
    def busy(self) -> Played:
        """The replica that works on a request."""
        return next(replica for replica in self.replicas if replica.link.num_requests and not replica.frozen)

    def ask(
        self, tokens: int = 40, seed: int = 1, n: int = 1, prompt: Sequence[int] = (1, 2, 3), **fields: Any
    ) -> RequestStream:
        return self.pool.generate(prompt_ids=prompt, sampling=SamplingConfig(max_tokens=tokens, seed=seed, n=n), **fields)


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def collect(stream: RequestStream) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    async for chunk in stream:
        found.setdefault(chunk.index, []).extend(chunk.token_ids)
    return [found[index] for index in sorted(found)]


def expected(tokens: int = 40, seed: int = 1, n: int = 1) -> list[list[int]]:
    return [[token(seed + index, position) for position in range(tokens)] for index in range(n)]


def run(count: int, story: Callable[[Site], Awaitable[None]]) -> None:
    async def tell() -> None:
        async with AsyncExitStack() as stack:
            site = Site()
            await site.open(stack, count)
            await story(site)

    asyncio.run(tell())


def test_requests_are_spread_and_answered() -> None:
    async def story(site: Site) -> None:
        answers = await asyncio.gather(*(collect(site.ask(seed=seed)) for seed in range(20)))
        assert answers == [expected(seed=seed) for seed in range(20)]
        assert all(len(replica.engine.asked) > 3 for replica in site.replicas)
        assert site.pool.info.directory == "/model", "the model's files are looked for on this machine"
        stats = await site.pool.stats_by_replica()
        assert merge_stats(list(stats.values())) == {"running": 2, "memory": {"used": 2, "block_bytes": 4}}

    run(2, story)


def test_a_request_goes_on_when_its_replica_freezes_and_a_zombie_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOST_S", 0.5)
    monkeypatch.setattr(pool, "LOOK_EVERY_S", 0.02)

    async def story(site: Site) -> None:
        stream = site.ask(n=2)
        first = [await anext(stream), await anext(stream)]
        frozen = site.busy
        frozen.freeze()
        rest: dict[int, list[int]] = {}
        for chunk in first:
            rest.setdefault(chunk.index, []).extend(chunk.token_ids)
        other = next(replica for replica in site.replicas if replica is not frozen)
        thawed = False
        async for chunk in stream:
            rest.setdefault(chunk.index, []).extend(chunk.token_ids)
            if other.engine.asked and not thawed:
                frozen.thaw()
                thawed = True
        assert [rest[0], rest[1]] == expected(n=2)
        assert other.engine.asked[0].emitted[0][:2] == expected()[0][:2]
        await until(lambda: not frozen.link.num_requests)

    run(2, story)


def test_a_request_whose_replicas_are_lost_again_and_again_is_not_taken_for_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOST_S", 0.5)
    monkeypatch.setattr(pool, "LOOK_EVERY_S", 0.02)

    async def story(site: Site) -> None:
        stream = site.ask(tokens=200)
        found = [*(await anext(stream)).token_ids]
        for _ in range(3):
            frozen = site.busy
            frozen.freeze()
            await until(lambda: any(one.link.num_requests for one in site.replicas if one.engine.hold is False))
        found += [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
        assert [found] == expected(tokens=200)

    run(4, story)


def test_a_request_that_is_cancelled_at_once_never_runs() -> None:
    async def story(site: Site) -> None:
        await site.ask().aclose()  # both messages travel as one
        await collect(site.ask(tokens=2))
        await asyncio.sleep(0.05)
        assert len(site.replicas[0].engine.asked) == 1 and not site.replicas[0].link.num_requests

    run(1, story)


def test_a_replica_whose_words_cannot_be_read_is_connected_to_anew() -> None:
    async def story(site: Site) -> None:
        replica = site.replicas[0]
        replica.socket.send_to(next(iter(replica.link._watchers)), b"\xff")
        await until(lambda: not site.pool.states())
        site.pool.see([replica.member])
        await until(lambda: site.pool.ready)
        assert await collect(site.ask()) == expected()

    run(1, story)


def test_a_request_under_which_two_engines_die_ends() -> None:
    async def story(site: Site) -> None:
        for replica in site.replicas:
            replica.engine.fate = EngineUnavailable("the engine process died")
        with pytest.raises(EngineUnavailable, match="died"):
            await collect(site.ask())
        assert sum(len(replica.engine.asked) for replica in site.replicas) == 2

    run(3, story)


def test_an_engine_that_dies_loses_no_stream_and_is_not_asked_before_it_is_back() -> None:
    """The replica's last beat says that it takes requests, and that it has the prompt in its cache."""

    async def story(site: Site) -> None:
        prompt = list(range(64))
        first, other = site.replicas
        first.load = msgspec.structs.replace(LOAD, prefixes=list(prompt_hashes("", None, prompt, LOAD.block_tokens)))
        await asyncio.sleep(0.1)
        streams = [site.ask(prompt=prompt, seed=seed) for seed in range(8)]
        taken = [await anext(stream) for stream in streams]
        assert first.link.num_requests > 4, "the prefix draws requests there"
        first.beater.cancel()  # no beat tells of it
        first.engine.die()
        answers = await asyncio.gather(*map(collect, streams))
        assert [[chunk.token_ids + rest[0]] for chunk, rest in zip(taken, answers, strict=True)] == [
            expected(seed=seed) for seed in range(8)
        ]
        assert len(other.engine.asked) == 8 and not first.engine.num_refused

    run(2, story)


def test_tokens_that_come_with_an_engines_end_come_again_elsewhere() -> None:
    async def story(site: Site) -> None:
        stream = site.ask()
        found = [*(await anext(stream)).token_ids]
        busy = site.busy
        busy.engine.hold = True
        await asyncio.sleep(0.05)
        busy.engine.end_cancelled()
        found += [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
        assert [found] == expected()

    run(2, story)


@pytest.mark.parametrize("stopped", [False, True], ids=["it can't bring the adapter", "the store doesn't answer"])
def test_a_moved_request_goes_on_where_its_adapter_can_be_had(monkeypatch: pytest.MonkeyPatch, stopped: bool) -> None:
    monkeypatch.setattr("coserve.server.replicas.replicalink.MOVED_FETCH_S", 0.2)

    async def story(site: Site) -> None:
        stream = site.ask(tokens=200, adapter=AdapterRef(name="t/x@1", uri="adapters/x", sha256="0"))
        found = [*(await anext(stream)).token_ids]
        busy = site.busy
        second = next(replica for replica in site.replicas if replica is not busy)
        second.missing, second.engine.broken = stopped, StorageRefused("the store is away")
        await asyncio.sleep(0.05)
        for replica in site.replicas:  # the second one is preferred
            replica.load = msgspec.structs.replace(LOAD, resident=["t/x@1"] if replica is second else [])
        await asyncio.sleep(0.1)
        busy.engine.die()
        found += [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
        assert [found] == expected(tokens=200)
        assert second.ensured and not second.engine.asked

    run(3, story)


@pytest.mark.parametrize("name", ["broken", "fate"])
def test_what_one_replica_has_no_room_for_goes_to_another_and_is_refused_at_once_if_none_has(name: str) -> None:
    async def story(site: Site) -> None:
        for replica in site.replicas[:2]:
            setattr(replica.engine, name, CapacityError("the queue is full", param="max_waiting"))
        assert await asyncio.gather(*(collect(site.ask(seed=seed)) for seed in range(9))) == [
            expected(seed=seed) for seed in range(9)
        ]
        setattr(site.replicas[2].engine, name, CapacityError("the queue is full", param="max_waiting"))
        began = asyncio.get_running_loop().time()
        with pytest.raises(CapacityError, match="full"):
            await collect(site.ask())
        assert asyncio.get_running_loop().time() - began < 0.2

    run(3, story)


def test_a_replica_whose_engine_says_nothing_gives_its_requests_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coserve.server.replicas.replicalink.SILENT_S", 0.3)

    async def story(site: Site) -> None:
        stream = site.ask(tokens=100)
        found = [*(await anext(stream)).token_ids]
        busy = site.busy
        beats = asyncio.create_task(busy.link.beat())
        busy.beater.cancel()
        busy.engine.hold = True
        found += [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
        assert [found] == expected(tokens=100)
        states = {state["id"]: state for state in site.pool.states()}
        assert "says nothing" in states[busy.member.id]["trouble"]
        beats.cancel()

    run(2, story)


def test_a_request_that_silences_two_engines_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coserve.server.replicas.replicalink.SILENT_S", 0.3)

    async def story(site: Site) -> None:
        for replica in site.replicas:
            replica.engine.hold = True
        stream = site.ask()
        beats = []
        for _ in range(2):
            await until(lambda: any(one.link.num_requests for one in site.replicas))
            busy = site.busy
            busy.beater.cancel()
            beats.append(asyncio.create_task(busy.link.beat()))
            await until(lambda: not busy.link.num_requests)  # noqa: B023
        with pytest.raises(EngineUnavailable, match="says nothing"):
            await collect(stream)
        assert sum(len(replica.engine.asked) for replica in site.replicas) == 2
        for beat in beats:
            beat.cancel()

    run(3, story)


def test_streams_survive_an_ingress_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOST_S", 0.2)
    monkeypatch.setattr(pool, "LOST_S", 0.2)
    monkeypatch.setattr(pool, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(pool, "PATIENCE_S", 0.5)

    async def story(site: Site) -> None:
        stream = site.ask(tokens=100)
        found = [*(await anext(stream)).token_ids]
        for link in site.pool._links.all:  # what the replicas say does not arrive before the first look
            link.heard_s -= 10.0
        time.sleep(0.6)
        found += [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
        assert [found] == expected(tokens=100)

    run(2, story)


def test_replicas_that_are_slow_to_refuse_a_request_are_not_all_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "PATIENCE_S", 0.95)

    async def story(site: Site) -> None:
        for replica in site.replicas:
            replica.refuses_after_s = 0.5
        with pytest.raises(StorageRefused, match="away"):
            await collect(site.ask(adapter=AdapterRef(name="t/x@1", uri="adapters/x", sha256="0")))
        assert sum(len(replica.ensured) for replica in site.replicas) == 3

    run(5, story)


def test_what_fails_once_does_not_end_the_look_at_the_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "REFRESH_EVERY_S", 0.01)
    row = Member(id="ingress-1", kind="ingress", address="", public_key="k", node="here", info={})
    failures: list[Exception] = [RuntimeError("a bug"), StorageRefused("away")]

    def refresh(id: str, info: Any) -> bool:
        if failures:
            raise failures.pop()
        return True

    async def story() -> None:
        table: Any = SimpleNamespace(refresh=refresh, alive=lambda: [row])
        seen = asyncio.Event()
        keeping = asyncio.create_task(OwnRow(table, lambda: row).keep(lambda found: seen.set()))
        await seen.wait()
        keeping.cancel()

    asyncio.run(asyncio.wait_for(story(), 5))


def test_a_refused_connection_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "ANEW_S", 0.2)

    async def story(site: Site) -> None:
        site.away = True
        late = Played(site.context, 7)
        site.replicas.append(late)
        site.see()
        await asyncio.sleep(0.5)
        site.away = False
        assert not late.link._watchers
        await asyncio.sleep(0.2)
        site.see()  # as every second
        await until(lambda: sum(state["ready"] for state in site.pool.states()) == 2)
        await late.close()

    run(1, story)


def test_many_requests_that_move_together_hold_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was tried again for each of the others."""
    monkeypatch.setattr(links, "LOST_S", 0.5)
    tried: list[int] = []
    place = EnginePool._place

    def count(pool: EnginePool, moving: Any) -> None:
        tried.append(1)
        place(pool, moving)

    async def story(site: Site) -> None:
        streams = [site.ask(tokens=1000) for _ in range(200)]
        monkeypatch.setattr(EnginePool, "_place", count)
        for replica in site.replicas:
            replica.freeze()
        await until(lambda: not site.pool.ready)
        await asyncio.sleep(0.05)
        assert len(tried) <= 400
        for stream in streams:
            await stream.aclose()

    run(2, story)


def test_a_lone_replica_that_does_not_come_back_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOST_S", 0.5)
    monkeypatch.setattr(pool, "LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(pool, "PATIENCE_S", 0.8)

    async def story(site: Site) -> None:
        stream = site.ask()
        await anext(stream)
        site.busy.freeze()
        with pytest.raises(EngineUnavailable):
            await collect(stream)
        with pytest.raises(EngineUnavailable, match="reached"):
            site.ask()
        assert not site.pool.ready

    run(1, story)


def test_errors_of_a_request_stay_its_own() -> None:
    async def story(site: Site) -> None:
        for replica in site.replicas:
            replica.engine.broken = InvalidRequest("temperature: is wrong", param="temperature")
        with pytest.raises(InvalidRequest, match="temperature"):
            await collect(site.ask())
        for replica in site.replicas:
            replica.engine.broken = None
        assert await collect(site.ask()) == expected()

    run(2, story)


def test_a_cancelled_request_ends_on_its_replica_and_one_of_a_lost_ingress_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(site: Site) -> None:
        stream = site.ask(tokens=10_000)
        await anext(stream)
        busy = site.busy
        await stream.aclose()
        await until(lambda: not busy.link.num_requests)
        stream = site.ask(tokens=10_000)
        await anext(stream)
        busy = site.busy
        monkeypatch.setattr("coserve.server.replicas.replicalink.GREET_LIMIT_S", -1.0)
        busy.link._drop_gone()
        await until(lambda: not busy.link.num_requests)
        await stream.aclose()

    run(2, story)


def test_an_ingress_that_was_thought_to_be_gone_has_its_requests_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(site: Site) -> None:
        stream = site.ask()
        found = [*(await anext(stream)).token_ids]
        with monkeypatch.context() as patched:
            patched.setattr("coserve.server.replicas.replicalink.GREET_LIMIT_S", -1.0)
            site.replicas[0].link._drop_gone()
        found += [token for chunk in [chunk async for chunk in stream] for token in chunk.token_ids]
        assert [found] == expected()

    run(1, story)


def test_adapters_are_fetched_before_a_request_and_jobs_are_nudged() -> None:
    async def story(site: Site) -> None:
        ref = AdapterRef(name="t/x@1", uri="adapters/x", sha256="0")
        assert await collect(site.ask(adapter=ref)) == expected()
        assert [replica.ensured for replica in site.replicas].count([ref]) == 1
        site.pool.nudge("ftjob-1")
        await until(lambda: all(replica.nudged == ["ftjob-1"] for replica in site.replicas))

    run(2, story)


def test_a_draining_replica_gets_nothing_new() -> None:
    async def story(site: Site) -> None:
        site.replicas[0].link.draining = True
        await until(lambda: any(state["draining"] for state in site.pool.states()))
        await asyncio.gather(*(collect(site.ask(tokens=2)) for _ in range(10)))
        assert not site.replicas[0].engine.asked and len(site.replicas[1].engine.asked) == 10

    run(2, story)


@pytest.mark.parametrize("odd", [{"fingerprint": "another", "model": "other"}, {"dtype": "bfloat16"}], ids=["model", "dtype"])
def test_a_stranger_is_not_let_in_and_another_model_is_left_out(odd: dict[str, str]) -> None:
    async def story(site: Site) -> None:
        stranger = EnginePool(KeyPair.make(), Path("/model"))
        stranger.start()
        stranger.see([site.replicas[0].member])
        await asyncio.sleep(0.3)
        assert not stranger.ready
        await stranger.stop()
        other = Played(site.context, 8, msgspec.structs.replace(INFO, **odd))
        site.replicas.append(other)
        site.see()
        await until(lambda: other.member.id in site.pool._links._left_out)
        site.see()
        assert [state["id"] for state in site.pool.states()] == [site.replicas[0].member.id]
        await other.close()

    run(1, story)


def test_the_row_of_a_dead_replica_does_not_say_which_model_is_served() -> None:
    async def story(site: Site) -> None:
        dead = Member(
            id="replica-dead", kind="engine", address="tcp://127.0.0.1:1", public_key=KeyPair.make().public.decode(), node="x",
            info=describe_engine(INFO) | {"fingerprint": "another", "model": "other"},
        )
        pool = EnginePool(site.keys, Path("/model"))
        pool.start()
        pool.see([dead, site.replicas[0].member])
        await until(lambda: pool.ready)
        assert pool.info.fingerprint == INFO.fingerprint
        await pool.stop()

    run(1, story)
