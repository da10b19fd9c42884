"""What a request needs beside memory in order to run, as the scheduler sees it: its adapter's slot.

Owns: the two questions. Does not own: who has a slot (engine/adapters.py).
"""

from __future__ import annotations

from typing import Protocol

from coserve.scheduler.requests import RequestState


class Seats(Protocol):
    """What a request needs beside memory in order to run: its adapter's slot."""

    def claim(self, request: RequestState) -> bool:
        """Takes a slot for the request. Returns False if there is none now; the request then waits for
        `HybridScheduler.unpark`."""

    def unclaim(self, request: RequestState, *, has_run: bool) -> None:
        """Gives the request's slot back. has_run: False if the request could not begin after all."""


class _Free:
    """Seats for everybody."""

    def claim(self, request: RequestState) -> bool:
        return True

    def unclaim(self, request: RequestState, *, has_run: bool) -> None:
        pass


FREE_SEATS: Seats = _Free()
