"""What requests and the finetuning job are made of: random words of stated token counts.

Owns: prompts and the training file. Words are tokens of the model's own vocabulary, so that lengths are what was asked for and
nothing is cached between requests.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from coserve.config.settings import FinetuneConfig, OptimizerConfig

NUM_WORDS = 2000
RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
"""Of LoRA on all linears of the layers, where coserve and others train the same adapter."""


class Tokenizer(Protocol):
    """What is needed of coserve.text.tokenizer.ChatTokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


def word_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Up to NUM_WORDS ids [n] that are a word with a space before it; any ids, where the vocabulary has no such."""
    found = []
    for token in np.random.default_rng(0).permutation(tokenizer.vocab_size):
        text = tokenizer.decode([int(token)])
        if re.fullmatch(r" [a-z]{2,}", text) and tokenizer.encode(text) == [token]:
            found.append(int(token))
            if len(found) == NUM_WORDS:
                break
    return np.array(found if len(found) >= 16 else range(tokenizer.vocab_size), dtype=np.int64)


def prompts(ids: np.ndarray, seed: Sequence[int]) -> Callable[[int], list[int]]:
    """A source of random prompts: token ids of the asked length, each time others."""
    rng = np.random.default_rng(list(seed))
    return lambda length: [int(token) for token in rng.choice(ids, length)]


def write_training_file(path: Path, tokenizer: Tokenizer, ids: np.ndarray, *, mean_tokens: int, count: int, seed: int) -> Path:
    """JSON Lines of plain text; lengths are uniform between half and one and a half times the mean."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(max(2, mean_tokens // 2), mean_tokens + mean_tokens // 2 + 1, count)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = (tokenizer.decode([int(token) for token in rng.choice(ids, int(length))]) for length in lengths)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def endless_job(batch_size: int, max_microbatch_tokens: int) -> FinetuneConfig:
    """A job that trains for as long as it is let: fixed accumulation, no checkpoints."""
    return FinetuneConfig(
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="constant"), max_steps=1_000_000, batch_size=batch_size,
        max_microbatch_tokens=max_microbatch_tokens, too_long="truncate", checkpoint_steps=0,
    )
