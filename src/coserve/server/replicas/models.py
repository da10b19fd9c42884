"""The names of models at an ingress: whose they are, and which version of an adapter a request gets.

    name --> row of the index (tenant, name, digest, key) --> AdapterRef, which the engine's side fetches and loads

Rows are the only truth, and other ingresses and jobs write them too. A row is read again when it was read more than a second
ago; a name that isn't there is looked up each time. So a request that comes after a job has succeeded finds its model, and a
name's old version is served for a second at most. While the index is away, rows that were read in the last minutes still count.

Owns: what ModelRegistry (server/models.py) owns at a single server, but for the engine's part (adaptercache.py). Does not own:
how jobs make adapters, which adapters from outside may be loaded (adapterchecks.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from functools import partial
from pathlib import Path
from typing import NamedTuple

from coserve.core import ConfigError, CoserveError, InvalidRequest, NotFound
from coserve.server.adapterchecks import (
    MAX_NAME,
    adapter_below,
    check_adapter_name,
    check_adapter_room,
    check_replaceable,
    check_unloadable,
    no_such_model,
)
from coserve.server.errors import StorageRefused, TooLarge
from coserve.server.index.store import Store
from coserve.server.link.messages import AdapterRef
from coserve.server.locks import NameLocks
from coserve.server.models import SHARED, ServedModel, engine_name
from coserve.server.records import AdapterRecord, now
from coserve.server.replicas.artifacts import ArtifactStore, directory_digest
from coserve.server.settings import ServerConfig
from coserve.server.shelf import AdapterShelf, EngineFacts
from coserve.text.tokenizer import ChatTokenizer

FRESH_S = 1.0
"""Seconds for which a row that was read is not read again."""
_STALE_S = 300.0
"""Seconds for which a row still counts while the index is away."""
_PATIENCE_S = 1.0
"""Seconds for which the index may keep a request waiting whose row was known before."""
_DISCARD_S = 5.0
"""Seconds after which files that no row names any more are deleted: requests that were given them before have them by then."""
_MAX_ROWS = 100_000
_READERS = 4
_DIGEST_CHARS = 16
_log = logging.getLogger(__name__)


class _Read(NamedTuple):
    """A row. at_s: when reading it began, by the monotonic clock."""

    record: AdapterRecord
    at_s: float


class ReplicaModels:
    """All model names of a fleet of replicas. Methods that aren't coroutines are thread-safe."""

    def __init__(
        self, store: Store, engine: EngineFacts, config: ServerConfig, artifacts: ArtifactStore, scratch: Path,
        tokenizer: ChatTokenizer | None = None, *, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Checks the adapters of --lora-modules and makes their rows agree with it, once an engine is known. scratch: a
        directory of this process alone. Raises ConfigError that says what is wrong with an adapter, StorageRefused."""
        self._store, self._engine, self._config, self._artifacts = store, engine, config, artifacts
        self._shelf = AdapterShelf(scratch / "adapters", engine, config.max_lora_rank, tokenizer)
        self._started, self._clock = now(), clock
        self._rows: OrderedDict[tuple[str, str], _Read] = OrderedDict()
        self._reading: dict[tuple[str, str], tuple[Future[AdapterRecord], float]] = {}  # and when it began
        self._num_changes = 0
        self._lock = threading.RLock()
        self._readers = ThreadPoolExecutor(_READERS, "coserve-rows")
        self._locks = NameLocks()
        self._discarding: set[asyncio.Task[None]] = set()
        self._closing = asyncio.Event()
        self.held_bytes: Callable[[str], int] = self.copied_bytes
        """How many bytes of a tenant count for --max-tenant-file-bytes. The server counts its files and jobs too."""
        self._register_modules()

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base model; answers show the first one."""
        return self._config.served_model_name or (self._engine.info.model,)

    async def close(self) -> None:
        """Deletes what is to be deleted later, now."""
        self._closing.set()
        await asyncio.gather(*self._discarding)
        self._readers.shutdown(wait=False, cancel_futures=True)

    # --- names ---

    def find(self, tenant: str, name: str) -> ServedModel:
        """The model of a name. Raises NotFound, also for names of other tenants."""
        if name in self.base_names:
            return ServedModel(name=name, adapter=None, created=self._started)
        return _served(self.find_record(tenant, name))

    def find_record(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter's row: the tenant's own or a shared one. Raises NotFound."""
        known = self._known(tenant, name)
        if known is not None and self._clock() - known.at_s < FRESH_S:
            return known.record
        reading, wait_s = self._read(tenant, name)
        if known is None:
            return reading.result()
        try:
            return reading.result(wait_s)
        except (NotYet, StorageRefused):
            return known.record

    def list(self, tenant: str) -> Sequence[ServedModel]:
        """All models of a tenant: the base under each of its names, then adapters."""
        return [self.find(tenant, name) for name in self.base_names] + [
            _served(record) for record in self._store.list_adapters(tenant)
        ]

    async def prepare(self, tenant: str, name: str) -> ServedModel:
        """The model of a name, with the version that its row names now. Nothing is loaded. Raises NotFound, InvalidRequest,
        StorageRefused."""
        model = await self.resolve(tenant, name)
        if model.adapter is not None and not model.adapter.sha256:
            raise InvalidRequest(
                f"{name} was made by a server without replicas, which keeps its files to itself; load or train it again",
                param="model",
            )
        return model

    async def resolve(self, tenant: str, name: str) -> ServedModel:
        """As `find`, on the event loop."""
        return self.find(tenant, name) if name in self.base_names else _served(await self._find_record(tenant, name))

    async def _find_record(self, tenant: str, name: str) -> AdapterRecord:
        """As `find_record`, on the event loop."""
        known = self._known(tenant, name)
        if known is not None and self._clock() - known.at_s < FRESH_S:
            return known.record
        begun, wait_s = self._read(tenant, name)
        reading = asyncio.wrap_future(begun)
        reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        if known is None:
            return await asyncio.shield(reading)
        try:
            return await asyncio.wait_for(asyncio.shield(reading), wait_s)
        except (TimeoutError, StorageRefused):
            return known.record

    def _known(self, tenant: str, name: str) -> _Read | None:
        """What was read last, if that still counts while the index is away."""
        with self._lock:
            known = self._rows.get((tenant, name))
        return known if known is not None and self._clock() - known.at_s < _STALE_S else None

    def _read(self, tenant: str, name: str) -> tuple[Future[AdapterRecord], float]:
        """Reads a row, once for all that want it. The future raises NotFound and StorageRefused. With it, for how many seconds
        those may wait who know an older row: none if others have waited already."""
        if not name.isprintable() or len(name) > MAX_NAME:
            raise no_such_model(name)
        key = (tenant, name)
        with self._lock:
            now_s = self._clock()
            reading, began_s = self._reading.get(key, (None, now_s))
            if reading is None:
                reading = self._readers.submit(self._read_now, key, now_s, self._num_changes)
                self._reading[key] = reading, now_s
                reading.add_done_callback(partial(self._end_reading, key))
        return reading, max(0.0, began_s + _PATIENCE_S - now_s)

    def _read_now(self, key: tuple[str, str], at_s: float, num_changes: int) -> AdapterRecord:
        tenant, name = key
        record = self._store.find_adapter(tenant, name)
        with self._lock:
            if self._num_changes == num_changes:  # else what was read may be gone already
                self._rows.pop(key, None)
                if record is not None:
                    self._rows[key] = _Read(record, at_s)
                    while len(self._rows) > _MAX_ROWS:
                        self._rows.popitem(last=False)
        if record is None:
            raise no_such_model(name)
        return record

    def _end_reading(self, key: tuple[str, str], done: Future[AdapterRecord]) -> None:
        with self._lock:
            if key in self._reading and self._reading[key][0] is done:
                del self._reading[key]

    def forget(self, name: str) -> None:
        """A row of this name has changed: it is read again before it is used."""
        with self._lock:
            self._num_changes += 1
            for key in [key for key in self._rows if key[1] == name]:
                del self._rows[key]
            for key in [key for key in self._reading if key[1] == name]:
                del self._reading[key]

    # --- rows and files ---

    def find_files(self, record: AdapterRecord) -> AdapterRecord:
        """The same row, with the directory of a copy on this machine. Raises NotFound, StorageRefused."""
        try:
            directory = self._artifacts.fetch(record.directory, record.sha256)
        except (NotFound, InvalidRequest) as error:
            raise NotFound("model: the files of this adapter are gone or damaged", param="model") from error
        return dataclasses.replace(record, directory=str(directory))

    def add(self, record: AdapterRecord) -> None:
        """Serves a name from now on. record.directory: the key of its files."""
        self._store.put_adapter(record)
        self.forget(record.name)

    def remove(self, record: AdapterRecord) -> None:
        """Serves a name no longer. Its files stay (`discard`)."""
        with contextlib.suppress(NotFound):
            self._store.delete_adapter(record.tenant, record.name)
        self.forget(record.name)

    async def drop_loaded(self, tenant: str, name: str) -> None:
        """A name of the tenant's has changed. Engines unload what nobody asks for by themselves."""
        self.forget(name)

    def discard(self, *keys: str) -> None:
        """Deletes artifacts that no row names any more, a little later. Belongs to the event loop."""
        task = asyncio.get_running_loop().create_task(self._discard(keys))
        self._discarding.add(task)
        task.add_done_callback(self._discarding.discard)

    async def _discard(self, keys: Sequence[str]) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), _DISCARD_S)
        for key in keys:
            try:
                await asyncio.to_thread(self._artifacts.delete, key)
            except CoserveError as error:
                _log.warning("%s stays in the artifact store, although nothing names it any more: %s", key, error)

    def _register_modules(self) -> None:
        self._shelf.keep_only(())
        given, unused = dict(self._config.lora_modules), []
        known = {record.name: record for record in self._store.list_adapters(SHARED)}
        for name, record in known.items():
            if name not in given:
                self._store.delete_adapter(SHARED, name)
                unused.append(record.directory)
        for name, directory in given.items():
            try:
                admitted = self._shelf.admit(Path(directory))
            except (InvalidRequest, NotFound) as error:
                reason = str(error).removeprefix("adapter: ")
                raise ConfigError(f"lora_modules: {name}={directory}: {reason}", param="lora_modules") from error
            self._report(name, admitted.warnings)
            digest = directory_digest(Path(admitted.directory))
            key, before = f"modules/{digest}", known.get(name)
            if before is None or before.sha256 != digest or not self._artifacts.exists(key):
                stored = self._artifacts.put_directory(key, Path(admitted.directory))
                self._store.put_adapter(AdapterRecord(
                    name=name, tenant=SHARED, directory=key, created_at=self._started, sha256=stored.sha256, bytes=stored.bytes,
                ))
                unused += [] if before is None else [before.directory]
        self._shelf.keep_only(())
        named = self._store.adapter_directories()
        for key in unused:
            if key not in named and key.startswith("modules/"):
                self._artifacts.delete(key)

    def _report(self, name: str, warnings: Sequence[str]) -> None:
        for warning in warnings:
            _log.warning("adapter %s: %s", name, warning)

    # --- what /v1/load_lora_adapter and /v1/unload_lora_adapter do ---

    async def load(self, tenant: str, name: str, path: str, *, replace: bool = False) -> tuple[str, ...]:
        """Serves the adapter in a directory below --adapter-root. Returns warnings for its maker. Raises Forbidden,
        InvalidRequest, TooLarge, CapacityError.

        replace: whether an adapter of this name gets a new version; the old one stays if the new one can't be used.
        """
        directory = adapter_below(self._config.adapter_root, path)
        check_adapter_name(name, self.base_names)
        async with self._locks.hold(tenant):  # one after the other: each counts for the limits before the next is checked
            existing = await asyncio.to_thread(self._store.find_adapter, tenant, name)
            check_replaceable(existing, tenant, name, replace)
            try:
                admitted = await self._shelf.admit_soon(directory, partial(self._check_room, tenant, existing))
            except TooLarge:
                raise
            except (InvalidRequest, NotFound) as error:
                raise InvalidRequest(str(error), param="lora_path") from error
            self._report(name, admitted.warnings)
            try:
                await asyncio.to_thread(self._publish, tenant, name, Path(admitted.directory))
            finally:
                self._shelf.retire(admitted.directory, tenant)
                await asyncio.to_thread(self._shelf.sweep, ())
            if existing is not None:
                self.discard(existing.directory)
        return admitted.warnings

    def _publish(self, tenant: str, name: str, directory: Path) -> None:
        """Puts a checked adapter into the store, and then its row into the index."""
        stored = self._artifacts.put_directory(f"adapters/{uuid.uuid4().hex}", directory)
        try:
            self.add(AdapterRecord(
                name=name, tenant=tenant, directory=stored.key, created_at=now(), sha256=stored.sha256, bytes=stored.bytes,
            ))
        except InvalidRequest:
            self._artifacts.delete(stored.key)
            raise
        except CoserveError:  # the row may have been written before the connection broke
            _log.warning("artifact %s may be in the store without a row that names it", stored.key)
            raise

    async def unload(self, tenant: str, name: str) -> None:
        """Serves an adapter of `load` no longer. Raises NotFound, Forbidden."""
        async with self._locks.hold(tenant):
            record = await asyncio.to_thread(self._store.find_adapter, tenant, name)
            if record is None:
                raise NotFound(f"lora_name: there is no adapter {name[:64]!r}", param="lora_name")
            check_unloadable(record, tenant, name)
            await asyncio.to_thread(self.remove, record)
            self.discard(record.directory)

    def _loaded(self, tenant: str) -> Sequence[AdapterRecord]:
        """A tenant's adapters from outside."""
        return [record for record in self._store.list_adapters(tenant) if record.tenant == tenant and record.job is None]

    def copied_bytes(self, tenant: str) -> int:
        """How many bytes a tenant's adapters from outside take in the store. Those of --lora-modules count for nobody."""
        return sum(record.bytes for record in self._loaded(tenant))

    def _check_room(self, tenant: str, replaced: AdapterRecord | None, size: int) -> None:
        freed, num_others = (0, len(self._loaded(tenant))) if replaced is None else (replaced.bytes, 0)
        check_adapter_room(self._config, size, self.held_bytes(tenant) - freed, num_others)


def version_name(record: AdapterRecord) -> str:
    """The engines' name of an adapter's version: other files have another name."""
    return f"{engine_name(record.tenant, record.name)}@{record.sha256[:_DIGEST_CHARS]}"


def _served(record: AdapterRecord) -> ServedModel:
    adapter = AdapterRef(name=version_name(record), uri=record.directory, sha256=record.sha256)
    return ServedModel(name=record.name, adapter=adapter, created=record.created_at)
