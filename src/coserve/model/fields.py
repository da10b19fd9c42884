"""Which fields of a config.json may stand there: each is read, can't change what a decoder computes, or is refused.

Owns: that check. Does not own: what the fields mean (architecture.py). transformers keeps a field that its class doesn't
know as an attribute, and parts of it (masks, caches, rotary embeddings) look for such attributes; and other programs give
fields a meaning that transformers' class of this name does not have. So an unknown field is never passed over in silence.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from coserve.core import ConfigError

READ = frozenset({
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings",
    "eos_token_id", "quantization_config", "quantization", "compression_config",
})
"""Read for every family."""

INERT = frozenset({
    "transformers_version", "torch_dtype", "dtype", "use_cache", "cache_implementation", "initializer_range", "bos_token_id",
    "pad_token_id", "sep_token_id", "unk_token_id", "id2label", "label2id", "problem_type", "task_specific_params",
    "finetuning_task", "tokenizer_class", "return_dict", "output_attentions", "output_hidden_states", "torchscript",
    "use_bfloat16", "is_decoder", "is_llama_config", "chunk_size_feed_forward", "pretraining_tp", "max_window_layers",
    "max_sequence_length", "max_seq_len", "model_max_length", "seq_length", "attn_implementation", "use_flash_attn",
    "use_flash_attention", "use_flash_attention_2", "gradient_checkpointing", "unsloth_version", "unsloth_fixed",
    "transformers.js_config", "auto_map", "attention_dropout", "dual_chunk_attention_config",
})
"""Fields without influence on logits in transformers' classes of these families."""

_KERNELS = re.compile("flash_?att|^use_fused_|^fused_attention$|^_?attn_impl|^kv_cache_|sdpa|xformers|liger")
"""Names of fields that choose how something is computed or stored, not what."""

_SAME_AS: Mapping[str, str] = {
    "num_layers": "num_hidden_layers", "n_layer": "num_hidden_layers", "n_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads", "n_head": "num_attention_heads", "n_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads", "n_kv_heads": "num_key_value_heads", "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim", "ffn_dim": "intermediate_size", "ffn_hidden_size": "intermediate_size",
    "norm_eps": "rms_norm_eps", "layer_norm_eps": "rms_norm_eps", "layer_norm_epsilon": "rms_norm_eps",
    "rope_base": "rope_theta", "rotary_emb_base": "rope_theta", "bias": "attention_bias", "attn_bias": "attention_bias",
}
"""{another program's name of a field: the field}. Under such a name a file may only repeat what the field itself says."""

_AGREE: Mapping[str, tuple[Any, ...]] = {
    "activation": ("silu", "swish", "swiglu"), "activation_function": ("silu", "swish", "swiglu"),
    "hidden_activation": ("silu", "swish", "swiglu"), "mlp_activation": ("silu", "swish", "swiglu"),
    "position_embedding_type": ("rope", "rotary"), "normalization": ("RMSNorm", "rmsnorm"),
    "norm_type": ("RMSNorm", "rmsnorm"), "gated_mlp": (True,), "causal": (True,),
}
"""Fields that may say what every decoder of these families does anyway."""

EXPECTED: Mapping[str, Any] = {"is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False}
"""Fields that transformers' own masks and models look for, with the only value that is supported."""

ROPE_READ = frozenset({
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "mscale", "mscale_all_dim", "truncate",
    "partial_rotary_factor", "finetuned",
})
"""Fields of rope_parameters that transformers' rotary embeddings read; and finetuned, a remark."""

_COMPUTES = re.compile(
    "act_fn|activation|alibi|attention|attn|audio|bias|bidirectional|cap(ping)?$|causal|chunk|clip|conv|cross|depth|embedding|"
    "expert|ffn|gate|head|intermediate|kv|latent|layer|logit|lora_rank|mask|mlp|moe|mtp|multiplier|mup|nope|norm|parallel|"
    "position|qk|residual|rope|rotary|router|scal|sink|softcap|sparse|ssm|vision|window"
)
_FACTOR = re.compile("factor|multiplier|scal|pct|ratio")
"""Names of fields where the value 1 changes nothing."""


def check_fields(raw: Mapping[str, Any], family_fields: frozenset[str], source: str) -> None:
    """Raises ConfigError for a field that would change what is computed and is not understood; warns of the others.

    raw: config.json; family_fields: read for this family beside READ; source: the file, for messages.
    """
    for name, value in EXPECTED.items():
        if raw.get(name, value) not in (value, None):
            raise ConfigError(f"{name}: only {value} is supported, got {raw[name]!r}", param=name)
    passed = []
    for name, value in raw.items():
        if name in READ or name in INERT or name in EXPECTED or name in family_fields or name.startswith("_"):
            continue
        if _is_neutral(name, value) or _agrees(name, value, raw):
            continue
        kernel = isinstance(value, bool | str) and _KERNELS.search(name.lower())
        if "drop" not in name and not kernel and _COMPUTES.search(name.lower()):
            raise ConfigError(
                f"{name}: {_short(value)} in {source} is not supported for a {raw.get('model_type')} model; remove the field "
                "if it does not change what the model computes", param=name)
        passed.append(name)
    for key in ("rope_parameters", "rope_scaling"):
        for name, value in (raw[key].items() if isinstance(raw.get(key), dict) else ()):
            if name not in ROPE_READ and not isinstance(value, dict) and not _is_neutral(name, value):
                raise ConfigError(f"{key}: {name} = {_short(value)} is not supported", param=key)
    if passed:
        warnings.warn(f"{source}: fields that coserve does not know are ignored: {', '.join(sorted(passed))}", stacklevel=2)
    if raw.get("attention_dropout"):
        warnings.warn(f"{source}: attention_dropout = {raw['attention_dropout']} is ignored: finetuning drops nothing out of "
                      "attention", stacklevel=2)
    if raw.get("auto_map"):
        warnings.warn(f"{source}: names code of its own (auto_map), which is never run; the model is read as the "
                      f"{raw.get('model_type')} of transformers", stacklevel=2)


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a value says that something is absent or changes nothing."""
    if value is None or value is False or value in (0, "", [], {}):
        return True
    return isinstance(value, int | float) and value is not True and value == 1 and bool(_FACTOR.search(name))


def _agrees(name: str, value: Any, raw: Mapping[str, Any]) -> bool:
    """Whether a field repeats another one, or says what the decoder does in any case."""
    if name == "layer_types":  # of a family without windows
        return isinstance(value, list) and all(kind == "full_attention" for kind in value)
    return value in _AGREE.get(name, ()) or (name in _SAME_AS and value == raw.get(_SAME_AS[name]))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
