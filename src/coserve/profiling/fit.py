"""From a short profile to a latency model. Owns: the choice of iterations to time, the fit, the profile's file. Does not own:
running the iterations (measure.py), the law that is fitted (scheduler/latency.py)."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from coserve.core import Contents, PassCost, UnitCost
from coserve.durable import write_file
from coserve.scheduler.latency import TERMS, UNCAPTURED, Coefficient, LatencyModel, Term, is_uncaptured

ProfilePoint = tuple[Contents, float]
"""What an iteration held, and how many seconds it took."""


class _Pass(NamedTuple):
    """An inference pass to time. decode, prefill, fused: rows. context: tokens per decode row. prompt, example: length of each
    prefilled and each fused sequence. every_logit: logits of all prompt rows. labels: whether fused rows have them."""

    decode: int = 0
    context: int = 64
    prefill: int = 0
    prompt: int = 512
    every_logit: bool = False
    fused: int = 0
    example: int = 256
    labels: bool = False
    adapters: int = 0


class _Window(NamedTuple):
    """A unit to time. example: length of each sequence in the window."""

    rows: int
    layers: int
    example: int


_PASSES = (
    _Pass(decode=1), _Pass(decode=2), _Pass(decode=4), _Pass(decode=8, context=512), _Pass(decode=16), _Pass(decode=32),
    _Pass(decode=64), _Pass(decode=16, context=512), _Pass(decode=16, adapters=4),
    _Pass(prefill=16), _Pass(prefill=32), _Pass(prefill=64, every_logit=True), _Pass(prefill=128),
    _Pass(prefill=256, prompt=16), _Pass(prefill=256), _Pass(prefill=512),
    _Pass(decode=16, prefill=128), _Pass(decode=8, prefill=32), _Pass(decode=8, prefill=128, prompt=32),
    _Pass(decode=8, fused=32, labels=True, adapters=1), _Pass(decode=8, fused=128, adapters=1),
    _Pass(decode=8, fused=256, labels=True, adapters=1),
)
_WINDOWS = (
    _Window(32, 1, 32), _Window(32, 4, 32), _Window(64, 2, 64), _Window(128, 4, 128), _Window(256, 2, 256),
    _Window(512, 1, 512), _Window(512, 4, 64), _Window(1024, 2, 128), _Window(2048, 1, 2048),
)
"""Long and short examples in windows of like size separate the cost of rows from attention's. Many and few layers separate the
cost per layer from the cost per unit."""

_GPU_PASSES = (
    _Pass(decode=96), _Pass(decode=128), _Pass(decode=192), _Pass(decode=256), _Pass(decode=64, context=1024),
    _Pass(decode=256, context=512),
    _Pass(prefill=192, prompt=192), _Pass(prefill=384, prompt=384), _Pass(prefill=768, prompt=768),
    _Pass(prefill=1024, prompt=1024), _Pass(prefill=2048, prompt=256), _Pass(prefill=2048, prompt=2048),
    _Pass(prefill=4096, prompt=1024), _Pass(prefill=8192, prompt=8192), _Pass(decode=128, prefill=512),
    _Pass(decode=64, fused=64), _Pass(decode=128, fused=128), _Pass(decode=64, fused=512, example=512),
    _Pass(decode=64, fused=512, example=512, labels=True), _Pass(decode=8, fused=1024, example=1024),
    _Pass(decode=64, fused=2048, example=2048), _Pass(decode=64, fused=2048, example=256, labels=True),
)
_GPU_WINDOWS = (
    _Window(16, 4, 16), _Window(128, 8, 128), _Window(192, 4, 192), _Window(256, 8, 256), _Window(384, 4, 384),
    _Window(512, 8, 512), _Window(768, 4, 768), _Window(1024, 4, 1024), _Window(2048, 8, 256), _Window(2048, 4, 2048),
    _Window(4096, 2, 4096), _Window(8192, 2, 8192), _Window(8192, 4, 1024),
)
"""What a GPU is profiled for beyond _PASSES and _WINDOWS. It serves hundreds of requests at once and runs thousands of rows in
an iteration, and a law of fewer rows says little about these: around its ridge, some hundred rows, the cost of a row changes
from almost nothing."""

_NEEDED_PASSES = (
    _Pass(decode=1), _Pass(decode=8, context=512), _Pass(decode=32), _Pass(prefill=32), _Pass(prefill=64, every_logit=True),
    _Pass(decode=8, fused=32, labels=True, adapters=1),
)
MAX_DECODE = 1024
"""Requests beyond which no decode pass is measured."""
_LONG_ROWS = 128
"""The fewest rows for which a pass is bound by arithmetic instead of by reading the weights."""
_NEEDED_WINDOWS = (_Window(32, 1, 32), _Window(128, 4, 128), _Window(512, 1, 512), _Window(2048, 1, 2048))


def sequence_length(rows: int, pairs: int) -> int:
    """The length of the sequences in a profile point of whole, equally long sequences with `rows` rows and `pairs` query-key
    pairs in all. A sequence of n tokens has n (n + 1) / 2 pairs."""
    return 2 * pairs // rows - 1


def profile_points(num_layers: int, max_rows: int, *, gpu_seqs: int = 0) -> list[Contents]:
    """The iterations to time, at most 45, or on a GPU at most 100. Their order doesn't matter.

    gpu_seqs: on a GPU, the most requests that it decodes at once; elsewhere 0. No point has more rows or layers than the given
    limits. The rows of prompts, of fused windows and of units are whole sequences of one length (`sequence_length`). Decode
    rows have equal contexts. Units with labels end at the top layer.
    """
    wide: tuple[_Pass, ...] = (*_GPU_PASSES, _Pass(decode=min(gpu_seqs, MAX_DECODE))) if gpu_seqs else ()
    windows = (*_WINDOWS, *_GPU_WINDOWS) if gpu_seqs else _WINDOWS
    passes = [_pass_cost(spec, max_rows) for spec in (*_PASSES, *wide)]
    decode = _pass_cost(_Pass(decode=8), max_rows)
    forward, backward = ([_unit_cost(spec, back, num_layers, max_rows) for spec in windows] for back in (False, True))
    top = _unit_cost(_Window(128, 4, 128), False, num_layers, max_rows)
    points = [
        *(Contents(cost, (), 0) for cost in passes),
        *(Contents(None, (unit,), 0) for unit in (*forward, *backward)),
        Contents(None, (top._replace(labels=top.rows),), 0),
        *(Contents(None, (), elements) for elements in (100_000, 1_000_000)),
        # Iterations of two parts separate the cost per iteration from the cost per part.
        Contents(decode, (backward[4],), 0),
        Contents(None, (forward[2], backward[2]), 0),
    ]
    return list(dict.fromkeys(points))


def needed_points(num_layers: int, max_rows: int) -> list[Contents]:
    """The points of `profile_points` that a fit needs: each has few rows or few layers; together they have all features."""
    units = [_unit_cost(spec, back, num_layers, max_rows) for back in (False, True) for spec in _NEEDED_WINDOWS]
    needed = {
        *(Contents(_pass_cost(spec, max_rows), (), 0) for spec in _NEEDED_PASSES),
        *(Contents(None, (unit,), 0) for unit in units),
    }
    return [
        point for point in profile_points(num_layers, max_rows)
        if point in needed or point.optimizer_elements or any(unit.labels for unit in point.units)
    ]


def by_layer(point: Contents, samples: Sequence[ProfilePoint], num_layers: int) -> ProfilePoint | None:
    """Estimates the time of a long pass that was not measured: the time per layer of a forward unit with the same rows, times
    `num_layers`, plus the time of its decode rows alone. None for other points, or if either is not among `samples`."""
    cost = point.inference
    if cost is None or point.units or point.optimizer_elements or cost.fused_labels:
        return None
    prefilled = (cost.rows - cost.decode_rows - cost.fused_rows, cost.prefill_pairs)
    parts = [part for part in (prefilled, (cost.fused_rows, cost.fused_pairs)) if part[0]]
    if len(parts) != 1 or parts[0][0] < _LONG_ROWS:
        return None
    layer = [
        seconds / unit.layers for contents, seconds in samples if contents.inference is None and len(contents.units) == 1
        for unit in contents.units if (unit.rows, unit.pairs) == parts[0] and not unit.backward and not unit.labels
    ]
    decode = [
        seconds for contents, seconds in samples if contents.inference is not None and not contents.units
        and contents.inference.rows == contents.inference.decode_rows == cost.decode_rows
    ] if cost.decode_rows else [0.0]
    return (point, min(decode) + num_layers * min(layer)) if layer and decode else None


def row_layers(contents: Contents, num_layers: int) -> int:
    """Rows times layers, summed over an iteration's parts. Its time grows with this."""
    rows = 0 if contents.inference is None else contents.inference.rows * num_layers
    return rows + sum(unit.rows * unit.layers for unit in contents.units)


