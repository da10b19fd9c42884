"""A backbone in 8-bit floats is transformers' model with the decoded matrices: gradients in float64, tokens, and ranks.

The oracle is transformers + peft with its linears' weights replaced by what `FrozenLinear.weight` gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch

from coserve.cli.planned import Asked, make_plan
from coserve.cli.planview import title, to_json
from coserve.config.settings import AdapterConfig, FinetuneConfig, IA3Config, LoraConfig, SamplingConfig
from coserve.core import ConfigError, InvalidRequest
from coserve.engine.generation import Generator
from coserve.model import fp8
from coserve.model.checkpoint import Checkpoint
from coserve.model.decoder import MODULE_PATHS
from coserve.model.weights import ModelWeights, load_weights
from coserve.profiling.measure import profile_key
from coserve.runtime.loaded import load_model
from coserve.server.settings import ServerConfig
from coserve.training.finetuning import finetune
from tests import oracle
from tests.numerics import test_gradients as gradients
from tests.numerics.test_gradients import TOLERANCE, VARIANTS, Case, Pair, error_of, random_example
from tests.tiny_directory import build_tiny_directory, chat_lines, write_lines
from tests.tiny_engine import make_engine
from tests.tiny_models import build_tiny_model

CPU = torch.device("cpu")
KINDS: dict[str, AdapterConfig] = {
    "lora": LoraConfig(r=4, alpha=6, target_modules="all-linear"), "dora": LoraConfig(r=4, alpha=6, use_dora=True),
    "ia3": IA3Config(),
}


def decode_into(model: torch.nn.Module, weights: ModelWeights) -> None:
    """Replaces the weights of transformers' linears by the decoded ones."""
    for number, layer in enumerate(weights.layers):
        for site, path in MODULE_PATHS.items():
            module = model.get_submodule(f"model.layers.{number}.{path}")
            assert not torch.equal(module.weight, layer.linears[site].weight), "nothing was rounded"
            module.weight.data.copy_(layer.linears[site].weight)


@cache
def fp8_pair(family: str, sliding_window: int | None) -> Pair:
    directory = build_tiny_model(family, Path(mkdtemp()) / family, sliding_window=sliding_window)
    weights = load_weights(Checkpoint(directory), dtype=torch.float64, device=CPU, quantization="fp8")
    reference = oracle.load_oracle(directory)
    decode_into(reference, weights)
    return Pair(weights, reference)


@pytest.fixture
def tile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several tiles of each matrix."""
    monkeypatch.setattr(fp8, "TILE_ELEMENTS", 512)
    monkeypatch.setattr(fp8, "_STEP", 4)
    monkeypatch.setattr(gradients, "pair", fp8_pair)
    fp8_pair.cache_clear()
    yield
    fp8_pair.cache_clear()


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize(
    ("family", "sliding_window", "kind"),
    [*((*variant, "lora") for variant in VARIANTS), ("llama", None, "dora"), ("qwen2", None, "ia3")],
)
def test_gradients_equal_autograd_over_the_decoded_weights(family: str, sliding_window: int | None, kind: str) -> None:
    rng = np.random.default_rng(5)
    examples = tuple(random_example(rng, i, length) for i, length in enumerate([19, 6, 23, 11]))
    assert error_of(Case(family, sliding_window, KINDS[kind], examples, "sft", 4, 11, 0.3)) <= TOLERANCE


def test_weights_that_were_not_decoded_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: against the model as it was before, gradients differ."""
    weights = load_weights(
        Checkpoint(build_tiny_model("llama", Path(mkdtemp()))), dtype=torch.float64, device=CPU, quantization="fp8"
    )
    monkeypatch.setattr(gradients, "pair", lambda *_: Pair(weights, gradients_reference()))
    example = random_example(np.random.default_rng(0), 0, 20)
    assert error_of(Case("llama", None, KINDS["lora"], (example,), "sft", 4, 11)) > 1e-3


