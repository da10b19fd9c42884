"""Named adapters in the engine: loading, versions, slots; and the profile that an engine measures once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest

from coserve.config.settings import EngineConfig, SamplingConfig, SchedulerConfig
from coserve.core import InvalidRequest, NotFound, PassCost
from coserve.engine.engine import Engine
from coserve.peft.format import save_adapter
from coserve.profiling.measure import Profiler
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.loaded import LoadedModel
from tests.tiny_engine import MakeEngine, drive, prompt, random_adapter

GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)


def ask(engine: Engine, adapter: str | None) -> list[int]:
    return engine.generate([prompt(20)], GREEDY, adapter=adapter)[0].token_ids


def test_an_adapter_from_files_is_the_one_from_memory(engines: MakeEngine, model: LoadedModel, tmp_path: Path) -> None:
    engine, adapter = engines(), random_adapter(model, 4)
    (tmp_path / "a").mkdir()
    save_adapter(tmp_path / "a", adapter, adapter.flat, base_name=model.name, fingerprint=model.fingerprint)
    engine.load_adapter("files", tmp_path / "a")
    engine.add_adapter("memory", adapter)
    assert ask(engine, "files") == ask(engine, "memory") != ask(engine, None)
    assert engine.metrics()["adapters"] == ["files", "memory"]
    for kind, arguments in ((NotFound, ("x", tmp_path / "missing")), (InvalidRequest, ("", tmp_path / "a"))):
        with pytest.raises(kind):
            engine.load_adapter(*arguments)
    assert engine.adapters.names == ("files", "memory")


def test_a_rank_over_the_limit_is_refused(engines: MakeEngine, model: LoadedModel) -> None:
    engine = engines(max_lora_rank=8)
    with pytest.raises(InvalidRequest, match="max_lora_rank") as caught:
        engine.add_adapter("wide", random_adapter(model, 9))
    assert caught.value.param == "max_lora_rank"
    assert engine.adapters.num_versions == 0


def test_those_that_use_an_adapter_keep_it(engines: MakeEngine, model: LoadedModel) -> None:
    """Over a newer version, over its removal, and over a preemption."""
    engine = engines(num_blocks=10, share=1.0)
    engine.add_adapter("tuned", random_adapter(model, 4, seed=1))
    expected = ask(engine, "tuned")
    first = engine.submit(prompt(20), GREEDY, adapter="tuned")
    others = [engine.submit(prompt(30 + n), GREEDY, arrival_s=first.arrival_s - 1) for n in range(3)]
    for _ in range(4):
        engine.step()
    engine.add_adapter("tuned", random_adapter(model, 4, seed=2))
    assert engine.adapters.num_versions == 2
    engine.unload_adapter("tuned")
    assert engine.adapters.num_versions == 1 and engine.adapters.names == ()
    with pytest.raises(NotFound):
        engine.submit(prompt(20), GREEDY, adapter="tuned")
    drive(engine)
    assert engine.metrics()["preemptions"] > 0 and all(other.finished for other in others)
    assert first.token_ids == expected
    assert engine.adapters.num_versions == 0
    with pytest.raises(NotFound):
        engine.unload_adapter("tuned")


def test_an_adapter_that_goes_before_its_request_is_admitted(engines: MakeEngine, model: LoadedModel) -> None:
    engine = engines()
    engine.add_adapter("tuned", random_adapter(model, 4))
    handle = engine.submit(prompt(20), SamplingConfig(max_tokens=4, n=2), adapter="tuned")
    engine.unload_adapter("tuned")
    drive(engine)
    assert handle.finished and isinstance(handle.error, NotFound)
    assert [output.finish_reason for output in handle.outputs] == ["error", "error"]
    with pytest.raises(NotFound):
        list(handle.chunks())


def test_slots_are_taken_over_from_adapters_without_users(engines: MakeEngine, model: LoadedModel) -> None:
    engine = engines(max_adapters=2)
    for number in range(4):
        engine.add_adapter(str(number), random_adapter(model, 2 + number, seed=number))
    found = [ask(engine, str(number)) for number in range(4)]
    assert len({tuple(tokens) for tokens in found}) == 4
    assert [ask(engine, str(number)) for number in range(4)] == found
    handles = [engine.submit(prompt(20), GREEDY, adapter=str(number)) for number in range(3)]
    drive(engine)
    assert [handle.token_ids for handle in handles] == found[:3], "the third waited for a slot"


def test_metrics_are_read_while_the_engines_thread_changes_adapters(
    engines: MakeEngine, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, adapter, in_slot = engines(), random_adapter(model, 4), AdapterSlots.__contains__
    save_adapter(tmp_path, adapter, adapter.flat, base_name=model.name, fingerprint=model.fingerprint)
    for name in ("one", "two"):
        engine.load_adapter(name, tmp_path)

    def meanwhile(slots: AdapterSlots, key: Hashable) -> bool:
        """What another thread may do in the middle of this one's look."""
        monkeypatch.undo()
        engine.add_adapter("three", adapter)
        return in_slot(slots, key)

    monkeypatch.setattr(AdapterSlots, "__contains__", meanwhile)
    assert engine.metrics()["adapters_resident"] == 2


