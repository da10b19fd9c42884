"""The lease machine under a virtual clock: replicas that are slow, stopped and cut off, and a database that answers late."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coserve.cluster.leases import LeaseBook, LeaseTiming
from coserve.core import ConfigError

TIMING = LeaseTiming()


def held(*jobs: str, at: float = 0.0) -> LeaseBook:
    book = LeaseBook(TIMING)
    for number, job in enumerate(jobs, start=1):
        book.took(job, number, at)
    return book


def test_a_lease_is_renewed_every_five_seconds() -> None:
    book = held("a", "b")
    assert book.next_s() == 5.0 and not book.renewal(4.9)
    assert book.renewal(5.0) == {"a": 1, "b": 2}
    assert not book.renewal(6.0), "one is under way"
    assert book.answered({"a": 1, "b": 2}, 5.5).lost == () and book.next_s() == 10.0
    assert book.renewal(10.0)


def test_a_holder_pauses_fifteen_seconds_after_sending_its_last_renewal() -> None:
    book = held("a")
    book.renewal(5.0)
    book.answered({"a": 1}, 9.0)  # the answer was slow, and doesn't count
    book.renewal(10.0)
    book.failed(12.0)
    assert book.renewal(13.0), "after a failure it is tried again sooner"
    assert book.look(19.9).lapsed == () and book.is_safe("a", 19.9)
    assert book.look(20.0).lapsed == ("a",) and book.is_lapsed("a")
    assert book.look(21.0).lapsed == (), "it is told once"


def test_a_lapsed_lease_goes_on_if_nobody_has_claimed_the_job() -> None:
    book = held("a")
    book.renewal(5.0)
    assert book.look(30.0).lapsed == ("a",)
    assert book.answered({"a": 1}, 31.0) == ((), (), ()), "it was renewed long ago: that may have ended again"
    assert book.is_lapsed("a")
    book.renewal(31.0)
    assert book.answered({"a": 1}, 31.1).regained == ("a",) and not book.is_lapsed("a")


def test_a_renewal_that_finds_no_row_means_that_the_job_is_lost() -> None:
    book = held("a", "b")
    book.renewal(5.0)
    assert book.answered({"b": 2}, 5.1).lost == ("a",)
    assert book.epoch("a") is None and book.jobs == {"b": 2}
    book.renewal(10.0)
    assert book.answered({"b": 3}, 10.1).lost == ("b",), "another epoch is another's"
    assert book.next_s() == math.inf


def test_an_answer_about_an_earlier_lease_of_the_same_job_counts_for_nothing() -> None:
    book = held("a", "b")
    book.renewal(5.0)
    book.drop("a")
    book.took("a", 7, 5.2)
    assert book.answered({"b": 2}, 5.5).lost == ()
    assert book.epoch("a") == 7


def test_a_nudge_hurries_the_next_renewal() -> None:
    book = held("a")
    book.hurry(1.0)
    assert book.next_s() == 1.0 and book.renewal(1.0)
    book.hurry(1.5)
    assert not book.renewal(1.5), "one is under way"
    book.answered({"a": 1}, 1.6)
    assert book.renewal(1.7), "what changed after the first was sent is looked at too"


def test_the_delay_before_a_claim_falls_with_headroom() -> None:
    delays = [TIMING.claim_delay(headroom, 0) for headroom in (-1, 0, 0.25, 0.5, 1, 2)]
    assert delays == [2.0, 2.0, 1.5, 1.0, 0.0, 0.0]
    assert TIMING.claim_delay(1.0, 1) == 1.0 and TIMING.claim_delay(1.0, 3) == 1.5


@pytest.mark.parametrize("wrong", [
    {"safe_s": 20.0}, {"renew_s": 15.0}, {"retry_s": 6.0}, {"retry_s": 0.0}, {"claim_delay_s": -1.0},
])
def test_timings_that_make_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        LeaseTiming(**wrong)


# --- many replicas over one database ---


@dataclass
class Row:
    """A job in the database."""

    epoch: int = 0
    owner: int | None = None
    until: float = 0.0


@dataclass
class Database:
    """Rows, and its own clock, which is the test's."""

    rows: dict[str, Row]
    now: float = 0.0

    def claim(self, owner: int) -> tuple[str, int] | None:
        for job, row in self.rows.items():
            if row.until <= self.now:
                row.owner, row.epoch, row.until = owner, row.epoch + 1, self.now + TIMING.lease_s
                return job, row.epoch
        return None

    def renew(self, owner: int, asked: dict[str, int]) -> dict[str, int]:
        kept = {job: epoch for job, epoch in asked.items() if (self.rows[job].epoch, self.rows[job].owner) == (epoch, owner)}
        for job in kept:
            self.rows[job].until = self.now + TIMING.lease_s
        return kept


