"""Replicas that share a job: from engine to engine through hosts, links and a wire, while everything else goes on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.core import CoserveError
from coserve.finetune.job import MetricsTable
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.server.link.enginehost import EngineHost
from coserve.server.link.messages import (
    ActJob,
    FromEngine,
    JobEnded,
    JobShare,
    Replied,
    ShareEnded,
    StartJob,
    StepSaid,
    StepTold,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from coserve.server.link.stepmessages import (
    PART_BYTES,
    AdapterDigest,
    Applied,
    BlobError,
    BlobPart,
    Counts,
    DropIds,
    EnterJob,
    Envelope,
    GiveBack,
    GoAway,
    IncomingBlob,
    LeaveJob,
    Offer,
    OutgoingBlobs,
    Pull,
    WantPart,
    blob_digest,
    decode_step,
    encode_step,
)
from coserve.server.replicas import helping
from coserve.server.replicas.helping import JobHelp
from coserve.server.replicas.stepcoordinator import StepCoordinator
from coserve.server.replicas.steplink import StepLinks
from coserve.training.finetuning import finetune
from tests.step_wires import Wires
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import assert_nothing_left, make_engine

CONFIG = FinetuneConfig(
    max_steps=4, batch_size=6, max_microbatch_tokens=96, checkpoint_steps=2, seed=3, lora=LoraConfig(r=4),
    optimizer=OptimizerConfig(learning_rate=1e-3),
)

# --- blobs and envelopes ---


def offer(data: bytes, **fields: Any) -> Offer:
    return Offer(blob=1, kind="seal", step=0, num_bytes=len(data), digest=blob_digest(data), **fields)


def test_a_blob_comes_part_by_part_and_only_as_it_was_offered() -> None:
    data = bytes(range(256)) * (PART_BYTES * 9 // 256) + b"end"
    source, asked = OutgoingBlobs(once=True), list[Any]()
    source.add(1, data)
    incoming = IncomingBlob(offer(data), len(data), asked.append)
    assert len(asked) == 4, "a few at a time"
    whole = False
    while not whole:
        part = source.part(asked.pop(0))
        assert part is not None
        whole = incoming.take(part)
    assert incoming.data == data
    assert [want.start for want in asked] == [len(data)]
    assert source.part(asked[0]) is None and source.part(WantPart(blob=1, start=0)) is None, "it is forgotten"


def test_blobs_of_other_sizes_orders_and_contents_are_refused() -> None:
    data = b"x" * 100
    with pytest.raises(BlobError, match="100 bytes was offered, not of 99"):
        IncomingBlob(offer(data), 99, lambda body: None)
    with pytest.raises(BlobError, match="out of turn"):
        IncomingBlob(offer(data), 100, lambda body: None).take(BlobPart(blob=1, start=50, data=data[50:]))
    with pytest.raises(BlobError, match="out of turn"):
        IncomingBlob(offer(data), 100, lambda body: None).take(BlobPart(blob=1, start=0, data=data + b"y"))
    with pytest.raises(BlobError, match="damaged"):
        IncomingBlob(offer(data), 100, lambda body: None).take(BlobPart(blob=1, start=0, data=b"y" * 100))


def enter(primary: bool, **fields: Any) -> EnterJob:
    return EnterJob(
        step=0, primary=primary, facts={}, elements=4, dtype="float32", vectors=["master"], **fields
    )


def said(member: str, number: int, body: Any, epoch: int = 3) -> bytes:
    return encode_step(Envelope(epoch=epoch, member=member, number=number, body=body))


def test_a_coordinator_takes_no_words_of_other_epochs_strangers_or_liars() -> None:
    coordinator, replies = StepCoordinator(3, "p"), list[Any]()

    def reply(data: bytes) -> None:
        replies.append(decode_step(data).body)

    assert coordinator.receive(b"\xc1 not msgpack", reply) is None
    assert coordinator.receive(said("p", 0, enter(True), epoch=2), reply) is None
    assert coordinator.receive(said("a", 0, Pull(step=0, num_ids=1)), reply) is None
    assert coordinator.receive(said("p", 0, enter(True)), reply) == "p"
    coordinator.receive(said("a", 0, enter(True)), reply)
    assert isinstance(replies[-1], GoAway) and "takes itself for another" in replies[-1].reason
    coordinator.receive(said("b", 0, enter(False)), reply)
    coordinator.receive(said("b", 5, Pull(step=0, num_ids=1)), reply)
    assert isinstance(replies[-1], GoAway) and "were lost" in replies[-1].reason
    with pytest.raises(msgspec.ValidationError):
        decode_step(msgspec.msgpack.encode({"epoch": 1, "member": "a", "number": 0, "body": {"type": "Exec"}}))


class Talk:
    """A coordinator and members of whom each has a vector of four elements, and what it tells them."""

    def __init__(self, *names: str) -> None:
        self.now = 0.0
        self.coordinator = StepCoordinator(3, "p", note=lambda line: None, clock=lambda: self.now)
        self.heard: dict[str, list[Any]] = {}
        self._numbers: dict[str, int] = {}
        for name in ("p", *names):
            self.say(name, enter(name == "p"))

    def say(self, name: str, body: Any) -> None:
        number = self._numbers.get(name, 0)
        self._numbers[name] = number + 1
        heard = self.heard.setdefault(name, [])
        self.coordinator.receive(said(name, number, body), lambda data: heard.append(decode_step(data).body))

    def give(self, name: str, blob: Offer, data: bytes) -> None:
        """A blob of one part, offered and told."""
        self.say(name, blob)
        self.say(name, BlobPart(blob=blob.blob, start=0, data=data))

    def give_state(self, step: int) -> None:
        data = bytes([step]) * 16
        self.give("p", Offer(blob=100 + step, kind="state", step=step, num_bytes=16, digest=blob_digest(data)), data)

    def seal(self, step: int, *ids: int, round: int = 0) -> Offer:
        """The offer of a sum of zeros."""
        return Offer(
            blob=10 * step + ids[0], kind="seal", step=step, num_bytes=16, digest=blob_digest(bytes(16)), ids=[*ids],
            round=round, counts=Counts(loss=0.0, correct=0, labels=1, tokens=1),
        )

    def run_step(self, step: int) -> None:
        """The primary runs it alone."""
        self.say("p", Pull(step=step, num_ids=1))
        self.give("p", self.seal(step, 0), bytes(16))
        self.say("p", Applied(step=step))
        self.say("p", AdapterDigest(step=step, digest="same"))

    def offers(self, name: str, kind: str) -> list[Offer]:
        return [body for body in self.heard[name] if isinstance(body, Offer) and body.kind == kind]

    def read(self, name: str, offer: Offer) -> bytes:
        """What a member gets that asks for all of a blob; none if the blob is gone."""
        before = len(self.heard[name])
        self.say(name, WantPart(blob=offer.blob, start=0))
        self.say(name, WantPart(blob=offer.blob, start=offer.num_bytes))
        return b"".join(body.data for body in self.heard[name][before:] if isinstance(body, BlobPart))


def test_a_state_is_kept_while_somebody_reads_it_though_the_next_has_come() -> None:
    talk = Talk("a")
    talk.give_state(0)
    talk.run_step(0)
    talk.say("b", enter(False))
    talk.give_state(1)
    (first,), (second,) = talk.offers("a", "state"), talk.offers("b", "state")
    assert talk.read("a", first) == bytes(16) and talk.read("b", second) == b"\x01" * 16
    assert talk.read("a", first) == talk.read("b", second) == b"", "nobody reads them any more"


def test_a_state_that_nobody_waits_for_any_more_is_not_kept() -> None:
    talk = Talk("a")
    talk.say("a", LeaveJob())
    talk.give_state(0)
    assert not talk.coordinator._states and not talk.coordinator._outgoing._blobs
    talk.say("b", enter(False))
    talk.give_state(0)
    assert len(talk.coordinator._outgoing._blobs) == 1
    talk.coordinator.lost("b")
    assert not talk.coordinator._outgoing._blobs


@pytest.mark.parametrize("how", ["late", "given back"])
def test_a_sum_that_stalls_on_its_way_is_forgotten_when_it_would_not_count(how: str) -> None:
    talk = Talk("a")
    talk.give_state(0)
    for name in ("p", "a"):
        talk.say(name, Pull(step=0, num_ids=2))
    talk.give("p", talk.seal(0, 0), bytes(16))
    talk.say("a", talk.seal(0, 1))
    incoming = talk.coordinator._peers["a"].incoming
    talk.say("p", Pull(step=0, num_ids=2))
    assert len(incoming) == 1
    if how == "late":
        for _ in range(3):  # its replica lives
            talk.now += 10.0
            talk.coordinator.heard("p")
            talk.coordinator.heard("a")
            talk.coordinator.tick()
        assert any(isinstance(body, DropIds) for body in talk.heard["a"])
    else:
        talk.say("a", GiveBack(step=0))
    assert not incoming and talk.coordinator.members == ("p", "a")
    talk.say("a", BlobPart(blob=1, start=0, data=bytes(16)))
    talk.give("p", talk.seal(0, 1, round=1), bytes(16))
    assert len(talk.offers("p", "total")) == 1


def test_envelopes_pass_the_engines_socket() -> None:
    for message in (StepTold(id="job-e1", data=b"\x00\xff"), StartJob(
        call=1, id="job-e1", adapter="a", training_file="t", validation_file=None, directory="d", config=CONFIG, resume=False,
        share=JobShare(epoch=2, member="m", primary=False),
    )):
        assert decode_to_engine(encode(message)) == message
    for back in (StepSaid(id="job-e1", data=b"\x00"), ShareEnded(id="x")):
        assert decode_from_engine(encode(back)) == back


# --- replicas ---


def on_a_loop(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that runs on an event loop of its own."""
    @functools.wraps(story)
    def test(*args: Any, **kwargs: Any) -> None:
        asyncio.run(story(*args, **kwargs))

    return test


