"""Tiny random checkpoints of each family, written by transformers itself, for tests.

Three layers, hidden 32, 4 query heads, 2 key-value heads, head width 8 (16 for qwen3, so that it differs from
hidden / heads), intermediate 48, vocabulary 97, 512 positions. Every bias is non-zero and no norm weight is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "granite", "smollm3")

TINY_SIZES: dict[str, int] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def _family_settings(family: str, sliding_window: int | None, bias: bool) -> dict[str, Any]:
    qwen_window: dict[str, Any] = {
        "use_sliding_window": sliding_window is not None,
        "sliding_window": sliding_window,
        "max_window_layers": 1,
    }
    settings: dict[str, dict[str, Any]] = {
        "llama": {"head_dim": 8, "tie_word_embeddings": False, "attention_bias": bias, "mlp_bias": bias},
        "mistral": {"head_dim": 8, "tie_word_embeddings": False, "sliding_window": sliding_window},
        "qwen2": {"tie_word_embeddings": True, **qwen_window},
        "qwen3": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": bias, **qwen_window},
        "granite": {
            "tie_word_embeddings": True, "attention_bias": bias, "mlp_bias": bias, "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_scaling": 1.7,
        },
        "smollm3": {
            "tie_word_embeddings": True, "attention_bias": bias, "mlp_bias": bias, "no_rope_layer_interval": 2,
            "use_sliding_window": sliding_window is not None, "sliding_window": sliding_window, "pad_token_id": 0,
        },
    }
    return settings[family]


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Overwrite every parameter with seeded noise: norms near one, biases near zero, activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                value = 1.0 + 0.3 * noise
            elif name.endswith(".bias"):
                value = 0.5 * noise
            elif "embed_tokens" in name:
                value = noise
            else:
                value = noise * 1.5 / parameter.shape[1] ** 0.5
            parameter.copy_(value)


def build_tiny_model(
    family: str,
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sliding_window: int | None = None,
    rope: dict[str, Any] | None = None,
    tie: bool | None = None,
    bias: bool = False,
) -> Path:
    """Save a tiny random model of `family` into `directory` (made if missing) and return the directory.

    sliding_window: keys seen by a query; all layers of mistral, layers 1 and 2 of qwen2 and qwen3, layer 1 of smollm3,
    which has no rotary embedding; llama and granite have none. rope: transformers 5 `rope_parameters` (`rope_type`,
    `rope_theta`, ...). tie: None means untied for llama and mistral, tied for the others. bias: optional biases of llama,
    granite and smollm3 (q, k, v, o, MLP) and qwen3 (q, k, v, o).
    """
    assert sliding_window is None or family not in ("llama", "granite")
    assert not bias or family in ("llama", "qwen3", "granite", "smollm3")
    settings: dict[str, Any] = {**TINY_SIZES, **_family_settings(family, sliding_window, bias)}
    settings["rope_parameters"] = dict(rope) if rope else {"rope_type": "default", "rope_theta": 10000.0}
    if tie is not None:
        settings["tie_word_embeddings"] = tie
    config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5, **settings)
    model = AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.to(dtype).save_pretrained(directory)
    return Path(directory)
