"""A tiny model directory that `coserve finetune` and `chat` take as they take a real one: weights and a tokenizer that fit.

Weights as in tests/tiny_models.py, the vocabulary widened to that of tests/tiny_tokenizer.py, a ChatML template, 512 positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny_models import build_tiny_model, randomize
from tests.tiny_tokenizer import build_tiny_tokenizer

PLACES = ("harbour", "bakery", "library", "station", "museum", "bridge", "market", "tower", "garden", "school", "mill")


def build_tiny_directory(
    path: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """Saves the model and its tokenizer into `path` (made if missing) and returns it. Other seeds are other bases."""
    build_tiny_model(family, path)
    build_tiny_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(len(PreTrainedTokenizerFast.from_pretrained(path)), mean_resizing=False)
    randomize(model, seed)
    model.to(dtype).save_pretrained(path)
    return path


def build_job_inputs(root: Path) -> Path:
    """Fills a directory with what jobs need, and returns it: model/, and sft.jsonl, dpo.jsonl and valid.jsonl."""
    build_tiny_directory(root / "model")
    write_lines(root / "sft.jsonl", chat_lines(10))
    write_lines(root / "dpo.jsonl", preference_lines(10))
    write_lines(root / "valid.jsonl", chat_lines(3))
    return root


def chat_line(question: str, answer: str) -> dict[str, Any]:
    """One conversation of two turns, as a training line."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def preference_line(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    """One pair of answers, as a training line for DPO."""
    answers = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": [{"role": "user", "content": question}],
        **{name: [{"role": "assistant", "content": text}] for name, text in answers.items()},
    }


def chat_lines(count: int) -> list[dict[str, Any]]:
    """`count` different conversations of different lengths, about 30 to 60 tokens each."""
    return [
        chat_line(f"Where is the {PLACES[i % len(PLACES)]}?", f"It is {i} steps " + "and on " * (i % 5) + "to the left.")
        for i in range(count)
    ]


def preference_lines(count: int) -> list[dict[str, Any]]:
    """`count` different pairs."""
    return [
        preference_line(f"Where is the {PLACES[i % len(PLACES)]}?", f"{i} steps on" + "!" * (i % 4), "no " * (1 + i % 3))
        for i in range(count)
    ]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """Writes JSON Lines and returns the path."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
