"""What the ingress of a fleet costs: streams through `coserve serve --replicas 1` beside the same through `coserve serve`.

    python bench/ingress_overhead.py --database-url postgresql://user@host/empty [--seconds 150] [--threads 1] [--output F]

Both run on the default model with default flags, each with so many clients that send one request after another (prompts of 32
random tokens, answers of 24 to 72). They take turns of a second: one is halted (SIGSTOP), with all its processes, while the
other is measured, so that what one does while it waits costs the other nothing. A machine's speed may change by a third within
minutes, and hardly does from one second to the next. (When each ran by itself, a minute apart, that hid the ingress's cost.)
What counts is what began and ended within one turn, but for the turn's first 0.2 s: from sending a request to its first chunk
with text (TTFT), and between chunks (ITL). An engine computes on all cores by default, so that whatever another process does
holds it up; --threads leaves cores free.

One JSON with all turns. For each figure: the mean of the differences between the fleet's turn and the direct server's before
it, without the tenth at either end, and its standard error. others: how much of one processor the server's processes take
together, without the engine's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean, median, stdev
from typing import Any

import httpx
import torch

from coserve.bench.results import result_head
from coserve.bench.servers import HealthyServer, command_of, descendants, processor_seconds, running_server
from coserve.bench.workload import prompts, word_ids
from coserve.machine import device_name, versions
from coserve.model.locate import locate_model
from coserve.text.tokenizer import ChatTokenizer

PROMPT_TOKENS, OUTPUT_TOKENS = 32, (24, 72)
TURN_S, SETTLE_S = 1.0, 0.2
"""A replica that is silent for 3 s counts as lost; halting one for a second harms nothing."""
ENGINE = "coserve.server.link.enginemain"
"""In the command of an engine's process."""
FIGURES = ("ttft_ms", "itl_ms")


@dataclass(slots=True)
class Served:
    """A server and what its clients have seen. pids: all its processes, which are in several process groups. spans: (figure,
    when it began, when it ended)."""

    server: HealthyServer
    pids: list[int]
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    def signal(self, number: int) -> None:
        """Sends a signal to all its processes."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def others_seconds(self) -> float:
        """Processor seconds of its processes so far, without the engine's."""
        return sum(processor_seconds(pid) for pid in self.pids if ENGINE not in command_of(pid))


async def stream(client: httpx.AsyncClient, served: Served, body: dict[str, Any]) -> None:
    """One request."""
    last, figure = time.perf_counter(), "ttft_ms"
    async with client.stream("POST", f"{served.server.url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                if event["choices"] and event["choices"][0]["text"]:
                    now = time.perf_counter()
                    served.spans.append((figure, last, now))
                    last, figure = now, "itl_ms"


@contextlib.asynccontextmanager
async def clients(
    served: Served, model: str, count: int, source: Callable[[int], list[int]], draw: Random
) -> AsyncIterator[None]:
    """So many clients, each with one request after another, until the context ends."""
    async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client:
        async def work() -> None:
            while True:
                await stream(client, served, {
                    "model": model, "prompt": source(PROMPT_TOKENS), "max_tokens": draw.randint(*OUTPUT_TOKENS),
                    "temperature": 0, "stream": True, "ignore_eos": True,
                })

        tasks = [asyncio.create_task(work()) for _ in range(count)]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()  # raises what has ended it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def take_turns(
    servers: dict[str, Served], model: str, count: int, seconds: float, source: Callable[[int], list[int]]
) -> list[dict[str, Any]]:
    """Measures all servers in turns. The turns, in order: the figures' means in milliseconds, as far as there are any."""
    turns: list[dict[str, Any]] = []
    async with contextlib.AsyncExitStack() as stack:
        for served in servers.values():
            await stack.enter_async_context(clients(served, model, count, source, Random(0)))
        await asyncio.sleep(5.0)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for name, served in servers.items():
                for other in servers.values():
                    if other is not served:
                        other.signal(signal.SIGSTOP)
                served.signal(signal.SIGCONT)
                served.spans.clear()
                before, began = served.others_seconds(), time.perf_counter()
                await asyncio.sleep(TURN_S)
                ended = time.perf_counter()
                taken = [span for span in served.spans if span[1] > began + SETTLE_S and span[2] < ended]
                share = (served.others_seconds() - before) / (ended - began)
                turns.append({"server": name, "others_share": round(share, 4)} | {
                    figure: round(1e3 * fmean(values), 3) for figure in FIGURES
                    if (values := [end - start for kind, start, end in taken if kind == figure])
                })
        for served in servers.values():
            served.signal(signal.SIGCONT)
    return turns