def gradients_reference() -> torch.nn.Module:
    return oracle.load_oracle(build_tiny_model("llama", Path(mkdtemp())))


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm3"])
def test_tokens_equal_transformers_with_the_decoded_weights(tmp_path: Path, family: str) -> None:
    directory = build_tiny_directory(tmp_path / "m", family)
    model = load_model(str(directory), device="cpu", dtype="float32", quantization="fp8")
    reference = oracle.load_oracle(directory, torch.float32)
    decode_into(reference, model.weights)
    sampling = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)
    prompts = [list(range(3, 3 + length)) for length in (1, 17, 40)]
    for ids, found in zip(prompts, Generator(model).generate(prompts, sampling), strict=True):
        output = reference.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert found == output[0, len(ids) :].tolist()


@pytest.mark.full
def test_two_ranks_have_the_same_model_as_one(tmp_path: Path) -> None:
    directory = str(build_tiny_directory(tmp_path / "m"))
    ids = list(range(3, 60))
    alone = Generator(load_model(directory, device="cpu", dtype="float32", quantization="fp8")).logits(ids)
    plain = Generator(load_model(directory, device="cpu", dtype="float32")).logits(ids)
    with closing(
        load_model(directory, device="cpu", dtype="float32", quantization="fp8", tensor_parallel_size=2)
    ) as shared:
        together = Generator(shared).logits(ids)
    assert float((together - alone).abs().max()) <= 1e-4 < float((plain - alone).abs().max())


def test_a_job_says_what_its_base_was_and_goes_on_with_it(tmp_path: Path) -> None:
    """An adapter that was trained beside 8-bit matrices fits the model in any form."""
    directory = str(build_tiny_directory(tmp_path / "m"))
    data = write_lines(tmp_path / "data.jsonl", chat_lines(6))
    config = FinetuneConfig(max_steps=2, batch_size=2, checkpoint_steps=1)
    finetune(data, tmp_path / "job", model=directory, config=config, device="cpu", dtype="float32", quantization="fp8")
    assert json.loads((tmp_path / "job" / "job.json").read_text())["quantization"] == "fp8"
    assert json.loads((tmp_path / "job" / "coserve.json").read_text())["base_quantization"] == "fp8"
    plain = load_model(directory, device="cpu", dtype="float32")
    plain.load_adapter(tmp_path / "job")
    again = {"model": directory, "config": config, "resume": True, "device": "cpu"}
    result = finetune(data, tmp_path / "job", **again)
    assert getattr(result.model, "quantization", None) == "fp8", "as it began"
    with pytest.raises(InvalidRequest, match="quantization"):
        finetune(data, tmp_path / "job", quantization="none", **again)
    with pytest.raises(ConfigError, match="quantization"):
        finetune(data, tmp_path / "other", model=plain, config=config, quantization="fp8")


def test_an_unknown_quantization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization: must be none or fp8, got 'int4'"):
        load_model(str(build_tiny_directory(tmp_path / "m")), quantization="int4")


def test_plans_count_the_bytes(tmp_path: Path) -> None:
    """Matrices take one byte per element, a scale per row and what they are decoded into; the rest stays as it was."""
    directory = build_tiny_directory(tmp_path / "m")
    asked = Asked(kind="lora", rank=4, targets=None, dropout=None)
    plans = {
        name: make_plan(
            directory, asked, dtype="bfloat16", sequence_length=64, num_tokens=64, window_tokens=16, limit="auto",
            quantization=name, with_baselines=False,
        )
        for name in ("none", "fp8")
    }
    weights = {name: planned.estimate.apart["weights"] for name, planned in plans.items()}
    arch = plans["fp8"].shape.arch
    assert weights["fp8"] - weights["none"] == fp8.linear_bytes(arch, 2, "fp8") - fp8.linear_bytes(arch, 2, "none") < 0
    assert "matrices in fp8" in title(plans["fp8"]) and json.loads(to_json(plans["fp8"]))["quantization"] == "fp8"
    with pytest.raises(ConfigError, match="quantization"):
        ServerConfig(quantization="int4")
    assert ServerConfig(quantization="fp8").quantization == "fp8"


def test_a_profile_belongs_to_its_quantization(tmp_path: Path) -> None:
    directory = build_tiny_directory(tmp_path / "m")
    keys = set()
    for quantization in ("none", "fp8"):
        model = load_model(str(directory), device="cpu", dtype="float32", quantization=quantization)
        with closing(make_engine(model)) as engine:
            keys.add(profile_key(engine.device.passes, model.fingerprint))
    assert len(keys) == 2
