"""What an iteration does for jobs in the time that requests leave: a window that rides in their pass, units, optimizer slices.

    1. ride      A window that saves time rides in the pass (riding.py).
    2. units     Of the job that has had least: the unit with the best predicted work per second that fits, again and again.
    3. slices    of optimizer steps, before units.

Where riding pays, forward waits for the pass as long as its job has backward units to run, since each row that rides saves
time, and a window that has begun on its own can't ride until it is through all layers. A window that has begun comes first for
the same reason. Where riding does not pay, as on a CPU, the most efficient unit comes first, whatever its direction: mostly a
large window over few layers. The latency model decides.

Units wait in two more cases. StarvationGuard ends the wait:

    inefficient   No shape that fits is efficient. Slack that is not used adds up, so that a larger one fits later. After
                  PATIENCE iterations any shape will do.
    stuck         The smallest thing that the job whose turn it is has to run does not fit: a micro-batch on a grid has no
                  choice of windows, and never rides; an optimizer slice may have norms to refresh. After STUCK_PATIENCE
                  iterations other jobs wait too, so that slack adds up, and it may take all of the slack, over the ITL cap.
                  After OVERDUE iterations it may last until the first request would become infeasible, and other jobs go on.
                  Where waiting gains nothing, as while no request runs, it runs at once, and so does any other unit.

Owns: the order in which jobs and their units get time. Does not own: the shapes of units (shapes.py), how much time there is
(deadlines.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from coserve.core import OptimizerSlice, PassCost, UnitCost, WorkUnit
from coserve.scheduler.deadlines import UNBOUNDED
from coserve.scheduler.latency import LatencyModel
from coserve.scheduler.riding import FreeRows, Riding
from coserve.scheduler.shapes import LEAST_EFFICIENCY, Candidate, Shapes
from coserve.scheduler.work import JobWork, MicrobatchWork, Phase

PATIENCE = 8
"""Iterations for which inefficient units wait for more time."""
STUCK_PATIENCE = 6
"""Iterations for which a stuck unit waits before other jobs wait for it."""
OVERDUE = 64
"""Iterations after which a stuck unit may delay requests."""
MAX_UNITS = 64
"""Units and optimizer slices of one iteration."""
LEAST_SLICE = 1 << 16
"""Elements of the smallest optimizer slice."""


class _Proposal(NamedTuple):
    """A unit that may come next, with its job and micro-batch."""

    job: JobWork
    work: MicrobatchWork
    candidate: Candidate


class _Stuck(NamedTuple):
    """The smallest thing that a job has to run, which does not fit. seconds: that it takes. run: adds it."""

    what: str
    seconds: float
    run: Callable[[Chosen], None]


class _Turn(NamedTuple):
    """What an iteration may run. jobs: in order of precedence. only: as in `UnitPicker.pick`. waiting: micro-batches whose next
    window waits for the pass. rides: whether riding pays. least: the share of the best efficiency that a unit must have."""

    jobs: Sequence[JobWork]
    only: MicrobatchWork | None
    waiting: frozenset[int]
    rides: bool
    least: float


@dataclass(slots=True)
class Chosen:
    """What an iteration does for jobs.

    inference: the pass with its fused rows; None without a pass. costs: of the units that are not fused. tokens: what each job
    gets, in forward-token equivalents. seconds: predicted, of units and slices together. refresh_seconds: as in Contents.
    """

    inference: PassCost | None
    units: list[WorkUnit] = field(default_factory=list)
    costs: list[UnitCost] = field(default_factory=list)
    optimizer: list[OptimizerSlice] = field(default_factory=list)
    tokens: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    refresh_seconds: float = 0.0


class StarvationGuard:
    """Counts the iterations for which units have waited, and says when they need not wait any more."""

    def __init__(self) -> None:
        self._idle = 0  # iterations in a row without a unit or a slice
        self._stuck = 0  # iterations in a row in which the smallest thing did not fit

    def least_efficiency(self, patient: bool) -> float:
        """The share of the best efficiency that a unit must have. patient: whether waiting gains slack at all."""
        return LEAST_EFFICIENCY if patient and self._idle < PATIENCE else 0.0

    def may_stretch(self, patient: bool) -> bool:
        """Whether what is stuck may take more than what is left of the iteration, and other jobs wait for it."""
        return self._stuck > STUCK_PATIENCE or not patient

    @property
    def is_overdue(self) -> bool:
        """Whether what is stuck may delay requests. Other jobs no longer wait for it."""
        return self._stuck > OVERDUE

    def on_turn(self, *, is_stuck: bool) -> None:
        """An iteration begins. is_stuck: whether the smallest thing of the job whose turn it is does not fit."""
        self._stuck = self._stuck + 1 if is_stuck else 0

    def on_stretched(self) -> None:
        """What was stuck runs."""
        self._idle = self._stuck = 0

    def on_filled(self, *, is_empty: bool) -> None:
        """An iteration's time was filled as far as units fit."""
        self._idle = self._idle + 1 if is_empty else 0


