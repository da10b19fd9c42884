"""Named adapters and their versions: immutable, counted by the requests that use them.

A request takes the newest version and keeps it to its end, preemption included. An older version goes when its last request
ends; a removed name goes at once from the list, and its last version with its last request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from coserve.core import CapacityError, InvalidRequest, NotFound
from coserve.peft.adapter import Adapter
from coserve.runtime.adapters import AdapterSlots


class AdapterVersion(NamedTuple):
    """Names a version for good: numbers are never used twice, by whatever name."""

    name: str
    number: int


@dataclass(slots=True)
class _Held:
    adapter: Adapter
    users: int = 0


class AdapterRegistry:
    """forget(version): called when a version is gone, so that nothing cached under it can be matched."""

    def __init__(self, slots: AdapterSlots, forget: Callable[[AdapterVersion], None]) -> None:
        self.slots, self._forget = slots, forget
        self._newest: dict[str, AdapterVersion] = {}
        self._held: dict[AdapterVersion, _Held] = {}
        self._numbers = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._newest)

    @property
    def num_versions(self) -> int:
        return len(self._held)

    @property
    def num_users(self) -> int:
        return sum(held.users for held in self._held.values())

    def publish(self, name: str, adapter: Adapter) -> AdapterVersion:
        """A new version of a name. `adapter` must not change any more. Raises InvalidRequest for a bad name or rank."""
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
        self._held[version] = _Held(adapter)
        if previous is not None:
            self._drop_unused(previous)
        return version

    def remove(self, name: str) -> None:
        """Requests can't ask for it any more. Raises NotFound."""
        version = self._newest.pop(name, None)
        if version is None:
            raise NotFound(f"adapter: there is no {name!r}; loaded: {', '.join(self.names) or 'none'}", param="adapter")
        self._drop_unused(version)

    def get(self, name: str) -> Adapter:
        """The newest version's adapter. Raises NotFound."""
        return self._held[self._find(name)].adapter

    def adapter(self, version: AdapterVersion) -> Adapter:
        """A version's adapter, while it is in use."""
        return self._held[version].adapter

    def acquire(self, name: str) -> tuple[AdapterVersion, int]:
        """The newest version, in use once more, and its slot. Raises NotFound, CapacityError."""
        version = self._find(name)
        held = self._held[version]
        try:
            slot = self.slots.place(version, held.adapter)
        except CapacityError:
            if not self._evict():
                raise
            slot = self.slots.place(version, held.adapter)
        held.users += 1
        return version, slot

    def release(self, version: AdapterVersion) -> None:
        """A request that used the version ended."""
        self._held[version].users -= 1
        self._drop_unused(version)

    def _find(self, name: str) -> AdapterVersion:
        if name not in self._newest:
            raise NotFound(f"adapter: there is no {name!r}; loaded: {', '.join(self.names) or 'none'}", param="adapter")
        return self._newest[name]

    def _evict(self) -> bool:
        """Frees the slot of a version without users; False if there is none."""
        for key in self.slots.keys:
            if isinstance(key, AdapterVersion) and not self._held[key].users:
                self.slots.remove(key)
                return True
        return False

    def _drop_unused(self, version: AdapterVersion) -> None:
        if self._held[version].users or self._newest.get(version.name) == version:
            return
        del self._held[version]
        if version in self.slots.keys:
            self.slots.remove(version)
        self._forget(version)
