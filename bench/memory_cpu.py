"""Memory against speed of one training step on a CPU: coserve at several budgets, peft with and without checkpointing.

    python bench/memory_cpu.py [--tokens 4096] [--threads 2] [--shares 1 0.5 0.25 0] [--fp8-shares 1 0]
        [--output bench/results/memory_cpu.json]

SmolLM2 in float32, LoRA r16 on all linears, one example of `tokens` tokens, all of them trained. Every row is a fresh process:
two steps, the second timed; peak is the process's largest resident size. A share is a place between the least that a
micro-batch can take in flight (0: the layers' inputs, K and V) and the most (1: nothing is run again), with kept values in fp8
where the row says so. `predicted` is what the process held before training plus what the plan says, so that it can be compared
with the peak.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from finetune_cpu import coserve_step, long_example, peak_bytes, run_facts, seconds

from coserve import FinetuneConfig, LoraConfig, OptimizerConfig, load_model
from coserve.bench.pefttrain import PeftPeer
from coserve.bench.workload import LEARNING_RATE
from coserve.config.settings import Compression
from coserve.model.linear import can_pack
from coserve.model.locate import locate_model
from coserve.planning.budget import JobPlans, Workload, shape_adapter, training_bytes
from coserve.text.tokenizer import ChatTokenizer
from coserve.training.trainer import AdapterTrainer

LORA = LoraConfig(r=16, alpha=32)
WINDOW = 1024


def resident_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def probe_coserve(tokens: int, share: float, compression: Compression) -> dict[str, Any]:
    """Two steps under the budget at `share`."""
    model = load_model(device="cpu", dtype="float32")
    arch, adapter, workload = model.architecture, shape_adapter(model.architecture, LORA), Workload(tokens, tokens)
    plans = JobPlans(arch, adapter, workload, itemsize=4, compression=compression)
    most, least = plans.fastest(), plans.fit(0)
    allowed = math.ceil(least.num_bytes + share * (most.num_bytes - least.num_bytes))
    example = long_example(model, tokens)
    held = resident_bytes()
    trainer = AdapterTrainer(model, FinetuneConfig(
        lora=LORA, max_microbatch_tokens=tokens, max_length=tokens, window_tokens=WINDOW, activation_memory=allowed,
        activation_compression=compression,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=1.0),
    ))
    coserve_step(trainer, [example])
    took = seconds(lambda: coserve_step(trainer, [example]))
    plan = trainer.plan
    parts = training_bytes(
        arch, plan, adapter.flat.numel(), microbatch_tokens=tokens, window_tokens=WINDOW, itemsize=4,
        packed=can_pack(torch.float32, torch.device("cpu")),
    )
    return {
        "seconds": took, "kept_bytes": parts["kept activations"], "extra_flops_ratio": plan.extra_flops_ratio,
        "in_flight_bytes": parts["kept activations"] + parts["gradients"],
        "predicted_bytes": held + sum(parts.values()) - parts["weights"], "held_before_bytes": held,
    }


def probe_peft(tokens: int, *, checkpointing: bool) -> dict[str, Any]:
    """Two steps through transformers + peft."""
    directory = locate_model(None)
    peer = PeftPeer(directory)
    if checkpointing:
        peer.model.enable_input_require_grads()
        peer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stand_in = argparse.Namespace(tokenizer=ChatTokenizer.load(directory))
    example = long_example(stand_in, tokens)  # type: ignore[arg-type]  # only its tokenizer is used
    peer.step([example], 1)
    return {"seconds": seconds(lambda: peer.step([example], 1))}


def probe(method: str, tokens: int) -> None:
    """Prints one row."""
    name, _, rest = method.partition(":")
    share, _, fp8 = rest.partition(":")
    if name == "coserve":
        row = probe_coserve(tokens, float(share), "fp8" if fp8 else "lossless")
    else:
        row = probe_peft(tokens, checkpointing=rest != "")
    print(json.dumps({**row, "tokens_per_s": tokens / row["seconds"], "peak_bytes": peak_bytes()}))


def measure(method: str, tokens: int, threads: int) -> dict[str, Any]:
    """A row, from a process of its own."""
    command = [sys.executable, __file__, "--probe", method, "--tokens", str(tokens), "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = {"method": method, **json.loads(output.splitlines()[-1])}
    more = ""
    if "predicted_bytes" in row:
        row["peak_over_predicted"] = row["peak_bytes"] / row["predicted_bytes"]
        more = (f", kept {row['kept_bytes'] / 2**30:.2f} GiB, {row['extra_flops_ratio']:.1%} of matrix products again, peak "
                f"{row['peak_over_predicted']:.2f} of predicted")
    print(f"{method:>20}: peak {row['peak_bytes'] / 2**30:.2f} GiB, {row['tokens_per_s']:.1f} tokens/s{more}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shares", type=float, nargs="+", default=[1, 0.5, 0.25, 0])
    parser.add_argument("--fp8-shares", type=float, nargs="*", default=[1, 0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory_cpu.json")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        probe(args.probe, args.tokens)
        return
    methods = [
        *(f"coserve:{share:g}" for share in args.shares), *(f"coserve:{share:g}:fp8" for share in args.fp8_shares),
        "peft", "peft:checkpointing",
    ]
    rows = [measure(method, args.tokens, args.threads) for method in methods]
    peft = next(row for row in rows if row["method"] == "peft")
    for row in rows:
        row["peak_over_peft"] = row["peak_bytes"] / peft["peak_bytes"]
        row["speed_over_peft"] = row["tokens_per_s"] / peft["tokens_per_s"]
    record = {**run_facts(Path(__file__).name, args.threads), "tokens": args.tokens, "results": rows}
    args.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
