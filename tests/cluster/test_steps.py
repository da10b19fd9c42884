"""The machine of a step's members: each micro-batch counts once, whoever comes, goes, dawdles or dies."""

from __future__ import annotations

from random import Random

import pytest

from coserve.cluster.steps import (
    MAX_MEMBERS,
    Action,
    Apply,
    Discard,
    Dismiss,
    DropAll,
    Forget,
    GiveState,
    MakeTotal,
    SealNow,
    StepLimits,
    StepMachine,
    Take,
    TakeState,
    Told,
)
from coserve.core import CapacityError, CoserveError, InvalidRequest


def opened(*others: str, step: int = 0, limits: StepLimits | None = None) -> StepMachine:
    """A machine whose members all have the state of `step`."""
    machine = StepMachine(7, "p", limits=limits)
    machine.open(step, 0.0)
    for name in others:
        machine.join(name, 0.0)
    if others:
        machine.state_given(step, 0.0)
    return machine


def told(actions: list[Action], name: str) -> list[object]:
    return [action.instruction for action in actions if isinstance(action, Told) and action.member == name]


def close_step(machine: StepMachine, *names: str, digest: str = "same") -> None:
    """The total has been made: members apply it."""
    step = machine.step
    machine.total_made(step, 1.0)
    for name in names:
        machine.applied(name, step, 1.0)
        machine.digest(name, step, digest, 1.0)


def test_ids_go_to_those_that_pull_and_the_total_comes_in_a_fixed_order() -> None:
    machine = opened("a", "b")
    assert told(machine.pull("a", 0, 4, 1.0), "a") == [Take(0, 0, 0)]
    assert told(machine.pull("b", 0, 4, 1.0), "b") == [Take(0, 0, 1)]
    assert told(machine.pull("a", 0, 4, 1.0), "a") == [Take(0, 0, 2)]
    assert told(machine.pull("p", 0, 4, 1.0), "p") == [Take(0, 0, 3)]
    assert told(machine.pull("b", 0, 4, 1.0), "b") == [SealNow(0, 0)]
    assert told(machine.pull("a", 0, 4, 1.0), "a") == [SealNow(0, 0)]
    assert machine.seal("b", 0, 0, [1], 11, 2.0) == (True, [])
    assert machine.seal("p", 0, 0, [3], 12, 2.0) == (True, [])
    assert machine.seal("a", 0, 0, [0, 2], 13, 2.0) == (True, [MakeTotal(0, (13, 11, 12))])
    assert machine.pull("p", 0, 4, 2.0) == [], "while it is made nothing is given out"
    assert [action.member for action in machine.total_made(0, 3.0)] == ["p", "a", "b"]  # type: ignore[union-attr]
    assert machine.step == 0
    machine.applied("a", 0, 3.0)
    assert machine.pull("a", 1, 2, 3.0) == [], "a step begins when the primary has applied the one before"
    assert told(machine.applied("p", 0, 3.0), "a") == [Take(1, 0, 0)]


@pytest.mark.parametrize(("step", "round", "ids"), [(1, 0, [0]), (-1, 0, [0]), (0, 0, [1]), (0, 0, [0, 0]), (0, 0, [])])
def test_seals_of_others_ids_and_steps_are_dropped(step: int, round: int, ids: list[int]) -> None:
    machine = opened("a")
    machine.pull("a", 0, 2, 1.0)
    machine.pull("p", 0, 2, 1.0)
    assert machine.seal("a", step, round, ids, 1, 2.0) == (False, [])
    assert machine.seal("nobody", 0, 0, [0], 1, 2.0) == (False, [])
    assert machine.seal("a", 0, 0, [0], 1, 2.0)[0]
    assert machine.seal("a", 0, 0, [0], 1, 2.0) == (False, []), "twice"


def test_what_a_lost_member_holds_runs_elsewhere_and_what_it_sealed_counts() -> None:
    machine = opened("a")
    for name in ("a", "a", "p"):
        machine.pull(name, 0, 3, 1.0)
    assert machine.seal("a", 0, 0, [0], 1, 1.0)[0], "a part of what it holds"
    machine.pull("p", 0, 3, 2.0)
    actions = machine.lost("a", 2.0)
    assert told(actions, "p") == [Take(0, 1, 1)] and told(actions, "a") == [
        Dismiss("nothing was heard of this member any more", True)]
    assert machine.seal("a", 0, 0, [1], 2, 2.0) == (False, []), "it comes too late"
    assert machine.seal("p", 0, 1, [1, 2], 3, 3.0) == (True, [MakeTotal(0, (1, 3))])


