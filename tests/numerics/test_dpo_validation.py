"""DPO beside validation data: ln 2 where policy and reference agree, and a resumed run ends as an uninterrupted one.

Training and validation data share an adapter, an executor and the memory of what the reference says; each must be as if
the other were not there. Checked for the blocking `finetune`, an engine alone, and an engine whose training rides in passes
of requests.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig
from coserve.core import InvalidRequest
from coserve.finetune.datasets import Dataset, load_training
from coserve.finetune.job import JobEvent, StepRow
from coserve.peft.lora import LoraAdapter
from coserve.runtime.loaded import LoadedModel
from coserve.training.batchwork import group_key
from coserve.training.finetuning import finetune
from coserve.training.trainer import AdapterTrainer
from tests import oracle
from tests.outcome import result, rows_of
from tests.tiny_directory import preference_line, write_lines
from tests.tiny_engine import MakeEngine, PlanLog, build_model, drive, prompt, random_adapter

STILL = FinetuneConfig(
    objective="dpo", lora=LoraConfig(r=4), optimizer=OptimizerConfig(learning_rate=1e-12), batch_size=2, epochs=2,
    validation_steps=1, checkpoint_steps=1, max_microbatch_tokens=300, window_tokens=48, seed=3,
)
"""At this rate the policy stays the reference."""
MOVING = replace(
    STILL, optimizer=OptimizerConfig(learning_rate=0.01), epochs=3, validation_steps=2, checkpoint_steps=2, deterministic=True
)
LN_2 = math.log(2)


class Crash(RuntimeError):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose lines of one number have answers of quite different lengths."""
    root = tmp_path_factory.mktemp("dpo")
    write_lines(root / "train.jsonl", [preference_line(f"q{i}", "yes " * (i + 1), "no") for i in range(7)])
    write_lines(
        root / "valid.jsonl", [preference_line(f"other {i}", "maybe " * (3 * i + 2), "never") for i in range(5)]
    )
    return root


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return build_model(directory / "model")


def assert_ln_2(rows: list[StepRow]) -> None:
    assert len(rows) == 8
    for row in rows:
        assert row.train_loss == pytest.approx(LN_2, abs=1e-4), f"step {row.step}"
        assert row.valid_loss == pytest.approx(LN_2, abs=1e-4), f"validation after step {row.step}"


# --- policy and reference agree ---


def test_the_blocking_run_stays_at_ln_2(model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    finetune(
        directory / "train.jsonl", tmp_path / "out", model=model, config=STILL, validation=directory / "valid.jsonl"
    )
    assert_ln_2(rows_of(tmp_path / "out"))


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "fused with requests"])
def test_an_engine_stays_at_ln_2(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path, busy: bool
) -> None:
    engine = engines()
    log = PlanLog(engine)
    job = engine.finetune(directory / "train.jsonl", tmp_path / "out", STILL, validation=directory / "valid.jsonl")
    while busy and not job.finished:
        if len(engine.requests.live) < 3:
            engine.submit(prompt(20), SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True))
        engine.step()
    drive(engine)
    assert any(unit.fused for plan in log.plans for unit in plan.units) or not busy, "training has to ride in passes"
    assert_ln_2(rows_of(tmp_path / "out"))


