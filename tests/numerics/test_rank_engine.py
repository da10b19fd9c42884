"""An engine whose model several processes share: requests and jobs get what they get on one.

The model is a tiny llama with 4 query and 2 key-value heads, in float64, so that sums in another order make no difference that
a test must allow for. Processes are real, and gloo connects them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from coserve.config.settings import (
    AdapterConfig,
    BottleneckConfig,
    FinetuneConfig,
    IA3Config,
    LoraConfig,
    OptimizerConfig,
    SamplingConfig,
)
from coserve.core import ConfigError, InvalidRequest
from coserve.engine.engine import Engine
from coserve.engine.generation import Generator
from coserve.grammar import json_object
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.training.finetuning import finetune
from tests.outcome import rows_of
from tests.tiny_directory import build_job_inputs
from tests.tiny_engine import assert_nothing_left, drive, make_engine, prompt

KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", dropout=0.1),
    "patterns": LoraConfig(r=4, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 12}),
    "dora": LoraConfig(r=4, use_dora=True), "ia3": IA3Config(), "bottleneck": BottleneckConfig(size=8, placement="houlsby"),
}
JOB = FinetuneConfig(
    max_steps=4, batch_size=4, max_microbatch_tokens=256, window_tokens=64, checkpoint_steps=2,
    optimizer=OptimizerConfig(learning_rate=2e-2),
)
GREEDY = SamplingConfig(temperature=0, max_tokens=12)
REQUESTS = {
    "greedy": GREEDY,
    "sampled": SamplingConfig(temperature=0.9, top_p=0.9, top_k=40, min_p=0.01, max_tokens=12, seed=3, n=2, logprobs=2),
    "penalties": SamplingConfig(
        temperature=0.7, presence_penalty=0.5, frequency_penalty=0.5, repetition_penalty=1.1, logit_bias={5: 2.0}, max_tokens=12
    ),
    "prompt": SamplingConfig(max_tokens=2, temperature=0, prompt_logprobs=1),
    "grammar": SamplingConfig(temperature=0.9, max_tokens=12, seed=4, n=2, grammar=json_object()),
}


def load(directory: Path, size: int) -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(str(directory / "model"), device="cpu", dtype="float64", tensor_parallel_size=size)


def make_one(directory: Path) -> tuple[LoadedModel, dict[str, Path]]:
    """The model on one rank, and adapters of every kind that were trained on it. directory: gets these and data."""
    build_job_inputs(directory)
    model, adapters = load(directory, 1), {name: directory / f"adapter-{name}" for name in KINDS}
    for name, kind in KINDS.items():
        finetune(directory / "sft.jsonl", adapters[name], model=model, config=JOB.with_adapter(kind))
    return model, adapters


class Place(NamedTuple):
    """What the tests share. adapters: of every kind, made on one rank. one, two: the model on so many ranks."""

    directory: Path
    adapters: Mapping[str, Path]
    one: LoadedModel
    two: LoadedModel


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("engine")
    one, adapters = make_one(directory)
    with closing(load(directory, 2)) as two:
        yield Place(directory, adapters, one, two)


def said(
    engine: Engine, adapters: Mapping[str, Path], sorts: Mapping[str, SamplingConfig] = REQUESTS
) -> dict[str, object]:
    """What requests of these sorts get, of the base and of adapters at once, some with a common prefix."""
    for name, path in adapters.items():
        engine.load_adapter(name, path)
    handles = {}
    for name, sampling in sorts.items():
        for adapter in (None, *adapters):
            for length in (40, 57):
                handles[f"{name} {adapter} {length}"] = engine.submit(prompt(length), sampling, adapter=adapter)
    drive(engine)
    assert all(handle.error is None for handle in handles.values())
    return {
        name: ([output.token_ids for output in handle.outputs], [output.logprobs for output in handle.outputs],
               handle.prompt_logprobs)
        for name, handle in handles.items()
    }


def assert_said_alike(found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    """Tokens are equal, and log-probabilities but for the last bits."""
    def numbers(value: object) -> list[float]:
        if isinstance(value, float):
            return [value]
        if isinstance(value, tuple | list):
            return [number for each in value for number in numbers(each)]
        return [number for each in value.values() for number in numbers(each)] if isinstance(value, Mapping) else []

    for name, (tokens, *logprobs) in wanted.items():  # type: ignore[misc]
        own_tokens, *own = found[name]  # type: ignore[misc]
        assert own_tokens == tokens, name
        assert numbers(own) == pytest.approx(numbers(logprobs), abs=1e-9), name


def test_requests_of_all_kinds_get_the_same(place: Place) -> None:
    with closing(make_engine(place.one)) as engine:
        wanted = said(engine, place.adapters)
    assert len({str(wanted[f"greedy {name} 40"]) for name in (None, *KINDS)}) == 1 + len(KINDS), "each kind says something else"
    with closing(make_engine(place.two)) as engine:
        assert_said_alike(said(engine, place.adapters), wanted)
        assert_nothing_left(engine)


@pytest.mark.full
def test_with_little_memory_requests_are_preempted_and_get_the_same(place: Place) -> None:
    few = {"num_blocks": 24, "share": 1.0, "max_adapters": 2}
    with closing(make_engine(place.one, **few)) as engine:
        wanted = said(engine, place.adapters)
        assert engine.metrics()["preemptions"]
    with closing(make_engine(place.two, **few)) as engine:
        assert_said_alike(said(engine, place.adapters), wanted)


JOBS = {
    **{name: JOB.with_adapter(kind) for name, kind in KINDS.items()},
    "dpo": replace(JOB, objective="dpo", max_microbatch_tokens=400),
    "deterministic": replace(JOB, deterministic=True),
}


def run_jobs(engine: Engine, place: Place, output: Path, jobs: Mapping[str, FinetuneConfig]) -> None:
    """Runs jobs beside requests, which use their newest checkpoints too. Asserts that they succeed."""
    handles = [
        engine.finetune(
            place.directory / f"{config.objective}.jsonl", output / name, config, name=name,
            validation=place.directory / "valid.jsonl" if config.objective == "sft" else None,
        )
        for name, config in jobs.items()
    ]
    while engine.jobs.jobs:
        if len(engine.requests.live) < 2:
            engine.submit(prompt(30), GREEDY)
            for name in engine.adapters.names[:2]:
                engine.submit(prompt(30), GREEDY, adapter=name)
        engine.step()
    drive(engine)
    for handle in handles:
        assert handle.status == "succeeded", handle.error


def assert_job_alike(found: Path, wanted: Path) -> None:
    """Both lost the same at every step, and ended with the same adapter."""
    rows, others = (rows_of(each) for each in (found, wanted))
    assert [row.step for row in rows] == [row.step for row in others]
    for own, other in zip(rows, others, strict=True):
        for field in ("train_loss", "grad_norm", "valid_loss"):
            own_value, value = getattr(own, field), getattr(other, field)
            assert own_value == (None if value is None else pytest.approx(value, rel=1e-6)), field
    tensors, other_tensors = (load_file(each / "adapter_model.safetensors") for each in (found, wanted))
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.allclose(tensor, other_tensors[name], rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("names", [("lora", "patterns"), pytest.param(tuple(JOBS), marks=pytest.mark.full)], ids=["two", "all"])
def test_jobs_beside_requests_end_as_on_one_rank(place: Place, tmp_path: Path, names: tuple[str, ...]) -> None:
    jobs = {name: JOBS[name] for name in names}
    for size, model in ((1, place.one), (2, place.two)):
        with closing(make_engine(model)) as engine:
            run_jobs(engine, place, tmp_path / str(size), jobs)
            assert engine.scheduler.latency.errors(), "something was predicted"
            assert_nothing_left(engine)
    for name in names:
        assert_job_alike(tmp_path / "2" / name, tmp_path / "1" / name)


@pytest.mark.full
def test_a_job_goes_on_with_another_number_of_ranks(place: Place, tmp_path: Path) -> None:
    """The engine closes in the middle of it, with a checkpoint of the last whole step."""
    config = replace(JOBS["lora"], max_steps=6, checkpoint_steps=0)
    finetune(place.directory / "sft.jsonl", tmp_path / "whole", model=place.one, config=config)
    output = tmp_path / "moved"
    for steps, model in ((2, place.two), (4, place.one), (7, place.two)):
        with closing(make_engine(model)) as engine:
            handle = engine.finetune(place.directory / "sft.jsonl", output, config, resume=output.exists())
            drive(engine, partial(lambda handle, steps: handle.finished or handle.step >= steps, handle, steps))
            assert handle.finished == (steps > 6)
    assert_job_alike(output, tmp_path / "whole")


def test_an_adapter_in_memory_is_refused(place: Place) -> None:
    with closing(make_engine(place.two)) as engine, pytest.raises(InvalidRequest, match="load it from its directory"):
        engine.add_adapter("a", place.one.load_adapter(place.adapters["lora"]))


def test_an_adapter_that_is_not_finite_on_this_base_is_refused_and_harms_nobody(place: Place, tmp_path: Path) -> None:
    """Only ranks that have the bad row see it, and all refuse it."""
    bad = tmp_path / "bad"
    shutil.copytree(place.adapters["dora"], bad)
    tensors = load_file(bad / "adapter_model.safetensors")
    name = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_magnitude_vector" in name)
    tensors[name][-1] = 3e38
    save_file(tensors, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    with closing(make_engine(place.one)) as engine, pytest.raises(InvalidRequest) as wanted:
        engine.load_adapter("bad", bad)
    with closing(make_engine(place.two)) as engine:
        with pytest.raises(InvalidRequest) as found:
            engine.load_adapter("bad", bad)
        assert type(found.value) is type(wanted.value)
        assert engine.generate([prompt(9)], GREEDY)


def test_a_second_shared_model_is_refused(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: torch\.distributed is in use in this process"):
        load(place.directory, 2)


def test_a_directory_of_an_adapter_is_generated_with(place: Place) -> None:
    """As `coserve chat --adapter` does."""
    prompts = [prompt(20), prompt(9)]
    adapter = place.adapters["dora"]
    one = Generator(place.one, place.one.load_adapter(adapter)).generate(prompts, GREEDY)
    assert Generator(place.two, adapter).generate(prompts, GREEDY) == one
