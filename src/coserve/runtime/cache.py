"""The memory that the key-value cache and training arenas share: one buffer of blocks.

    block 0 | block 1 | ...                                     ... | arena of a micro-batch |
    key-value blocks, lowest first  -->                         <--   contiguous, from the top

A block holds `block_tokens` tokens of all layers, so that any run of blocks is a run of bytes. Seen as rows of
[block_tokens * K]:  row ((block * L + layer) * 2 + kv) * G + g  holds head g's keys (kv = 0) or values (kv = 1).

S context tokens, G key-value heads, K head width, L layers. Which block is whose is the scheduler's business (blocks.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from coserve.core import BlockMove
from coserve.kernels.library import has_row_kernels
from coserve.kernels.native import kernels_for
from coserve.kernels.triton.rows import rotary_write
from coserve.model.architecture import Architecture
from coserve.runtime.transfer import to_device


def block_bytes(arch: Architecture, block_tokens: int, itemsize: int) -> int:
    """Bytes of one block: K and V of all layers."""
    return arch.num_layers * 2 * arch.num_kv_heads * block_tokens * arch.head_dim * itemsize


class KeyValuePool:
    """rows: [blocks * L * 2 * G, block_tokens * K], in the model's dtype.

    On CUDA one block more lies behind the others, `scratch`: padding rows of captured batches write there.
    """

    def __init__(
        self, arch: Architecture, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_layers, self.kv_heads, self.width = arch.num_layers, arch.num_kv_heads, arch.head_dim
        self.num_blocks, self.block_tokens = num_blocks, block_tokens
        self.block_bytes = block_bytes(arch, block_tokens, dtype.itemsize)
        self.scratch = num_blocks if device.type == "cuda" else None
        held = num_blocks + (self.scratch is not None)
        self.buffer = torch.empty(held * self.block_bytes, dtype=torch.uint8, device=device)
        self.rows = self.buffer.view(dtype).view(-1, block_tokens * self.width)
        self.has_row_kernels = has_row_kernels(self.rows)
        """Whether `rotary_write` runs on the pool's device."""
        self._tokens = self.rows.view(-1, self.width)
        self._blocks = self.buffer.view(torch.int64).view(held, -1)
        """A row per block. Wide elements, as a fill takes a time by the element."""
        self._gathered = self.rows.new_empty(2, 0, self.rows.shape[1])
        self._heads = torch.arange(self.kv_heads, device=device)
        step = self.kv_heads * block_tokens
        self._layers = [self._tokens[half * step :] for half in range(2 * self.num_layers)]
        """Memory from a layer's keys on, then from its values on, as rows of K elements; layer by layer."""
        self._layer_blocks = [self.rows[half * self.kv_heads :] for half in range(2 * self.num_layers)]
        """The same as rows of a block's tokens."""

    def release(self) -> None:
        """Gives the memory back; nothing may use the pool any more."""
        self.buffer, self.rows, self._tokens, self._blocks, self._gathered = (
            tensor.new_empty(0) for tensor in (self.buffer, self.rows, self._tokens, self._blocks, self._gathered)
        )
        self._layers.clear()
        self._layer_blocks.clear()

    @property
    def layer_rows(self) -> int:
        """Rows of one layer within a block; its values begin in the middle."""
        return 2 * self.kv_heads

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes blocks before their first token: what a block held before must not reach anyone, NaN least of all."""
        if blocks:
            self._blocks.index_fill_(0, to_device(blocks, self.buffer.device), 0)

    def move(self, moves: Iterable[BlockMove]) -> None:
        """Copies blocks, in order."""
        for source, target in moves:
            self._blocks[target].copy_(self._blocks[source])

    def arena(self, first: int, end: int) -> Tensor:
        """The bytes of blocks [first, end)."""
        return self.buffer[first * self.block_bytes : end * self.block_bytes]

    def token_rows(self, blocks_T: Tensor, offsets_T: Tensor) -> Tensor:
        """int64 [T * G]: where head by head the keys of tokens at (block, offset) lie in layer 0, in rows of K elements."""
        return self.head_rows(blocks_T * self.token_stride + offsets_T)

    @property
    def token_stride(self) -> int:
        """Rows of K elements from a block to the next."""
        return self.num_layers * self.layer_rows * self.block_tokens

    def head_rows(self, places_T: Tensor) -> Tensor:
        """`token_rows` of int64 [T], each token's block times `token_stride` plus its offset in the block."""
        return (places_T[:, None] + self._heads * self.block_tokens).flatten()

    def write(self, layer: int, token_rows: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores k and v [T, G * K] at `token_rows`."""
        if (compiled := kernels_for(k)) is not None:
            compiled.write_cache(self._layers[2 * layer], self._layers[2 * layer + 1], token_rows, k, v, self.width)
            return
        self._layers[2 * layer].index_copy_(0, token_rows, k.reshape(-1, self.width))
        self._layers[2 * layer + 1].index_copy_(0, token_rows, v.reshape(-1, self.width))

    def rotary_write(
        self, layer: int, token_rows: Tensor, q: Tensor, k: Tensor, v: Tensor, cos_TK: Tensor, sin_TK: Tensor, scale: float,
        dense: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Rotates q [T, H * K] and k [T, G * K] in place and stores k and v: one launch, where `has_row_kernels`.

        token_rows: of the first rows, which go to the pool. dense: where keys and values of the others go, [others, G * K].
        """
        rotary_write(
            q, k, v, cos_TK, sin_TK, scale, cache_keys=self._layers[2 * layer], cache_values=self._layers[2 * layer + 1],
            token_rows=token_rows, dense=dense,
        )

    def block_rows(self, blocks: Tensor) -> Tensor:
        """int64 [..., G, n] from int64 blocks [..., n]: rows of the blocks' keys in layer 0."""
        return blocks.unsqueeze(-2) * (self.num_layers * self.layer_rows) + self._heads[:, None]

    def value_rows(self, block_rows: Tensor, share: int) -> Tensor:
        """int32 [n, G, share, S]: where in `values` the tokens of `block_rows` [n, G, blocks] lie, once per query head."""
        rows = block_rows.unsqueeze(-1) * self.block_tokens + torch.arange(self.block_tokens, device=block_rows.device)
        return rows.flatten(-2).int().unsqueeze(-2).expand(-1, -1, share, -1).contiguous()

    def values(self, layer: int) -> Tensor:
        """Memory from the values of `layer` on, as rows of K elements."""
        return self._layers[2 * layer + 1]

    def keys(self, layer: int, block_rows: Tensor) -> Tensor:
        """Keys [..., G, n * block_tokens, K] of `block_rows` [..., G, n]; valid until the next call."""
        return self._select(0, layer, block_rows)

    def gather(self, layer: int, block_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., G, n * block_tokens, K] of `block_rows` [..., G, n]; valid until the next call."""
        return self.keys(layer, block_rows), self._select(1, layer, block_rows)

    def _select(self, kv: int, layer: int, block_rows: Tensor) -> Tensor:
        """A layer's keys (kv = 0) or values (kv = 1) of `block_rows` [..., G, n], copied to scratch memory."""
        if block_rows.numel() > self._gathered.shape[1]:
            self._gathered = self.rows.new_empty(2, block_rows.numel(), self.rows.shape[1])
        found = self._gathered[kv, : block_rows.numel()]
        torch.index_select(self._layer_blocks[2 * layer + kv], 0, block_rows.flatten(), out=found)
        return found.view(*block_rows.shape[:-1], block_rows.shape[-1] * self.block_tokens, self.width)
