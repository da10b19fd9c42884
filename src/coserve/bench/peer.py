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

REPEATS = 3


def transformers_tpot_ms(
    directory: Path, *, dtype: torch.dtype, device: torch.device, batch: int = 8, prompt_tokens: int = 128,
    output_tokens: int = 64,
) -> float:
    """Milliseconds per output token and request, greedy, at a batch of random prompts: the median of REPEATS."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model.to(device).eval()
    rng = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(model.config.vocab_size, (batch, prompt_tokens), generator=rng).to(device)

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
    return median((seconds(output_tokens) - seconds(1)) / (output_tokens - 1) for _ in range(REPEATS)) * 1e3
