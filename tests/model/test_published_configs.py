"""Fields of config.json as published checkpoints have them: none is refused, and those that mean something are read.

Only the fields are the checkpoints' own; sizes are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coserve.core import ConfigError, InvalidRequest
from coserve.model.architecture import read_architecture
from coserve.model.checkpoint import Checkpoint

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "vocab_size": 100, "initializer_range": 0.02,
    "use_cache": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.0", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "rope_theta": 10000.0,
}
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": False,
                         "attention_dropout": 0.0, "pretraining_tp": 1, "rope_scaling": None}
MISTRAL: dict[str, Any] = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0}
QWEN2: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
                         "max_window_layers": 3, "sliding_window": 32768, "use_sliding_window": False}
QWEN3: dict[str, Any] = {**QWEN2, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "attention_bias": False,
                         "head_dim": 128, "rope_scaling": None, "sliding_window": None}
GRANITE: dict[str, Any] = {
    "model_type": "granite", "architectures": ["GraniteForCausalLM"], "attention_bias": False, "attention_dropout": 0.1,
    "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22,
    "mlp_bias": False, "rope_scaling": None, "rope_theta": 5e6, "eos_token_id": 0, "tie_word_embeddings": True,
}
SMOLLM3: dict[str, Any] = {
    "model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "layer_types": ["full_attention"] * 4, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0], "pretraining_tp": 2, "rope_scaling": None, "rope_theta": 5e6, "sliding_window": None,
    "use_sliding_window": False, "pad_token_id": 4,
}
LLAMA3_ROPE = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
               "rope_type": "llama3"}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2": {**LLAMA, "is_llama_config": True, "rope_interleaved": False, "mlp_bias": False, "pad_token_id": 2,
                "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "the first Llama": {"model_type": "llama", "architectures": ["LLaMAForCausalLM"], "max_sequence_length": 2048,
                        "pad_token_id": 0},
    "Llama 3.1": {**LLAMA, "mlp_bias": False, "rope_scaling": LLAMA3_ROPE, "eos_token_id": [7, 8, 9]},
    "Llama 3.2": {**LLAMA, "mlp_bias": False, "head_dim": 16, "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}},
    "Falcon 3": {**LLAMA, "activation": "swiglu", "head_dim": 256, "mlp_bias": False, "rope_theta": 1000042},
    "Granite Code": {**LLAMA, "attention_bias": True, "mlp_bias": True, "attention_dropout": 0.1},
    "InternLM 2 as a Llama": {**LLAMA, "attn_implementation": "eager", "bias": False},
    "InternLM as a Llama": {**LLAMA, "bias": True, "attention_bias": True},
    "Vicuna 16k": {**LLAMA, "max_length": 4096, "max_sequence_length": 16384,
                   "rope_scaling": {"factor": 4.0, "type": "linear"}},
    "Llama 2 with YaRN": {**LLAMA, "auto_map": {"AutoModelForCausalLM": "m.C"}, "rope_scaling": {**YARN, "finetuned": True}},
    "Llama 2 of Together": {**LLAMA, "use_flashattn": True, "log_scale": False},
    "Unsloth's Llama": {**LLAMA, "unsloth_version": "2024.9", "unsloth_fixed": True, "rope_scaling": LLAMA3_ROPE},
    "of transformers 5": {**LLAMA, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"},
    "of an early transformers": {
        **LLAMA, "output_scores": False, "top_k": 50, "top_p": 1.0, "num_beams": 1, "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None, "tie_encoder_decoder": False, "pruned_heads": {}, "length_penalty": 1.0,
        "id2label": {"0": "LABEL_0"}, "tf_legacy_loss": False, "return_dict_in_generate": False},
    "named twice": {**LLAMA, "num_layers": 4, "n_heads": 4, "ffn_hidden_size": 128, "norm_eps": 1e-5, "rope_base": 10000,
                    "position_embedding_type": "rope", "layer_types": ["full_attention"] * 4, "normalization": "RMSNorm"},
    "with names of kernels": {**LLAMA, "_flash_attn_2_enabled": True, "use_flash_attention_2": True, "use_fused_rms_norm": True,
                              "use_liger_kernel": True, "attn_impl": "flash", "kv_cache_dtype": "fp16"},
    "Mistral 0.1": {**MISTRAL, "sliding_window": 4096},
    "Mistral 0.3, Codestral": {**MISTRAL, "sliding_window": None, "rope_theta": 1e6},
    "Mistral Nemo, Small": {**MISTRAL, "head_dim": 128, "sliding_window": None, "rope_theta": 1e6},
    "Ministral 8B": {**MISTRAL, "head_dim": 128, "sliding_window": 32768, "rope_theta": 1e8},
    "Zephyr": {**MISTRAL, "sliding_window": 4096, "pad_token_id": 2, "_name_or_path": "org/name"},
    "an embedding Mistral": {**MISTRAL, "architectures": ["MistralModel"], "sliding_window": 4096},
    "Qwen 1.5": {**QWEN2, "seq_length": 32768},
    "Qwen 2.5 Math, DeepSeek R1 Distill": {**QWEN2, "use_mrope": False},
    "Qwen 2.5 with YaRN": {**QWEN2, "rope_scaling": YARN},
    "Qwen 2.5 1M": {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}},
    "Qwen 3": QWEN3,
    "Qwen 3 with YaRN": {**QWEN3, "rope_scaling": {**YARN, "rope_type": "yarn"}},
    "Granite 3.1, 3.3": GRANITE,
    "SmolLM3": SMOLLM3,
}


def write(directory: Path, fields: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps({**SIZES, **fields}))
    return directory


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_checkpoints_are_taken(tmp_path: Path, name: str) -> None:
    found, fields = read_architecture(write(tmp_path, PUBLISHED[name])), PUBLISHED[name]
    assert found.head_dim == (fields.get("head_dim") or 16)
    assert set(found.sliding_windows) == {fields["sliding_window"] if fields["model_type"] == "mistral" else None}
    assert (found.o_bias, found.mlp_bias) == (bool(fields.get("attention_bias")), bool(fields.get("mlp_bias")))


@pytest.mark.parametrize(("fields", "refused"), [
    ({"activation": "gelu"}, "activation"), ({"num_layers": 5}, "num_layers"), ({"norm_eps": 1e-6}, "norm_eps"),
    ({"bias": True}, "bias"), ({"rope_base": 5e5}, "rope_base"),
    ({"position_embedding_type": "alibi"}, "position_embedding_type"),
    ({"normalization": "LayerNorm"}, "normalization"), ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ({"fused_ffn": True}, "fused_ffn"), ({"flash_attn_window": 8}, "flash_attn_window"),
    ({"activation": ["silu"]}, "activation"),
])
def test_a_second_name_that_disagrees_is_refused(tmp_path: Path, fields: dict[str, Any], refused: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_architecture(write(tmp_path, {**LLAMA, **fields}))
    assert caught.value.param == refused


@pytest.mark.parametrize("field", ["quantization_config", "quantization", "compression_config"])
def test_a_quantised_checkpoint_is_named(tmp_path: Path, field: str) -> None:
    write(tmp_path, {**LLAMA, field: {"group_size": 64, "bits": 4}})
    with pytest.raises(InvalidRequest, match=f"quantised checkpoint \\({field}"):
        Checkpoint(tmp_path)
