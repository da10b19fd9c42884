"""What a create body asks for, as a FinetuneConfig: fields that belong together are checked, and 'auto' becomes numbers once
the data is known.

Owns: what OpenAI's words are in FinetuneConfig's, limits of a job. Does not own: types of single fields (body.py), what 'auto'
means (finetune/defaults.py), whether files and models exist (service.py).
"""

from __future__ import annotations

import difflib
import importlib.util
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.config.data import KNOBS, adapter_of_kind, size_field
from coserve.config.settings import (
    LINEAR_SITES,
    PAIRED,
    AdapterConfig,
    FinetuneConfig,
    Objective,
    OptimizerConfig,
)
from coserve.config.values import AUTO, settled, shown
from coserve.core import ConfigError, InvalidRequest
from coserve.finetune.batches import BatchOrder
from coserve.finetune.defaults import adapter_size, auto_learning_rate, given_settings, resolve_settings, unused_settings
from coserve.server.jobs.body import SETTINGS, CreateJob, Hyperparameters, PreferenceHyperparameters
from coserve.server.settings import ServerConfig

MAX_EPOCHS = 1000
MAX_STEPS = 2**31 - 1
_ADAPTER = {name: knob.name for name, knob in SETTINGS.items() if knob.of_adapter}
"""Fields of all kinds of adapter, and their settings' names."""
_METHODS: Mapping[str, tuple[Objective, type[Hyperparameters]]] = {
    "supervised": ("sft", Hyperparameters), "dpo": ("dpo", PreferenceHyperparameters),
}
"""Types of OpenAI's method -> the objective, and the numbers that the method has."""
_WORDS = {"epochs": "n_epochs", "dpo_beta": "beta"}
"""Settings that are OpenAI's hyperparameters, and what they are called there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A checked body. method: OpenAI's object, with 'auto' where a number isn't known yet. settings: the given fields beyond
    OpenAI's. config: what both mean."""

    method: dict[str, Any]
    settings: dict[str, Any]
    integrations: tuple[dict[str, Any], ...]
    config: FinetuneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A job whose data is known. method: OpenAI's object in numbers. num_steps: optimizer steps of the whole job."""

    config: FinetuneConfig
    method: dict[str, Any]
    num_steps: int


def read_spec(
    body: CreateJob, server: ServerConfig, max_model_len: int, continued: AdapterConfig | None = None,
    hidden_size: int | None = None,
) -> JobSpec:
    """What a body asks for; 'auto' stays where it depends on the data. learning_rate_multiplier multiplies the automatic rate.

    continued: settings of the adapter that the job continues, which are then the job's. hidden_size: the model's. Raises
    InvalidRequest that names the field.
    """
    method = _method(body)
    settings = {name: value for name in ("adapter", *SETTINGS, "members") if (value := getattr(body, name)) is not None}
    _check_targets(settings)
    _check_members(settings, server)
    numbers = method[method["type"]]["hyperparameters"]
    if "learning_rate" in settings and numbers["learning_rate_multiplier"] != AUTO:
        raise InvalidRequest("learning_rate: give it or learning_rate_multiplier, not both", param="learning_rate")
    seed = secrets.randbelow(2**31) if body.seed is None else body.seed
    integrations = tuple(item.model_dump(exclude_none=True) for item in body.integrations or ())
    for item in integrations:
        _check_integration(item)
    given = {name: value for name, value in numbers.items() if value != AUTO}
    if given.get("n_epochs", 0) > MAX_EPOCHS:
        raise InvalidRequest(f"n_epochs: must be at most {MAX_EPOCHS}, got {given['n_epochs']}", param="n_epochs")
    objective = _METHODS[method["type"]][0]
    try:
        adapter = _adapter(settings, continued)
        base_rate = auto_learning_rate(objective, continued or adapter, hidden_size)
        rate = {"learning_rate": base_rate * given["learning_rate_multiplier"]} if "learning_rate_multiplier" in given else {}
        config = FinetuneConfig(**_of_section(settings, "") | {
            "optimizer": OptimizerConfig(**rate | _of_section(settings, "optimizer")), "objective": objective, "seed": seed,
            "epochs": given.get("n_epochs", AUTO), "batch_size": given.get("batch_size", AUTO),
            "dpo_beta": given.get("beta", FinetuneConfig().dpo_beta),
            "deterministic": server.deterministic or settings.get("deterministic", False),
            "max_length": _max_length(objective, settings, max_model_len),
        })
    except ConfigError as error:
        raise _in_api_words(error) from error
    if config.keep_checkpoints > server.max_keep_checkpoints:
        raise InvalidRequest(
            f"keep_checkpoints: {config.keep_checkpoints} is over this server's --max-keep-checkpoints "
            f"{server.max_keep_checkpoints}", param="keep_checkpoints",
        )
    rank = adapter_size(continued or adapter)
    if rank > server.max_lora_rank:
        word = KNOBS[size_field(continued or adapter) or "r"].word
        raise InvalidRequest(f"{word}: {rank} is over this server's --max-lora-rank {server.max_lora_rank}", param=word)
    config = config if continued is not None else config.with_adapter(adapter)
    return JobSpec(method=method, settings=settings, integrations=integrations, config=config)


