"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, in and out.

`generation_config.json` beside them names the tokens that end its answers (remarks.py), where training taught any.
`coserve.json` beside them names the base it was trained on (a fingerprint), so that an adapter of another base is refused
even where shapes agree. Files made by PEFT have none and are judged by their shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from coserve.config.data import to_dict
from coserve.config.settings import AdapterConfig, IA3Config, LoraConfig
from coserve.config.values import MAX_RANK, Quantization
from coserve.core import InvalidRequest
from coserve.model.weights import ModelWeights
from coserve.peft.adapter import Adapter, Parameter
from coserve.peft.foreign import refuse
from coserve.peft.gate import Base, PassedAdapter, read_adapter
from coserve.peft.kinds import adapter_layout, empty_adapter
from coserve.peft.remarks import GENERATION_FILE
from coserve.peft.tensors import BOTTLENECK, CONFIG_FILE, ORIGIN_FILE, WEIGHTS_FILE, from_file, tensor_name, to_file

__all__ = ["CONFIG_FILE", "ORIGIN_FILE", "WEIGHTS_FILE", "admit_adapter", "bind_adapter", "save_adapter"]


def save_adapter(
    directory: Path, adapter: Adapter, flat: torch.Tensor, *, base_name: str, fingerprint: str,
    quantization: Quantization = "none",
) -> None:
    """Writes an adapter with the values of `flat` (the adapter's layout, any float dtype) into an existing directory.
    quantization: of the base that it was trained on, which the files say; the adapter fits the base in any form."""
    if adapter.config is None:
        raise InvalidRequest("adapter: its kind has no file format", param="adapter")
    tensors = to_file(adapter, flat)
    origin = {"base_fingerprint": fingerprint}
    if quantization != "none":
        origin["base_quantization"] = quantization
    _write(directory, adapter.config, adapter.parameters, tensors, base_name, origin, adapter.end_token_ids)


def _write(
    directory: Path, config: AdapterConfig, parameters: tuple[Parameter, ...], tensors: Mapping[str, Tensor],
    base_name: str | None, origin: Mapping[str, Any], ends: Sequence[int],
) -> None:
    """ends: tokens that end the adapter's answers beside the base's own; a base may name one token as its end while the chats
    that an adapter was trained on close a turn with another. PEFT ignores the file."""
    if isinstance(config, LoraConfig):
        fields = _lora_fields(config, parameters)
    elif isinstance(config, IA3Config):
        fields = {
            "peft_type": "IA3", "target_modules": sorted(config.targets), "feedforward_modules": sorted(config.input_targets),
            "fan_in_fan_out": False, "init_ia3_weights": True,
        }
    else:
        fields = {"peft_type": BOTTLENECK, **to_dict(config)}
    fields |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True, "modules_to_save": None}
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    (directory / ORIGIN_FILE).write_text(json.dumps(dict(origin), indent=2) + "\n")
    if ends:
        (directory / GENERATION_FILE).write_text(json.dumps({"eos_token_id": sorted(set(ends))}, indent=2) + "\n")
    save_file(dict(tensors), directory / WEIGHTS_FILE, metadata={"format": "pt"})


def _lora_fields(config: LoraConfig, parameters: tuple[Parameter, ...]) -> dict[str, Any]:
    sites = dict.fromkeys(p.site for p in parameters)
    targets = sites if config.target_modules == "all-linear" else config.target_modules
    return {
        "peft_type": "LORA", "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": sorted(targets), "bias": "none", "fan_in_fan_out": False, "use_rslora": config.use_rslora,
        "use_dora": config.use_dora, "init_lora_weights": True, "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def bind_adapter(passed: PassedAdapter, weights: ModelWeights, *, warn: Callable[[str], None] = lambda _: None) -> Adapter:
    """An adapter that passed the gate, on its base's weights. warn: takes what its maker should know, a line each. Raises
    InvalidRequest if what follows from both is not finite."""
    for warning in passed.warnings:
        warn(warning)
    adapter = empty_adapter(weights.architecture, passed.config, dtype=weights.dtype, device=weights.device)
    adapter.bind(weights)
    fill_adapter(adapter, passed)
    adapter.refresh()
    require_finite(adapter)
    return adapter


def fill_adapter(adapter: Adapter, passed: PassedAdapter) -> None:
    """Writes the values of an adapter that passed the gate into one of its settings."""
    for p in adapter.parameters:
        from_file(adapter, p, passed.tensors[tensor_name(p)])
    adapter.end_token_ids = passed.end_tokens


def require_finite(adapter: Adapter) -> None:
    """Raises InvalidRequest if what follows from an adapter's values and from its base is not finite: DoRA's scalings."""
    for p in adapter.parameters:
        factor = adapter.factor(p.layer, p.name)
        assert factor is not None
        if not torch.isfinite(factor.matrix).all():
            raise refuse(f"{WEIGHTS_FILE}: on this base {tensor_name(p)} gives values that are not finite")


def admit_adapter(source: Path, target: Path, base: Base, *, max_rank: int = MAX_RANK) -> PassedAdapter:
    """Reads a foreign adapter and writes what passed into the existing directory `target`, in the form that `save_adapter`
    gives: numbers per module, no expressions, nothing but known fields. Raises as `read_adapter`, and OSError."""
    passed = read_adapter(source, base, max_rank=max_rank)
    origin = {**passed.origin, "base_fingerprint": base.fingerprint}
    layout = adapter_layout(base.architecture, passed.config)
    _write(target, passed.config, layout, passed.tensors, passed.base_name, origin, passed.end_tokens)
    return passed
