"""A device's numbers from measured points, and how well a law agrees with them.

Owns: the fit of a device's constants to a profile, the agreement of a law with a profile. Does not own: measuring (profiling/),
the law (law.py). The fit finds the constants of a roofline that come nearest, which is not the nearest law that there is: that
one has more terms (profiling/fit.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coserve.core import Contents, percentile
from coserve.devices.law import device_law
from coserve.devices.table import SHARES, Device
from coserve.model.architecture import Architecture
from coserve.scheduler.latency import LatencyModel, kind_of

ALL = "all"
"""The kind that stands for points of every kind."""

FITTED = (
    "bandwidth", "peak_flops", "overlap", "attention_efficiency", "iteration_s", "launch_s", "unit_s", "unit_layer_s",
    "backward_rows", "backward_pairs", "kept_widths", "update_bytes",
)
"""The fields of a device that `refit` may set. Of peak_flops and efficiency only the product matters."""
FITTED_CAPTURED = (*FITTED, "captured_launch_s")
"""Those where passes that only decode are replayed as CUDA graphs."""

_LEAST_START_S, _LEAST_START = 1e-4, 0.1
"""Where the fit of a time, and of another number, begins that was less."""
_TOLERATED_ERROR = 0.1
"""Points with more than this relative error lose weight, so that a stall hardly alters the fit."""
_PRIOR = 0.02
"""The weight that pulls each number to where it was. It decides only where points say nothing."""
_ROUNDS, _TRIES = 60, 8
"""Most steps of the fit, and how often a step is tried with more damping."""
_LEAST_GAIN = 1e-5
"""A step that lowers the loss by a smaller share is the last."""
_STEP = 1e-5
"""By how much a logarithm is changed to see the slope."""
_LEAST_S = 1e-12
_LARGEST_MOVE = 1.0
"""A step changes a number's logarithm by at most this."""


class Agreement(NamedTuple):
    """How a law predicts measured points. median, p95: of absolute errors as shares of the measured time. ratio: the median of
    predicted / measured."""

    points: int
    median: float
    p95: float
    ratio: float


def agreement(law: LatencyModel, points: Mapping[Contents, float]) -> dict[str, Agreement]:
    """By kind of iteration (`kind_of`), and for ALL. points: what each iteration held, and its seconds; at least one."""
    ratios: dict[str, list[float]] = {ALL: []}
    for contents, seconds in points.items():
        for kind in (ALL, kind_of(contents)):
            ratios.setdefault(kind, []).append(law.seconds(contents) / seconds)
    result = {}
    for kind, found in ratios.items():
        errors = [abs(ratio - 1) for ratio in found]
        result[kind] = Agreement(len(found), percentile(errors, 0.5), percentile(errors, 0.95), percentile(found, 0.5))
    return result


def mean_points(samples: Sequence[tuple[Contents, float]]) -> dict[Contents, float]:
    """The mean seconds of each iteration that a profile has, in the profile's order."""
    times: dict[Contents, list[float]] = {}
    for contents, seconds in samples:
        times.setdefault(contents, []).append(seconds)
    return {contents: sum(each) / len(each) for contents, each in times.items()}


def refit(
    points: Mapping[Contents, float], arch: Architecture, device: Device, *, itemsize: int, tensor_parallel_size: int = 1,
    names: Sequence[str] | None = None, captured: bool = False,
) -> Device:
    """The device whose law comes nearest to measured points: `device` with other numbers.

    points: as for `agreement`. names: those fields that may change (all of FITTED, or of FITTED_CAPTURED). captured: as for
    `device_law`. The fit minimizes squared logarithms of predicted /
    measured over the numbers' logarithms, by Levenberg and Marquardt's method, with less weight for points that are far off.
    """
    if names is None:
        names = FITTED_CAPTURED if captured else FITTED
    problem = _Problem(points, arch, device, itemsize, tensor_parallel_size, names, captured)
    state = _State(problem.start, problem.errors(problem.start), 1e-2)
    for _ in range(_ROUNDS):
        better = problem.step(state)
        if better is None:
            break
        state = better
    return problem.device(state.logs)


class _State(NamedTuple):
    """logs: of the numbers that may change. errors: logarithms of predicted / measured, by point. damping: of the next step."""

    logs: np.ndarray
    errors: np.ndarray
    damping: float


class _Problem:
    """Least squares over the logarithms of the named numbers."""

    def __init__(
        self, points: Mapping[Contents, float], arch: Architecture, device: Device, itemsize: int, size: int,
        names: Sequence[str], captured: bool,
    ) -> None:
        self._points, self._arch, self._device, self._itemsize = points, arch, device, itemsize
        self._size, self._names, self._captured = size, names, captured
        least = {name: _LEAST_START_S if name.endswith("_s") else _LEAST_START for name in names}
        self.start = np.log([max(getattr(device, name), least[name]) for name in names])
        self._measured = np.log(np.array(list(points.values())))

    def device(self, logs: np.ndarray) -> Device:
        """The device with these numbers. A share is at most 1."""
        numbers = dict(zip(self._names, np.exp(logs).tolist(), strict=True))
        shares = {name: min(1.0, numbers[name]) for name in SHARES if name in self._names}
        return dataclasses.replace(self._device, **numbers | shares)

    def errors(self, logs: np.ndarray) -> np.ndarray:
        law = device_law(
            self._arch, self.device(logs), itemsize=self._itemsize, tensor_parallel_size=self._size, captured=self._captured
        )
        return np.log([max(law.seconds(contents), _LEAST_S) for contents in self._points]) - self._measured

    def _loss(self, logs: np.ndarray, errors: np.ndarray, weights: np.ndarray) -> float:
        return float(np.sum((weights * errors) ** 2) + np.sum((_PRIOR * (logs - self.start)) ** 2))

    def step(self, state: _State) -> _State | None:
        """A state with less loss; None where none is found, or none that is worth another step."""
        logs, errors, damping = state
        weights = np.sqrt(_TOLERATED_ERROR / np.maximum(np.abs(errors), _TOLERATED_ERROR))
        before, size = self._loss(logs, errors, weights), len(logs)
        slopes = np.stack([(self.errors(logs + _STEP * unit) - errors) / _STEP for unit in np.eye(size)], axis=1)
        system = np.vstack([slopes * weights[:, None], _PRIOR * np.eye(size)])
        target = np.concatenate([-weights * errors, -_PRIOR * (logs - self.start), np.zeros(size)])
        for _ in range(_TRIES):
            damped = np.vstack([system, math.sqrt(damping) * np.eye(size)])
            move = np.linalg.lstsq(damped, target, rcond=None)[0]
            tried = logs + np.clip(move, -_LARGEST_MOVE, _LARGEST_MOVE)
            found = self.errors(tried)
            if self._loss(tried, found, weights) < (1 - _LEAST_GAIN) * before:
                return _State(tried, found, damping / 4)
            damping *= 4
        return None
