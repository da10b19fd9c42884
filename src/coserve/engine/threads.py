"""OpenMP's threads. PyTorch splits a CPU product among a team of threads, and each calling thread has a team of its own.

    one team      As many threads as cores. Between two products they spin for a moment, so that the next one begins at once.
    two teams     More threads than cores. libgomp then lets all of them sleep at every wait, and decoding becomes slower.

So the engine's thread keeps its team, and every other thread ends its own when its work is done. If PyTorch uses another OpenMP
library than GNU's libgomp, no team is ended; results are the same, but decoding may be slower. Source: OpenMP 5.0, section
3.2.44 (omp_pause_resource_all).

Owns: ending teams. Does not own: how many threads a team has (torch.set_num_threads).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

_NICE = 10
_PAUSE_HARD = 2
"""omp_pause_hard: the threads end."""
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@functools.cache
def _libgomp() -> ctypes.CDLL | None:
    """The process's OpenMP library if it is GNU's, else None: others would end the teams of all threads, busy ones too."""
    with contextlib.suppress(OSError):  # no /proc
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.partition("/")[1] + line.partition("/")[2]
            if Path(path).name.startswith("libgomp"):
                return ctypes.CDLL(path)
    return None


def give_team_back() -> None:
    """Ends the calling thread's OpenMP team. Its next product starts a new one, in a fraction of a millisecond."""
    library = _libgomp()
    if library is not None:
        with contextlib.suppress(AttributeError):  # older than OpenMP 5
            library.omp_pause_resource_all(_PAUSE_HARD)


@contextlib.contextmanager
def borrowed_team() -> Iterator[None]:
    """For work in other threads than the engine's: ends the calling thread's OpenMP team afterwards."""
    try:
        yield
    finally:
        give_team_back()


def yield_to_others() -> None:
    """Lets the calling thread run only where others leave cores to it, for work that takes long. Linux knows priorities of
    threads; elsewhere nothing changes."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class SideThreads(ThreadPoolExecutor):
    """A pool of threads for work beside the engine's thread. Each ends its OpenMP team after each piece of work."""

    def submit(
        self, fn: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        return super().submit(borrowed_team()(fn), *args, **kwargs)