def _whole(rows: int, length: int, limit: int) -> tuple[int, int]:
    """(rows, query-key pairs) of as many sequences of `length` as fit into `rows` and into `limit`."""
    rows = max(0, min(rows, limit))
    length = min(length, rows)
    count = rows // length if rows else 0
    return count * length, count * length * (length + 1) // 2


def _pass_cost(spec: _Pass, max_rows: int) -> PassCost:
    decode = min(spec.decode, max_rows)
    prefill, prefill_pairs = _whole(spec.prefill, spec.prompt, max_rows - decode)
    fused, fused_pairs = _whole(spec.fused, spec.example, max_rows - decode)
    prompts = prefill // sequence_length(prefill, prefill_pairs) if prefill else 0
    return PassCost(
        rows=decode + prefill + fused, head_rows=decode + (prefill if spec.every_logit else prompts), decode_rows=decode,
        decode_context=decode * spec.context, prefill_pairs=prefill_pairs, fused_rows=fused, fused_pairs=fused_pairs,
        fused_labels=fused if spec.labels else 0, adapter_segments=min(spec.adapters, decode + prefill + fused),
        prefill_spans=prompts,
    )


def _unit_cost(spec: _Window, backward: bool, num_layers: int, max_rows: int) -> UnitCost:
    rows, pairs = _whole(spec.rows, spec.example, max_rows)
    return UnitCost(backward, rows, min(spec.layers, num_layers), pairs, 0)


