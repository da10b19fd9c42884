"""Engines of one process that share a job: messages are carried by hand, and members die where a test wants."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coserve.cluster.steps import StepLimits
from coserve.config.settings import FinetuneConfig
from coserve.engine.engine import Engine
from coserve.engine.jobhandle import JobHandle
from coserve.engine.jobs import LiveJob
from coserve.server.link.stepmember import StepMember
from coserve.server.link.stepmessages import StepBody, decode_step
from coserve.server.replicas.stepcoordinator import StepCoordinator

Watch = Callable[["Crew", "CrewMember", bool, StepBody], bool]
"""watch(crew, member, up, body): sees an envelope before it is delivered; False drops it. up: it goes to the coordinator."""


@dataclass
class CrewMember:
    """One engine's place. up, down: envelopes on their way."""

    name: str
    engine: Engine
    exchange: StepMember
    handle: JobHandle
    up: deque[bytes]
    down: deque[bytes] = field(default_factory=deque)
    dead: bool = False

    @property
    def live(self) -> LiveJob | None:
        return next(iter(self.engine.jobs.jobs.values()), None)


class Crew:
    """A job of one primary ("p") and others ("m1", ...). watch: sees every envelope."""

    def __init__(
        self, data: Path, output: Path, config: FinetuneConfig, *, epoch: int = 1, watch: Watch | None = None,
        limits: StepLimits | None = None, clock: Callable[[], float] = time.monotonic, **options: Any,
    ) -> None:
        self.data, self.output, self.config, self.epoch, self.options = data, output, config, epoch, options
        self.notes: list[str] = []
        self.coordinator = StepCoordinator(epoch, "p", limits=limits, note=self.notes.append, clock=clock)
        self.members: dict[str, CrewMember] = {}
        self.watch: Watch = watch or (lambda crew, member, up, body: True)

    def add(self, name: str, engine: Engine, *, resume: bool = False, data: Path | None = None, **options: Any) -> CrewMember:
        """A member with an engine of its own."""
        up: deque[bytes] = deque()
        exchange = StepMember(epoch=self.epoch, member=name, primary=name == "p", send=up.append)
        output = self.output if name == "p" else self.output.with_name(f"{self.output.name}-{name}")
        handle = engine.finetune(
            data or self.data, output, self.config, resume=resume, exchange=exchange, **{**self.options, **options}
        )
        member = self.members[name] = CrewMember(name, engine, exchange, handle, up)
        return member

    def kill(self, name: str, *, known: bool = True) -> None:
        """A member's process is gone, with all that is on its way. known: the coordinator is told."""
        member = self.members[name]
        member.dead = True
        member.up.clear()
        member.down.clear()
        if name != "p" and known:
            self.coordinator.lost(name)

    def carry(self) -> bool:
        """Delivers what is on its way; False if there was nothing."""
        carried = False
        for member in list(self.members.values()):
            while member.up and not member.dead:
                carried = True
                data = member.up.popleft()
                if self.watch(self, member, True, decode_step(data).body) and not member.dead:
                    self.coordinator.receive(data, member.down.append)
        for member in list(self.members.values()):
            while member.down and not member.dead:
                carried = True
                data = member.down.popleft()
                if self.watch(self, member, False, decode_step(data).body) and not member.dead:
                    member.exchange.on_message(data)
        return carried

    def drive(self, until: Callable[[], bool] | None = None, *, seconds: float = 60.0) -> None:
        """Steps all living engines in turn until the condition holds; default: until the primary's job has ended."""
        until = until or (lambda: self.members["p"].handle.finished)
        limit = time.monotonic() + seconds
        while not until():
            worked = self.carry()
            for member in list(self.members.values()):
                if not member.dead and not member.engine.closed:
                    worked = member.engine.step() or worked
            if not worked:
                time.sleep(2e-4)  # a reader's thread makes a digest, or files are written
            assert time.monotonic() < limit, f"stuck at step {self.coordinator.machine.step}: {self.notes}"

    def finish(self) -> None:
        """Ends the others' shares too."""
        self.drive()
        self.drive(lambda: all(member.dead or member.handle.finished for member in self.members.values()))
        for member in self.members.values():
            while not member.dead and not member.engine.idle:
                member.engine.step()