class Replica:
    """An engine with its thread, its host, and its links, on one event loop."""

    def __init__(self, name: str, engine: Any, wires: Wires) -> None:
        self.name, self.engine = name, engine
        self.messages: list[FromEngine] = []
        self.client: Client | None = None
        self._loop = asyncio.get_running_loop()
        self.host = EngineHost(engine, self._posted, lambda: None)
        self.links = StepLinks(
            lambda id, data: self.host.on_message(StepTold(id=id, data=data)), wires.of(name), lost_s=wires.lost_s
        )
        engine.start()
        self.links.start()

    def _posted(self, message: FromEngine) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._take, message)

    def _take(self, message: FromEngine) -> None:
        if self.client is not None and isinstance(message, StepSaid | ShareEnded):
            self.client.take(message)
        elif isinstance(message, StepSaid):
            self.links.from_engine(message.id, message.data)
        elif isinstance(message, ShareEnded):
            self.links.share_ended(message.id)
        if not isinstance(message, StepSaid):
            self.messages.append(message)

    def start(self, id: str, directory: Path, data: Path, share: JobShare, config: FinetuneConfig) -> None:
        self.host.on_message(StartJob(
            call=1, id=id, adapter="tuned", training_file=str(data), validation_file=None, directory=str(directory),
            config=config, resume=False, share=share,
        ))

    async def heard(self, kind: type) -> Any:
        """The first message of a kind."""
        return await until(lambda: next((one for one in self.messages if isinstance(one, kind)), None))


