"""The body that creates a finetuning job, as pydantic models: OpenAI's fields, and a field for every setting of `KNOBS` that is
in the API.

Owns: types and ranges of single fields. Does not own: what fields mean together (spec.py), which settings there are
(config/settings.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_origin

from pydantic import BeforeValidator, Field, PlainValidator, create_model
from pydantic_core import PydanticCustomError

from coserve.config.data import KNOBS, Knob
from coserve.config.settings import AdapterKind, Targets
from coserve.config.values import AUTO, Auto, Memory, is_number
from coserve.server.bodies.forms import Body, Form
from coserve.server.bodies.pairs import Pairs, short_text
from coserve.server.jobs.hints import FieldHints

_LIMIT = 2**31 - 1
_MAX_TARGETS = 1000


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


def _targets(value: Any) -> list[str] | str:
    if value == "all-linear" or (isinstance(value, list) and 0 < len(value) <= _MAX_TARGETS):
        return value if isinstance(value, str) else [short_text(item) for item in value]
    raise PydanticCustomError("targets", "must be a list of module names, or 'all-linear'")


def _memory(value: Any) -> int | float | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        return short_text(value)
    raise PydanticCustomError("memory", "must be a number or a string: bytes, a share below 1, or 'auto'")


_Choice = int | float | Literal["auto"]
Number = Annotated[Any, PlainValidator(_number_or_auto, json_schema_input_type=_Choice)]
Whole = Annotated[Any, PlainValidator(_whole_or_auto, json_schema_input_type=int | Literal["auto"])]
Text = Annotated[str, PlainValidator(short_text, json_schema_input_type=str)]
TargetNames = Annotated[Any, PlainValidator(_targets, json_schema_input_type=list[str] | Literal["all-linear"])]
MemoryLimit = Annotated[Any, PlainValidator(_memory, json_schema_input_type=float | str)]
Count = Annotated[int, Field(ge=0, le=_LIMIT)]
Size = Annotated[int, Field(ge=1, le=_LIMIT)]
Rate = Annotated[float, Field(ge=0, le=1e9)]


def _auto_is_absent(value: Any) -> Any:
    return None if value == AUTO else value


RateOrAuto = Annotated[Rate | None, BeforeValidator(_auto_is_absent, json_schema_input_type=Rate | Auto | None)]
CountOrAuto = Annotated[Count | None, BeforeValidator(_auto_is_absent, json_schema_input_type=Count | Auto | None)]


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


_TYPES: Mapping[Any, Any] = {
    bool: bool, str: Text, int: Count, float: Rate, int | Auto: CountOrAuto, float | Auto: RateOrAuto, Memory: MemoryLimit,
    Targets: TargetNames, tuple[str, ...]: Annotated[list[Text], Field(max_length=_MAX_TARGETS)],
}
"""Type of a setting -> type of its field in a body. A choice of a few words keeps its type."""
_OTHER_TYPES: Mapping[str, Any] = {"rank": Size, "size": Size, **dict.fromkeys(("schedule", "too_long", "system_prompt"), Text)}
"""Types of fields that don't follow from `_TYPES`. The words of a Text are checked in config/settings.py only."""
SETTINGS: Mapping[str, Knob] = {knob.word: knob for knob in KNOBS.values() if knob.metadata.get("api")}
"""Settings of a job that a body has as fields beyond OpenAI's (extra_body of its client), by the fields' names."""


def _field(knob: Knob) -> Any:
    chosen = _OTHER_TYPES.get(knob.word) or (knob.type if get_origin(knob.type) is Literal else _TYPES[knob.type])
    return chosen | None, None


_Settings: Any = create_model("_Settings", __base__=Body, **{name: _field(knob) for name, knob in SETTINGS.items()})


class CreateJob(_Settings):
    """POST /v1/fine_tuning/jobs."""

    adapter: AdapterKind | None = None
    """Its kind, which has some of the adapters' settings."""
    priority: Annotated[int, Field(ge=-_LIMIT, le=_LIMIT)] | None = None
    """A lower number runs earlier."""
    weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Share of the time of running jobs."""
    members: Annotated[int, Field(ge=1, le=4)] | None = None
    """Replicas that may share the job's steps, where there are several."""
    deadline: Annotated[int, Field(ge=0, le=2**40)] | None = None
    """In Unix seconds. Of jobs with equal priority the one with the earliest deadline runs first."""
    model: Text
    training_file: Text
    validation_file: Text | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """Deprecated by OpenAI, which has them in `method`."""
    seed: Count | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    metadata: Pairs | None = None
    integrations: list[Integration] | None = Field(default=None, max_length=5)


CREATE_FORM = Form(model=CreateJob, wording=FieldHints(CreateJob, deprecated=("hyperparameters",)).wording)
