"""Hints about a field of a body that isn't known at its place: where the field belongs, or which field is likely meant."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from coserve.server.bodies.forms import path_name

_NEAR = 0.8
"""The least likeness (difflib's ratio) of two names for one to count as a misspelling of the other."""
_OTHER_WORDS = {
    "epochs": "n_epochs", "num_epochs": "n_epochs", "num_train_epochs": "n_epochs", "lr": "learning_rate",
    "per_device_train_batch_size": "batch_size", "train_batch_size": "batch_size", "r": "rank", "lora_r": "rank",
    "lora_rank": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "dpo_beta": "beta", "max_seq_length": "max_length",
    "max_seq_len": "max_length", "lr_scheduler_type": "schedule", "save_steps": "checkpoint_steps",
    "eval_steps": "validation_steps", "save_total_limit": "keep_checkpoints", "kind": "adapter", "adapter_type": "adapter",
}
"""Other tools' names of fields, and the names of these fields here."""


class FieldHints:
    """Hints for one form. deprecated: places that are named in a hint only for a field that has no other place."""

    def __init__(self, form: type[BaseModel], deprecated: Sequence[str] = ()) -> None:
        self._levels = dict(_levels(form, ()))
        self._homes: dict[str, list[str]] = {}
        for place, level in self._levels.items():
            for name in level.model_fields:
                self._homes.setdefault(name, []).append(path_name(place))
        for homes in self._homes.values():
            current = [home for home in homes if home not in deprecated]
            homes[:] = current or homes

    def wording(self, path: Sequence[int | str], error: Any) -> str:
        """What is said about a wrong field. error: pydantic's."""
        if error["type"] == "extra_forbidden":
            return self._of(path, error.get("input"))
        return "the field is missing" if error["type"] == "missing" else str(error["msg"])

    def _of(self, path: Sequence[int | str], value: Any) -> str:
        """A message about the last part of `path`, which isn't known there."""
        name, place = str(path[-1]), tuple(part for part in path[:-1] if not isinstance(part, int))
        level = self._levels.get(place)
        here = list(level.model_fields) if level is not None else []
        if name == "extra_body" and not place:
            return "unknown field; extra_body is an argument of OpenAI's client: put its fields at the top level of the body"
        if name in self._homes:
            return f"unknown field here; it belongs {self._where(name, place)}"
        meant = _OTHER_WORDS.get(name.lower())
        if meant is None:
            near = difflib.get_close_matches(name, here, 1, _NEAR) or difflib.get_close_matches(name, self._homes, 1, _NEAR)
            meant = near[0] if near else None
        if meant is not None:
            where = "" if meant in here else f" It belongs {self._where(meant, place)}"
            return f"unknown field; did you mean {meant}?{where}"
        inside = [key for key in value if key in self._homes] if isinstance(value, Mapping) else []
        if inside:
            return "unknown field; " + "; ".join(f"{key} belongs {self._where(key, place)}" for key in inside[:8])
        return "unknown field" + (f"; known here: {', '.join(here)}" if 0 < len(here) <= 8 else "")

    def _where(self, name: str, place: tuple[int | str, ...]) -> str:
        """Where a field belongs. If `place` already leads into a branch that has the field, only that branch is named."""
        homes = self._homes[name]
        for end in range(len(place), 0, -1):
            branch = [home for home in homes if (home + ".").startswith(path_name(place[:end]) + ".")]
            if branch:
                homes = branch
                break
        return " or ".join(f"in {home}" if home else "at the top level of the body" for home in homes)


def _levels(form: type[BaseModel], place: tuple[int | str, ...]) -> Iterator[tuple[tuple[int | str, ...], type[BaseModel]]]:
    """Yields (the names of the fields that lead to it, form) for a form and every form inside it."""
    yield place, form
    for name, field in form.model_fields.items():
        for part in _forms(field.annotation):
            yield from _levels(part, (*place, name))


def _forms(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _forms(part)
