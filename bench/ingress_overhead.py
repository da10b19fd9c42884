"""What the ingress of a fleet costs: streams through `coserve serve --replicas 1` beside the same through `coserve serve`.

    python bench/ingress_overhead.py --database-url postgresql://user@host/empty [--rounds 4] [--threads 1] [--output F]

In each round both are started on the default model with default flags, one after the other, so that what one does while it
waits costs the other nothing. They get the same requests: so many clients at once, each of which sends four requests one after
another, with prompts of 32 random tokens and answers of 24 to 72. So requests begin at different times, as they do in use.
(When all begin together, one of them may get an iteration for itself, and the others wait for it: whether that happens decides
TTFT, and hides what the ingress costs.) An engine computes on all cores by default, so that whatever another process does holds
it up; --threads leaves cores free. Times are the client's: from sending a request to its first chunk with text (TTFT), and
between chunks (ITL). One JSON with each round's figures, and for each figure the median of the differences within a round, with
the standard error of their mean.

others: how much of one processor the server's processes take together, without the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median, stdev
from typing import Any, NamedTuple

import httpx
import torch

from coserve.bench.results import result_head
from coserve.bench.servers import HealthyServer, command_of, descendants, processor_seconds, running_server
from coserve.bench.workload import prompts, word_ids
from coserve.core import percentile
from coserve.machine import device_name, versions
from coserve.model.locate import locate_model
from coserve.text.tokenizer import ChatTokenizer

PROMPT_TOKENS, OUTPUT_TOKENS, REQUESTS = 32, (24, 72), 4
ENGINE = "coserve.server.link.enginemain"
"""In the command of an engine's process."""


class Asked(NamedTuple):
    """A request: its prompt's ids, and how many tokens it wants."""

    prompt: list[int]
    tokens: int


async def stream(client: httpx.AsyncClient, url: str, model: str, asked: Asked) -> tuple[float, list[float]]:
    """Seconds to the first chunk with text, and between its chunks."""
    body = {
        "model": model, "prompt": asked.prompt, "max_tokens": asked.tokens, "temperature": 0, "stream": True,
        "ignore_eos": True,
    }
    times = [time.perf_counter()]
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event["choices"] and event["choices"][0]["text"]:
                    times.append(time.perf_counter())
    return times[1] - times[0], [after - before for before, after in pairwise(times[1:])]


async def measure(url: str, model: str, plans: list[list[Asked]]) -> dict[str, float]:
    """So many clients at once, each with its requests: medians and p95 in milliseconds."""
    found: list[tuple[float, list[float]]] = []

    async def work(client: httpx.AsyncClient, plan: list[Asked]) -> None:
        found.extend([await stream(client, url, model, asked) for asked in plan])

    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(work(client, plan) for plan in plans))
    ttft, itl = [first for first, _ in found], [gap for _, gaps in found for gap in gaps]
    return {
        f"{name}_{key}_ms": 1e3 * percentile(values, share)
        for name, values in (("ttft", ttft), ("itl", itl)) for key, share in (("p50", 0.5), ("p95", 0.95))
    } | {"itl_mean_ms": 1e3 * sum(itl) / len(itl)}


def others_seconds(server: HealthyServer) -> float:
    """Processor seconds of the server's processes so far, without the engine's."""
    pids = [server.group.pid, *descendants(server.group.pid)]
    return sum(processor_seconds(pid) for pid in pids if ENGINE not in command_of(pid))


def make_plans(source: Callable[[int], list[int]], draw: Random, clients: int) -> list[list[Asked]]:
    """The requests of each client."""
    asked = [Asked(source(PROMPT_TOKENS), draw.randint(*OUTPUT_TOKENS)) for _ in range(clients * REQUESTS)]
    return [asked[client::clients] for client in range(clients)]


def differences(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each figure: the direct server's median, the median of the differences within a round, and the standard error of
    their mean."""
    by_round: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_round.setdefault(row["round"], {})[row["server"]] = row
    found = {}
    for name in [name for name in rows[0] if name.endswith(("_ms", "_share"))]:
        pairs = [(row["direct"][name], row["ingress"][name] - row["direct"][name]) for row in by_round.values()]
        apart = [difference for _, difference in pairs]
        found[name] = {
            "direct": median(direct for direct, _ in pairs), "difference": median(apart),
            "error": stdev(apart) / len(apart) ** 0.5 if len(apart) > 1 else 0.0,
        }
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--database-url", required=True, help="an empty PostgreSQL database")
    parser.add_argument("--streams", default="8,32", help="streams at once, joined by commas")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", help="a model's directory (the default model)")
    parser.add_argument("--threads", type=int, help="of each engine (as many as there are cores)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    counts = [int(count) for count in options.streams.split(",")]
    tokenizer = ChatTokenizer.load(locate_model(options.model))
    source, draw = prompts(word_ids(tokenizer), (0, 1)), Random(0)
    serve = [sys.executable, "-m", "coserve", "serve", *([options.model] if options.model else [])]
    serve += [] if options.threads is None else ["--threads", str(options.threads)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        fleet = ["--replicas", "1", "--database-url", options.database_url, "--store", str(root / "store")]
        commands = {
            "direct": [*serve, "--data-dir", str(root / "one")], "ingress": [*serve, "--data-dir", str(root / "fleet"), *fleet],
        }
        for number in range(options.rounds):
            plans = {count: make_plans(source, draw, count) for count in counts}
            for name in list(commands)[:: 1 if number % 2 else -1]:
                with running_server(commands[name], root / f"{name}.log") as server:
                    model = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]["id"]
                    asyncio.run(measure(server.url, model, make_plans(source, Random(1), 2)))  # warms up
                    for count in counts:
                        began, before = time.perf_counter(), others_seconds(server)
                        figures = asyncio.run(measure(server.url, model, plans[count]))
                        figures["others_share"] = (others_seconds(server) - before) / (time.perf_counter() - began)
                        rows.append({"server": name, "streams": count, "round": number, **figures})
                        times = {key.removesuffix("_ms"): value for key, value in figures.items() if key.endswith("_ms")}
                        print(f"{name:8} {count:3} streams: " + ", ".join(
                            f"{key.replace('_', ' ')} {value:.1f}" for key, value in times.items()
                        ) + f" ms, others {figures['others_share']:.1%}", flush=True)
    summary = {str(count): differences([row for row in rows if row["streams"] == count]) for count in counts}
    for count_name, figures in summary.items():
        for name, figure in figures.items():
            if name.endswith("_share"):
                print(f"{count_name} streams, others: {figure['direct']:.1%} of a processor, with the ingress "
                      f"{figure['difference']:+.1%}")
                continue
            print(f"{count_name} streams, {name.removesuffix('_ms').replace('_', ' ')}: {figure['direct']:.1f} ms, through the "
                  f"ingress {figure['difference']:+.1f} ms ({figure['difference'] / figure['direct']:+.1%}), standard error "
                  f"{figure['error']:.1f}")
    if options.output is not None:
        head = result_head(device_name(torch.device("cpu")), versions(), "python bench/ingress_overhead.py")
        options.output.write_text(json.dumps({**head, "differences": summary, "rounds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
