"""Finetuning on a CPU beside transformers + peft: speed, memory, the machine's floor, and saved bytes. One run, one JSON.

    python bench/finetune_cpu.py [--pairs 5] [--threads 2] [--output bench/results/finetune_cpu.json] [--quick]

SmolLM2 in float32, LoRA r16 on all linears. Steps of coserve and peft alternate in one process; medians are compared. Memory is
the peak resident size of a fresh process per method. The text is GSM8K's where the file lies in ../shared/data, else random.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from coserve import FinetuneConfig, LoadedModel, LoraConfig, OptimizerConfig, load_model
from coserve.bench.pefttrain import PeftPeer
from coserve.bench.workload import ALPHA, LEARNING_RATE, RANK
from coserve.core import Example, Group
from coserve.model.decoder import linear_shapes
from coserve.model.linear import PackedLinear
from coserve.runtime.executor import head_rows
from coserve.text.examples import ExampleEncoder
from coserve.training.trainer import AdapterTrainer

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
STEP_EXAMPLES = 16
FLOOR_ROWS = 1024


def chat(problem: dict[str, str]) -> list[dict[str, str]]:
    """A problem of GSM8K as messages."""
    return [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": problem["answer"]}]


def gsm8k_examples(model: LoadedModel, count: int) -> list[Example]:
    """Question and answer as a chat; only the answer is trained."""
    examples = []
    rng = np.random.default_rng(0)
    lines = GSM8K.read_text(encoding="utf-8").splitlines()[:count] if GSM8K.is_file() else []
    for index in range(count):
        if lines:
            problem = json.loads(lines[index])
            ids, weights = ExampleEncoder(model.tokenizer).encode_training(chat(problem))
        else:
            length = int(rng.integers(100, 350))
            ids, weights = rng.integers(0, 49152, length), (np.arange(length) > length // 2).astype(np.float32)
        examples.append(Example(index=index, token_ids=ids, weights=weights))
    return examples


def long_example(model: LoadedModel, length: int) -> Example:
    """Running text of `length` tokens, all of them trained."""
    ids = np.concatenate([e.token_ids for e in gsm8k_examples(model, 40)])[:length]
    return Example(index=0, token_ids=ids, weights=np.ones(length, np.float32))


def coserve_trainer(model: LoadedModel, microbatch_tokens: int) -> AdapterTrainer:
    return AdapterTrainer(model, FinetuneConfig(
        lora=LoraConfig(r=RANK, alpha=ALPHA), max_microbatch_tokens=microbatch_tokens,
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, max_grad_norm=1.0),
    ))


def coserve_step(trainer: AdapterTrainer, examples: Sequence[Example]) -> float:
    loss = trainer.forward_backward([Group(index=e.index, examples=(e,)) for e in examples], 0).loss
    trainer.optim_step(LEARNING_RATE)
    return loss


def seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def best_seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    run()
    return median(seconds(run) for _ in range(repeats))


def linear_seconds(num_out: int, num_in: int) -> list[float]:
    """Forward, input gradient, then LoRA's six small products, of FLOOR_ROWS rows through one linear."""
    linear = PackedLinear.of(torch.randn(num_out, num_in), None)
    x, y = torch.randn(FLOOR_ROWS, num_in), torch.randn(FLOOR_ROWS, num_out)
    xa, a, b = torch.randn(FLOOR_ROWS, 16), torch.randn(16, num_in), torch.randn(num_out, 16)
    products = (
        lambda: linear.forward(y, x), lambda: linear.input_grad(x, y), lambda: x @ a.T, lambda: xa @ b.T, lambda: y @ b,
        lambda: xa @ a, lambda: xa.T @ x, lambda: y.T @ xa,
    )
    return [best_seconds(run) for run in products]


def floor_seconds(model: LoadedModel, examples: Sequence[Example]) -> float:
    """What the step's matrix products alone take, timed now, each in the fastest layout we know, plus attention's products
    at the rate of the best of them. Nothing else is counted: no norm, softmax, copy or optimizer."""
    arch = model.architecture
    tokens = sum(e.num_tokens for e in examples)
    labels = sum(int(np.count_nonzero(e.weights[1:])) for e in examples)
    total, best_rate = 0.0, 0.0
    for num_out, num_in in linear_shapes(arch).values():
        times = linear_seconds(num_out, num_in)
        best_rate = max(best_rate, 2 * FLOOR_ROWS * num_out * num_in / min(times[:2]))
        total += sum(times) * arch.num_layers * tokens / FLOOR_ROWS
    count = head_rows(arch.vocab_size, 4)
    hidden, logits = torch.randn(count, arch.hidden_size), torch.empty(count, arch.vocab_size)
    head = model.weights.head
    head_seconds = best_seconds(lambda: head.logits(logits, hidden)) + best_seconds(lambda: head.input_grad(logits))
    total += head_seconds * labels / count
    # causal scores and outputs: 2 products forward, 5 backward, half of the square each
    attention = sum(7 * e.num_tokens**2 for e in examples) * arch.num_heads * arch.head_dim * arch.num_layers
    return total + attention / best_rate


