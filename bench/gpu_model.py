"""What the GPU benchmark runs on: a model of given shapes with random weights made on the device, or a real one.

Owns: shapes, weights from a generator, a tokenizer whose texts are numbers (so that lengths are exact), counts of operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from coserve import load_model
from coserve.model.architecture import Architecture
from coserve.model.decoder import MERGED, linear_shapes
from coserve.model.linear import make_head, make_linear
from coserve.model.weights import LayerWeights, ModelWeights
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel, find_model
from coserve.text.tokenizer import ChatTokenizer

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
"""8B: speed doesn't depend on how rotary frequencies are scaled: the plain ones stand for Llama 3.1's."""
STD = 0.02


class NumberTokenizer(ChatTokenizer):
    """Texts are token ids in decimal, one word each; any other word is token 0. The last token of the vocabulary is EOS, so a
    training text has one token more than it has words."""

    def __init__(self, vocab_size: int) -> None:
        words = Tokenizer(WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
        words.pre_tokenizer = Whitespace()
        super().__init__(PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(vocab_size - 1)))


class BenchModel(NamedTuple):
    """A model with its name."""

    name: str
    loaded: LoadedModel


def make_model(name: str, device: torch.device) -> BenchModel:
    """name: a key of SHAPES (random weights), 'smollm2', or a model directory (its own weights)."""
    if name in SHAPES:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return BenchModel(name, random_model(name, device, dtype))
    # a CPU shows that everything runs, and that it is exact
    loaded = load_model(
        None if name == "smollm2" else name, device=device.type, dtype="float32" if device.type == "cpu" else "auto"
    )
    loaded = replace(loaded, tokenizer=NumberTokenizer(loaded.architecture.vocab_size))
    return BenchModel(Path(name).name, loaded)


def config_of(name: str) -> PreTrainedConfig:
    """transformers' configuration of a model's shapes, without its weights. name: as for `make_model`."""
    return AutoConfig.for_model("llama", **SHAPES[name]) if name in SHAPES else _config_from(architecture_of(name))


def _config_from(arch: Architecture) -> PreTrainedConfig:
    """A configuration of the same shapes: a GGUF file comes without one."""
    return AutoConfig.for_model(
        "llama", vocab_size=arch.vocab_size, hidden_size=arch.hidden_size, intermediate_size=arch.intermediate_size,
        num_hidden_layers=arch.num_layers, num_attention_heads=arch.num_heads, num_key_value_heads=arch.num_kv_heads,
        head_dim=arch.head_dim, max_position_embeddings=arch.max_position_embeddings,
        tie_word_embeddings=arch.tie_word_embeddings, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def shapes_of(config: Any) -> Architecture:
    """The architecture of a transformers configuration of SHAPES."""
    half, theta = config.head_dim // 2, config.rope_parameters["rope_theta"]
    return Architecture(
        model_type="llama", vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps, max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings, qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False,
        sliding_windows=(None,) * config.num_hidden_layers, rope_inv_freq=tuple(theta ** (-i / half) for i in range(half)),
        rope_scaling=1.0, eos_token_ids=(),
    )


def architecture_of(name: str) -> Architecture:
    """The shapes of a model, without its weights. name: as for `make_model`."""
    if name in SHAPES:
        return shapes_of(AutoConfig.for_model("llama", **SHAPES[name]))
    return find_model(None if name == "smollm2" else name, device="cpu").architecture


def random_model(
    name: str, device: torch.device, dtype: torch.dtype, *, seed: int = 0, std: float = STD,
    drawn_on: torch.device | None = None,
) -> LoadedModel:
    """A model of SHAPES with random weights, drawn on its device. drawn_on: on which else, so that the values are the same on
    another, and exact in bfloat16; that takes long for a large model."""
    arch = shapes_of(AutoConfig.for_model("llama", **SHAPES[name]))
    weights = random_weights(arch, dtype, device, seed=seed, std=std, drawn_on=drawn_on)
    tokenizer: Any = NumberTokenizer(arch.vocab_size)
    return LoadedModel(name, Path(name), f"random {name} {dtype}", tokenizer, weights, Executor(weights))


def random_weights(
    arch: Architecture, dtype: torch.dtype, device: torch.device, *, seed: int, std: float, drawn_on: torch.device | None
) -> ModelWeights:
    """Normal weights and norms of 1, made matrix by matrix. drawn_on: as for `random_model`."""
    generator = torch.Generator(drawn_on or device).manual_seed(seed)
    shapes = linear_shapes(arch)

    def noise(rows: int, columns: int) -> Tensor:
        if drawn_on is None:
            return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0.0, std, generator=generator)
        drawn = torch.empty(rows, columns, device=drawn_on).normal_(0.0, std, generator=generator)
        return drawn.bfloat16().to(device, dtype)

    def ones() -> Tensor:
        return torch.ones(arch.hidden_size, dtype=dtype, device=device)

    layers = []
    for _ in range(arch.num_layers):
        linears = {site: make_linear(noise(*shapes[site]), None, packed=False) for site in ("o_proj", "down_proj")}
        for merged, sites in MERGED.items():
            rows = [shapes[site][0] for site in sites]
            linears[merged] = whole = make_linear(noise(sum(rows), arch.hidden_size), None, packed=False)
            for index, site in enumerate(sites):
                linears[site] = whole.rows(sum(rows[:index]), sum(rows[: index + 1]))
        layers.append(LayerWeights(linears, {"input_layernorm": ones(), "post_attention_layernorm": ones()}))
    embedding = noise(arch.vocab_size, arch.hidden_size)
    table = embedding if arch.tie_word_embeddings else noise(arch.vocab_size, arch.hidden_size)
    return ModelWeights(arch, embedding, layers, ones(), make_head(table, packed=False))


class Operations(NamedTuple):
    """Floating-point operations, apart: products with frozen weights and adapters, attention, and what is computed twice."""

    model: float
    attention: float
    recomputation: float


def num_linear_weights(arch: Architecture) -> int:
    """Elements of all layers' frozen matrices."""
    return arch.num_layers * sum(rows * columns for rows, columns in linear_shapes(arch).values())


def forward_operations(arch: Architecture, rows: int, pairs: int, head_rows: int) -> Operations:
    """A pass. pairs: query-key pairs per layer; head_rows: rows through the output head."""
    head = 2 * arch.hidden_size * arch.vocab_size * head_rows
    attention = 4 * arch.num_layers * arch.num_heads * arch.head_dim * pairs
    return Operations(2 * num_linear_weights(arch) * rows + head, attention, 0)


def training_operations(arch: Architecture, rows: int, pairs: int, labels: int, lora_weights: int) -> Operations:
    """Forward and backward of a frozen backbone (no gradients of its weights) with adapters of so many elements.

    Backward's attention computes its scores anew: 2 of its 10 operations per pair and feature are recomputation.
    """
    forward = forward_operations(arch, rows, pairs, labels)
    return Operations(
        2 * forward.model + 6 * lora_weights * rows, 3 * forward.attention, forward.attention / 2
    )
