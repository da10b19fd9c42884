"""Settings of the kinds of adapter: what is refused names its field, and what was written before there were kinds is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from coserve.config.data import adapter_of_kind, finetune_config_from_dict, to_dict
from coserve.config.settings import AdapterConfig, BottleneckConfig, FinetuneConfig, IA3Config, LoraConfig
from coserve.core import ConfigError, InvalidRequest
from coserve.finetune.job import refuse_changes
from coserve.peft.kinds import empty_adapter
from tests.compiler.test_compiler import CPU, F64, make_arch


@pytest.mark.parametrize(("make", "field"), [
    (lambda: IA3Config(target_modules=()), "target_modules"),
    (lambda: IA3Config(target_modules="q_proj"), "target_modules"),
    (lambda: IA3Config(target_modules=("q_proj",), feedforward_modules=("k_proj",)), "feedforward_modules"),
    (lambda: IA3Config(feedforward_modules="down_proj"), "feedforward_modules"),
    (lambda: BottleneckConfig(size=0), "size"),
    (lambda: BottleneckConfig(size=2.5), "size"),
    (lambda: BottleneckConfig(placement="everywhere"), "placement"),
    (lambda: BottleneckConfig(activation="tanh"), "activation"),
    (lambda: FinetuneConfig(ia3=IA3Config(), bottleneck=BottleneckConfig()), "ia3"),
    (lambda: FinetuneConfig(ia3=IA3Config(), lora=LoraConfig(r=4)), "lora"),
    (lambda: FinetuneConfig(lora=LoraConfig(use_dora=True, dropout=0.1)), "dropout"),
    (lambda: finetune_config_from_dict({"ia3": {"rank": 4}}), "rank"),
    (lambda: adapter_of_kind("prefix", {}, {}), "adapter"),
    (lambda: adapter_of_kind("ia3", {"rank": 4}, {"rank": "r", "modules": "target_modules"}), "rank"),
    (lambda: adapter_of_kind("dora", {"dropout": 0.1}, {"dropout": "dropout"}), "dropout"),
    (lambda: finetune_config_from_dict({"bottleneck": 64}), "bottleneck"),
    (lambda: finetune_config_from_dict({"adapter": {}}), "adapter"),
    (lambda: empty_adapter(make_arch(), IA3Config(target_modules=("w_proj",)), dtype=F64, device=CPU), "target_modules"),
])
def test_bad_settings_name_their_field(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.param == field
    assert str(caught.value).startswith(f"{field}: ")


@pytest.mark.parametrize("adapter", [
    LoraConfig(r=3), LoraConfig(use_dora=True), IA3Config(feedforward_modules=()), IA3Config(target_modules="all-linear"),
    BottleneckConfig(size=5, placement="houlsby", activation="gelu"),
])
def test_settings_come_back_from_plain_types(adapter: AdapterConfig) -> None:
    config = FinetuneConfig().with_adapter(adapter)
    assert config.adapter == adapter
    assert finetune_config_from_dict(to_dict(config)) == config


def test_an_adapter_by_its_kinds_name() -> None:
    words = {"rank": "r", "modules": "target_modules", "size": "size"}
    assert adapter_of_kind("dora", {"rank": 4}, words) == LoraConfig(r=4, use_dora=True)
    assert adapter_of_kind("ia3", {"modules": ["k_proj"]}, words) == IA3Config(target_modules=("k_proj",))
    assert adapter_of_kind("bottleneck", {}, words) == BottleneckConfig()
    with pytest.raises(ConfigError, match=r"^modules: bottleneck adapters have no such setting; they have size$"):
        adapter_of_kind("bottleneck", {"modules": ["k_proj"]}, words)


def test_a_job_from_before_there_were_kinds_resumes() -> None:
    now = to_dict(FinetuneConfig(lora=LoraConfig()))
    before = {name: value for name, value in now.items() if name not in ("ia3", "bottleneck")}
    before["lora"] = {name: value for name, value in now["lora"].items() if name != "use_dora"}
    refuse_changes({"settings": now}, {"settings": before}, "job.json")
    dora = to_dict(FinetuneConfig(lora=LoraConfig(use_dora=True)))
    with pytest.raises(InvalidRequest, match=r"settings\.lora\.use_dora has changed"):
        refuse_changes({"settings": dora}, {"settings": before}, "job.json")


def test_ranks_differ_by_layer_as_in_peft() -> None:
    config = LoraConfig(r=4, rank_pattern={r"layers\.1\..*": 2, "layers.0.mlp.down_proj": 8})
    adapter = empty_adapter(make_arch(), config, dtype=F64, device=CPU)
    widths = [adapter.factor_widths(layer) for layer in range(2)]
    assert widths[0]["q_proj.lora_A"] == 4
    assert widths[0]["down_proj.lora_A"] == 8
    assert widths[1]["q_proj.lora_A"] == widths[1]["down_proj.lora_A"] == 2
    assert adapter.rank == 8
