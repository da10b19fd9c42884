"""Jobs and requests of every kind of adapter in one engine: each ends as it would alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coserve.config.settings import (
    AdapterConfig,
    BottleneckConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    OptimizerConfig,
)
from coserve.core import ConfigError
from coserve.runtime.loaded import LoadedModel
from coserve.training.finetuning import finetune
from tests.engine.test_engine_jobs import GREEDY, assert_same_result
from tests.played_segments import play_slots
from tests.tiny_directory import chat_lines, write_lines
from tests.tiny_engine import MakeEngine, build_model, drive, prompt

KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=4), "dora": LoraConfig(r=4, use_dora=True), "ia3": IA3Config(),
    "bottleneck": BottleneckConfig(size=8, placement="houlsby"),
}
JOB = FinetuneConfig(
    max_steps=4, batch_size=4, max_microbatch_tokens=256, checkpoint_steps=0, optimizer=OptimizerConfig(learning_rate=2e-2)
)
SHORT = replace(GREEDY, max_tokens=12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kinds")
    write_lines(directory / "sft.jsonl", chat_lines(12))
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return build_model(directory / "model")


@pytest.mark.parametrize("by_slot", [False, True], ids=["rows sorted by slot", "kernels that take slots"])
def test_jobs_and_requests_of_all_kinds_at_once(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, by_slot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_slot:
        play_slots(monkeypatch)
    engine = engines()
    assert engine.adapters.slots.takes_slots is by_slot
    for name, kind in KINDS.items():
        config = JOB.with_adapter(kind)
        finetune(directory / "sft.jsonl", tmp_path / f"{name}-alone", model=model, config=config)
        engine.load_adapter(f"{name}-alone", tmp_path / f"{name}-alone")
    expected = {name: engine.generate([prompt(9)], SHORT, adapter=f"{name}-alone")[0].token_ids for name in KINDS}
    base = engine.generate([prompt(9)], SHORT)[0].token_ids
    assert len({tuple(ids) for ids in (*expected.values(), base)}) == 5, "every kind says something else"
    for name, kind in KINDS.items():
        engine.finetune(directory / "sft.jsonl", tmp_path / name, JOB.with_adapter(kind), name=name)
    rounds = []
    while engine.jobs.jobs:
        if len(engine.requests.live) < 3:
            rounds.append({name: engine.submit(prompt(9), SHORT, adapter=f"{name}-alone") for name in KINDS})
            rounds[-1]["base"] = engine.submit(prompt(9), SHORT)
        engine.step()
    drive(engine)
    for handles in rounds:
        assert {name: handle.token_ids for name, handle in handles.items()} == {**expected, "base": base}
    for name in KINDS:
        assert_same_result(tmp_path / name, tmp_path / f"{name}-alone")


def test_a_size_over_the_limit_is_refused(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine = engines(max_lora_rank=4)
    with pytest.raises(ConfigError) as caught:
        engine.finetune(directory / "sft.jsonl", tmp_path / "wide", JOB.with_adapter(BottleneckConfig(size=5)))
    assert caught.value.param == "size"


def test_passes_forget_a_kind_that_has_gone(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path
) -> None:
    """After a DoRA adapter is unloaded a LoRA request runs the plan that it ran before; when it comes back, theirs together."""
    engine, plans = engines(), []
    for name in ("lora", "dora"):
        config = replace(JOB.with_adapter(KINDS[name]), max_steps=1)
        finetune(directory / "sft.jsonl", tmp_path / name, model=model, config=config)
    engine.load_adapter("lora", tmp_path / "lora")

    def answer(adapter: str) -> list[int]:
        return engine.generate([prompt(9)], SHORT, adapter=adapter)[0].token_ids

    said = answer("lora")
    made = engine.device.passes._plans
    alone = dict(made)
    for _ in range(2):
        engine.load_adapter("dora", tmp_path / "dora")
        answer("dora")
        plans.append(len(made))
        engine.unload_adapter("dora")
        assert (engine.device.passes.adapters.layout, None) in alone
        assert answer("lora") == said
    assert plans == [len(alone) + 1] * 2
    assert len(made) == plans[0]
