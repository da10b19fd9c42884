"""Small adapters in PEFT's format, written without PEFT and without a model: files as strangers bring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from tests.tiny_models import TINY_SIZES

HIDDEN, KEYS = TINY_SIZES["hidden_size"], 16
SITES = {"q_proj": (HIDDEN, HIDDEN), "v_proj": (KEYS, HIDDEN)}
"""(out, in) of the sites that the adapters have, on the tiny models."""


def write_tiny_config(directory: Path) -> Path:
    """The config.json of the tiny Llama: enough to know which adapters fit."""
    directory.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**TINY_SIZES, head_dim=8, tie_word_embeddings=False).save_pretrained(directory)
    return directory


def tensor_of(layer: int, site: str, part: str) -> str:
    """The name of a factor, part A or B, in a file."""
    return f"base_model.model.model.layers.{layer}.self_attn.{site}.lora_{part}.weight"


def write_tiny_adapter(directory: Path, *, rank: int = 4, scale: float = 0.2, seed: int = 0, **config: Any) -> Path:
    """LoRA on q_proj and v_proj of all layers, with random factors. config: fields of its settings; ... leaves one out."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(TINY_SIZES["num_hidden_layers"]):
        for site, (num_out, num_in) in SITES.items():
            tensors[tensor_of(layer, site, "A")] = torch.randn(rank, num_in, generator=generator) * scale
            tensors[tensor_of(layer, site, "B")] = torch.randn(num_out, rank, generator=generator) * scale
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(SITES), **config}
    text = json.dumps({key: value for key, value in fields.items() if value is not ...})
    (directory / "adapter_config.json").write_text(text)
    return directory