_SMOOTHNESS = 2e-3
"""Weight that pulls the slopes of neighbouring pieces together. A piece that no sample reaches gets the slope of the piece
below; one that few samples reach can't get an extreme slope. The weight is small, so that data outweighs it."""
_RIDGE = 1e-4
"""Weight of the ridge penalty, which splits a cost between features that always come together."""
_TOLERATED_ERROR = 0.1
_REWEIGHTINGS = 5
"""Rounds of fitting. Samples with more than the tolerated relative error lose weight, so that a stall hardly alters the fit."""

_SUBSTITUTES: tuple[tuple[str, str, str, str, float], ...] = (
    ("inference", "fused_pairs", "inference", "prefill_pairs", 1.0),
    ("inference", "fused_rows", "inference", "rows", 0.25),  # beside their cost as rows, for writing their kept values
    ("inference", "fused_labels", "forward", "labels", 1.0),
    ("forward", "labels", "inference", "fused_labels", 1.0),
    ("forward", "labels", "inference", "head_rows", 2.0),  # logits and their gradient
    ("inference", "fused_labels", "forward", "labels", 1.0),
    *(("backward", field, "forward", field, 2.0) for field in ("once", "layers", "rows", "pairs")),
    *(("forward", field, "backward", field, 0.5) for field in ("once", "layers", "rows", "pairs")),
)
"""(group, field, other group, other field, factor): if no sample has a field, its cost is that of the other field times the
factor. Rows apply in order; one whose other field is unknown is skipped. A field without any known substitute costs nothing."""


_Terms = Mapping[str, tuple[Term, ...]]

