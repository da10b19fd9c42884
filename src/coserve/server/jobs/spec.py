"""What a create body asks for: fields that belong together are checked, 'auto' becomes numbers, a FinetuneConfig comes out.

Owns: OpenAI's words against FinetuneConfig's, the rules of 'auto', limits of a job. Does not own: single fields' types
(body.py), whether files and models exist (service.py).
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coserve.config import LINEAR_SITES, AdapterConfig, BottleneckConfig, FinetuneConfig, LoraConfig, Objective, OptimizerConfig
from coserve.configdata import adapter_of_kind
from coserve.core import ConfigError, InvalidRequest
from coserve.finetune.batches import BatchOrder
from coserve.server.jobs.body import AUTO, CreateJob, Extras, Hyperparameters, PreferenceHyperparameters
from coserve.server.settings import ServerConfig

MAX_EPOCHS = 1000
MAX_STEPS = 2**31 - 1
CHECKPOINT_STEPS = 25
"""A checkpoint at least so often, if nothing is said."""
_SEEDS = 2**31
_SAME = ("alpha", "dropout", "target_modules", "feedforward_modules", "size", "placement", "activation")
_ADAPTER = {"rank": "r", **{name: name for name in _SAME}}
"""Fields of all kinds of adapter, and their settings' names."""
_OPTIMIZER = ("learning_rate", "schedule", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm")
_JOB = (
    "system_prompt", "allow_control_tokens", "template_date",
    "too_long", "max_microbatch_tokens", "activation_memory", "activation_compression", "checkpoint_steps",
    "keep_checkpoints", "validation_steps", "max_steps",
)
_QUEUE = ("priority", "weight", "deadline")
_WORDS = {"r": "rank", "epochs": "n_epochs", "dpo_beta": "beta"}
"""FinetuneConfig's words in the API's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """A checked body. method: OpenAI's object, with 'auto' where a number isn't known yet; settings: the extra fields given."""

    method: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    integrations: tuple[dict[str, Any], ...]
    config: FinetuneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """A job whose data is known. num_steps: optimizer steps of the whole job."""

    config: FinetuneConfig
    method: dict[str, Any]
    num_steps: int


def read_spec(body: CreateJob, server: ServerConfig, max_model_len: int) -> JobSpec:
    """Raises InvalidRequest that names the field."""
    method = _method(body)
    settings = {
        name: value for name in Extras.model_fields if name not in _QUEUE and (value := getattr(body, name)) is not None
    }
    _check_targets(settings)
    if "learning_rate" in settings and method[method["type"]]["hyperparameters"]["learning_rate_multiplier"] != AUTO:
        raise InvalidRequest("learning_rate: give it or learning_rate_multiplier, not both", param="learning_rate")
    seed = secrets.randbelow(_SEEDS) if body.seed is None else body.seed
    integrations = tuple(item.model_dump(exclude_none=True) for item in body.integrations or ())
    for item in integrations:
        _check_integration(item)
    resolved = resolve(method, settings, seed=seed, num_examples=None, server=server, max_model_len=max_model_len)
    return JobSpec(method=method, settings=settings, seed=seed, integrations=integrations, config=resolved.config)


def resolve(
    method: Mapping[str, Any], settings: Mapping[str, Any], *, seed: int, num_examples: int | None, server: ServerConfig,
    max_model_len: int,
) -> Resolved:
    """The numbers behind 'auto'. num_examples: None before the data is read; the numbers are then provisional.

    n_epochs: 3; up to 25 where there are fewer than 34 examples, so that about 100 are seen; fewer where 3 passes would be
    more than 25,000 examples. batch_size: examples / 16, from 1 to 16. beta: 0.1. The learning rate is 2e-4 (for DPO
    4e-4 / rank, from 5e-6 to 5e-5; a bottleneck's size counts as its rank, ia3's rank as 1) times learning_rate_multiplier,
    whose auto is 1. checkpoint_steps: once per epoch, at least every 25 steps. max_length: what a micro-batch and the model
    can hold.

    Raises InvalidRequest that names the field.
    """
    kind = method["type"]
    objective: Objective = "dpo" if kind == "dpo" else "sft"
    numbers = _numbers(kind, method[kind]["hyperparameters"], num_examples or 1)
    order = BatchOrder(num_groups=num_examples or 1, batch_size=numbers["batch_size"], seed=seed, shuffle=True)
    try:
        adapter_settings = {name: settings[name] for name in _ADAPTER if name in settings}
        adapter = adapter_of_kind(settings.get("adapter", "lora"), adapter_settings, _ADAPTER)
        size_field, rank = _rank(adapter)
        base_rate = 2e-4 if objective == "sft" else min(5e-5, max(5e-6, 4e-4 / rank))
        rate = {"learning_rate": base_rate * numbers["learning_rate_multiplier"]}
        optimizer = OptimizerConfig(**(rate | {name: settings[name] for name in _OPTIMIZER if name in settings}))
        rest: dict[str, Any] = {"checkpoint_steps": min(order.steps_per_epoch, CHECKPOINT_STEPS)}
        config = FinetuneConfig(
            optimizer=optimizer, objective=objective, epochs=numbers["n_epochs"], batch_size=numbers["batch_size"],
            dpo_beta=numbers.get("beta", FinetuneConfig().dpo_beta), seed=seed,
            deterministic=server.deterministic or settings.get("deterministic", False),
            max_length=_max_length(objective, settings, max_model_len),
            **rest | {name: settings[name] for name in _JOB if name in settings},
        ).with_adapter(adapter)
    except ConfigError as error:
        raise _in_api_words(error) from error
    if rank > server.max_lora_rank:
        raise InvalidRequest(
            f"{size_field}: {rank} is over this server's --max-lora-rank {server.max_lora_rank}", param=size_field
        )
    numbers["learning_rate_multiplier"] = optimizer.learning_rate / base_rate
    num_steps = order.num_steps(config)
    if num_steps > MAX_STEPS:
        raise InvalidRequest(f"n_epochs: {num_steps} steps are too many; train on fewer epochs", param="n_epochs")
    return Resolved(config=config, method={"type": kind, kind: {"hyperparameters": numbers}}, num_steps=num_steps)


def _rank(adapter: AdapterConfig) -> tuple[str, int]:
    """What --max-lora-rank limits: the field and its number; 1 where there is none."""
    if isinstance(adapter, BottleneckConfig):
        return "size", adapter.size
    return "rank", adapter.r if isinstance(adapter, LoraConfig) else 1


def _numbers(kind: str, given: Mapping[str, Any], examples: int) -> dict[str, Any]:
    """Hyperparameters, with what was given over what 'auto' means."""
    numbers: dict[str, Any] = {
        "n_epochs": _auto_epochs(examples), "batch_size": min(16, max(1, examples // 16)), "learning_rate_multiplier": 1.0,
    }
    if kind == "dpo":
        numbers["beta"] = FinetuneConfig().dpo_beta
    numbers |= {name: value for name, value in given.items() if value != AUTO}
    if numbers["n_epochs"] > MAX_EPOCHS:
        raise InvalidRequest(f"n_epochs: must be at most {MAX_EPOCHS}, got {numbers['n_epochs']}", param="n_epochs")
    return numbers


def _auto_epochs(examples: int) -> int:
    if 3 * examples < 100:
        return min(25, math.ceil(100 / examples))
    return 3 if 3 * examples <= 25_000 else max(1, 25_000 // examples)


def _max_length(objective: str, settings: Mapping[str, Any], max_model_len: int) -> int:
    """In tokens; the engine's rule, so that what passes here passes there."""
    room = settings.get("max_microbatch_tokens", FinetuneConfig().max_microbatch_tokens)
    limit = min(room // 2 if objective == "dpo" else room, max_model_len)
    asked = settings.get("max_length", limit)
    if asked > limit:
        raise InvalidRequest(
            f"max_length: {asked} is more than {limit}, which a micro-batch of max_microbatch_tokens={room} and the model's "
            f"{max_model_len} tokens can hold", param="max_length",
        )
    return int(asked)


def _in_api_words(error: ConfigError) -> InvalidRequest:
    name = error.param or "body"
    param = _WORDS.get(name, name)
    return InvalidRequest(f"{param}: {str(error).removeprefix(f'{name}: ')}", param=param)


def _method(body: CreateJob) -> dict[str, Any]:
    """{type, TYPE: {hyperparameters}}; the deprecated hyperparameters count where the method has none."""
    kind = "supervised" if body.method is None else body.method.type
    if kind == "reinforcement":
        raise InvalidRequest("method.type: reinforcement is not supported; use supervised or dpo", param="method.type")
    if kind not in ("supervised", "dpo"):
        raise InvalidRequest(f"method.type: must be supervised or dpo, got {kind[:64]!r}", param="method.type")
    told: Hyperparameters | None = None
    if body.method is not None:
        for other in {"supervised", "dpo", "reinforcement"} - {kind}:
            if getattr(body.method, other) is not None:
                raise InvalidRequest(f"method.{other}: the method's type is {kind}; leave it out", param=f"method.{other}")
        part = getattr(body.method, kind)
        told = part.hyperparameters if part is not None else None
    if told is not None and body.hyperparameters is not None:
        raise InvalidRequest("hyperparameters: give them in method only", param="hyperparameters")
    told = told or body.hyperparameters or Hyperparameters()
    form = PreferenceHyperparameters if kind == "dpo" else Hyperparameters
    return {"type": kind, kind: {"hyperparameters": {name: getattr(told, name, AUTO) for name in form.model_fields}}}


def _check_targets(settings: Mapping[str, Any]) -> None:
    for field in ("target_modules", "feedforward_modules"):
        targets = settings.get(field, ())
        for target in targets if isinstance(targets, list) else ():
            name = target.rpartition(".")[2]
            if name not in LINEAR_SITES:
                near = difflib.get_close_matches(name, LINEAR_SITES, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InvalidRequest(
                    f"{field}: there is no {name[:64]!r}; known: {', '.join(LINEAR_SITES)}{hint}", param=field
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
