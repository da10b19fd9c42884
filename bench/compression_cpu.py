"""What keeping activations in fp8 does to training: the same job twice, with and without, on GSM8K.

    python bench/compression_cpu.py [--steps 100] [--batch-size 4] [--output bench/results/compression_cpu.json] [--plot FILE]

SmolLM2 in float32, LoRA r16 on all linears, the same examples in the same order; both jobs run side by side on one thread each,
so that their speeds mean nothing. Compared are the losses of every step, the loss on problems that aren't trained, and the
gradient of the first step's examples. Needs GSM8K in ../shared/data.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from finetune_cpu import GSM8K, chat, gsm8k_examples, run_facts
from matplotlib.figure import Figure

from coserve import FinetuneConfig, LoraConfig, OptimizerConfig, finetune, load_model
from coserve.core import Group
from coserve.training.trainer import AdapterTrainer

METHODS = ("lossless", "fp8")
HELD_OUT = 32
EVERY = 25
LAST = 10
"""Steps whose losses are averaged at the end."""


def settings(method: str, steps: int, batch_size: int) -> FinetuneConfig:
    return FinetuneConfig(
        lora=LoraConfig(r=16, alpha=32), optimizer=OptimizerConfig(learning_rate=2e-4), max_steps=steps, batch_size=batch_size,
        validation_steps=EVERY, checkpoint_steps=0, seed=0, activation_compression=method,  # type: ignore[arg-type]  # one of METHODS
    )


def write_chats(source: Path, count: int | None, path: Path) -> Path:
    """Problems as chats, of which answers are trained."""
    lines = source.read_text(encoding="utf-8").splitlines()[:count]
    with path.open("w", encoding="utf-8") as file:
        for problem in map(json.loads, lines):
            file.write(json.dumps({"messages": chat(problem)}) + "\n")
    return path


def train(method: str, steps: int, batch_size: int) -> None:
    """Prints the job's rows."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        data = write_chats(GSM8K, steps * batch_size, root / "train.jsonl")
        held_out = write_chats(GSM8K.with_name("gsm8k_test.jsonl"), HELD_OUT, root / "test.jsonl")

        def tell(event: Any) -> None:
            if event.row is not None and event.row.step % EVERY == 0:
                print(f"{method}: step {event.row.step}, {event.row.train_loss:.4f}", file=sys.stderr, flush=True)

        config = settings(method, steps, batch_size)
        finetune(data, root / "job", config=config, validation=held_out, device="cpu", dtype="float32", listen=tell)
        with (root / "job" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    print(json.dumps({
        "train_loss": [float(row["train_loss"]) for row in rows],
        "valid_loss": {row["step"]: float(row["valid_loss"]) for row in rows if row["valid_loss"]},
    }))


def compare_gradients(batch_size: int) -> dict[str, Any]:
    """Of one batch, at an adapter of which nothing is 0: the relative difference; and bytes kept per token."""
    model = load_model(device="cpu", dtype="float32")
    examples = gsm8k_examples(model, batch_size)
    gradients, kept = [], {}
    for method in METHODS:
        config = settings(method, 1, batch_size)
        trainer = AdapterTrainer(model, replace(config, max_length=512))
        trainer.adapter.flat.copy_(0.02 * torch.randn(trainer.adapter.flat.shape, generator=torch.Generator().manual_seed(0)))
        trainer.adapter.refresh()
        trainer.forward_backward([Group(index=example.index, examples=(example,)) for example in examples], 0)
        assert trainer.adapter.grad is not None
        gradients.append(trainer.adapter.grad.clone())
        kept[method] = trainer.plan.arena_bytes
    exact, rounded = gradients
    return {"difference": float((rounded - exact).norm() / exact.norm()), "kept_bytes_per_token": kept}


def draw(results: dict[str, Any], path: Path) -> None:
    """Both curves, and how far they are apart."""
    figure = Figure(figsize=(8, 5.5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for (method, style) in zip(METHODS, ("-", "--"), strict=True):
        losses = results[method]["train_loss"]
        top.plot(range(1, len(losses) + 1), losses, style, linewidth=1.2, label=f"{method}: training")
        valid = results[method]["valid_loss"]
        top.plot([int(step) for step in valid], list(valid.values()), style, marker="o", markersize=4,
                 label=f"{method}: held out")
    pairs = zip(*(results[method]["train_loss"] for method in METHODS), strict=True)
    bottom.plot(range(1, len(losses) + 1), [fp8 / exact - 1 for exact, fp8 in pairs], color="#8a8f98")
    bottom.yaxis.set_major_formatter("{x:.2%}")
    top.set(ylabel="cross-entropy per label token", title="GSM8K, SmolLM2, LoRA r16: kept activations in fp8")
    bottom.set(xlabel="optimizer step", ylabel="fp8 / lossless - 1")
    top.legend(frameon=False, ncols=2)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "compression_cpu.json")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not GSM8K.is_file():
        sys.exit(f"{GSM8K.name} isn't there: nothing is measured")
    torch.set_num_threads(1)
    if args.method:
        train(args.method, args.steps, args.batch_size)
        return
    command = [sys.executable, __file__, "--steps", str(args.steps), "--batch-size", str(args.batch_size), "--method"]
    running = {name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in METHODS}
    results: dict[str, Any] = {name: json.loads(process.communicate()[0].splitlines()[-1]) for name, process in running.items()}
    exact, fp8 = (results[name] for name in METHODS)
    summary = {
        "last_training_losses": [sum(rows["train_loss"][-LAST:]) / LAST for rows in (exact, fp8)],
        "last_held_out_losses": [list(rows["valid_loss"].values())[-1] for rows in (exact, fp8)],
        "largest_difference_of_a_step": max(
            abs(b / a - 1) for a, b in zip(exact["train_loss"], fp8["train_loss"], strict=True)
        ),
        "gradient": compare_gradients(args.batch_size),
    }
    print(json.dumps(summary, indent=1))
    record = {**run_facts(Path(__file__).name, 1), "summary": summary, "results": results}
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    if args.plot is not None:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
