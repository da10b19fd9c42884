"""Large models shared among ranks, by their config.json alone: the candidates that are chosen, memory and traffic of each rank.

    python bench/parallel_plans.py [--sizes 2 4 8] [--rank 16] [--device h100] [--output bench/results/parallel_plans.json]

For each model and number of ranks it runs `coserve plan --tensor-parallel-size` with LoRA on all linears in bfloat16 and a
micro-batch of 1,024 tokens. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from coserve.bench.paper.models import model_directory
from coserve.bench.results import result_head
from coserve.machine import versions

MODELS = ("Qwen2.5-14B", "Qwen2.5-32B", "Llama-3.1-70B")


def plan(model: str, size: int, rank: int, device: str) -> dict[str, Any]:
    """The command's JSON."""
    command = [
        sys.executable, "-m", "coserve", "plan", str(model_directory(model)), "--tensor-parallel-size", str(size), "--rank",
        str(rank), "--device", device, "--target-modules", "all-linear", "--dtype", "bfloat16", "--no-baselines", "--json",
    ]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def row(model: str, size: int, data: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ranks = data["ranks"]
    lies: dict[str, list[str]] = {}
    for site, candidates in ranks["layers"][0]["candidates"].items():
        parts = ", ".join(f"{name[-1]} {axis}" for name, axis in candidates[0]["parameters"].items())
        lies.setdefault(parts, []).append(site.removesuffix("_proj"))
    layers = [(len(entry["layers"]), entry["transfers"]) for entry in ranks["transfers"]]
    sent = sum(count * sum(each["num_bytes"] for each in transfers) for count, transfers in layers)
    apart = data["beside_every_total"]
    return [
        model, str(size), "; ".join(f"{', '.join(sites)}: {parts}" for parts, sites in lies.items()),
        f"{apart['weights'] / 1e9:.1f}", f"{data['kv_cache']['bytes_per_token_per_rank'][str(size)] / 1e3:.0f}",
        f"{data['stages'][-1]['total_bytes'] / 1e9:.2f}", f"{apart['adapter and optimizer'] / 1e9:.2f}",
        f"{sent / 1e6:.2f}", f"{ranks['bytes_sent_per_optimizer_step'] / 1e6:.0f}", f"{data['seconds']['plan']:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "parallel_plans.json")
    args = parser.parse_args()
    names = (
        "model", "ranks", "where LoRA lies", "weights, GB", "KV per token, kB", "training, GB", "adapter, GB",
        "sent per token, MB", "sent per step, MB", "planned in, s",
    )
    rows, plans = [list(names), ["---"] * len(names)], []
    for model in MODELS:
        for size in args.sizes:
            data = plan(model, size, args.rank, args.device)
            plans.append(data)
            rows.append(row(model, size, data))
            print(f"{model} on {size} ranks", file=sys.stderr, flush=True)
    print("\n".join(f"| {' | '.join(line)} |" for line in rows))
    args.output.write_text(json.dumps({
        **result_head(f"{args.device} (planned)", versions(), " ".join(["python bench/parallel_plans.py", *sys.argv[1:]])),
        "experiment": "parallel plans", "results": [
            {key: data[key] for key in ("model", "tensor_parallel_size", "adapter", "stages", "ranks", "kv_cache",
                                        "beside_every_total", "seconds")} for data in plans
        ],
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
