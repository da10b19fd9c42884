"""From logits to tokens and their log-probabilities.

Owns: the order in which a request's sampling settings act, and the noise. Does not own: when a request ends, texts. A row of
logits goes through

    raw -> repetition penalty -> presence and frequency penalties -> logit_bias -> min_tokens -> grammar
        -> temperature -> top_k -> top_p -> min_p -> noise -> argmax

and a greedy row from there straight to the argmax. Log-probabilities are of the raw logits, as vLLM's are. Noise is keyed
by (seed, position) and rows share no arithmetic that rounds, so neither batching nor preemption changes a result. On CUDA what
follows min_tokens is in kernels (`kernels/triton/sampling.py`), which give the same tokens.

`launch` queues everything, `result` waits for it; other work may be queued in between.

Shapes: B rows (requests), T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coserve.config.settings import SamplingConfig
from coserve.core import Sampled, TokenLogprob
from coserve.kernels.choose import runs_triton
from coserve.kernels.reference import hash_key, hash_on, mix32
from coserve.kernels.triton import sampling as fused_sampling
from coserve.runtime.transfer import HostCopy, to_device

_GREEDY_BELOW = 1e-5
"""Temperatures below are greedy: float32 scores would overflow."""
_SHARE_UNIT = 2.0**40
"""top_p adds up whole multiples of 2^-40 of the best token's probability: sums of integers don't depend on their order."""
_MOST_TOKENS = 1 << 24
"""Of a vocabulary: the integers up to here are exact in float32."""
_MAX_ELEMENTS = 1 << 22
"""Sampling and log-probabilities take so many logits at a time, as they need several 8-byte copies of them."""


class Draws(NamedTuple):
    """What a request's settings say of all its rows, worked out once.

    plain_from: so many tokens of output, and nothing of its own changes the logits. packed: the row's `fused_sampling.Draw` as
    float64 numbers, with the hash of the seed alone as its key.
    """

    plain_from: float
    packed: bytes


class SamplerRow(NamedTuple):
    """What decides one row's token besides its logits.

    seed: sampling.seed + the output's index. position: tokens before the one sampled. prompt, output: the tokens so far, all
    below V. ending: the ids that min_tokens excludes. draws: of the settings and the seed, if they are known already. allowed:
    of a row with a grammar, a mask of V tokens (grammar/matcher.py), which heeds min_tokens itself and allows at least one.
    """

    sampling: SamplingConfig
    seed: int
    position: int
    prompt: Sequence[int]
    output: Sequence[int]
    ending: frozenset[int]
    draws: Draws | None = None
    allowed: np.ndarray | None = None


def draws_of(sampling: SamplingConfig, seed: int) -> Draws:
    """seed: as a SamplerRow's."""
    penalized = sampling.repetition_penalty != 1 or sampling.presence_penalty != 0 or sampling.frequency_penalty != 0
    plain_from = math.inf if penalized or sampling.logit_bias else sampling.min_tokens
    draw = fused_sampling.Draw(0, 0.0, 0, 1.0, -math.inf)
    if sampling.temperature >= _GREEDY_BELOW:
        log_min_p = math.log(sampling.min_p) if sampling.min_p else -math.inf
        draw = fused_sampling.Draw(hash_key(seed), sampling.temperature, sampling.top_k, sampling.top_p, log_min_p)
    return Draws(plain_from, np.array(draw, np.float64).tobytes())


class TokensUnderWay(NamedTuple):
    """Tokens under way. tokens: int64 [B] on the device. numbers: what the host will read: the tokens, then what
    `_measure` gives for each row of `asked` (row -> how many numbers)."""

    tokens: Tensor
    numbers: HostCopy
    asked: dict[int, int]


