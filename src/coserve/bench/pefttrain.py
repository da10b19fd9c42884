"""transformers + peft finetuning, the peer of coserve's: as a class, and as a process that trains until it is ended.

    python -m coserve.bench.pefttrain MODEL DATA.jsonl OUTPUT.jsonl --threads N [--dtype float32] [--batch 8] [--micro-batch 1]

The process writes a line {"time_s", "tokens"} after each micro-batch: the machine's monotonic clock, and all tokens so far
whose forward and backward pass are done. Padding is not counted. It reads its data with coserve's own reader, so that both
train the same tokens. Owns: that training. Does not own: when it is started, halted and ended (rivals.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from coserve.bench.workload import ALPHA, LEARNING_RATE, RANK
from coserve.config.settings import FinetuneConfig
from coserve.core import Example
from coserve.finetune.batches import BatchOrder
from coserve.finetune.datasets import load_training
from coserve.text.tokenizer import ChatTokenizer

MAX_LENGTH = 2048
"""Longest example in tokens."""


class PeftPeer:
    """A model with LoRA: sdpa attention, fused AdamW, clipping; padded batches sorted by length."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32, learning_rate: float = LEARNING_RATE) -> None:
        base = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        self.model: Any = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, fused=True)

    def step(
        self, examples: Sequence[Example], batch_size: int, on_batch: Callable[[int], None] = lambda tokens: None
    ) -> float:
        """One optimizer step; its loss. batch_size: examples of a micro-batch. on_batch: told the tokens of each micro-batch,
        without padding, when its backward pass is done."""
        ordered = sorted(examples, key=lambda e: e.num_tokens)
        total = sum(e.label_weight for e in examples)
        loss = 0.0
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            longest = max(e.num_tokens for e in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.int64)
            labels = torch.full_like(ids, -100)
            mask = torch.zeros_like(ids)
            for row, example in enumerate(batch):
                n = example.num_tokens
                ids[row, :n] = torch.from_numpy(example.token_ids)
                labels[row, :n] = torch.from_numpy(np.where(example.weights > 0, example.token_ids, -100))
                mask[row, :n] = 1
            padded = {} if bool(mask.all()) else {"attention_mask": mask}
            part = self.model(input_ids=ids, labels=labels, num_items_in_batch=total, **padded).loss
            part.backward()
            loss += part.item()
            on_batch(sum(e.num_tokens for e in batch))
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def train(
    model: Path, data: Path, output: Path, *, dtype: torch.dtype, batch_size: int, micro_batch: int,
    num_steps: int | None = None,
) -> None:
    """Trains on a JSON Lines file, and writes the lines of the module's docstring into `output`. num_steps: optimizer steps;
    None: without end. Raises InvalidRequest, NotFound for data that can't be used."""
    config = FinetuneConfig(too_long="truncate", batch_size=batch_size)
    dataset = load_training(data, ChatTokenizer.load(model), config, max_length=MAX_LENGTH)
    order = BatchOrder(num_groups=len(dataset.groups), batch_size=batch_size, seed=config.seed, shuffle=config.shuffle)
    peer = PeftPeer(model, dtype)
    trained = 0
    with output.open("w") as file:

        def note(tokens: int) -> None:
            nonlocal trained
            trained += tokens
            file.write(json.dumps({"time_s": time.monotonic(), "tokens": trained}) + "\n")
            file.flush()

        for step in itertools.count() if num_steps is None else range(num_steps):
            groups = [dataset.groups[index] for index in order.indices(step)]
            peer.step([example for group in groups for example in group.examples], micro_batch, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=8, help="examples per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=1, help="examples in one pass")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        options.model, options.data, options.output, dtype=getattr(torch, options.dtype), batch_size=options.batch,
        micro_batch=options.micro_batch,
    )


if __name__ == "__main__":
    main()
