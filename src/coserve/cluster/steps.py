"""The optimizer steps of one job that several members share, as a machine without tensors, sockets or a clock.

Every member has the whole adapter and the whole batch. One of them, the primary, holds the job's lease. In a step each pulls
numbers of micro-batches, seals the sum of their gradients, and applies the total of all sums:

    member    pull --> Take(3) ... pull --> Take(7) ... pull --> SealNow ... seal {3, 7} ... Apply ... applied, digest
    machine        ids of the step: free -> held by one member -> sealed -> all sealed: MakeTotal -> Apply to every member

What a lost or late member holds is free again, and others seal it in a further round. A seal counts only if its member still
holds all its ids, in the present epoch and step and in no round before the member's last revocation. So each id is in exactly
one seal that counts. A step begins when the primary has applied the one before. A member joins with the primary's state at a
step's start, and then catches up by the totals since, which are kept for it. Until then it may lag further behind than later,
since reading the state may take several steps.

A seal counts in the total only when its member's adapter is known to equal the primary's (digests after the step before). A
member whose digest differs is dismissed, and what it sealed since runs again elsewhere.

Owns: who has which micro-batch, what counts, who is late or lost. Does not own: tensors and messages (server/replicas/,
server/link/), which examples an id stands for (finetune/batches.py). Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from coserve.core import CapacityError, CoserveError, InvalidRequest

MAX_MEMBERS = 4
"""Members of a job, the primary included: each sends and gets a gradient per step, all through one place."""

DIFFERS = "the adapter of this member differs from the primary's"
"""How the reason begins for which a member is dismissed that has worked out another adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """lost_s: silence after which a member counts as lost. late_s, slow: a member is late while others wait for it after
    `late_s`, or `slow` times what its micro-batches take elsewhere, whichever is more. unknown_s: the same before anybody has
    sealed. max_totals: how many steps a member may lag behind. max_joining: the same, at least as many, before it has caught
    up to that for the first time; also how many steps the primary's state may take to be told. max_members: the primary
    included."""

    lost_s: float = 15.0
    late_s: float = 20.0
    slow: float = 4.0
    unknown_s: float = 600.0
    max_totals: int = 4
    max_joining: int = 8
    max_members: int = MAX_MEMBERS


class Take(NamedTuple):
    """The member runs micro-batch `id` of the step, and may pull again."""

    step: int
    round: int
    id: int


class SealNow(NamedTuple):
    """No id is free: the member seals what it holds when that has run."""

    step: int
    round: int


class DropAll(NamedTuple):
    """What the member holds has been given to others: it forgets it, and may pull again."""

    step: int
    round: int


class Apply(NamedTuple):
    """The total of the step is there: the member applies it."""

    step: int


class GiveState(NamedTuple):
    """The primary tells its adapter and its optimizer's state between two updates, for members that join."""


class TakeState(NamedTuple):
    """A joining member begins with the primary's state at the start of the step."""

    step: int


class Dismiss(NamedTuple):
    """The member has no more part in the job. fault: whether that is an error."""

    reason: str
    fault: bool


Instruction = Take | SealNow | DropAll | Apply | GiveState | TakeState | Dismiss


class Told(NamedTuple):
    """An instruction for a member."""

    member: str
    instruction: Instruction


class MakeTotal(NamedTuple):
    """For the caller: add the sums of these seals in this order, then call `total_made`. keys: what `seal` was given."""

    step: int
    keys: tuple[int, ...]


class Discard(NamedTuple):
    """For the caller: a seal that was accepted counts no more."""

    key: int


class Forget(NamedTuple):
    """For the caller: nobody needs the total of the step any more."""

    step: int


Action = Told | MakeTotal | Discard | Forget


@dataclass(slots=True)
class _Member:
    """at: the member's adapter is that of the start of this step; None: it waits for a state. caught_up: whether it has ever
    applied a total and been at most max_totals steps behind then. verified: the newest step at whose start it is known to equal
    the primary's. begun: the step that it works on. num_ids: that step's micro-batches, as it counts. holds: ids, and when they
    were taken. since_s: its last sign of progress. valid_round: seals of earlier rounds don't count."""

    heard_s: float
    at: int | None = None
    caught_up: bool = False
    verified: int = -1
    begun: int = -1
    num_ids: int = 0
    wants: bool = False
    sealing: bool = False
    holds: dict[int, float] = field(default_factory=dict)
    since_s: float = 0.0
    valid_round: int = 0


class _Seal(NamedTuple):
    member: str
    ids: tuple[int, ...]
    key: int


