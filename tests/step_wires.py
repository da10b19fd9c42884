"""Queues in the place of sockets between replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence


class Wires:
    """Queues between replicas. cut: replicas that nothing reaches and that reach nobody."""

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[tuple[str, list[bytes]]]] = {}
        self.cut: set[str] = set()
        self.lost_s = 15.0

    def of(self, replica: str) -> Wire:
        self.queues[replica] = asyncio.Queue()
        return Wire(self, replica)


class Wire:
    """StepWire for one replica."""

    def __init__(self, wires: Wires, replica: str) -> None:
        self._wires, self._replica = wires, replica

    async def send(self, replica: str, frames: Sequence[bytes]) -> None:
        if not self._wires.cut & {replica, self._replica}:
            self._wires.queues[replica].put_nowait((self._replica, list(frames)))

    async def receive(self) -> tuple[str, list[bytes]]:
        return await self._wires.queues[self._replica].get()
