"""Figures of several engines (Engine.metrics()) as those of one, for the page and for rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LARGEST = ("time_s", "reserve", "block_bytes")
"""Figures of which the largest one is shown; other numbers are summed."""


def merge_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of all engines together. parts: at least one; figures that some don't have are merged over the others."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        if name == "prediction_errors":
            merged[name] = _merge_errors(values)
        elif name == "unit_shapes":
            merged[name] = _merge_shapes(values)
        elif isinstance(values[0], Mapping):
            merged[name] = merge_stats(values)
        elif isinstance(values[0], Sequence) and not isinstance(values[0], str):
            merged[name] = list(dict.fromkeys(item for value in values for item in value))
        else:
            merged[name] = max(values) if name in _LARGEST else sum(values)
    return merged


def _merge_errors(parts: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """By kind of iteration: the number of iterations, the mean of the medians by that number, the worst p95."""
    merged: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(kind for part in parts for kind in part):
        found = [part[kind] for part in parts if kind in part]
        count = sum(error["iterations"] for error in found)
        median = sum(error["iterations"] * error["median"] for error in found) / count if count else found[0]["median"]
        merged[kind] = {**found[0], "iterations": count, "median": median, "p95": max(error["p95"] for error in found)}
    return merged


def _merge_shapes(parts: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    counts: dict[tuple[tuple[str, Any], ...], int] = {}
    for shape in (shape for part in parts for shape in part):
        key = tuple((name, value) for name, value in shape.items() if name != "count")
        counts[key] = counts.get(key, 0) + shape["count"]
    return [{**dict(key), "count": count} for key, count in counts.items()]
