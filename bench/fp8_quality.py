"""What 8-bit matrices (`--quantization fp8`) change in a model, and what they cost in time on a CPU. One JSON.

    python bench/fp8_quality.py [--model DIR] [--data gsm8k_test.jsonl] [--texts 100] [--prompts 32] [--tokens 64]

The default model in float32, with its matrices and with their 8-bit floats. Texts are questions with their answers, prompts are
questions in the chat template. Loss is the mean cross-entropy per token of the texts. Agreement is the share of the texts'
tokens where both models have the same most likely next token, and of greedy answers it is how many are equal, and how many
tokens come before the first difference. Beside that, for scale, the same of bfloat16. With --times also the time per token of
single answers, greedy, from 128 tokens on, alternating; that takes the machine for itself.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coserve import LoadedModel, SamplingConfig, load_model
from coserve.engine.generation import Generator
from coserve.machine import device_name, versions

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
VARIANTS = {"float32": ("float32", "none"), "fp8": ("float32", "fp8"), "bfloat16": ("bfloat16", "none")}
"""Name -> dtype, quantization. The first is what the others are compared with."""
TIMED_PROMPT, TIMED_TOKENS, TIMED_RUNS = 128, 32, 3


class Read(NamedTuple):
    """What a model says of a text [T]: mean loss per token, and the most likely next token at each of its positions."""

    loss: float
    best: Tensor


def read_text(model: LoadedModel, ids: Sequence[int]) -> Read:
    """A text through a model in one pass."""
    logits = Generator(model).logits(ids[:-1]).float()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]))
    return Read(float(loss), logits.argmax(-1))


def same_start(answer: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before two answers differ."""
    pairs = zip(answer, other, strict=False)
    return next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(answer), len(other)))


def compare(
    reads: Sequence[Read], answers: Sequence[Sequence[int]], wanted: Sequence[Read], whole: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """One variant's row: against `wanted` and `whole`, the first variant's texts and answers."""
    counts = [read.best.numel() for read in reads]
    same = sum(int((read.best == want.best).sum()) for read, want in zip(reads, wanted, strict=True))
    starts = [same_start(answer, other) for answer, other in zip(answers, whole, strict=True)]
    return {
        "loss": sum(read.loss * count for read, count in zip(reads, counts, strict=True)) / sum(counts), "tokens": sum(counts),
        "same_next_token": same / sum(counts), "equal_answers": sum(map(lambda a, b: a == b, answers, whole)),
        "answers": len(answers), "median_tokens_before_difference": median(starts),
    }


def decode_seconds(model: LoadedModel, prompt: Sequence[int]) -> float:
    """Seconds per token of one greedy answer, after its first token."""
    times: list[float] = []
    sampling = SamplingConfig(max_tokens=TIMED_TOKENS, temperature=0, ignore_eos=True)
    Generator(model).generate([prompt], sampling, on_token=lambda *_: times.append(time.perf_counter()))
    return (times[-1] - times[0]) / (len(times) - 1)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per variant."""
    with options.data.open(encoding="utf-8") as file:
        lines = [json.loads(line) for _, line in zip(range(max(options.texts, options.prompts)), file, strict=False)]
    models = {
        name: load_model(options.model, device="cpu", dtype=dtype, quantization=quantization)
        for name, (dtype, quantization) in VARIANTS.items()
    }
    tokenizer = models["fp8"].tokenizer
    texts = [tokenizer.encode(f"{line['question']}\n{line['answer']}") for line in lines[: options.texts]]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": line["question"]}]) for line in lines[: options.prompts]]
    sampling = SamplingConfig(max_tokens=options.tokens, temperature=0)
    reads, answers = {}, {}
    for name, model in models.items():
        reads[name] = [read_text(model, ids) for ids in texts]
        answers[name] = Generator(model).generate(prompts, sampling)
        print(f"{name}: read {len(texts)} texts and answered {len(prompts)} prompts", flush=True)
    timed = (texts[0] * TIMED_PROMPT)[:TIMED_PROMPT]
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TIMED_RUNS + 1 if options.times else 0):  # the first run doesn't count
        for name, model in models.items():
            times[name].append(decode_seconds(model, timed))
    return [
        {"variant": name, **compare(reads[name], answers[name], reads["float32"], answers["float32"]),
         **({"decode_ms_per_token": 1e3 * median(times[name][1:])} if options.times else {})}
        for name in models
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=None, help="directory, GGUF file or hub id; the default model")
    parser.add_argument("--data", type=Path, default=DATA, help="JSON lines with question and answer")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--times", action="store_true", help="time single answers too")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fp8_quality.json")
    options = parser.parse_args()
    rows = measure(options)
    record = {
        "device": device_name(torch.device("cpu")), "date": datetime.date.today().isoformat(), "versions": versions(),
        "threads": torch.get_num_threads(), "command": " ".join(["python", "bench/fp8_quality.py", *sys.argv[1:]]),
        "results": rows,
    }
    print(json.dumps(rows, indent=1))
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
