"""OpenAI's `metadata`: pairs of short texts that an object carries along.

Owns: their limits, which are OpenAI's. Does not own: where they are kept.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError

_MAX_PAIRS, _MAX_KEY, _MAX_VALUE = 16, 64, 512


def short_text(value: Any) -> str:
    """A text of at most 512 characters. Raises pydantic's error for others."""
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string")
    if len(value) > _MAX_VALUE:
        raise PydanticCustomError("text", f"must have at most {_MAX_VALUE} characters")
    return value


def _pairs(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MAX_PAIRS:
        raise PydanticCustomError("pairs", f"must be an object of at most {_MAX_PAIRS} pairs")
    for key in value:
        if not isinstance(key, str) or len(short_text(key)) > _MAX_KEY:
            raise PydanticCustomError("pairs", f"keys must be strings of at most {_MAX_KEY} characters")
    return {key: short_text(item) for key, item in value.items()}


Pairs = Annotated[dict[str, str], PlainValidator(_pairs, json_schema_input_type=dict[str, str])]
