"""transformers + peft, the same shapes and the same adapter: tokens per second and peak memory of training steps.

Random weights, made on the device. With gradient checkpointing, then without it, where long examples may not fit: that is a
result too.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from gpu_clock import device_of, peak_bytes, seconds
from gpu_model import config_of
from gpu_passes import FULL, LORA, QUICK
from gpu_rows import Item, release_memory, told
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from coserve.config.settings import LINEAR_SITES


class Peer:
    """A model of the peer's on the device, made at its first use, and a step of one example of random tokens."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.sizes = device_of(options), QUICK if options.quick else FULL
        self.config = config_of(options.model)

    @cached_property
    def model(self) -> Any:
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        with torch.device(self.device):
            base = AutoModelForCausalLM.from_config(self.config, dtype=dtype, attn_implementation="sdpa")
        base.config.use_cache = False
        wrapped: Any = get_peft_model(base, PeftLoraConfig(
            r=LORA.r, lora_alpha=LORA.alpha, target_modules=list(LINEAR_SITES), task_type="CAUSAL_LM",
        ))
        return wrapped.train()

    def run(self, *, checkpointing: bool) -> Iterator[dict[str, Any]]:
        """One row: its speed, or that it didn't fit."""
        model, device, tokens = self.model, self.device, self.sizes.example_tokens
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (1, tokens), generator=generator).to(device)

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        row = {"policy": "transformers+peft", "gradient_checkpointing": checkpointing, "example_tokens": tokens}
        release_memory()
        try:
            taken = seconds(step, device, repeats=self.sizes.steps)
            yield {**row, "seconds": taken, "finetune_tokens_per_s": tokens / taken, **peak_bytes(device)}
        except torch.OutOfMemoryError as error:
            optimizer.zero_grad(set_to_none=True)
            yield {**row, "note": "out of memory", "error": told(error)[:300]}


def items(options: argparse.Namespace) -> list[Item]:
    """Both ways of keeping activations."""
    peer = Peer(options)
    return [
        Item(name, partial(peer.run, checkpointing=checkpointing))
        for name, checkpointing in (("checkpointing", True), ("all-kept", False))
    ]
