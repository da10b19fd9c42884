"""The engine in a process of its own: requests, adapters, jobs, death and restart, over the real socket."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from coserve.cluster.load import Load
from coserve.config.settings import EngineConfig, FinetuneConfig, LoraConfig, SamplingConfig
from coserve.core import ConfigError, InvalidRequest, NotFound, StepPlan, StepResult
from coserve.engine.engine import Engine
from coserve.engine.step import Lookup
from coserve.peft.format import save_adapter
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.prefixhash import prompt_hashes
from coserve.server.errors import EngineUnavailable
from coserve.server.link import enginemain, supervisor
from coserve.server.link.activity import ActivityPage
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.mailbox import MAX_UNACKED, Mailbox
from coserve.server.link.messages import (
    Ack,
    AdapterRef,
    Cancel,
    Failed,
    Generate,
    JobEnded,
    JobHappened,
    Progress,
    Ready,
    ToEngine,
    Tokens,
    decode_from_engine,
    encode,
    merge_tokens,
)
from coserve.server.link.setup import EngineSetup, read_setup, write_setup
from coserve.server.link.streams import RequestStream, RequestStreams
from coserve.server.link.supervisor import MAX_FAILURES, restart_delay_s
from coserve.server.locks import hold
from coserve.server.settings import ServerConfig
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import LATENCY, random_adapter

T = TypeVar("T")
GREEDY = SamplingConfig(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingConfig(max_tokens=400, temperature=0.0, ignore_eos=True)
PROMPT = [5, 6, 7, 8]
JOB = FinetuneConfig(lora=LoraConfig(r=4), batch_size=4, max_steps=4, checkpoint_steps=2, max_microbatch_tokens=256)


class Loop:
    """A client and its event loop, driven from tests."""

    def __init__(self, config: ServerConfig) -> None:
        self.runner = asyncio.Runner()
        self.report: list[str] = []
        self.client = EngineClient(config, report=self.report.append)
        self.ups: list[int] = []
        self.downs: list[float] = []
        self.job_messages: list[JobHappened | JobEnded] = []

        async def up() -> None:
            assert self.client.ready
            self.ups.append(self.client.generation)

        self.client.supervisor.on_up(up)
        self.client.supervisor.on_down(lambda: self.downs.append(time.monotonic()))
        self.client.on_job(self.job_messages.append)

    def __call__(self, work: Coroutine[Any, Any, T], seconds: float = 60.0) -> T:
        return self.runner.run(asyncio.wait_for(work, seconds))

    def wait(self, condition: Any, seconds: float = 60.0) -> None:
        """Runs the loop until something holds."""
        async def wait() -> None:
            while not condition():
                await asyncio.sleep(0.01)

        self(wait(), seconds)

    def generate(self, **fields: Any) -> list[Tokens]:
        """A request's chunks. It is sent on the loop too, as in the server: a zmq.asyncio socket warns outside of one."""
        async def generate() -> list[Tokens]:
            return await collect(self.client.generate(**fields))

        return self(generate())

    def act_job(self, job: str, action: str) -> None:
        async def act() -> None:
            self.client.act_job(job, action)

        self(act())

    def ended(self, job: str) -> list[JobEnded]:
        return [message for message in self.job_messages if isinstance(message, JobEnded) and message.id == job]


def make_config(model: Path, data_dir: Path, **changes: Any) -> ServerConfig:
    data_dir.mkdir(parents=True, exist_ok=True)
    settings = {"dtype": "float32", "threads": 1, "kv_cache_memory_bytes": 32 << 20, **changes}
    return ServerConfig(model=str(model), data_dir=data_dir, **settings)


@pytest.fixture(scope="module")
def loop(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    loop = Loop(make_config(tiny_model, tmp_path_factory.mktemp("data")))
    loop(loop.client.supervisor.start())
    yield loop
    loop(loop.client.supervisor.stop())
    loop.runner.close()


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), device="cpu", dtype="float32")


async def collect(stream: RequestStream) -> list[Tokens]:
    return [chunk async for chunk in stream]


def joined(chunks: list[Tokens]) -> Tokens:
    return merge_tokens(chunks)


# --- without a process ---


def chunk(number: int, *, index: int = 0, reason: str | None = None) -> Tokens:
    return Tokens(
        id="r", index=index, text=f"{number},", token_ids=[number], time_s=float(number), finish_reason=reason,
        cached_tokens=3 if number == 0 else 0, begun_s=-1.5 if number == 0 else None,
    )