def sample_rows(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    """The next token of each row. Leaves `logits_BV` as they are; waits for the device once.

    A row with NaN gives the place of its first NaN.
    """
    return result(launch(logits_BV, rows))


def launch(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> TokensUnderWay:
    """Queues all work of `sample_rows` and the copy to the host, and waits for nothing. `logits_BV` may be written again by
    work that is queued later on the same stream."""
    assert logits_BV.shape[0] == len(rows)
    device = logits_BV.device
    fused = runs_triton(device) and len(rows) > 0
    tokens_B = _fused_tokens(logits_BV, rows) if fused else _tokens(logits_BV.float(), rows)
    parts = _sampled_logprobs(logits_BV, tokens_B, rows)
    numbers = torch.cat([tokens_B.float(), *parts.values()]) if parts else tokens_B
    return TokensUnderWay(tokens_B, HostCopy(numbers), {number: len(part) for number, part in parts.items()})


def result(launched: TokensUnderWay) -> list[Sampled]:
    """Waits until the tokens of `launch` are known."""
    count, numbers = launched.tokens.shape[0], launched.numbers.wait().tolist()
    if not launched.asked:
        return list(map(Sampled, numbers))
    tokens, first = [int(token) for token in numbers[:count]], count
    logprobs: dict[int, TokenLogprob] = {}
    for number, length in launched.asked.items():
        logprobs[number] = _token_logprob(tokens[number], numbers[first : first + length])
        first += length
    return [Sampled(token, logprobs.get(number)) for number, token in enumerate(tokens)]


def _tokens(raw_BV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """int64 [B] by PyTorch's operators."""
    edited_BV = _edited(raw_BV, rows)
    tokens_B = edited_BV.argmax(-1)
    drawn = [number for number, row in enumerate(rows) if row.sampling.temperature >= _GREEDY_BELOW]
    for chunk in _chunks(drawn, raw_BV.shape[1]):
        index = to_device(chunk, raw_BV.device)
        tokens_B[index] = _draw(edited_BV[index], [rows[number] for number in chunk])
    return tokens_B


def _fused_tokens(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """The same by two or three kernels, which read the logits in the model's dtype unless a request changes its own."""
    draws = _draws(rows)
    plain = all(_are_plain(rows, draws))
    if logits_BV.dtype not in fused_sampling.DTYPES or not plain:
        logits_BV = _edited(logits_BV.float(), rows)
    table, filtered = _settings(rows, draws)
    return fused_sampling.draw_tokens(logits_BV, to_device(table, logits_BV.device), filtered=filtered)


def _draws(rows: Sequence[SamplerRow]) -> list[Draws]:
    return [row.draws or draws_of(row.sampling, row.seed) for row in rows]


def _are_plain(rows: Sequence[SamplerRow], draws: Sequence[Draws]) -> list[bool]:
    """By row, whether the request's own settings, its grammar among them, leave its logits alone."""
    return [row.allowed is None and len(row.output) >= own.plain_from for row, own in zip(rows, draws, strict=True)]


def _settings(rows: Sequence[SamplerRow], draws: Sequence[Draws]) -> tuple[Tensor, bool]:
    """What the kernels read of each row, and whether any row has filters. draws: by row."""
    packed = bytearray().join([own.packed for own in draws])  # which NumPy may write to
    numbers = np.frombuffer(packed, np.float64).reshape(len(draws), -1)
    keys, noisy = numbers[:, 0].astype(np.int64), numbers[:, 1] > 0
    numbers[:, 0] = np.where(noisy, hash_on(keys, np.array([row.position for row in rows], np.int64)), 0)
    return fused_sampling.settings_table(numbers), fused_sampling.any_filtered(numbers)


class PromptUnderWay(NamedTuple):
    """Log-probabilities of a prompt's tokens under way. parts: what `_measure` gives for some rows each."""

    tokens: Sequence[int]
    parts: Sequence[HostCopy]


def prompt_logprobs(logits_TV: Tensor, next_tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Log-probability of next_tokens[t] by the logits of row t, and of that row's `count` likeliest tokens."""
    return prompt_result(launch_prompt(logits_TV, next_tokens, count))


def launch_prompt(logits_TV: Tensor, next_tokens: Sequence[int], count: int) -> PromptUnderWay:
    """Queues all work of `prompt_logprobs` and the copy to the host, and waits for nothing."""
    assert logits_TV.shape[0] == len(next_tokens)
    parts = []
    for chunk in _chunks(range(len(next_tokens)), logits_TV.shape[1]):
        start, end = chunk[0], chunk[-1] + 1
        tokens = to_device(next_tokens[start:end], logits_TV.device)
        parts.append(HostCopy(_measure(logits_TV[start:end].float(), tokens, count)))
    return PromptUnderWay(next_tokens, parts)


def prompt_result(launched: PromptUnderWay) -> list[TokenLogprob]:
    """Waits until the log-probabilities of `launch_prompt` are known."""
    measured = [row for part in launched.parts for row in part.wait().tolist()]
    return [_token_logprob(token, numbers) for token, numbers in zip(launched.tokens, measured, strict=True)]


def gumbel_noise(keys: Iterable[tuple[int, int]], size: int, device: torch.device) -> Tensor:
    """float32 [B, size] of standard Gumbel noise: a hash of each key, which is (seed, position), and of the index."""
    hashed_B1 = to_device([hash_key(seed, position) for seed, position in keys], device)[:, None]
    bits = mix32(mix32(torch.arange(size, device=device)) ^ hashed_B1)
    uniform = (bits.double() + 0.5) / 2**32
    return -torch.log(-torch.log(uniform)).float()


def _edited(raw_BV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """The logits after everything that acts before the temperature: a copy, if anything does."""
    plain = _are_plain(rows, _draws(rows))
    if all(plain):
        return raw_BV
    edited_BV = raw_BV.clone()
    for number, row in enumerate(rows):
        if not plain[number]:
            _edit(edited_BV[number], row)
    masked = [number for number, row in enumerate(rows) if row.allowed is not None]
    for chunk in _chunks(masked, raw_BV.shape[1]):
        _exclude(edited_BV, chunk, rows)
    return edited_BV


def _edit(logits_V: Tensor, row: SamplerRow) -> None:
    """Penalties, bias and exclusion of one row, in place. Ids of the bias or of endings outside the vocabulary do nothing."""
    sampling, device, size = row.sampling, logits_V.device, logits_V.shape[0]
    if sampling.repetition_penalty != 1:
        seen = to_device(torch.cat((_ids(row.prompt), _ids(row.output))), device)
        values = logits_V[seen]  # a token seen twice is written twice, with the same value
        logits_V[seen] = torch.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    if sampling.presence_penalty != 0 or sampling.frequency_penalty != 0:
        produced, counts = _ids(row.output).unique(return_counts=True)
        penalty = sampling.frequency_penalty * counts.float() + sampling.presence_penalty
        logits_V[to_device(produced, device)] -= to_device(penalty, device)
    biased = {token: value for token, value in sampling.logit_bias.items() if 0 <= token < size}
    if biased:
        logits_V[to_device(list(biased), device)] += to_device(torch.tensor(list(biased.values())), device)
    if len(row.output) < sampling.min_tokens and row.allowed is None:
        excluded = [token for token in row.ending if 0 <= token < size]
        logits_V.index_fill_(0, to_device(excluded, device), -torch.inf)


def _exclude(logits_BV: Tensor, numbers: Sequence[int], rows: Sequence[SamplerRow]) -> None:
    """Sets what their grammars don't allow to -inf in the numbered rows, in place. The masks come to the device as bits."""
    excluded = ~np.array([rows[number].allowed for number in numbers], np.int32).view(np.uint8)
    device, size = logits_BV.device, logits_BV.shape[1]
    if device.type == "cpu":
        bits_NV = torch.from_numpy(np.unpackbits(excluded, axis=1, count=size, bitorder="little"))
    else:
        bits_NV = unpacked(to_device(excluded, device), size)
    for number, excluded_V in zip(numbers, bits_NV.view(torch.bool), strict=True):
        logits_BV[number].masked_fill_(excluded_V, -torch.inf)


def unpacked(bytes_NB: Tensor, size: int) -> Tensor:
    """The first `size` bits of each row, the lowest bit of a byte first: uint8 [N, size] of 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bytes_NB.device)
    return ((bytes_NB[:, :, None] >> shifts) & 1).flatten(1)[:, :size].contiguous()


def _ids(tokens: Sequence[int]) -> Tensor:
    """On the host, where counting them makes no device wait."""
    return torch.as_tensor(tokens, dtype=torch.int64)


def _draw(logits_BV: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """int64 [B]: a draw from each row's filtered distribution, by the largest of scores with Gumbel noise."""
    device = logits_BV.device
    scores_BV = logits_BV / to_device(torch.tensor([[row.sampling.temperature] for row in rows]), device)
    filtered = [number for number, row in enumerate(rows) if row.sampling.top_k or row.sampling.top_p < 1 or row.sampling.min_p]
    if filtered:
        index = to_device(filtered, device)
        scores_BV[index] = _filter(scores_BV[index], [rows[number].sampling for number in filtered])
    return (scores_BV + gumbel_noise([(row.seed, row.position) for row in rows], scores_BV.shape[1], device)).argmax(-1)


def _filter(scores_BV: Tensor, samplings: Sequence[SamplingConfig]) -> Tensor:
    """Scores with what top_k, top_p and min_p exclude at -inf. Tokens as good as the k-th best stay; the best always does."""
    size = scores_BV.shape[1]
    wanted = [(min(c.top_k or size, size), c.top_p, math.log(c.min_p) if c.min_p else -math.inf) for c in samplings]
    limits = to_device(torch.tensor(wanted, dtype=torch.float64), scores_BV.device)
    top_k, top_p, log_min_p = limits.split(1, dim=-1)
    ordered, order = torch.sort(scores_BV, dim=-1, descending=True, stable=True)
    excluded = ordered < ordered.gather(-1, top_k.long() - 1)
    log_ratio = ordered.double() - ordered[:, :1].double()
    shares = (log_ratio.exp() * _SHARE_UNIT).masked_fill(excluded, 0).nan_to_num(0).long()
    reached = shares.cumsum(-1)
    enough = torch.where(top_p < 1, top_p * reached[:, -1:], torch.inf)
    excluded |= (reached - shares >= enough) | (log_ratio < log_min_p)
    excluded[:, 0] = False  # a row of NaN or infinities has no mass to share
    return scores_BV.masked_fill(torch.empty_like(excluded).scatter_(-1, order, excluded), -torch.inf)


def _sampled_logprobs(logits_BV: Tensor, tokens_B: Tensor, rows: Sequence[SamplerRow]) -> dict[int, Tensor]:
    """What `_measure` gives, by number of the row, of those that ask. Each is computed by itself, so that its neighbours don't
    change its rounding."""
    found: dict[int, Tensor] = {}
    for number, row in enumerate(rows):
        if row.sampling.logprobs is not None:
            only = slice(number, number + 1)
            found[number] = _measure(logits_BV[only].float(), tokens_B[only], row.sampling.logprobs)[0]
    return found


def _measure(logits_TV: Tensor, tokens_T: Tensor, count: int) -> Tensor:
    """float32 [T, 2 + 2 * count]: the token's logit, the logarithm of the exponentials' sum, the best logits, their ids.

    logits_TV: float32. tokens_T: int64, on the same device. Ids are exact in float32, as V is below 2^24.
    """
    assert logits_TV.shape[1] <= _MOST_TOKENS
    own = logits_TV.gather(-1, tokens_T[:, None])
    best = logits_TV.topk(min(count, logits_TV.shape[1]), dim=-1)
    parts = (own, logits_TV.logsumexp(-1, keepdim=True), best.values, best.indices)
    return torch.cat([part.float() for part in parts], dim=-1)


def _token_logprob(token: int, measured: Sequence[float]) -> TokenLogprob:
    own, log_sum, *rest = measured
    values, ids = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    best = sorted(zip(values, ids, strict=True), key=lambda pair: (-pair[0], pair[1]))
    return TokenLogprob(int(token), own - log_sum, tuple((int(index), value - log_sum) for value, index in best))


def _chunks(numbers: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    """Runs of rows that have at most _MAX_ELEMENTS logits together, each row with `size`."""
    step = max(1, _MAX_ELEMENTS // size)
    return (numbers[start : start + step] for start in range(0, len(numbers), step))
