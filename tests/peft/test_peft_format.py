"""Adapters cross between coserve and PEFT with equal logits, and what can't be read is refused in one line."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from coserve.config.settings import LINEAR_SITES, AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.engine.generation import Generator
from coserve.peft.adapter import Adapter
from coserve.peft.format import save_adapter
from coserve.peft.kinds import new_adapter
from coserve.runtime.loaded import LoadedModel, load_model
from tests import oracle
from tests.oracle import load_oracle
from tests.tiny_directory import build_tiny_directory

TOKENS = [5, 17, 300, 41, 2, 96, 17, 250, 8, 120, 33]
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: build_tiny_directory(root / family, family) for family in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="module")
def models(directories: dict[str, Path]) -> dict[str, LoadedModel]:
    """The bases in float64: equal logits are equal to 1e-9."""
    return {family: load_model(str(path), device="cpu", dtype="float64") for family, path in directories.items()}


def peft_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor([TOKENS])).logits[0]


def coserve_logits(model: LoadedModel, adapter: Adapter | None) -> Tensor:
    return Generator(model, adapter).logits(TOKENS)


def random_peft(directory: Path, target: Path, *, seed: int = 0, **config: Any) -> Any:
    """A PEFT adapter with random A and B, saved by PEFT; returns the PEFT model."""
    return random_peft_of(directory, target, peft.LoraConfig(task_type="CAUSAL_LM", **config), seed=seed)


def random_peft_of(directory: Path, target: Path, config: peft.PeftConfig, *, seed: int = 0) -> Any:
    """The same for any kind."""
    model = peft.get_peft_model(load_oracle(directory), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(target)
    return model


def assert_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


# --- PEFT -> coserve ---

PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "two targets": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all linear": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rank above the width": {"r": 40, "lora_alpha": 16, "target_modules": ["up_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "rank_pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": list(LINEAR_SITES), "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
    },
    "alpha_pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": list(LINEAR_SITES),
        "alpha_pattern": {"k_proj": 32, r"layers\.[02]\.mlp\..*": 1, "up_proj": 64},
    },
    "both patterns with rslora": {
        "r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "gate_proj"],
        "rank_pattern": {r".*\.o_proj": 1}, "alpha_pattern": {"o_proj": 9},
    },
    "targets by suffix and full name": {
        "r": 4, "lora_alpha": 8, "target_modules": ["self_attn.q_proj", "model.layers.2.mlp.down_proj"],
    },
    "targets by regular expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.(0|2)\..*(q|up)_proj"},
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer": {"r": 4, "lora_alpha": 8, "target_modules": ["v_proj"], "layers_to_transform": 1},
    "excluded modules": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"},
    "dropout": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.4, "target_modules": ["q_proj", "v_proj"]},
    "orthogonal start": {"r": 4, "lora_alpha": 8, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("config", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS.keys())
def test_peft_to_coserve_and_back(
    tmp_path: Path, directories: dict[str, Path], models: dict[str, LoadedModel], config: dict[str, Any]
) -> None:
    """Equal logits after reading PEFT's files, and PEFT finds the same tensors in what coserve writes of them."""
    theirs = random_peft(directories["llama"], tmp_path / "peft", **config)
    expected = peft_logits(theirs)
    model = models["llama"]
    adapter = model.load_adapter(tmp_path / "peft")
    assert_same(coserve_logits(model, adapter), expected)
    assert (expected - coserve_logits(model, None)).abs().max() > 1e-2, "the adapter changes the logits"

    (tmp_path / "coserve").mkdir()
    save_adapter(tmp_path / "coserve", adapter, adapter.flat, base_name=str(model.directory), fingerprint=model.fingerprint)
    again = peft.PeftModel.from_pretrained(load_oracle(directories["llama"]), str(tmp_path / "coserve"))
    assert_same(peft_logits(again), expected)
    before, after = (peft.get_peft_model_state_dict(m) for m in (theirs, again))
    assert before.keys() == after.keys(), "PEFT would train the same modules"
    assert all(torch.equal(before[name].double(), after[name].double()) for name in before)


