"""Slots of adapters: at most so many are in memory, whoever finds none waits, fairly, and nobody else waits with them."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coserve.config.settings import LoraConfig, SamplingConfig, SchedulerConfig
from coserve.core import CapacityError, InvalidRequest
from coserve.engine.engine import Engine
from coserve.peft.adapter import Adapter
from coserve.peft.format import save_adapter
from coserve.peft.lora import LoraAdapter
from coserve.runtime.adapters import AdapterSlots
from coserve.runtime.loaded import LoadedModel
from tests.tiny_engine import MakeEngine, drive, make_engine, prompt, random_adapter

GREEDY = SamplingConfig(max_tokens=8, temperature=0, ignore_eos=True)
LONG = SamplingConfig(max_tokens=60, temperature=0, ignore_eos=True)
NUM = 12


@pytest.fixture(scope="module")
def adapters(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Directories of adapters, all different."""
    root = tmp_path_factory.mktemp("adapters")
    for number in range(NUM):
        adapter, directory = random_adapter(model, 4, seed=number), root / str(number)
        directory.mkdir()
        save_adapter(directory, adapter, adapter.flat, base_name=model.name, fingerprint=model.fingerprint)
    return [root / str(number) for number in range(NUM)]


@pytest.fixture(scope="module")
def expected(model: LoadedModel, adapters: list[Path]) -> list[list[int]]:
    """What each adapter says to prompt(20), from an engine with room for all."""
    found: list[list[int]] = []
    engine = make_engine(model, max_adapters=NUM)
    for number, directory in enumerate(adapters):
        engine.load_adapter(str(number), directory)
        found.append(engine.generate([prompt(20)], GREEDY, adapter=str(number))[0].token_ids)
    engine.close()
    assert len({tuple(tokens) for tokens in found}) == NUM
    return found


