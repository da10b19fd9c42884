"""The decoder's shape, read from a Hugging Face config.json: one frozen record for every family.

Owns: which families are known and how they differ (a table), rotary frequencies, end-of-sequence ids. Does not own: fields
that are not read (fields.py), weights (checkpoint.py), the tokenizer. Source of meaning: the modeling files of transformers 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from coserve.core import ConfigError, InvalidRequest, NotFound, one_line
from coserve.model.fields import check_fields

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Everything the decoder needs to know about a backbone except its weights."""

    model_type: str
    """Hugging Face's name of the family."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Width of one head; num_heads * head_dim may differ from hidden_size."""
    rms_norm_eps: float
    """For the residual stream as it is held (`embedding_scale`)."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    """The head reuses the embedding table; the checkpoint need not have lm_head.weight."""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """RMSNorm over each head of q and of k, before the rotary embedding."""
    sliding_windows: tuple[int | None, ...]
    """One per layer. With window w, query i sees keys j with i - w < j <= i; None sees every key up to i."""
    rope_inv_freq: tuple[float, ...]
    """Radians per position of each pair of features, head_dim / 2 float32 values."""
    rope_scaling: float
    """Multiplied onto cos and sin (YaRN's attention factor), else 1."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a generation; may be empty."""
    nope_layers: frozenset[int] = frozenset()
    """Layers whose queries and keys get no rotary embedding."""
    embedding_scale: float = 1.0
    """Multiplied onto embeddings. Where a family multiplies what each sublayer adds to the residual stream by r, the stream is
    held divided by r: embeddings and eps are scaled here, and the layers are those of every family."""
    score_scale: float = 1.0
    """Multiplied onto attention scores beside 1 / sqrt(head_dim): the rotary embedding gives its root to queries and keys."""
    logits_scaling: float = 1.0
    """Divides logits, by way of the final norm's weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model type differs from the others. The functions take its configuration."""

    class_name: str
    """transformers' class of the causal language model."""
    fields: frozenset[str]
    """Fields of config.json that this family reads beside those of every family. If attention_bias or mlp_bias is among them,
    it says whether there are biases."""
    qkv_bias: bool = False
    """Whether q, k and v always have biases."""
    qk_norm: bool = False
    sliding_windows: Callable[[PreTrainedConfig], tuple[int | None, ...]]


def _full_attention(config: PreTrainedConfig) -> tuple[int | None, ...]:
    return (None,) * config.num_hidden_layers


def _one_window(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Mistral: every layer has the same window, or none. (With layer_types transformers takes it for a Ministral.)"""
    return (config.sliding_window,) * config.num_hidden_layers


def _window_by_layer_type(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Qwen, Ministral: transformers fills layer_types where the file has none (Qwen: from use_sliding_window and
    max_window_layers)."""
    for layer_type in config.layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ConfigError(f"layer_types: {layer_type!r} is not supported", param="layer_types")
    if "sliding_attention" in config.layer_types and config.sliding_window is None:
        raise ConfigError("sliding_window: layer_types names sliding_attention, but no window is in use; give sliding_window, "
                          "for Qwen with use_sliding_window = true", param="sliding_window")
    return tuple(config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types)


_WINDOWS = frozenset({"sliding_window", "layer_types"})
_FACTORS = frozenset({"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"})

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        class_name="LlamaForCausalLM", fields=frozenset({"attention_bias", "mlp_bias"}), sliding_windows=_full_attention
    ),
    "mistral": Family(
        class_name="MistralForCausalLM", fields=frozenset({"sliding_window"}), sliding_windows=_one_window
    ),
    "qwen2": Family(
        class_name="Qwen2ForCausalLM", fields=_WINDOWS | {"use_sliding_window"}, qkv_bias=True,
        sliding_windows=_window_by_layer_type,
    ),
    "qwen3": Family(
        class_name="Qwen3ForCausalLM", fields=_WINDOWS | {"use_sliding_window", "attention_bias"}, qk_norm=True,
        sliding_windows=_window_by_layer_type,
    ),
    "ministral": Family(
        class_name="MinistralForCausalLM", fields=_WINDOWS, sliding_windows=_window_by_layer_type
    ),
    "granite": Family(
        class_name="GraniteForCausalLM", fields=_FACTORS | {"attention_bias", "mlp_bias"}, sliding_windows=_full_attention
    ),
    "smollm3": Family(
        class_name="SmolLM3ForCausalLM",
        fields=_WINDOWS | {"use_sliding_window", "no_rope_layers", "no_rope_layer_interval", "attention_bias", "mlp_bias"},
        sliding_windows=_window_by_layer_type,
    ),
}
"""By the model type that transformers gives a configuration, which is not always the one that its file states."""


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises NotFound without the file, InvalidRequest where it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def read_architecture(directory: Path) -> Architecture:
    """The architecture of the model in a Hugging Face directory.

    Raises NotFound without config.json, InvalidRequest where it is not JSON, and ConfigError naming the field for
    whatever the decoder cannot compute: unknown families, multi-modal models, other activations, rotary embeddings
    that depend on the sequence length or cover part of a head, and fields that are not known to be without influence.
    """
    raw = read_json(directory / "config.json")
    _refuse_multimodal(raw, directory)
    _known_family(raw.get("model_type"))  # before transformers reads the file: its own message lists hundreds
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and huggingface_hub raise many unrelated types here
        raise ConfigError(f"{directory / 'config.json'}: {one_line(error)}") from error
    family = _known_family(config.model_type)
    _check_class(raw, config, family)
    check_fields(raw, family.fields, str(directory / "config.json"))
    if config.hidden_act not in ("silu", "swish"):  # two names of one function
        raise ConfigError(f"hidden_act: only silu is supported, got {config.hidden_act!r}", param="hidden_act")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    inv_freq, scaling = _rope(config, head_dim)
    attention_bias = "attention_bias" in family.fields and bool(config.attention_bias)
    factors = _factors(config, family)
    residual = factors.get("residual_multiplier", 1.0)
    assert residual == 1 or not family.qk_norm, "the eps of heads' norms would be another than the residual stream's"
    architecture = Architecture(
        model_type=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.rms_norm_eps) / residual**2,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family.qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias="mlp_bias" in family.fields and bool(config.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_windows=family.sliding_windows(config),
        rope_inv_freq=inv_freq,
        rope_scaling=scaling,
        eos_token_ids=_eos_token_ids(directory, config),
        nope_layers=_nope_layers(config) if "no_rope_layers" in family.fields else frozenset(),
        embedding_scale=factors.get("embedding_multiplier", 1.0) / residual,
        score_scale=factors["attention_multiplier"] * math.sqrt(head_dim) if "attention_multiplier" in factors else 1.0,
        logits_scaling=factors.get("logits_scaling", 1.0),
    )
    _check(architecture)
    return architecture


