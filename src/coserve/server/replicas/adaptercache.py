"""Which versions of adapters the local engine holds. A version is fetched and loaded when a request first asks for it.

    ensure(ref) --> artifacts.hold: a copy on this machine --> engine.load_adapter, which reads the copy when it needs it

The engine has a version in memory only while it has a slot, and reads the copy again for the next one. So the copy is held
until the engine has no use for it, which it tells whenever it loads or unloads. When the names that the engine knows become too
many, or their files too large, the least recently used ones are unloaded; requests that use them go on to their end. One that
was asked for in the last minute stays, since its request may not have begun yet.

Owns: what is loaded under which name, in this generation of the engine. Does not own: the copies (artifacts.py), slots and
users (engine/adapters.py), which version a request gets (models.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coserve.core import CoserveError, InvalidRequest, NotFound
from coserve.server.index.disk import directory_bytes
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.messages import AdapterRef
from coserve.server.replicas.artifacts import ArtifactStore

MAX_LOADED = 4096
"""The most names that the engine knows, by default."""
_KEPT_S = 60.0
"""Seconds after it was last asked for during which a version is not unloaded: a grammar may take long to compile."""
_FETCHERS = 16
"""Adapters that are fetched at once, in threads of their own: a store that hangs holds up nothing else."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Loaded:
    """What the engine knows under a name. generation: that engine's. copy: holds the files. num_bytes: of them. used_s: when it
    was last asked for, by the monotonic clock."""

    ref: AdapterRef
    generation: int
    directory: str
    num_bytes: int
    copy: AbstractContextManager[object]
    used_s: float


class AdapterCache:
    """The adapters of one engine. Belongs to one event loop."""

    def __init__(
        self, engine: EngineClient, artifacts: ArtifactStore, *, max_bytes: int | None = None, max_loaded: int = MAX_LOADED,
        kept_s: float = _KEPT_S,
    ) -> None:
        """max_bytes: of the files of all versions that the engine may read; None: half of the cache that they lie in. kept_s:
        how long a version stays after it was last asked for."""
        self._engine, self._artifacts = engine, artifacts
        self._max_bytes = artifacts.cache.max_bytes // 2 if max_bytes is None else max_bytes
        self._max_loaded, self._kept_s = max_loaded, kept_s
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        """By the engine's names, the least recently used first."""
        self._leaving: dict[str, _Loaded] = {}
        """By directory: what was unloaded, and may still be read for requests that use it."""
        self._fetchers = ThreadPoolExecutor(_FETCHERS, "coserve-fetch")
        self._changes: dict[str, asyncio.Task[None]] = {}
        """By name, what is being loaded or unloaded: the engine may do two calls in any order."""

    @property
    def names(self) -> tuple[str, ...]:
        """The engine's names of what it holds, the least recently used first."""
        return tuple(name for name, loaded in self._loaded.items() if loaded.generation == self._engine.generation)

    async def ensure(self, ref: AdapterRef) -> None:
        """The engine knows ref.name when this returns, and until the caller next awaits something: send the request before.

        Raises NotFound and InvalidRequest where the version can't be had or used, StorageRefused, EngineUnavailable.
        """
        if not ref.uri:
            return
        while not self._is_loaded(ref):  # an engine may die while it loads
            change = self._changes.get(ref.name) or self._begin(ref.name, self._load(ref))
            await asyncio.shield(change)  # it is nobody's own, since whoever asked first may go away

    async def close(self) -> None:
        """Lets go of all copies, once the engine has ended."""
        while self._changes:
            await asyncio.wait(self._changes.values())
        for loaded in (*self._loaded.values(), *self._leaving.values()):
            _release(loaded)
        self._loaded.clear()
        self._leaving.clear()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    def _begin(self, name: str, change: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await change
            finally:
                del self._changes[name]

        task = self._changes[name] = asyncio.create_task(run())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waits raises it, if anybody does
        return task

    def _is_loaded(self, ref: AdapterRef) -> bool:
        loaded = self._loaded.get(ref.name)
        if loaded is None or loaded.generation != self._engine.generation:
            return False
        if (loaded.ref.sha256 or loaded.ref.uri) != (ref.sha256 or ref.uri):
            return False
        loaded.used_s = time.monotonic()
        self._loaded.move_to_end(ref.name)
        return True

    async def _load(self, ref: AdapterRef) -> None:
        generation = self._engine.generation
        copy = ExitStack()
        try:
            loop = asyncio.get_running_loop()
            directory = await loop.run_in_executor(self._fetchers, self._open_copy, copy, ref)
            num_bytes = await loop.run_in_executor(self._fetchers, directory_bytes, str(directory))
            read = await self._engine.load_adapter(ref.name, str(directory))
        except BaseException as error:
            copy.close()
            if isinstance(error, InvalidRequest | NotFound):
                _log.warning("adapter %s can't be loaded: %s", ref.name, error)
                reason = str(error).removeprefix("adapter: ")
                raise type(error)(f"model: {_shown(ref)} can't be loaded: {reason}", param="model") from error
            raise
        previous = self._loaded.pop(ref.name, None)
        if previous is not None:
            self._leaving_with(previous)
        self._loaded[ref.name] = _Loaded(ref, generation, str(directory), num_bytes, copy, time.monotonic())
        self._let_go(read)
        self._unload_least_used()

    def _open_copy(self, copy: ExitStack, ref: AdapterRef) -> Path:
        return copy.enter_context(self._artifacts.hold(ref.uri, ref.sha256))

    def _unload_least_used(self) -> None:
        """Begins to unload versions until what the engine knows is within its limits, or all of it was used just now."""
        total, limit = sum(loaded.num_bytes for loaded in self._loaded.values()), time.monotonic() - self._kept_s
        for name, loaded in list(self._loaded.items())[:-1]:
            if loaded.used_s > limit or (len(self._loaded) <= self._max_loaded and total <= self._max_bytes):
                return
            if name not in self._changes:
                total -= loaded.num_bytes
                self._leaving_with(self._loaded.pop(name))
                self._begin(name, self._unload(name))

    async def _unload(self, name: str) -> None:
        with contextlib.suppress(CoserveError):  # the engine has just died, and knows nothing then
            self._let_go(await self._engine.unload_adapter(name))

    def _leaving_with(self, loaded: _Loaded) -> None:
        other = self._leaving.pop(loaded.directory, None)
        if other is not None:  # two names of the same files
            _release(other)
        self._leaving[loaded.directory] = loaded

    def _let_go(self, read: list[str]) -> None:
        """Releases copies of what was unloaded, except those that the engine may still read, and of what an earlier engine
        knew."""
        for name, loaded in list(self._loaded.items()):
            if loaded.generation != self._engine.generation:
                del self._loaded[name]
                _release(loaded)
        for directory, loaded in list(self._leaving.items()):
            if directory not in read or loaded.generation != self._engine.generation:
                del self._leaving[directory]
                _release(loaded)


def _release(loaded: _Loaded) -> None:
    loaded.copy.__exit__(None, None, None)


def _shown(ref: AdapterRef) -> str:
    """A version's model name: the engine's name without the tenant and the digest."""
    return ref.name.partition("/")[2].rpartition("@")[0] or ref.name
