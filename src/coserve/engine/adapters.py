"""Named adapters and their versions: immutable, counted by the requests that use them, in memory as far as they have slots.

    publish --> on disk (directory) or in memory (a job's)    acquire: a request gets a version      claim: it runs, in a slot
                          |  loader's thread, one after another                                             |
                          +--> staged --> a slot: free, or of the idle version used longest ago <-----------+

A request takes the newest version and keeps it to its end, preemption included. An older version goes when its last request
ends; a removed name goes at once from the list, and its last version with its last request.

At most `max_slots` versions have slots. Whoever finds none waits: tenants in turn, in order of arrival within a tenant. While
somebody waits, the version that has had its slot longest takes no further requests (it is closing), so that the wait is bounded
by requests that run already; those it turns away wait for a slot like the others. A version with a directory has no other
memory than its slot; at most _MAX_STAGED are read ahead. Base requests have nothing to do with any of this.

Owns: versions, who has a slot. Does not own: what lies in slots (runtime/adapters.py), which request runs next (scheduler/).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.engine.threads import SideThreads
from coserve.peft.adapter import Adapter
from coserve.runtime.adapters import AdapterSlots

_MAX_STAGED = 2
"""Adapters that are being read, or are read and wait for their slot."""


class AdapterVersion(NamedTuple):
    """Names a version for good: numbers are never used twice, by whatever name."""

    name: str
    number: int


@dataclass(slots=True)
class _Held:
    """A version. adapter: its values; None where they are in its slot or only on disk. directory: where they can be read again.
    end_token_ids: tokens that it was taught to end with. users: requests that use it. running: those of them that have claimed
    its slot. fresh: it got its slot for requests that have not run yet. used: rises with every claim and placement."""

    adapter: Adapter | None
    directory: Path | None
    end_token_ids: tuple[int, ...] = ()
    users: int = 0
    running: int = 0
    fresh: bool = False
    loading: bool = False
    used: int = 0


def _nobody(*_: object) -> None:
    """Listens to nothing."""


class AdapterRegistry:
    """forget(version): called when a version is gone, so that nothing cached under it can be matched. load: reads a directory,
    in the loader's thread. post: has the engine's thread run something. wake(version): called when requests that waited for a
    version may claim again. fail(version, error): called when it can't be read, so that its requests must end. The engine's
    thread calls all methods, unless they say otherwise."""

    def __init__(
        self, slots: AdapterSlots, forget: Callable[[AdapterVersion], None], *, load: Callable[[Path], Adapter],
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        self.slots, self._forget, self._load, self._post = slots, forget, load, post
        self.wake: Callable[[AdapterVersion], None] = _nobody
        self.fail: Callable[[AdapterVersion, CoserveError], None] = _nobody
        self._newest: dict[str, AdapterVersion] = {}
        self._held: dict[AdapterVersion, _Held] = {}
        self._waiting: dict[AdapterVersion, str] = {}
        """Versions that requests wait for, with the tenant that asked first, in order of asking."""
        self._granted: dict[str, int] = {}
        self._closing: AdapterVersion | None = None
        self._numbers = self._uses = 0
        self._loader = SideThreads(1, "coserve-adapters")

    # --- names ---

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._newest)

    @property
    def num_versions(self) -> int:
        return len(self._held)

    @property
    def num_users(self) -> int:
        """Requests that use a version. Thread-safe."""
        return sum(held.users for held in list(self._held.values()))

    @property
    def num_resident(self) -> int:
        """Adapters in memory: in slots, staged, or nowhere else yet. Thread-safe."""
        return sum(held.adapter is not None or version in self.slots for version, held in list(self._held.items()))

    @property
    def num_waiting(self) -> int:
        """Versions that requests wait for."""
        return len(self._waiting)

    @property
    def directories(self) -> list[str]:
        """Where versions may still be read from. Thread-safe."""
        return [str(held.directory) for held in list(self._held.values()) if held.directory is not None]

    def publish(self, name: str, adapter: Adapter, directory: Path | None = None) -> AdapterVersion:
        """A new version of a name. `adapter` must not change any more; with a directory, which must not change either, it is
        kept in memory only while it has a slot. Raises InvalidRequest for a bad name or rank."""
        if not name:
            raise InvalidRequest("name: an adapter needs a name", param="name")
        if adapter.rank > self.slots.max_rank:
            raise InvalidRequest(
                f"adapter: {name} has rank {adapter.rank}, over max_lora_rank={self.slots.max_rank}; raise that",
                param="max_lora_rank",
            )
        self._numbers += 1
        version = AdapterVersion(name, self._numbers)
        previous = self._newest.get(name)
        self._newest[name] = version
        held = self._held[version] = _Held(adapter, directory, adapter.end_token_ids)
        if previous is not None:
            self._drop_unused(previous)
        if directory is not None:
            if not self._waiting and self._has_room():
                self._place(version)
            held.adapter = None
        return version

    def store(self, name: str, adapter: Adapter, directory: Path) -> None:
        """An adapter that was published from memory lies in a directory now: it need not stay in memory."""
        for version, held in self._held.items():
            if version.name == name and held.adapter is adapter:
                held.directory, held.adapter = directory, None
                self.advance()
                return

    def remove(self, name: str) -> None:
        """Requests can't ask for it any more. Raises NotFound."""
        version = self._newest.pop(name, None)
        if version is None:
            raise NotFound(f"adapter: there is no {name!r}; loaded: {', '.join(self.names) or 'none'}", param="adapter")
        self._drop_unused(version)

    def get(self, name: str) -> Adapter:
        """The newest version's adapter, read again where it isn't in memory. Raises NotFound, InvalidRequest."""
        held = self._held[self._find(name)]
        if held.adapter is not None:
            return held.adapter
        assert held.directory is not None
        return self._load(held.directory)

    def end_token_ids(self, version: AdapterVersion) -> tuple[int, ...]:
        """Tokens that end the version's answers beside the base's."""
        return self._held[version].end_token_ids

    # --- requests ---

    def acquire(self, name: str) -> AdapterVersion:
        """The newest version, in use once more. Raises NotFound."""
        version = self._find(name)
        self._held[version].users += 1
        return version

    def release(self, version: AdapterVersion) -> None:
        """A request that used the version ended."""
        held = self._held[version]
        held.users -= 1
        if not held.users:
            held.fresh = False
            self._waiting.pop(version, None)
            if held.directory is not None:
                held.adapter = None  # what was read ahead for it
        self._drop_unused(version)
        self.advance()

    def claim(self, version: AdapterVersion, tenant: str = "") -> int | None:
        """The slot in which a request of a version may run now, or None: `wake` says when to ask again."""
        if not self._is_open(version):
            if version not in self._waiting:
                self._waiting[version] = tenant
                self.advance()
            if not self._is_open(version):
                return None
        held = self._held[version]
        self._uses += 1
        held.running, held.fresh, held.used = held.running + 1, False, self._uses
        return self.slots.slot_of(version)

    def unclaim(self, version: AdapterVersion, *, has_run: bool) -> None:
        """A request does not run any more: it ended, lost its memory, or could not begin (has_run False)."""
        held = self._held[version]
        held.running -= 1
        held.fresh = not has_run
        self.advance()

    # --- slots ---

    def advance(self) -> None:
        """Gives slots to versions that wait, as far as there are any; where there are none, one closes."""
        order = sorted(self._waiting, key=lambda v: self._granted.get(self._waiting[v], 0))  # stable: then in order of asking
        self._closing = None
        for version in [version for version in order if version not in self.slots]:
            held = self._held[version]
            if not self._has_room():
                self._closing = next((key for key in self._versions() if self._held[key].running), None)
                break
            if held.adapter is not None:
                self._place(version)
                held.fresh = True
            elif not held.loading and self._num_staged < _MAX_STAGED:
                held.loading = True
                self._loader.submit(self._read, version, held.directory)
        for version in order:
            if self._is_open(version):
                self._granted[self._waiting.pop(version)] = self._uses
                self.wake(version)

    def close(self) -> None:
        """Waits for what is being read; reads nothing more, and knows its listeners no more."""
        self._loader.shutdown(cancel_futures=True)
        self.wake, self.fail = _nobody, _nobody

    def _is_open(self, version: AdapterVersion) -> bool:
        return version in self.slots and version != self._closing

    @property
    def _num_staged(self) -> int:
        return sum(
            held.loading or (held.adapter is not None and held.directory is not None and version not in self.slots)
            for version, held in self._held.items()
        )

    def _versions(self) -> list[AdapterVersion]:
        """Those with slots, the one that has had its slot longest first."""
        return [key for key in self.slots.keys if isinstance(key, AdapterVersion)]

    def _idle(self) -> AdapterVersion | None:
        """The version whose slot another may have: used longest ago among those that no request runs in."""
        idle = [v for v in self._versions() if not self._held[v].running and not self._held[v].fresh]
        return min(idle, key=lambda version: self._held[version].used, default=None)

    def _has_room(self) -> bool:
        return self.slots.has_free or self._idle() is not None

    def _place(self, version: AdapterVersion) -> None:
        held = self._held[version]
        assert held.adapter is not None
        if not self.slots.has_free:
            idle = self._idle()
            assert idle is not None
            self.slots.remove(idle)
        self.slots.place(version, held.adapter)
        self._uses += 1
        held.used = self._uses
        if held.directory is not None:
            held.adapter = None

    def _read(self, version: AdapterVersion, directory: Path | None) -> None:
        """In the loader's thread."""
        assert directory is not None, "what isn't in memory lies in a directory"
        adapter: Adapter | None = None
        error: CoserveError | None = None
        try:
            adapter = self._load(directory)
        except CoserveError as caught:
            error = caught
        except Exception as caught:  # out of memory, the disk fails: its requests must hear of it
            error = InvalidRequest(f"adapter: {version.name} can't be read ({type(caught).__name__})", param="adapter")
        with contextlib.suppress(CoserveError):  # the engine is closed
            self._post(lambda: self._has_read(version, adapter, error))

    def _has_read(self, version: AdapterVersion, adapter: Adapter | None, error: CoserveError | None) -> None:
        held = self._held.get(version)
        if held is not None:
            held.loading = False
            if error is not None:
                self._waiting.pop(version, None)
                self.fail(version, error)
            elif held.users and version in self._waiting:
                held.adapter = adapter
        self.advance()

    def _find(self, name: str) -> AdapterVersion:
        if name not in self._newest:
            raise NotFound(f"adapter: there is no {name!r}; loaded: {', '.join(self.names) or 'none'}", param="adapter")
        return self._newest[name]

    def _drop_unused(self, version: AdapterVersion) -> None:
        if self._held[version].users or self._newest.get(version.name) == version:
            return
        del self._held[version]
        self._waiting.pop(version, None)
        if version in self.slots:
            self.slots.remove(version)
        self._forget(version)