def load_all(engine: Engine, adapters: list[Path]) -> None:
    for number, directory in enumerate(adapters):
        engine.load_adapter(str(number), directory)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many adapters that were read from files are in memory."""
    made: list[weakref.ref[Adapter]] = []
    read = LoadedModel.load_adapter

    def remember(self: LoadedModel, directory: Path) -> Adapter:
        adapter = read(self, directory)
        made.append(weakref.ref(adapter))
        return adapter

    monkeypatch.setattr(LoadedModel, "load_adapter", remember)

    def count() -> int:
        gc.collect()
        return sum(reference() is not None for reference in made)

    return count


@pytest.mark.full
def test_memory_does_not_grow_beyond_the_slots(
    engines: MakeEngine, adapters: list[Path], expected: list[list[int]], alive: Callable[[], int]
) -> None:
    engine = engines(max_adapters=2)
    load_all(engine, adapters)
    sizes = set()
    for turn in range(2):
        for number in range(NUM):
            assert engine.generate([prompt(20)], GREEDY, adapter=str(number))[0].token_ids == expected[number], (turn, number)
            assert engine.adapters.num_resident <= 2
            assert alive() <= 1, "the values lie in slots; at most the last one read is not collected yet"
            slots = engine.adapters.slots
            sizes.add(sum(stack.numel() for stacks in slots._stacks for stack in stacks.values()))
    assert engine.adapters.slots.num_slots == 2
    assert len(sizes) == 1
    assert engine.metrics()["adapters_resident"] == 2


def test_all_of_many_at_once_are_served(engines: MakeEngine, adapters: list[Path], expected: list[list[int]]) -> None:
    engine = engines(max_adapters=2)
    load_all(engine, adapters)
    handles = [engine.submit(prompt(20), GREEDY, adapter=str(number)) for number in range(NUM) for _ in range(2)]
    worst = 0

    def done() -> bool:
        nonlocal worst
        worst = max(worst, engine.adapters.num_resident)
        return engine.idle

    drive(engine, done)
    assert [handle.token_ids for handle in handles] == [tokens for tokens in expected for _ in range(2)]
    assert worst <= 4, "two slots, and two that are read ahead"


def test_base_requests_do_not_wait_for_slots(engines: MakeEngine, adapters: list[Path]) -> None:
    engine = engines(max_adapters=1)
    load_all(engine, adapters[:2])
    holder = engine.submit(prompt(20), LONG, adapter="0")
    drive(engine, lambda: len(holder.token_ids) > 2)
    waiting = [engine.submit(prompt(20), GREEDY, adapter="1") for _ in range(50)]
    base = engine.submit(prompt(30), GREEDY)
    drive(engine, lambda: base.finished)
    assert not holder.finished and not any(handle.token_ids for handle in waiting)
    assert engine.metrics()["adapters_waiting"] == 1
    drive(engine)
    assert all(handle.finish_reason == "length" for handle in waiting)


def test_those_that_wait_can_be_cancelled(engines: MakeEngine, adapters: list[Path]) -> None:
    engine = engines(max_adapters=1)
    load_all(engine, adapters[:2])
    holder = engine.submit(prompt(20), LONG, adapter="0")
    drive(engine, lambda: len(holder.token_ids) > 2)
    waiting = engine.submit(prompt(20), GREEDY, adapter="1")
    engine.step()
    late = engine.submit(prompt(21), GREEDY, adapter="0")
    for _ in range(3):
        engine.step()
    assert not late.token_ids, "its adapter is to give its slot up"
    waiting.cancel()
    drive(engine, lambda: bool(late.token_ids))
    assert waiting.finish_reason == "cancelled" and not holder.finished, "nobody wants the slot any more"
    drive(engine)


def test_a_flood_for_one_adapter_does_not_keep_another_one_out(engines: MakeEngine, adapters: list[Path]) -> None:
    """The wait is bounded by requests that ran when it began, however many come for the adapter that has the slot."""
    engine = engines(max_adapters=1, scheduler=SchedulerConfig(tpot_ms=20, ttft_ms=3000, max_num_seqs=4))
    load_all(engine, adapters[:2])
    flood = [engine.submit(prompt(20), GREEDY, adapter="0") for _ in range(40)]
    drive(engine, lambda: any(handle.token_ids for handle in flood))
    asked = engine.submit(prompt(20), GREEDY, adapter="1", tenant="other")
    while not asked.finished:
        if len(flood) < 400:
            flood.append(engine.submit(prompt(20), GREEDY, adapter="0"))
        engine.step()
        if sum(handle.finished for handle in flood) > 12:
            break
    assert asked.finished, "at most the four that ran, and those that came in while the other one was read"
    for handle in flood:
        handle.cancel()
    drive(engine)


def test_tenants_take_turns(engines: MakeEngine, adapters: list[Path]) -> None:
    """One who asks for eleven adapters is not served eleven times before another one's first."""
    engine = engines(max_adapters=1)
    load_all(engine, adapters)
    many = [engine.submit(prompt(20), GREEDY, adapter=str(number), tenant="a") for number in range(NUM - 1)]
    drive(engine, lambda: any(handle.token_ids for handle in many))
    one = engine.submit(prompt(20), GREEDY, adapter=str(NUM - 1), tenant="b")
    drive(engine, lambda: one.finished)
    assert sum(handle.finished for handle in many) <= 3
    drive(engine)
    assert all(handle.finish_reason == "length" for handle in many)


def test_one_tenants_requests_are_served_in_order(engines: MakeEngine, adapters: list[Path]) -> None:
    engine = engines(max_adapters=1)
    for number in (3, 2, 1, 0):  # the last one has the slot
        engine.load_adapter(str(number), adapters[number])
    order: list[int] = []
    for number in range(4):
        handle = engine.submit(prompt(20), GREEDY, adapter=str(number))
        handle.listen(lambda chunk, number=number: order.append(number) if chunk.finish_reason else None)  # type: ignore[misc]
        engine.step()
    drive(engine)
    assert order == [0, 1, 2, 3]


def test_files_that_are_gone_end_their_requests_only(
    engines: MakeEngine, adapters: list[Path], expected: list[list[int]], tmp_path: Path
) -> None:
    engine = engines(max_adapters=1)
    copied = Path(shutil.copytree(adapters[0], tmp_path / "copy"))
    engine.load_adapter("gone", copied)
    engine.load_adapter("1", adapters[1])
    assert engine.generate([prompt(20)], GREEDY, adapter="1")[0].token_ids == expected[1]
    shutil.rmtree(copied)
    broken = [engine.submit(prompt(20), GREEDY, adapter="gone") for _ in range(3)]
    fine = engine.submit(prompt(20), GREEDY, adapter="1")
    drive(engine)
    for handle in broken:
        assert handle.error is not None and "no directory" in str(handle.error) and str(tmp_path) not in str(handle.error)
    assert fine.token_ids == expected[1]
    shutil.copytree(adapters[0], copied)
    assert engine.generate([prompt(20)], GREEDY, adapter="gone")[0].token_ids == expected[0], "it is tried again"


