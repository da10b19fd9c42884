"""What an engine's threads are doing right now, told to whoever watches them.

    thread --begin(what, seconds)--> Watcher --end()-->        a thread that has begun and not ended is busy with `what`

Owns: the words. Does not own: who watches, and what follows when something takes too long (server/link/activity.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Watcher(Protocol):
    """What the engine's thread calls. A call must be short, since the thread waits for it."""

    def begin(
        self, what: str, seconds: float = 0.0, *, jobs: Iterable[str] = (), requests: Iterable[str] = ()
    ) -> None:
        """The thread begins `what`, and has ended what it began before. seconds: how long it is predicted to take. jobs,
        requests: the labels of those it is done for."""

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
