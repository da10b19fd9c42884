"""A program's calls one by one, where lowering has joined products of adapters' factors (`compiler/factors.py`) or two
operators (`ops.run.JOINED`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from coserve.compiler.program import Call
from coserve.ops.run import JOINED, PAIRS, RUNNERS


def apart(calls: Iterable[Call]) -> Iterator[Call]:
    """What a joined call computes, as the calls that it was made of."""
    for call in calls:
        if call.run is not PAIRS:
            yield call
            continue
        down, up = call.attrs["down"], call.attrs["up"]
        inner, written = call.outs[: len(down)], call.outs[len(down) :]
        single = replace(call, run=RUNNERS[call.op], attrs={})
        for name, out in zip(down, inner, strict=True):
            yield replace(single, weight=name, accumulate=False, outs=(out,))
        for name, source, out in zip(up, inner, written, strict=True):
            yield replace(single, weight=name, ins=(source,), outs=(out,))


def operators(call: Call) -> list[Call]:
    """A call, or the two operators that are joined in it: their names, parameters and constants. Their operands stay joined."""
    both = next((names for names, run in JOINED.items() if run is call.run), None)
    if both is None:
        return [call]
    bare = {"attention", "attention_dgrad", "add"}
    return [
        replace(call, op=op, run=RUNNERS[op], **({"attrs": {}, "weight": None} if op in bare else {})) for op in both
    ]
