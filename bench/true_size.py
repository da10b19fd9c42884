"""Models of true size on a CPU with little memory: exact, trained, served beside a job, and counted. One JSON, row by row.

    python bench/true_size.py [--directory build/true-size] [--parts load,tokens,gradients,steps,serve,qwen] [--quick]

Llama-3.1-8B's shapes with random bfloat16 weights in shards, and in `qwen` Qwen2.5-14B's with its matrices in 8-bit floats. The
checkpoints are drawn once, and take 16 GB, 30 GB and (two layers of the former) 5 GB of disk. Every model is held by a process
of its own, one at a time. --quick: few layers of small widths instead, to see that everything runs.

    load       the weights alone: how far the peak lies above what is counted
    tokens     8 prompts, 8 greedy tokens each, against transformers in bfloat16 over the same answers. A near tie: where
               transformers prefers another token, by less than the resolution of bfloat16 at its logit
    gradients  LoRA on all linears, 512 tokens, in bfloat16, against float32 from transformers + peft: the error beside that of
               peft in bfloat16. A model of two layers, since 8 billion weights in float32 don't fit; widths are true
    steps      `coserve finetune`: two optimizer steps on about 512 tokens; memory against `coserve plan`
    serve      `coserve serve`: chat alone and beside a job, over HTTP; memory against the start's lines
    qwen       the same without a job, of 14 billion parameters with --quantization fp8

Peaks are resident sizes, with Python and its libraries, of which a process has about 0.5 GiB.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from gpu_model import SHAPES
from large_cpu import ANSWER, MODEL, POLL_S, QUESTION, PeakMemory, draw_checkpoint, measure_training
from safetensors.torch import load_file

from coserve.bench.servers import running_server
from coserve.machine import device_name, versions

QWEN: Mapping[str, Any] = {
    "vocab_size": 152064, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "max_position_embeddings": 32768, "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
SMALL: Mapping[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}
REPEATS = 47
"""Of the answer, so that the chat has about 512 tokens."""
CHATS, CHAT_TOKENS = 3, 8
JOB_S = 3600.0
CHILDREN = Path(__file__).with_name("true_size_children.py")
GIB = 1 << 30


class Places(NamedTuple):
    """The checkpoints of both models and of the cut one, and a directory for results that goes at the end."""

    llama: Path
    cut: Path
    qwen: Path
    scratch: Path


def run_child(name: str, directory: Path, scratch: Path, *arguments: str) -> int:
    """Runs a part's process; the largest resident bytes of it. Raises RuntimeError with its last lines."""
    command = [sys.executable, str(CHILDREN), name, str(directory), str(scratch), *arguments]
    with (scratch / "child.log").open("w+") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        memory = PeakMemory(process.pid)
        process.wait()
        peak = memory.end()
        log.seek(0)
        if process.returncode:
            raise RuntimeError(f"{name} failed:\n{log.read()[-4000:]}")
    return peak


def result(scratch: Path, name: str) -> Any:
    return json.loads((scratch / f"{name}.json").read_text())


def load(places: Places) -> dict[str, Any]:
    run_child("load", places.llama, places.scratch, "none")
    found = result(places.scratch, "load")
    above = found["peak_bytes"] - found["before_bytes"]
    return {**found, "peak_by_counted": above / found["counted_bytes"]}


def tokens(places: Places) -> dict[str, Any]:
    peaks = [run_child(name, places.llama, places.scratch) for name in ("answers", "checked_answers")]
    rows, own = result(places.scratch, "checked"), result(places.scratch, "answers")
    others = [row["below"] for row in rows if not row["equal"]]
    return {
        "tokens": len(rows), "equal": len(rows) - len(others), "near_ties": sum(below < 1 for below in others),
        "worst_below_in_resolutions": max(others, default=0.0), "answer_s": own["seconds"],
        "peak_bytes": {"coserve": peaks[0], "transformers": peaks[1]},
    }


def gradients(places: Places) -> dict[str, Any]:
    run_child("gradients", places.cut, places.scratch)
    for dtype in ("bfloat16", "float32"):
        run_child("peft_gradients", places.cut, places.scratch, dtype)
    own, theirs, exact = (
        load_file(places.scratch / f"{name}.safetensors") for name in ("coserve", "peft-bfloat16", "peft-float32")
    )
    assert own.keys() == theirs.keys() == exact.keys()
    errors = {
        name: ((own[name] - exact[name]).norm().item(), (theirs[name] - exact[name]).norm().item()) for name in exact
    }
    whole = sum(value.square().sum().item() for value in exact.values()) ** 0.5
    mine, peers = (sum(pair[side] ** 2 for pair in errors.values()) ** 0.5 / whole for side in (0, 1))
    return {
        "layers": 2, "tensors": len(errors), "error": mine, "error_of_peft": peers, "ratio": mine / peers,
        "worst_ratio_of_a_tensor": max(a / b for a, b in errors.values()),
        "loss": {name: result(places.scratch, name)["loss"] for name in ("coserve", "peft-bfloat16", "peft-float32")},
    }


def steps(places: Places) -> dict[str, Any]:
    row = measure_training(places.llama, places.scratch, REPEATS)
    command = [
        sys.executable, "-m", "coserve", "plan", str(places.llama), "--dtype", "bfloat16", "--target-modules", "all-linear",
        "--sequence-length", str(row["tokens"]), "--no-baselines", "--json", "-",
    ]
    plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    planned = plan["stages"][-1]["total_bytes"] + sum(plan["beside_every_total"].values())
    return {**row, "planned_bytes": planned, "peak_by_planned": row["peak_bytes"] / planned}


