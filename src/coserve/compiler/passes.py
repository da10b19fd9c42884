"""The driver of the compiler's passes: runs each on what the one before it made, verifies the result and logs it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

_log = logging.getLogger(__name__)


class Checked(Protocol):
    """What passes work on: a graph, a choice of what to keep, or the draft of a program."""

    def check(self) -> None:
        """Raises AssertionError where it is not sound."""


S = TypeVar("S", bound=Checked)


def run_passes(state: S, *passes: Callable[[S], S]) -> S:
    """Verifies `state` and applies passes in order. Each is a pure function from a state to a new one; settings are bound to it
    by `partial`.

    Raises AssertionError where a pass leaves something unsound: a fault of ours, which must not reach anyone's gradients.
    """
    state.check()
    for each in passes:
        started = time.perf_counter()
        state = each(state)
        made = time.perf_counter()
        state.check()
        name = (each.func if isinstance(each, partial) else each).__name__
        _log.debug("%s: %.2f ms, verified in %.2f ms", name, 1e3 * (made - started), 1e3 * (time.perf_counter() - made))
    return state
