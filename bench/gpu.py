"""Everything that needs a GPU, in one run under 10 minutes: tests, kernels, costs, throughputs, co-serving, the training peer.

    bench/gpu.sh [--device auto|cpu|cuda] [--model llama-3.1-8b|smollm2|DIRECTORY] [--quick] [--parts NAME,...]
                 [--budget-s 540] [--output bench/results/gpu.json]

A part that fails is recorded in the JSON and the others go on; one that the budget has no room for is skipped and says so. The
JSON is written after each part. Not yet run on a GPU: none was there when this was written.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gpu_passes
import gpu_sharing
import torch
from gpu_clock import ceilings, release
from gpu_kernels import run_kernels
from gpu_model import BenchModel, make_model
from gpu_peer import run_peer

ROOT = Path(__file__).resolve().parents[1]
TESTS_S = 150
"""Longest time for the GPU tests."""


class Bench:
    """The parts, in order. Each yields rows of the JSON's `results` without `experiment` and `model`."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.started = options, time.perf_counter()
        self.device = torch.device(options.device)
        self.ceilings: dict[str, Any] = {}
        self._model: BenchModel | None = None
        self.parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "tests": self.tests, "ceilings": self.measure_ceilings, "kernels": self.kernels, "row-cost": self.curve,
            "inference": self.inference, "finetune": self.finetune, "sharing": self.sharing, "peer": self.peer,
        }

    def left(self) -> float:
        """Seconds of the budget."""
        return float(self.options.budget_s) - (time.perf_counter() - self.started)

    @property
    def model(self) -> BenchModel:
        if self._model is None:
            self._model = make_model(self.options.model, self.device)
        return self._model

    @property
    def sizes(self) -> gpu_passes.Sizes:
        return gpu_passes.QUICK if self.options.quick else gpu_passes.FULL

    # --- parts ---

    def tests(self) -> Iterator[dict[str, Any]]:
        """pytest tests/gpu in a process of its own; without CUDA only that they can be collected."""
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu", "-q", "-rfE"]
        command += ["-m", "gpu"] if self.device.type == "cuda" else ["--collect-only"]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TESTS_S)
        except subprocess.TimeoutExpired:
            yield {"failed": f"tests/gpu took over {TESTS_S} s"}
            return
        print(done.stdout[-4000:])
        summary = done.stdout.strip().splitlines()[-1:] or ["no output"]
        shown = " ".join(["pytest", *command[5:]])
        row: dict[str, Any] = {"command": shown, "returncode": done.returncode, "summary": summary[0]}
        yield row if done.returncode == 0 else {**row, "failed": done.stdout[-3000:] + done.stderr[-1000:]}

    def measure_ceilings(self) -> Iterator[dict[str, Any]]:
        self.ceilings = ceilings(self.device, self.options.quick)
        yield self.ceilings

    def kernels(self) -> Iterator[dict[str, Any]]:
        loaded = self.model.loaded
        yield from run_kernels(loaded.architecture, loaded.weights.dtype, self.device, quick=self.options.quick)

    def curve(self) -> Iterator[dict[str, Any]]:
        yield from self._alone().curve()

    def inference(self) -> Iterator[dict[str, Any]]:
        yield from self._alone().inference()

    def finetune(self) -> Iterator[dict[str, Any]]:
        yield self._alone().finetune()

    def sharing(self) -> Iterator[dict[str, Any]]:
        cells = gpu_sharing.QUICK if self.options.quick else gpu_sharing.FULL
        reserve = 0.0 if self.options.quick else 60.0  # for the peer, which comes after
        yield from gpu_sharing.Sharing(self.model, cells, lambda: self.left() - reserve).rows()

    def peer(self) -> Iterator[dict[str, Any]]:
        model = self.model
        if self._model is not None and model.name == self.options.model:  # random weights make room for the peer's
            self._model = None
            model = model._replace(loaded=None)  # type: ignore[arg-type]
            release(self.device)
        yield from run_peer(model, self.device, example_tokens=self.sizes.example_tokens, steps=self.sizes.steps)

    def _alone(self) -> gpu_passes.Alone:
        return gpu_passes.Alone(self.model, self.sizes, self.ceilings)

    # --- the course ---

    def run(self) -> int:
        """All parts asked for; 1 if one of them failed."""
        rows: list[dict[str, Any]] = []
        for name in self.options.parts or self.parts:
            names = {"experiment": name, "model": Path(self.options.model).name}
            begin = time.perf_counter()
            if self.left() <= 0:
                rows.append({**names, "skipped": "no time left"})
            else:
                try:
                    for row in self.parts[name]():
                        rows.append({**names, **row})
                        print(json.dumps(rows[-1])[:600])
                except Exception as error:  # recorded; the other parts go on
                    traceback.print_exc()
                    rows.append({**names, "failed": f"{type(error).__name__}: {error}"[:2000]})
                    error.__traceback__ = None
                release(self.device)
            rows.append({**names, "part_seconds": time.perf_counter() - begin})
            self.write(rows)
        return int(any("failed" in row for row in rows))

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """The JSON, whole each time."""
        cuda = self.device.type == "cuda"
        data = {
            "device": torch.cuda.get_device_name(self.device) if cuda else platform.processor() or platform.machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(), "command": "bench/gpu.sh " + " ".join(sys.argv[1:]), "threads": torch.get_num_threads(),
            "budget_s": self.options.budget_s, "seconds": time.perf_counter() - self.started, "quick": self.options.quick,
            "ceilings": self.ceilings, "results": list(rows),
        }
        path = Path(self.options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter here."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "peft", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="llama-3.1-8b", help="llama-3.1-8b, smollm2 or a model directory")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs")
    parser.add_argument("--parts", type=lambda text: text.split(","), help="only these, in this order")
    parser.add_argument("--budget-s", type=float, default=540.0, help="no part and no cell begins after so many seconds")
    parser.add_argument("--output", default=str(ROOT / "bench" / "results" / "gpu.json"))
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


if __name__ == "__main__":
    sys.exit(Bench(parse()).run())