def test_a_slow_reader_gets_one_chunk_per_output_of_all_that_came() -> None:
    async def read() -> None:
        stream = RequestStream("r", 2, lambda _: None)
        for number in range(5000):
            stream.push(chunk(number))
            stream.push(chunk(number, index=1))
        stream.push(chunk(5000, reason="length"))
        first, second = await anext(stream), await anext(stream)
        assert first.token_ids == list(range(5001)) and first.text.startswith("0,1,2,") and first.text.endswith(",5000,")
        assert (first.index, second.index) == (0, 1)
        assert (first.finish_reason, first.cached_tokens, first.time_s) == ("length", 3, 5000.0)
        assert first.begun_s == -1.5
        assert second.token_ids == list(range(5000)) and second.finish_reason is None
        stream.push(chunk(7, index=1, reason="stop"))
        assert [part.finish_reason async for part in stream] == ["stop"]

    asyncio.run(read())


def test_an_engine_reports_its_load_and_charges_tenants(loop: Loop) -> None:
    loads: list[Load] = []
    loop.client.on_load(loads.append)

    async def watch(every_s: float) -> None:
        loop.client.watch_load(every_s)
        loop.client.charge_tenants({"elsewhere": 100})

    loop(watch(0.02))
    ids = list(range(3, 43))
    loop.generate(prompt_ids=ids, sampling=GREEDY, tenant="served")
    hashes = set(prompt_hashes("served", None, ids, 16))
    loop.wait(lambda: any(hashes <= set(load.prefixes or []) for load in loads) and loads[-1].running == 0)
    loop(watch(0.0))
    assert [load.number for load in loads] == sorted({load.number for load in loads})
    last = loads[-1]
    assert last.free_blocks == last.num_blocks > 0 and (last.block_tokens, last.replica) == (16, "")



def test_what_came_before_an_error_is_read_first() -> None:
    async def read() -> None:
        stream = RequestStream("r", 1, lambda _: None)
        stream.push(chunk(1))
        stream.fail(EngineUnavailable("gone"))
        assert (await anext(stream)).token_ids == [1]
        with pytest.raises(EngineUnavailable, match="gone"):
            await anext(stream)

    asyncio.run(read())


def test_closing_a_finished_stream_cancels_nothing() -> None:
    async def close() -> None:
        cancelled: list[RequestStream] = []
        for reason in ("stop", None):
            stream = RequestStream("r", 1, cancelled.append)
            stream.push(chunk(1, reason=reason))
            await stream.aclose()
        assert cancelled == [stream]

    asyncio.run(close())


@pytest.mark.parametrize("up", [True, False])
def test_all_streams_fail_and_are_cancelled_in_an_engine_that_is_up(up: bool) -> None:
    async def play() -> None:
        sent: list[ToEngine] = []
        is_up = True

        def send(message: ToEngine) -> None:
            if not is_up:
                raise EngineUnavailable("it is down")
            sent.append(message)

        streams = RequestStreams(send)
        opened = [
            streams.open(Generate(id=streams.new_id(), prompt_ids=PROMPT, sampling=GREEDY, arrival_s=0.0)) for _ in range(2)
        ]
        assert len({stream.id for stream in opened}) == 2
        is_up = up
        streams.fail_all("the end")
        for stream in opened:
            with pytest.raises(EngineUnavailable, match="the end"):
                await anext(stream)
            await stream.aclose()
        assert sent[2:] == [Cancel(id=stream.id) for stream in opened if up]

    asyncio.run(play())


def test_delays_grow_and_end() -> None:
    delays = [restart_delay_s(failures) for failures in range(MAX_FAILURES + 1)]
    assert delays == [0.0, 1.0, 2.0, 5.0, 10.0, None]


def test_the_setup_survives_its_line(tmp_path: Path) -> None:
    config = ServerConfig(model="m", data_dir=tmp_path, api_key=("k",), lora_modules=(("a", "b"),), max_model_len=9)
    line = write_setup(EngineSetup(address="ipc://x", config=config))
    assert line.count(b"\n") == 1
    assert read_setup(line) == EngineSetup(address="ipc://x", config=config)


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path, waited = tmp_path / "lock", []
    with hold(path):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"), hold(path):
            pass
        with pytest.raises(ConfigError), hold(path, timeout_s=0.2, waiting=lambda: waited.append(1)):
            pass
    with hold(path):
        pass
    assert waited == [1]


