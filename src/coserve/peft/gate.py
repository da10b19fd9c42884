"""The one way in for adapters that somebody else made: a directory in PEFT's format is read and checked against the base. Out
come settings with a number for each module, and tensors that are finite in the type they are computed in.

    adapter_config.json ------- foreign.py --> JSON --> fields.py --> fields --> patterns.py --> ranks and alphas by module
    adapter_model.safetensors - foreign.py --> names, types, shapes --> checked against those and the base --> values

Nothing is read before its size is known and allowed. What comes out needs no expressions and no checks any more. Errors
and warnings name files and fields, never paths. Owns: whether an adapter fits. Does not own: warnings (remarks.py), how an
adapter is written (format.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from coserve.config.settings import LINEAR_SITES, AdapterConfig, IA3Config, LoraConfig
from coserve.config.values import MAX_RANK
from coserve.core import ConfigError, InvalidRequest, NotFound
from coserve.model.architecture import Architecture
from coserve.model.decoder import MODULE_PATHS
from coserve.peft.adapter import Parameter, all_modules
from coserve.peft.fields import bottleneck_config, read_fields
from coserve.peft.foreign import FLOATS, TensorEntry, TensorFile, open_tensors, read_json_object, refuse, shown_name
from coserve.peft.kinds import adapter_layout
from coserve.peft.patterns import by_pattern
from coserve.peft.remarks import end_tokens, list_names, named_by, plain_values, read_optional, target_warnings, token_warnings
from coserve.peft.tensors import BOTTLENECK, CONFIG_FILE, ORIGIN_FILE, PREFIX, WEIGHTS_FILE, tensor_name, tensor_shape

V = TypeVar("V")

MAX_UPDATE = 1e12
"""Largest size of what a module's adapter multiplies its input by. Beyond it float32 overflows a few operators later."""


