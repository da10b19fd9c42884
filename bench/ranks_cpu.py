"""`coserve finetune` on one process with all threads against several processes that share the model and the cores.

    python bench/ranks_cpu.py [--size 2] [--repeats 3] [--steps 6] [--output bench/results/ranks_cpu.json]

The model has random weights and the shapes of a small Llama: hidden 768, 12 query and 4 key-value heads, 12 layers, 8,192
tokens. Jobs alternate, each in a process of its own, with the same data: LoRA r16 on all linears, four examples of 512 tokens
per step, in float32. Tokens per second are the median over steps but the first. Prints a line per job.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from random_llama import make_model, write_texts

from coserve.bench.results import result_head
from coserve.machine import device_name, versions

EXAMPLE_TOKENS, BATCH, VOCABULARY = 512, 4, 8192


def tokens_per_second(model: Path, data: Path, output: Path, size: int, steps: int) -> float:
    """One job."""
    command = [
        sys.executable, "-m", "coserve", "finetune", str(model), str(data), "--output", str(output), "--tensor-parallel-size",
        str(size), "--dtype", "float32", "--max-steps", str(steps), "--batch-size", str(BATCH), "--rank", "16",
        "--target-modules", "all-linear", "--max-microbatch-tokens", str(EXAMPLE_TOKENS), "--learning-rate", "1e-4",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (output / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return statistics.median(float(row["tokens"]) / float(row["seconds"]) for row in rows[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ranks_cpu.json")
    args = parser.parse_args()
    found: dict[int, list[float]] = {1: [], args.size: []}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_model(root / "model", VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12)
        write_texts(root / "data.jsonl", VOCABULARY, count=2 * BATCH, tokens=EXAMPLE_TOKENS)
        for repeat in range(args.repeats):
            for size, speeds in found.items():
                output = root / f"{size}-{repeat}"
                speeds.append(tokens_per_second(root / "model", root / "data.jsonl", output, size, args.steps))
                print(f"{size} processes, repeat {repeat + 1}: {speeds[-1]:.0f} tokens/s", flush=True)
    ratio = statistics.median(several / one for one, several in zip(*found.values(), strict=True))
    print(f"{args.size} processes train {ratio:.2f} times the tokens of one process")
    args.output.write_text(json.dumps({
        **result_head(device_name(torch.device("cpu")), versions(), " ".join(["python bench/ranks_cpu.py", *sys.argv[1:]])),
        "experiment": "ranks", "results": [
            {"processes": size, "tokens_per_s": statistics.median(speeds), "tokens_per_s_of_repeats": speeds}
            for size, speeds in found.items()
        ], "ratio": ratio,
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
