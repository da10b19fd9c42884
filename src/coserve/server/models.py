"""Which model names there are, whose they are, and whether the engine holds the adapter of a name.

Owns: names of the base and of adapters, loading an adapter into the engine when it is first asked for. Does not own: how jobs
make adapters (jobs/service.py), adapters' rows (index/store.py), which adapters from outside may be loaded (adapterchecks.py),
their copies (shelf.py).

An adapter's name in the engine is TENANT/NAME, so that tenants can use the same names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote

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
from coserve.server.errors import TooLarge
from coserve.server.index.store import Store
from coserve.server.link.engineclient import EngineClient
from coserve.server.link.messages import AdapterRef
from coserve.server.locks import NameLocks
from coserve.server.records import AdapterRecord, now
from coserve.server.settings import ServerConfig
from coserve.server.shelf import AdapterShelf, Admitted
from coserve.text.tokenizer import ChatTokenizer

SHARED = ""
"""The tenant of the adapters of --lora-modules, which everybody may use."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that requests can ask for.

    name: what they ask for. adapter: its adapter in the engine; None: the base. created: Unix seconds.
    """

    name: str
    adapter: AdapterRef | None
    created: int


def engine_name(tenant: str, name: str) -> str:
    """The engine's name of a tenant's adapter. Different tenants' adapters have different ones."""
    return f"{quote(tenant, safe='')}/{name}"


def _served(record: AdapterRecord) -> ServedModel:
    adapter = AdapterRef(name=engine_name(record.tenant, record.name))
    return ServedModel(name=record.name, adapter=adapter, created=record.created_at)


