"""`coserve bench paper`: arguments, what is told meanwhile, and the files of results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from coserve.bench.cells import CellStore
from coserve.bench.pages import make_sections_page
from coserve.bench.paper.evaluation import PaperConfig, quick_config
from coserve.bench.paper.evaluation import simulated as evaluate
from coserve.bench.paper.page import simulated_section
from coserve.bench.paper.rows import describe_simulated
from coserve.bench.results import result_head
from coserve.bench.rivals import COSERVE, Configuration, Rivals, RivalSetup
from coserve.bench.servers import healthy
from coserve.bench.trainers import JobData
from coserve.bench.versus import BurstTraffic, Prompts, Versus, VersusConfig, make_configurations
from coserve.bench.versuspage import versus_section
from coserve.bench.versusrows import describe_comparison, describe_row, load_phrase, make_comparisons, make_versus_rows
from coserve.bench.vllmserver import vllm_versions
from coserve.bench.workload import ALPHA, RANK, prompts, word_ids, write_training_file
from coserve.cli.settings import read_numbers
from coserve.config.values import require
from coserve.core import CoserveError, one_line
from coserve.machine import device_name, versions
from coserve.runtime.loaded import dtype_name, find_model

console = Console()


class MeasurementFailed(CoserveError):
    """The measurement can't go on; the message says why. What is finished is kept."""


DTYPES = ("float32", "bfloat16")
FINETUNE_TOKENS, FINETUNE_BATCH, TRAINING_EXAMPLES = 512, 8, 256
NUM_WARMUPS = 8
PAPER_CONFIG = PaperConfig()
TOLD_CELLS = 20
"""Simulated cells between two lines where there is no terminal."""
LATE_FACTOR = 1.5
"""A request that takes so many times as long as its objectives allow is given up: it has missed them."""


