"""PEFT's adapter directory: adapter_config.json and adapter_model.safetensors, in and out.

`generation_config.json` beside them names the tokens that end its answers (endtokens.py), where training taught any.
`coserve.json` beside them names the base it was trained on (a fingerprint), so that an adapter of another base is refused
even where shapes agree. Files made by PEFT have none and are judged by their shapes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from coserve.config import LINEAR_SITES, AdapterConfig, BottleneckConfig, IA3Config, LoraConfig
from coserve.configdata import to_dict
from coserve.core import InvalidRequest, NotFound
from coserve.model.architecture import Architecture
from coserve.model.decoder import MODULE_PATHS
from coserve.model.weights import ModelWeights
from coserve.peft.adapter import Adapter, all_modules
from coserve.peft.endtokens import read_end_tokens, write_end_tokens
from coserve.peft.kinds import empty_adapter
from coserve.peft.lora import lora_layout
from coserve.peft.tensors import PREFIX, from_file, tensor_name, tensor_shape, to_file

CONFIG_FILE, WEIGHTS_FILE, ORIGIN_FILE = "adapter_config.json", "adapter_model.safetensors", "coserve.json"
_UNSUPPORTED = (
    "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "alora_invocation_tokens", "megatron_config", "use_bdlora", "kasa_config",
    "arrow_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights with which PEFT also changes the frozen weights, when it loads such an adapter too."""
_FLOATS = ("F64", "F32", "F16", "BF16")


def save_adapter(directory: Path, adapter: Adapter, flat: torch.Tensor, *, base_name: str, fingerprint: str) -> None:
    """Writes an adapter with the values of `flat` (the adapter's layout, any float dtype) into an existing directory."""
    config = adapter.config
    if isinstance(config, LoraConfig):
        fields = _lora_fields(config, adapter)
    elif isinstance(config, IA3Config):
        fields = {
            "peft_type": "IA3", "target_modules": sorted(config.targets), "feedforward_modules": sorted(config.input_targets),
            "fan_in_fan_out": False, "init_ia3_weights": True,
        }
    elif config is None:
        raise InvalidRequest("adapter: its kind has no file format", param="adapter")
    else:
        fields = {"peft_type": BOTTLENECK, **to_dict(config)}
    fields |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "inference_mode": True, "modules_to_save": None}
    tensors = {tensor_name(p): to_file(adapter, p, flat) for p in adapter.parameters}
    (directory / CONFIG_FILE).write_text(json.dumps(fields, indent=2) + "\n")
    (directory / ORIGIN_FILE).write_text(json.dumps({"base_fingerprint": fingerprint}, indent=2) + "\n")
    write_end_tokens(directory, adapter.end_token_ids)
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def _lora_fields(config: LoraConfig, adapter: Adapter) -> dict[str, Any]:
    sites = dict.fromkeys(p.site for p in adapter.parameters)
    targets = sites if config.target_modules == "all-linear" else config.target_modules
    return {
        "peft_type": "LORA", "r": config.r, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "target_modules": sorted(targets), "bias": "none", "fan_in_fan_out": False, "use_rslora": config.use_rslora,
        "use_dora": config.use_dora, "init_lora_weights": True, "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRequest(f"adapter: {path} can't be read as JSON ({error})", param="adapter") from error
    if not isinstance(data, dict):
        raise InvalidRequest(f"adapter: {path} must hold a JSON object", param="adapter")
    return data


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise NotFound(f"adapter: there is no directory {directory}", param="adapter")
    if not (directory / CONFIG_FILE).is_file():
        raise NotFound(f"adapter: {directory} has no {CONFIG_FILE}; give a directory in PEFT's format", param="adapter")
    fields = _read_json(directory / CONFIG_FILE)
    if fields.get("peft_type") not in _KINDS:
        raise InvalidRequest(
            f"adapter: {directory} has peft_type {fields.get('peft_type')!r}; only {', '.join(_KINDS)} can be loaded",
            param="adapter",
        )
    for key in _UNSUPPORTED:
        if fields.get(key):
            raise InvalidRequest(f"adapter: {directory} uses {key}, which is not supported", param="adapter")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise InvalidRequest(
            f"adapter: {directory} has init_lora_weights {start!r}, which changes the base; convert it to plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion", param="adapter",
        )
    if fields.get("bias", "none") != "none":
        raise InvalidRequest(f"adapter: {directory} trains biases (bias={fields['bias']!r}); not supported", param="adapter")
    if not (directory / WEIGHTS_FILE).is_file():
        hint = "; pickled weights are never opened: save it again with safetensors" if any(directory.glob("*.bin")) else ""
        raise InvalidRequest(f"adapter: {directory} has no {WEIGHTS_FILE}{hint}", param="adapter")
    return fields


def _lora_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: Architecture, directory: Path
) -> LoraConfig:
    """The adapter's settings. Ranks come from the tensors, so any spelling of `target_modules` is understood."""
    targets, ranks = _match(shapes, arch, directory)
    r = int(fields["r"])
    return LoraConfig(
        r=r, alpha=float(fields.get("lora_alpha", r)), dropout=float(fields.get("lora_dropout") or 0.0),
        target_modules=targets, use_rslora=bool(fields.get("use_rslora", False)), use_dora=bool(fields.get("use_dora", False)),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern=dict(fields.get("alpha_pattern") or {}),
    )