CPU_TERMS: _Terms = {group: tuple(term for term in terms if term.field != UNCAPTURED) for group, terms in TERMS.items()}
_GPU_UNIT_ROWS = (0, 64, 128, 192, 256, 384, 512, 768, 1024)
_GPU_PIECES = {
    ("inference", "rows"): (1, 16, 64, 128, 192, 256, 384, 512, 768, 1024, 2048), ("inference", "head_rows"): (0, 1, 64, 256),
    ("forward", "rows"): _GPU_UNIT_ROWS, ("backward", "rows"): _GPU_UNIT_ROWS,
}
GPU_TERMS: _Terms = {
    group: tuple(term._replace(knots=_GPU_PIECES.get((group, term.field), term.knots)) for term in terms)
    for group, terms in TERMS.items()
}
"""The terms that are fitted to a profile, on a CPU and on a GPU. A CPU captures nothing. On a GPU rows cost next to nothing up
to a ridge, which lies between 100 and 300 rows by the device, and where a layer's launches take longer than its products, at up
to 800; so pieces are short there. A piece that reached over the ridge would be wrong by a third within it. Far beyond, time is
linear in rows."""


def fit(samples: Sequence[ProfilePoint], *, gpu: bool = False) -> LatencyModel:
    """The latency model with non-negative coefficients and the least squared relative error.

    samples: at least one, with positive seconds. A feature that no sample has gets a substitute's coefficient, or 0.
    gpu: whether they are of a GPU, which has GPU_TERMS.
    """
    assert samples and all(seconds > 0 for _, seconds in samples)
    law = GPU_TERMS if gpu else CPU_TERMS
    names = [(group, term.field, knot) for group, terms in law.items() for term in terms for knot in term.knots]
    column = {name: index for index, name in enumerate(names)}
    seconds_M = np.array([seconds for _, seconds in samples])
    features_MN = np.array([_features(contents, law) for contents, _ in samples]) / seconds_M[:, None]
    scale_N = np.linalg.norm(features_MN, axis=0)
    smooth = []
    for group, terms in law.items():
        for term in terms:
            columns = [column[group, term.field, knot] for knot in term.knots]
            weight = _SMOOTHNESS * np.linalg.norm(features_MN[:, columns].sum(axis=1))
            for below, above in itertools.pairwise(columns):
                row_N = np.zeros(len(names))
                row_N[below], row_N[above] = -weight, weight
                smooth.append(row_N)
    prior_PN = np.vstack([*smooth, _RIDGE * np.diag(scale_N)])
    weight_M = np.ones(len(samples))
    for _ in range(_REWEIGHTINGS):
        system = np.vstack([features_MN * weight_M[:, None], prior_PN])
        solution_N = non_negative_least_squares(system, np.concatenate([weight_M, np.zeros(len(prior_PN))]))
        error_M = np.abs(features_MN @ solution_N - 1)
        weight_M = np.sqrt(_TOLERATED_ERROR / np.maximum(error_M, _TOLERATED_ERROR))
    coefficients = dict(zip(names, solution_N.tolist(), strict=True))
    _substitute(coefficients, {name[:2] for name, scale in zip(names, scale_N, strict=True) if scale > 0}, law)
    return LatencyModel(coefficients)


def _features(contents: Contents, law: _Terms) -> list[float]:
    """The amounts of an iteration in every piece of every term, in the order of `law`. A backward unit that runs a share of
    forward again has that share of a forward unit's amounts too."""
    inference, elements = contents.inference, contents.optimizer_elements
    back = [(unit._asdict(), 1.0) for unit in contents.units if unit.backward]
    costs: dict[str, list[tuple[dict[str, Any], float]]] = {
        "iteration": [({}, 1.0)],
        "inference": [] if inference is None else [({**inference._asdict(), UNCAPTURED: int(is_uncaptured(inference))}, 1.0)],
        "forward": [
            *((unit._asdict(), 1.0) for unit in contents.units if not unit.backward),
            *((cost, cost["recompute_fraction"]) for cost, _ in back if cost["recompute_fraction"]),
        ],
        "backward": back,
        "optimizer": [({"elements": elements}, 1.0)] if elements else [],
    }
    row = []
    for group, terms in law.items():
        for term in terms:
            total = np.zeros(len(term.knots))
            for cost, share in costs[group]:
                amount = 1 if term.field == "once" else cost[term.field]
                total += np.array(list(term.amounts(amount))) * (cost["layers"] if term.per_layer else 1) * share
            row += total.tolist()
    return row