def _refuse_multimodal(raw: Mapping[str, Any], directory: Path) -> None:
    for key in ("vision_config", "audio_config", "text_config"):
        if key in raw:
            raise ConfigError(
                f"{key}: {directory} is a multi-modal model; only text decoders are supported", param=key
            )


def _known_family(model_type: object) -> Family:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(
            f"model_type: {model_type!r} is not supported; known are {', '.join(FAMILIES)}", param="model_type"
        )
    return FAMILIES[model_type]


def _check_class(raw: Mapping[str, Any], config: PreTrainedConfig, family: Family) -> None:
    """transformers would build the class that the family stands for, and the file was written for it or its base."""
    theirs = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if theirs != family.class_name:
        raise ConfigError(f"model_type: transformers reads {config.model_type} as {theirs}, which is not supported; "
                          f"coserve knows {family.class_name}", param="model_type")
    written = FAMILIES.get(str(raw.get("model_type")), family)
    known = {one.class_name.casefold() for one in (family, written)}
    known |= {name.replace("forcausallm", "model") for name in known}
    names = raw.get("architectures") or []
    for name in names if isinstance(names, list) else [names]:
        if str(name).casefold() not in known:
            raise ConfigError(f"architectures: {name!r} is not supported for a {config.model_type} model; "
                              f"{family.class_name} is", param="architectures")