def test_a_late_member_loses_what_it_holds_once_others_wait() -> None:
    machine = opened("a", limits=StepLimits(lost_s=100.0, late_s=5.0, slow=4.0))
    machine.pull("a", 0, 2, 0.0)
    machine.pull("p", 0, 2, 0.0)
    machine.seal("p", 0, 0, [1], 1, 3.0)
    assert machine.tick(50.0) == [], "the primary has not asked for more"
    machine.pull("p", 0, 2, 50.0)
    machine.heard("a", 50.0)
    assert machine.tick(11.0) == [], "four times what the other's took is 12 s"
    actions = machine.tick(50.0)
    assert told(actions, "a") == [DropAll(0, 1)] and told(actions, "p") == [Take(0, 1, 0)]
    assert machine.seal("a", 0, 0, [0], 2, 51.0) == (False, []), "of an older round"
    assert machine.seal("p", 0, 1, [0], 3, 51.0)[0]
    assert machine.pull("a", 0, 2, 51.0) == []


def test_a_member_that_nobody_waits_for_is_never_late() -> None:
    machine = opened(limits=StepLimits(lost_s=1e9, late_s=1.0, unknown_s=1.0))
    machine.pull("p", 0, 2, 0.0)
    assert machine.tick(1e6) == []


def test_silence_loses_a_member_and_the_primarys_ends_all() -> None:
    machine = opened("a", limits=StepLimits(lost_s=10.0))
    machine.heard("p", 9.0)
    assert told(machine.tick(12.0), "a")
    assert machine.members == ("p",) and not machine.closed
    machine.join("b", 12.0)
    actions = machine.tick(20.0)
    assert machine.closed and told(actions, "b") == [Dismiss("the job's primary has gone", False)]
    with pytest.raises(CapacityError):
        machine.join("c", 21.0)


def test_a_member_joins_with_the_state_and_catches_up_by_the_totals_since() -> None:
    machine = opened()
    assert machine.join("a", 0.0) == [Told("p", GiveState())]
    assert machine.join("b", 0.0) == [], "asked already"
    for step in range(2):  # meanwhile steps are made
        machine.pull("p", step, 1, 1.0)
        machine.seal("p", step, 0, [0], step, 1.0)
        close_step(machine, "p")
    actions = machine.state_given(0, 2.0)
    assert told(actions, "a") == told(actions, "b") == [TakeState(0), Apply(0), Apply(1)]
    for step in range(2):
        for name in ("a", "b"):
            machine.applied(name, step, 3.0)
            machine.digest(name, step, "same", 3.0)
    machine.pull("a", 2, 2, 4.0)
    machine.pull("b", 2, 2, 4.0)
    machine.seal("a", 2, 0, [0], 10, 5.0)
    assert machine.seal("b", 2, 0, [1], 11, 5.0) == (True, [MakeTotal(2, (10, 11))])


def run_steps(machine: StepMachine, count: int) -> list[Action]:
    """The primary runs steps alone."""
    actions: list[Action] = []
    for _ in range(count):
        step = machine.step
        machine.pull("p", step, 1, 1.0)
        machine.seal("p", step, 0, [0], step, 1.0)
        actions += machine.total_made(step, 1.0) + machine.applied("p", step, 1.0) + machine.digest("p", step, "same", 1.0)
    return actions


def test_a_member_whose_state_takes_six_steps_catches_up() -> None:
    machine = opened("a")
    actions = run_steps(machine, 6)
    assert told(actions, "a") == [Apply(step) for step in range(6)] and not [a for a in actions if isinstance(a, Forget)]
    forgotten: list[Action] = []
    for step in range(6):
        forgotten += machine.applied("a", step, 2.0)
        machine.digest("a", step, "same", 2.0)
    assert forgotten == [Forget(step) for step in range(6)] and machine.members == ("p", "a")
    machine.pull("a", 6, 1, 3.0)
    assert machine.seal("a", 6, 0, [0], 10, 3.0) == (True, [MakeTotal(6, (10,))]), "it takes part, and is known to be equal"
    close_step(machine, "p", "a")
    (away,) = [one for one in told(run_steps(machine, 5), "a") if isinstance(one, Dismiss)]
    assert away == Dismiss("this member is more than 4 steps behind", False), "it has caught up: now lag counts as ever"


def test_a_member_that_never_catches_up_is_sent_away() -> None:
    machine = opened("a")
    run_steps(machine, 8)
    machine.applied("a", 0, 1.0)
    assert machine.members == ("p", "a")
    actions = run_steps(machine, 2)
    assert Told("a", Dismiss("this member is more than 8 steps behind", False)) in actions
    assert machine.members == ("p",) and machine._totals == set()


