"""config.json of models that are too large to run here, as published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coserve.model.architecture import Architecture, read_architecture

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "eos_token_id": 128001,
    },
    "qwen-32b": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "tie_word_embeddings": False, "eos_token_id": 151645, "use_sliding_window": False,
    },
}


def read_model(name: str, directory: Path) -> Architecture:
    """The architecture of one of CONFIGS. directory: where its config.json may be written."""
    (directory / "config.json").write_text(json.dumps(CONFIGS[name]))
    return read_architecture(directory)