def compare(
    name: str, model: LoadedModel, peer: PeftPeer, examples: Sequence[Example], *, microbatch: int, batch_size: int, pairs: int
) -> dict[str, Any]:
    """Alternating steps of both on the same examples."""
    trainer = coserve_trainer(model, microbatch)
    tokens = sum(e.num_tokens for e in examples)
    coserve_step(trainer, examples)  # both have run before: only this job's workspace is new
    own, theirs, floors = [], [], []
    for number in range(pairs):
        own.append(seconds(lambda: coserve_step(trainer, examples)))
        theirs.append(seconds(lambda: peer.step(examples, batch_size)))
        floors.append(floor_seconds(model, examples))
        print(f"  {name} pair {number + 1}/{pairs}: coserve {tokens / own[-1]:.1f}, peft {tokens / theirs[-1]:.1f}, floor "
              f"{tokens / floors[-1]:.1f} tokens/s", flush=True)
    ratios = [t / o for o, t in zip(own, theirs, strict=True)]
    return {
        "experiment": name, "tokens_per_step": tokens, "pairs": pairs, "peft_batch_size": batch_size,
        "coserve_tokens_per_s": tokens / median(own), "peft_tokens_per_s": tokens / median(theirs),
        "speed_ratio": median(theirs) / median(own), "speed_ratio_of_pairs": [round(r, 3) for r in ratios],
        "floor_tokens_per_s": tokens / median(floors), "share_of_floor": median(floors) / median(own),
    }


def best_batch_size(peer: PeftPeer, examples: Sequence[Example]) -> int:
    """peft's fastest padded batch on these examples."""
    times = {size: seconds(lambda size=size: peer.step(examples, size)) for size in (1, 2, 4, 8)}
    tokens = sum(e.num_tokens for e in examples)
    print("  peft by batch size:", {size: f"{tokens / t:.0f} tokens/s" for size, t in times.items()}, flush=True)
    return min(times, key=times.__getitem__)


def saved_bytes(model: LoadedModel, peer: PeftPeer, tokens: int) -> dict[str, Any]:
    """What PyTorch saves for backward (distinct storages, parameters left out), beside what our plan keeps."""
    example = long_example(model, tokens)
    ids = torch.from_numpy(example.token_ids)[None]
    own = {p.untyped_storage().data_ptr() for p in peer.model.parameters()} | {
        b.untyped_storage().data_ptr() for b in peer.model.buffers()
    }
    found: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in found:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        peer.model(input_ids=ids, labels=ids)
    total = sum(found.values())
    plan = coserve_trainer(model, tokens).plan
    return {
        "experiment": "saved_bytes", "tokens": tokens, "attention_path": "sdpa, PyTorch's flash kernel for CPU",
        "peft_saved_bytes": total, "coserve_kept_bytes": plan.arena_bytes * tokens,
        "ratio": plan.arena_bytes * tokens / total,
        "note": "peft's sum includes the loss head's logits; coserve's head keeps one gradient row per token instead",
    }


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def probe(method: str, tokens: int) -> None:
    """One step in this process; prints its peak resident memory."""
    if method == "coserve":
        model = load_model(device="cpu", dtype="float32")
        coserve_step(coserve_trainer(model, tokens), [long_example(model, tokens)])
    else:
        from coserve.model.locate import locate_model
        from coserve.text.tokenizer import ChatTokenizer

        directory = locate_model(None)
        stand_in = argparse.Namespace(tokenizer=ChatTokenizer.load(directory))
        PeftPeer(directory).step([long_example(stand_in, tokens)], 1)  # type: ignore[arg-type]  # only its tokenizer is used
    print(json.dumps({"peak_bytes": peak_bytes()}))


def peak_memory(tokens: int, threads: int) -> dict[str, Any]:
    """Peak resident memory of a fresh process per method."""
    peaks = {}
    for method in ("coserve", "peft"):
        command = [sys.executable, __file__, "--probe", method, "--tokens", str(tokens), "--threads", str(threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[method] = json.loads(output.splitlines()[-1])["peak_bytes"]
        print(f"  {method}: peak {peaks[method] / 2**30:.2f} GiB at {tokens} tokens", flush=True)
    return {"experiment": "peak_memory", "tokens": tokens, "coserve_bytes": peaks["coserve"], "peft_bytes": peaks["peft"],
            "ratio": peaks["coserve"] / peaks["peft"]}


def run_facts(script: str, threads: int) -> dict[str, Any]:
    """Where, when and on what a script of this directory ran."""
    names = ("torch", "transformers", "peft", "coserve")
    return {
        "device": f"{platform.machine()} CPU, {threads} threads, {torch.backends.cpu.get_cpu_capability()}",
        "date": datetime.date.today().isoformat(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "command": " ".join(["python", f"bench/{script}", *sys.argv[1:]]),
        "model": "SmolLM2-135M-Instruct, float32, LoRA r16 on all linears",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "finetune_cpu.json")
    parser.add_argument("--quick", action="store_true", help="one pair at short lengths: a test of the script")
    parser.add_argument("--probe", choices=["coserve", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=4096, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.probe:
        probe(args.probe, args.tokens)
        return
    long, middle, pairs, count = (256, 128, 1, 4) if args.quick else (4096, 1024, args.pairs, STEP_EXAMPLES)
    results = [peak_memory(long, args.threads)]
    model = load_model(device="cpu", dtype="float32")
    peer = PeftPeer(model.directory)
    problems = gsm8k_examples(model, count)
    batch = best_batch_size(peer, problems)
    for name, examples, microbatch, batch_size in (
        ("one_example_middle", [long_example(model, middle)], middle, 1),
        ("gsm8k_packed_masked", problems, 2048, batch),
        ("one_example_long", [long_example(model, long)], long, 1),
    ):
        results.append(compare(name, model, peer, examples, microbatch=microbatch, batch_size=batch_size, pairs=pairs))
    results.append(saved_bytes(model, peer, middle))
    record = {
        **run_facts(Path(__file__).name, args.threads),
        "text": "GSM8K" if GSM8K.is_file() else "random tokens",
        "results": results,
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    for row in results:
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
