"""An engine process for tests, started in place of coserve.server.link.enginemain: it hangs when it is told to.

The file `hang` in the data directory says how and when: 'gil TEXT', 'sleep TEXT' or 'crash TEXT' in an iteration that holds a
request or job whose label contains TEXT, or 'gil load' while an adapter is loaded. Without the file nothing hangs.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from coserve.core import StepPlan, StepResult
from coserve.engine.engine import Engine, PlanRunner
from coserve.engine.step import Lookup
from coserve.server.link.enginemain import EngineProcessMain, main

HANG = "hang"
LOADING = "gil load"


def hang(how: str) -> None:
    """For ever, or crashes; any other word does nothing."""
    if how == "gil":
        re.match(r"([a-z._0-9]+)+!", "a" * 64)  # in C, without giving the interpreter's lock back
    elif how == "crash":
        signal.pthread_kill(threading.get_ident(), signal.SIGSEGV)  # as a bug in this thread would
    while how == "sleep":
        time.sleep(1)


class HangingRunner:
    """Hangs in iterations that hold what the file names."""

    def __init__(self, inner: PlanRunner, engine: Engine, orders: Path) -> None:
        self._inner, self._engine, self._orders = inner, engine, orders

    def run(self, plan: StepPlan, lookup: Lookup) -> StepResult:
        if self._orders.exists():
            how, _, text = self._orders.read_text().partition(" ")
            requests, jobs = self._engine._holds(plan)
            if any(text in label for label in (*requests, *jobs)):
                hang(how)
        return self._inner.run(plan, lookup)


class HangingProcess(EngineProcessMain):
    """Its engine has a HangingRunner, and its adapters hang while they are loaded."""

    def make_engine(self, model: Any, settings: Any) -> Engine:
        engine = super().make_engine(model, settings)
        orders = self.config.data_dir / HANG
        engine.runner = HangingRunner(engine.runner, engine, orders)
        load = engine.load_adapter

        def load_adapter(name: str, directory: str | Path) -> None:
            if orders.exists() and orders.read_text() == LOADING:
                hang("gil")
            load(name, directory)

        engine.load_adapter = load_adapter  # type: ignore[method-assign]
        return engine


if __name__ == "__main__":
    code = main(HangingProcess)
    sys.stdout.flush()
    os._exit(code)