def test_a_running_engine_takes_adapters(engines: MakeEngine, model: LoadedModel) -> None:
    """The busy thread lets others in, and they get their errors."""
    adapters = [random_adapter(model, 4, seed=seed) for seed in range(8)]
    with engines() as engine:
        stop = threading.Event()

        def keep_busy() -> None:
            while not stop.is_set():
                engine.generate([prompt(30)], GREEDY)

        busy = threading.Thread(target=keep_busy)
        busy.start()
        for adapter in adapters:
            engine.add_adapter("tuned", adapter)
        with pytest.raises(NotFound):
            engine.unload_adapter("nobody")
        served = ask(engine, "tuned")
        stop.set()
        busy.join()
    other = engines()
    other.add_adapter("last", adapters[-1])
    assert served == ask(other, "last")


def test_adapters_come_and_go_while_requests_use_them(engines: MakeEngine, model: LoadedModel) -> None:
    """Each request gets the tokens of one version from its first to its last; who comes after an unload is told."""
    adapters = [random_adapter(model, 4, seed=seed) for seed in range(3)]
    alone = engines(max_adapters=8)
    wanted = []
    for number, adapter in enumerate(adapters):
        alone.add_adapter(str(number), adapter)
        wanted.append(ask(alone, str(number)))
    assert len({tuple(tokens) for tokens in wanted}) == 3
    with engines(max_adapters=8) as engine:
        engine.add_adapter("tuned", adapters[0])
        stop, served, refused, odd = threading.Event(), [], [], []

        def keep_asking() -> None:
            while not stop.is_set():
                try:
                    served.append(ask(engine, "tuned"))
                except NotFound as error:
                    refused.append(error)
                except Exception as error:
                    odd.append(error)

        users = [threading.Thread(target=keep_asking) for _ in range(3)]
        for user in users:
            user.start()
        for turn in range(30):
            engine.add_adapter("tuned", adapters[turn % 3])
            new, since = wanted[turn % 3], len(served)
            wait_for(lambda: new in served[since:] or bool(odd))  # noqa: B023
            if turn % 3 == 2:
                engine.unload_adapter("tuned")
                with pytest.raises(NotFound):
                    engine.unload_adapter("tuned")
                wait_for(lambda: len(refused) > 0 or bool(odd))
                refused.clear()
        stop.set()
        for user in users:
            user.join(30)
        assert not engine.closed and not odd
    assert {tuple(tokens) for tokens in served} == {tuple(tokens) for tokens in wanted}
    assert engine.adapters.num_versions == 0


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(1e-3)


def test_a_profile_is_measured_once(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COSERVE_CACHE", str(tmp_path / "cache"))
    config = EngineConfig(
        memory_bytes=8 << 20, scheduler=SchedulerConfig(max_num_batched_tokens=64, max_window_tokens=64)
    )
    reports: list[str] = []
    measured = Engine(model, config, report=reports.append)
    assert any("measuring" in line for line in reports) and any("measured" in line for line in reports)
    assert measured.blocks.num_used == measured.blocks.num_arena == 0
    assert len(list((tmp_path / "cache/profiles").iterdir())) == 1

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(Profiler, "measure", never)
    monkeypatch.setattr(Profiler, "slowdown", lambda *_: 1.4)
    cached = Engine(model, config, report=reports.append)
    cost = PassCost(32, 1, 0, 0, 528, 0, 0, 0, 0)
    assert cached.scheduler.latency.pass_seconds(cost) == measured.scheduler.latency.pass_seconds(cost) > 0
    assert ask(cached, None) == ask(measured, None)
    for engine in (measured, cached):
        engine.close()


def test_a_profile_of_a_busy_machine_is_measured_again(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COSERVE_CACHE", str(tmp_path / "cache"))
    config = EngineConfig(
        memory_bytes=8 << 20, scheduler=SchedulerConfig(max_num_batched_tokens=64, max_window_tokens=64)
    )
    Engine(model, config).close()
    (path,) = (tmp_path / "cache/profiles").iterdir()
    kept = json.loads(path.read_text())
    for sample in kept["samples"]:
        sample["seconds"] *= 50
    path.write_text(json.dumps(kept))
    reports: list[str] = []
    Engine(model, config, report=reports.append).close()
    assert "the kept profile was measured on a busy machine" in reports
    assert json.loads(path.read_text()) != kept