def test_two_members_join_one_step_apart() -> None:
    machine = opened()
    machine.join("a", 0.0)
    assert told(machine.state_given(0, 0.0), "a") == [TakeState(0)]
    run_steps(machine, 1)
    assert machine.join("b", 1.0) == [Told("p", GiveState())]
    actions = machine.state_given(1, 1.0)
    assert told(actions, "b") == [TakeState(1)] and told(actions, "a") == []
    run_steps(machine, 5)
    for name, first in (("a", 0), ("b", 1)):
        for step in range(first, 6):
            machine.applied(name, step, 2.0)
            machine.digest(name, step, "same", 2.0)
    assert machine.members == ("p", "a", "b") and machine._totals == set()


def test_who_waits_for_a_state_that_takes_too_long_is_sent_away_instead_of_asking_for_ever() -> None:
    machine = opened()
    machine.join("a", 0.0)
    run_steps(machine, 8)
    machine.state_given(0, 1.0)
    assert machine.active == ("p", "a"), "all totals since are there"
    machine.leave("a", 1.0)
    machine.join("b", 1.0)
    run_steps(machine, 9)
    assert machine.state_given(8, 2.0) == [
        Told("b", Dismiss("the primary's state took more than 8 steps to be told", False)),
        *(Forget(step) for step in range(9, 17)),
    ]
    assert machine.members == ("p",)


def test_totals_are_kept_as_long_as_somebody_needs_them_and_no_longer() -> None:
    machine = opened("a", limits=StepLimits(max_totals=2))
    machine.pull("p", 0, 1, 1.0)
    machine.seal("p", 0, 0, [0], 0, 1.0)
    close_step(machine, "p", "a")
    for step in range(1, 4):
        machine.pull("p", step, 1, 1.0)
        machine.seal("p", step, 0, [0], step, 1.0)
        machine.total_made(step, 1.0)
        assert not [one for one in machine.applied("p", step, 1.0) if isinstance(one, Forget)] or step == 3
        machine.digest("p", step, "same", 1.0)
    assert machine.members == ("p",), "a lagged by three steps"
    assert machine._totals == set()


def test_an_unequal_adapter_is_sent_away_and_what_it_sealed_since_runs_again() -> None:
    machine = opened("a")
    machine.pull("p", 0, 1, 1.0)
    machine.seal("p", 0, 0, [0], 1, 1.0)
    machine.total_made(0, 1.0)
    machine.applied("p", 0, 1.0)
    machine.applied("a", 0, 1.0)
    machine.pull("a", 1, 1, 1.0)
    assert machine.seal("a", 1, 0, [0], 2, 2.0) == (True, []), "no total before the digests are known"
    machine.digest("a", 0, "other", 2.0)
    machine.pull("p", 1, 1, 2.0)
    actions = machine.digest("p", 0, "own", 2.0)
    (away,) = told(actions, "a")
    assert isinstance(away, Dismiss) and away.fault and "differs from the primary's after step 1" in away.reason
    assert Discard(2) in actions and told(actions, "p") == [Take(1, 1, 0)]


def test_seals_count_when_the_digests_agree() -> None:
    machine = opened("a")
    machine.pull("p", 0, 1, 1.0)
    machine.seal("p", 0, 0, [0], 1, 1.0)
    machine.total_made(0, 1.0)
    machine.applied("p", 0, 1.0)
    machine.applied("a", 0, 1.0)
    machine.pull("a", 1, 1, 1.0)
    machine.seal("a", 1, 0, [0], 2, 2.0)
    assert machine.digest("p", 0, "own", 2.0) == []
    assert machine.digest("a", 0, "own", 2.0) == [MakeTotal(1, (2,))]


def test_a_member_without_memory_gives_back_what_it_holds() -> None:
    machine = opened("a")
    machine.pull("a", 0, 2, 1.0)
    machine.pull("p", 0, 2, 1.0)
    machine.pull("p", 0, 2, 1.0)
    assert told(machine.give_back("a", 0, 2.0), "p") == [Take(0, 1, 0)]


def test_a_member_that_counts_other_micro_batches_is_sent_away() -> None:
    machine = opened("a")
    machine.pull("p", 0, 2, 1.0)
    (away,) = told(machine.pull("a", 0, 3, 1.0), "a")
    assert isinstance(away, Dismiss) and "counts 3 micro-batches in step 1, another 2" in away.reason


def test_who_may_come() -> None:
    machine = opened("a", "b", "c")
    assert len(machine.members) == MAX_MEMBERS
    with pytest.raises(CapacityError, match="has 4 members already"):
        machine.join("d", 1.0)
    machine.leave("c", 1.0)
    with pytest.raises(InvalidRequest, match="called 'a' already"):
        machine.join("a", 1.0)
    with pytest.raises(CoserveError, match="opened already"):
        machine.open(3, 1.0)
    machine.join("d", 1.0)