def _rope(config: PreTrainedConfig, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Inverse frequencies [head_dim / 2], computed in float32 as transformers' rotary embedding does, and the factor
    on cos and sin."""
    parameters = config.rope_parameters or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise ConfigError("rope_parameters: one rotary embedding per layer type is not supported",
                          param="rope_parameters")
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"rope_type: {rope_type!r} is not supported (its frequencies may depend on the sequence length); "
            f"known are {', '.join(ROPE_TYPES)}", param="rope_type")
    partial = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"partial_rotary_factor: only 1 is supported, got {partial}",
                          param="partial_rotary_factor")
    theta = parameters.get("rope_theta")
    if not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        raise ConfigError(f"rope_theta: must be a positive number, got {theta!r}", param="rope_theta")
    if rope_type == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        return tuple((1.0 / (theta ** exponents)).tolist()), 1.0
    try:
        inv_freq, scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"rope_parameters: {rope_type} cannot be computed: {type(error).__name__} {error}",
                          param="rope_parameters") from error
    return tuple(inv_freq.float().tolist()), float(scaling)


def _factors(config: PreTrainedConfig, family: Family) -> dict[str, float]:
    """Those of _FACTORS that the family has."""
    factors = {name: float(getattr(config, name)) for name in _FACTORS & family.fields}
    for name, value in factors.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}: must be a positive number, got {value}", param=name)
    return factors


def _nope_layers(config: PreTrainedConfig) -> frozenset[int]:
    """SmolLM3: where no_rope_layers has 0. transformers fills it from no_rope_layer_interval where the file has none."""
    turned, layers = config.no_rope_layers, config.num_hidden_layers
    if len(turned) != layers:
        raise ConfigError(f"no_rope_layers: {len(turned)} entries for {layers} layers", param="no_rope_layers")
    return frozenset(layer for layer in range(layers) if not turned[layer])


def _eos_token_ids(directory: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Those of generation_config.json, then those that only config.json names: the model may write either as its end."""
    path = directory / "generation_config.json"
    values = [read_json(path).get("eos_token_id") if path.exists() else None, getattr(config, "eos_token_id", None)]
    ids: list[int] = []
    for value in values:
        if value is None:
            continue
        found = list(value) if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in found):
            raise ConfigError(f"eos_token_id: must be a token id or a list of them, got {value!r}", param="eos_token_id")
        ids += found
    return tuple(dict.fromkeys(ids))


def _check(arch: Architecture) -> None:
    """Raise ConfigError where the numbers cannot belong to one decoder."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_position_embeddings"):
        value = getattr(arch, name)
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: must be a positive integer, got {value!r}", param=name)
    if arch.num_heads % arch.num_kv_heads:
        raise ConfigError(f"num_key_value_heads: {arch.num_heads} query heads cannot share {arch.num_kv_heads}",
                          param="num_key_value_heads")
    if arch.head_dim % 2:
        raise ConfigError(f"head_dim: must be even, got {arch.head_dim}", param="head_dim")
    if len(arch.sliding_windows) != arch.num_layers:
        raise ConfigError(f"layer_types: {len(arch.sliding_windows)} entries for {arch.num_layers} layers",
                          param="layer_types")
    if any(window is not None and window < 1 for window in arch.sliding_windows):
        raise ConfigError(f"sliding_window: must be at least 1, got {arch.sliding_windows}", param="sliding_window")
    assert len(arch.rope_inv_freq) == arch.head_dim // 2
    assert arch.score_scale == 1 or not arch.nope_layers, "the rotary embedding scales scores"
