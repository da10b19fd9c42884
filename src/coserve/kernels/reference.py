"""The specification of every kernel in plain, differentiable PyTorch.

T rows (packed tokens), D features, H query heads, G key-value heads, K head width, R rank, V vocabulary.
Nothing here is fast; autograd through these functions is the oracle for `library.py` and, through the torch vocabulary of
`ops`, for the whole decoder. Dropout's hash is shared, since it is the definition itself.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def rmsnorm(x_TD: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over groups of `weight.numel()` features: a whole row, or each head of it."""
    group = weight.shape[0]
    grouped = x_TD.unflatten(-1, (-1, group))
    scale = torch.rsqrt(grouped.square().mean(-1, keepdim=True) + eps)
    return (grouped * scale * weight).flatten(-2)


def rope(x_TD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary embedding of each head, half-split layout (Hugging Face's and NeoX's)."""
    head = cos_TK.shape[-1]
    x_THK = x_TD.unflatten(-1, (-1, head))
    half_1, half_2 = x_THK.chunk(2, dim=-1)
    turned = torch.cat((-half_2, half_1), dim=-1)
    return (x_THK * cos_TK[:, None] + turned * sin_TK[:, None]).flatten(-2)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU's product: silu(gate) * up."""
    return torch.nn.functional.silu(gate) * up


def attention_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """Boolean [queries, keys], True where a query may look; the last query sits on the last key."""
    query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
    key = torch.arange(num_keys, device=device)[None, :]
    allowed = key <= query
    return allowed if window is None else allowed & (key > query - window)


def attention(
    q_THK: Tensor, k_SGK: Tensor, v_SGK: Tensor, *, window: int | None = None
) -> tuple[Tensor, Tensor]:
    """Causal attention of one sequence's last T tokens over all its S tokens.

    Returns the output [T, H, K] and the log-sum-exp of the scaled scores [T, H]. `window`: sliding window, in tokens.
    """
    num_queries, heads, width = q_THK.shape
    share = heads // k_SGK.shape[1]
    k_SHK, v_SHK = (t.repeat_interleave(share, dim=1) for t in (k_SGK, v_SGK))
    scores = torch.einsum("thk,shk->hts", q_THK, k_SHK) / math.sqrt(width)
    mask = attention_mask(num_queries, k_SGK.shape[0], window, q_THK.device)
    scores = scores.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    return torch.einsum("hts,shk->thk", torch.exp(scores - lse[..., None]), v_SHK), lse.transpose(0, 1)


Bits = TypeVar("Bits", Tensor, np.ndarray, int)


def mix32(x: Bits) -> Bits:
    """A 32-bit integer hash with good avalanche (two rounds of xor-shift and multiply), on integers, or int64 tensors or
    arrays, of [0, 2^32)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _MASK32
    return x ^ (x >> 16)


def hash_key(*counters: int) -> int:
    """One 32-bit key from any integers; the order of the counters matters."""
    key = 0
    for counter in counters:
        key = hash_on(key, counter)
    return key


def hash_on(key: Bits, counter: Bits) -> Bits:
    """The key of one more counter behind those of `key`: `hash_key` goes on by it."""
    low, high = counter & _MASK32, (counter >> 32) & _MASK32
    return mix32(mix32(key ^ low) ^ high ^ 0x9E3779B9)


def dropout_keep(row_keys_T: Tensor, site_key: int, num_features: int, p: float, first_feature: int = 0) -> Tensor:
    """Boolean [T, num_features]: True where a feature stays, with probability 1 - p.

    A hash of counters: row_keys_T (int64, one per token, from seed, step, example and token), the site's key and the
    feature's number, from `first_feature` on. The mask so depends on nothing else: not on the split, the device or the order
    of work.
    """
    features = torch.arange(first_feature, first_feature + num_features, device=row_keys_T.device) * 0x9E3779B1 & _MASK32
    rows = mix32(row_keys_T ^ site_key)
    return mix32(rows[:, None] ^ mix32(features)[None, :]) >= int(p * 2**32)


def dropout(x_TD: Tensor, row_keys_T: Tensor, site_key: int, p: float) -> Tensor:
    """Inverted dropout by `dropout_keep`."""
    return x_TD * dropout_keep(row_keys_T, site_key, x_TD.shape[-1], p) / (1 - p)
