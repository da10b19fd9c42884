"""The fields of adapter_config.json, as a table: what each may hold, and what it is where it is missing, as PEFT has it.

A field of PEFT's is read, is refused where it is used, or has no effect on what the adapter computes and is ignored. A test
holds the list of the last kind and compares all three with PEFT's own classes, so that a new release shows what is missing.
Owns: fields one by one. Does not own: whether they fit the tensors (gate.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from coserve.config.settings import BottleneckConfig
from coserve.config.values import MAX_RANK, MAX_SETTING, check_pattern, is_number, is_whole, shown
from coserve.core import ConfigError
from coserve.peft.foreign import refuse
from coserve.peft.tensors import BOTTLENECK, CONFIG_FILE

_MAX_NAMES = 10_000


class Field(NamedTuple):
    """default: where the field is missing, also where it is null and `nullable`. good: whether a value can be used;
    expected: what it must be, in words."""

    default: Any
    good: Callable[[Any], bool]
    expected: str
    nullable: bool = True


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and len(value) <= _MAX_NAMES and all(isinstance(name, str) for name in value)
    )


def _is_layers(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, list) and len(value) <= _MAX_NAMES and all(is_whole(n) for n in value))


def _is_size(value: Any) -> bool:
    return is_whole(value) and 1 <= value <= MAX_RANK


_FLAG = Field(False, lambda value: isinstance(value, bool), "true or false")
_NAMES = Field(None, _is_names, "a name or a list of names")
_PATTERN = Field({}, lambda value: True, "a table")  # check_pattern says what is wrong
_COMMON = {"target_modules": _NAMES, "exclude_modules": _NAMES}
LORA: Mapping[str, Field] = _COMMON | {
    "r": Field(8, _is_size, f"a whole number from 1 to {MAX_RANK}", nullable=False),
    "lora_alpha": Field(
        8, lambda value: is_number(value) and 0 < value <= MAX_SETTING, f"a positive number of at most {MAX_SETTING:g}",
        nullable=False,
    ),
    "lora_dropout": Field(0.0, lambda value: is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "rank_pattern": _PATTERN,
    "alpha_pattern": _PATTERN,
    "layers_to_transform": Field(None, _is_layers, "a layer's number or a list of them"),
    "bias": Field("none", lambda value: value == "none", '"none": trained biases are not supported'),
    "init_lora_weights": Field(True, lambda value: isinstance(value, bool | str), "true, false or a name"),
}
IA3: Mapping[str, Field] = _COMMON | {"feedforward_modules": _NAMES}
_NEEDED = object()
BOTTLENECKS: Mapping[str, Field] = {
    "size": Field(_NEEDED, _is_size, f"a whole number from 1 to {MAX_RANK}", nullable=False),
    "placement": Field(_NEEDED, lambda value: value in ("houlsby", "pfeiffer"), "houlsby or pfeiffer", nullable=False),
    "activation": Field(_NEEDED, lambda value: value in ("relu", "gelu"), "relu or gelu", nullable=False),
}
KINDS: Mapping[str, Mapping[str, Field]] = {"LORA": LORA, "IA3": IA3, BOTTLENECK: BOTTLENECKS}
"""peft_type -> the fields that are read."""
UNSUPPORTED = (
    "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "alora_invocation_tokens", "megatron_config", "use_bdlora", "kasa_config",
    "arrow_config", "monteclora_config",
)
"""Fields that change what the adapter computes, in ways that are not supported: refused where they are used."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights with which PEFT also changes the frozen weights, when it loads such an adapter too."""


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are read of the config's kind, checked, with PEFT's defaults; and peft_type. Raises InvalidRequest that
    names the field."""
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise refuse(f"{CONFIG_FILE}: peft_type {shown(kind)} can't be loaded, only {', '.join(KINDS)}")
    for name in UNSUPPORTED:
        if raw.get(name):
            raise refuse(f"{CONFIG_FILE}: it uses {name}, which is not supported")
    fields = {name: _read(raw, name, field) for name, field in KINDS[kind].items()}
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise refuse(
            f"{CONFIG_FILE}: init_lora_weights {shown(start)} changes the base; convert it to plain LoRA with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if name in fields:
            try:
                check_pattern(name, fields[name])
            except ConfigError as error:
                raise refuse(f"{CONFIG_FILE}: {error}") from error
    return {"peft_type": kind, **fields}


def bottleneck_config(fields: Mapping[str, Any]) -> BottleneckConfig:
    """A bottleneck adapter's settings, all of which are such fields."""
    return BottleneckConfig(**{name: fields[name] for name in BOTTLENECKS})


def _read(raw: Mapping[str, Any], name: str, field: Field) -> Any:
    value = raw.get(name, field.default)
    if value is _NEEDED:
        raise refuse(f"{CONFIG_FILE}: {name} is missing")
    if value is None and (field.nullable or field.default is None):
        return field.default
    if not field.good(value):
        raise refuse(f"{CONFIG_FILE}: {name} must be {field.expected}, got {shown(value)}")
    return value
