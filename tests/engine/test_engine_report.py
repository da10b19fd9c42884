"""An engine's report of its load: its fields, made while iterations run."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from coserve.cluster.load import Load
from coserve.config.settings import SamplingConfig
from coserve.engine import report as report_module
from coserve.engine.adapters import _FIRST_LOAD_S
from coserve.engine.report import EngineReport
from coserve.peft.format import save_adapter
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.prefixhash import prompt_hashes
from tests.tiny_engine import BLOCK, MakeEngine, prompt, random_adapter

GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)


def test_a_report_has_the_fields_of_a_load() -> None:
    told_by_others = {"replica", "number", "draining"}
    assert set(Load.__struct_fields__) - told_by_others == set(EngineReport._fields)


def test_an_idle_engine(engines: MakeEngine, model: LoadedModel) -> None:
    engine = engines()
    report = engine.load_report()
    assert (report.queued_prompt_tokens, report.running, report.waiting) == (0, 0, 0)
    assert report.free_blocks == report.num_blocks == engine.blocks.num_blocks and report.block_tokens == BLOCK
    assert report.resident == [] and report.prefixes == [] and report.headroom == 1.0
    assert report.iteration_s > 0 and report.prefill_s_per_token > 0 and report.output_s > 0


def test_requests_prefixes_and_tenants(
    engines: MakeEngine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    engine.load_report()
    ids = prompt(100)
    handle = engine.submit(ids, GREEDY, tenant="t")
    second = engine.submit(prompt(60), GREEDY, tenant="u")
    assert engine.load_report().waiting == 2, "posted, and not admitted yet"
    engine.step()
    report = engine.load_report()
    assert (report.running, report.waiting) == (2, 0) and report.free_blocks < report.num_blocks
    while not handle.finished or not second.finished:
        engine.step()
    assert engine.load_report().running == 0
    monkeypatch.setattr(report_module, "PREFIXES_EVERY_S", 0.0)
    told = engine.load_report().prefixes
    assert told is not None and set(prompt_hashes("t", None, ids, BLOCK)) <= set(told)
    assert not set(prompt_hashes("u", None, ids, BLOCK)) & set(told)
    monkeypatch.undo()
    assert engine.load_report().prefixes is None, "as before"


def test_prompts_that_wait_are_counted_without_what_is_cached(engines: MakeEngine, model: LoadedModel) -> None:
    engine = engines()
    engine.generate([prompt(100)], GREEDY)
    for _ in range(3):
        engine.submit(prompt(100), GREEDY)
    engine._loop.drain()
    assert engine.load_report().queued_prompt_tokens == 3 * (100 - 96)


def test_resident_adapters_and_what_a_load_takes(engines: MakeEngine, model: LoadedModel, tmp_path: Path) -> None:
    engine = engines(max_adapters=1)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        adapter = random_adapter(model, 4)
        save_adapter(tmp_path / name, adapter, adapter.flat, base_name=model.name, fingerprint=model.fingerprint)
        engine.load_adapter(name, tmp_path / name)
    first = engine.load_report()
    engine.generate([prompt(20)], GREEDY, adapter="a")
    assert engine.load_report().resident == ["a"] and first.adapter_load_s not in (0.0, _FIRST_LOAD_S)
    engine.generate([prompt(20)], GREEDY, adapter="b")
    assert engine.load_report().resident == ["b"]


def test_reports_are_made_beside_iterations(engines: MakeEngine, model: LoadedModel) -> None:
    """From another thread, ten times as often as a server asks."""
    engine, reports, stop = engines(), list[EngineReport](), threading.Event()

    def ask() -> None:
        while not stop.wait(0.005):
            reports.append(engine.load_report())

    thread = threading.Thread(target=ask)
    engine.load_report()
    with engine:
        thread.start()
        handles = [engine.submit(prompt(20 + number), GREEDY, tenant=f"t{number % 7}") for number in range(60)]
        for handle in handles:
            list(handle.chunks())
        time.sleep(0.02)
        stop.set()
        thread.join()
    assert len(reports) > 5 and max(report.running for report in reports) > 1


def test_charges_reach_the_scheduler(engines: MakeEngine, model: LoadedModel) -> None:
    engine = engines()
    for tenant in ("here", "away"):
        engine.submit(prompt(20), GREEDY, tenant=tenant)
    engine.step()
    before = engine.scheduler.tenants.served("away")
    engine.charge_tenants({"away": 500})
    engine._loop.drain()
    assert engine.scheduler.tenants.served("away") == before + 500