def resolve(
    config: FinetuneConfig, num_examples: int, *, continued: AdapterConfig | None = None, hidden_size: int | None = None
) -> Resolved:
    """A spec's settings as numbers, which are chosen as for every job (finetune/defaults.py). continued, hidden_size: as for
    `read_spec`. Raises InvalidRequest for a job of too many steps."""
    config = resolve_settings(config, num_examples, continued=continued, hidden_size=hidden_size)
    order = BatchOrder(num_groups=num_examples, batch_size=settled(config.batch_size), seed=config.seed, shuffle=True)
    num_steps = order.num_steps(config)
    if num_steps > MAX_STEPS:
        raise InvalidRequest(f"n_epochs: {num_steps} steps are too many; train on fewer epochs", param="n_epochs")
    base_rate = auto_learning_rate(config.objective, continued or config.adapter, hidden_size)
    numbers: dict[str, Any] = {
        "n_epochs": config.epochs, "batch_size": config.batch_size,
        "learning_rate_multiplier": settled(config.optimizer.learning_rate) / base_rate,
    }
    if config.objective == "dpo":
        numbers["beta"] = config.dpo_beta
    kind = next(kind for kind, (objective, _) in _METHODS.items() if objective == config.objective)
    return Resolved(config=config, method={"type": kind, kind: {"hyperparameters": numbers}}, num_steps=num_steps)


