"""A model of Llama-3.1-8B's size on a CPU: whether it fits, how long it takes to start, to answer and to train. One JSON.

    python bench/large_cpu.py [--directory build/llama-3.1-8b] [--output bench/results/large_cpu.json]

The checkpoint has the true shapes, nine safetensors shards and random bfloat16 weights; it is drawn once and takes 16 GB of
disk. Its tokenizer is the default model's. Served and trained as a user would, with default flags and one after the other:
`coserve serve` answers a prompt of 128 tokens with 16, over HTTP; `coserve finetune` takes two steps on one chat, of which the
second counts. Memory is the largest resident size of each process, added up.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from gpu_model import SHAPES, STD
from safetensors.torch import save_file
from transformers import AutoConfig

from coserve.bench.loads import CompletionClient
from coserve.bench.servers import descendants, running_server
from coserve.machine import device_name, versions
from coserve.model.architecture import read_architecture
from coserve.model.checkpoint import expected_shapes
from coserve.model.locate import locate_model

MODEL = "llama-3.1-8b"
NUM_SHARDS = 9
NOISE_ELEMENTS = (1 << 26) - 5
"""Random numbers that the matrices repeat, each from a place of its own. Rows have other lengths, so that no two are equal."""
PROMPT_TOKENS, OUTPUT_TOKENS = 128, 16
QUESTION, ANSWER = "What does a long answer look like? ", "It says the same thing again, and again. "
REPEATS = 35
"""Of the answer, so that the chat has about 350 tokens."""
POLL_S = 0.2


def draw_checkpoint(
    directory: Path, kind: str = "llama", sizes: Mapping[str, Any] = SHAPES[MODEL], num_shards: int = NUM_SHARDS
) -> None:
    """Writes a model, unless it is there: a shard at a time. kind, sizes: transformers' model type and its configuration."""
    if (directory / "model.safetensors.index.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = locate_model(None)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, directory)
    AutoConfig.for_model(
        kind, **sizes, architectures=[f"{kind.capitalize()}ForCausalLM"], torch_dtype="bfloat16"
    ).save_pretrained(directory)
    shapes = list(expected_shapes(read_architecture(directory)).items())
    noise = torch.randn(NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    places: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        tensors = {}
        for name, shape in shapes[shard * len(shapes) // num_shards : (shard + 1) * len(shapes) // num_shards]:
            count = torch.Size(shape).numel()
            start = len(places) * 7919 * 4099 % NOISE_ELEMENTS
            values = torch.ones(count).bfloat16()
            if not name.endswith("norm.weight"):
                values = noise.repeat(-(-(start + count) // NOISE_ELEMENTS))[start : start + count].clone()
            tensors[name] = values.view(shape)
            places[name] = file
        save_file(tensors, directory / file, metadata={"format": "pt"})
        print(f"drew {file}", flush=True)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def peak_of(pid: int) -> dict[int, int]:
    """Bytes that a process and each of its descendants had resident at most so far, by process."""
    found = {}
    for each in (pid, *descendants(pid)):
        try:
            status = Path(f"/proc/{each}/status").read_text()
        except OSError:  # it has ended
            continue
        peak = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
        found[each] = 0 if peak is None else int(peak.split()[1]) << 10
    return found


class PeakMemory:
    """The sum of the largest resident sizes of a process and its descendants, looked at five times a second."""

    def __init__(self, pid: int) -> None:
        self._peaks: dict[int, int] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(pid,), daemon=True)
        self._thread.start()

    def _watch(self, pid: int) -> None:
        while not self._ended.wait(POLL_S):
            for each, peak in peak_of(pid).items():  # one that has just ended says 0
                self._peaks[each] = max(peak, self._peaks.get(each, 0))

    def end(self) -> int:
        """Bytes; ends the watch."""
        self._ended.set()
        self._thread.join()
        return sum(self._peaks.values())


def measure_serving(directory: Path, scratch: Path) -> dict[str, Any]:
    """Start, one answer, memory."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "coserve", "serve", str(directory), "--data-dir", str(scratch / "data")]
    with running_server(command, scratch / "serve.log") as server:
        ready_s = time.perf_counter() - started
        memory = PeakMemory(server.group.pid)
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        client = CompletionClient(server.url, model)
        for _ in range(2):  # the second counts
            prompt = torch.randint(3, 40000, (PROMPT_TOKENS,)).tolist()
            sent = time.monotonic()
            reply = asyncio.run(client.send(prompt, OUTPUT_TOKENS))
            if reply.error is not None:
                raise RuntimeError(f"no answer: {reply.error}")
        first, last = reply.token_times[0], reply.token_times[-1]
        time.sleep(2 * POLL_S)
        log = [line for line in server.log.read_text().splitlines() if "held once" in line or "per token" in line]
        return {
            "experiment": "serve", "ready_s": ready_s, "ttft_s": first - sent, "prompt_tokens": PROMPT_TOKENS,
            "tpot_s": (last - first) / (OUTPUT_TOKENS - 1), "peak_bytes": memory.end(), "log": log,
        }


def measure_training(directory: Path, scratch: Path, repeats: int = REPEATS) -> dict[str, Any]:
    """Two steps on one chat. repeats: of its answer."""
    data, output = scratch / "chat.jsonl", scratch / "tuned"
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER * repeats}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    started = time.perf_counter()
    command = [sys.executable, "-m", "coserve", "finetune", str(directory), str(data), "-o", str(output), "--max-steps", "2"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    memory = PeakMemory(process.pid)
    text, _ = process.communicate()
    peak = memory.end()
    if process.returncode:
        raise RuntimeError(f"the job failed:\n{text[-4000:]}")
    with (output / "metrics.csv").open() as file:
        step = list(csv.DictReader(file))[-1]
    log = [line.strip() for line in text.splitlines() if "held once" in line or "GiB" in line]
    return {
        "experiment": "finetune", "rank": 16, "tokens": int(step["tokens"]), "step_s": float(step["seconds"]),
        "whole_s": time.perf_counter() - started, "peak_bytes": peak, "log": log,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--directory", type=Path, default=Path("build") / MODEL, help="of the checkpoint; 16 GB")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "large_cpu.json")
    options = parser.parse_args()
    draw_checkpoint(options.directory)
    rows = []
    measures: tuple[Callable[[Path, Path], dict[str, Any]], ...] = (measure_serving, measure_training)
    with tempfile.TemporaryDirectory() as scratch:
        for measure in measures:
            rows.append(measure(options.directory, Path(scratch)))
            print(json.dumps(rows[-1], indent=1), flush=True)
    record = {
        "device": device_name(torch.device("cpu")), "date": datetime.date.today().isoformat(), "versions": versions(),
        "command": " ".join(["python", "bench/large_cpu.py", *sys.argv[1:]]), "model": MODEL, "results": rows,
    }
    options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
