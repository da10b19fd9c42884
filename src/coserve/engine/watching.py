"""Reports of what an engine's threads are doing right now.

    thread --begin(what, seconds)--> Watcher --end()-->        a thread that has begun and not ended is busy with `what`

Owns: the interface. Does not own: the server's watcher, and what is done if something takes too long (server/link/activity.py).
"""

from __future__ import annotations

from collections.abc import Iterable


class Watcher:
    """Called by the thread that it watches, which waits for each call, so calls must be short. This one, of engines that are
    used as a library, ignores all calls."""

    def begin(
        self, what: str, seconds: float = 0.0, *, jobs: Iterable[str] = (), requests: Iterable[str] = ()
    ) -> None:
        """The thread has ended what it did before and begins `what`. seconds: its predicted time. jobs, requests: labels of
        those that it works for."""

    def end(self) -> None:
        """The thread has nothing to do."""
