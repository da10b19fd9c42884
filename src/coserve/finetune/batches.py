"""Which examples an optimizer step gets, and how they are packed: pure functions of the step number and the seed.

So a resumed job gets exactly the batches of an uninterrupted one, and no generator state needs to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coserve.config.settings import FinetuneConfig
from coserve.config.values import settled
from coserve.core import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOrder:
    """The order of `num_groups` groups over epochs, `batch_size` groups per step. An epoch's last step may have fewer."""

    num_groups: int
    batch_size: int
    seed: int
    shuffle: bool

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_groups / self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The indices of the groups of step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = np.arange(self.num_groups)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.num_groups)
        return order[within * self.batch_size : (within + 1) * self.batch_size].tolist()

    def num_steps(self, config: FinetuneConfig) -> int:
        """The number of optimizer steps of the whole job."""
        if config.max_steps is not None:
            return config.max_steps
        return max(1, math.ceil(settled(config.epochs) * self.steps_per_epoch))


def pack_groups(groups: Sequence[Group], max_tokens: int) -> list[list[Group]]:
    """Packs groups into micro-batches of at most `max_tokens` tokens by first fit, longest first. A group is never split."""
    bins: list[list[Group]] = []
    space: list[int] = []
    for group in sorted(groups, key=lambda g: (-g.num_tokens, g.index)):
        for number, free in enumerate(space):
            if group.num_tokens <= free:
                bins[number].append(group)
                space[number] -= group.num_tokens
                break
        else:
            bins.append([group])
            space.append(max_tokens - group.num_tokens)
    return bins
