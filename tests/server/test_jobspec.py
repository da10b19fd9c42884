"""Create bodies: what is accepted, what 'auto' becomes, and how a wrong field is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coserve.config.settings import AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.core import InvalidRequest
from coserve.server.jobs.objects import tuned_name
from coserve.server.jobs.spec import Resolved, num_members, read_spec, resolve
from coserve.server.records import JobRecord
from coserve.server.settings import ServerConfig
from tests.server.jobforms import read_body

SERVER = ServerConfig(max_lora_rank=32)
LENGTH = 512


def spec_of(server: ServerConfig = SERVER, **fields: Any) -> Any:
    return read_spec(read_body({"model": "base", "training_file": "file-1", **fields}), server, LENGTH)


def resolved(num_examples: int, server: ServerConfig = SERVER, **fields: Any) -> Resolved:
    return resolve(spec_of(server, **fields).config, num_examples)


@pytest.mark.parametrize(("num_examples", "epochs", "batch", "steps", "checkpoint"), [
    (1, 25, 1, 25, 1), (12, 9, 1, 108, 12), (40, 3, 2, 60, 20), (160, 3, 10, 48, 16), (1000, 3, 16, 189, 25),
    (20_000, 1, 16, 1250, 25),
])
def test_auto_follows_the_number_of_examples(num_examples: int, epochs: int, batch: int, steps: int, checkpoint: int) -> None:
    found = resolved(num_examples)
    assert (found.config.epochs, found.config.batch_size, found.num_steps) == (epochs, batch, steps)
    assert found.config.checkpoint_steps == checkpoint
    assert found.config.optimizer.learning_rate == pytest.approx(2e-4)
    assert found.config.max_length == LENGTH
    assert found.method == {"type": "supervised", "supervised": {"hyperparameters": {
        "n_epochs": epochs, "batch_size": batch, "learning_rate_multiplier": 1.0}}}


def test_numbers_are_taken_as_given_and_reported() -> None:
    given = {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": 0.5}
    found = resolved(100, method={"type": "supervised", "supervised": {"hyperparameters": given}}, seed=7)
    assert found.num_steps == 50
    assert found.config.seed == 7
    assert found.config.optimizer.learning_rate == pytest.approx(1e-4)
    assert found.method["supervised"]["hyperparameters"] == given


def test_settings_of_the_data_reach_the_config() -> None:
    config = resolved(
        64, system_prompt="merge", allow_control_tokens=True, template_date="2025-01-31", warmup_ratio=0.25
    ).config
    assert (config.system_prompt, config.allow_control_tokens, config.template_date) == ("merge", True, "2025-01-31")
    assert config.optimizer.warmup_ratio == 0.25


@pytest.mark.parametrize(("suffix", "shown"), [("my.model.v1.2", "my-model-v1-2"), ("..", "--"), ("plain_1", "plain_1")])
def test_dots_of_a_suffix_are_made_safe(suffix: str, shown: str) -> None:
    body = read_body({"model": "base", "training_file": "file-1", "suffix": suffix})
    record = JobRecord(id="ftjob-12345678", tenant="me", created_at=1, base="base", training_file="file-1", config={},
                       method={}, suffix=body.suffix)
    assert tuned_name(record, "some/Base-1.5", "me") == f"ft:Base-1.5:me:{shown}:12345678"


def test_deprecated_hyperparameters_count() -> None:
    assert resolved(100, hyperparameters={"n_epochs": 5, "batch_size": "auto"}).config.epochs == 5


@pytest.mark.parametrize(("rank", "rate"), [(8, 5e-5), (16, 2.5e-5), (32, 1.25e-5)])
def test_dpo_has_a_beta_and_a_lower_rate(rank: int, rate: float) -> None:
    found = resolved(64, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3}}}, rank=rank)
    assert (found.config.objective, found.config.dpo_beta) == ("dpo", 0.3)
    assert found.config.optimizer.learning_rate == pytest.approx(rate)
    assert found.method["dpo"]["hyperparameters"]["beta"] == 0.3
    assert resolved(64, method={"type": "dpo"}).config.dpo_beta == 0.1


def test_extra_fields_reach_the_config() -> None:
    config = resolved(
        64, rank=4, alpha=8, dropout=0.1, target_modules=["q_proj", "v_proj"], learning_rate=1e-3, schedule="cosine",
        warmup_steps=5, weight_decay=0.01, max_grad_norm=0.5, max_length=100, too_long="drop", max_microbatch_tokens=1024,
        checkpoint_steps=0, keep_checkpoints=9, validation_steps=3, max_steps=17, deterministic=True,
    ).config
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (4, 8, 0.1)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert (config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup_steps) == (1e-3, "cosine", 5)
    assert (config.optimizer.weight_decay, config.optimizer.max_grad_norm) == (0.01, 0.5)
    assert (config.max_length, config.too_long, config.max_microbatch_tokens) == (100, "drop", 1024)
    assert (config.checkpoint_steps, config.keep_checkpoints, config.validation_steps) == (0, 9, 3)
    assert (config.max_steps, config.deterministic) == (17, True)


@pytest.mark.parametrize(("fields", "expected"), [
    ({}, LoraConfig()), ({"adapter": "lora", "rank": 4}, LoraConfig(r=4)),
    ({"adapter": "dora", "rank": 4, "target_modules": ["q_proj"]}, LoraConfig(r=4, target_modules=("q_proj",), use_dora=True)),
    ({"adapter": "ia3"}, IA3Config()),
    ({"adapter": "ia3", "target_modules": ["k_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
     IA3Config(target_modules=("k_proj", "up_proj"), feedforward_modules=("up_proj",))),
    ({"adapter": "ia3", "feedforward_modules": []}, IA3Config(feedforward_modules=())),
    ({"adapter": "bottleneck", "size": 8, "placement": "houlsby", "activation": "gelu"},
     BottleneckConfig(size=8, placement="houlsby", activation="gelu")),
])
def test_kinds_of_adapter(fields: dict[str, Any], expected: AdapterConfig) -> None:
    found = resolved(64, **fields)
    assert found.config.adapter == expected
    assert spec_of(**fields).settings == fields, "they are shown as given"


@pytest.mark.parametrize(("fields", "rate"), [
    ({"adapter": "bottleneck", "size": 32}, 1.25e-5), ({"adapter": "ia3"}, 5e-5), ({"adapter": "dora", "rank": 16}, 2.5e-5),
])
def test_rates_of_dpo_by_kind(fields: dict[str, Any], rate: float) -> None:
    assert resolved(64, method={"type": "dpo"}, **fields).config.optimizer.learning_rate == pytest.approx(rate)


@pytest.mark.parametrize("value", ["auto", "12.5GB", "0.5", 0.5, 5_000_000])
def test_activation_memory_reaches_the_config_as_given(value: float | str) -> None:
    assert resolved(64, activation_memory=value).config.activation_memory == value
    assert spec_of(activation_memory=value).settings == {"activation_memory": value}


def test_a_rate_of_ones_own_is_reported_as_multiplier() -> None:
    found = resolved(64, learning_rate=1e-3)
    assert found.method["supervised"]["hyperparameters"]["learning_rate_multiplier"] == pytest.approx(5)


def test_a_deterministic_server_makes_deterministic_jobs() -> None:
    assert resolved(64, server=ServerConfig(deterministic=True)).config.deterministic
    assert not resolved(64).config.deterministic


def test_members_are_for_replicas() -> None:
    fleet = ServerConfig(replicas=2, database_url="postgresql://localhost/x", store="/x")
    assert num_members(spec_of(fleet, members=3).settings) == 3 and num_members(spec_of(fleet).settings) == 1
    assert num_members(spec_of(members=1).settings) == 1, "one is what every server is"
    for server, fields, reason in (
        (fleet, {"deterministic": True}, "a deterministic job runs on one replica"),
        (replace(fleet, deterministic=True), {}, "a deterministic job runs on one replica"),
        (replace(fleet, tensor_parallel_size=2), {}, "shared by several processes"),
    ):
        with pytest.raises(InvalidRequest, match=reason) as caught:
            spec_of(server, members=2, **fields)
        assert caught.value.param == "members"


def test_seeds_are_drawn_unless_given() -> None:
    assert len({spec_of().config.seed for _ in range(8)}) > 1
    assert spec_of(seed=0).config.seed == 0


def test_examples_of_pairs_have_half_a_microbatch() -> None:
    fields = {"method": {"type": "dpo"}, "max_microbatch_tokens": 600}
    assert resolved(8, **fields).config.max_length == 300
    with pytest.raises(InvalidRequest, match="more than 300"):
        spec_of(**fields, max_length=301)


PREFERENCE = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"model": 3}, "model", "string"),
    ({"model": "a\x00b"}, "model", "NUL"),
    ({"model": "\ud800"}, "model", "whole characters"),
    ({"training_file": None}, "training_file", "string"),
    ({"batch_siez": 3}, "batch_siez", "did you mean batch_size"),
    ({"learning_rat": 3}, "learning_rat", "did you mean learning_rate"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epoch": 3}}}},
     "method.supervised.hyperparameters.n_epoch", "did you mean n_epochs"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": "3"}}}},
     "method.supervised.hyperparameters.n_epochs", "'auto'"),
    ({"hyperparameters": {"batch_size": 2.5}}, "hyperparameters.batch_size", "whole"),
    ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs", "number"),
    ({"hyperparameters": {"n_epochs": float("inf")}}, "hyperparameters", "no Infinity"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "positive"),
    ({"hyperparameters": {"n_epochs": 1001}}, "n_epochs", "at most 1000"),
    ({"hyperparameters": {"n_epochs": 2}, "method": {"type": "supervised", "supervised": {"hyperparameters": {}}}},
     "hyperparameters", "method only"),
    ({"method": {"type": "reinforcement"}}, "method.type", "reinforcement"),
    ({"method": {"type": "magic"}}, "method.type", "supervised or dpo"),
    ({"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "leave it out"),
    ({"method": PREFERENCE}, "method.dpo.hyperparameters.beta", "positive"),
    ({"suffix": "a/b"}, "suffix", "pattern"),
    ({"suffix": "a" * 65}, "suffix", "pattern"),
    ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio", "not both"),
    ({"warmup_ratio": 2}, "warmup_ratio", "must be in"),
    ({"system_prompt": "drop"}, "system_prompt", "keep or merge"),
    ({"template_date": "31.1.2025"}, "template_date", "YYYY-MM-DD"),
    ({"template_date": "2025-02-30"}, "template_date", "YYYY-MM-DD"),
    ({"allow_control_tokens": "yes"}, "allow_control_tokens", "bool"),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "16"),
    ({"metadata": {"k" * 65: ""}}, "metadata", "64"),
    ({"metadata": {"k": "v" * 513}}, "metadata", "512"),
    ({"metadata": {"k": 1}}, "metadata", "string"),
    ({"seed": -1}, "seed", "greater"),
    ({"seed": 2**31}, "seed", "less"),
    ({"seed": 10**400}, "seed", "too large"),
    ({"rank": 0}, "rank", "greater"),
    ({"rank": 33}, "rank", "--max-lora-rank"),
    ({"adapter": "prefix"}, "adapter", "'lora', 'dora', 'ia3' or 'bottleneck'"),
    ({"adapter": "ia3", "rank": 4}, "rank", "ia3 adapters have no such setting; they have target_modules, feedforward_modules"),
    ({"adapter": "bottleneck", "target_modules": ["q_proj"]}, "target_modules", "they have size, placement, activation"),
    ({"adapter": "dora", "size": 4}, "size", "they have rank, alpha, dropout, target_modules"),
    ({"placement": "houlsby"}, "placement", "lora adapters have no such setting"),
    ({"adapter": "bottleneck", "placement": "left"}, "placement", "'houlsby' or 'pfeiffer'"),
    ({"adapter": "bottleneck", "activation": "tanh"}, "activation", "'relu' or 'gelu'"),
    ({"adapter": "bottleneck", "size": 33}, "size", "--max-lora-rank"),
    ({"adapter": "bottleneck", "size": 0}, "size", "greater"),
    ({"adapter": "dora", "rank": 33}, "rank", "--max-lora-rank"),
    ({"adapter": "dora", "dropout": 0.1}, "dropout", "must be 0 for DoRA"),
    ({"adapter": "ia3", "target_modules": ["k_prj"]}, "target_modules", "did you mean k_proj"),
    ({"adapter": "ia3", "feedforward_modules": ["up_prj"]}, "feedforward_modules", "did you mean up_proj"),
    ({"adapter": "ia3", "feedforward_modules": ["up_proj"]}, "feedforward_modules", "among target_modules"),
    ({"adapter": "ia3", "feedforward_modules": [1]}, "feedforward_modules[0]", "string"),
    ({"activation_memory": "lots"}, "activation_memory", "write bytes (12500000000, 12.5GB, 800MiB), a share below 1, or auto"),
    ({"activation_memory": 0}, "activation_memory", "write bytes"),
    ({"activation_memory": True}, "activation_memory", "a number or a string"),
    ({"activation_memory": float("nan")}, "activation_memory", "no NaN"),
    ({"alpha": 0}, "alpha", "positive"),
    ({"dropout": 1.0}, "dropout", "[0, 1)"),
    ({"learning_rate": 0}, "learning_rate", "positive"),
    ({"learning_rate": 1e-3, "hyperparameters": {"learning_rate_multiplier": 2}}, "learning_rate", "not both"),
    ({"schedule": "square"}, "schedule", "cosine"),
    ({"too_long": "keep"}, "too_long", "truncate"),
    ({"max_length": 513}, "max_length", "512"),
    ({"keep_checkpoints": 0}, "keep_checkpoints", "at least 1"),
    ({"target_modules": ["q_prj"]}, "target_modules", "did you mean q_proj"),
    ({"target_modules": "most"}, "target_modules", "all-linear"),
    ({"weight": 0}, "weight", "greater"),
    ({"weight": float("nan")}, "weight", "no NaN"),
    ({"priority": 2**40}, "priority", "less"),
    ({"members": 0}, "members", "greater"),
    ({"members": 5}, "members", "less"),
    ({"members": 2}, "members", "start the server with --replicas"),
    ({"integrations": [{"type": "mlflow"}]}, "integrations[0].type", "wandb"),
    ({"integrations": [{"type": "wandb"}]}, "integrations", "project"),
])
def test_wrong_fields_are_named(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        spec_of(**fields)
    assert caught.value.param == param
    assert message.lower() in str(caught.value).lower()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coserve.server.jobs.spec.importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidRequest, match="pip install tensorboard"):
        spec_of(integrations=[{"type": "tensorboard"}])
    monkeypatch.setattr("coserve.server.jobs.spec.importlib.util.find_spec", lambda name: object())
    assert spec_of(integrations=[{"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}}]).integrations == (
        {"type": "wandb", "wandb": {"project": "p", "tags": ["a"]}},)


def test_not_an_object() -> None:
    with pytest.raises(InvalidRequest):
        read_body([])
    with pytest.raises(InvalidRequest, match="training_file: the field is missing"):
        read_body({"model": "base"})


def test_too_many_steps() -> None:
    with pytest.raises(InvalidRequest, match="too many"):
        resolved(10**7, hyperparameters={"n_epochs": 1000, "batch_size": 1})