def paper(
    model: Annotated[str | None, typer.Argument(help="Model (default SmolLM2).")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory; finished cells in it are kept.")] = Path("paper"),
    simulated: Annotated[
        bool, typer.Option("--simulated/--no-simulated", help="The paper's machines by arithmetic; about 15 minutes of a core.")
    ] = True,
    measured: Annotated[
        bool, typer.Option("--measured/--no-measured", help="Real programs on this machine's CPU, over HTTP.")
    ] = True,
    vllm: Annotated[
        str | None, typer.Option(metavar="ENV|URL", help="Virtual environment with vLLM for CPUs, or the URL of a vLLM that "
                                 "runs. Without it coserve is measured alone.")
    ] = None,
    rates: Annotated[str, typer.Option(help="Requests per second, joined by commas.")] = "0.1,0.35,0.7",
    burst: Annotated[bool, typer.Option("--burst/--no-burst", help="Also 20 s of 1 request/s amid 0.1.")] = True,
    alone: Annotated[bool, typer.Option("--alone", help="Also training without requests.")] = False,
    repeats: Annotated[int, typer.Option(help="Interleaved repeats.")] = 3,
    window_s: Annotated[float, typer.Option(help="Seconds that are counted in each cell.")] = 46.0,
    tpot_ms: Annotated[float, typer.Option(help="Objective: mean time per output token.")] = 150.0,
    ttft_ms: Annotated[float, typer.Option(help="Objective: time to the first token.")] = 3000.0,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, on all sides.")] = "float32",
    quick: Annotated[
        bool, typer.Option("--quick", help="Measured: once, at the middle rate, no burst. Simulated: 8B, two rates.")
    ] = False,
    simulated_arrivals: Annotated[
        str, typer.Option(help="Of simulated requests: poisson, gamma:CV or trace:FILE.")
    ] = PAPER_CONFIG.arrivals.kind,
    simulated_s: Annotated[float, typer.Option(help="Simulated seconds counted in each cell.")] = PAPER_CONFIG.duration,
    workers: Annotated[int | None, typer.Option(help="Processes that simulate (one per processor).")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and training data.")] = 0,
) -> None:
    """The paper's evaluation by arithmetic, and one server that serves and trains against vLLM and transformers + peft here."""
    require(simulated or measured, "measured", "there is nothing to do; leave --no-simulated or --no-measured out")
    require(dtype in DTYPES, "dtype", f"must be {' or '.join(DTYPES)}, got {dtype!r}")
    values = tuple(sorted(read_numbers(rates, "rates", float)))
    config = VersusConfig(
        rates=(values[len(values) // 2],) if quick else values, burst=BurstTraffic() if burst and not quick else None,
        repeats=1 if quick else repeats, window_s=window_s, tpot_ms=tpot_ms, ttft_ms=ttft_ms,
        seed=seed, alone=alone,
    )
    asked = replace(
        PAPER_CONFIG, arrivals=replace(PAPER_CONFIG.arrivals, kind=simulated_arrivals), duration=simulated_s, seed=seed
    )
    given = read_vllm(vllm if measured else None)  # what is wrong is told before anything runs
    sections: list[str] = []

    def write(name: str, data: dict[str, Any], section: str, lines: Iterable[str]) -> None:
        """Writes and tells a part's results, and the page with all parts so far: the next one may fail."""
        output.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(json.dumps(data, indent=1) + "\n")
        sections.append(section)
        title = "Co-serving: the paper's evaluation" if simulated else f"Co-serving {data['common']['model']}"
        (output / "paper.html").write_text(make_sections_page(title, sections), encoding="utf-8")
        for line in lines:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        print(f"results in {output / name}, page in {output / 'paper.html'}")

    if simulated:
        count = workers if workers is not None else len(os.sched_getaffinity(0))
        data = simulate_paper(quick_config(asked) if quick else asked, output, count)
        write("paper.json", data, simulated_section(data), describe_simulated(data))
    if measured:
        data = measure(config, given, output, model, dtype)
        lines = (*map(describe_row, data["results"]), *map(describe_comparison, data["comparisons"]))
        write("measured.json", data, versus_section(data), lines)


def simulate_paper(config: PaperConfig, output: Path, workers: int) -> dict[str, Any]:
    """The simulated part as a result file's data. Raises ConfigError, InvalidRequest, NotFound."""
    columns = (TextColumn("simulates"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def listen(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{done} of {total}: {label}")
            if not console.is_terminal and (done == total or done % TOLD_CELLS == 0):
                console.print(f"{done} of {total} simulated", highlight=False, style="dim")

        data = evaluate(config, output, workers=workers, listen=listen)
    return {**result_head(f"{data['simulated_device']['name']} (simulated)", versions()), **data}


def measure(
    config: VersusConfig, vllm: tuple[Path | str | None, dict[str, str]], output: Path, model: str | None, dtype: str
) -> dict[str, Any]:
    """The measured part as a result file's data. vllm: as `read_vllm` found it. Raises ConfigError, OSError, RuntimeError."""
    cores = sorted(os.sched_getaffinity(0))
    require(len(cores) > 1, "cores", "this needs two processors at least, to divide them")
    where, of_vllm = vllm
    require(importlib.util.find_spec("openai") is not None, "openai", "jobs are created with it: pip install 'coserve[demo]'")
    configurations = make_configurations(cores)
    missing = find_missing(configurations, where)
    found = find_model(model, device="cpu", dtype=dtype, report=lambda line: console.print(line, style="dim"))
    output.mkdir(parents=True, exist_ok=True)
    words = word_ids(found.tokenizer)
    training = write_training_file(
        output / f"training-{FINETUNE_TOKENS}-{config.seed}.jsonl", found.tokenizer, words, mean_tokens=FINETUNE_TOKENS,
        count=TRAINING_EXAMPLES, seed=config.seed,
    )
    longest_ms = config.ttft_ms + config.output_tokens * config.tpot_ms

    def make_prompts(count: int, key: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        source = prompts(words, key)
        return tuple(tuple(source(config.prompt_tokens)) for _ in range(count))

    setup = RivalSetup(
        model=found.directory, vllm=where, data=JobData(training, FINETUNE_BATCH), directory=output, dtype=dtype,
        objectives=config.objectives, timeout_s=LATE_FACTOR * longest_ms / 1e3,
        warmup=make_prompts(NUM_WARMUPS, (config.seed, 1 << 30)),
    )
    known = {**versions(), **_version("peft"), **of_vllm}
    common = {
        "model": found.name, "fingerprint": found.fingerprint, "dtype": dtype_name(found.dtype), "cores": len(cores),
        "finetune_tokens": FINETUNE_TOKENS, "finetune_batch": FINETUNE_BATCH, "rank": RANK, "alpha": ALPHA,
        "timeout_s": setup.timeout_s,
    }
    results = _cells(config, configurations, setup, missing, {**common, "versions": known, "device": device_name(found.device)},
                     make_prompts)
    return {
        **result_head(device_name(found.device), known), "objectives": asdict(config.objectives),
        "settings": asdict(config), "common": common, "results": results, "comparisons": make_comparisons(results),
    }


def read_vllm(given: str | None) -> tuple[Path | str | None, dict[str, str]]:
    """Where vLLM is (an environment, the URL of a server, or nowhere), and its versions. Raises ConfigError."""
    if given is None:
        return None, {}
    if not given.startswith(("http://", "https://")):
        return Path(given), vllm_versions(Path(given))
    url = given.rstrip("/").removesuffix("/v1")
    try:
        usable = url.startswith("http://") and urlsplit(url).port is not None
    except ValueError:  # the port is no number
        usable = False
    require(usable, "vllm", f"a URL must be http://HOST:PORT, got {given}")
    require(healthy(url), "vllm", f"no server is healthy at {url}: start vLLM there first, or give its environment")
    return url, {"vllm": f"at {url}"}


def find_missing(configurations: list[Configuration], where: Path | str | None) -> dict[str, str]:
    """Why configurations can't be measured, by name. A vLLM that runs already has its place, which is taken for the middle
    split's."""
    others = [configuration.name for configuration in configurations if configuration.name != COSERVE]
    if where is None:
        return dict.fromkeys(others, "no vLLM was given (--vllm)")
    if importlib.util.find_spec("peft") is None:
        return dict.fromkeys(others, "peft is not installed: pip install peft")
    if isinstance(where, Path):
        return {}
    splits = [configuration.name for configuration in configurations if configuration.pinned]
    kept = splits[len(splits) // 2]
    reason = f"a vLLM that runs already has its processors; it was taken for {kept}"
    return {name: reason for name in others if name != kept}


def _cells(
    config: VersusConfig, configurations: list[Configuration], setup: RivalSetup, missing: dict[str, str],
    common: dict[str, Any], make_prompts: Prompts,
) -> list[dict[str, Any]]:
    """Measures all cells, and tells of each. Raises MeasurementFailed."""
    begun = 0

    def listen(label: str, stored: bool) -> None:
        nonlocal begun
        begun += 1
        name, load, repeat = label.rsplit("-", 2)
        kept = " (kept from before)" if stored else ""
        console.print(f"{begun} of {total}: {name} {load_phrase(load)}, repeat {int(repeat) + 1}{kept}", highlight=False,
                      markup=False)

    store = CellStore(setup.directory, common, listen)
    with ended_by_sigterm(), Rivals(setup) as rivals:
        versus = Versus(config, configurations, rivals, make_prompts, store, missing=missing,
                        tell=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
        total = sum(configuration.name not in missing for configuration, _, _ in versus.plan())
        for name, reason in missing.items():
            console.print(f"{name} is left out: {reason}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        console.print(f"{total} cells, about {versus.expected_s() / 60:.0f} minutes; each finished one is kept: after Ctrl-C "
                      "the same command goes on", style="dim", highlight=False)
        try:
            cells = versus.measure()
        except RuntimeError as error:
            raise MeasurementFailed(f"{one_line(error, 400)}; the same command goes on from the last finished cell") from error
    return make_versus_rows(cells, config.objectives)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """In the block SIGTERM raises SystemExit, so that processes that were started are ended, halted ones too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _version(package: str) -> dict[str, str]:
    """Of a package that may not be there."""
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}
