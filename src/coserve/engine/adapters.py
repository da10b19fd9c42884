"""Named adapters and their versions. A version never changes; the requests that use it are counted.

    publish --> on disk (directory) or in memory (a job's)    acquire: a request gets a version      claim: it runs, in a slot
                          |  loader's thread, one after another                                             |
                          +--> staged --> a free slot, or that of the least recently used idle version <----+

A request takes the newest version and keeps it to its end, even if it is preempted. An older version is deleted when its last
request ends. A removed name leaves the list at once; its newest version is deleted when its last request ends.

At most `max_slots` versions have slots. A version without one waits: tenants take turns, and a tenant's versions wait in order
of arrival. While a version waits and no slot can be freed, the version that has had its slot longest is closing: it takes no
new requests, so the wait ends with requests that run already. Requests that it turns away wait like the others. A version with
a directory is in memory only in its slot, or as one of at most _MAX_STAGED read ahead. Requests on the base need no slot.

Owns: versions, which have a slot. Does not own: a slot's tensors (runtime/adapters.py), which request runs next (scheduler/).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from coserve.core import CapacityError, CoserveError, InvalidRequest, NotFound
from coserve.engine.threads import SideThreads
from coserve.peft.adapter import Adapter
from coserve.runtime.adapters import AdapterSlots

_MAX_STAGED = 2
"""The most adapters that are being read, or have been read and wait for a slot."""
_FIRST_LOAD_S = 0.1
"""What reading an adapter counts as taking until one has been read, in seconds."""
_LOAD_STEP = 0.2
"""One read moves the mean by this share of their difference."""


class AdapterVersion(NamedTuple):
    """Identifies a version. A number is never used twice, not even under another name."""

    name: str
    number: int


@dataclass(slots=True)
class _Held:
    """A version. adapter: its values; None if they are only in its slot or on disk. directory: where they can be read again.
    end_token_ids: tokens that it was taught to end with. users: the number of requests that use it. running: how many of those
    have claimed its slot. fresh: the request that its slot is meant for has not run yet, so the slot must not be taken away.
    loading: its files are being read. used: the time of its last claim or placement, as a count that rises with each."""

    adapter: Adapter | None
    directory: Path | None
    end_token_ids: tuple[int, ...] = ()
    users: int = 0
    running: int = 0
    fresh: bool = False
    loading: bool = False
    used: int = 0


def _nobody(*_: object) -> None:
    """The listener until a real one is set."""


class AdapterRegistry:
    """An engine's adapter versions. Methods are for the engine's thread unless they say otherwise. forget(version): called when
    a version is deleted. load(directory): reads an adapter, in the loader's thread. post(command): runs a command in the
    engine's thread. wake(version): called when requests that waited for a version may claim again. fail(version, error): called
    when a version can't be read; its requests must then end."""

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
        """Versions that requests wait for -> the tenant that asked first; in order of asking."""
        self._granted: dict[str, int] = {}
        self._closing: AdapterVersion | None = None
        self._numbers = self._uses = 0
        self._loader = SideThreads(1, "coserve-adapters")
        self.load_s = _FIRST_LOAD_S
        """What reading an adapter's files takes, as a moving mean in seconds."""

    # --- names ---

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._newest)

    @property
    def num_versions(self) -> int:
        return len(self._held)

    @property
    def num_resident(self) -> int:
        """Adapters in memory: in slots, staged, or published from memory and not stored in a directory yet. Thread-safe."""
        return sum(held.adapter is not None or version in self.slots for version, held in list(self._held.items()))

    @property
    def resident(self) -> list[str]:
        """Names whose newest version has a slot. Thread-safe."""
        return [version.name for version in self._versions() if self._newest.get(version.name) == version]

    @property
    def num_waiting(self) -> int:
        """The number of versions that requests wait for."""
        return len(self._waiting)

    @property
    def directories(self) -> list[str]:
        """Directories that versions may still be read from. Thread-safe."""
        return [str(held.directory) for held in list(self._held.values()) if held.directory is not None]

    def publish(self, name: str, adapter: Adapter, directory: Path | None = None) -> AdapterVersion:
        """Adds a version and makes it the newest of its name. `adapter` must not change afterwards. With a `directory`, whose
        files must not change either, it is in memory only while it has a slot. Raises InvalidRequest for a bad name or rank."""
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
                with contextlib.suppress(CapacityError):  # of the device's memory; it is placed when a request needs it
                    self._place(version)
            held.adapter = None
        return version

    def note_load(self, seconds: float) -> None:
        """An adapter's files were read. Thread-safe."""
        self.load_s += _LOAD_STEP * (seconds - self.load_s)

    def store(self, name: str, adapter: Adapter, directory: Path) -> None:
        """Tells that an adapter published from memory now lies in `directory`, so it need not stay in memory."""
        for version, held in self._held.items():
            if version.name == name and held.adapter is adapter:
                held.directory, held.adapter = directory, None
                self.advance()
                return

    def remove(self, name: str) -> None:
        """Removes a name. New requests can't use it; running ones keep their version. Raises NotFound."""
        version = self.find(name)
        del self._newest[name]
        self._drop_unused(version)

    def find(self, name: str) -> AdapterVersion:
        """The newest version of a name. Thread-safe. Raises NotFound."""
        version = self._newest.get(name)
        if version is None:
            raise NotFound(f"adapter: there is no {name!r}; loaded: {', '.join(self.names) or 'none'}", param="adapter")
        return version

    def get(self, name: str) -> Adapter:
        """The newest version's adapter, read from its directory if it isn't in memory. Raises NotFound, InvalidRequest."""
        held = self._held[self.find(name)]
        if held.adapter is not None:
            return held.adapter
        assert held.directory is not None
        return self._load(held.directory)

    def end_token_ids(self, version: AdapterVersion) -> tuple[int, ...]:
        """Tokens that end the version's answers, in addition to the base model's."""
        return self._held[version].end_token_ids

    # --- requests ---

    def acquire(self, name: str) -> AdapterVersion:
        """The newest version of a name, for one more request. Raises NotFound."""
        version = self.find(name)
        self._held[version].users += 1
        return version

    def release(self, version: AdapterVersion) -> None:
        """Ends a request's use of a version. A version that is not the newest is deleted with its last use."""
        held = self._held[version]
        held.users -= 1
        if not held.users:
            held.fresh = False
            self._waiting.pop(version, None)
            if held.directory is not None:
                held.adapter = None  # it may have been read ahead for that request
        self._drop_unused(version)
        self.advance()

    def claim(self, version: AdapterVersion, tenant: str = "") -> int | None:
        """The slot in which a request of the version may run now. None if there is none; `wake` tells when to ask again."""
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
        """A request stops running: it ended or was preempted. has_run: False if it claimed the slot but could not begin."""
        held = self._held[version]
        held.running -= 1
        held.fresh = not has_run
        self.advance()

    # --- slots ---

    def advance(self) -> None:
        """Gives slots to the versions that wait. If none is free or idle, the version that has had its slot longest closes."""
        order = sorted(self._waiting, key=lambda v: self._granted.get(self._waiting[v], 0))  # a stable sort keeps their order
        self._closing = None
        for version in [version for version in order if version not in self.slots]:
            held = self._held[version]
            if not self._has_room():
                self._closing = next((key for key in self._versions() if self._held[key].running), None)
                break
            if held.adapter is not None:
                try:
                    self._place(version)
                    held.fresh = True
                except CapacityError as error:  # the device's memory is full: this version's requests end, and no others
                    del self._waiting[version]
                    self._post(functools.partial(self.fail, version, error))
            elif not held.loading and self._num_staged < _MAX_STAGED:
                held.loading = True
                self._loader.submit(self._read, version, held.directory)
        for version in order:
            if self._is_open(version):
                self._granted[self._waiting.pop(version)] = self._uses
                self.wake(version)

    def close(self) -> None:
        """Waits for the read under way, cancels the others, and drops the listeners."""
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
        """Versions with slots, the one that got its slot first at the front."""
        return [key for key in self.slots.keys if isinstance(key, AdapterVersion)]

    def _idle(self) -> AdapterVersion | None:
        """The version whose slot may be taken: the least recently used of those without running requests."""
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
        """Reads a version's files. Runs in the loader's thread."""
        assert directory is not None, "what isn't in memory lies in a directory"
        adapter: Adapter | None = None
        error: CoserveError | None = None
        began = time.perf_counter()
        try:
            adapter = self._load(directory)
            self.note_load(time.perf_counter() - began)
        except CoserveError as caught:
            error = caught
        except Exception as caught:  # out of memory, or a failing disk: the version's requests must end with an error
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

    def _drop_unused(self, version: AdapterVersion) -> None:
        if self._held[version].users or self._newest.get(version.name) == version:
            return
        del self._held[version]
        self._waiting.pop(version, None)
        if version in self.slots:
            self.slots.remove(version)
        self._forget(version)