def compare(turns: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each figure: the direct server's median over its turns, the mean difference to the turn that follows, and that one's
    standard error."""
    found = {}
    for figure in (*FIGURES, "others_share"):
        pairs = [pair for pair in zip(turns[::2], turns[1::2], strict=True) if all(figure in turn for turn in pair)]
        apart = sorted(after[figure] - direct[figure] for direct, after in pairs)
        cut = len(apart) // 10
        kept = apart[cut : len(apart) - cut]
        found[figure] = {
            "direct": median(direct[figure] for direct, _ in pairs), "difference": fmean(kept),
            "error": stdev(kept) / len(kept) ** 0.5 if len(kept) > 1 else 0.0,
        }
    return found


@contextlib.contextmanager
def started(commands: dict[str, list[str]], root: Path) -> Iterator[dict[str, Served]]:
    """All servers, running."""
    with contextlib.ExitStack() as stack:
        servers = {}
        for name, command in commands.items():
            server = stack.enter_context(running_server(command, root / f"{name}.log"))
            servers[name] = Served(server, [server.group.pid, *descendants(server.group.pid)])
        try:
            yield servers
        finally:
            for served in servers.values():
                served.signal(signal.SIGCONT)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--database-url", required=True, help="an empty PostgreSQL database")
    parser.add_argument("--streams", default="8,32", help="streams at once, joined by commas")
    parser.add_argument("--seconds", type=float, default=150.0, help="for each number of streams")
    parser.add_argument("--model", help="a model's directory (the default model)")
    parser.add_argument("--threads", type=int, help="of each engine (as many as there are cores)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    source = prompts(word_ids(ChatTokenizer.load(locate_model(options.model))), (0, 1))
    serve = [sys.executable, "-m", "coserve", "serve", *([options.model] if options.model else [])]
    serve += [] if options.threads is None else ["--threads", str(options.threads)]
    results = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        fleet_flags = ["--replicas", "1", "--database-url", options.database_url, "--store", str(root / "store")]
        commands = {
            "direct": [*serve, "--data-dir", str(root / "one")],
            "ingress": [*serve, "--data-dir", str(root / "fleet"), *fleet_flags],
        }
        with started(commands, root) as servers:
            model = httpx.get(f"{servers['direct'].server.url}/v1/models", timeout=60).json()["data"][0]["id"]
            for count in map(int, options.streams.split(",")):
                turns = asyncio.run(take_turns(servers, model, count, options.seconds, source))
                differences = compare(turns)
                results[str(count)] = {"differences": differences, "turns": turns}
                for name, figure in differences.items():
                    scale, unit = (100, "% of a processor") if name == "others_share" else (1, " ms")
                    print(
                        f"{count} streams, {name.split('_')[0]}: {scale * figure['direct']:.1f}{unit}, through the ingress "
                        f"{scale * figure['difference']:+.1f} ({figure['difference'] / figure['direct']:+.1%}), standard error "
                        f"{scale * figure['error']:.1f} ({figure['error'] / figure['direct']:.1%})", flush=True)
    if options.output is not None:
        head = result_head(device_name(torch.device("cpu")), versions(), "python bench/ingress_overhead.py")
        options.output.write_text(json.dumps({**head, "streams": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
