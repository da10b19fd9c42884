"""What an adapter's directory says of itself in adapter_config.json, without reading its weights.

For defaults and warnings before a model is there. Does not own: whether the adapter can be used (gate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from coserve.config.settings import AdapterConfig, IA3Config, LoraConfig
from coserve.core import NotFound
from coserve.peft.fields import bottleneck_config, read_fields
from coserve.peft.foreign import read_json_object, refuse
from coserve.peft.tensors import BOTTLENECK, CONFIG_FILE


def described_adapter(directory: Path) -> AdapterConfig:
    """An adapter's settings as its configuration states them; PEFT's defaults where it says nothing. Raises NotFound,
    InvalidRequest."""
    try:
        fields = read_fields(read_json_object(directory / CONFIG_FILE))
    except FileNotFoundError as error:
        what = f"{directory.name} has no {CONFIG_FILE}; give a directory in PEFT's format"
        if not directory.is_dir():
            what = f"there is no directory {directory.name}"
        raise NotFound(f"adapter: {what}", param="adapter") from error
    try:
        return _KINDS[fields["peft_type"]](fields)
    except ValueError as error:
        raise refuse(f"{CONFIG_FILE} can't be used: {error}") from error


def _lora(fields: Mapping[str, Any]) -> LoraConfig:
    return LoraConfig(
        r=fields["r"], alpha=fields["lora_alpha"], dropout=fields["lora_dropout"],
        target_modules=_names(fields["target_modules"]) or "all-linear", use_rslora=fields["use_rslora"],
        use_dora=fields["use_dora"], rank_pattern=fields["rank_pattern"], alpha_pattern=fields["alpha_pattern"],
    )


def _ia3(fields: Mapping[str, Any]) -> IA3Config:
    targets = IA3Config(target_modules=_names(fields["target_modules"]) or IA3Config().target_modules)
    inputs = tuple(_names(fields["feedforward_modules"]) or ())
    return replace(targets, feedforward_modules=inputs) if set(inputs) <= set(targets.targets) else targets


def _names(value: Any) -> Any:
    """A list as a tuple; a regular expression, which PEFT allows, as the one name it is here."""
    if value is None or value == "all-linear":
        return value
    return (value,) if isinstance(value, str) else tuple(value)


_KINDS: Mapping[str, Callable[[Mapping[str, Any]], AdapterConfig]] = {"LORA": _lora, "IA3": _ia3, BOTTLENECK: bottleneck_config}
