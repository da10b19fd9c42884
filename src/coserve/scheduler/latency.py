"""How long an iteration will take.

    seconds = iteration's constant
            + k (constant + curve(rows) + curve(head rows) + ...)   one pass over all layers; k by part: decode, prefill, fused
            + k_forward   (constant + layers x (curve(rows) + pairs) + ...)  per unit        k_backward likewise
            + k_optimizer (constant + elements + what was measured of their adapter)

A curve is piecewise linear and never falls. Its features are the amounts inside each piece, its coefficients the slopes, which
are 0 or more. The coefficients come from a profile, or from a device's data (devices/law.py), and say where the pieces start.
The factors k are corrected from what iterations really took. A prediction
computes with plain floats, since a scheduler makes dozens per iteration.

Owns: the terms of the law, its predictions, their correction. Does not own: measuring and fitting (profiling/), any decision.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from operator import mul
from typing import NamedTuple

from coserve.core import Contents, PassCost, UnitCost, percentile


class ErrorSummary(NamedTuple):
    """Absolute relative errors of predictions, as shares of the predicted time."""

    iterations: int
    median: float
    p95: float


def kind_of(contents: Contents) -> str:
    """Names the parts of an iteration in a fixed order, joined by '+', such as 'prefill+backward'; 'idle' if there are none."""
    cost, units = contents.inference, contents.units
    parts = (
        ("decode", cost is not None and cost.decode_rows > 0),
        ("prefill", cost is not None and cost.rows > cost.decode_rows + cost.fused_rows),
        ("fused", cost is not None and cost.fused_rows > 0),
        ("forward", any(not unit.backward for unit in units)),
        ("backward", any(unit.backward for unit in units)),
        ("optimizer", contents.optimizer_elements > 0),
    )
    return "+".join(name for name, there in parts if there) or "idle"


class Term(NamedTuple):
    """A curve over one field of a group's cost. With one piece, which starts at 0, it is a plain product.

    field: its name; the field 'once' is always 1, and UNCAPTURED is 1 or 0. knots: where pieces start, unless a law's
    coefficients name others; the last piece has no end. per_layer: whether the curve's value is multiplied by the unit's
    layers.
    """

    field: str
    knots: tuple[int, ...] = (0,)
    per_layer: bool = False

    def amounts(self, amount: int) -> Iterator[float]:
        """How much of `amount` lies inside each piece."""
        for start, end in zip(self.knots, (*self.knots[1:], math.inf), strict=True):
            yield max(0.0, min(amount, end) - start)


UNCAPTURED = "uncaptured"
"""The field of a pass that is 1 if it has rows of prompts or of finetuning, and otherwise 0. On a GPU, passes that only decode
are captured as CUDA graphs and started by one launch; other passes are hundreds of launches."""


def is_uncaptured(cost: PassCost) -> bool:
    """Whether a pass has other rows than decode rows."""
    return cost.rows > cost.decode_rows


_UNIT_TERMS = (
    Term("once"), Term("layers"), Term("rows", (0, 32, 128, 512), per_layer=True), Term("pairs", per_layer=True),
    Term("labels"),
)

TERMS: Mapping[str, tuple[Term, ...]] = {
    "iteration": (Term("once"),),
    "inference": (
        Term("once"), Term("rows", (1, 2, 4, 16, 64, 256, 1024)), Term("head_rows", (0, 1, 16, 256)), Term("decode_rows"),
        Term("decode_context"), Term("prefill_pairs"), Term("fused_rows", (0, 1)), Term("fused_pairs"),
        Term("fused_labels"), Term("adapter_segments"), Term("prefill_spans"), Term(UNCAPTURED),
    ),
    "forward": _UNIT_TERMS,
    "backward": _UNIT_TERMS,
    "optimizer": (Term("once"), Term("elements")),
}
"""The law, by group, with the knots that a fit has. The constant of a pass includes its first row, so that rows begin to count
at 1. The first fused row has a piece of its own, for what a pass costs more as soon as any row rides in it. So has a pass that
is not captured, whether prompts or fused rows are the reason; a law that doesn't name UNCAPTURED knows no difference."""

