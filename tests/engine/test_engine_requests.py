"""Requests through the engine's public methods: how outputs end, streams, cancelling, errors, threads, closing."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Generator
from dataclasses import replace
from typing import Any

import pytest
from torch.multiprocessing.reductions import StorageWeakRef

from coserve.config.settings import EngineConfig, SamplingConfig, SchedulerConfig
from coserve.core import CapacityError, ConfigError, CoserveError, InvalidRequest, NotFound
from coserve.engine.engine import Engine
from coserve.engine.requests import Chunk
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.latency import LatencyModel
from tests.tiny_engine import MakeEngine, assert_nothing_left, drive, make_engine, prompt

GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)
LONG = replace(GREEDY, max_tokens=400)
IDS = prompt(20)


@pytest.fixture
def letters(model: LoadedModel) -> SamplingConfig:
    """Outputs of letters only, many letters to a token: the bias leaves no other token a chance."""
    one_word = [i for i in range(model.tokenizer.vocab_size) if model.tokenizer.decode([i]).isascii()
                and model.tokenizer.decode([i]).isalpha()]
    return replace(GREEDY, max_tokens=40, temperature=1, seed=3, logit_bias=dict.fromkeys(one_word, 100.0))


# --- how outputs end ---


def test_bias_and_penalties_reach_the_sampler(engines: MakeEngine, letters: SamplingConfig) -> None:
    engine = engines()
    assert engine.generate([IDS], letters)[0].text.isalpha()
    only = replace(GREEDY, logit_bias={50: 100.0, 60: 99.0})
    assert set(engine.generate([IDS], only)[0].token_ids) <= {50, 60}
    penalized = engine.generate([IDS], replace(only, frequency_penalty=2.0))[0].token_ids
    assert {50, 60} <= set(penalized), "what was said often gives way"
    plain = engine.generate([IDS], GREEDY)[0].token_ids
    for setting in ({"presence_penalty": 2.0}, {"repetition_penalty": 3.0}):
        assert engine.generate([IDS], replace(GREEDY, **setting))[0].token_ids != plain


@pytest.mark.parametrize("start", [0, 3, 11, 30])
def test_stop_strings_across_token_borders(engines: MakeEngine, letters: SamplingConfig, start: int) -> None:
    engine = engines()
    whole = engine.generate([IDS], letters)[0]
    stop = whole.text[start : start + 7]
    assert all(stop not in engine.model.tokenizer.decode([token]) for token in whole.token_ids)
    config = replace(letters, stop=("?!", stop))
    chunks = list(engine.stream(IDS, config))
    text = "".join(chunk.text for chunk in chunks)
    assert text == whole.text[: whole.text.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    handle = engine.generate([IDS], config)[0]
    assert handle.text == text
    assert handle.token_ids == whole.token_ids[: len(handle.token_ids)]
    assert len(handle.token_ids) < len(whole.token_ids)


def test_what_looks_like_a_stop_string_is_given_at_the_end(engines: MakeEngine, letters: SamplingConfig) -> None:
    engine = engines()
    whole = engine.generate([IDS], letters)[0]
    handle = engine.generate([IDS], replace(letters, stop=(whole.text[-2:] + "?",)))[0]
    assert (handle.text, handle.finish_reason) == (whole.text, "length")


def test_end_of_sequence_and_stop_tokens(engines: MakeEngine, letters: SamplingConfig) -> None:
    engine = engines()
    end = engine.model.architecture.eos_token_ids[0]
    forced = replace(GREEDY, ignore_eos=False, logit_bias={end: 100.0})
    handle = engine.generate([IDS], forced)[0]
    assert (handle.token_ids, handle.text, handle.finish_reason) == ([end], "", "stop")
    ignoring = engine.generate([IDS], replace(forced, ignore_eos=True))[0]
    assert (ignoring.token_ids, ignoring.finish_reason) == ([end] * 24, "length")
    patient = engine.generate([IDS], replace(forced, min_tokens=5))[0]
    assert len(patient.token_ids) == 6 and patient.token_ids[-1] == end and end not in patient.token_ids[:-1]
    plain = engine.generate([IDS], letters)[0]
    token = plain.token_ids[7]
    stopped = engine.generate([IDS], replace(letters, stop_token_ids=(token,)))[0]
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(token) + 1]
    assert plain.text.startswith(stopped.text) and stopped.finish_reason == "stop"


def test_one_token(engines: MakeEngine) -> None:
    handle = engines().generate([IDS], replace(GREEDY, max_tokens=1))[0]
    assert (len(handle.token_ids), len(handle.token_times), handle.finish_reason) == (1, 1, "length")


def test_a_text_is_continued(engines: MakeEngine) -> None:
    engine = engines()
    assert engine.generate(["hello world"], GREEDY)[0].token_ids == \
        engine.generate([engine.model.tokenizer.encode("hello world")], GREEDY)[0].token_ids


# --- streams and cancelling ---


def test_a_stream_gives_what_generate_gives(engines: MakeEngine) -> None:
    engine = engines()
    config = replace(GREEDY, n=2, temperature=1, logprobs=1)
    handle = engine.generate([IDS], config)[0]
    chunks = list(engine.stream(IDS, config))
    for output in handle.outputs:
        own = [chunk for chunk in chunks if chunk.index == output.index]
        assert [token for chunk in own for token in chunk.token_ids] == output.token_ids
        assert "".join(chunk.text for chunk in own) == output.text
        assert [entry.token for chunk in own for entry in chunk.logprobs] == output.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + ["length"]


def test_leaving_a_stream_cancels(engines: MakeEngine) -> None:
    engine = engines()
    other = engine.submit(prompt(9), GREEDY)
    stream = engine.stream(IDS, LONG)
    assert isinstance(stream, Generator)
    for _ in range(3):
        next(stream)
    stream.close()
    drive(engine)
    assert engine.metrics()["requests_cancelled"] == 1
    assert other.token_ids == engine.generate([prompt(9)], GREEDY)[0].token_ids


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
def test_cancelling_frees_and_harms_nobody(engines: MakeEngine, steps: int) -> None:
    """Before it is admitted, in its prompt, at its first token with its siblings waiting, in the middle."""
    engine = engines(scheduler=SchedulerConfig(max_num_batched_tokens=16))
    expected = engine.generate([prompt(9)], GREEDY)[0].token_ids
    gone = engine.submit(IDS, replace(LONG, n=3))
    other = engine.submit(prompt(9), GREEDY)
    for _ in range(steps):
        engine.step()
    gone.cancel()
    drive(engine)
    assert [output.finish_reason for output in gone.outputs] == ["cancelled"] * 3
    assert gone.finished and gone.error is None and len(gone.token_ids) < 400
    assert other.token_ids == expected
    gone.cancel()
    assert engine.idle, "cancelling again does nothing"


def test_asyncio_streams(engines: MakeEngine) -> None:
    engine = engines()
    prompts = [prompt(n) for n in (5, 20, 40)]
    expected = [handle.token_ids for handle in engine.generate(prompts, GREEDY)]

    async def collect(ids: list[int]) -> list[int]:
        return [token async for chunk in engine.astream(ids, GREEDY) for token in chunk.token_ids]

    async def leave() -> None:
        stream = engine.astream(IDS, LONG)
        assert isinstance(stream, AsyncGenerator)
        async for _ in stream:
            break
        await stream.aclose()

    async def everything() -> list[list[int]]:
        return (await asyncio.gather(*map(collect, prompts), leave()))[:3]

    with pytest.raises(ConfigError, match="start"):
        asyncio.run(collect(IDS))
    with engine:
        assert asyncio.run(everything()) == expected
        asyncio.run(leave())  # its loop closes while the request still runs
        assert engine.generate([prompts[0]], GREEDY)[0].token_ids == expected[0]


# --- errors ---


@pytest.mark.parametrize(("ids", "options", "kind", "param"), [
    ([], {}, InvalidRequest, "prompt"),
    ("", {}, InvalidRequest, "prompt"),
    ([5, -1], {}, InvalidRequest, "prompt"),
    ([100_000], {}, InvalidRequest, "prompt"),
    (prompt(500), {}, InvalidRequest, "max_tokens"),
    ([1], {"sampling": replace(GREEDY, logit_bias={100_000: 1.0})}, InvalidRequest, "logit_bias"),
    ([1], {"sampling": replace(GREEDY, stop_token_ids=(-1,))}, InvalidRequest, "stop_token_ids"),
    ([1], {"adapter": "nobody"}, NotFound, "adapter"),
])
def test_errors_name_the_field(
    engines: MakeEngine, ids: list[int], options: dict[str, object], kind: type[CoserveError], param: str
) -> None:
    engine = engines()
    with pytest.raises(kind, match=param) as caught:
        engine.submit(ids, **{"sampling": GREEDY, **options})
    assert caught.value.param == param
    assert engine.idle


def test_settings_are_checked_before_they_reach_an_engine() -> None:
    for settings in ({"n": 0}, {"max_tokens": -1}, {"stop": ("",)}, {"min_tokens": 9, "max_tokens": 3}):
        with pytest.raises(ConfigError) as caught:
            SamplingConfig(**settings)
        assert caught.value.param == next(iter(settings))


def test_a_request_that_no_pool_can_hold_is_refused(engines: MakeEngine) -> None:
    engine = engines(num_blocks=10, share=0.5)
    engine.submit(prompt(56), GREEDY)
    with pytest.raises(InvalidRequest, match="80 tokens") as caught:
        engine.submit(prompt(57), GREEDY)
    assert caught.value.param == "max_tokens"
    drive(engine)


def test_too_many_are_refused_whether_admitted_or_not(engines: MakeEngine) -> None:
    for steps in (0, 1):
        engine = engines(max_waiting=2, scheduler=SchedulerConfig(max_num_seqs=1))
        for _ in range(3):
            engine.submit(IDS, GREEDY)
        for _ in range(steps):
            engine.step()
        with pytest.raises(CapacityError) as caught:
            engine.submit(IDS, GREEDY)
        assert caught.value.param == "max_waiting"
        drive(engine)
        engine.generate([IDS], GREEDY)


def test_a_bad_prompt_among_many_leaves_nothing_running(engines: MakeEngine) -> None:
    engine = engines()
    with pytest.raises(InvalidRequest):
        engine.generate([IDS, [], IDS], LONG)
    engine.step()
    assert engine.idle


# --- who is next ---


def test_a_late_prompt_is_finished_before_newcomers_take_its_place(engines: MakeEngine) -> None:
    """The first has missed its objective, so the second comes first, but there is no room for it: the first must go on."""
    for scheduler in (SchedulerConfig(max_num_batched_tokens=16), SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=1)):
        engine = engines(num_blocks=8, share=1.0, scheduler=scheduler)
        first = engine.submit(prompt(90), GREEDY, ttft_ms=0.01)
        for _ in range(3):
            engine.step()
        second = engine.submit(prompt(80), GREEDY, ttft_ms=60_000)
        drive(engine, seconds=20)
        assert first.finished and second.finished


# --- objectives ---


def test_objectives_are_the_profiles_unless_they_are_given(model: LoadedModel) -> None:
    lines: list[str] = []
    config = EngineConfig(memory_bytes=1 << 20, scheduler=SchedulerConfig(ttft_ms=700))
    engine = Engine(model, config, latency=LatencyModel({("iteration", "once", 0): 0.02}), report=lines.append)
    assert engine.objectives == (0.03, 0.7)
    assert lines[-1] == "objectives: 30 ms per token (from this machine's profile), 700 ms to the first"
    own = [engine.submit(IDS, GREEDY, tpot_ms=tpot_ms, ttft_ms=ttft_ms)
           for tpot_ms, ttft_ms in ((None, None), (5, "none"), ("none", 900))]
    engine.step()
    states = [request.state for request in engine.requests.live.values()]
    assert [(s.tpot_s, s.ttft_s) for s in states] == [(0.03, 0.7), (0.005, math.inf), (math.inf, 0.9)]
    drive(engine)
    assert all(handle.finish_reason == "length" for handle in own)
    engine.close()


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, True, "None", "fast"])
def test_a_wrong_objective_is_refused_by_name(engines: MakeEngine, value: Any) -> None:
    engine = engines()
    for name in ("tpot_ms", "ttft_ms"):
        with pytest.raises(ConfigError, match=f'^{name}: must be a positive number of milliseconds or "none"'):
            engine.submit(IDS, GREEDY, **{name: value})
    assert engine.idle


# --- threads ---


def test_many_threads_submit_to_a_running_engine(engines: MakeEngine) -> None:
    engine = engines()
    prompts = [prompt(4 + 3 * n) for n in range(12)]
    expected = [handle.token_ids for handle in engine.generate(prompts, GREEDY)]
    found: dict[int, list[int]] = {}

    def ask(part: int) -> None:
        for number in range(part, len(prompts), 4):
            if number % 2:
                found[number] = engine.generate([prompts[number]], GREEDY)[0].token_ids
            else:
                found[number] = [t for chunk in engine.stream(prompts[number], GREEDY) for t in chunk.token_ids]
            engine.metrics()

    with engine:
        threads = [threading.Thread(target=ask, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [found[number] for number in range(len(prompts))] == expected


def test_closing_while_busy_ends_everything(engines: MakeEngine) -> None:
    engine = engines().start()
    handles = [engine.submit(prompt(n + 1), replace(LONG, n=2)) for n in range(10)]
    seen: list[Chunk] = []
    handles[0].listen(seen.append)
    while len(seen) < 5:
        assert handles[1].wait(0.01) is False
    engine.close()
    assert all(handle.finished for handle in handles)
    assert {output.finish_reason for handle in handles for output in handle.outputs} == {"cancelled"}
    assert_nothing_left(engine)
    handles[0].cancel()
    with pytest.raises(CoserveError, match="closed"):
        engine.submit(IDS, GREEDY)


def test_a_crash_of_the_engine_leaves_nobody_waiting(engines: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()

    def explode(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(engine.runner, "run", explode)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    engine.start()
    handle = engine.submit(IDS, replace(GREEDY, n=2))
    assert handle.wait(20)
    assert "a bug" in str(handle.error)
    with pytest.raises(CoserveError, match="a bug"):
        list(handle.chunks())
    with pytest.raises(CoserveError):
        engine.submit(IDS, GREEDY)


def test_a_dead_thread_is_seen_and_waited_for(engines: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, caught = engines(), []
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_value))
    assert not engine.closed and engine.failure is None
    engine.start()
    assert not engine.closed and not engine.wait_failed(0.01)
    first = engine.submit(IDS, LONG)
    while not first.token_ids:
        time.sleep(1e-3)
    monkeypatch.setattr(engine.runner, "run", lambda *_: 1 / 0)
    assert engine.wait_failed(20)
    assert engine.closed and "ZeroDivisionError" in str(engine.failure)
    assert first.finished and first.error is engine.failure, "by then everyone knows"
    for call in (lambda: engine.submit(IDS, GREEDY), lambda: engine.unload_adapter("x"), lambda: engine.add_adapter("x", None)):
        with pytest.raises(CoserveError, match="ZeroDivisionError"):
            call()
    engine.close()
    assert engine.wait_failed() and [type(error) for error in caught] == [ZeroDivisionError]


def test_listeners_that_raise_do_not_keep_others_waiting(engines: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    handles = [engine.submit(IDS, replace(LONG, n=2)) for _ in range(3)]
    for handle in handles[:2]:
        handle.listen(lambda _: 1 / 0)
    engine.start()
    assert all(handle.wait(20) and handle.error is not None for handle in handles)
    assert engine.wait_failed(20)


def test_a_request_that_can_not_begin_ends_with_the_engine(engines: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine.scheduler, "add_request", lambda *_: 1 / 0)
    handles = [engine.submit(IDS, GREEDY) for _ in range(3)]
    engine.start()
    assert all(handle.wait(20) and "ZeroDivisionError" in str(handle.error) for handle in handles)
    assert engine.wait_failed(20)


def test_a_closed_engine_has_not_failed(engines: MakeEngine) -> None:
    engine = engines().start()
    engine.close()
    assert engine.closed and not engine.wait_failed() and engine.failure is None
    with pytest.raises(CoserveError, match="closed"):
        engine.unload_adapter("x")
    engine.close()


@pytest.mark.parametrize("threaded", [False, True])
def test_closing_gives_the_pool_back_without_the_garbage_collector(model: LoadedModel, threaded: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        engine = make_engine(model)
        storage = StorageWeakRef(engine.device.pool.buffer.untyped_storage())
        whole = weakref.ref(engine)
        if threaded:
            engine.start()
        handles = engine.generate([IDS, IDS], replace(GREEDY, n=2))
        running = engine.submit(IDS, LONG)
        if not threaded:
            engine.step()
        engine.close()
        assert storage.expired(), "though the engine and its handles are still there"
        assert running.finish_reason == "cancelled" and engine.metrics()["memory"]["used"] == 0
        del engine, handles, running
        assert whole() is None
    finally:
        gc.enable()


def test_metrics(engines: MakeEngine) -> None:
    engine: Engine = engines()
    engine.generate([IDS, IDS], GREEDY)
    found = engine.metrics()
    assert found["inference_tokens"] == 48 and found["requests_finished"] == 2 and found["requests_cancelled"] == 0
    assert found["prompt_tokens"] in (40, 24)
    assert 0 < found["inference_busy_s"] <= found["busy_s"] and found["finetune_busy_s"] == found["finetune_tokens"] == 0
    assert (found["running"], found["waiting"], found["jobs"], found["preemptions"]) == (0, 0, 0, 0)
    assert found["iterations"] > 0 and found["adapters"] == [] and found["adapter_versions"] == 0
    assert set(found["prediction_errors"]) >= {"prefill", "decode"} and found["reserve"] >= 0
    memory = found["memory"]
    assert memory["used"] == memory["arena"] == 0 and memory["cached"] + memory["free"] == 4096 and memory["block_bytes"] > 0
