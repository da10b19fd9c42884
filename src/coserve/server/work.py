"""Threads for work of requests that takes more than a few milliseconds, so that it doesn't hold up the event loop.

    tenant a   [work work work work]      at most NUM_THREADS - 1 of them run at once
    tenant b   [work]                     this is the next to run, however many pieces of work of tenant a wait

While a thread keeps Python's lock, the event loop waits all the same. So the work either has a limited size
(bodies/parse.py) or gives the lock back, as tokenizers do. Owns: whose work is next, what a tenant may hold at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from coserve.core import CapacityError

NUM_THREADS = 4
MAX_WAITING = 4096
"""The most pieces of work of one tenant that wait."""
Result = TypeVar("Result")


class WorkPool:
    """The threads, which tenants use in turn. It belongs to one event loop. A thread is made when it is first needed."""

    def __init__(self, num_threads: int = NUM_THREADS, max_waiting: int = MAX_WAITING) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "coserve-work")
        self._free, self._share, self._max_waiting = num_threads, max(1, num_threads - 1), max_waiting
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """What waits, by tenant. The tenant whose turn is next comes first."""
        self._running: Counter[str] = Counter()

    async def run(self, tenant: str, work: Callable[[], Result]) -> Result:
        """Runs `work` in a thread when it is the tenant's turn, and returns its result. Raises what `work` raises, and
        CapacityError if too much of the tenant's work waits already."""
        await self._turn(tenant)
        loop = asyncio.get_running_loop()
        try:
            running = self._threads.submit(work)
        except BaseException:
            self._end(tenant)
            raise

        def ended(_: Future[Result]) -> None:  # on the work's thread
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._end, tenant)

        running.add_done_callback(ended)
        return await asyncio.wrap_future(running)

    def close(self) -> None:
        """Drops what waits, and takes no more work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _turn(self, tenant: str) -> None:
        waiting = self._waiting.setdefault(tenant, deque())
        if len(waiting) >= self._max_waiting:
            raise CapacityError(f"{len(waiting)} of your requests wait to be read already; try again later")
        turn = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        self._begin()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end(tenant)
            else:
                with contextlib.suppress(ValueError):
                    waiting.remove(turn)
            raise

    def _begin(self) -> None:
        """Gives free threads to waiting work, one piece of each tenant in turn."""
        passed = 0
        while self._free and passed < len(self._waiting):
            tenant = next(iter(self._waiting))
            waiting = self._waiting.pop(tenant)
            while waiting and waiting[0].cancelled():
                waiting.popleft()
            if not waiting:
                continue
            if self._running[tenant] >= self._share:
                passed += 1
            else:
                passed = 0
                self._free -= 1
                self._running[tenant] += 1
                waiting.popleft().set_result(None)
            if waiting:
                self._waiting[tenant] = waiting  # at the end: others are next

    def _end(self, tenant: str) -> None:
        self._free += 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        self._begin()


class Allowance:
    """A limit of what each tenant may hold at once, whatever other tenants hold. It belongs to one thread."""

    def __init__(self, most: int, refusal: str) -> None:
        """most: how much a tenant may hold. refusal: the message for a tenant that wants more."""
        self._most, self._refusal = most, refusal
        self._held: Counter[str] = Counter()

    @contextlib.contextmanager
    def hold(self, tenant: str, amount: int = 1) -> Iterator[None]:
        """Holds an amount for as long as the context. Raises CapacityError if the tenant would hold too much then."""
        self.take(tenant, amount)
        try:
            yield
        finally:
            self.give_back(tenant, amount)

    def take(self, tenant: str, amount: int = 1) -> None:
        """Begins to hold an amount. Raises as `hold`."""
        if self._held[tenant] and self._held[tenant] + amount > self._most:
            raise CapacityError(self._refusal)
        self._held[tenant] += amount

    def give_back(self, tenant: str, amount: int = 1) -> None:
        """Ends holding an amount that `take` began."""
        self._held[tenant] -= amount
        if not self._held[tenant]:
            del self._held[tenant]
