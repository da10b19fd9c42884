"""A process of a fleet: python -m coserve.server.replicas.main engine|ingress. It reads a FleetSetup from its standard input.
The end of that input says that whoever started it has gone; then it ends at once. SIGTERM lets it drain first.

Owns: this process's life. Does not own: what a replica does (replica.py), what an ingress does (ingress.py), who starts them
(raycluster.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from functools import partial

from coserve.core import CoserveError
from coserve.server import logs
from coserve.server.link.setup import STOP_SIGNALS, end_with
from coserve.server.replicas.ingress import run_ingress
from coserve.server.replicas.memoryshare import share_memory
from coserve.server.replicas.processhost import REFUSED
from coserve.server.replicas.replica import run_replica
from coserve.server.replicas.setup import read_setup

_log = logging.getLogger("coserve.server.replicas.main")


def main(kind: str) -> int:
    """Runs a replica ("engine") or an ingress as a process of its own. Returns the exit code."""
    setup = read_setup(sys.stdin.buffer.readline())
    end_with(sys.stdin.buffer)
    logs.configure(kind, format=setup.config.log_format, level=setup.config.log_level)
    run = run_replica if kind == "engine" else partial(run_ingress, keys=setup.keys)
    config = share_memory(setup.config, setup.sharers)

    async def serve() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, stop.set)
        await run(config, stop=stop, report=_report, host=setup.host, node=setup.node)

    try:
        asyncio.run(serve())
    except asyncio.CancelledError as error:
        _log.info("%s", error)
    except (CoserveError, OSError) as error:
        _log.error("%s", error)
        return REFUSED
    return 0


def _report(line: str) -> None:
    _log.info("%s", line)


if __name__ == "__main__":
    code = main(sys.argv[1])
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for the database or the store