# --- coserve -> PEFT ---

COSERVE_CONFIGS: dict[str, LoraConfig] = {
    "default": LoraConfig(),
    "r and alpha": LoraConfig(r=3, alpha=5.0, dropout=0.2),
    "rslora": LoraConfig(r=6, alpha=4.0, use_rslora=True),
    "rank_pattern": LoraConfig(r=4, alpha=8.0, rank_pattern={"q_proj": 1, "layers.2.mlp.down_proj": 9}),
    "alpha_pattern": LoraConfig(r=4, alpha=8.0, alpha_pattern={r"layers\.[01]\.self_attn\..*": 1.0, "down_proj": 32.0}),
    "patterns with rslora": LoraConfig(
        r=4, alpha=2.0, use_rslora=True, rank_pattern={"up_proj": 2}, alpha_pattern={"up_proj": 3.0, "v_proj": 7.0}
    ),
    "targets": LoraConfig(r=4, alpha=8.0, target_modules=("v_proj", "gate_proj")),
    "targets by path": LoraConfig(r=4, alpha=8.0, target_modules=("self_attn.k_proj", "layers.1.mlp.up_proj")),
}


def random_adapter(model: LoadedModel, config: AdapterConfig, seed: int = 3) -> Adapter:
    adapter = new_adapter(model.weights, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=generator) * 0.3)
    adapter.refresh()
    return adapter


def saved(model: LoadedModel, adapter: Adapter, directory: Path) -> Path:
    directory.mkdir()
    save_adapter(directory, adapter, adapter.flat, base_name=model.name, fingerprint=model.fingerprint)
    return directory