def _substitute(coefficients: dict[Coefficient, float], known: set[tuple[str, str]], law: _Terms) -> None:
    """Sets the coefficients of unknown terms by _SUBSTITUTES. If the pieces differ, all get the other term's last slope."""
    knots = {(group, term.field): term.knots for group, terms in law.items() for term in terms}
    for group, field, other_group, other_field, factor in _SUBSTITUTES:
        target, source = (group, field), (other_group, other_field)
        if target in known or source not in known:
            continue
        same = knots[target] == knots[source]
        for knot in knots[target]:
            coefficients[*target, knot] = factor * coefficients[*source, knot if same else knots[source][-1]]
        known.add(target)


def non_negative_least_squares(matrix_MN: np.ndarray, target_M: np.ndarray) -> np.ndarray:
    """The x >= 0, [N], that minimizes |matrix x - target|, by Lawson and Hanson's active-set method (Solving Least Squares
    Problems, 1974, chapter 23). Columns of zeros get 0."""
    scale_N = np.linalg.norm(matrix_MN, axis=0)
    scale_N[scale_N == 0] = 1.0
    scaled_MN = matrix_MN / scale_N
    num_columns = scaled_MN.shape[1]
    solution_N, free_N = np.zeros(num_columns), np.zeros(num_columns, dtype=bool)
    tolerance = 1e-10 * max(1.0, float(np.linalg.norm(target_M)))
    for _ in range(10 * num_columns):  # the method ends by itself; the bound is there in case rounding makes it cycle
        gradient_N = np.where(free_N, -np.inf, scaled_MN.T @ (target_M - scaled_MN @ solution_N))
        if gradient_N.max() <= tolerance:
            break
        free_N[np.argmax(gradient_N)] = True
        while free_N.any():
            wanted_N = np.zeros(num_columns)
            wanted_N[free_N] = np.linalg.lstsq(scaled_MN[:, free_N], target_M, rcond=None)[0]
            blocked_N = free_N & (wanted_N <= 0)
            if not blocked_N.any():
                solution_N = wanted_N
                break
            step_N = np.full(num_columns, np.inf)
            step_N[blocked_N] = solution_N[blocked_N] / np.maximum(solution_N[blocked_N] - wanted_N[blocked_N], 1e-300)
            solution_N = np.maximum(solution_N + step_N.min() * (wanted_N - solution_N), 0.0)
            free_N &= step_N > step_N.min()
            solution_N[~free_N] = 0.0
    return solution_N / scale_N


_VERSION = 2
_PROFILED = UnitCost._fields[:5]
"""All fields but `recompute_fraction`, which is 0 in every measured unit."""


def save_profile(path: Path, key: str, samples: Sequence[ProfilePoint]) -> None:
    """Writes a profile atomically. key: names what timings depend on: model, device, dtype, threads. Raises OSError."""
    data = {"version": _VERSION, "key": key, "samples": [
        {
            "inference": None if contents.inference is None else contents.inference._asdict(),
            "units": [dict(zip(_PROFILED, unit, strict=False)) for unit in contents.units],
            "optimizer_elements": contents.optimizer_elements,
            "seconds": seconds,
        } for contents, seconds in samples
    ]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(data).encode(), cached=True, mode=0o600)


def load_profile(path: Path, key: str) -> list[ProfilePoint] | None:
    """The samples of a profile. None if there is no readable one with this key. Never raises."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != _VERSION or data["key"] != key:
            return None
        return [_read_sample(item) for item in data["samples"]] or None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def _read_sample(item: Any) -> ProfilePoint:
    """One sample. Raises an error that load_profile catches if it isn't as save_profile writes it."""
    inference = None if item["inference"] is None else PassCost(**item["inference"])
    units = tuple(UnitCost(*(unit[name] for name in _PROFILED)) for unit in item["units"])
    elements, seconds = item["optimizer_elements"], item["seconds"]
    counts = [*(inference or ()), *(count for unit in units for count in unit[1 : len(_PROFILED)]), elements]
    if not all(type(count) is int and count >= 0 for count in counts) or not all(type(unit.backward) is bool for unit in units):
        raise ValueError("not a profile's counts")
    if type(seconds) not in (int, float) or not 0 < seconds < math.inf:
        raise ValueError("not a profile's seconds")
    return Contents(inference, units, elements), float(seconds)