FIELDS: Mapping[str, tuple[str, ...]] = {
    "iteration": (), "inference": PassCost._fields, "forward": UnitCost._fields, "backward": UnitCost._fields,
    "optimizer": ("elements",),
}
"""The fields of each group's cost, in order."""

_ROWS, _DECODE_ROWS = map(PassCost._fields.index, ("rows", "decode_rows"))

Coefficient = tuple[str, str, int]
"""Names a coefficient: its group, its field, and the knot where its piece starts."""


def _place_knots(coefficients: Mapping[Coefficient, float]) -> dict[tuple[str, str], tuple[int, ...]]:
    """{(group, field): where the pieces of its curve start}, for every term. Those that coefficients name count, and the knots
    of TERMS for a term of which they name none."""
    named: dict[tuple[str, str], list[int]] = {}
    for group, field, knot in coefficients:
        named.setdefault((group, field), []).append(knot)
    placed = {
        (group, term.field): tuple(sorted(named.pop((group, term.field), term.knots)))
        for group, terms in TERMS.items() for term in terms
    }
    assert not named, f"the law has no terms {sorted(named)}"
    return placed


class _Curve(NamedTuple):
    """A term in a form that is fast to evaluate. place: of the field in the cost. values: of the curve at its knots."""

    place: int
    knots: tuple[int, ...]
    values: tuple[float, ...]
    slopes: tuple[float, ...]
    per_layer: bool

    def __call__(self, amount: float) -> float:
        piece = bisect_right(self.knots, amount) - 1
        return self.values[piece] + self.slopes[piece] * (amount - self.knots[piece]) if piece >= 0 else 0.0


class _Law:
    """Maps the cost of one group, a tuple in the order of FIELDS, to seconds."""

    def __init__(
        self, group: str, coefficients: Mapping[Coefficient, float], placed: Mapping[tuple[str, str], tuple[int, ...]]
    ) -> None:
        fields = FIELDS[group]
        products, curves = [0.0] * len(fields), []
        self.constant = self.uncaptured = 0.0
        for term in TERMS[group]:
            knots = placed[group, term.field]
            slopes = tuple(coefficients.get((group, term.field, knot), 0.0) for knot in knots)
            assert all(slope >= 0 for slope in slopes)
            if term.field == "once":
                (self.constant,) = slopes
            elif term.field == UNCAPTURED:
                (self.uncaptured,) = slopes
            elif knots == (0,) and not term.per_layer:
                products[fields.index(term.field)] = slopes[0]
            else:
                values = [0.0]
                for slope, start, end in zip(slopes[:-1], knots[:-1], knots[1:], strict=True):
                    values.append(values[-1] + slope * (end - start))
                curves.append(_Curve(fields.index(term.field), knots, tuple(values), slopes, term.per_layer))
        self._products, self._curves = tuple(products), tuple(curves)

    def __call__(self, cost: Sequence[float], layers: int = 1) -> float:
        seconds = self.constant + sum(map(mul, self._products, cost))
        for curve in self._curves:
            value = curve(cost[curve.place])
            seconds += value * layers if curve.per_layer else value
        if self.uncaptured and cost[_ROWS] > cost[_DECODE_ROWS]:
            seconds += self.uncaptured
        return seconds


_STEP = 0.15
"""The share of its relative error by which one iteration corrects its own prediction."""
_LARGEST_RESIDUAL = 0.5
"""A relative error counts as at most this."""
_LARGEST_JUMP = 0.1
"""A relative error counts up to this much more than the last one of the same kind of iteration. So a single stall hardly moves
a prediction, and a lasting change counts in full from its second iteration on."""
_SMALLEST_FACTOR, _LARGEST_FACTOR = 0.25, 4.0
_RESERVE_ITERATIONS, _RESERVE_MINIMUM = 200, 20
_FIRST_RESERVE = 0.1
"""The reserve while fewer iterations than _RESERVE_MINIMUM had finetuning work."""
_RESERVE_SPAN = 400
"""Iterations of any kind after which an error no longer counts for the reserve."""
_ERROR_ITERATIONS = 1000
_FINETUNING = {"fused", "forward", "backward", "optimizer"}


