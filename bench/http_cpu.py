"""The server under load while a job trains: requests by the openai client on the same machine. One run, one JSON.

    python bench/http_cpu.py --rate 0.74 --tpot-ms 143 [--engines 2:,2:passive,1:] [--requests 60] [--output FILE]

Each engine setting is THREADS:WAIT: threads of the engine process, and OpenMP's wait policy there, or nothing. Each setting and
repeat gets a fresh server, one after another. Poisson arrivals, 128 tokens in, 64 out. A request is timed where the client
sees it: from when it was due to each chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from openai import AsyncOpenAI, OpenAI, OpenAIError

from coserve.bench.arrivals import Arrival, ArrivalConfig, make_arrivals
from coserve.bench.counters import read_counters
from coserve.bench.metrics import RequestRecord, SloInMs, summarize
from coserve.bench.results import result_head
from coserve.bench.servers import HealthyServer, descendants, processor_seconds, running_server
from coserve.bench.workload import prompts, word_ids, write_training_file
from coserve.machine import device_name, versions
from coserve.model.locate import locate_model
from coserve.text.tokenizer import ChatTokenizer

SETTLE_S = 8.0
DRAIN_S = 60.0
FINETUNE_TOKENS = "coserve_finetune_tokens_total"


def processor_use(api: int) -> dict[str, float]:
    """Seconds by process: this one, which is the client, the API's, and its child, the engine's."""
    engine = sum(map(processor_seconds, descendants(api)))
    return {"client": time.process_time(), "api": processor_seconds(api), "engine": engine}


def server(options: argparse.Namespace, engine: str, directory: Path) -> contextlib.AbstractContextManager[HealthyServer]:
    """A server under one engine setting; it is ended afterwards."""
    threads, _, wait = engine.partition(":")
    command = [
        sys.executable, "-m", "coserve", "serve", "--threads", threads, "--dtype", options.dtype,
        "--data-dir", str(directory / "data"), "--slo-tpot-ms", str(options.tpot_ms),
        "--slo-ttft-ms", str(options.ttft_ms), "--policy", options.policy,
    ]
    return running_server(command, directory / "log", {**os.environ, **({"OMP_WAIT_POLICY": wait} if wait else {})})


async def send(client: AsyncOpenAI, model: str, arrival: Arrival, prompt: list[int], origin: float) -> RequestRecord:
    """One streamed request; its times are seconds since `origin`."""
    times: list[float] = []
    finished = False
    try:
        stream: AsyncIterator[Any] = await client.completions.create(
            model=model, prompt=prompt, max_tokens=arrival.output_tokens, temperature=0, stream=True,
            extra_body={"ignore_eos": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        )
        async for chunk in stream:
            times += [time.monotonic() - origin] * (chunk.usage.completion_tokens - len(times))
            finished = finished or any(choice.finish_reason == "length" for choice in chunk.choices)
    except OpenAIError as error:
        print(f"request failed: {error}", file=sys.stderr)
    return RequestRecord(
        due_s=arrival.due_s, prompt_tokens=len(prompt), token_times=tuple(times),
        finished=finished and len(times) == arrival.output_tokens,
    )


async def load(url: str, model: str, arrivals: list[Arrival], texts: list[list[int]]) -> list[RequestRecord]:
    """Sends the arrivals when they are due."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        origin, tasks = time.monotonic(), []
        for arrival, prompt in zip(arrivals, texts, strict=True):
            await asyncio.sleep(max(0.0, arrival.due_s - (time.monotonic() - origin)))
            tasks.append(asyncio.create_task(send(client, model, arrival, prompt, origin)))
        return list(await asyncio.wait_for(asyncio.gather(*tasks), DRAIN_S + 120))


def finetuned(url: str) -> float:
    """Finetuning tokens (forward-token equivalents) so far."""
    try:
        return read_counters(url, [FINETUNE_TOKENS])[FINETUNE_TOKENS]
    except KeyError:
        sys.exit(f"/metrics has no {FINETUNE_TOKENS}")


def measure(options: argparse.Namespace, engine: str, seed: int) -> dict[str, Any]:
    """One server, one load."""
    tokenizer = ChatTokenizer.load(locate_model(None))
    words = word_ids(tokenizer)
    objectives = SloInMs(ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms)
    arrivals = make_arrivals(ArrivalConfig(), options.rate, options.requests, seed)
    source = prompts(words, (seed, 9))
    texts = [source(arrival.prompt_tokens) for arrival in arrivals]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        data = write_training_file(directory / "train.jsonl", tokenizer, words, mean_tokens=512, count=256, seed=seed)
        with server(options, engine, directory) as api:
            url, pid = api.url, api.group.pid
            client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
            model = client.models.list().data[0].id
            asyncio.run(load(url, model, [a._replace(due_s=0.0) for a in arrivals[:2]], texts[:2]))  # warms up
            uploaded = client.files.create(file=data, purpose="fine-tune")
            job = client.fine_tuning.jobs.create(
                model=model, training_file=uploaded.id,
                extra_body={"max_steps": 100_000, "max_microbatch_tokens": 2048, "too_long": "truncate",
                            "checkpoint_steps": 100_000, "learning_rate": 1e-5},
                hyperparameters={"batch_size": 8},
            )
            while not finetuned(url):
                time.sleep(0.2)
            time.sleep(SETTLE_S)
            before, used, started = finetuned(url), processor_use(pid), time.monotonic()
            records = asyncio.run(load(url, model, arrivals, texts))
            seconds = time.monotonic() - started
            rate = (finetuned(url) - before) / seconds
            shares = {name: (now - used[name]) / seconds for name, now in processor_use(pid).items()}
            client.fine_tuning.jobs.cancel(job.id)
    row = summarize(records, objectives, arrivals[-1].due_s)
    return {"engine": engine, "repeat": seed, "rate": options.rate, "finetune_tokens_per_s": rate, "cores_used": shares, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--tpot-ms", type=float, required=True, help="objective")
    parser.add_argument("--ttft-ms", type=float, default=3000.0, help="objective")
    parser.add_argument("--engines", default="2:,2:passive,1:", help="THREADS:WAIT, joined by commas")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=1, help="repeats, interleaved")
    parser.add_argument("--policy", default="coserve")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "http_cpu.json")
    options = parser.parse_args()
    rows = []
    for repeat in range(options.pairs):
        for engine in options.engines.split(","):
            rows.append(measure(options, engine, repeat))
            row = rows[-1]
            print(f"{engine}: {row['slo_attainment']:.1%} of {row['num_requests']} in time, TPOT p50 "
                  f"{row['tpot_ms']['p50']:.0f} ms, finetuning {row['finetune_tokens_per_s']:.0f} tokens/s; cores used: "
                  + ", ".join(f"{name} {share:.2f}" for name, share in row["cores_used"].items()), flush=True)
    result = {
        **result_head(device_name(torch.device("cpu")), versions(), "python bench/http_cpu.py"),
        "objectives": {"tpot_ms": options.tpot_ms, "ttft_ms": options.ttft_ms}, "results": rows,
        "repeats": {
            engine: {
                "slo_attainment": mean(r["slo_attainment"] for r in mine),
                "finetune_tokens_per_s": median(r["finetune_tokens_per_s"] for r in mine),
            }
            for engine in options.engines.split(",") if (mine := [r for r in rows if r["engine"] == engine])
        },
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
