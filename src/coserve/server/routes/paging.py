"""OpenAI's cursor-paged lists: the query parameters and the answer.

Owns: their names, limits and shape. Does not own: what is listed, or finding the entry that `after` names (Store).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import Query

After = Annotated[str | None, Query(description="id of the last entry of the page before this one, deleted or not")]
Limit = Annotated[int, Query(ge=1, le=100, description="entries of a page")]
FileLimit = Annotated[int, Query(ge=1, le=10_000, description="entries of a page")]
Order = Annotated[Literal["asc", "desc"], Query(description="by creation time; desc: newest first")]


def cursor_page(data: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of a list. data: objects in the list's order, each with an `id`; has_more: whether others follow."""
    return {
        "object": "list",
        "data": list(data),
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }
