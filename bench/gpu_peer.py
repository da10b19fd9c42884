"""Part (f): transformers + peft, the same shapes and the same adapter: tokens per second and peak memory of training steps.

Random weights, made on the device. With and without gradient checkpointing: without it, long examples may not fit.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from gpu_clock import peak_bytes, release, seconds
from gpu_model import BenchModel
from gpu_passes import LORA
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from coserve.config.settings import LINEAR_SITES


def run_peer(model: BenchModel, device: torch.device, *, example_tokens: int, steps: int) -> Iterator[dict[str, Any]]:
    """One row per way of keeping activations; a way that fails says so."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(model.config, dtype=dtype, attn_implementation="sdpa")
    base.config.use_cache = False
    wrapped: Any = get_peft_model(base, PeftLoraConfig(
        r=LORA.r, lora_alpha=LORA.alpha, target_modules=list(LINEAR_SITES), task_type="CAUSAL_LM",
    ))
    wrapped.train()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, example_tokens), generator=generator).to(device)

    def step() -> None:
        wrapped(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for checkpointing in (True, False):
        row: dict[str, Any] = {"policy": "transformers+peft", "gradient_checkpointing": checkpointing,
                               "example_tokens": example_tokens}
        if checkpointing:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            wrapped.enable_input_require_grads()
        else:
            wrapped.gradient_checkpointing_disable()
        release(device)
        try:
            taken = seconds(step, device, repeats=steps)
            yield {**row, "seconds": taken, "finetune_tokens_per_s": example_tokens / taken, **peak_bytes(device)}
        except torch.OutOfMemoryError as error:
            optimizer.zero_grad(set_to_none=True)
            gc.collect()
            yield {**row, "failed": f"out of memory: {error}"[:300]}
