"""The body that creates a finetuning job, as pydantic models: OpenAI's fields and ours, types and ranges of single fields.

Owns: which fields there are, what is said about one that isn't known. Does not own: what fields mean together (spec.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from coserve.config.settings import Activation, AdapterKind, Compression, Placement
from coserve.config.values import AUTO, is_number
from coserve.server.bodies.forms import Body, Form
from coserve.server.jobs.hints import FieldHints

_LIMIT = 2**31 - 1
_MAX_TARGETS = 1000
_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512


def _number_or_auto(value: Any) -> int | float | str:
    if value is None or value == AUTO:
        return AUTO
    if is_number(value) and 0 < value <= _LIMIT:
        return value
    raise PydanticCustomError("number", "must be a positive number or 'auto'")


def _whole_or_auto(value: Any) -> int | float | str:
    number = _number_or_auto(value)
    if isinstance(number, float):
        raise PydanticCustomError("number", "must be a whole number or 'auto'")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string")
    if len(value) > _MAX_VALUE:
        raise PydanticCustomError("text", f"must have at most {_MAX_VALUE} characters")
    return value


def _pairs(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_METADATA:
        raise PydanticCustomError("pairs", f"must be an object of at most {_MAX_METADATA} pairs")
    for key in value:
        if not isinstance(key, str) or len(_text(key)) > _MAX_KEY:
            raise PydanticCustomError("pairs", f"keys must be strings of at most {_MAX_KEY} characters")
    return {key: _text(item) for key, item in value.items()}


def _targets(value: Any) -> list[str] | str:
    if value == "all-linear" or (isinstance(value, list) and 0 < len(value) <= _MAX_TARGETS):
        return value if isinstance(value, str) else [_text(item) for item in value]
    raise PydanticCustomError("targets", "must be a list of module names, or 'all-linear'")


def _memory(value: Any) -> int | float | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    raise PydanticCustomError("memory", "must be a number or a string: bytes, a share below 1, or 'auto'")


_Choice = int | float | Literal["auto"]
Number = Annotated[Any, PlainValidator(_number_or_auto, json_schema_input_type=_Choice)]
Whole = Annotated[Any, PlainValidator(_whole_or_auto, json_schema_input_type=int | Literal["auto"])]
Text = Annotated[str, PlainValidator(_text, json_schema_input_type=str)]
Pairs = Annotated[dict[str, str], PlainValidator(_pairs, json_schema_input_type=dict[str, str])]
Targets = Annotated[Any, PlainValidator(_targets, json_schema_input_type=list[str] | Literal["all-linear"])]
MemoryLimit = Annotated[Any, PlainValidator(_memory, json_schema_input_type=float | str)]
Count = Annotated[int, Field(ge=0, le=_LIMIT)]
Size = Annotated[int, Field(ge=1, le=_LIMIT)]
Rate = Annotated[float, Field(ge=0, le=1e9)]


def _auto_is_absent(value: Any) -> Any:
    return None if value == AUTO else value


RateOrAuto = Annotated[Rate | None, BeforeValidator(_auto_is_absent, json_schema_input_type=Rate | Literal["auto"] | None)]
CountOrAuto = Annotated[Count | None, BeforeValidator(_auto_is_absent, json_schema_input_type=Count | Literal["auto"] | None)]


class Hyperparameters(Body):
    """A number, or auto, whose rules are in docs/finetuning.md."""

    n_epochs: Number = AUTO
    batch_size: Whole = AUTO
    learning_rate_multiplier: Number = AUTO


class PreferenceHyperparameters(Hyperparameters):
    """beta: DPO's inverse temperature."""

    beta: Number = AUTO


class Supervised(Body):
    """What is told about supervised finetuning."""

    hyperparameters: Hyperparameters | None = None


class Preference(Body):
    """What is told about DPO."""

    hyperparameters: PreferenceHyperparameters | None = None


class Method(Body):
    """OpenAI's choice of a method. reinforcement isn't supported."""

    type: Text
    supervised: Supervised | None = None
    dpo: Preference | None = None
    reinforcement: dict[str, Any] | None = None


class Wandb(Body):
    """A run of Weights & Biases, written offline."""

    project: Text
    name: Text | None = None
    entity: Text | None = None
    tags: list[Text] | None = Field(default=None, max_length=50)


class Integration(Body):
    """Where metrics go too."""

    type: Literal["wandb", "tensorboard"]
    wandb: Wandb | None = None


class Extras(Body):
    """Fields beyond OpenAI's (extra_body of its client); what each does is said at FinetuneConfig's fields. adapter: a kind,
    which has some of the fields from rank to activation. priority: lower runs earlier; weight: share among running jobs;
    deadline: Unix seconds, earlier ones run first among equal priority."""

    adapter: AdapterKind | None = None
    rank: Size | None = None
    alpha: Rate | None = None
    dropout: Rate | None = None
    target_modules: Targets | None = None
    feedforward_modules: list[Text] | None = Field(default=None, max_length=_MAX_TARGETS)
    size: Size | None = None
    placement: Placement | None = None
    activation: Activation | None = None
    learning_rate: RateOrAuto = None
    schedule: Text | None = None
    warmup_steps: Count | None = None
    warmup_ratio: Rate | None = None
    weight_decay: Rate | None = None
    max_grad_norm: Rate | None = None
    max_length: Count | None = None
    too_long: Text | None = None
    system_prompt: Text | None = None
    allow_control_tokens: bool | None = None
    template_date: Text | None = None
    max_microbatch_tokens: Count | None = None
    activation_memory: MemoryLimit | None = None
    activation_compression: Compression | None = None
    checkpoint_steps: CountOrAuto = None
    keep_checkpoints: Count | None = None
    validation_steps: Count | None = None
    max_steps: Count | None = None
    deterministic: bool | None = None
    priority: Annotated[int, Field(ge=-_LIMIT, le=_LIMIT)] | None = None
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    deadline: Annotated[int, Field(ge=0, le=2**40)] | None = None


class CreateJob(Extras):
    """POST /v1/fine_tuning/jobs."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI: those of the method."""
    seed: Count | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    metadata: Pairs | None = None
    integrations: list[Integration] | None = Field(default=None, max_length=5)


CREATE_FORM = Form(model=CreateJob, wording=FieldHints(CreateJob, deprecated=("hyperparameters",)).wording)
