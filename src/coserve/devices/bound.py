"""The most finetuning that any scheduler can do beside a load of requests, under a latency law: a bound by arithmetic.

While requests run, an iteration lasts for the TPOT objective T. Beside d decode rows and the even share of arriving prompts, it
trains as many tokens t as it can, of which f ride in the pass for their forward:

    pass(d rows, prompts, f rows) + (t - f) x forward + t x backward <= T,    0 <= f <= t

`forward` and `backward` are the seconds per token of one unit over all layers and a whole micro-batch, the largest there is. d
is a Poisson variable whose mean is rate x output tokens x T (Little's law). While nothing runs, an iteration lasts for the
preemption quantum and has no pass. Optimizer steps are not counted.

The law is piecewise linear in f, so that the best f is a knot of the law, 0, or the largest f that the condition allows.

Owns: the bound. Does not own: the law (law.py, profiling/), or a scheduler that comes near it (scheduler/).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean

from coserve.core import PassCost, UnitCost
from coserve.scheduler.latency import LatencyModel

_TAIL = 1e-9
"""The largest numbers of decode rows that have less than this share of the time together are left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedLoad:
    """Requests as they come: how many per second, and their mean number of prompt and of output tokens.

    context_tokens: of a decode row, in the mean over decode rows. prompt_pairs: query-key pairs of a prompt, in the mean over
    requests. Both are larger where lengths differ, since long requests have more rows. None: all requests are alike.
    """

    rate: float
    prompt_tokens: float
    output_tokens: float
    context_tokens: float | None = None
    prompt_pairs: float | None = None

    @classmethod
    def of(cls, rate: float, lengths: Sequence[tuple[int, int]]) -> OfferedLoad:
        """The load of requests with these (prompt tokens, output tokens), of which there is at least one."""
        outputs = sum(output for _, output in lengths)
        return cls(
            rate=rate, prompt_tokens=mean(prompt for prompt, _ in lengths), output_tokens=outputs / len(lengths),
            context_tokens=sum(output * (prompt + output / 2) for prompt, output in lengths) / max(1, outputs),
            prompt_pairs=mean(prompt * (prompt + 1) / 2 for prompt, _ in lengths),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobShape:
    """A micro-batch of a job: its tokens, their query-key pairs per layer and their labels. recompute_fraction: as in UnitCost.
    lowest_layer: the lowest one that has trained parameters, at which backward ends."""

    tokens: int
    pairs: int
    labels: int
    recompute_fraction: float = 0.0
    lowest_layer: int = 0

    def __post_init__(self) -> None:
        assert self.tokens >= 1


def fused_bound(
    law: LatencyModel, num_layers: int, load: OfferedLoad, tpot_s: float, job: JobShape, quantum_s: float, fuse: bool = True
) -> float:
    """Trained tokens per second that no scheduler can exceed. tpot_s, quantum_s: seconds of an iteration while requests run and
    while none does. fuse: whether forward rows may ride in a pass; without, this is the bound of layer-sliced training."""
    layers = num_layers - job.lowest_layer
    ahead = law.unit_seconds(UnitCost(False, job.tokens, num_layers, job.pairs, job.labels)) / job.tokens
    back = law.unit_seconds(UnitCost(True, job.tokens, layers, job.pairs, 0, job.recompute_fraction)) / job.tokens
    per_second = 0.0
    for decode, share in _poisson(load.rate * load.output_tokens * tpot_s):
        length = tpot_s if decode else quantum_s
        left = length - law.constant_seconds
        if decode:
            tokens = max(_tokens(_RiddenPass(law, load, tpot_s, job, decode), left, ahead, back, fuse=fuse), default=0.0)
        else:
            tokens = max(0.0, left) / (ahead + back)
        per_second += share * tokens / length
    return per_second


class _RiddenPass:
    """The pass of one iteration as a function of the rows that ride in it. Fractions of rows and prompts are means."""

    def __init__(self, law: LatencyModel, load: OfferedLoad, tpot_s: float, job: JobShape, decode: int) -> None:
        self._law, self._job, prompts = law, job, load.rate * tpot_s
        context = load.prompt_tokens + load.output_tokens / 2 if load.context_tokens is None else load.context_tokens
        pairs = load.prompt_tokens * (load.prompt_tokens + 1) / 2 if load.prompt_pairs is None else load.prompt_pairs
        self._bare = (
            decode + prompts * load.prompt_tokens, decode + prompts, decode,
            decode * context, prompts * pairs,
        )
        self._prompts = prompts

    def seconds(self, riding: float) -> float:
        """Predicts the pass with `riding` rows of the job, as one that is not captured."""
        rows, *others = self._bare
        pairs, labels = (riding * amount / self._job.tokens for amount in (self._job.pairs, self._job.labels))
        return self._law.pass_seconds(PassCost._make((rows + riding, *others, riding, pairs, labels, 0, self._prompts)))

    def alone(self) -> float:
        """Predicts the pass without riding rows. A scheduler may take prompts together in few passes, so that the bound's
        other passes only decode and may be captured."""
        return self.seconds(0) - self._law.uncaptured_seconds

    def knots(self) -> list[float]:
        """The numbers of riding rows above 0 at which the slope of `seconds` may change, in rising order."""
        job = self._job
        found = {knot - self._bare[0] for knot in self._law.knots("inference", "rows")}
        for field, amount in (("fused_rows", job.tokens), ("fused_pairs", job.pairs), ("fused_labels", job.labels)):
            if amount:
                found |= {knot * job.tokens / amount for knot in self._law.knots("inference", field)}
        return sorted(rows for rows in found if rows > 0)


def _tokens(inference: _RiddenPass, left: float, ahead: float, back: float, *, fuse: bool) -> Iterator[float]:
    """How many tokens an iteration of `left` seconds trains, for each number of riding rows that may be the best.

    With f riding rows the time is used up by t = (left - pass(f) + f x ahead) / (ahead + back) tokens. These are at least f as
    long as pass(f) + f x back <= left, the left side of which rises with f. It jumps at the first riding row, where passes that
    only decode are captured.
    """

    def spent(rows: float) -> float:
        return inference.seconds(rows) + rows * back

    def trained(rows: float) -> float:
        return (left - inference.seconds(rows) + rows * ahead) / (ahead + back)

    alone = inference.alone()
    if alone > left:
        return
    yield (left - alone) / (ahead + back)
    if spent(0) > left:
        return
    last = 0.0
    for rows in [*inference.knots(), math.inf] if fuse else ():
        rows = min(rows, left / back)
        if spent(rows) >= left:  # the largest f lies between two knots, where both are linear
            yield trained(last + (rows - last) * (left - spent(last)) / (spent(rows) - spent(last)))
            return
        yield trained(rows)
        last = rows


def _poisson(mean: float) -> Iterator[tuple[int, float]]:
    """Counts with their probabilities, from the smallest that matters to the largest."""
    seen = 0.0
    for count in itertools.count():
        share = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1)) if mean else 1.0
        seen += share
        yield count, share
        if seen > 1 - _TAIL:
            return
