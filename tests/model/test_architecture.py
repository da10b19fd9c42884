"""Architectures read from config.json agree with the modules that transformers builds from the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from coserve.core import ConfigError, InvalidRequest, NotFound
from coserve.model.architecture import read_architecture
from tests.tiny_models import FAMILIES, build_tiny_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}


def edit(path: Path, *, remove: tuple[str, ...] = (), **changes: Any) -> None:
    raw = json.loads(path.read_text())
    raw.update(changes)
    for key in remove:
        raw.pop(key, None)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(("family", "flags"), [
    ("llama", (False, False, False, False)),
    ("mistral", (False, False, False, False)),
    ("qwen2", (True, False, False, False)),
    ("qwen3", (False, False, False, True)),
    ("granite", (False, False, False, False)),
    ("smollm3", (False, False, False, False)),
])
def test_fields_and_flags(tmp_path: Path, family: str, flags: tuple[bool, ...]) -> None:
    arch = read_architecture(build_tiny_model(family, tmp_path))
    assert arch.model_type == family
    assert (arch.qkv_bias, arch.o_bias, arch.mlp_bias, arch.qk_norm) == flags
    assert (arch.vocab_size, arch.hidden_size, arch.intermediate_size, arch.num_layers) == (97, 32, 48, 3)
    assert (arch.num_heads, arch.num_kv_heads, arch.head_dim) == (4, 2, 16 if family == "qwen3" else 8)
    assert (arch.rms_norm_eps, arch.max_position_embeddings) == (1e-5 / (0.22**2 if family == "granite" else 1), 512)
    assert arch.tie_word_embeddings == (family not in ("llama", "mistral"))
    assert arch.nope_layers == ({1} if family == "smollm3" else set())
    assert arch.eos_token_ids == (2,)
    scales = (arch.embedding_scale, arch.score_scale, arch.logits_scaling)
    assert scales == ((3.0 / 0.22, 0.2 * 8**0.5, 1.7) if family == "granite" else (1, 1, 1))


def test_optional_biases(tmp_path: Path) -> None:
    llama = read_architecture(build_tiny_model("llama", tmp_path / "llama", bias=True))
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, True)
    for family in ("granite", "smollm3"):
        arch = read_architecture(build_tiny_model(family, tmp_path / family, bias=True))
        assert (arch.qkv_bias, arch.o_bias, arch.mlp_bias) == (True, True, True)
    qwen3 = read_architecture(build_tiny_model("qwen3", tmp_path / "qwen3", bias=True))
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias) == (True, True, False)


@pytest.mark.parametrize("rope", [None, LINEAR, LLAMA3, YARN], ids=["default", "linear", "llama3", "yarn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rope_is_bit_equal_to_transformers(tmp_path: Path, family: str, rope: dict[str, Any] | None) -> None:
    arch = read_architecture(build_tiny_model(family, tmp_path, rope=rope))
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    assert list(arch.rope_inv_freq) == rotary.inv_freq.tolist()
    assert arch.rope_scaling == rotary.attention_scaling
    assert (arch.rope_scaling == 1.0) == (rope is not YARN)


def test_rope_in_the_format_of_transformers_4(tmp_path: Path) -> None:
    expected = read_architecture(build_tiny_model("llama", tmp_path, rope=LLAMA3))
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    edit(tmp_path / "config.json", remove=("rope_parameters",), rope_theta=10000.0,
         rope_scaling={"type": "llama3", **scaling})
    assert read_architecture(tmp_path) == expected


@pytest.mark.parametrize(("family", "window", "expected"), [
    ("mistral", 7, (7, 7, 7)),
    ("mistral", None, (None, None, None)),
    ("qwen2", 7, (None, 7, 7)),
    ("qwen3", 7, (None, 7, 7)),
    ("qwen3", None, (None, None, None)),
    ("smollm3", 7, (None, 7, None)),
    ("smollm3", None, (None, None, None)),
])
def test_sliding_windows(tmp_path: Path, family: str, window: int | None, expected: tuple[int | None, ...]) -> None:
    assert read_architecture(build_tiny_model(family, tmp_path, sliding_window=window)).sliding_windows == expected


def test_qwen_windows_of_published_files(tmp_path: Path) -> None:
    build_tiny_model("qwen2", tmp_path)
    config = tmp_path / "config.json"
    edit(config, remove=("layer_types",), use_sliding_window=False, sliding_window=9, max_window_layers=0)
    assert read_architecture(tmp_path).sliding_windows == (None, None, None)
    edit(config, use_sliding_window=True, max_window_layers=2)
    assert read_architecture(tmp_path).sliding_windows == (None, None, 9)
    edit(config, layer_types=["sliding_attention", "full_attention", "full_attention"])
    assert read_architecture(tmp_path).sliding_windows == (9, None, None)


def test_eos_is_what_either_config_names_the_generation_configs_first(tmp_path: Path) -> None:
    generation = build_tiny_model("llama", tmp_path) / "generation_config.json"
    edit(generation, eos_token_id=[5, 3, 5])
    assert read_architecture(tmp_path).eos_token_ids == (5, 3, 2)
    edit(generation, remove=("eos_token_id",))
    assert read_architecture(tmp_path).eos_token_ids == (2,)
    generation.unlink()
    assert read_architecture(tmp_path).eos_token_ids == (2,)
    edit(tmp_path / "config.json", eos_token_id=None)
    assert read_architecture(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize(("family", "changes", "field"), [
    ("llama", {"model_type": "mamba"}, "model_type"),
    ("llama", {"model_type": None}, "model_type"),
    ("mistral", {"vision_config": {}}, "vision_config"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                                   "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}}, "rope_type"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ("llama", {"partial_rotary_factor": 0.25}, "partial_rotary_factor"),
    ("qwen2", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
     "rope_parameters"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"eos_token_id": "two"}, None),
    ("llama", {"hidden_size": "wide"}, None),
])
def test_refused(tmp_path: Path, family: str, changes: dict[str, Any], field: str | None) -> None:
    build_tiny_model(family, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path / "config.json", **changes)
    with pytest.raises(ConfigError) as caught:
        read_architecture(tmp_path)
    assert caught.value.param == field
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(field or str(tmp_path))


def test_unknown_family_lists_the_known(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="'gpt2' is not supported; known are llama, mistral, qwen2, qwen3"):
        read_architecture(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json does not exist"):
        read_architecture(tmp_path)
    for text in ("{", "[]", "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InvalidRequest, match="JSON"):
            read_architecture(tmp_path)
