"""`coserve serve --replicas N`: a fleet's life, and signals.

Owns: what signals do. Does not own: where processes run (server/replicas/raycluster.py), what they do.

    SIGTERM, SIGINT, SIGHUP     the ingress takes no new connections, replicas hand over their jobs; a second one doesn't wait
    SIGTTIN, SIGTTOU            one replica more, one less (as gunicorn's workers)
"""

from __future__ import annotations

import logging
import signal
from collections import deque
from types import FrameType

from coserve.server.link.setup import STOP_SIGNALS
from coserve.server.replicas.raycluster import RayFleet
from coserve.server.settings import ServerConfig

_log = logging.getLogger(__name__)


class _Signals:
    """The signals that have come and are not acted upon yet. stops: how many that end the command."""

    def __init__(self) -> None:
        self.stops = 0
        self.changes: deque[int] = deque()

    def install(self) -> None:
        """Ray installs some handlers of its own, so this is called again behind it."""
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup does
                signal.signal(number, self._stop)
        signal.signal(signal.SIGTTIN, lambda *_: self.changes.append(1))
        signal.signal(signal.SIGTTOU, lambda *_: self.changes.append(-1))

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stops += 1


def run_fleet(config: ServerConfig) -> None:
    """Serves until one of STOP_SIGNALS. Raises what keeps it from starting."""
    signals = _Signals()
    with RayFleet(config, report=_report) as fleet:
        signals.install()
        fleet.start()
        signals.install()
        was_ready = False
        while not signals.stops:
            fleet.look()
            if fleet.ready and not was_ready:
                _log.info("all %d replicas and the ingress are ready", fleet.replicas)
            was_ready = fleet.ready
            while signals.changes:
                change = signals.changes.popleft()
                _log.info("one replica %s, on a signal", "more" if change > 0 else "less")
                if change > 0:
                    fleet.add()
                else:
                    fleet.remove()
        _log.info("ending ...")
        fleet.stop(lambda: signals.stops > 1)


def _report(line: str) -> None:
    _log.info("%s", line)
