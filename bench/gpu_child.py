"""One part of bench/gpu.sh, in a process of its own, which gpu_course.py starts.

    python bench/gpu_child.py PART --rows FILE --limit SECONDS [--skip ITEM,...] [--device D] [--model M] [--quick]

Exit code: 0 once every item has been tried, whatever came of it; gpu_rows.BROKEN_DEVICE; anything else is an accident.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import gpu_standins  # noqa: F401  stands in for a package that the machine may lack
from gpu_rows import BROKEN_DEVICE, Rows, run_items, told

PARTS = {
    "environment": "gpu_clock:environment_items", "kernels": "gpu_kernels:items", "engine": "gpu_tiny:items",
    "passes": "gpu_passes:items", "peer": "gpu_peer:items", "tests": "gpu_tests:items", "row-cost": "gpu_passes:curve_items",
}
"""Where a part's items come from: a function that takes the options. Any other part is a serving cell's name."""
SERVING = "gpu_sharing:items"
MARGIN_S = 2.0
"""No item may take so long that fewer seconds of the part are left: what it was doing has to be printed still."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True, help="seconds after which this process will be killed")
    parser.add_argument("--item-s", type=float, default=600.0, help="seconds that one item may take")
    parser.add_argument("--skip", type=lambda text: text.split(",") if text else [], default=[], help="items not to run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    options.deadline = time.monotonic() + options.limit - MARGIN_S
    return options


def end_with_parent() -> None:
    """This process is killed when the one that started it ends, and before it where the machine's memory runs out (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("600")


def main(parts: Mapping[str, str] = PARTS) -> NoReturn:
    """Runs a part and ends the process, without what Python does at its end: that could hang where a device is broken."""
    options = parse()
    end_with_parent()
    faulthandler.enable()
    rows, code = Rows(options.rows, options.part), 1
    try:
        module, function = parts.get(options.part, SERVING).split(":")
        faulthandler.dump_traceback_later(max(1.0, options.limit - MARGIN_S / 2))
        items = getattr(importlib.import_module(module), function)(options)
        item_s = min(options.item_s, max(1.0, options.limit - MARGIN_S))
        whole = run_items(items, rows, skip=options.skip, deadline=options.deadline, item_s=item_s)
        code = 0 if whole else BROKEN_DEVICE
    except Exception as error:
        import traceback

        traceback.print_exc()
        rows.add({"failed": told(error)})
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
