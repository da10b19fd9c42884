"""From logits to tokens. Noise is keyed by (request seed, position), so batching never changes a result."""

from __future__ import annotations

import torch
from torch import Tensor

from coserve.config import SamplingConfig
from coserve.kernels.reference import hash_key, mix32


def gumbel_noise(seed: int, position: int, size: int, device: torch.device) -> Tensor:
    """float32 [size] of standard Gumbel noise: a hash of seed, position and index."""
    bits = mix32(mix32(torch.arange(size, device=device)) ^ hash_key(seed, position))
    uniform = (bits.double() + 0.5) / 2**32
    return -torch.log(-torch.log(uniform)).float()


def _filtered(logits_V: Tensor, config: SamplingConfig) -> Tensor:
    """Logits with what top-k and top-p exclude at -inf."""
    if config.top_k and config.top_k < logits_V.shape[0]:
        floor = torch.topk(logits_V, config.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < floor, -torch.inf)
    if config.top_p < 1:
        ordered, order = torch.sort(logits_V, descending=True)
        mass = torch.softmax(ordered, -1).cumsum(-1)
        beyond = torch.cat((mass.new_zeros(1, dtype=torch.bool), mass[:-1] >= config.top_p))
        logits_V = logits_V.masked_fill(torch.zeros_like(beyond).scatter(0, order, beyond), -torch.inf)
    return logits_V


def sample(logits_V: Tensor, config: SamplingConfig, position: int) -> int:
    """The next token of one request at `position` (tokens before it)."""
    if config.temperature == 0:
        return int(logits_V.argmax())
    scores = _filtered(logits_V.float() / config.temperature, config)
    return int((scores + gumbel_noise(config.seed, position, scores.shape[0], scores.device)).argmax())