class Base(NamedTuple):
    """What an adapter must fit. dtype: what it is computed in; knows_token: whether the base's tokenizer has a token."""

    architecture: Architecture
    fingerprint: str
    dtype: torch.dtype
    knows_token: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PassedAdapter:
    """An adapter that may be used. config: ranks and alphas by module, without expressions. tensors: by their names in files.
    rank: the largest. origin: what coserve.json says. end_tokens: eos_token_id of its generation_config.json. warnings: what
    its maker should know."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    rank: int
    base_name: str | None
    origin: Mapping[str, Any]
    end_tokens: tuple[int, ...]
    warnings: tuple[str, ...]


def read_adapter(directory: Path, base: Base, *, max_rank: int = MAX_RANK) -> PassedAdapter:
    """Reads an adapter for this base. Raises NotFound, InvalidRequest (another base, shape or kind; unreadable; not finite)."""
    name = shown_name(directory.name or str(directory))
    if not directory.is_dir():
        raise NotFound(f"adapter: there is no directory {name}", param="adapter")
    try:
        raw = read_json_object(directory / CONFIG_FILE)
    except FileNotFoundError as error:
        raise NotFound(f"adapter: {name} has no {CONFIG_FILE}; give a directory in PEFT's format", param="adapter") from error
    fields = read_fields(raw)
    base_name = raw.get("base_model_name_or_path")
    base_name = shown_name(base_name) if isinstance(base_name, str) else None
    origin = read_optional(directory / ORIGIN_FILE)
    if origin.get("base_fingerprint") not in (None, base.fingerprint):
        other = "" if base_name is None else f" ({base_name})"
        raise refuse(f"{ORIGIN_FILE}: {name} was trained on another base{other}; load that model")
    try:
        with open_tensors(directory / WEIGHTS_FILE) as file:
            return _read(file, fields, base, max_rank, directory, base_name=base_name, origin=origin)
    except FileNotFoundError as error:
        pickled = any(directory.glob("*.bin"))
        hint = "; pickled weights are never opened: save it again with safetensors" if pickled else ""
        raise refuse(f"{name} has no {WEIGHTS_FILE}{hint}") from error


def _read(
    file: TensorFile, fields: Mapping[str, Any], base: Base, max_rank: int, directory: Path, *, base_name: str | None,
    origin: Mapping[str, Any],
) -> PassedAdapter:
    arch = base.architecture
    warnings: list[str] = []
    for tensor, entry in file.entries.items():
        if entry.dtype not in FLOATS:
            raise refuse(f"{file.name} stores {shown_name(tensor)} as {entry.dtype}; supported are {', '.join(FLOATS)}")
    shapes = {tensor: entry.shape for tensor, entry in file.entries.items()}
    if not shapes:
        raise refuse(f"{file.name} holds no {fields['peft_type']} tensors")
    config = _CONFIGS[fields["peft_type"]](fields, shapes, arch, warnings)
    parameters = adapter_layout(arch, config)
    rank = max((p.shape[p.rank_axis] for p in parameters if p.rank_axis is not None), default=0)
    if rank > max_rank:
        raise refuse(f"its rank {rank} is over max_lora_rank={max_rank}; raise that")
    _check_shapes(parameters, file.entries)
    tensors = {name: _read_values(file, name, base.dtype) for name in map(tensor_name, parameters)}
    _check_updates(parameters, tensors)
    warnings += target_warnings(fields, [p.module for p in parameters], arch)
    warnings += token_warnings(directory, base.knows_token)
    return PassedAdapter(
        config=config, tensors=tensors, rank=rank, base_name=base_name, origin=plain_values(origin),
        end_tokens=end_tokens(directory, arch.vocab_size), warnings=tuple(warnings),
    )


# --- settings, by kind: from fields and the tensors' names and shapes ---


def _lora_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: Architecture, warnings: list[str]
) -> LoraConfig:
    """Targets come from the tensors, so any spelling of `target_modules` is understood; ranks must be what the fields say."""
    targets, ranks = _match(shapes, arch)
    modules = list(ranks)
    try:
        stated, idle_ranks = by_pattern(fields["rank_pattern"], modules, "rank_pattern")
        alphas, idle_alphas = by_pattern(fields["alpha_pattern"], modules, "alpha_pattern")
    except ConfigError as error:
        raise refuse(f"{CONFIG_FILE}: {error}") from error
    for module, rank in ranks.items():
        expected = stated.get(module, fields["r"])
        if rank != expected:
            where = "rank_pattern" if module in stated else "r"
            raise refuse(f"{CONFIG_FILE}: {where} gives {module} rank {expected}, but its tensors have rank {rank}")
    for field, idle in (("rank_pattern", idle_ranks), ("alpha_pattern", idle_alphas)):
        if idle:
            warnings.append(f"{field}: {list_names(idle)} matches no module of the adapter")
    try:
        return LoraConfig(
            r=fields["r"], alpha=float(fields["lora_alpha"]), dropout=float(fields["lora_dropout"]), target_modules=targets,
            use_rslora=fields["use_rslora"], use_dora=fields["use_dora"],
            rank_pattern=_exceptions(ranks, modules, fields["r"]),
            alpha_pattern=_exceptions({m: float(a) for m, a in alphas.items()}, modules, float(fields["lora_alpha"])),
        )
    except ConfigError as error:
        raise refuse(f"{CONFIG_FILE}: {error}") from error


def _exceptions(values: Mapping[str, V], modules: Sequence[str], default: V) -> dict[str, V]:
    """What differs from the default: by a site's name where all of its modules agree, else by modules' full names."""
    found: dict[str, V] = {}
    for site in LINEAR_SITES:
        own = {module: values.get(module, default) for module in modules if module.endswith(f".{site}")}
        kinds = set(own.values())
        if len(kinds) == 1 and kinds != {default}:
            found[site] = kinds.pop()
        elif len(kinds) > 1:
            found |= {module: value for module, value in own.items() if value != default}
    return found


def _match(shapes: Mapping[str, tuple[int, ...]], arch: Architecture) -> tuple[tuple[str, ...], dict[str, int]]:
    """Checks every LoRA tensor against the base. Returns the targets (full names if some layers lack one) and {module: rank},
    in layer order."""
    full = adapter_layout(arch, LoraConfig(r=1))
    known = {tensor_name(p): p for p in full}
    lengths = {f"{PREFIX}{p.module}" for p in full}
    ranks: dict[str, int] = {}
    sites: dict[str, str] = {}
    for name, shape in shapes.items():
        if name.removesuffix(".lora_magnitude_vector") in lengths:
            continue
        if name not in known:
            raise _unknown(name, arch)
        p = known[name]
        is_a = p.part == "lora_A"
        rank = (shape or (0,))[0 if is_a else -1]
        wanted: list[Any] = ["rank", p.shape[1]] if is_a else [p.shape[0], "rank"]
        if rank < 1 or shape != tuple(rank if size == "rank" else size for size in wanted):
            expected = ", ".join(map(str, wanted))
            raise refuse(f"it does not fit this base: {name} has shape {list(shape)}, expected [{expected}]")
        other = f"{PREFIX}{p.module}.lora_{'B' if is_a else 'A'}.weight"
        if other not in shapes:
            raise refuse(f"{WEIGHTS_FILE} has {name}, but not {other}: one factor without the other")
        if (shapes[other] or (0,))[-1 if is_a else 0] != rank:
            raise refuse(f"{name} has rank {rank}, but {other} has shape {list(shapes[other])}: both must have one rank")
        sites[p.module], ranks[p.module] = p.site, rank
    if not ranks:
        raise refuse(f"{WEIGHTS_FILE} holds no LoRA tensors")
    ranks = {module: ranks[module] for module in all_modules(arch.num_layers).values() if module in ranks}
    kinds = dict.fromkeys(sites[module] for module in ranks)
    return tuple(kinds) if len(ranks) == len(kinds) * arch.num_layers else tuple(ranks), ranks


def _ia3_config(
    fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: Architecture, warnings: list[str]
) -> IA3Config:
    """Which modules are scaled, and where, by the tensors: a row [1, in] scales the input."""
    known = {f"{PREFIX}{module}.ia3_l": (module, site) for (_, site), module in all_modules(arch.num_layers).items()}
    found: dict[str, tuple[str, bool]] = {}
    for name, shape in shapes.items():
        if name not in known:
            raise _unknown(name, arch)
        module, site = known[name]
        found[module] = site, shape[:1] == (1,)
    stated = named_by(fields["feedforward_modules"], list(found), "feedforward_modules")
    for module, (_, scales_input) in found.items():
        if stated is not None and scales_input != (module in stated):
            what = "input" if scales_input else "output"
            raise refuse(f"{CONFIG_FILE}: feedforward_modules does not fit the tensors, where {module} scales its {what}")
    kinds = set(found.values())
    if len(dict(kinds)) == len(kinds) and len(found) == len(kinds) * arch.num_layers:
        names = sorted(kinds, key=lambda kind: LINEAR_SITES.index(kind[0]))
    else:
        names = [(module, scales_input) for module, (_, scales_input) in found.items()]
    return IA3Config(
        target_modules=tuple(name for name, _ in names), feedforward_modules=tuple(name for name, row in names if row)
    )


_CONFIGS: Mapping[str, Callable[..., AdapterConfig]] = {
    "LORA": _lora_config, "IA3": _ia3_config, BOTTLENECK: lambda fields, *_: bottleneck_config(fields)
}


def _unknown(name: str, arch: Architecture) -> InvalidRequest:
    return refuse(
        f"it has a tensor {shown_name(name)}, which this base has no place for; known modules: {', '.join(MODULE_PATHS)} of "
        f"{arch.num_layers} layers"
    )


# --- tensors ---


def _check_shapes(parameters: Iterable[Parameter], entries: Mapping[str, TensorEntry]) -> None:
    expected = {tensor_name(p): tensor_shape(p) for p in parameters}
    for name in (*entries, *expected):
        given = entries[name].shape if name in entries else None
        if given != expected.get(name):
            has = "no such tensor" if given is None else f"shape {list(given)}"
            wanted = "none" if name not in expected else list(expected[name])
            raise refuse(f"it does not fit this base and its own settings: {shown_name(name)}: {has}, expected {wanted}")


def _read_values(file: TensorFile, name: str, dtype: torch.dtype) -> Tensor:
    value = file.read(name)
    if not torch.isfinite(value.to(dtype)).all():
        kind = str(dtype).removeprefix("torch.")
        what = "NaN or infinite values" if not torch.isfinite(value).all() else f"values that {kind} can't hold"
        raise refuse(f"{file.name}: {name} has {what}")
    return value


def _check_updates(parameters: Sequence[Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Refuses values that are finite, and whose products are not."""
    sizes: dict[str, float] = {}
    for p in parameters:
        value = tensors[tensor_name(p)]
        size = float(torch.linalg.vector_norm(value, dtype=torch.float64)) * (1.0 if p.scale is None else p.scale)
        group = p.module if p.rank_axis is not None else f"{p.module}.{p.part}"  # factors multiply, scalings stand alone
        sizes[group] = sizes.get(group, 1.0) * size
    for group, size in sizes.items():
        if not (math.isfinite(size) and size <= MAX_UPDATE):
            raise refuse(
                f"{WEIGHTS_FILE}: the update of {group}, its scale from lora_alpha included, is of size {size:.3g}, over "
                f"{MAX_UPDATE:g}: what it gives can't be finite"
            )