def test_dropout_never_reaches_validation(model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    config = replace(STILL, lora=LoraConfig(r=4, dropout=0.3))
    start = _saved(model, random_adapter(model, 4), tmp_path / "start", dropout=0.3)
    finetune(
        directory / "train.jsonl", tmp_path / "out", model=model, config=config, start=start,
        validation=directory / "valid.jsonl",
    )
    rows = rows_of(tmp_path / "out")
    assert [row.valid_loss for row in rows] == pytest.approx([LN_2] * len(rows), abs=1e-4)
    assert any(abs(row.train_loss - LN_2) > 1e-3 for row in rows), "training has dropout"


def test_a_continued_adapter_is_its_own_reference(model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    start = _saved(model, random_adapter(model, 4), tmp_path / "start")
    finetune(
        directory / "train.jsonl", tmp_path / "out", model=model, config=replace(STILL, lora=None), start=start,
        validation=directory / "valid.jsonl",
    )
    assert_ln_2(rows_of(tmp_path / "out"))


def _saved(model: LoadedModel, adapter: LoraAdapter, directory: Path, *, dropout: float = 0.0) -> Path:
    directory.mkdir()
    assert isinstance(adapter.config, LoraConfig)
    adapter.config = replace(adapter.config, dropout=dropout)
    oracle.save_adapter(directory, adapter, adapter.flat, base_name="tiny", fingerprint=model.fingerprint)
    return directory


# --- interrupted and not ---


@pytest.mark.parametrize("crash_at", [2, 5, 9])
def test_a_resumed_run_ends_bit_identical(
    model: LoadedModel, directory: Path, tmp_path: Path, crash_at: int
) -> None:
    data, valid = directory / "train.jsonl", directory / "valid.jsonl"
    finetune(data, tmp_path / "whole", model=model, config=MOVING, validation=valid)

    def crash(event: JobEvent) -> None:
        if event.row is not None and event.row.step == crash_at:
            raise Crash

    with pytest.raises(Crash):
        finetune(data, tmp_path / "broken", model=model, config=MOVING, validation=valid, listen=crash)
    finetune(data, tmp_path / "broken", model=model, config=MOVING, validation=valid, resume=True)
    assert result(tmp_path / "broken") == result(tmp_path / "whole")
    assert sum(row.valid_loss is not None for row in rows_of(tmp_path / "whole")) == 6


def test_training_is_the_same_bits_with_and_without_validation(
    model: LoadedModel, directory: Path, tmp_path: Path
) -> None:
    data = directory / "train.jsonl"
    finetune(data, tmp_path / "without", model=model, config=MOVING)
    finetune(data, tmp_path / "with", model=model, config=MOVING, validation=directory / "valid.jsonl")
    without, beside = result(tmp_path / "without"), result(tmp_path / "with")
    assert beside[1] == without[1]
    assert [row.train_loss for row in beside[0]] == [row.train_loss for row in without[0]]


def test_an_engine_resumes_bit_identical(
    engines: MakeEngine, model: LoadedModel, directory: Path, tmp_path: Path
) -> None:
    data, valid = directory / "train.jsonl", directory / "valid.jsonl"
    finetune(data, tmp_path / "whole", model=model, config=MOVING, validation=valid)
    first = engines()
    job = first.finetune(data, tmp_path / "broken", MOVING, validation=valid)
    drive(first, lambda: job.step >= 7)
    first.close()
    second = engines()
    second.submit(prompt(20), SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True))
    second.finetune(data, tmp_path / "broken", MOVING, validation=valid, resume=True)
    drive(second)
    assert result(tmp_path / "broken") == result(tmp_path / "whole")


@pytest.mark.parametrize("changed", ["validation_digest", "start_digest"])
def test_what_a_resumed_run_would_silently_read_anew_is_compared(
    model: LoadedModel, directory: Path, tmp_path: Path, changed: str
) -> None:
    """Other validation data give other losses in one table; another start is another reference."""
    start = _saved(model, random_adapter(model, 4), tmp_path / "start")
    valid = write_lines(tmp_path / "valid.jsonl", [preference_line("q", "yes", "no")])
    options = {"model": model, "config": replace(STILL, lora=None, max_steps=2), "validation": valid, "start": start}
    finetune(directory / "train.jsonl", tmp_path / "out", **options)  # type: ignore[arg-type]
    if changed == "validation_digest":
        write_lines(valid, [preference_line("q", "no", "yes")])
    else:
        (start / "adapter_model.safetensors").unlink()
        adapter = random_adapter(model, 4, seed=9)
        oracle.save_adapter(start, adapter, adapter.flat, base_name="tiny", fingerprint=model.fingerprint)
    with pytest.raises(InvalidRequest, match=f"resume: {changed} has changed"):
        finetune(directory / "train.jsonl", tmp_path / "out", resume=True, **options)  # type: ignore[arg-type]


# --- against the definition ---


@pytest.mark.parametrize("continued", [False, True], ids=["from the base", "continued"])
def test_losses_and_margins_are_trls(
    model: LoadedModel, directory: Path, tmp_path: Path, continued: bool
) -> None:
    """TRL's sigmoid loss: sums, not averages, of response log-probabilities, the mean over pairs; by transformers and peft."""
    train, valid = (_load(model, directory / f"{name}.jsonl") for name in ("train", "valid"))
    start = random_adapter(model, 4) if continued else None
    config = replace(STILL, dpo_beta=0.3)
    trainer = AdapterTrainer(model, config, start=start)
    assert isinstance(trainer.adapter, LoraAdapter)
    moved = torch.randn(trainer.adapter.flat.shape, generator=torch.Generator().manual_seed(5)) * 0.05
    reference = None if start is None else start.copy()
    trainer.score(valid.groups[:2])  # both policies agree still: must not change what the reference says later
    trainer.adapter.flat.add_(moved)
    policy = LoraAdapter(trainer.adapter.config, trainer.adapter.sites, trainer.adapter.flat.clone(), num_layers=3)
    for groups in (train.groups[:4], valid.groups, train.groups):
        pairs = [group.examples for group in groups]
        sums = [_sums(model, adapter, pairs) for adapter in (policy, reference)]
        margins = [0.3 * ((p[0] - r[0]) - (p[1] - r[1])) for p, r in zip(*sums, strict=True)]
        own = trainer.score(groups)
        assert own.loss == pytest.approx(float(np.mean([math.log1p(math.exp(-m)) for m in margins])), rel=1e-4)
        assert own.extra["reward_margin"] == pytest.approx(float(np.mean(margins)), rel=1e-3, abs=1e-5)
        assert own.extra["reward_accuracy"] == pytest.approx(float(np.mean([m > 0 for m in margins])))


def _load(model: LoadedModel, path: Path) -> Dataset:
    return load_training(path, model.tokenizer, FinetuneConfig(objective="dpo"), max_length=150)


def _sums(model: LoadedModel, adapter: LoraAdapter | None, pairs) -> list[list[float]]:  # noqa: ANN001 groups' examples
    plain = oracle.load_oracle(model.directory, torch.float32)
    policy = plain if adapter is None else oracle.with_adapter(plain, adapter)
    with torch.no_grad():
        return [[float(oracle.label_logprobs(policy, example).sum()) for example in pair] for pair in pairs]


# --- the memory of the reference ---


def test_sums_are_found_by_content(model: LoadedModel, directory: Path) -> None:
    train, valid = (_load(model, directory / f"{name}.jsonl") for name in ("train", "valid"))
    again = _load(model, directory / "train.jsonl")
    keys = [[group_key(group) for group in data.groups] for data in (train, valid, again)]
    assert keys[0] == keys[2]
    assert not set(keys[0]) & set(keys[1])
    group = train.groups[0]
    swapped = replace(group, examples=group.examples[::-1])
    lighter = replace(group.examples[0], weights=group.examples[0].weights * 0.5)
    others = [swapped, replace(group, examples=(lighter, group.examples[1]))]
    assert len({group_key(g) for g in (group, *others)}) == 3
    moved = replace(group, index=99, examples=tuple(replace(example, index=99) for example in group.examples))
    assert group_key(moved) == group_key(group)