def _ia3_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: Architecture, directory: Path
) -> IA3Config:
    """Which modules are scaled, and where, by the tensors: a row [1, in] scales the input."""
    known = {f"{PREFIX}{module}.ia3_l": (module, site) for (_, site), module in all_modules(arch.num_layers).items()}
    found: dict[str, tuple[str, bool]] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise _unknown(name, arch, directory)
        module, site = known[name]
        found[module] = site, shape[:1] == (1,)
    kinds = set(found.values())
    if len(dict(kinds)) == len(kinds) and len(found) == len(kinds) * arch.num_layers:
        names = sorted(kinds, key=lambda kind: LINEAR_SITES.index(kind[0]))
    else:
        names = [(module, scales_input) for module, (_, scales_input) in found.items()]
    return IA3Config(
        target_modules=tuple(name for name, _ in names), feedforward_modules=tuple(name for name, row in names if row)
    )


def _bottleneck_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: Architecture, directory: Path
) -> BottleneckConfig:
    return BottleneckConfig(size=fields["size"], placement=fields["placement"], activation=fields["activation"])


BOTTLENECK = "COSERVE_BOTTLENECK"
"""peft_type of bottleneck adapters, which PEFT doesn't have."""
_KINDS: Mapping[str, Callable[..., AdapterConfig]] = {
    "LORA": _lora_config, "IA3": _ia3_config, BOTTLENECK: _bottleneck_config
}


def load_adapter(directory: Path, weights: ModelWeights, *, fingerprint: str) -> Adapter:
    """Reads an adapter for this base. Raises NotFound, InvalidRequest (another base, shape or kind; unreadable)."""
    fields = _read_config(directory)
    origin = directory / ORIGIN_FILE
    if origin.is_file() and _read_json(origin).get("base_fingerprint") not in (None, fingerprint):
        raise InvalidRequest(
            f"adapter: {directory} was trained on another base ({fields.get('base_model_name_or_path')}); load that model",
            param="adapter",
        )
    try:
        with safe_open(directory / WEIGHTS_FILE, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 not a dict
            for name, part in parts.items():
                if part.get_dtype() not in _FLOATS:
                    raise InvalidRequest(
                        f"adapter: {directory} stores {name} as {part.get_dtype()}; supported are {', '.join(_FLOATS)}",
                        param="adapter",
                    )
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            config = _config(fields, shapes, weights.architecture, directory)
            adapter = empty_adapter(weights.architecture, config, dtype=weights.dtype, device=weights.device)
            _check_shapes(adapter, shapes, directory)
            adapter.bind(weights)
            for p in adapter.parameters:
                from_file(adapter, p, file.get_tensor(tensor_name(p)))
    except SafetensorError as error:
        raise InvalidRequest(f"adapter: {directory / WEIGHTS_FILE} can't be read ({error})", param="adapter") from error
    adapter.refresh()
    adapter.end_token_ids = read_end_tokens(directory, weights.architecture.vocab_size)
    return adapter


def _config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: Architecture, directory: Path
) -> AdapterConfig:
    if not shapes:
        raise InvalidRequest(f"adapter: {directory / WEIGHTS_FILE} holds no {fields['peft_type']} tensors", param="adapter")
    try:
        return _KINDS[fields["peft_type"]](fields, shapes, arch, directory)
    except InvalidRequest:
        raise
    except (KeyError, TypeError, ValueError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidRequest(f"adapter: {directory / CONFIG_FILE} can't be used: {what}", param="adapter") from error


def _check_shapes(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]], directory: Path) -> None:
    expected = {tensor_name(p): tensor_shape(p) for p in adapter.parameters}
    for name in (*shapes, *expected):
        if shapes.get(name) != expected.get(name):
            given = "no such tensor" if name not in shapes else f"shape {list(shapes[name])}"
            wanted = "none" if name not in expected else list(expected[name])
            raise InvalidRequest(
                f"adapter: {directory} does not fit this base and its own settings: {name}: {given}, expected {wanted}",
                param="adapter",
            )


def _unknown(name: str, arch: Architecture, directory: Path) -> InvalidRequest:
    return InvalidRequest(
        f"adapter: {directory} has a tensor {name}, which this base has no place for; known modules: "
        f"{', '.join(MODULE_PATHS)} of {arch.num_layers} layers", param="adapter",
    )


def _match(
    shapes: Mapping[str, tuple[int, ...]], arch: Architecture, directory: Path
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Checks every tensor against the base. Returns the targets (full names if some layers lack one) and {module: rank}."""
    full = lora_layout(arch, LoraConfig(r=1))
    lengths = {f"{PREFIX}{site.module}" for site in full}
    known = {f"{PREFIX}{site.module}.lora_{part}.weight": (site, part) for site in full for part in "AB"}
    kinds: dict[str, None] = {}
    ranks: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.removesuffix(".lora_magnitude_vector") in lengths:
            continue
        if name not in known:
            raise _unknown(name, arch, directory)
        site, part = known[name]
        rank = (shape or (0,))[0 if part == "A" else -1]
        fits = (rank, site.num_in) if part == "A" else (site.num_out, rank)
        other = f"{PREFIX}{site.module}.lora_{'B' if part == 'A' else 'A'}.weight"
        partner = shapes.get(other) or (0,)
        if rank < 1 or shape != fits or partner[-1 if part == "A" else 0] != rank:
            raise InvalidRequest(
                f"adapter: {directory} does not fit this base: {name} has shape {list(shape)}, expected {list(fits)} with its "
                "other factor of the same rank", param="adapter",
            )
        kinds[site.site] = None
        ranks[site.module] = rank
    if not ranks:
        raise InvalidRequest(f"adapter: {directory / WEIGHTS_FILE} holds no LoRA tensors", param="adapter")
    return tuple(kinds) if len(ranks) == len(kinds) * arch.num_layers else tuple(ranks), ranks
