"""Everything that needs a GPU, in one call of under ten minutes that can't be lost.

    bench/gpu.sh [--smoke] [--device auto|cpu|cuda] [--model llama-3.1-8b|smollm2|DIRECTORY] [--quick]
                 [--parts NAME,...] [--budget-s 540] [--output FOLDER]

Each part is a process of its own (gpu_course.py). The output folder gets gpu_rows.jsonl (every result, as it comes),
gpu_summary.json, gpu_table.txt, gpu_log.txt (what the parts printed) and gpu_profile.json (what the engine measured of the
machine). Exit code: 0 if all is well, 1 if a part failed, 2 if none failed and one was skipped for lack of time, 130 if it was
stopped. Not yet run on a GPU: none was there when this was written.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import gpu_report
from gpu_course import Course, Part

ROOT = Path(__file__).resolve().parents[1]
CHILD = Path(__file__).with_name("gpu_child.py")
FILES = ("gpu_rows.jsonl", "gpu_summary.json", "gpu_table.txt", "gpu_log.txt", "gpu_profile.json")
LIMIT_FACTOR, TESTS_LIMIT_S = 1.6, 200.0
"""A part is killed after so many times its planned seconds; the tests, which come last, have what is left."""
PLANNED_S = {
    "environment": 10, "kernels": 45, "engine": 45, "passes": 60, "peer": 40, "finetune-only": 46, "20-inference-only": 39,
    "20-coserve": 39, "20-layer-sliced": 39, "20-coserve-again": 39, "20-dynamic-temporal": 39, "5-coserve": 39, "row-cost": 20,
    "tests": 40,
}
"""Seconds of each part on an H100, in their order. finetune-only, the first cell, also measures what rows and units cost."""
SMOKE = ("environment", "kernels", "engine")
SMOKE_S = 120.0
ITEM_S = {"kernels": 20.0, "engine": 30.0, "passes": 45.0}
"""Seconds after which one item of a part is given up."""
QUICK_S, QUICK_LIMIT_S = 5.0, 120.0
"""With tiny sizes, of any part: planned, and where the machine has other work."""


class Stopped(Exception):
    """A signal asked for the end."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="only the first three parts, in two minutes")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="llama-3.1-8b", help="llama-3.1-8b, smollm2, tiny or a model directory")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--parts", type=lambda text: text.split(","), help="only these, in this order")
    parser.add_argument("--budget-s", type=float, help="seconds for all parts together (540, or 120 of --smoke)")
    parser.add_argument("--output", type=Path, help="folder of the results ($OUT if set, else bench/results)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.parts or () if name not in PLANNED_S]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PLANNED_S)}")
    options.budget_s = options.budget_s or (SMOKE_S if options.smoke else 540.0)
    options.output = options.output or Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    options.parts = options.parts or (SMOKE if options.smoke else tuple(PLANNED_S))
    return options


def make_parts(options: argparse.Namespace) -> list[Part]:
    """The parts asked for, with the commands that start them."""
    command: tuple[str, ...] = (sys.executable, str(CHILD), "--device", options.device, "--model", options.model)
    if options.quick:
        command += ("--quick",)
        return [Part(name=name, seconds=QUICK_S, command=command, limit_s=QUICK_LIMIT_S) for name in options.parts]
    return [
        Part(name=name, seconds=PLANNED_S[name], command=command, item_s=ITEM_S.get(name, 600.0),
             limit_s=TESTS_LIMIT_S if name == "tests" else LIMIT_FACTOR * PLANNED_S[name])
        for name in options.parts
    ]


def keep_profile(scratch: Path, folder: Path) -> None:
    """Copies what the engine measured of the machine, once it is there."""
    for path in sorted((scratch / "cache" / "profiles").glob("*.json"))[:1]:
        with contextlib.suppress(OSError):
            shutil.copyfile(path, folder / "gpu_profile.json")


def run(options: argparse.Namespace, parts: Sequence[Part]) -> int:
    """Runs parts, and keeps the files up to date. Returns the exit code."""
    folder = options.output.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="coserve-gpu-"))
    facts = {"model": options.model, "device_asked": options.device, "quick": options.quick}

    def listen(course: Course) -> None:
        keep_profile(scratch, folder)
        text = gpu_report.write(course, facts)
        last = [outcome for outcome in course.outcomes if outcome.attempts or outcome.reasons][-1]
        print(f"{gpu_report.failure(last) if last.status == 'failed' else ''}\n{text}", flush=True)

    environment = {"TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if options.device != "cpu" and "COSERVE_CACHE" not in os.environ:  # what an older run measured does not count
        environment["COSERVE_CACHE"] = str(scratch / "cache")
    course = Course(parts, folder, options.budget_s, environment=environment, listen=listen)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    gpu_report.write(course, facts)
    try:
        return course.run()
    except Stopped as asked:
        for outcome in course.outcomes:
            if outcome.name == course.running:
                outcome.status = "failed"
                outcome.reasons.insert(0, f"stopped by {asked}")
        listen(course)
        return 130
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    chosen = parse()
    sys.exit(run(chosen, make_parts(chosen)))