def _of_section(settings: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Those of a body's settings that belong to a section (see `Knob`), by their fields' names."""
    known = {name: knob.name for name, knob in SETTINGS.items() if section in knob.sections}
    return {known[name]: value for name, value in settings.items() if name in known}


def _adapter(settings: Mapping[str, Any], continued: AdapterConfig | None) -> AdapterConfig:
    """Settings of a new adapter. For a job that continues an adapter they are only checked, as far as its kind has them."""
    given = {name: settings[name] for name in _ADAPTER if name in settings}
    if continued is None:
        return adapter_of_kind(settings.get("adapter", "lora"), given, _ADAPTER)
    own = given_settings(continued)
    return adapter_of_kind(own["kind"], {name: value for name, value in given.items() if _ADAPTER[name] in own}, _ADAPTER)


def unused(settings: Mapping[str, Any], continued: AdapterConfig) -> list[str]:
    """Settings of adapters that a body asks for in vain, since the continued adapter has others, as texts."""
    given = {_ADAPTER[name]: settings[name] for name in _ADAPTER if name in settings}
    return unused_settings(given | ({"kind": settings["adapter"]} if "adapter" in settings else {}), continued)


def _max_length(objective: str, settings: Mapping[str, Any], max_model_len: int) -> int:
    """Longest example in tokens. The engine has the same rule, so what is accepted here is accepted there."""
    room = settings.get("max_microbatch_tokens", FinetuneConfig().max_microbatch_tokens)
    limit = min(room // 2 if objective in PAIRED else room, max_model_len)
    asked = settings.get("max_length", limit)
    if asked > limit:
        raise InvalidRequest(
            f"max_length: {asked} is more than {limit}, which a micro-batch of max_microbatch_tokens={room} and the model's "
            f"{max_model_len} tokens can hold", param="max_length",
        )
    return int(asked)


def _in_api_words(error: ConfigError) -> InvalidRequest:
    name = error.param or "body"
    param = KNOBS[name].word if name in KNOBS else name
    param = _WORDS.get(param, param)
    return InvalidRequest(f"{param}: {str(error).removeprefix(f'{name}: ')}", param=param)


def _method(body: CreateJob) -> dict[str, Any]:
    """{type, TYPE: {hyperparameters}}. The deprecated hyperparameters are used if the method has none."""
    kind = "supervised" if body.method is None else body.method.type
    known = " or ".join(_METHODS)
    if kind == "reinforcement":
        raise InvalidRequest(f"method.type: reinforcement is not supported; use {known}", param="method.type")
    if kind not in _METHODS:
        raise InvalidRequest(f"method.type: must be {known}, got {kind[:64]!r}", param="method.type")
    asked: Hyperparameters | None = None
    if body.method is not None:
        for other in {*_METHODS, "reinforcement"} - {kind}:
            if getattr(body.method, other) is not None:
                raise InvalidRequest(f"method.{other}: the method's type is {kind}; leave it out", param=f"method.{other}")
        part = getattr(body.method, kind)
        asked = part.hyperparameters if part is not None else None
    if asked is not None and body.hyperparameters not in (None, Hyperparameters()):
        raise InvalidRequest("hyperparameters: give them in method only", param="hyperparameters")
    asked = asked or body.hyperparameters or Hyperparameters()
    _, form = _METHODS[kind]
    return {"type": kind, kind: {"hyperparameters": {name: getattr(asked, name, AUTO) for name in form.model_fields}}}


def _check_targets(settings: Mapping[str, Any]) -> None:
    for field in ("target_modules", "feedforward_modules"):
        targets = settings.get(field, ())
        for target in targets if isinstance(targets, list) else ():
            name = target.rpartition(".")[2]
            if name not in LINEAR_SITES:
                near = difflib.get_close_matches(name, LINEAR_SITES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InvalidRequest(
                    f"{field}: no module is called {shown(target)}, and expressions are not taken in a list; known: "
                    f"{', '.join(LINEAR_SITES)}{hint}", param=field,
                )


def num_members(settings: Mapping[str, Any]) -> int:
    """How many replicas may share a job, by its settings (JobSpec, JobRecord)."""
    return int(settings.get("members", 1))


def _check_members(settings: Mapping[str, Any], server: ServerConfig) -> None:
    if num_members(settings) == 1:
        return
    if server.replicas is None:
        raise InvalidRequest(
            "members: this server is one replica, so that no others can share a job; leave members out, or start the server "
            "with --replicas", param="members",
        )
    if server.tensor_parallel_size > 1:
        raise InvalidRequest(
            "members: replicas whose model is shared by several processes can't share a job; leave members out", param="members"
        )
    if server.deterministic or settings.get("deterministic", False):
        raise InvalidRequest(
            "members: a deterministic job runs on one replica; leave out members, or deterministic", param="members"
        )


def _check_integration(item: Mapping[str, Any]) -> None:
    kind = item["type"]
    if kind == "wandb" and "wandb" not in item:
        raise InvalidRequest("integrations: an integration of type wandb needs wandb.project", param="integrations")
    if kind != "wandb" and "wandb" in item:
        raise InvalidRequest(f"integrations: wandb does not belong to type {kind}", param="integrations")
    if importlib.util.find_spec(kind) is None:
        raise InvalidRequest(
            f"integrations: {kind} needs a package that this server lacks: pip install {kind}", param="integrations"
        )
