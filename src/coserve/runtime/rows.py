"""What operators see of a training window: its rows over an arena, and rotary embedding by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from coserve.kernels import attention, cuda_attention, library
from coserve.kernels.choose import packs_attention
from coserve.kernels.cuda_attention import KeyedRows, PackedCall
from coserve.kernels.reference import hash_key
from coserve.kernels.triton.attention_grads import window_grads
from coserve.kernels.triton.segments import SlotFactors
from coserve.model.architecture import Architecture
from coserve.ops.run import Factor, RowContext
from coserve.peft.adapter import Adapter
from coserve.runtime.sequences import packed_calls

FEW_ROWS = 512
"""Up to so many rows a unit takes as long as its launches. Then LoRA's products of q, k and v, which read and write what the
library's would, are better two launches than six; beyond, the library's larger tiles are."""

MOST_RANK = 64
"""The largest rank for which the same holds: tiles of these kernels have as many columns at most."""


class RotaryTable:
    """cos and sin by position, float-exact as Hugging Face computes them (in float32; float64 for float64 models).

    The first half of sin is negated, as the kernel wants it (`library.rope`).
    """

    def __init__(self, arch: Architecture, dtype: torch.dtype, device: torch.device) -> None:
        self.inv_freq = torch.tensor(arch.rope_inv_freq, dtype=torch.float32, device=device)
        self.scale, self.dtype = arch.rope_scaling, dtype
        self._cos = torch.empty(0, arch.head_dim, dtype=dtype, device=device)
        self._sin = self._cos

    def rows(self, positions_T: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """cos, sin [T, K] at `positions_T` (int64), all below `longest`."""
        self.reserve(longest)
        return self._cos[positions_T], self._sin[positions_T]

    def part(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """cos, sin [end - start, K] at the positions from `start` on: the table's own memory."""
        self.reserve(end)
        return self._cos[start:end], self._sin[start:end]

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, K], replaced when they grow."""
        return self._cos, self._sin

    def reserve(self, longest: int) -> None:
        """Makes the tables long enough for positions below `longest`."""
        if longest > self._cos.shape[0]:
            size = max(longest, 2 * self._cos.shape[0])
            angles = torch.outer(torch.arange(size, dtype=torch.float32, device=self.inv_freq.device), self.inv_freq)
            cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
            self._cos, self._sin = torch.cat((cos, cos), -1).to(self.dtype), torch.cat((-sin, sin), -1).to(self.dtype)


class TrainRows(RowContext):
    """Rows [start, end) of a micro-batch; `layer`, the arena's K and V and the accumulators are set before each program."""

    def __init__(
        self, adapter: Adapter | None, bounds: Sequence[tuple[int, int]], start: int, end: int,
        cos: Tensor, sin: Tensor, dropout_keys: Tensor, windows: Sequence[int | None],
        calls: dict[tuple[int, int], Mapping[int | None, PackedCall]] | None = None, slots: Tensor | None = None,
    ) -> None:
        """calls: attention's by window of the micro-batch, to which these rows' are added if they aren't there. slots: int32
        [end - start], all TRAINING, for kernels that compute several sites' products at once; None: the library is faster."""
        calls = {} if calls is None else calls
        self.adapter, self.bounds, self.start, self.end = adapter, bounds, start, end
        self.cos, self.sin, self.windows = cos, sin, windows
        self.dropout_keys = dropout_keys
        self._slots = slots
        self.layer = 0
        self.num_serving = 0
        self._packed: Mapping[int | None, PackedCall] | None = None
        if packs_attention(cos.device):
            if (start, end) not in calls:
                sequences = [KeyedRows(begin, first, last) for begin, first, last, _ in self._sequences()]
                calls[start, end] = packed_calls(dict.fromkeys(windows, sequences), cos.device)
            self._packed = calls[start, end]
        self.keys = self.values = cos
        self.d_keys = self.d_values = cos

    def segments(self, name: str) -> Iterable[tuple[slice, Factor]]:
        factor = self.adapter.factor(self.layer, name) if self.adapter is not None else None
        return () if factor is None else ((slice(None), factor),)

    def slot_factors(self, names: tuple[str, ...]) -> SlotFactors | None:
        if self._slots is None or self.adapter is None or len(names) < 2:  # of one site the library has as few launches
            return None
        own = [factor for name in names if (factor := self.adapter.factor(self.layer, name)) is not None]
        if len(own) < len(names) or any(min(factor.matrix.shape) > MOST_RANK for factor in own):
            return None
        return SlotFactors(
            self._slots, [None] * len(own), [factor.matrix for factor in own], [factor.scale for factor in own],
            [factor.center for factor in own],
        )

    def dropout_site(self, name: str) -> int:
        return site_key(self.layer, name)

    def _sequences(self) -> Iterable[tuple[int, int, int, slice]]:
        """(first row of the sequence, first and last of its rows in the window, those rows within the window)."""
        for begin, end in self.bounds:
            first, last = max(begin, self.start), min(end, self.end)
            if first < last:
                yield begin, first, last, slice(first - self.start, last - self.start)

    def attention(self, out: Tensor, lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> None:
        assert lse is not None
        width, window = self.cos.shape[-1], self.windows[self.layer]
        if self._packed is not None:
            call = self._packed[window]
            cuda_attention.attention(out, lse, q, self.keys, self.values, call, width=width, window=window)
            return
        for begin, first, last, rows in self._sequences():
            attention.attention(
                out[rows], lse[rows], q[rows], self.keys, self.values, width=width, begin=begin,
                first=first, last=last, window=window,
            )

    def attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        width, window = self.cos.shape[-1], self.windows[self.layer]
        if self._packed is not None:
            cuda_attention.attention_dgrad(
                d_q, self.d_keys, self.d_values, grad, q, self.keys, self.values, out, lse, self._packed[window],
                width=width, window=window,
            )
        for begin, first, last, rows in self._sequences() if self._packed is None else ():
            attention.attention_dgrad(
                d_q[rows], self.d_keys, self.d_values, grad[rows], q[rows], self.keys, self.values, out[rows], lse[rows],
                width=width, begin=begin, first=first, last=last, window=window,
            )
        d_k.copy_(self.d_keys[self.start : self.end])
        d_v.copy_(self.d_values[self.start : self.end])

    def rotary_attention_dgrad(
        self, d_q: Tensor, d_k: Tensor, d_v: Tensor, grad: Tensor, q: Tensor, out: Tensor, lse: Tensor,
        rotated: Sequence[Tensor], scale: float,
    ) -> None:
        shares = None
        if self._packed is not None and library.has_row_kernels(q):
            width, window = self.cos.shape[-1], self.windows[self.layer]
            call = self._packed[window]
            shares = cuda_attention.gradient_shares(
                grad, q, self.keys, self.values, out, lse, call, width=width, window=window
            )
            if shares is not None:
                sums = self.d_keys[call.keys], self.d_values[call.keys]
                window_grads(d_q, d_k, d_v, *sums, shares, self.cos, self.sin, scale)
        if shares is None:
            super().rotary_attention_dgrad(d_q, d_k, d_v, grad, q, out, lse, rotated, scale)


def site_key(layer: int, site: str) -> int:
    """Dropout key of a site: from the layer and the site's name, not from any order."""
    return hash_key(layer, *site.encode())