class StepMachine:
    """Members and the present step. epoch: of the job's lease, which is in every message. primary: that member's name.

    Methods that begin with a verb of a member are called with what it says; all return what is to be done, in order.
    """

    def __init__(self, epoch: int, primary: str, *, limits: StepLimits | None = None) -> None:
        self.epoch, self.primary, self.limits = epoch, primary, limits or StepLimits()
        self.step = -1
        """The step whose micro-batches are given out; -1 before the primary has opened the job."""
        self.round = 0
        self.closed = False
        self._members: dict[str, _Member] = {}
        self._num_ids: int | None = None
        self._free: list[int] = []
        self._seals: list[_Seal] = []
        self._making = self._made = False
        self._totals: set[int] = set()
        self._asked_state: int | None = None  # the step at which the primary was asked for its state
        self._digests: dict[int, dict[str, str]] = {}
        self._typical_s: float | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """Names, the primary's first, those that are joining included."""
        return tuple(self._members)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the members that have the job's state."""
        return tuple(name for name, member in self._members.items() if member.at is not None)

    # --- coming and going ---

    def open(self, step: int, now: float) -> list[Action]:
        """The primary begins at `step`. Raises CoserveError if it has begun before."""
        if self.step >= 0 or self.closed:
            raise CoserveError("the job's steps have been opened already")
        first = {self.primary: _Member(now, at=step, caught_up=True, verified=step)}
        self._members = first | self._members
        self.step = step
        return self._ask_state()

    def join(self, name: str, now: float) -> list[Action]:
        """A member asks to take part. Raises CapacityError if there are enough, InvalidRequest for a name that is taken."""
        if self.closed:
            raise CapacityError("the job has ended")
        if name in self._members or name == self.primary:
            raise InvalidRequest(f"a member is called {name!r} already")
        others = sum(other != self.primary for other in self._members)
        if others >= self.limits.max_members - 1:
            raise CapacityError(f"the job has {self.limits.max_members} members already")
        self._members[name] = _Member(now)
        return self._ask_state()

    def state_given(self, step: int, now: float) -> list[Action]:
        """The primary has told its state at the start of `step`, whole."""
        asked, self._asked_state = self._asked_state, None
        if asked is None or self.closed:
            return []
        actions: list[Action] = []
        if step < self.step and not all(s in self._totals for s in range(step, self.step)):
            return self._wait_no_more(now)
        for name, member in self._members.items():
            if member.at is None:
                member.at = member.verified = step
                member.heard_s = max(member.heard_s, now)
                actions.append(Told(name, TakeState(step)))
                actions += [Told(name, Apply(s)) for s in sorted(self._totals) if s >= step]
        return actions + self._dispatch(now)

    def leave(self, name: str, now: float) -> list[Action]:
        """A member goes. What it sealed counts; what it holds runs elsewhere. The primary's going ends the job's steps."""
        return self._remove(name, now, None)

    def lost(self, name: str, now: float) -> list[Action]:
        """A member is gone without a word."""
        return self._remove(name, now, Dismiss("nothing was heard of this member any more", True))

    def dismiss(self, name: str, reason: str, now: float, *, fault: bool = True) -> list[Action]:
        """Sends a member away."""
        return self._remove(name, now, Dismiss(reason, fault))

    def close(self, reason: str) -> list[Action]:
        """The job's steps end: every member is sent away without fault."""
        self.closed = True
        actions: list[Action] = [Told(name, Dismiss(reason, False)) for name in self._members]
        actions += [Discard(seal.key) for seal in self._seals]
        actions += [Forget(step) for step in sorted(self._totals)]
        self._members.clear()
        self._seals.clear()
        self._totals.clear()
        return actions

    # --- a step ---

    def pull(self, name: str, step: int, num_ids: int, now: float) -> list[Action]:
        """A member at `step` has room for one more micro-batch. num_ids: how many the step has."""
        member = self._hear(name, now)
        if member is None or step < self.step:
            return []
        member.begun, member.num_ids, member.wants, member.since_s = step, num_ids, True, now
        return self._dispatch(now)

    def accepts(self, name: str, step: int, round: int, ids: Iterable[int]) -> bool:
        """Whether a seal would count."""
        member, sealed = self._members.get(name), tuple(ids)
        return (
            member is not None and not self.closed and step == self.step and round >= member.valid_round
            and 0 < len(sealed) == len(set(sealed)) and all(id in member.holds for id in sealed)
        )

    def progressed(self, name: str, now: float) -> None:
        """A member's seal is on its way."""
        member = self._hear(name, now)
        if member is not None:
            member.since_s = now

    def seal(
        self, name: str, step: int, round: int, ids: Iterable[int], key: int, now: float
    ) -> tuple[bool, list[Action]]:
        """A member's sum over `ids` is there, whole. key: the caller's number for it. Returns whether it counts; one that does
        not is the caller's to forget."""
        member, sealed = self._hear(name, now), tuple(ids)
        if member is None or not self.accepts(name, step, round, sealed):
            return False, []
        taken = [member.holds.pop(id) for id in sealed]
        each = (now - min(taken)) / len(sealed)
        self._typical_s = each if self._typical_s is None else 0.7 * self._typical_s + 0.3 * each
        member.sealing = False
        member.since_s = now
        self._seals.append(_Seal(name, sealed, key))
        return True, self._complete()

    def give_back(self, name: str, step: int, now: float) -> list[Action]:
        """A member can't run what it holds just now, as it ran out of memory. It may pull again."""
        member = self._hear(name, now)
        if member is None or step != self.step:
            return []
        self._revoke(member)
        return self._dispatch(now)

    def total_made(self, step: int, now: float) -> list[Action]:
        """The total that MakeTotal asked for is there."""
        if self.closed or step != self.step or not self._making:
            return []
        self._making, self._made = False, True
        self._totals.add(step)
        self._seals.clear()
        return [Told(name, Apply(step)) for name, member in self._members.items() if member.at is not None]

    def applied(self, name: str, step: int, now: float) -> list[Action]:
        """A member's adapter is that of the start of `step` + 1."""
        member = self._hear(name, now)
        if member is None or member.at != step:
            return []
        member.at = step + 1
        if name == self.primary:
            self._next_step(now)
        member.caught_up = member.caught_up or self.step - member.at <= self.limits.max_totals
        return self._trim(now) + self._dispatch(now)

    def digest(self, name: str, step: int, digest: str, now: float) -> list[Action]:
        """The digest of a member's adapter after `step`."""
        if self._hear(name, now) is None:
            return []
        told = self._digests.setdefault(step, {})
        told[name] = digest
        own = told.get(self.primary)
        if own is None:
            return []
        actions: list[Action] = []
        for other, found in list(told.items()):
            member = self._members.get(other)
            if member is None:
                continue
            if found == own:
                member.verified = max(member.verified, step + 1)
                continue
            actions += self.dismiss(other, f"{DIFFERS} after step {step + 1} ({found} and {own})", now)
        return actions + self._complete()

    # --- time ---

    def heard(self, name: str, now: float) -> None:
        """A member is alive."""
        self._hear(name, now)

    def tick(self, now: float) -> list[Action]:
        """Looks for lost and late members."""
        actions: list[Action] = []
        for name in [n for n, m in self._members.items() if now - m.heard_s > self.limits.lost_s]:
            actions += self.lost(name, now)
        if self.closed:
            return actions
        for member, name in [(m, n) for n, m in self._members.items() if m.holds and self._is_late(n, m, now)]:
            self._revoke(member)
            actions.append(Told(name, DropAll(self.step, self.round)))
        return actions + self._dispatch(now)

    def _is_late(self, name: str, member: _Member, now: float) -> bool:
        """Whether others have nothing to do but wait for what a member holds."""
        waits = any(
            not other.holds and other.wants and other.begun == self.step for n, other in self._members.items() if n != name
        )
        if self._free or not waits:
            return False
        limits = self.limits
        most = limits.unknown_s if self._typical_s is None else limits.slow * self._typical_s * len(member.holds)
        return now - member.since_s > max(limits.late_s, most)

    # --- inside ---

    def _hear(self, name: str, now: float) -> _Member | None:
        member = self._members.get(name)
        if member is not None:
            member.heard_s = max(member.heard_s, now)
        return member

    def _ask_state(self) -> list[Action]:
        """Asks the primary for its state if somebody waits for one, once."""
        waits = any(member.at is None for member in self._members.values())
        if self.step < 0 or not waits or self._asked_state is not None:
            return []
        self._asked_state = self.step
        return [Told(self.primary, GiveState())]

    def _wait_no_more(self, now: float) -> list[Action]:
        """The state took so long that totals since are gone, as the next one would: those that wait for it are sent away."""
        actions: list[Action] = []
        for name in [n for n, m in self._members.items() if m.at is None]:
            reason = f"the primary's state took more than {self.limits.max_joining} steps to be told"
            actions += self.dismiss(name, reason, now, fault=False)
        return actions + self._trim(now)

    def _dispatch(self, now: float) -> list[Action]:
        """Gives free ids to those that want one, those with fewest first; where none is free, asks for seals."""
        actions = self._count_ids(now)
        if self.closed or self._num_ids is None or self._making or self._made:
            return actions
        wanting = [(n, m) for n, m in self._members.items() if m.wants and m.begun == self.step and m.at == self.step]
        for name, member in sorted(wanting, key=lambda item: len(item[1].holds)):
            if self._free:
                id = self._free.pop(0)
                member.wants = member.sealing = False
                member.holds[id] = member.since_s = now
                actions.append(Told(name, Take(self.step, self.round, id)))
            elif member.holds and not member.sealing:
                member.sealing = True
                actions.append(Told(name, SealNow(self.step, self.round)))
        return actions

    def _complete(self) -> list[Action]:
        """Asks for the total once every id is sealed by members whose adapters are known to be equal."""
        if self.closed or self._making or self._made or self._num_ids is None:
            return []
        if sum(len(seal.ids) for seal in self._seals) < self._num_ids:
            return []
        if not all(self._is_verified(seal.member) for seal in self._seals):
            return []
        self._making = True
        ordered = sorted(self._seals, key=lambda seal: min(seal.ids))
        return [MakeTotal(self.step, tuple(seal.key for seal in ordered))]

    def _is_verified(self, name: str) -> bool:
        """Whether a seal's member is known to have worked with the primary's adapter."""
        member = self._members.get(name)
        return member is not None and member.verified >= self.step

    def _revoke(self, member: _Member) -> None:
        """What a member holds is free again, in a new round."""
        for id in member.holds:
            insort(self._free, id)
        member.holds.clear()
        member.wants = member.sealing = False
        self.round += 1
        member.valid_round = self.round

    def _remove(self, name: str, now: float, word: Dismiss | None) -> list[Action]:
        member = self._members.pop(name, None)
        if member is None:
            return []
        actions: list[Action] = [] if word is None else [Told(name, word)]
        if name == self.primary:
            return actions + self.close("the job's primary has gone")
        if member.holds:
            self._revoke(member)
        if member.verified < self.step and not self._making and not self._made:  # nobody knows with which adapter it worked
            for seal in [seal for seal in self._seals if seal.member == name]:
                self._seals.remove(seal)
                for id in seal.ids:
                    insort(self._free, id)
                self.round += 1
                actions.append(Discard(seal.key))
        elif not self._making:
            self._seals = [seal._replace(member=self.primary) if seal.member == name else seal for seal in self._seals]
        return actions + self._trim(now) + self._dispatch(now) + self._complete()

    def _next_step(self, now: float) -> None:
        self.step += 1
        self.round = 0
        self._num_ids, self._free, self._made = None, [], False
        for member in self._members.values():
            member.holds.clear()
            member.sealing = False
            member.valid_round = 0
            member.wants = member.wants and member.begun == self.step
            member.since_s = now
        for step in [s for s in self._digests if s < self.step - self.limits.max_joining]:
            del self._digests[step]

    def _trim(self, now: float) -> list[Action]:
        """Forgets totals that everybody has applied. Sends those away that lag too far behind."""
        actions: list[Action] = []
        for name, member in list(self._members.items()):
            most = self.limits.max_totals if member.caught_up else self.limits.max_joining
            if member.at is not None and self.step - member.at > most:
                actions += self.dismiss(name, f"this member is more than {most} steps behind", now, fault=False)
        if self.closed:
            return actions
        least = min([self.step, *(m.at for m in self._members.values() if m.at is not None)])
        if self._asked_state is not None:
            least = min(least, max(self._asked_state, self.step - self.limits.max_joining))
        for step in sorted(s for s in self._totals if s < least):
            self._totals.remove(step)
            actions.append(Forget(step))
        return actions

    def _count_ids(self, now: float) -> list[Action]:
        """Takes the number of the step's micro-batches from the first member that begins it. Who counts others is sent away."""
        actions: list[Action] = []
        for name, member in list(self._members.items()):
            if self.closed or member.begun != self.step:
                continue
            if self._num_ids is None:
                self._num_ids, self._free = member.num_ids, list(range(member.num_ids))
            elif member.num_ids != self._num_ids:
                counts = f"this member counts {member.num_ids} micro-batches in step {self.step + 1}, another {self._num_ids}"
                actions += self.dismiss(name, counts, now)
        return actions
