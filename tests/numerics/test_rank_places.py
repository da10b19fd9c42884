"""An engine on four ranks, with adapters that lie wherever they can: requests and jobs get what they get on one.

Also in places that would never be chosen, for which users have `adapter_sharding`. As in test_rank_engine.py, the model is tiny
and in float64, and processes are real. Its two key-value heads are repeated on the ranks. COSERVE_RANKS=2 takes two.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from coserve.compiler.parallelize import axis_name
from coserve.config.settings import SamplingConfig, SchedulerConfig
from coserve.core import ConfigError
from coserve.planning.budget import shape_adapter
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.plans import layer_bypasses
from coserve.training.finetuning import finetune
from coserve.training.group import ALL_ADAPTERS, AXES, engine_group
from tests.numerics.test_rank_engine import JOB, KINDS, assert_job_alike, assert_said_alike, load, make_one, said
from tests.tiny_engine import assert_nothing_left, make_engine

pytestmark = pytest.mark.full
RANKS = int(os.environ.get("COSERVE_RANKS", "4"))
SORTS = {"prompt": SamplingConfig(max_tokens=6, temperature=0, prompt_logprobs=1, logprobs=2)}


class Place(NamedTuple):
    """What the tests share. adapters: of every kind. wanted: what requests get on one rank. model: on all of them."""

    directory: Path
    adapters: Mapping[str, Path]
    wanted: Mapping[str, object]
    model: LoadedModel


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory = tmp_path_factory.mktemp("engine")
    one, adapters = make_one(directory)
    finetune(directory / "sft.jsonl", directory / "job", model=one, config=JOB.with_adapter(KINDS["dora"]))
    with closing(make_engine(one)) as engine:
        wanted = said(engine, adapters, SORTS)
    with closing(load(directory, RANKS)) as model:
        yield Place(directory, adapters, wanted, model)


def shardings(model: LoadedModel) -> list[str]:
    """Settings that, taken together, put every parameter wherever it can lie in an engine. Every place in a layer takes its
    n-th candidate in the n-th of them."""
    arch, size = model.architecture, model.tensor_parallel_size
    chosen = engine_group(arch, size, torch.device("cpu"), 8, SchedulerConfig().max_window_tokens, "")
    listed = []
    for config in ALL_ADAPTERS:
        graph = layer_bypasses(arch, shape_adapter(arch, config))[0].trace(arch, 0).forward
        for site in {node.site: None for node in graph.nodes if node.site is not None}:
            listed.append(chosen.candidates(graph, site))
    texts = []
    for number in range(max(map(len, listed))):
        axes: dict[str, int | None] = {}
        for candidates in listed:
            axes = {**candidates[number % len(candidates)].axes, **axes}
        texts.append(",".join(f"{name}={axis_name(axis)}" for name, axis in axes.items()))
    return texts


def test_adapters_lie_wherever_they_are_told_to(place: Place, tmp_path: Path) -> None:
    asked = shardings(place.model)
    assert len(asked) > 2
    for number, text in enumerate(["", *asked]):
        with closing(make_engine(place.model, adapter_sharding=text)) as engine:
            assert engine.device.group is not None
            for name, axis in (part.split("=") for part in text.split(",") if part):
                assert engine.device.group.fixed[0, name].axis == AXES[axis]
            assert_said_alike(said(engine, place.adapters, SORTS), place.wanted)
            job = engine.finetune(place.directory / "sft.jsonl", tmp_path / f"{number}", JOB.with_adapter(KINDS["dora"]))
            while not job.finished:
                engine.step()
            assert job.status == "succeeded", job.error
            assert_nothing_left(engine)
        assert_job_alike(tmp_path / f"{number}", place.directory / "job")


def test_what_an_engine_cannot_have_is_said(place: Place) -> None:
    for text, reason in (
        ("q_proj.lora_A=out", "can't be had with . ranks in this layer.*no adapter is split along its rank"),
        ("q_proj.lora_C=in", "no parameter is called 'q_proj.lora_C'; these exist: "),
        ("q_proj.lora_A", "is not PARAMETER=whole or out or in"),
    ):
        with pytest.raises(ConfigError, match=f"adapter_sharding: .*{reason}"):
            make_engine(place.model, adapter_sharding=text)