def test_a_request_that_waits_keeps_its_version(
    engines: MakeEngine, adapters: list[Path], expected: list[list[int]], tmp_path: Path
) -> None:
    engine = engines(max_adapters=1)
    engine.load_adapter("tuned", adapters[0])
    engine.load_adapter("other", adapters[2])
    holder = engine.submit(prompt(20), LONG, adapter="other")
    drive(engine, lambda: len(holder.token_ids) > 2)
    before = engine.submit(prompt(20), GREEDY, adapter="tuned")
    engine.step()
    engine.load_adapter("tuned", adapters[1])
    after = engine.submit(prompt(20), GREEDY, adapter="tuned")
    assert str(adapters[0]) in engine.adapters.directories, "its files are still needed"
    drive(engine)
    assert (before.token_ids, after.token_ids) == (expected[0], expected[1])
    assert str(adapters[0]) not in engine.adapters.directories
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidRequest):
        engine.load_adapter("tuned", tmp_path)
    assert engine.generate([prompt(20)], GREEDY, adapter="tuned")[0].token_ids == expected[1], "a bad one replaces nothing"


def test_preempted_requests_come_back_to_their_adapter(
    engines: MakeEngine, adapters: list[Path], expected: list[list[int]]
) -> None:
    engine = engines(max_adapters=1, num_blocks=10, share=1.0)
    load_all(engine, adapters[:3])
    handles = [engine.submit(prompt(20), GREEDY, adapter=str(number % 3)) for number in range(12)]
    drive(engine)
    assert [handle.token_ids for handle in handles] == [expected[number % 3] for number in range(12)]


def test_with_a_thread_of_its_own(engines: MakeEngine, adapters: list[Path], expected: list[list[int]]) -> None:
    with engines(max_adapters=2) as engine:
        load_all(engine, adapters)
        handles = [engine.submit(prompt(20), GREEDY, adapter=str(number)) for number in range(NUM)]
        assert all(handle.wait(30) for handle in handles)
    assert [handle.token_ids for handle in handles] == expected


def test_without_memory_for_a_slot_nothing_is_lost(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is one that ends a request, and a later try finds everything as it was."""
    slots = AdapterSlots(model.architecture, torch.float32, torch.device("cpu"), max_slots=4, max_rank=64)
    small, large = (
        LoraAdapter.create(model.architecture, LoraConfig(r=r), dtype=torch.float32, device=torch.device("cpu"), seed=r)
        for r in (4, 16)
    )
    slots.place("small", small)
    zeros = AdapterSlots._zeros

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterSlots, "_zeros", full)
    for _ in range(3):
        with pytest.raises(CapacityError, match="max_adapters"):
            slots.place("large", large)
    assert slots.keys == ("small",)
    monkeypatch.setattr(AdapterSlots, "_zeros", zeros)
    assert {slots.place("large", large), slots.place("small", small)} == {0, 1}


def test_a_device_without_memory_for_an_adapter_ends_its_requests_only(
    engines: MakeEngine, adapters: list[Path], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines(max_adapters=NUM)
    load_all(engine, adapters[:1])
    assert engine.generate([prompt(20)], GREEDY, adapter="0")[0].token_ids == expected[0]
    zeros = AdapterSlots._zeros

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AdapterSlots, "_zeros", full)
    engine.load_adapter("1", adapters[1])
    ended, fine = engine.submit(prompt(20), GREEDY, adapter="1"), engine.submit(prompt(20), GREEDY, adapter="0")
    drive(engine)
    assert isinstance(ended.error, CapacityError) and fine.token_ids == expected[0]
    monkeypatch.setattr(AdapterSlots, "_zeros", zeros)
    assert engine.generate([prompt(20)], GREEDY, adapter="1")[0].token_ids == expected[1]
