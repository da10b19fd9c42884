"""What an engine's threads are doing right now, told to whoever watches them.

    thread --begin(what, seconds)--> Watcher --end()-->        a thread that has begun and not ended is busy with `what`

Owns: the words. Does not own: who watches, and what follows when something takes too long (server/link/activity.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Watcher(Protocol):
    """Told by the engine's thread. A call must be short."""

    def begin(
        self, what: str, seconds: float = 0.0, *, jobs: Iterable[str] = (), requests: Iterable[str] = ()
    ) -> None:
        """The thread begins something that is predicted to take so long; jobs, requests: whom it is done for. What it began
        before has ended."""

    def end(self) -> None:
        """The thread has nothing to do."""


class NobodyWatches:
    """For engines that are used as a library."""

    def begin(
        self, what: str, seconds: float = 0.0, *, jobs: Iterable[str] = (), requests: Iterable[str] = ()
    ) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""
