"""`coserve demo`: arguments, results on disk, exit codes.

Owns: the output directory, files and last lines. Does not own: what happens (story.py).
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from coserve.bench.metrics import SloInMs
from coserve.core import ConfigError, InvalidRequest
from coserve.demo.client import require_client
from coserve.demo.display import Display, answers_table, summary_lines
from coserve.demo.server import DemoFailed, Server
from coserve.demo.story import TPOT_MS, TTFT_MS, DemoResult, DemoSettings, run_demo
from coserve.demo.watch import SHORT_S
from coserve.finetune.job import MetricsTable
from coserve.plots import latency_curve, loss_curve, throughput_chart

MARK, LOG, DATA, REPORT = "coserve-demo", "server.log", "data", "report.json"
"""In the output directory; MARK says that it may be replaced."""
_STOPPED, _FAILED = 130, 1
console = Console()


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for results, replaced.")] = Path("demo-output"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here as JSON.")] = None,
    slo_tpot_ms: Annotated[float, typer.Option(help="Objective of the chat: milliseconds per output token.")] = TPOT_MS,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server running at the end, until Ctrl-C.")] = False,
) -> None:
    """Serve a model, finetune it beside live chat, then ask base and tuned the same questions."""
    require_client()
    if not 0 < slo_tpot_ms < float("inf"):
        raise ConfigError(f"slo_tpot_ms: must be above 0, got {slo_tpot_ms:g}", param="slo_tpot_ms")
    prepare(output)
    settings = DemoSettings(
        data_dir=output / DATA, log=output / LOG, objectives=SloInMs(tpot_ms=slo_tpot_ms, ttft_ms=TTFT_MS)
    )
    sys.exit(asyncio.run(run(settings, output, json_file, keep=keep)))


def prepare(output: Path) -> None:
    """An empty directory, with the mark of a demo. Raises InvalidRequest for one that holds something else."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARK).is_file())):
        raise InvalidRequest(f"output: {output} exists and holds no earlier demo; name another directory", param="output")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("`coserve demo` replaces this directory.\n")


async def run(settings: DemoSettings, output: Path, json_file: Path | None, *, keep: bool) -> int:
    """The whole demo; the exit code. SIGINT and SIGTERM stop the server too."""
    loop, this = asyncio.get_running_loop(), asyncio.current_task()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, this.cancel)
    finished = False

    async def finish(result: DemoResult, server: Server) -> None:
        nonlocal finished
        show(result, settings, output, display)
        write(result, settings, output, json_file)
        finished = True
        if keep:
            display.say(f"the server goes on at {server.url}/ until Ctrl-C")
            await asyncio.Event().wait()

    with Display(console) as display:
        try:
            await run_demo(settings, display, finish)
        except DemoFailed as error:
            display.close_board()
            print(f"error: {error}", file=sys.stderr)
            return _FAILED
        except asyncio.CancelledError:
            display.say("stopped, and the server with it")
            return 0 if finished else _STOPPED
    return 0


def adapter_directory(settings: DemoSettings, job: str) -> Path:
    """Where the server keeps the adapter of a job."""
    return settings.data_dir / "jobs" / job / "output"


def write(result: DemoResult, settings: DemoSettings, output: Path, json_file: Path | None) -> None:
    """report.json and the plots."""
    for path in (output / REPORT, json_file):
        if path is not None:
            path.write_text(result.report.to_json())
    rows = MetricsTable(adapter_directory(settings, result.job) / "metrics.csv").rows()
    loss_curve(rows, output / "loss.png", title="SmolLM2-135M-Instruct learns about Vellmoor")
    start_s = result.samples[0].time_s
    throughput_chart(
        [sample.time_s - start_s for sample in result.samples],
        {"finetuning": [sample.finetune_tokens for sample in result.samples],
         "inference": [sample.inference_tokens for sample in result.samples]},
        output / "throughput.png", span_s=SHORT_S, shaded=(result.chat_s[0] - start_s, result.chat_s[1] - start_s),
        shaded_label="chat arrives", title="One engine, two workloads",
    )
    times_ms = [chat.tpot_ms for chat in result.chats if chat.error is None and chat.tpot_ms is not None]
    latency_curve(
        times_ms, result.report.tpot_slo_ms, output / "tpot.png", label="milliseconds per output token, timed at the client",
        title="Chat beside a finetuning job",
    )


def show(result: DemoResult, settings: DemoSettings, output: Path, display: Display) -> None:
    """Answers, numbers, and how to go on."""
    console.print(answers_table(result.report.answers))
    for line in summary_lines(result.report, settings.objectives):
        display.say(line)
    display.say(f"plots         {output / 'loss.png'}, {output / 'throughput.png'}, {output / 'tpot.png'}")
    display.say(f"talk to it    coserve chat --adapter {adapter_directory(settings, result.job)}")
    display.say(f"serve it      coserve serve --data-dir {settings.data_dir}     (as {result.tuned})")
