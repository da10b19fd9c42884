"""Parts for tests of bench/gpu.sh's course: each fails in a way of its own, after a row that must not be lost.

Run as bench/gpu_child.py is: python tests/bench/gpu_stub_parts.py PART --rows FILE --limit SECONDS ...
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import gpu_child
import gpu_rows
from gpu_rows import Item

Rows = Iterator[dict[str, Any]]


def good() -> Rows:
    print("all is well")
    yield {"kind": "pass", "rows": 1, "seconds": 0.5}


def then(action: Callable[[], object]) -> Callable[[], Rows]:
    """A row, then the action, then a row that is not to be reached."""

    def run() -> Rows:
        print("begun", flush=True)
        yield {"value": 1}
        action()
        yield {"value": 2}

    return run


def raises() -> None:
    raise ValueError("no good")


def out_of_memory() -> None:
    """As torch raises it, without importing torch."""
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2.00 GiB")


def hangs() -> None:
    """With a process of its own that holds the pipe, as pytest's workers would."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(os.environ["COSERVE_STUB_PID"]).write_text(str(child.pid))
    time.sleep(60)


def floods() -> None:
    for number in range(30_000):
        print(f"{number} " + "x" * 200)
    print("the last line")


def torn_row() -> None:
    """Dies in the middle of writing a row."""
    rows = Path(sys.argv[sys.argv.index("--rows") + 1])
    with rows.open("a") as file:
        file.write('{"part": "torn", "item": "one", "val')
    os._exit(7)


def no_time() -> Rows:
    """Finds that too little is left once it is ready."""
    yield {"value": 1}
    yield {"skipped": "no time left"}


def wrong() -> Rows:
    yield {"kernel": "one", "rows": 1, "failed": "one: relative error 1.0"}
    yield {"kernel": "two", "rows": 1, "relative_error": 0.0}


def large_row() -> Rows:
    yield {"text": "x" * (1 << 20)}
    yield {"value": 1}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def items(options: argparse.Namespace) -> list[Item]:
    """Most parts have one item; 'dies' has three, of which the second ends the process."""
    one: dict[str, Callable[[], Rows]] = {
        "good": good, "also-good": good, "no-time": good, "raises": then(raises), "memory": then(out_of_memory),
        "killed": then(kill), "hangs": then(hangs), "floods": then(floods), "torn": then(torn_row), "wrong": wrong,
        "large": large_row, "late": no_time,
    }
    if options.part == "dies":
        return [Item("first", good), Item("second", then(lambda: os._exit(9))), Item("third", good)]
    if options.part == "broken-device":
        gpu_rows.device_is_broken = lambda: True
        return [Item("first", then(raises)), Item("second", good)]
    if options.part == "slow-item":
        return [Item("sleeps", then(lambda: time.sleep(30))), Item("after", good)]
    if options.part == "hangs-at-once":
        time.sleep(60)
    if options.part == "broken-setup":
        raise RuntimeError("the device can't be set up")
    return [Item("one", one[options.part])]


if __name__ == "__main__":
    gpu_child.SERVING = "__main__:items"
    gpu_child.main({})
