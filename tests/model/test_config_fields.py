"""A config.json is read as transformers reads it, or refused by the name of the field that would change the model."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coserve.cli import main as cli
from coserve.core import ConfigError
from coserve.engine.generation import Generator
from coserve.model import architecture
from coserve.model.architecture import FAMILIES, read_architecture
from coserve.model.checkpoint import Checkpoint
from coserve.model.fields import EXPECTED, INERT, READ
from coserve.model.weights import load_weights
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.text.tokenizer import ChatTokenizer
from tests.tiny_models import build_tiny_model
from tests.tiny_tokenizer import build_tiny_tokenizer

IDS = torch.randint(0, 97, (60,), generator=torch.Generator().manual_seed(3)).tolist()
SLIDING, FULL = "sliding_attention", "full_attention"


def edit(directory: Path, **changes: Any) -> None:
    """Changes fields of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def our_logits(directory: Path) -> torch.Tensor:
    weights = load_weights(Checkpoint(directory), dtype=torch.float32, device=torch.device("cpu"))
    model = LoadedModel("tiny", directory, "tiny", ChatTokenizer.load(directory), weights, Executor(weights))
    return Generator(model).logits(IDS)


def their_logits(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(torch.tensor([IDS])).logits[0]


def check_equal(directory: Path) -> None:
    """Logits of 60 tokens, far beyond the windows of these tests."""
    build_tiny_tokenizer(directory)
    theirs = their_logits(directory)  # processors round products in different orders, and logits are up to 50
    assert float((our_logits(directory) - theirs).abs().max()) <= 1e-5 * max(10.0, float(theirs.abs().max()))


@pytest.mark.parametrize(("family", "changes", "windows"), [
    ("mistral", {"sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]}, (7, None, 7)),
    ("mistral", {"sliding_window": 7, "layer_types": None}, (7, 7, 7)),
    ("mistral", {"sliding_window": 7, "layer_types": [FULL] * 3}, (None, None, None)),
    ("mistral", {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "sliding_window": 9}, (9, 9, 9)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": [FULL, SLIDING, FULL]}, (None, 7, None)),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]}, (7, None, 7)),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "layer_types": None, "max_window_layers": 2}, (None, None, 7)),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 7, "layer_types": None, "max_window_layers": 0}, (None,) * 3),
])
def test_windows_by_layer_are_those_of_transformers_s_own_class(
    tmp_path: Path, family: str, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    edit(build_tiny_model(family, tmp_path), **changes)
    assert read_architecture(tmp_path).sliding_windows == windows
    assert read_architecture(tmp_path).model_type == AutoConfig.from_pretrained(tmp_path).model_type
    check_equal(tmp_path)


def test_windows_matter_in_these_tests(tmp_path: Path) -> None:
    build_tiny_tokenizer(build_tiny_model("mistral", tmp_path))
    edit(tmp_path, sliding_window=7)
    every = our_logits(tmp_path)
    edit(tmp_path, layer_types=[SLIDING, FULL, SLIDING])
    assert float((our_logits(tmp_path) - every).abs().max()) > 0.1


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"head_dim": None}),
    ("llama", {"rope_scaling": None, "rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 2}),
    ("llama", {"sliding_window": None, "layer_types": None, "logits_scaling": 1.0, "residual_multiplier": 1, "num_experts": 0}),
    ("llama", {"architectures": ["LlamaModel"], "use_cache": False, "max_sequence_length": 4096, "torch_dtype": "bfloat16"}),
    ("llama", {"architectures": None, "_name_or_path": "org/name", "unsloth_version": "2026.1", "initializer_range": 0.5}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 0.7,
                                   "mscale_all_dim": 0.5, "original_max_position_embeddings": 16, "truncate": False}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, "rope_theta": 5e5}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0},
               "original_max_position_embeddings": 20}),
    ("mistral", {"attention_bias": False, "max_window_layers": 2, "use_sliding_window": False, "hidden_dropout": 0.1}),
    ("qwen3", {"partial_rotary_factor": 1.0, "attention_chunk_size": None}),
    ("granite", {"embedding_multiplier": 12, "residual_multiplier": 1, "tie_word_embeddings": True}),
    ("smollm3", {"no_rope_layers": [0, 1, 0], "no_rope_layer_interval": 4}),
    ("smollm3", {"no_rope_layers": [1, 1, 1], "pretraining_tp": 2, "max_window_layers": 28}),
])
def test_what_changes_nothing_is_taken(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    edit(build_tiny_model(family, tmp_path), **changes)
    check_equal(tmp_path)


@pytest.mark.parametrize(("family", "changes", "field"), [
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("llama", {"layer_types": [SLIDING] * 3}, "layer_types"),
    ("llama", {"attention_chunk_size": 8}, "attention_chunk_size"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ("llama", {"logit_scale": 0.0625}, "logit_scale"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
    ("llama", {"residual_multiplier": 0.22}, "residual_multiplier"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ("llama", {"attention_multiplier": 0.015625}, "attention_multiplier"),
    ("llama", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    ("llama", {"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved"),
    ("llama", {"rotary_pct": 0.25}, "rotary_pct"),
    ("llama", {"use_parallel_residual": True}, "use_parallel_residual"),
    ("llama", {"num_local_experts": 8}, "num_local_experts"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("llama", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder"),
    ("llama", {"kv_lora_rank": 512}, "kv_lora_rank"),
    ("llama", {"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"architectures": ["Qwen2ForCausalLM"]}, "architectures"),
    ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}, "rope_parameters"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "rope_theta": None}, "rope_theta"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta"),
    ("mistral", {"attention_bias": True}, "attention_bias"),
    ("mistral", {"mlp_bias": True}, "mlp_bias"),
    ("mistral", {"sliding_window": 7, "layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("mistral", {"sliding_window": None, "layer_types": [SLIDING] * 3}, "sliding_window"),
    ("mistral", {"model_type": "ministral3"}, "model_type"),
    ("qwen2", {"attention_bias": True}, "attention_bias"),
    ("qwen2", {"mlp_bias": True}, "mlp_bias"),
    ("qwen2", {"use_sliding_window": False, "layer_types": [SLIDING] * 3}, "sliding_window"),
    ("qwen2", {"vision_start_token_id": 5}, "vision_start_token_id"),
    ("qwen3", {"mlp_bias": True}, "mlp_bias"),
    ("qwen3", {"num_experts": 4}, "num_experts"),
    ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
    ("granite", {"attention_multiplier": -0.1}, "attention_multiplier"),
    ("granite", {"embedding_multiplier": math.nan}, "embedding_multiplier"),
    ("granite", {"logits_scaling": math.inf}, "logits_scaling"),
    ("granite", {"sliding_window": 8}, "sliding_window"),
    ("granite", {"num_local_experts": 8}, "num_local_experts"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers"),
    ("smollm3", {"use_qk_norm": True}, "use_qk_norm"),
])
def test_what_would_change_the_model_is_refused_by_name(
    tmp_path: Path, family: str, changes: dict[str, Any], field: str
) -> None:
    edit(build_tiny_model(family, tmp_path), **changes)
    with pytest.raises(ConfigError) as caught:
        read_architecture(tmp_path)
    assert caught.value.param == field and field in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompt_format": "alpaca", "owner": {"name": "x"}}, "that coserve does not know are ignored: owner, prompt_format"),
    ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is ignored"),
    ({"auto_map": {"AutoModelForCausalLM": "code.Model"}}, "never run"),
])
def test_what_is_passed_over_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    edit(build_tiny_model("llama", tmp_path), **changes)
    with pytest.warns(UserWarning, match=words):
        read_architecture(tmp_path)


def test_the_command_shows_a_warning_in_one_line() -> None:
    assert cli._format_warning(UserWarning("config.json: odd"), UserWarning, "x.py", 1) == "warning: config.json: odd\n"
    assert "x.py:1: DeprecationWarning" in cli._format_warning(DeprecationWarning("old"), DeprecationWarning, "x.py", 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_that_transformers_writes_are_read_without_a_word(tmp_path: Path, family: str) -> None:
    config = AutoConfig.for_model(family, num_hidden_layers=2, **({"head_dim": 8} if family == "ministral" else {}))
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_architecture(tmp_path).num_layers == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_transformers_s_class_is_known(tmp_path: Path, family: str) -> None:
    """A field that a newer transformers adds to a class is refused where it isn't neutral, until somebody has looked at it."""
    config = AutoConfig.for_model(family, num_hidden_layers=2, **({"head_dim": 8} if family == "ministral" else {}))
    unknown = config.to_dict().keys() - READ - INERT - EXPECTED.keys() - FAMILIES[family].fields
    assert {name for name in unknown if not name.startswith("_")} == set()


def test_a_class_that_transformers_replaces_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tiny_model("llama", tmp_path)
    monkeypatch.setattr(architecture, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {"llama": "Llama9ForCausalLM"})
    with pytest.raises(ConfigError, match="transformers reads llama as Llama9ForCausalLM"):
        read_architecture(tmp_path)