class ModelRegistry:
    """All model names. Rows of the index are read once, since only this process writes them. Methods that aren't coroutines are
    thread-safe."""

    def __init__(
        self, store: Store, engine: EngineClient, config: ServerConfig, tokenizer: ChatTokenizer | None = None
    ) -> None:
        """Checks the adapters of --lora-modules, and makes their rows agree with it, once the engine has started. Raises
        ConfigError that says what is wrong with an adapter."""
        self._store, self._engine, self._config = store, engine, config
        self._shelf = AdapterShelf(config.data_dir / "adapters", engine, config.max_lora_rank, tokenizer)
        self._started = now()
        self._records: dict[tuple[str, str], AdapterRecord] = {}
        self._loaded: dict[str, tuple[int, str]] = {}
        self._locks = NameLocks()
        self._rows = threading.Lock()
        self._num_changes = 0
        self.held_bytes: Callable[[str], int] = self.copied_bytes
        """How many bytes of a tenant count for --max-tenant-file-bytes. The server counts its files and jobs too."""
        self._register_modules()

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names of the base model; answers show the first one. They are known once the engine has started."""
        return self._config.served_model_name or (self._engine.info.model,)

    # --- names ---

    def find(self, tenant: str, name: str) -> ServedModel:
        """The model of a name. Raises NotFound, also for names of other tenants."""
        if name in self.base_names:
            return ServedModel(name=name, adapter=None, created=self._started)
        return _served(self.find_record(tenant, name))

    async def resolve(self, tenant: str, name: str) -> ServedModel:
        """As `find`, on the event loop: it may have to look into the index."""
        return await asyncio.to_thread(self.find, tenant, name)

    def find_record(self, tenant: str, name: str) -> AdapterRecord:
        """The adapter's row: the tenant's own or a shared one. Raises NotFound."""
        record, before = self._records.get((tenant, name)), self._num_changes
        if record is None and name.isprintable() and len(name) <= MAX_NAME:
            record = self._store.find_adapter(tenant, name)
        if record is None:
            raise no_such_model(name)
        with self._rows:
            if self._num_changes == before:  # else the row that was read may be gone already
                self._records[tenant, name] = record
        return record

    def list(self, tenant: str) -> Sequence[ServedModel]:
        """All models of a tenant: the base under each of its names, then adapters."""
        return [self.find(tenant, name) for name in self.base_names] + [
            _served(record) for record in self._store.list_adapters(tenant)
        ]

    # --- the engine's side ---

    async def prepare(self, tenant: str, name: str) -> ServedModel:
        """The model of a name, once the engine holds its adapter. Raises NotFound, InvalidRequest, EngineUnavailable."""
        if name in self.base_names:
            return self.find(tenant, name)
        known = (tenant, name) in self._records
        record = self.find_record(tenant, name) if known else await asyncio.to_thread(self.find_record, tenant, name)
        adapter = engine_name(record.tenant, name)
        async with self._locks.hold(adapter):
            if self._records.get((tenant, name)) is not record:  # replaced or unloaded while this waited
                record = await asyncio.to_thread(self.find_record, tenant, name)
                adapter = engine_name(record.tenant, name)
            try:
                if not self._is_checked(record):  # a copy has to be made
                    record = await asyncio.to_thread(self.find_files, record)
                wanted = (self._engine.generation, record.directory)
                if self._loaded.get(adapter) != wanted:
                    await self._engine.load_adapter(adapter, record.directory)
                    self._loaded[adapter] = wanted
            except (InvalidRequest, NotFound) as error:
                self._forget_row(record)
                _log.warning("adapter %s can't be loaded: %s", adapter, error)
                raise InvalidRequest(
                    f"{name} can't be loaded: {str(error).removeprefix('adapter: ')}", param="model"
                ) from error
        return _served(record)

    def _is_checked(self, record: AdapterRecord) -> bool:
        return record.job is not None or self._shelf.holds(record.directory)

    def find_files(self, record: AdapterRecord) -> AdapterRecord:
        """The same row, of files that are checked: a job's own, or a copy on the shelf, which is made now if an older coserve
        made none. Raises NotFound, InvalidRequest, CapacityError."""
        if self._is_checked(record):
            return record
        admitted = self._shelf.admit(Path(record.directory))
        self._report(record.name, admitted)
        checked = dataclasses.replace(record, directory=admitted.directory)
        self.add(checked)
        return checked

    def _report(self, name: str, admitted: Admitted) -> None:
        for warning in admitted.warnings:
            _log.warning("adapter %s: %s", name, warning)

    def note_loaded(self, record: AdapterRecord, generation: int) -> None:
        """The engine has the adapter already, because a job has published it. generation: that engine's."""
        self._loaded[engine_name(record.tenant, record.name)] = (generation, record.directory)

    async def drop_loaded(self, tenant: str, name: str) -> None:
        """Unloads an adapter from the engine, if it is there. Requests that use it go on."""
        adapter = engine_name(tenant, name)
        self._loaded.pop(adapter, None)
        with contextlib.suppress(CoserveError):  # not there, or the engine has just died: gone either way
            held = await self._engine.unload_adapter(adapter) if self._engine.ready else []
            await asyncio.to_thread(self._shelf.sweep, held)

    # --- rows ---

    def add(self, record: AdapterRecord) -> None:
        """Serves a name from now on."""
        self._store.put_adapter(record)
        self._forget_row(record)

    def remove(self, record: AdapterRecord) -> None:
        """Serves a name no longer; `drop_loaded` unloads it from the engine."""
        with contextlib.suppress(NotFound):
            self._store.delete_adapter(record.tenant, record.name)
        self._forget_row(record)

    def _forget_row(self, record: AdapterRecord) -> None:
        with self._rows:
            self._num_changes += 1
            for key in [key for key, kept in self._records.items() if kept.name == record.name]:
                del self._records[key]

    def _register_modules(self) -> None:
        given = dict(self._config.lora_modules)
        for record in self._store.list_adapters(SHARED):
            if record.tenant == SHARED and record.name not in given:
                self._store.delete_adapter(SHARED, record.name)
        for name, directory in given.items():
            try:
                admitted = self._shelf.admit(Path(directory))
            except (InvalidRequest, NotFound) as error:
                reason = str(error).removeprefix("adapter: ")
                raise ConfigError(f"lora_modules: {name}={directory}: {reason}", param="lora_modules") from error
            self._report(name, admitted)
            self._store.put_adapter(
                AdapterRecord(name=name, tenant=SHARED, directory=admitted.directory, created_at=self._started)
            )
        self._shelf.keep_only(self._store.adapter_directories())

    # --- what /v1/load_lora_adapter and /v1/unload_lora_adapter do ---

    async def load(self, tenant: str, name: str, path: str, *, replace: bool = False) -> tuple[str, ...]:
        """Serves the adapter in a directory below --adapter-root. Returns warnings for its maker. Raises Forbidden,
        InvalidRequest, TooLarge, CapacityError.

        replace: whether an adapter of this name gets a new version; the old one stays if the new one can't be used.
        """
        directory = adapter_below(self._config.adapter_root, path)
        check_adapter_name(name, self.base_names)
        adapter = engine_name(tenant, name)
        # A tenant's adapters are loaded one after the other: each counts for its limits before the next is checked.
        async with self._locks.hold(engine_name(tenant, "")), self._locks.hold(adapter):
            existing = await asyncio.to_thread(self._find_loaded, tenant, name, replace)
            try:
                admitted = await self._shelf.admit_soon(directory, partial(self._check_room, tenant, existing))
            except TooLarge:
                raise
            except (InvalidRequest, NotFound) as error:
                raise InvalidRequest(str(error), param="lora_path") from error
            self._report(name, admitted)
            generation = self._engine.generation
            record = AdapterRecord(name=name, tenant=tenant, directory=admitted.directory, created_at=now())
            try:
                held = await self._engine.load_adapter(adapter, record.directory)
                await asyncio.to_thread(self.add, record)
            except BaseException as error:
                self._shelf.retire(record.directory, tenant)
                self._loaded.pop(adapter, None)  # the engine may have it all the same: the old one is loaded again
                if isinstance(error, InvalidRequest | NotFound):
                    raise InvalidRequest(str(error), param="lora_path") from error
                raise
            self.note_loaded(record, generation)
            if existing is not None:
                self._shelf.retire(existing.directory, tenant)
        await asyncio.to_thread(self._shelf.sweep, held)
        return admitted.warnings

    def _find_loaded(self, tenant: str, name: str, replace: bool) -> AdapterRecord | None:
        """The adapter that has the name already, if there is one. Raises InvalidRequest if it must not be replaced."""
        existing = self._store.find_adapter(tenant, name)
        check_replaceable(existing, tenant, name, replace)
        return existing

    async def unload(self, tenant: str, name: str) -> None:
        """Serves an adapter of `load` no longer. Raises NotFound, Forbidden."""
        async with self._locks.hold(engine_name(tenant, name)):
            try:
                record = await asyncio.to_thread(self.find_record, tenant, name)
            except NotFound as error:
                raise NotFound(f"lora_name: there is no adapter {name[:64]!r}", param="lora_name") from error
            check_unloadable(record, tenant, name)
            await asyncio.to_thread(self.remove, record)
            self._shelf.retire(record.directory, tenant)
            await self.drop_loaded(tenant, name)

    def _copies(self, tenant: str) -> Sequence[str]:
        """Directories of a tenant's copies of adapters from outside, with older versions that requests still use."""
        own = [record.directory for record in self._store.list_adapters(tenant) if record.tenant == tenant]
        return [directory for directory in own if self._shelf.holds(directory)] + self._shelf.retired(tenant)

    def copied_bytes(self, tenant: str) -> int:
        """How many bytes a tenant's copies take on disk. Those of --lora-modules count for nobody."""
        return sum(map(self._shelf.bytes_of, self._copies(tenant)))

    def _check_room(self, tenant: str, replaced: AdapterRecord | None, size: int) -> None:
        """Raises TooLarge if a copy of `size` bytes would exceed the tenant's limit. replaced: the version that it replaces."""
        if replaced is None:
            freed, num_others = 0, len(self._copies(tenant))
        else:
            freed, num_others = self._shelf.bytes_of(replaced.directory), 0
        check_adapter_room(self._config, size, self.held_bytes(tenant) - freed, num_others)
