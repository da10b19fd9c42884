"""Rotary embeddings, forward and back: one call for q and k side by side, and one with the attention that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coserve.compiler.draft import DraftStep
from coserve.compiler.program import Call, Slot
from coserve.ops.run import JOINED


def join_turns(calls: Sequence[Call], slots: Sequence[Slot]) -> list[Call]:
    """Joins rotary embeddings of q and k with the attention behind them, and their gradients with attention's before them."""
    joined: list[Call] = []
    for call in calls:
        turns = _turns(joined, "rope", call.ins[:2], slots) if call.op == "attention" else ()
        if turns:
            del joined[-len(turns) :]
            ins = (*call.ins, *(number for turn in turns for number in turn.outs))
            call = replace(call, run=JOINED["rope", "attention"], attrs=turns[0].attrs, ins=ins)
        joined.append(call)
        before = next((n for n in (-2, -3) if len(joined) >= -n and joined[n].op == "attention_dgrad"), 0)
        turns = _turns(joined[before + 1 :], "rope_dgrad", joined[before].outs[:2], slots) if before else ()
        if before and len(turns) == -1 - before:
            outs = (*joined[before].outs, *(number for turn in turns for number in turn.outs))
            first = replace(joined[before], run=JOINED["attention_dgrad", "rope_dgrad"], attrs=turns[0].attrs, outs=outs)
            joined[before:] = [first]
    return joined


def _turns(calls: Sequence[Call], op: str, heads: Sequence[int], slots: Sequence[Slot]) -> Sequence[Call]:
    """The last calls, if they are rotary embeddings in place of all of q and k (`heads`) and of nothing else: one call where
    these lie side by side, else two."""
    q, k = (slots[number] for number in heads)
    side_by_side = Slot(q.storage, q.column, q.width + k.width)
    for count, wanted in ((1, {side_by_side}), (2, {q, k})):
        turns = calls[-count:]
        in_place = all(turn.op == op and turn.outs == turn.ins and turn.attrs == turns[0].attrs for turn in turns)
        if len(turns) == count and in_place and {slots[turn.outs[0]] for turn in turns} == wanted:
            return turns
    return ()


def beside(previous: DraftStep | None, step: DraftStep, slots: Mapping[str, Slot]) -> Slot | None:
    """The columns of two rotary embeddings in place, one beside the other: they are one operation per head."""
    node = step.node
    if previous is None or node.op not in ("rope", "rope_dgrad"):
        return None
    if (previous.node.op, previous.node.attrs) != (node.op, node.attrs):
        return None
    both = slots[previous.outputs[0]], slots[step.outputs[0]]
    in_place = both == (slots[previous.node.inputs[0]], slots[node.inputs[0]])
    first, second = sorted(both, key=lambda slot: slot.column)
    if not in_place or first.storage != second.storage or first.column + first.width != second.column:
        return None
    return Slot(first.storage, first.column, first.width + second.width)