def test_an_error_of_the_engines_thread_ends_the_process_and_no_job(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
            raise ZeroDivisionError("a bug")

    def make(model: LoadedModel, settings: Any, **options: Any) -> Engine:
        return Engine(model, settings, latency=LatencyModel(dict(LATENCY)), runner=Broken(), **options)

    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(enginemain, "Engine", make)
    page = ActivityPage(None)
    context = zmq.Context()
    with context.socket(zmq.PAIR) as api:
        port = api.bind_to_random_port("tcp://127.0.0.1")
        with Mailbox(f"tcp://127.0.0.1:{port}") as mailbox:
            api.send(encode(Generate(id="r", prompt_ids=PROMPT, sampling=GREEDY, arrival_s=time.monotonic())))
            process = enginemain.EngineProcessMain(make_config(model.directory, tmp_path), mailbox, page)
            process.run()
            assert process.failure
        sent = []
        while api.poll(200):
            sent += [decode_from_engine(part) for part in api.recv_multipart()]
    context.term()
    (failed,) = [message for message in sent if isinstance(message, Failed)]
    assert (failed.id, failed.problem.name) == ("r", "EngineUnavailable")
    assert any(isinstance(message, Ready) for message in sent)
    assert not any(isinstance(message, JobEnded) for message in sent)
    assert "ZeroDivisionError: a bug" in caplog.text
    doing = [str(reading.activity) for reading in page.read()]
    assert any(text.startswith("an iteration") and "requests r" in text for text in doing), "the one that failed is still told"


def test_a_message_posted_while_the_bell_is_read_silences_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context = zmq.Context()
    read = os.read
    with context.socket(zmq.PAIR) as api:
        port = api.bind_to_random_port("tcp://127.0.0.1")
        with Mailbox(f"tcp://127.0.0.1:{port}") as mailbox:

            def post_then_read(descriptor: int, size: int) -> bytes:
                monkeypatch.setattr(os, "read", read)
                mailbox.post(Progress(line="meanwhile"))
                return read(descriptor, size)

            monkeypatch.setattr(os, "read", post_then_read)
            thread = threading.Thread(target=mailbox.run, args=(lambda message: None,), daemon=True)
            thread.start()
            heard = []
            for line in ("first", "last"):
                mailbox.post(Progress(line=line))
                while api.poll(1000) and line not in heard:
                    heard += [decode_from_engine(part).line for part in api.recv_multipart()]
                    api.send(encode(Ack()))
            mailbox.stop()
            thread.join(5)
    context.term()
    assert heard == ["first", "meanwhile", "last"]


def test_while_the_api_is_slow_each_output_is_one_chunk_and_nothing_is_lost() -> None:
    context = zmq.Context()
    with context.socket(zmq.PAIR) as api:
        port = api.bind_to_random_port("tcp://127.0.0.1")
        with Mailbox(f"tcp://127.0.0.1:{port}") as mailbox:
            thread = threading.Thread(target=mailbox.run, args=(lambda message: None,), daemon=True)
            thread.start()
            for number in range(MAX_UNACKED):
                mailbox.post(chunk(number))
                assert api.poll(5000), "a batch is sent at once"
                assert [decode_from_engine(part).token_ids for part in api.recv_multipart()] == [[number]]
            for number in range(2, 5000):
                mailbox.post(chunk(number))
                mailbox.post(chunk(number, index=1))
            mailbox.post(Progress(line="later"))
            mailbox.post(chunk(5000, reason="stop"))
            assert not api.poll(200), "more than the API has heard is on its way"
            api.send(encode(Ack()))
            assert api.poll(5000)
            first, second, line = [decode_from_engine(part) for part in api.recv_multipart()]
            mailbox.stop()
            thread.join(5)
    context.term()
    assert (first.index, first.token_ids, first.finish_reason) == (0, list(range(2, 5001)), "stop")
    assert (second.index, second.token_ids, second.finish_reason) == (1, list(range(2, 5000)), None)
    assert line == Progress(line="later")


# --- one process for all ---


def test_ready_tells_what_there_is(loop: Loop, tiny_model: Path) -> None:
    info = loop.client.info
    assert (info.directory, info.device, info.dtype, info.threads) == (str(tiny_model), "cpu", "float32", 1)
    assert info.max_model_len == 512
    assert info.memory["inference"] + info.memory["training"] == info.memory["pool"] <= 32 << 20
    assert loop.ups[:1] == [1]
    assert any("loading" in line for line in loop.report)


def test_outputs_are_those_of_an_engine_in_process(loop: Loop, model: LoadedModel) -> None:
    chunks = loop.generate(prompt_ids=PROMPT, sampling=GREEDY)
    engine = Engine(model, EngineConfig(memory_bytes=16 << 20), latency=LatencyModel(dict(LATENCY)))
    try:
        (handle,) = engine.generate([PROMPT], GREEDY)
    finally:
        engine.close()
    whole = joined(chunks)
    assert whole.token_ids == handle.token_ids and whole.text == handle.text
    assert whole.finish_reason == handle.finish_reason == "length"
    assert chunks[0].time_s <= chunks[-1].time_s <= time.monotonic()


def test_n_logprobs_and_the_prefix_cache(loop: Loop) -> None:
    prompt = [*range(10, 60)]
    sampling = SamplingConfig(max_tokens=5, ignore_eos=True, n=2, logprobs=3, prompt_logprobs=1)
    chunks = loop.generate(prompt_ids=prompt, sampling=sampling, tenant="a")
    for index in range(2):
        whole = joined([c for c in chunks if c.index == index])
        assert len(whole.token_ids) == len(whole.logprobs) == 5
        assert [entry.token for entry in whole.logprobs] == whole.token_ids
        assert all(len(entry.top) == 3 and entry.logprob < 0 for entry in whole.logprobs)
        assert [entry.token for entry in whole.prompt_logprobs] == ([] if index else prompt[1:]), "once, with the first output"
    cached = []
    for tenant in ("b", "b", "c"):
        chunks = loop.generate(prompt_ids=prompt, sampling=GREEDY, tenant=tenant)
        cached.append(joined(chunks).cached_tokens)
    assert cached == [0, 48, 0], "tenants share no prefixes"


def test_errors_come_back_as_they_were_raised(loop: Loop, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no 'nobody'") as found:
        loop.generate(prompt_ids=PROMPT, sampling=GREEDY, adapter=AdapterRef(name="nobody"))
    assert found.value.param == "adapter"
    with pytest.raises(InvalidRequest, match="exceed the model's 512") as refused:
        loop.generate(prompt_ids=PROMPT, sampling=SamplingConfig(max_tokens=512))
    assert refused.value.param == "max_tokens"
    with pytest.raises(InvalidRequest, match="too large"):
        loop.generate(prompt_ids=[1 << 70], sampling=GREEDY)
    with pytest.raises(NotFound):
        loop(loop.client.load_adapter("x", str(tmp_path / "none")))
    with pytest.raises(NotFound):
        loop(loop.client.unload_adapter("never"))
    assert len(joined(loop.generate(prompt_ids=PROMPT, sampling=GREEDY)).token_ids) == 12


def test_closing_a_stream_ends_the_request(loop: Loop) -> None:
    async def begin() -> None:
        before = (await loop.client.stats())["requests_cancelled"]
        stream = loop.client.generate(prompt_ids=PROMPT, sampling=LONG)
        await anext(stream)
        await stream.aclose()
        while (stats := await loop.client.stats())["running"] or stats["waiting"]:
            await asyncio.sleep(0.01)
        assert stats["requests_cancelled"] == before + 1
        assert abs(stats["time_s"] - time.monotonic()) < 5

    loop(begin())


def test_an_unread_stream_holds_up_nobody(loop: Loop) -> None:
    async def both() -> None:
        unread = loop.client.generate(prompt_ids=PROMPT, sampling=LONG)
        assert len(joined(await collect(loop.client.generate(prompt_ids=PROMPT, sampling=LONG))).token_ids) == 400
        chunks = await collect(unread)
        assert len(joined(chunks).token_ids) == 400

    loop(both())


def test_an_adapter_is_loaded_used_and_unloaded(loop: Loop, model: LoadedModel, tmp_path: Path) -> None:
    adapter = random_adapter(model, 4)
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", adapter, adapter.flat, base_name="tiny", fingerprint=model.fingerprint)
    loop(loop.client.load_adapter("t/x", str(tmp_path / "adapter")))
    base, tuned = (
        joined(loop.generate(prompt_ids=PROMPT, sampling=GREEDY, adapter=AdapterRef(name=name))).token_ids
        for name in (None, "t/x")
    )
    assert base != tuned
    assert loop(loop.client.stats())["adapters"] == ["t/x"]
    loop(loop.client.unload_adapter("t/x"))
    assert loop(loop.client.stats())["adapters"] == []


def start_job(loop: Loop, directory: Path, name: str, **changes: Any) -> None:
    data = write_lines(directory / f"{name}.jsonl", chat_lines(12))
    fields = {
        "id": name, "adapter": f"t/{name}", "training_file": str(data), "validation_file": None, "config": JOB,
        "directory": str(directory / name), "resume": False, **changes,
    }
    loop(loop.client.start_job(**fields))


def test_a_job_tells_its_steps_checkpoints_and_end(loop: Loop, tmp_path: Path) -> None:
    start_job(loop, tmp_path, "good", validation_file=str(write_lines(tmp_path / "held.jsonl", chat_lines(3))))
    loop.wait(lambda: loop.ended("good"))
    messages = [message for message in loop.job_messages if message.id == "good"]
    rows = [message.row for message in messages if isinstance(message, JobHappened) and message.row is not None]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["valid_loss"] is not None and rows[0]["valid_loss"] is None
    checkpoints = [m for m in messages if isinstance(m, JobHappened) and m.checkpoint is not None]
    assert [message.checkpoint_step for message in checkpoints] == [2, 4]
    assert all((Path(str(message.checkpoint)) / "manifest.json").is_file() for message in checkpoints)
    ended = messages[-1]
    assert isinstance(ended, JobEnded)
    assert (ended.status, ended.step, ended.problem) == ("succeeded", 4, None)
    assert ended.trained_tokens == sum(int(row["tokens"] or 0) for row in rows) > 100
    answer = joined(loop.generate(prompt_ids=PROMPT, sampling=GREEDY, adapter=AdapterRef(name="t/good")))
    assert len(answer.token_ids) == 12


def test_a_job_is_refused_paused_and_cancelled(loop: Loop, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("no json\n")
    with pytest.raises(InvalidRequest, match="JSON"):
        start_job(loop, tmp_path, "refused", training_file=str(bad))
    assert not (tmp_path / "refused").exists()
    endless = FinetuneConfig(
        lora=LoraConfig(r=4), batch_size=2, max_steps=100_000, max_microbatch_tokens=256, checkpoint_steps=0
    )
    start_job(loop, tmp_path, "long", config=endless)
    loop.wait(lambda: any(m.id == "long" and isinstance(m, JobHappened) and m.row for m in loop.job_messages))
    loop.act_job("long", "pause")
    count, limit = -1, time.monotonic() + 20
    while len(loop.job_messages) != count:
        assert time.monotonic() < limit, "it goes on"
        count = len(loop.job_messages)
        loop(asyncio.sleep(0.5))
    loop.act_job("long", "resume")
    loop.wait(lambda: len(loop.job_messages) > count)
    loop.act_job("long", "cancel")
    loop.wait(lambda: loop.ended("long"))
    assert loop.ended("long")[0].status == "cancelled"
    loop.act_job("long", "cancel")
    loop.act_job("nothing", "pause")
    assert loop(loop.client.stats())["jobs"] == 0


def test_a_cancel_during_the_start_of_a_job_is_not_lost(loop: Loop, tmp_path: Path) -> None:
    async def both() -> None:
        data = write_lines(tmp_path / "data.jsonl", chat_lines(12))
        start = asyncio.ensure_future(loop.client.start_job(
            id="early", adapter="t/early", training_file=str(data), validation_file=None, directory=str(tmp_path / "early"),
            config=FinetuneConfig(lora=LoraConfig(r=4), max_steps=100_000, checkpoint_steps=0), resume=False,
        ))
        await asyncio.sleep(0)
        loop.client.act_job("early", "cancel")
        await start

    loop(both())
    loop.wait(lambda: loop.ended("early"))
    assert loop.ended("early")[0].status == "cancelled"


def test_a_killed_engine_fails_all_at_once_and_comes_back(loop: Loop, tmp_path: Path) -> None:
    endless = FinetuneConfig(
        lora=LoraConfig(r=4), batch_size=2, max_steps=100_000, max_microbatch_tokens=256, checkpoint_steps=0
    )
    start_job(loop, tmp_path, "cut", config=endless)
    generation, restarts = loop.client.generation, loop.client.supervisor.num_restarts

    async def kill() -> float:
        stream = loop.client.generate(prompt_ids=PROMPT, sampling=LONG)
        await anext(stream)
        waiting = loop.client.generate(prompt_ids=PROMPT, sampling=LONG)
        pid = loop.client.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # so that the call below is surely waiting
        call = asyncio.ensure_future(loop.client.stats())
        await asyncio.sleep(0.05)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        for each in (collect(stream), collect(waiting), call):
            with pytest.raises(EngineUnavailable, match="died"):
                await each
        seconds = time.monotonic() - began
        assert not loop.client.ready
        with pytest.raises(EngineUnavailable):
            loop.client.generate(prompt_ids=PROMPT, sampling=GREEDY)
        with pytest.raises(EngineUnavailable):
            await loop.client.stats()
        return seconds

    downs = len(loop.downs)
    assert loop(kill()) < 1.0
    assert len(loop.downs) == downs + 1
    loop.wait(lambda: loop.client.ready)
    assert (loop.client.generation, loop.client.supervisor.num_restarts) == (generation + 1, restarts + 1)
    loop.wait(lambda: loop.ups[-1] == generation + 1)
    assert len(joined(loop.generate(prompt_ids=PROMPT, sampling=GREEDY)).token_ids) == 12
    assert not loop.ended("cut"), "its end is not known: it goes on in another process"


# --- processes that don't start, or end ---


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"model": "./nowhere"}, NotFound, "no such directory"),
    ({"max_model_len": 513}, ConfigError, "max_model_len: 513 exceeds the model's positions, 512"),
])
def test_what_keeps_an_engine_from_starting_is_said(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    loop = Loop(make_config(**{"model": tiny_model, "data_dir": tmp_path, **changes}))
    with pytest.raises(error, match=message):
        loop(loop.client.supervisor.start())
    assert loop.client.supervisor.pid is None and not loop.client.ready and loop.ups == []
    loop.runner.close()


@pytest.mark.full
def test_an_engine_that_never_gets_ready_again_is_given_up(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "restart_delay_s", lambda failures: None if failures == 2 else 0.0)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    loop = Loop(make_config(model, tmp_path / "data"))
    loop(loop.client.supervisor.start())
    model.rename(tmp_path / "moved")
    assert loop.client.supervisor.pid is not None
    os.kill(loop.client.supervisor.pid, signal.SIGKILL)
    loop.wait(lambda: loop.client.supervisor.failure)
    failure = str(loop.client.supervisor.failure)
    assert "died 2 times before it was ready" in failure and "no such directory" in failure
    assert "restart the server" in caplog.text
    with pytest.raises(EngineUnavailable, match="died 2 times"):
        loop(loop.client.stats())
    loop(loop.client.supervisor.stop())
    loop.runner.close()


def test_stopping_leaves_a_job_to_be_resumed(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / ("long" * 30)  # too long for a socket in the file system
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    loop = Loop(make_config(tiny_model, tmp_path / "data"))
    loop(loop.client.supervisor.start())
    assert not list(temporary.iterdir()), "nothing would be left after kill -9"
    pid = loop.client.supervisor.pid
    endless = FinetuneConfig(
        lora=LoraConfig(r=4), batch_size=2, max_steps=100_000, checkpoint_steps=1, max_microbatch_tokens=256
    )
    start_job(loop, tmp_path, "kept", config=endless)
    loop.wait(lambda: any(isinstance(m, JobHappened) and m.checkpoint_step >= 2 for m in loop.job_messages))

    async def stop() -> None:
        stream = loop.client.generate(prompt_ids=PROMPT, sampling=LONG)
        await anext(stream)
        await loop.client.supervisor.stop()
        with pytest.raises(EngineUnavailable, match="ending"):
            await collect(stream)

    loop(stop())
    assert not Path(f"/proc/{pid}").exists()
    assert not loop.ended("kept")
    assert not list((tmp_path / "kept" / "checkpoints").glob(".step-*.tmp"))
    loop.runner.close()
