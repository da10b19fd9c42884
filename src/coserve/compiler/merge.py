"""Frozen linears whose matrices lie in one: one product of them instead of several, forward and backward.

    q, k, v = x W_q^T, x W_k^T, x W_v^T       ->   [q k v] = x [W_q W_k W_v]^T
    d_x += d_q W_q + d_k W_k + d_v W_v        ->   d_x += [d_q d_k d_v] [W_q W_k W_v]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from coserve.compiler.draft import Draft, DraftStep
from coserve.compiler.graph import Element, Node


def merge_linears(merged: Mapping[str, tuple[str, ...]], draft: Draft) -> Draft:
    """Makes one step of frozen linears of one input that lie in one matrix, if all their outputs go to the same place."""
    steps, kept = list(draft.steps), draft.kept_roots
    for name, sites in merged.items():
        group = [s for s in steps if s.node.op == "linear" and s.node.weight in sites and s.base is None]
        if len(group) != len(sites) or len({s.node.inputs for s in group}) != 1:
            continue
        if len({draft.root(s.outputs[0]) in kept for s in group}) != 1:
            continue
        outputs = tuple(s.outputs[0] for s in sorted(group, key=lambda s: sites.index(s.node.weight or "")))
        steps[steps.index(group[0])] = DraftStep(Node("linear", group[0].node.inputs, outputs, name), outputs)
        for step in group[1:]:
            steps.remove(step)
    return replace(draft, steps=tuple(steps))


def merge_dgrads(merged: Mapping[str, tuple[str, ...]], draft: Draft) -> Draft:
    """Makes one step of the input gradients of such linears, if they are added up in one place: it stands where the last of
    them stood. The output gradients come to lie side by side."""
    for name, sites in merged.items():
        group = [n for n, s in enumerate(draft.steps) if s.node.op == "linear_dgrad" and s.node.weight in sites]
        grads = tuple(
            draft.steps[n].node.inputs[0] for n in sorted(group, key=lambda n: sites.index(draft.steps[n].node.weight or ""))
        )
        if len(group) == len(sites) and _can_lie_together(draft, grads, group[-1]) and _is_sum(draft, group):
            draft = _merge_group(draft, group, name, grads)
    return draft


def _can_lie_together(draft: Draft, grads: Sequence[str], last: int) -> bool:
    """Whether values may share a storage, and are all still there before step `last`."""
    roots = [draft.root(name) for name in grads]
    taken = {*draft.slots, *draft.kept_roots, *(draft.root(name) for group in draft.beside for name in group)}
    if len({*roots}) < len(roots) or taken & {*roots}:
        return False
    if any(draft.values[root].element is not Element.MODEL for root in roots):
        return False
    written = {draft.root(name): name for step in draft.steps[:last] for name in step.outputs}
    return all(written.get(root) == name for root, name in zip(roots, grads, strict=True))


def _is_sum(draft: Draft, group: Sequence[int]) -> bool:
    """Whether everything that happens to the memory of a group's outputs, from its first step to its last, is adding to it."""
    total = draft.root(draft.steps[group[0]].outputs[0])
    for number in range(group[0], group[-1] + 1):
        step = draft.steps[number]
        if any(draft.root(name) == total for name in step.inputs):
            return False
        if any(draft.root(name) == total for name in step.outputs) and step.base is None and number != group[0]:
            return False
    return all(draft.root(draft.steps[number].outputs[0]) == total for number in group)


def _merge_group(draft: Draft, group: Sequence[int], name: str, grads: tuple[str, ...]) -> Draft:
    *dropped, last = group
    before: dict[str | None, str | None] = {}
    """By the sum that a dropped step would have left: the one that is there instead. None: nothing yet."""
    steps: list[DraftStep] = []
    for number, step in enumerate(draft.steps):
        base = before.get(step.base, step.base)
        if number in dropped:
            before[step.outputs[0]] = base
        elif number == last:
            steps.append(DraftStep(Node("linear_dgrad", grads, step.outputs, name), step.outputs, base))
        else:
            steps.append(step if base == step.base else replace(step, base=base))
    return replace(draft, steps=tuple(steps), beside=(*draft.beside, grads))
