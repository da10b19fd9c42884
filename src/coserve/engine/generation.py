"""Generation for a fixed set of prompts: chunked prefill, then decoding together, until each one ends.

No admission, deadlines or preemption: the fused engine schedules requests; this is its smallest user of the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coserve.compiler.plan import ModelPlan
from coserve.compiler.program import Place, Storage
from coserve.config import SamplingConfig
from coserve.core import InvalidRequest
from coserve.engine.model import LoadedModel
from coserve.kernels import library
from coserve.peft.lora import LoraAdapter
from coserve.runtime.cache import PagedCache, PagedRows, RequestRows
from coserve.runtime.plans import serving_plan
from coserve.runtime.sampler import sample
from coserve.scheduler.blocks import BlockPool

BLOCK_TOKENS = 16
PREFILL_TOKENS = 512


@dataclass(slots=True)
class _Sequence:
    index: int
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)
    done: bool = False

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Generator:
    """Generates with the base or one adapter. Rows without an adapter in the same batch use the base."""

    def __init__(self, model: LoadedModel, adapter: LoraAdapter | None = None) -> None:
        self.model, self.adapter, self.arch = model, adapter, model.architecture
        self.plan: ModelPlan = serving_plan(self.arch, adapter, itemsize=model.weights.dtype.itemsize)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *, stop_ids: Sequence[int] | None = None,
        on_token: Callable[[int, int], None] = lambda index, token: None, use_adapter: Sequence[bool] | None = None,
    ) -> list[list[int]]:
        """Token ids after each prompt, ending with a stop id or after `max_tokens`.

        stop_ids: default the model's end-of-sequence ids. on_token(prompt index, token): called as tokens come.
        use_adapter: per prompt; default all True. Prompt i draws with seed `sampling.seed + i`. Raises InvalidRequest for an
        empty or too long prompt.
        """
        stops = frozenset(self.arch.eos_token_ids if stop_ids is None else stop_ids)
        sequences = [_Sequence(i, list(prompt)) for i, prompt in enumerate(prompts)]
        for sequence in sequences:
            self._check(sequence, sampling)
        adapters = [self.adapter if on else None for on in (use_adapter or [True] * len(sequences))]
        longest = max(len(s.prompt) for s in sequences) + sampling.max_tokens
        blocks = sum(-(-(len(s.prompt) + sampling.max_tokens) // BLOCK_TOKENS) for s in sequences)
        weights = self.model.weights
        pool = BlockPool(blocks, BLOCK_TOKENS)
        cache = PagedCache(self.arch, blocks, BLOCK_TOKENS, weights.dtype, weights.device)
        for sequence in sequences:
            pool.allocate(sequence.index, len(sequence.prompt) + sampling.max_tokens)

        def advance(batch: Sequence[tuple[_Sequence, int, int]]) -> Tensor:
            return self._forward(batch, cache, pool, adapters, longest)

        for sequence in sequences:
            logits = self._prefill(sequence, advance)
            self._commit(sequence, logits[-1], sampling, stops, on_token)
        while running := [s for s in sequences if not s.done]:
            logits = advance([(s, s.length - 1, s.length) for s in running])
            for row, sequence in enumerate(running):
                self._commit(sequence, logits[row], sampling, stops, on_token)
        for sequence in sequences:
            pool.free(sequence.index)
        pool.check_integrity()
        return [sequence.tokens for sequence in sequences]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T, vocabulary] logits of every position of one prompt, through the paged path."""
        sequence = _Sequence(0, list(token_ids))
        blocks = -(-len(token_ids) // BLOCK_TOKENS)
        pool = BlockPool(blocks, BLOCK_TOKENS)
        cache = PagedCache(self.arch, blocks, BLOCK_TOKENS, self.model.weights.dtype, self.model.weights.device)
        pool.allocate(0, len(token_ids))
        return self._forward([(sequence, 0, len(token_ids))], cache, pool, [self.adapter], len(token_ids), every_row=True)

    def _check(self, sequence: _Sequence, sampling: SamplingConfig) -> None:
        limit = self.arch.max_position_embeddings
        if not sequence.prompt:
            raise InvalidRequest("prompt: is empty; give at least one token", param="prompt")
        if len(sequence.prompt) + sampling.max_tokens > limit:
            raise InvalidRequest(
                f"prompt: {len(sequence.prompt)} tokens and max_tokens {sampling.max_tokens} exceed the model's {limit}; "
                "shorten one of them", param="max_tokens",
            )

    def _prefill(self, sequence: _Sequence, advance: Callable[[Sequence[tuple[_Sequence, int, int]]], Tensor]) -> Tensor:
        for start in range(0, len(sequence.prompt), PREFILL_TOKENS):
            logits = advance([(sequence, start, min(start + PREFILL_TOKENS, len(sequence.prompt)))])
        return logits

    def _commit(
        self, sequence: _Sequence, logits: Tensor, sampling: SamplingConfig, stops: frozenset[int],
        on_token: Callable[[int, int], None],
    ) -> None:
        token = sample(logits, replace(sampling, seed=sampling.seed + sequence.index), sequence.length)
        sequence.tokens.append(token)
        sequence.done = token in stops or len(sequence.tokens) == sampling.max_tokens
        on_token(sequence.index, token)

    def _forward(
        self, batch: Sequence[tuple[_Sequence, int, int]], cache: PagedCache, pool: BlockPool,
        adapters: Sequence[LoraAdapter | None], longest: int, *, every_row: bool = False,
    ) -> Tensor:
        """Runs tokens [start, end) of each sequence; logits of the last row of each (or of every row)."""
        weights, executor = self.model.weights, self.model.executor
        ids: list[int] = []
        positions: list[int] = []
        requests, last = [], []
        for sequence, start, end in batch:
            first = len(ids)
            ids += [*sequence.prompt, *sequence.tokens][start:end]
            positions += range(start, end)
            requests.append(RequestRows(first, len(ids), end, pool.table(sequence.index), adapters[sequence.index]))
            last.append(len(ids) - 1)
        device = weights.device
        cos, sin = executor.rotary.rows(torch.tensor(positions, device=device), longest)
        rows = PagedRows(requests, cache, cos, sin, self.arch.sliding_windows)
        hidden = weights.embedding[torch.tensor(ids, device=device)]
        following = torch.empty_like(hidden)
        for index, plan in enumerate(self.plan.layers):
            rows.layer = index
            ends = {Place.INPUT: hidden, Place.OUTPUT: following}

            def external(number: int, storage: Storage, ends: dict[Place, Tensor] = ends) -> Tensor:
                return ends[storage.place]

            executor.execute(plan.forward, index, rows, len(ids), external)
            hidden, following = following, hidden
        chosen = hidden if every_row else hidden[torch.tensor(last, device=device)]
        normed = torch.empty_like(chosen)
        library.rmsnorm(normed, chosen, weights.norm, self.arch.rms_norm_eps)
        logits = torch.empty(len(chosen), self.arch.vocab_size, dtype=normed.dtype, device=device)
        weights.head.logits(logits, normed)
        return logits