class World:
    """Members at random: each does a next thing that it may do, or dies, comes, or says something twice."""

    def __init__(self, seed: int, steps: int) -> None:
        self.rng, self.steps, self.now = Random(seed), steps, 0.0
        limits = StepLimits(lost_s=40.0, late_s=5.0, unknown_s=8.0, max_totals=3, max_joining=4)
        self.machine = StepMachine(1, "p", limits=limits)
        self.at: dict[str, int | None] = {"p": 0}
        self.inbox: dict[str, list[object]] = {"p": []}
        self.holds: dict[str, list[Take]] = {"p": []}
        self.pulled: dict[str, bool] = {"p": False}
        self.seals: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.old: list[tuple[str, int, int, tuple[int, ...]]] = []
        self.counted: dict[int, list[int]] = {}
        self.num_keys = self.num_names = 0
        self.do(self.machine.open(0, 0.0))

    def num_ids(self, step: int) -> int:
        return 1 + step * 7 % 5

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Told(member=name, instruction=instruction):
                    if name in self.inbox:
                        self.inbox[name].append(instruction)
                case MakeTotal(step=step, keys=keys):
                    ids = [id for key in keys for id in self.seals[key][1]]
                    assert all(self.seals[key][0] == step for key in keys)
                    assert sorted(ids) == list(range(self.num_ids(step))), "each once"
                    assert step not in self.counted, "no step twice"
                    self.counted[step] = ids
                    self.do(self.machine.total_made(step, self.now))
                case Discard(key=key):
                    del self.seals[key]

    def turn(self) -> None:
        rng, machine = self.rng, self.machine
        self.now += rng.random()
        for name in self.at:
            if rng.random() < 0.8:
                machine.heard(name, self.now)
        machine.heard("p", self.now)
        if rng.random() < 0.1:
            self.do(machine.tick(self.now))
        if rng.random() < 0.03 and len(self.at) < 4:
            self.num_names += 1
            name = f"m{self.num_names}"
            self.at[name], self.inbox[name], self.holds[name], self.pulled[name] = None, [], [], False
            self.do(machine.join(name, self.now))
        name = rng.choice(list(self.at))
        if name != "p" and rng.random() < 0.03:
            self.do(machine.lost(name, self.now) if rng.random() < 0.5 else machine.leave(name, self.now))
            del self.at[name], self.inbox[name]
            return
        if self.old and rng.random() < 0.2:  # a zombie repeats itself
            who, step, round, ids = rng.choice(self.old)
            assert machine.seal(who, step, round, ids, 10**6, self.now) == (False, [])
        if self.inbox[name] and rng.random() < 0.9:
            self.read(name, self.inbox[name].pop(0))
        elif self.at[name] is not None and not self.pulled[name] and self.at[name] < self.steps:  # type: ignore[operator]
            self.pulled[name] = True
            step = self.at[name] or 0
            self.do(machine.pull(name, step, self.num_ids(step), self.now))

    def read(self, name: str, instruction: object) -> None:
        machine = self.machine
        match instruction:
            case Take(step=step):
                if step == self.at[name]:
                    self.holds[name].append(instruction)
                    self.pulled[name] = False
            case DropAll(step=step):
                if step == self.at[name]:
                    self.holds[name].clear()
                    self.pulled[name] = False
            case SealNow(step=step, round=round):
                if step == self.at[name] and self.holds[name]:
                    ids = tuple(take.id for take in self.holds[name])
                    round = max(round, *(take.round for take in self.holds[name])) if ids else round
                    self.holds[name].clear()
                    self.num_keys += 1
                    self.seals[self.num_keys] = (step, ids)
                    counts, actions = machine.seal(name, step, round, ids, self.num_keys, self.now)
                    if counts:
                        self.old.append((name, step, round, ids))
                    else:
                        del self.seals[self.num_keys]
                    self.do(actions)
            case Apply(step=step):
                assert self.at[name] == step, "totals come in order"
                self.holds[name].clear()
                self.at[name], self.pulled[name] = step + 1, False
                self.do(machine.applied(name, step, self.now))
                self.do(machine.digest(name, step, f"after {step}", self.now))
            case GiveState():
                self.do(machine.state_given(self.at["p"] or 0, self.now))
            case TakeState(step=step):
                self.at[name] = step
            case Dismiss():
                assert name != "p"
                del self.at[name], self.inbox[name]


@pytest.mark.parametrize("seed", range(12))
def test_every_step_is_made_once_of_every_id_whatever_members_do(seed: int) -> None:
    world = World(seed, steps=60)
    for _ in range(40_000):
        world.turn()
        if world.at["p"] == 60:
            break
    assert list(world.counted) == list(range(60)) and world.at["p"] == 60
    assert world.num_names > 3, "others came"
