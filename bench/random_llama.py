"""Small Llamas with random weights, and texts in their words, for benchmarks of several processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_model(directory: Path, vocabulary: int, **sizes: int) -> None:
    """A model with 12 query and 4 key-value heads and a tokenizer of single words. sizes: as in LlamaConfig."""
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1", unk_token="w0").save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=1, bos_token_id=None, **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def write_texts(path: Path, vocabulary: int, *, count: int, tokens: int) -> None:
    """Training texts of `tokens` tokens each, the last of which ends the text."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(count):
            ids = torch.randint(2, vocabulary, (tokens - 1,), generator=generator).tolist()
            file.write(json.dumps({"text": " ".join(f"w{number}" for number in ids)}) + "\n")
