"""Generation for a fixed set of prompts, without latency objectives or jobs. Each call makes an engine of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from coserve.config.settings import EngineConfig, SamplingConfig, SchedulerConfig
from coserve.config.values import BEST_EFFORT, MAX_RANK
from coserve.core import InvalidRequest
from coserve.engine.engine import Engine
from coserve.engine.requests import Chunk
from coserve.peft.adapter import Adapter
from coserve.runtime.cache import block_bytes
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from coserve.scheduler.latency import LatencyModel

BLOCK_TOKENS = 16
PREFILL_TOKENS = 512
_ADAPTER = "adapter"


class Generator:
    """Generates with the base model, or with one adapter: in memory, or where several ranks share the model, in a directory."""

    def __init__(self, model: LoadedModel, adapter: Adapter | Path | None = None) -> None:
        self.model, self.adapter, self.arch = model, adapter, model.architecture

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, *,
        on_token: Callable[[int, int], None] = lambda index, token: None,
    ) -> list[list[int]]:
        """The token ids that follow each prompt, up to and including a stop id, or `max_tokens` of them.

        on_token(prompt index, token): called for each token. Prompt i is sampled with seed `sampling.seed + i`. Raises
        InvalidRequest for an empty or too long prompt.
        """
        with contextlib.closing(self._engine([len(prompt) + sampling.max_tokens for prompt in prompts])) as engine:
            return self._generate(engine, prompts, sampling, on_token)

    def _generate(
        self, engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, on_token: Callable[[int, int], None]
    ) -> list[list[int]]:
        handles = []
        for index, prompt in enumerate(prompts):
            adapter = None if self.adapter is None else _ADAPTER
            handle = engine.submit(prompt, replace(sampling, seed=sampling.seed + index), adapter=adapter)

            def notify(chunk: Chunk, index: int = index) -> None:
                for token in chunk.token_ids:
                    on_token(index, token)

            handle.listen(notify)
            handles.append(handle)
        while engine.step():
            pass
        for handle in handles:
            if handle.error is not None:
                raise handle.error
        engine.blocks.check_integrity()
        return [handle.token_ids for handle in handles]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits at every position of one prompt, [T, vocabulary], computed over the paged key-value cache."""
        engine = self._engine([len(token_ids)])
        engine.blocks.allocate(0, len(token_ids))
        slot = None if self.adapter is None else engine.adapters.claim(engine.adapters.acquire(_ADAPTER))
        span = RowSpan(0, len(token_ids), engine.blocks.table(0), NO_ADAPTER if slot is None else slot)
        with torch.no_grad():
            engine.device.run_pass(token_ids, [], [span], None)
            return engine.device.logits(range(len(token_ids)))

    def _engine(self, lengths: Sequence[int]) -> Engine:
        """An engine with memory for sequences of these lengths, all at once."""
        limit = self.arch.max_position_embeddings
        if max(lengths) > limit:
            raise InvalidRequest(
                f"prompt: {max(lengths)} tokens with max_tokens exceed the model's {limit}; shorten one of them",
                param="max_tokens",
            )
        blocks = sum(-(-length // BLOCK_TOKENS) for length in lengths)
        size = block_bytes(self.model.weights.architecture, BLOCK_TOKENS, self.model.weights.dtype.itemsize)
        scheduler = SchedulerConfig(
            policy="inference-only", tpot_ms=BEST_EFFORT, ttft_ms=BEST_EFFORT, max_num_seqs=len(lengths),
            max_num_batched_tokens=max(PREFILL_TOKENS, len(lengths)),
        )
        rank = max(1, self.adapter.rank) if isinstance(self.adapter, Adapter) else MAX_RANK
        config = EngineConfig(
            scheduler=scheduler, memory_bytes=blocks * size, inference_share=1.0, block_tokens=BLOCK_TOKENS, max_lora_rank=rank
        )
        engine = Engine(self.model, config, latency=LatencyModel({}))  # without objectives no times need to be predicted
        if isinstance(self.adapter, Adapter):
            engine.add_adapter(_ADAPTER, self.adapter)
        elif self.adapter is not None:
            engine.load_adapter(_ADAPTER, self.adapter)
        return engine
