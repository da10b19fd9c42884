"""The yardstick of the TPOT objective: the per-token time of transformers.generate on the same machine.

Owns: that measure. A generation of all tokens minus one of the first token alone, over the tokens between: TPOT as defined for
a request, without the prompt's time.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

REPEATS, BATCH, PROMPT_TOKENS, OUTPUT_TOKENS = 3, 8, 128, 64


def transformers_tpot_ms(directory: Path, *, dtype: torch.dtype, device: torch.device) -> float:
    """Milliseconds per output token and request, greedy, at a batch of random prompts: the median of REPEATS."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.to(device).eval()
    rng = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(model.config.vocab_size, (BATCH, PROMPT_TOKENS), generator=rng).to(device)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids_BS, attention_mask=torch.ones_like(ids_BS), do_sample=False, min_new_tokens=count, max_new_tokens=count,
                pad_token_id=0,
            )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    seconds(2)
    return median((seconds(OUTPUT_TOKENS) - seconds(1)) / (OUTPUT_TOKENS - 1) for _ in range(REPEATS)) * 1e3
