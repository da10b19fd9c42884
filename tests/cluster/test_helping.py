"""A replica that helps with jobs of others: what it does when its share ends, whoever is to blame. Its engine is played."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from coserve.cluster.steps import DIFFERS
from coserve.server.errors import EngineUnavailable
from coserve.server.link.messages import Problem, ShareEnded, StepSaid
from coserve.server.link.process import EngineEnd
from coserve.server.replicas.helping import JobHelp
from coserve.server.replicas.steplink import Invitation, StepLinks
from tests.step_wires import Wires

RUN = Invitation(job="job", run="job-e1", epoch=1)


class PlayedEngine:
    """SharingEngine: it takes every share, and ends as a test wants. dies: how each share kills it at once."""

    def __init__(self) -> None:
        self.ready, self.supervisor = True, self
        self.last_end: EngineEnd | None = None
        self.dies: Callable[[str], EngineEnd] | None = None
        self.started: list[str] = []
        self.told: list[str] = []
        self._say: Callable[[StepSaid | ShareEnded], None] = lambda message: None
        self._down: list[Callable[[], None]] = []

    def on_step(self, listener: Callable[[StepSaid | ShareEnded], None]) -> None:
        self._say = listener

    def on_down(self, listener: Callable[[], None]) -> None:
        self._down.append(listener)

    async def start_job(self, **fields: Any) -> None:
        self.started.append(fields["id"])
        if self.dies is not None:
            self.die(self.dies(fields["id"]))
            raise EngineUnavailable("the engine process died")

    def act_job(self, job: str, action: str) -> None:
        pass

    def tell(self, id: str, data: bytes) -> None:
        self.told.append(id)

    def say(self, message: StepSaid | ShareEnded) -> None:
        self._say(message)

    def die(self, end: EngineEnd) -> None:
        self.last_end = end
        for listener in self._down:
            listener()


class Helper:
    """The replica "b", which replica "a" invites. may_bring: files come once it is set."""

    def __init__(self, place: Path) -> None:
        self.engine, self.wires, self.now = PlayedEngine(), Wires(), 0.0
        self.may_bring, self.brought = threading.Event(), list[Path]()
        self.may_bring.set()
        self.wires.of("a")
        self.links = StepLinks(self.engine.tell, self.wires.of("b"))
        self.place = place
        self.help = JobHelp("b", self.engine, self.links, place, others=list, bring=self._bring, clock=lambda: self.now)

    def _bring(self, job: str, directory: Path) -> dict[str, Any]:
        self.may_bring.wait(20.0)
        (directory / "training_file").write_bytes(b"{}")
        self.brought.append(directory)
        return {}

    async def invite(self, invitation: Invitation = RUN) -> str | None:
        """The share that comes of it, once the engine has it; None if the replica doesn't help."""
        before = self.engine.started[:]
        self.help._invited("a", invitation)
        if not self.help.shares:
            return None
        await until(lambda: self.engine.started != before)
        return self.engine.started[-1]

    async def pause(self) -> float:
        """How many seconds later the replica helps again; its new share goes on."""
        began = self.now
        while await self.invite() is None:
            self.now += 1.0
        return self.now - began


async def until(found: Callable[[], Any], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not found():
            await asyncio.sleep(1e-3)


@asynccontextmanager
async def helper(place: Path) -> AsyncIterator[Helper]:
    made = Helper(place)
    made.links.start()
    yield made
    made.may_bring.set()
    await made.help.stop()
    await made.links.stop()


def test_a_place_is_free_again_when_the_holder_goes_while_the_files_are_still_brought(tmp_path: Path) -> None:
    async def story() -> None:
        async with helper(tmp_path / "shares") as one:
            one.may_bring.clear()
            one.help._invited("a", RUN)
            (share,) = one.help.shares
            await asyncio.sleep(0.01)
            one.links.replica_lost("a")
            assert one.help.shares == ()
            one.may_bring.set()
            await until(lambda: one.brought)
            await until(lambda: not [*one.place.glob("*")])
            assert one.engine.started == [] and one.engine.told == [share]
            assert await one.invite(Invitation(job="other", run="other-e1", epoch=1)), "it helps another job"

    asyncio.run(story())


def test_a_place_that_the_engine_holds_is_free_when_the_engine_says_so(tmp_path: Path) -> None:
    """It needs its memory and its files until then."""
    async def story() -> None:
        async with helper(tmp_path / "shares") as one:
            share = await one.invite()
            one.links.replica_lost("a")
            assert share and one.help.shares == (share,) and one.engine.told == [share]
            one.engine.say(ShareEnded(id=share))
            assert one.help.shares == ()

    asyncio.run(story())


def test_who_is_sent_away_from_a_run_that_goes_on_comes_back_ever_later(tmp_path: Path) -> None:
    async def story() -> None:
        async with helper(tmp_path / "shares") as one:
            pauses = []
            for _ in range(9):
                one.now += 5.0
                one.engine.say(ShareEnded(id=one.help.shares[0] if one.help.shares else await one.invite() or ""))
                assert one.help.shares == ()
                pauses.append(await one.pause())
            assert pauses == [30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1800.0, 1800.0, 1800.0]
            one.now += 3600.0
            one.engine.say(ShareEnded(id=one.help.shares[0]))
            assert await one.pause() == 30.0, "the last one lasted"
            one.engine.say(ShareEnded(id=one.help.shares[0]))
            assert await one.invite(Invitation(job="other", run="other-e1", epoch=1)), "another job's run"

    asyncio.run(story())


@pytest.mark.parametrize(("how", "tries"), [
    (lambda share: EngineEnd("crashed", (share,), guilty=True), 2),
    (lambda share: EngineEnd("crashed in a thread that says nothing", (), guilty=True), 2),
    (lambda share: EngineEnd("crashed by a request", (), guilty=True, alone=False), 7),
    (lambda share: EngineEnd("killed from outside", (share,), guilty=False), 7),
])
def test_a_job_that_crashes_the_helpers_engine_is_tried_twice(
    tmp_path: Path, how: Callable[[str], EngineEnd], tries: int
) -> None:
    async def story() -> None:
        async with helper(tmp_path / "shares") as one:
            one.engine.dies = how
            for second in range(3600):
                one.now += 1.0
                epoch = 1 + second // 100  # the holder's engine may crash by it too, so that its runs are others
                one.help._invited("a", Invitation(job="job", run=f"job-e{epoch}", epoch=epoch))
                await until(lambda: not one.help.shares)
            assert len(one.engine.started) == tries
            one.engine.dies = None
            assert await one.invite(Invitation(job="other", run="other-e1", epoch=1)), "another job"

    asyncio.run(story())


def test_a_replica_that_works_out_another_adapter_is_let_in_twice(tmp_path: Path) -> None:
    async def story() -> None:
        async with helper(tmp_path / "shares") as one:
            for _ in range(2):
                await one.pause()
                differs = Problem(name="job_failed", message=f"{DIFFERS} after step 7 (a and b)")
                one.engine.say(ShareEnded(id=one.help.shares[0], problem=differs))
            one.now += 1e6
            assert await one.invite(Invitation(job="job", run="job-e9", epoch=9)) is None

    asyncio.run(story())


def test_other_failures_of_a_share_only_cost_time(tmp_path: Path) -> None:
    async def story() -> None:
        async with helper(tmp_path / "shares") as one:
            for wait in (0.0, 30.0, 60.0, 120.0):
                assert await one.pause() == wait
                failed = Problem(name="job_failed", message="nothing was heard of this member any more")
                one.engine.say(ShareEnded(id=one.help.shares[0], problem=failed))

    asyncio.run(story())