class UnitPicker:
    """Picks what an iteration does for jobs.

    latency: predicts seconds. max_window: rows of the largest window. explain: if set, it is called with one line of text for
    each thing that is considered.
    """

    def __init__(self, latency: LatencyModel, num_layers: int, max_window: int) -> None:
        self.latency = latency
        self.shapes = Shapes(latency, num_layers, max_window)
        self.riding = Riding(self.shapes)
        self.guard = StarvationGuard()
        self.explain: Callable[[str], None] | None = None

    def pick(
        self, jobs: Sequence[JobWork], seconds: float, inference: PassCost | None, *, free: FreeRows | None = None,
        patient: bool = True, only: MicrobatchWork | None = None,
        stretch: Callable[[bool], float] = lambda overdue: UNBOUNDED,
    ) -> Chosen:
        """Picks units and optimizer slices for `seconds`, and advances their micro-batches.

        jobs: in order of precedence. inference: the requests' pass. free: training rows that had best ride in a pass; None if
        none may. patient: whether units may wait for more time. only: the one micro-batch that may get units; None allows
        all. stretch: called with whether the wait is overdue, gives the seconds that what is stuck may take.
        """
        chosen = Chosen(inference)
        stuck = self._stuck(jobs, seconds, only, patient=patient)
        self.guard.on_turn(is_stuck=stuck is not None)
        if stuck is not None and self.guard.may_stretch(patient):
            if stuck.seconds <= stretch(self.guard.is_overdue):
                self.guard.on_stretched()
                self._say(f"what never fitted takes all slack: {stuck.what}")
                stuck.run(chosen)
                chosen.seconds = stuck.seconds
                return chosen
            if not self.guard.is_overdue:
                self._say(f"all jobs wait for slack, so that this fits: {stuck.what}")
                return chosen
        rides = free is not None and free.rows > 0
        self._say(f"{1e3 * seconds:.2f} ms for jobs; {free.rows if free else 0} rows had best ride")
        turn = _Turn(
            jobs, only, self._waiting(jobs, only) if rides else frozenset(), rides, self.guard.least_efficiency(patient))
        ride = None if free is None or inference is None else self._best_ride(turn, inference, seconds)
        if ride is None or inference is None:
            left = self._run(chosen, turn, seconds)
        else:
            turn, left = self._run_beside(chosen, turn, seconds, ride, inference)
        if turn.waiting and free and inference and self._ends_early(inference, seconds, left) > free.saved_s:
            self._say(f"{1e3 * left:.2f} ms are left, and worth more than what rides in the next pass")
            left = self._run(chosen, turn._replace(waiting=frozenset()), left)
        self._say(f"{1e3 * left:.2f} ms left")
        chosen.seconds = seconds - left
        self.guard.on_filled(is_empty=not (chosen.units or chosen.optimizer))
        return chosen

    def _run_beside(
        self, chosen: Chosen, turn: _Turn, seconds: float, ride: _Proposal, inference: PassCost
    ) -> tuple[_Turn, float]:
        """Adds a window that rides, and units beside it. Returns the turn as it goes on, and the seconds that are left.

        The other windows of its job wait, so that it can grow into what time is left. The newest of them waits for the next
        pass in any case.
        """
        able = [work.id for work in ride.job.microbatches.values() if self.shapes.can_ride(work)]
        waiting = turn.waiting | frozenset(able)
        left = self._run(chosen, turn._replace(waiting=waiting), seconds - ride.candidate.seconds)
        left += ride.candidate.seconds
        ride = ride._replace(candidate=self.riding.grown(ride.work, inference, ride.candidate, left))
        self._say("rides", ride.candidate)
        self._add(chosen, ride)
        turn = turn._replace(waiting=turn.waiting | ({max(able)} - {ride.work.id}))
        return turn, self._run(chosen, turn, left - ride.candidate.seconds)

    def _say(self, line: str, candidate: Candidate | None = None) -> None:
        """candidate: follows the line. It takes a while to write one out, so it is not done for nobody."""
        if self.explain is not None:
            self.explain(line if candidate is None else f"{line}: {candidate}")

    def _add(self, chosen: Chosen, found: _Proposal) -> None:
        job, work, best = found
        unit = best.unit.unit
        chosen.units.append(best.unit)
        chosen.tokens[job.id] = chosen.tokens.get(job.id, 0.0) + unit.tokens(self.shapes.num_layers)
        if best.cost is not None:
            chosen.costs.append(best.cost)
        else:
            assert chosen.inference is not None
            chosen.inference = self.shapes.with_ride(work, chosen.inference, unit)
        work.advance(unit)

    def _add_slice(self, chosen: Chosen, jobs: Sequence[JobWork], left: float) -> float | None:
        """The next optimizer slice that fits, doubled as long as it still fits. Returns its seconds, None if none fits."""
        for job in jobs:
            elements = min(job.optimizer_left, LEAST_SLICE)
            if not elements:
                continue
            while elements < job.optimizer_left and self._slice_seconds(job, 2 * elements) <= left:
                elements = min(2 * elements, job.optimizer_left)
            seconds = self._slice_seconds(job, elements)
            if seconds <= left:
                self._say(f"runs: {elements} parameters of an optimizer step: {1e3 * seconds:.2f} ms")
                _take_slice(chosen, job, elements)
                return seconds
        return None

    def _slice_seconds(self, job: JobWork, elements: int) -> float:
        return self.latency.optimizer_seconds(elements, job.slice_refresh_seconds(elements))

    def _stuck(
        self, jobs: Sequence[JobWork], seconds: float, only: MicrobatchWork | None, *, patient: bool
    ) -> _Stuck | None:
        """The smallest thing of the job whose turn it is, if it takes more than `seconds`. None if it fits, or if it is a unit
        that may have other shapes and waiting gains slack."""
        for job in jobs:
            ready = _ready(job, only)
            if job.optimizer_left:
                found: _Stuck | None = self._least_slice(job)
            elif ready:
                able = [work for work in ready if work.grid is not None or not patient]
                found = min((self._least_unit(job, work) for work in able), key=attrgetter("seconds"), default=None)
            else:
                continue
            return None if found is None or found.seconds <= seconds else found
        return None

    def _least_slice(self, job: JobWork) -> _Stuck:
        elements = min(job.optimizer_left, LEAST_SLICE)
        seconds = self._slice_seconds(job, elements)
        what = f"{elements} parameters of an optimizer step: {1e3 * seconds:.2f} ms"
        return _Stuck(what, seconds, lambda chosen: _take_slice(chosen, job, elements))

    def _least_unit(self, job: JobWork, work: MicrobatchWork) -> _Stuck:
        candidate = self.shapes.least(work)
        return _Stuck(str(candidate), candidate.seconds, lambda chosen: self._add(chosen, _Proposal(job, work, candidate)))

    def _ends_early(self, inference: PassCost, seconds: float, left: float) -> float:
        """The seconds that are lost if an iteration ends `left` seconds early: the next pass comes sooner by so much."""
        pass_s = self.latency.constant_seconds + self.latency.pass_seconds(inference)
        return left * pass_s / (pass_s + seconds)

    def _waiting(self, jobs: Sequence[JobWork], only: MicrobatchWork | None) -> frozenset[int]:
        """The micro-batches whose next window waits for the pass: those of jobs that have backward units to run meanwhile."""
        waiting: set[int] = set()
        for job in jobs:
            ready = _ready(job, only)
            if any(work.phase is Phase.BACKWARD for work in ready):
                waiting |= {work.id for work in ready if self.shapes.can_ride(work)}
        return frozenset(waiting)

    def _best_ride(self, turn: _Turn, inference: PassCost, left: float) -> _Proposal | None:
        """The window that rides: of the first job that has one that saves time, that of its oldest micro-batch.

        It grows into the rest of the time if it is this job's turn, and the job has nothing else to run.
        """
        is_first = True
        for job in turn.jobs:
            ready = _ready(job, turn.only)
            able = [work for work in ready if self.shapes.can_ride(work)]
            found = ((self.riding.best(work, inference, left), work) for work in able)
            ride = next((_Proposal(job, work, candidate) for candidate, work in found if candidate is not None), None)
            if self.explain is not None:
                for work in able:
                    for candidate in self.riding.candidates(work, inference):
                        self._say(f"could ride: {candidate}, saves {1e3 * candidate.saved_s:.2f} ms")
            if ride is not None:
                if is_first and len(able) == len(ready):
                    ride = ride._replace(candidate=self.riding.grown(ride.work, inference, ride.candidate, left))
                return ride
            is_first = is_first and not ready
        return None

    def _run(self, chosen: Chosen, turn: _Turn, left: float) -> float:
        """Adds optimizer slices and units that are not fused for `left` seconds. Returns the seconds that are left."""
        while len(chosen.units) + len(chosen.optimizer) < MAX_UNITS:
            slice_seconds = self._add_slice(chosen, turn.jobs, left)
            if slice_seconds is not None:
                left -= slice_seconds
                continue
            found = self._best(turn, left, cut=chosen.inference is not None or not chosen.units)
            if found is None:
                break
            self._say("runs", found.candidate)
            left -= found.candidate.seconds
            self._add(chosen, found)
        return left

    def _best(self, turn: _Turn, left: float, *, cut: bool) -> _Proposal | None:
        """The unit that comes next, of the first job that has one that fits and is efficient enough. cut: whether it may have a
        part of a window's rows. Without a pass nothing is lost if an iteration ends early, and whole windows are faster."""
        for job in turn.jobs:
            oldest: dict[Phase, _Proposal] = {}
            for work in _ready(job, turn.only):
                if work.phase in oldest or work.id in turn.waiting:
                    continue
                candidate = self._next(turn, work, left, cut=cut)
                if candidate is None:
                    self._say(f"micro-batch {work.id}: nothing fits into {1e3 * left:.2f} ms")
                elif candidate.efficiency >= turn.least * self.shapes.best_efficiency(work):
                    self._say("could run", candidate)
                    oldest[work.phase] = _Proposal(job, work, candidate)
                else:
                    self._say("waits for more time, since it is inefficient", candidate)
            if oldest:
                return max(oldest.values(), key=_rank_where_rows_ride if turn.rides else _rank)
        return None

    def _next(self, turn: _Turn, work: MicrobatchWork, left: float, *, cut: bool) -> Candidate | None:
        """A micro-batch's next unit that fits into `left` seconds. Where rows ride, a new window goes through all layers if
        that is efficient, since one that stays begun could not ride. Otherwise it waits, if there is something to wait for."""
        if turn.rides and self.shapes.can_ride(work):
            whole = self.shapes.whole_window(work, left)
            if whole is not None and whole.efficiency >= LEAST_EFFICIENCY * self.shapes.best_efficiency(work):
                return whole
            if turn.least > 0:
                return None
        return self.shapes.next_unit(work, left, cut=cut)


def _rank(item: _Proposal) -> tuple[float, float]:
    """The most efficient unit first."""
    return round(item.candidate.efficiency, 2), item.candidate.work


def _rank_where_rows_ride(item: _Proposal) -> float:
    """A window that has begun on its own first, then backward, then new windows."""
    return 1.0 if item.work.phase is Phase.BACKWARD else 0.0 if item.work.between_windows else 2.0


def _take_slice(chosen: Chosen, job: JobWork, elements: int) -> None:
    chosen.refresh_seconds += job.slice_refresh_seconds(elements)
    chosen.optimizer.append(job.take_slice(elements))


def _ready(job: JobWork, only: MicrobatchWork | None) -> list[MicrobatchWork]:
    """A job's micro-batches that a unit may come of. only: as in `UnitPicker.pick`."""
    return [work for work in job.microbatches.values() if work.ready and (only is None or work is only)]
