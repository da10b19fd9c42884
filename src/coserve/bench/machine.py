"""The bound of a machine: the finetuning that a perfect scheduler could do beside a load, from the measured cost of rows.

Owns: the fit of that cost, the bound, the gain. The formula, which the page of results states too:

    an inference-only iteration takes   a + b x rows                            a, b fitted to inference-only runs
    a perfect scheduler stretches iterations to the TPOT objective T, so while anything runs there are 1 / T of them a second;
    something runs for the share        p = 1 - exp(-rate x output_tokens x T)  (each request stays for its tokens' deadlines)
    inference share                     S = min(1, p x a / T + b x rows per second)
    bound of finetuning                 finetune-only throughput x (1 - S)

The fixed cost `a` (reading the weights) is charged to inference in full. A fused finetuning row reads the same weights, so a
scheduler could pass the bound by what fusing saves: at most p x a / T of the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LEAST_RUNS = 4
"""Inference-only runs below which no cost is fitted: two costs through two or three runs are those runs' noise."""


class Observation(NamedTuple):
    """An inference-only run. busy_s: seconds inside iterations; rows: prompt and output tokens computed."""

    busy_s: float
    iterations: int
    rows: int


class RowCost(NamedTuple):
    """An inference-only iteration takes fixed_s + row_s x rows."""

    fixed_s: float
    row_s: float


def fit_row_cost(observations: Sequence[Observation]) -> RowCost | None:
    """Least squares over runs of different rates, each weighted by 1 / busy_s, with both costs at least 0.

    None for fewer than LEAST_RUNS runs.
    """
    used = [o for o in observations if o.busy_s > 0 and o.iterations > 0 and o.rows > 0]
    if len(used) < LEAST_RUNS:
        return None
    points = [(o.iterations / o.busy_s, o.rows / o.busy_s) for o in used]
    xx, xy, yy = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    x, y = sum(p[0] for p in points), sum(p[1] for p in points)
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        fixed, row = (x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant
        if fixed >= 0 and row >= 0:
            return RowCost(fixed, row)
    # Runs alike: a single cost explains them; the fixed one where it leaves less error than the row's.
    alone = [RowCost(x / xx, 0.0), RowCost(0.0, y / yy)]
    return min(alone, key=lambda c: sum((c.fixed_s * p[0] + c.row_s * p[1] - 1) ** 2 for p in points))


def inference_share(cost: RowCost, rate: float, prompt_tokens: float, output_tokens: float, tpot_s: float) -> float:
    """The share S of the module's formula. rate: requests per second; the token counts: means per request."""
    running = 1 - math.exp(-rate * output_tokens * tpot_s)
    rows_per_s = rate * (prompt_tokens + output_tokens)
    return min(1.0, running * cost.fixed_s / tpot_s + cost.row_s * rows_per_s)


def gain(goodput: float, capacity: float, finetune_share: float) -> float:
    """Machines' worth of work done by one: requests within their objectives over the capacity, plus finetuning throughput
    over finetune-only's. Two dedicated machines, or one that takes turns at no cost, reach 1 per machine."""
    return goodput / capacity + finetune_share


def gain_bound(rate: float, capacity: float, share: float) -> float:
    """The gain of a perfect scheduler: every request within its objectives, and finetuning in all that inference leaves."""
    return rate / capacity + 1 - share
