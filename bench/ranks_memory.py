"""The memory of each process that trains a shared model, against what is planned for it.

    python bench/ranks_memory.py [--sizes 1,2] [--layers 8,24] [--output bench/results/ranks_memory.json]

`coserve finetune` of a model with random weights: hidden 1536, 12 query and 4 key-value heads, 16,384 tokens, float32; LoRA
r16 on all linears, examples of 512 tokens. A process's figure is the most memory of its own that it had (anonymous pages,
looked at every 20 ms), less that of the same rank in the same job on a model of two narrow layers, which stands for the
interpreter and its libraries. Pages of files that are read, such as the checkpoint's, can be dropped and don't count. The plan
is the one by which `coserve finetune` decides whether a job fits. Prints a line per process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from random_llama import make_model, write_texts

from coserve import FinetuneConfig, LoraConfig
from coserve.bench.results import result_head
from coserve.machine import device_name, versions
from coserve.model.memory import GIB
from coserve.runtime.loaded import find_model
from coserve.runtime.ranks import RANK_MODULE
from coserve.training.finetuning import choose_plan, planned_bytes
from coserve.training.request import JobRequest

EXAMPLE_TOKENS, BATCH, STEPS, RANK = 512, 4, 2, 16
LARGE: Mapping[str, int] = {"hidden_size": 1536, "intermediate_size": 4096}
SMALL: Mapping[str, int] = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
VOCABULARY = 16384


def peaks(command: list[str]) -> dict[int, int]:
    """Runs a command; the most bytes of anonymous memory that each of its ranks had, by rank."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found: dict[int, int] = {}
    while process.poll() is None:
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                arguments = status.with_name("cmdline").read_bytes().decode().split("\0")
                lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except OSError:  # it has ended
                continue
            own = int(lines["Pid"]) == process.pid
            if "RssAnon" in lines and (own or (int(lines["PPid"]) == process.pid and RANK_MODULE in arguments)):
                rank = 0 if own else int(arguments[arguments.index(RANK_MODULE) + 1])
                found[rank] = max(found.get(rank, 0), int(lines["RssAnon"].split()[0]) * 1024)
        time.sleep(0.02)
    assert process.returncode == 0, command
    return found


def planned(model: Path, data: Path, output: Path, size: int) -> dict[str, int]:
    """What each rank's part of the job is planned to take, in bytes by purpose."""
    base = find_model(str(model), device="cpu", dtype="float32")
    config = FinetuneConfig(
        lora=LoraConfig(r=RANK), max_steps=STEPS, batch_size=BATCH, max_microbatch_tokens=EXAMPLE_TOKENS
    )
    request = JobRequest.of(data, output, config, validation=None, start=None, resume=False, listen=lambda event: None)
    job = request.resolve(base, size=size)
    fitted, one_copy = choose_plan(job, base)
    return planned_bytes(job, base, fitted.plan, one_copy=one_copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--layers", default="8,24", help="of the models that are trained")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "ranks_memory.json")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_model(root / "small", VOCABULARY, **SMALL)
        for layers in map(int, args.layers.split(",")):
            make_model(root / f"large-{layers}", VOCABULARY, **LARGE, num_hidden_layers=layers)
        write_texts(root / "data.jsonl", VOCABULARY, count=2 * BATCH, tokens=EXAMPLE_TOKENS)

        def command(model: str, size: int) -> list[str]:
            return [
                sys.executable, "-m", "coserve", "finetune", str(root / model), str(root / "data.jsonl"), "--output",
                str(root / f"{model}-{size}"), "--tensor-parallel-size", str(size), "--dtype", "float32", "--max-steps",
                str(STEPS), "--batch-size", str(BATCH), "--rank", str(RANK), "--max-microbatch-tokens", str(EXAMPLE_TOKENS),
            ]

        def plan(model: str, size: int) -> dict[str, int]:
            return planned(root / model, root / "data.jsonl", root / f"new-{model}-{size}", size)

        for size in map(int, args.sizes.split(",")):
            small, bare = plan("small", size), peaks(command("small", size))
            for layers in map(int, args.layers.split(",")):
                parts, whole = plan(f"large-{layers}", size), peaks(command(f"large-{layers}", size))
                wanted = sum(parts.values()) - sum(small.values())
                for rank, most in sorted(whole.items()):
                    taken = most - bare[rank]
                    results.append({
                        "layers": layers, "processes": size, "rank": rank, "peak_bytes": most,
                        "peak_bytes_of_the_narrow_model": bare[rank], "planned_bytes": wanted, "ratio": taken / wanted,
                        "planned": parts,
                    })
                    print(f"{layers} layers, {size} processes, rank {rank}: {taken / GIB:.2f} GiB, planned {wanted / GIB:.2f}: "
                          f"{taken / wanted:.2f}", flush=True)
    args.output.write_text(json.dumps({
        **result_head(device_name(torch.device("cpu")), versions(), " ".join(["python bench/ranks_memory.py", *sys.argv[1:]])),
        "experiment": "ranks-memory", "results": results,
    }, indent=1) + "\n")


if __name__ == "__main__":
    main()