@pytest.mark.parametrize("config", COSERVE_CONFIGS.values(), ids=COSERVE_CONFIGS.keys())
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_coserve_to_peft_and_back(
    tmp_path: Path, directories: dict[str, Path], models: dict[str, LoadedModel], family: str, config: LoraConfig
) -> None:
    model = models[family]
    adapter = random_adapter(model, config)
    expected = coserve_logits(model, adapter)
    directory = saved(model, adapter, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*keys")  # missing and unexpected keys are warnings
        theirs = peft.PeftModel.from_pretrained(load_oracle(directories[family]), str(directory))
    assert_same(peft_logits(theirs), expected)
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == load_file(directory / "adapter_model.safetensors").keys()

    again = model.load_adapter(directory)
    assert torch.equal(again.flat, adapter.flat)
    assert_same(coserve_logits(model, again), expected)
    assert again.sites == adapter.sites
    assert again.config.dropout == config.dropout


def test_a_base_with_biases_and_tied_embeddings(
    tmp_path: Path, directories: dict[str, Path], models: dict[str, LoadedModel]
) -> None:
    theirs = random_peft(directories["qwen2"], tmp_path / "a", r=4, target_modules="all-linear")
    assert_same(coserve_logits(models["qwen2"], models["qwen2"].load_adapter(tmp_path / "a")), peft_logits(theirs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_adapters_stored_in_other_dtypes(tmp_path: Path, models: dict[str, LoadedModel], dtype: torch.dtype) -> None:
    model = models["llama"]
    adapter = random_adapter(model, LoraConfig(r=4))
    directory = saved(model, adapter, tmp_path / "adapter")
    path = directory / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    assert torch.equal(model.load_adapter(directory).flat, adapter.flat.to(dtype).double())


def test_loaded_config_says_what_the_file_says(tmp_path: Path, directories: dict[str, Path], models: Any) -> None:
    random_peft(directories["llama"], tmp_path / "a", r=4, lora_alpha=6, lora_dropout=0.25, target_modules=["v_proj", "q_proj"])
    config = models["llama"].load_adapter(tmp_path / "a").config
    assert (config.r, config.alpha, config.dropout, config.use_rslora) == (4, 6.0, 0.25, False)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert not config.rank_pattern


# --- other kinds than LoRA ---

OTHER_PEFT_CONFIGS: dict[str, peft.PeftConfig] = {
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ia3 by its own defaults": peft.IA3Config(),
    "ia3 everywhere": peft.IA3Config(target_modules="all-linear", feedforward_modules=["q_proj", "o_proj"]),
    "ia3 in one layer": peft.IA3Config(target_modules=["layers.1.mlp.down_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "dora": peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_dora=True),
    "dora with rslora and patterns": peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_dora=True, use_rslora=True, lora_dropout=0.3,
        rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"up_proj": 9},
    ),
}


@pytest.mark.parametrize("config", OTHER_PEFT_CONFIGS.values(), ids=OTHER_PEFT_CONFIGS.keys())
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_other_kinds_from_peft_and_back(
    tmp_path: Path, directories: dict[str, Path], models: dict[str, LoadedModel], family: str, config: peft.PeftConfig
) -> None:
    theirs = random_peft_of(directories[family], tmp_path / "peft", copy.deepcopy(config))
    expected, model = peft_logits(theirs), models[family]
    adapter = model.load_adapter(tmp_path / "peft")
    assert_same(coserve_logits(model, adapter), expected)
    assert (expected - coserve_logits(model, None)).abs().max() > 1e-2, "the adapter changes the logits"
    directory = saved(model, adapter, tmp_path / "coserve")
    again = peft.PeftModel.from_pretrained(load_oracle(directories[family]), str(directory))
    assert_same(peft_logits(again), expected)
    before, after = (peft.get_peft_model_state_dict(m) for m in (theirs, again))
    assert before.keys() == after.keys(), "PEFT would train the same modules"
    for name, tensor in before.items():
        torch.testing.assert_close(tensor.double(), after[name].double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bottlenecks_come_back_from_their_files(
    tmp_path: Path, models: dict[str, LoadedModel], placement: str, activation: str
) -> None:
    model = models["llama"]
    config = BottleneckConfig(size=6, placement=placement, activation=activation)
    adapter = random_adapter(model, config)
    again = model.load_adapter(saved(model, adapter, tmp_path / "adapter"))
    assert again.config == config
    assert torch.equal(again.flat, adapter.flat)
    expected = peft_logits(oracle.with_adapter(load_oracle(model.directory), adapter))
    assert_same(coserve_logits(model, again), expected)


@pytest.mark.parametrize("config", [IA3Config(), LoraConfig(r=4, use_dora=True), BottleneckConfig()])
def test_a_new_adapter_changes_nothing(models: dict[str, LoadedModel], config: AdapterConfig) -> None:
    model = models["qwen2"]
    torch.testing.assert_close(
        coserve_logits(model, new_adapter(model.weights, config, seed=0)), coserve_logits(model, None), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("config", "fields", "message"), [
    (BottleneckConfig(), {"size": 5}, "adapter_down.*expected"), (BottleneckConfig(), {"activation": "tanh"}, "relu or gelu"),
    (BottleneckConfig(), {"placement": "houlsby"}, "no such tensor"), (IA3Config(), {"peft_type": "LORA"}, "no place for"),
    (IA3Config(), {"fan_in_fan_out": True}, "fan_in_fan_out"), (IA3Config(), {"peft_type": "COSERVE_BOTTLENECK"}, "missing"),
])
def test_other_kinds_that_cannot_be_used(
    tmp_path: Path, models: dict[str, LoadedModel], config: AdapterConfig, fields: dict[str, Any], message: str
) -> None:
    directory = saved(models["llama"], random_adapter(models["llama"], config), tmp_path / "adapter")
    edit_config(**fields)(directory)
    with pytest.raises(InvalidRequest, match=message) as caught:
        models["llama"].load_adapter(directory)
    assert caught.value.param == "adapter"


# --- what is refused, and what is not ---


def edit_config(**changes: Any) -> Callable[[Path], None]:
    """Ellipsis takes a key away."""

    def change(directory: Path) -> None:
        path = directory / "adapter_config.json"
        fields = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not ...}))

    return change


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return apply


def put(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return edit_tensors(lambda held: held.update(tensors))


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(data)


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def pickled(directory: Path) -> None:
    tensors = load_file(directory / "adapter_model.safetensors")
    torch.save(tensors, directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()


def truncate(directory: Path) -> None:
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


WEIGHTS = "adapter_model.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], object], type[CoserveError], str]] = {
    "another kind": (edit_config(peft_type="VERA"), InvalidRequest, "peft_type 'VERA'.*LORA"),
    "no peft_type": (edit_config(peft_type=...), InvalidRequest, "peft_type None"),
    "DoRA without lengths": (edit_config(use_dora=True), InvalidRequest, "lora_magnitude_vector.*no such tensor"),
    "biases": (edit_config(bias="all"), InvalidRequest, "bias must be .none"),
    "biases of LoRA": (edit_config(lora_bias=True), InvalidRequest, "lora_bias"),
    "saved modules": (edit_config(modules_to_save=["lm_head"]), InvalidRequest, "modules_to_save"),
    "block diagonal": (edit_config(use_bdlora={"nblocks": 2}), InvalidRequest, "use_bdlora"),
    "KaSA": (edit_config(kasa_config={"beta": 1e-4}), InvalidRequest, "kasa_config"),
    "Arrow": (edit_config(arrow_config={"top_k": 1}), InvalidRequest, "arrow_config"),
    "PiSSA": (edit_config(init_lora_weights="pissa"), InvalidRequest, "init_lora_weights.*pissa"),
    "OLoRA": (edit_config(init_lora_weights="olora"), InvalidRequest, "init_lora_weights.*olora"),
    "CorDA": (edit_config(init_lora_weights="corda"), InvalidRequest, "init_lora_weights.*corda"),
    "no r": (edit_config(r=...), InvalidRequest, r"adapter_config.json.*\br\b"),
    "r is no number": (edit_config(r="four"), InvalidRequest, r"adapter_config.json.*four"),
    "alpha is nothing": (edit_config(lora_alpha=None), InvalidRequest, "adapter_config.json"),
    "negative alpha": (edit_config(lora_alpha=-1), InvalidRequest, "adapter_config.json.*alpha"),
    "config is cut": (write("adapter_config.json", b'{"peft_type": "LO'), InvalidRequest, "adapter_config.json.*JSON"),
    "config is a list": (write("adapter_config.json", b"[]"), InvalidRequest, "adapter_config.json.*object"),
    "no config": (remove("adapter_config.json"), NotFound, "no adapter_config.json"),
    "no directory": (shutil.rmtree, NotFound, "no directory"),
    "no weights": (remove(WEIGHTS), InvalidRequest, f"has no {WEIGHTS}$"),
    "only pickled weights": (pickled, InvalidRequest, f"has no {WEIGHTS}; pickled weights are never opened"),
    "truncated weights": (truncate, InvalidRequest, f"{WEIGHTS} can't be read"),
    "garbage weights": (write(WEIGHTS, b"\x10" * 200), InvalidRequest, f"{WEIGHTS} can't be read"),
    "empty weights file": (write(WEIGHTS, b""), InvalidRequest, f"{WEIGHTS} can't be read"),
    "no tensors": (edit_tensors(lambda t: t.clear()), InvalidRequest, "holds no LORA tensors"),
    "another width": (put({Q_A: torch.zeros(4, 48)}), InvalidRequest, r"q_proj.*\[4, 48\].*\[rank, 32\]"),
    "another height": (put({Q_B: torch.zeros(33, 4)}), InvalidRequest, r"q_proj.*\[33, 4\]"),
    "three dimensions": (put({Q_A: torch.zeros(4, 32, 1)}), InvalidRequest, "q_proj"),
    "a scalar": (put({Q_A: torch.tensor(1.0)}), InvalidRequest, "q_proj"),
    "ranks of A and B differ": (put({Q_B: torch.zeros(32, 5)}), InvalidRequest, "q_proj.*both must have one rank"),
    "B is missing": (edit_tensors(lambda t: t.pop(Q_B)), InvalidRequest, "q_proj.*one factor without the other"),
    "A is missing": (edit_tensors(lambda t: t.pop(Q_A)), InvalidRequest, "q_proj.*one factor without the other"),
    "rank 0": (put({Q_A: torch.zeros(0, 32), Q_B: torch.zeros(32, 0)}), InvalidRequest, "q_proj"),
    "unknown tensor": (put({"stranger": torch.zeros(2)}), InvalidRequest, "tensor stranger"),
    "another layer": (put({Q_A.replace("layers.0", "layers.7"): torch.zeros(4, 32)}), InvalidRequest, "layers.7.*3 layers"),
    "integers": (put({Q_A: torch.zeros(4, 32, dtype=torch.int8)}), InvalidRequest, "q_proj.*as I8"),
    "origin is cut": (write("coserve.json", b'{"base_fing'), InvalidRequest, "coserve.json.*JSON"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, models: dict[str, LoadedModel]) -> Path:
    """A good adapter of the llama base, of rank 4 at all sites."""
    model = models["llama"]
    return saved(model, random_adapter(model, LoraConfig(r=4)), tmp_path_factory.mktemp("adapters") / "good")


@pytest.mark.parametrize(("damage", "kind", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_used_is_refused_in_one_line(
    tmp_path: Path, models: dict[str, LoadedModel], good: Path, damage: Callable[[Path], object],
    kind: type[CoserveError], message: str,
) -> None:
    directory = Path(shutil.copytree(good, tmp_path / "adapter"))
    models["llama"].load_adapter(directory)
    damage(directory)
    with pytest.raises(kind, match=message) as caught:
        models["llama"].load_adapter(directory)
    assert str(caught.value).startswith("adapter: ")
    assert "\n" not in str(caught.value)
    assert caught.value.param == "adapter"


def test_targets_outside_the_layers_are_refused(
    tmp_path: Path, directories: dict[str, Path], models: dict[str, LoadedModel]
) -> None:
    """As PEFT writes them: the head and the embedding have no place here."""
    for target in ("lm_head", "embed_tokens"):
        random_peft(directories["llama"], tmp_path / target, r=4, target_modules=["q_proj", target])
        with pytest.raises(InvalidRequest, match=target):
            models["llama"].load_adapter(tmp_path / target)


def test_an_adapter_of_another_base_is_refused_though_shapes_agree(
    tmp_path: Path, models: dict[str, LoadedModel], good: Path
) -> None:
    other = load_model(str(build_tiny_directory(tmp_path / "other", seed=1)), device="cpu", dtype="float64")
    with pytest.raises(InvalidRequest, match="trained on another base"):
        other.load_adapter(good)
    unmarked = Path(shutil.copytree(good, tmp_path / "unmarked"))
    (unmarked / "coserve.json").unlink()  # as PEFT would have written it
    other.load_adapter(unmarked)
    with pytest.raises(InvalidRequest, match=r"does not fit|no place"):
        models["qwen3"].load_adapter(unmarked)


def test_the_same_base_in_another_dtype_takes_the_adapter(directories: dict[str, Path], good: Path) -> None:
    load_model(str(directories["llama"]), device="cpu", dtype="float32").load_adapter(good)


@pytest.mark.parametrize("change", [
    {"future_key": {"a": 1}, "another": True}, {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva"},
    {"runtime_config": {"ephemeral_gpu_offload": False}}, {"init_lora_weights": "gaussian"}, {"revision": None},
    {"alpha_pattern": None, "rank_pattern": None}, {"lora_dropout": None}, {"task_type": None}, {"bias": ...},
])
def test_keys_that_do_not_matter_are_tolerated(
    tmp_path: Path, models: dict[str, LoadedModel], good: Path, change: dict[str, Any]
) -> None:
    directory = Path(shutil.copytree(good, tmp_path / "adapter"))
    expected = models["llama"].load_adapter(directory)
    edit_config(**change)(directory)
    assert torch.equal(models["llama"].load_adapter(directory).flat, expected.flat)