async def until(found: Callable[[], Any], seconds: float = 20.0) -> Any:
    async with asyncio.timeout(seconds):
        while not (result := found()):
            await asyncio.sleep(2e-3)
    return result


@contextlib.asynccontextmanager
async def replicas(model: LoadedModel, wires: Wires, count: int) -> AsyncIterator[list[Replica]]:
    """Each has the model itself, whose workspace serves one engine's thread."""
    models = [load_model(str(model.directory), device="cpu", dtype="float32") for _ in range(count)]
    made = [Replica(f"r{n}", make_engine(own), wires) for n, own in enumerate(models)]
    yield made
    for replica in made:
        await replica.links.stop()
        await asyncio.to_thread(replica.engine.close)
        replica.host.close()
        assert_nothing_left(replica.engine)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "sft.jsonl", chat_lines(20))


def rows(directory: Path) -> list[tuple[int, float, float]]:
    return [(row.step, row.train_loss, row.grad_norm) for row in MetricsTable(directory / "metrics.csv").rows()]


def same(found: Path, wanted: Path) -> None:
    assert [step for step, *_ in rows(found)] == [step for step, *_ in rows(wanted)]
    for (_, *numbers), (_, *others) in zip(rows(found), rows(wanted), strict=True):
        assert numbers == pytest.approx(others, rel=1e-4)