@dataclass
class Replica:
    """A holder. skew: of its clock. stopped_until: of the test's clock. answer: of a renewal that is on its way back, with the
    time when it comes."""

    number: int
    skew: float
    book: LeaseBook = field(default_factory=lambda: LeaseBook(TIMING))
    stopped_until: float = 0.0
    cut_until: float = 0.0
    answer: tuple[float, dict[str, int] | None] | None = None
    running: set[str] = field(default_factory=set)

    def turn(self, database: Database, delay: float) -> None:
        """What its process does at this moment of the database's clock."""
        if database.now < self.stopped_until:
            return
        now = database.now + self.skew
        self.running -= {*self.book.look(now).lapsed}
        if self.answer is not None and database.now >= self.answer[0]:
            kept, self.answer = self.answer[1], None
            if kept is None:
                self.book.failed(now)
            else:
                changes = self.book.answered(kept, now)
                self.running |= {*changes.regained}
                self.running -= {*changes.lost}
        cut = database.now < self.cut_until
        asked = dict(self.book.renewal(now))
        if asked:
            self.answer = (database.now + delay, None if cut else database.renew(self.number, asked))
        if not cut and len(self.book.jobs) < 2 and (got := database.claim(self.number)) is not None:
            self.book.took(*got, now)
            self.running.add(got[0])

    def works_on(self, job: str, database: Database) -> bool:
        return job in self.running and database.now >= self.stopped_until


Faults = dict[int, tuple[int, str, float]]
FAULT = st.tuples(st.integers(0, 3), st.sampled_from(["stop", "cut"]), st.floats(0.5, 60))


FAULTS = st.dictionaries(st.integers(0, 400), FAULT, max_size=12)
DELAYS = st.lists(st.floats(0, 8), min_size=1, max_size=5)
SKEWS = st.lists(st.floats(-1e6, 1e6), min_size=4, max_size=4)


@settings(max_examples=20, deadline=None)
@given(faults=FAULTS, delays=DELAYS, skews=SKEWS)
def test_no_lease_is_held_by_two_that_can_write(faults: Faults, delays: list[float], skews: list[float]) -> None:
    play(faults, delays, skews)


@pytest.mark.full
@settings(max_examples=250, deadline=None)
@given(faults=FAULTS, delays=DELAYS, skews=SKEWS)
def test_no_lease_is_held_by_two_in_many_plays(faults: Faults, delays: list[float], skews: list[float]) -> None:
    play(faults, delays, skews)


def play(faults: Faults, delays: list[float], skews: list[float]) -> None:
    """At each moment one holder at most passes the epoch check, and of processes that run, one at most works on a job. faults:
    by tick: of which replica, and for how long. delays: of answers. skews: of the replicas' clocks."""
    database = Database({f"job{number}": Row() for number in range(3)})
    replicas = [Replica(number, skew) for number, skew in enumerate(skews)]
    epochs: dict[str, int] = {}
    for tick in range(480):
        database.now = tick / 4
        if tick in faults:
            number, kind, seconds = faults[tick]
            if kind == "stop":
                replicas[number].stopped_until = database.now + seconds
            else:
                replicas[number].cut_until = database.now + seconds
        for replica in replicas:
            replica.turn(database, delays[tick % len(delays)])
        for job, row in database.rows.items():
            assert row.epoch >= epochs.get(job, 0)
            epochs[job] = row.epoch
            writers = [one.number for one in replicas if one.book.epoch(job) == row.epoch]
            assert len(writers) <= 1 and all(number == row.owner for number in writers)
            assert sum(one.works_on(job, database) for one in replicas) <= 1, (tick, job)


def test_jobs_of_the_dead_are_claimed_and_none_is_lost() -> None:
    """100 replicas of which most die: every job is held again within a lease and a delay."""
    database = Database({f"job{number}": Row() for number in range(40)})
    replicas = [Replica(number, 0.0) for number in range(100)]
    for tick in range(400):
        database.now = tick / 4
        if tick == 40:
            for replica in replicas[:70]:
                replica.stopped_until = math.inf
        for replica in replicas:
            replica.turn(database, 0.25)
        if tick > 8 and not 40 <= tick <= 40 + 4 * (TIMING.lease_s + 1):
            live = [one for one in replicas if one.stopped_until <= database.now]
            assert all(sum(one.works_on(job, database) for one in live) == 1 for job in database.rows), tick


def test_a_zombie_that_goes_on_finds_out() -> None:
    """SIGSTOP beyond the lease, SIGCONT: before the zombie's first renewal its epoch is old, and after it the job is gone."""
    database = Database({"job0": Row()})
    first, second = Replica(0, 0.0), Replica(1, 5e5)
    first.turn(database, 0.1)
    database.now = 1.0
    first.stopped_until = 40.0
    for tick in range(4, 160):
        database.now = tick / 4
        second.turn(database, 0.1)
    assert second.running == {"job0"} and database.rows["job0"].epoch == 2
    database.now = 40.0
    assert first.book.epoch("job0") == 1, "what it writes before it has looked says so, and is refused"
    first.turn(database, 0.1)
    assert not first.works_on("job0", database)
    database.now = 41.0
    first.turn(database, 0.1)
    assert first.book.epoch("job0") is None
