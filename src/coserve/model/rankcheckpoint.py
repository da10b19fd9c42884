"""One rank's part of a checkpoint, read as if it were a checkpoint of its own. What other ranks have is never read.

Owns: which rows and columns of every tensor a rank has. Does not own: files (checkpoint.py), products (linear.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from coserve.model.checkpoint import EMBEDDING, HEAD, Checkpoint
from coserve.model.decoder import MODULE_PATHS, ROW_SITES, column_parts, linear_shapes, rank_architecture

_SITES = {path: site for site, path in MODULE_PATHS.items()}


class TokenRange(NamedTuple):
    """The tokens [first, end) of the vocabulary whose rows a rank has, of `size` that each rank has room for."""

    first: int
    end: int
    size: int

    @classmethod
    def of(cls, vocab_size: int, rank: int, num_ranks: int) -> TokenRange:
        """A rank's share; the last ranks may have fewer tokens than there is room for, or none."""
        size = -(-vocab_size // num_ranks)
        first = min(rank * size, vocab_size)
        return cls(first, min(first + size, vocab_size), size)


class RankCheckpoint:
    """What `load_weights` reads, for rank number `rank` of `size`. architecture: the rank's own. Raises ConfigError for a
    number of ranks that can't share the model."""

    def __init__(self, checkpoint: Checkpoint, rank: int, size: int) -> None:
        self.whole, self.rank, self.size = checkpoint, rank, size
        self.architecture = rank_architecture(checkpoint.architecture, size)
        self.tokens = TokenRange.of(checkpoint.architecture.vocab_size, rank, size)

    def read(self, name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The rank's part of one tensor, as `Checkpoint.read`. A bias that is added to a sum over ranks is 0 on all but the
        first."""
        if name in (EMBEDDING, HEAD):
            return self.whole.read(name, dtype, device, (slice(self.tokens.first, self.tokens.end),))
        module, _, kind = name.removeprefix("model.layers.").partition(".")[2].rpartition(".")
        site = _SITES.get(module)
        if site is None:
            return self.whole.read(name, dtype, device)
        if site not in ROW_SITES:
            return self.whole.read(name, dtype, device, (self._share(site, 0),))
        if kind == "weight":
            return self.whole.read(name, dtype, device, (slice(None), self._share(site, 1)))
        bias = self.whole.read(name, dtype, device)
        return bias if self.rank == 0 else bias.zero_()

    def row_magnitudes(self, name: str, device: torch.device | str = "cpu") -> Tensor | None:
        """The largest magnitude of each row of a matrix, float32 [out, 1], over all ranks' parts of it; None for a matrix of
        which a rank has whole rows."""
        module = name.removeprefix("model.layers.").partition(".")[2].rpartition(".")[0]
        if _SITES.get(module) not in ROW_SITES:
            return None
        return self.whole.read(name, torch.float32, device).abs_().amax(1, keepdim=True)

    def _share(self, site: str, axis: int) -> slice:
        """The rank's features of a site's output (axis 0) or input (axis 1)."""
        arch = self.whole.architecture
        parts = column_parts(arch.num_kv_heads, site, self.size) if axis == 0 else self.size
        width, number = linear_shapes(arch)[site][axis] // parts, self.rank * parts // self.size
        return slice(number * width, (number + 1) * width)