@on_a_loop
async def test_three_replicas_share_a_job(model: LoadedModel, data: Path, tmp_path: Path) -> None:
    finetune(data, tmp_path / "whole", model=model, config=CONFIG)
    wires, notes = Wires(), list[str]()
    async with replicas(model, wires, 3) as (first, *others):
        coordinator = first.links.host("job-e4", 4, "r0", note=notes.append)
        for replica in others:
            share = replica.links.join("job-e4", 4, replica.name, "r0")
            assert share == f"job-e4/4/{replica.name}"
            place = JobShare(epoch=4, member=replica.name, primary=False)
            replica.start(share, tmp_path / f"scratch-{replica.name}", data, place, CONFIG)
        await until(lambda: len(coordinator._early) == 2)
        first.start("job-e4", tmp_path / "out", data, JobShare(epoch=4, member="r0", primary=True), CONFIG)
        ended: JobEnded = await first.heard(JobEnded)
        assert (ended.status, ended.step) == ("succeeded", 4)
        first.links.end("job-e4")
        for replica in others:
            assert (await replica.heard(ShareEnded)).problem is None
            assert not [one for one in replica.messages if not isinstance(one, Replied | ShareEnded)], "it says nothing else"
            assert not (tmp_path / f"scratch-{replica.name}").exists()
        assert sum("has joined" in note for note in notes) == 2
        await until(lambda: not any(thread.name.startswith("coserve-shares") for thread in threading.enumerate()))
    same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("how", ["silence", "engine", "told", "cancel"])