class LatencyModel:
    """Predicts seconds, and learns from iterations. All predictions are 0 or more. Those of units, and of passes without fused
    rows, never fall as rows are added."""

    def __init__(self, coefficients: Mapping[Coefficient, float]) -> None:
        """coefficients: seconds per amount, 0 or more. The pieces of a term's curve start at the knots that they name, whether
        TERMS has these or not. A term that they don't name costs nothing."""
        self.coefficients = dict(coefficients)
        self._knots = _place_knots(coefficients)
        laws = {group: _Law(group, coefficients, self._knots) for group in TERMS}
        self.constant_seconds = laws.pop("iteration").constant
        """What every iteration costs, whatever it holds. It is part of `seconds` and of no other prediction."""
        self._inference, self._forward, self._backward, self._optimizer = laws.values()
        self.uncaptured_seconds = self._inference.uncaptured
        """What a pass costs more, as soon as it has rows of prompts or of finetuning. It is part of `pass_seconds`."""
        self.corrections = dict.fromkeys(("decode", "prefill", "fused", "forward", "backward", "optimizer"), 1.0)
        """The present factor of each part, as learnt by `observe`."""
        self._last_residual: dict[str, float] = {}
        self._errors: dict[str, deque[float]] = {}
        self._finetuning: deque[tuple[int, float]] = deque(maxlen=_RESERVE_ITERATIONS)
        """(number of the iteration, its relative error) of those with finetuning work."""
        self._observed, self._reserve = 0, _FIRST_RESERVE

    def knots(self, group: str, field: str) -> tuple[int, ...]:
        """The amounts of a field at which its slope may change, in rising order. Between two of them, seconds are linear in it.
        Raises KeyError for what is no term of the law."""
        return self._knots[group, field]

    def pass_seconds(self, cost: PassCost) -> float:
        """Predicts an inference pass, its fused rows included."""
        factors = self.corrections
        decode, prefill, fused = self._pass_parts(cost)
        return factors["decode"] * decode + factors["prefill"] * prefill + factors["fused"] * fused

    def _pass_parts(self, cost: PassCost) -> tuple[float, float, float]:
        """A pass by the law, without factors: its decode rows alone, what its prompts add, what its fused rows add. The pass's
        constant is in the first of these parts that there is."""
        serving = cost.rows - cost.fused_rows
        decode = prompts = 0.0
        if cost.decode_rows:
            decode = self._inference(cost._replace(
                rows=cost.decode_rows, head_rows=min(cost.head_rows, cost.decode_rows), prefill_pairs=0, prefill_spans=0,
                fused_rows=0, fused_pairs=0, fused_labels=0,
            ))
        if serving > cost.decode_rows:
            bare = cost if not cost.fused_rows else cost._replace(rows=serving, fused_rows=0, fused_pairs=0, fused_labels=0)
            prompts = self._inference(bare) - decode
        fused = self._inference(cost) - decode - prompts if cost.fused_rows else 0.0
        return decode, prompts, fused

    def unit_seconds(self, cost: UnitCost) -> float:
        """Predicts a unit that is not fused."""
        if cost.backward:
            seconds = self._backward(cost, cost.layers)
            if cost.recompute_fraction:
                seconds += cost.recompute_fraction * self._forward(cost, cost.layers)
            return self.corrections["backward"] * seconds
        return self.corrections["forward"] * self._forward(cost, cost.layers)

    def optimizer_seconds(self, elements: int, refresh_seconds: float = 0.0) -> float:
        """Predicts an optimizer slice; 0 for no elements. refresh_seconds: measured, as in Contents."""
        return self.corrections["optimizer"] * (self._optimizer((elements,)) + refresh_seconds) if elements else 0.0

    def seconds(self, contents: Contents) -> float:
        """Predicts a whole iteration."""
        return self.constant_seconds + sum(self._parts(contents).values())

    def _parts(self, contents: Contents) -> dict[str, float]:
        """Predicted seconds by part, with their factors."""
        forward = backward = 0.0
        for unit in contents.units:
            if unit.backward:
                backward += self.unit_seconds(unit)
            else:
                forward += self.unit_seconds(unit)
        cost, factors = contents.inference, self.corrections
        decode, prefill, fused = (0.0, 0.0, 0.0) if cost is None else self._pass_parts(cost)
        return {
            "decode": factors["decode"] * decode, "prefill": factors["prefill"] * prefill, "fused": factors["fused"] * fused,
            "forward": forward,
            "backward": backward,
            "optimizer": self.optimizer_seconds(contents.optimizer_elements, contents.refresh_seconds),
        }

    def observe(self, contents: Contents, measured_seconds: float) -> None:
        """Learns from an iteration that has run, and records the error of its prediction. An iteration that is predicted to
        take no time teaches nothing."""
        parts = self._parts(contents)
        predicted = self.constant_seconds + sum(parts.values())
        if predicted <= 0:
            return
        self._observed += 1
        kind = kind_of(contents)
        residual = (measured_seconds - predicted) / predicted
        self._errors.setdefault(kind, deque(maxlen=_ERROR_ITERATIONS)).append(abs(residual))
        if contents.units or contents.optimizer_elements or (contents.inference and contents.inference.fused_rows):
            self._finetuning.append((self._observed, residual))
        self._update_reserve()
        self._correct(parts, predicted, self._believed(kind, residual))

    def _believed(self, kind: str, residual: float) -> float:
        """The relative error, less what looks like a stall."""
        residual = _clamp(residual, -_LARGEST_RESIDUAL, _LARGEST_RESIDUAL)
        limit = abs(self._last_residual.get(kind, 0.0)) + _LARGEST_JUMP
        self._last_residual[kind] = residual
        return _clamp(residual, -limit, limit)

    def _correct(self, parts: Mapping[str, float], predicted: float, residual: float) -> None:
        """Moves the factors by normalized least mean squares: each by its part's share of the predicted time. The iteration's
        constant has a share too, but no factor."""
        shares = {group: seconds / predicted for group, seconds in parts.items()}
        norm = sum(share * share for share in shares.values()) + (self.constant_seconds / predicted) ** 2
        for group, share in shares.items():
            factor = self.corrections[group] * (1 + _STEP * residual * share / norm)
            self.corrections[group] = _clamp(factor, _SMALLEST_FACTOR, _LARGEST_FACTOR)

    def reserve(self) -> float:
        """The relative error of a prediction that slack is kept for, from 0.005 to 0.5.

        It is the 95th percentile of (measured - predicted) / predicted over the last iterations with finetuning work, and 0.1
        where there are too few of them. Errors are forgotten after _RESERVE_SPAN iterations. Otherwise large ones would keep
        all finetuning away, and so remain the last.
        """
        return self._reserve

    def _update_reserve(self) -> None:
        """Runs once per iteration: a scheduler asks for the reserve several times in each, and metrics ask in other threads."""
        while self._finetuning and self._finetuning[0][0] <= self._observed - _RESERVE_SPAN:
            self._finetuning.popleft()
        enough = len(self._finetuning) >= _RESERVE_MINIMUM
        residuals = (residual for _, residual in self._finetuning)
        self._reserve = _clamp(percentile(residuals, 0.95), 0.005, 0.5) if enough else _FIRST_RESERVE

    def errors(self) -> dict[str, ErrorSummary]:
        """The errors by kind of iteration, over the last 1000 of each kind. 'finetuning' is all kinds with finetuning work
        together. A prediction counts as it was before its iteration was learnt from. Any thread may call this."""
        known = {kind: list(errors) for kind, errors in list(self._errors.items())}
        training = [error for kind, errors in known.items() if _FINETUNING & set(kind.split("+")) for error in errors]
        pooled = {"finetuning": training} if training else {}
        return {
            kind: ErrorSummary(len(errors), percentile(errors, 0.5), percentile(errors, 0.95))
            for kind, errors in {**known, **pooled}.items()
        }


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))