def said_bytes(log: str) -> dict[str, float]:
    """What the start's line said of memory, in bytes."""
    found = re.search(r"memory\s+weights ([\d.]+) GiB; pool ([\d.]+) GiB", log)
    if found is None:
        raise RuntimeError(f"the server said nothing of memory:\n{log[-2000:]}")
    return {name: float(value) * GIB for name, value in zip(("weights", "pool"), found.groups(), strict=True)}


def asked(reply: httpx.Response) -> Any:
    """What a server answers. Raises RuntimeError with its words if it refuses."""
    if reply.is_error:
        raise RuntimeError(f"{reply.request.url.path}: {reply.text[:1000]}")
    return reply.json()


def chat_seconds(url: str, model: str) -> float:
    """Seconds of one chat of CHAT_TOKENS tokens."""
    began = time.perf_counter()
    body = {"model": model, "messages": [{"role": "user", "content": QUESTION}], "max_tokens": CHAT_TOKENS, "temperature": 0}
    asked(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=JOB_S))
    return time.perf_counter() - began


def run_job(url: str, model: str, scratch: Path) -> dict[str, Any]:
    """A job of two steps on short chats, until its end."""
    data = scratch / "job.jsonl"
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER * 3}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 4)
    with data.open("rb") as file:
        sent = asked(httpx.post(f"{url}/v1/files", files={"file": file}, data={"purpose": "fine-tune"}, timeout=JOB_S))
    method = {"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2}}}
    body = {"model": model, "training_file": sent["id"], "max_steps": 2, "rank": 16, "method": method}
    began = time.perf_counter()
    job = asked(httpx.post(f"{url}/v1/fine_tuning/jobs", json=body, timeout=JOB_S))
    while job["status"] not in ("succeeded", "failed", "cancelled") and time.perf_counter() - began < JOB_S:
        time.sleep(POLL_S)
        job = asked(httpx.get(f"{url}/v1/fine_tuning/jobs/{job['id']}", timeout=JOB_S))
    return {"status": job["status"], "seconds": time.perf_counter() - began, "error": job.get("error")}


def served(directory: Path, scratch: Path, *flags: str, with_job: bool) -> dict[str, Any]:
    """A server's start, chats alone, and chats beside a job."""
    command = [sys.executable, "-m", "coserve", "serve", str(directory), "--data-dir", str(scratch / directory.name), *flags]
    began = time.perf_counter()
    with running_server(command, scratch / "serve.log") as server:
        ready_s, memory = time.perf_counter() - began, PeakMemory(server.group.pid)
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        alone = [chat_seconds(server.url, model) for _ in range(CHATS)]
        job: dict[str, Any] = {}
        beside: list[float] = []
        if with_job:
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(run_job, server.url, model, scratch)
                while not running.done():
                    beside.append(chat_seconds(server.url, model))
                job = running.result()
        time.sleep(2 * POLL_S)
        peak, said = memory.end(), said_bytes(server.log.read_text())
    return {
        "ready_s": ready_s, "chat_s": alone, "chat_beside_job_s": beside, "job": job, "said_bytes": said, "peak_bytes": peak,
        "peak_by_said": peak / sum(said.values()),
    }


def serve(places: Places) -> dict[str, Any]:
    return served(places.llama, places.scratch, "--dtype", "bfloat16", with_job=True)


def qwen(places: Places) -> dict[str, Any]:
    run_child("load", places.qwen, places.scratch, "fp8")
    loaded = result(places.scratch, "load")
    loaded["peak_by_counted"] = (loaded["peak_bytes"] - loaded["before_bytes"]) / loaded["counted_bytes"]
    flags = ("--dtype", "bfloat16", "--quantization", "fp8")
    return {"load": loaded, **served(places.qwen, places.scratch, *flags, with_job=False)}


PARTS: Mapping[str, Callable[[Places], dict[str, Any]]] = {
    "load": load, "tokens": tokens, "gradients": gradients, "steps": steps, "serve": serve, "qwen": qwen,
}


def draw(places: Places, parts: list[str], quick: bool) -> None:
    """The checkpoints that the parts need."""
    llama, qwen_sizes = (dict(SMALL), dict(SMALL)) if quick else (dict(SHAPES[MODEL]), dict(QWEN))
    if {"load", "tokens", "steps", "serve"} & {*parts}:
        draw_checkpoint(places.llama, sizes=llama)
    if "gradients" in parts:
        draw_checkpoint(places.cut, sizes={**llama, "num_hidden_layers": 2}, num_shards=2)
    if "qwen" in parts:
        qwen_sizes.pop("head_dim", None)
        draw_checkpoint(places.qwen, "qwen2", qwen_sizes, num_shards=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("build/true-size"), help="of the checkpoints; 51 GB")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few layers of small widths")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "true_size.json")
    options = parser.parse_args()
    parts = options.parts.split(",")
    unknown = {*parts} - PARTS.keys()
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    base = options.directory / ("quick" if options.quick else "full")
    record: dict[str, Any] = {
        "device": device_name(torch.device("cpu")), "date": datetime.date.today().isoformat(), "versions": versions(),
        "command": " ".join(["python", "bench/true_size.py", *sys.argv[1:]]), "quick": options.quick, "results": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        places = Places(base / "llama", base / "cut", base / "qwen", Path(scratch))
        draw(places, parts, options.quick)
        for part in parts:
            began = time.perf_counter()
            row = {"part": part, **PARTS[part](places)}
            record["results"].append({**row, "part_s": time.perf_counter() - began})
            print(json.dumps(record["results"][-1], indent=1), flush=True)
            options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