@on_a_loop
async def test_a_replica_that_goes_is_not_waited_for(
    model: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    config = replace(CONFIG, max_steps=12)
    monkeypatch.setattr("coserve.server.replicas.steplink.BEAT_S", 0.05)
    finetune(data, tmp_path / "whole", model=model, config=config)
    wires = Wires()
    wires.lost_s = 2.0
    async with replicas(model, wires, 2) as (first, other):
        coordinator = first.links.host("job-e1", 1, "r0")
        share = other.links.join("job-e1", 1, "r1", "r0")
        other.start(share, tmp_path / "scratch", data, JobShare(epoch=1, member="r1", primary=False), config)
        await asyncio.sleep(0.2)  # it is there before the primary
        first.start("job-e1", tmp_path / "out", data, JobShare(epoch=1, member="r0", primary=True), config)
        await until(lambda: len(coordinator.members) == 2 and coordinator.machine.step >= 2)
        match how:
            case "silence":
                wires.cut.add("r1")
            case "engine":
                other.links.engine_lost()
            case "told":
                first.links.replica_lost("r1")
            case "cancel":
                other.host.on_message(ActJob(id=share, action="cancel"))
        await until(lambda: coordinator.members == ("r0",))
        ended: JobEnded = await first.heard(JobEnded)
        assert ended.status == "succeeded"
        if how != "engine":
            await other.heard(ShareEnded)
    same(tmp_path / "out", tmp_path / "whole")


class Client:
    """A replica's engine as its jobs see it: SharingEngine."""

    def __init__(self, replica: Replica) -> None:
        self._replica, self._listeners = replica, list[Callable[[Any], None]]()
        self.down: list[Callable[[], None]] = []
        self.ready, self.supervisor, self.num_calls = True, self, 0
        replica.client = self

    def on_step(self, listener: Callable[[Any], None]) -> None:
        self._listeners.append(listener)

    def on_down(self, listener: Callable[[], None]) -> None:
        self.down.append(listener)

    def take(self, message: StepSaid | ShareEnded) -> None:
        for listener in self._listeners:
            listener(message)

    async def start_job(self, **fields: Any) -> None:
        self.num_calls += 1
        call = self.num_calls
        self._replica.host.on_message(StartJob(call=call, **fields))
        reply = await until(lambda: next(
            (one for one in self._replica.messages if isinstance(one, Replied) and one.call == call), None))
        if reply.problem is not None:
            raise CoserveError(reply.problem.message)

    def act_job(self, job: str, action: Any) -> None:
        self._replica.host.on_message(ActJob(id=job, action=action))


@on_a_loop
async def test_an_engine_that_begins_a_share_of_a_run_that_is_gone_is_sent_away(
    model: LoadedModel, data: Path, tmp_path: Path
) -> None:
    """The holder was lost while the engine still read the job's data, and what was told it then went nowhere."""
    async with replicas(model, Wires(), 1) as (only,):
        only.start("job-e1/1/r1", tmp_path / "scratch", data, JobShare(epoch=1, member="r1", primary=False), CONFIG)
        ended: ShareEnded = await only.heard(ShareEnded)
        assert ended.problem is None
        only.start("job-e1", tmp_path / "out", data, JobShare(epoch=1, member="r0", primary=True), CONFIG)
        over: JobEnded = await only.heard(JobEnded)
        assert over.problem is not None and "the job has ended, or its replica is gone" in over.problem.message


@pytest.mark.full
@on_a_loop
async def test_replicas_are_invited_and_help_until_they_drain(
    model: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has no time and does not come; one that drains leaves at the end of its step; its place is another's then."""
    monkeypatch.setattr(helping, "INVITE_S", 0.1)
    config = replace(CONFIG, max_steps=100_000)
    notes, headroom = list[str](), {"r0": 1.0, "r1": 1.0, "r2": 0.0}

    def bring(job: str, directory: Path) -> dict[str, Any]:
        assert job == "job"
        (directory / "training_file").write_bytes(data.read_bytes())
        return {
            "training_file": str(directory / "training_file"), "validation_file": None, "start": None, "config": config,
            "tenant": "t", "weight": 1.0,
        }

    async with replicas(model, Wires(), 3) as made:
        names = [replica.name for replica in made]
        helps = [
            JobHelp(
                replica.name, Client(replica), replica.links, tmp_path / "scratch" / replica.name, others=lambda: names,
                bring=bring, headroom=lambda name=replica.name: headroom[name],  # type: ignore[misc]
            ) for replica in made
        ]
        first, client = made[0], made[0].client
        assert client is not None
        share = helps[0].host("job-e1", "job", 1, 2, notes.append)
        await client.start_job(
            id="job-e1", adapter="tuned", directory=str(tmp_path / "out"), resume=False, share=share, **bring("job", tmp_path)
        )
        await until(lambda: any("r1.1 has joined" in note for note in notes))
        assert helps[1].shares == ("job-e1/1/r1.1",) and helps[2].shares == ()
        headroom["r2"] = 1.0
        helps[1].drain()
        await until(lambda: not helps[1].shares)
        await until(lambda: any("r1.1 has left" in note for note in notes))
        await until(lambda: any("r2.1 has joined" in note for note in notes))
        client.act_job("job-e1", "cancel")
        await first.heard(JobEnded)
        helps[0].end("job-e1")
        await until(lambda: not helps[2].shares)
        await until(lambda: not any([*(tmp_path / "scratch" / name).glob("*")] for name in ("r1", "r2")))
        assert not any("late" in note or "lost" in note for note in notes)
        for help in helps:
            await help.stop()


@pytest.mark.full
@on_a_loop
async def test_the_end_of_the_primary_ends_the_shares_of_others(model: LoadedModel, data: Path, tmp_path: Path) -> None:
    config, wires = replace(CONFIG, max_steps=10_000), Wires()
    async with replicas(model, wires, 2) as (first, other):
        coordinator = first.links.host("job-e1", 1, "r0")
        share = other.links.join("job-e1", 1, "r1", "r0")
        for replica, id, primary in ((first, "job-e1", True), (other, share, False)):
            place = JobShare(epoch=1, member=replica.name, primary=primary)
            replica.start(id, tmp_path / replica.name, data, place, config)
        await until(lambda: len(coordinator.members) == 2 and coordinator.machine.step >= 2)
        first.host.on_message(ActJob(id="job-e1", action="cancel"))
        assert (await first.heard(JobEnded)).status == "cancelled"
        assert (await other.heard(ShareEnded)).problem is None
        again = first.links.host("job-e2", 2, "r0")  # what the old epoch says is not heard
        assert again.members == ()
