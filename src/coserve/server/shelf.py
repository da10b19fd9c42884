"""Copies of adapters from outside. Each adapter is checked once, in this process, and written below the data directory in the
form that the check gives (peft/gate.py). The engine's process and jobs read only these copies, which never change.

    DATA_DIR/adapters/ID/    one version of one adapter

Owns: that directory. Does not own: which name an adapter has (models.py). Thread-safe. Adapters are checked one at a time,
since each takes memory meanwhile.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

from coserve.config.values import MAX_RANK
from coserve.durable import write_directory
from coserve.model.architecture import read_architecture
from coserve.peft.format import admit_adapter
from coserve.peft.gate import Base
from coserve.runtime.loaded import DTYPES
from coserve.server.index.disk import directory_bytes, storage_errors
from coserve.server.link.messages import Ready
from coserve.text.tokenizer import ChatTokenizer


class EngineFacts(Protocol):
    """What is known of the engine, or of several with the same base."""

    @property
    def info(self) -> Ready:
        """What an engine tells when it is ready."""


class Admitted(NamedTuple):
    """A copy. directory: where it is. warnings: what the adapter's maker should know."""

    directory: str
    warnings: tuple[str, ...]


class AdapterShelf:
    """The copies below `root`. tokenizer: the base's; without one there are no warnings about tokens that an adapter adds."""

    def __init__(self, root: Path, engine: EngineFacts, max_rank: int, tokenizer: ChatTokenizer | None) -> None:
        self.root, self._engine, self._max_rank, self._tokenizer = root.absolute(), engine, min(max_rank, MAX_RANK), tokenizer
        self._base: Base | None = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "coserve-gate")
        self._retired: dict[str, str] = {}  # copy -> whose it was
        self._sizes: dict[str, int] = {}

    def holds(self, directory: str) -> bool:
        """Whether a directory is one of these copies."""
        return Path(directory).parent == self.root

    def admit(self, source: Path, check_room: Callable[[int], None] = lambda size: None) -> Admitted:
        """Checks an adapter from outside and copies it. Raises NotFound, InvalidRequest and CapacityError.

        check_room: raises if there is no room for a copy of so many bytes.
        """
        with self._lock, storage_errors():
            target, base = self.root / uuid.uuid4().hex, self._find_base()
            warnings: list[str] = []

            def fill(place: Path) -> None:
                warnings.extend(admit_adapter(source, place, base, max_rank=self._max_rank).warnings)
                check_room(directory_bytes(str(place)))

            write_directory(target, fill)
            return Admitted(str(target), tuple(warnings))

    async def admit_soon(self, source: Path, check_room: Callable[[int], None]) -> Admitted:
        """`admit`, in a thread beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.admit, source, check_room)

    def bytes_of(self, directory: str) -> int:
        """How many bytes a copy takes; 0 for other directories. A copy never changes, so it is counted once."""
        if not self.holds(directory):
            return 0
        size = self._sizes.get(directory)
        if size is None:
            size = self._sizes[directory] = directory_bytes(directory)
        return size

    def retire(self, directory: str, tenant: str) -> None:
        """No name stands for a copy any more. It counts for the tenant until it is deleted."""
        if self.holds(directory):
            self._retired[directory] = tenant

    def retired(self, tenant: str) -> list[str]:
        """A tenant's copies that no name stands for and that are still there."""
        return [directory for directory, owner in list(self._retired.items()) if owner == tenant]

    def sweep(self, held: Collection[str]) -> None:
        """Deletes the retired copies, except those in `held`, which requests in the engine may still need."""
        for directory in list(self._retired):
            if directory not in held:
                shutil.rmtree(directory, ignore_errors=True)
                self._retired.pop(directory, None)
                self._sizes.pop(directory, None)

    def keep_only(self, directories: Collection[str]) -> None:
        """Deletes all copies but these; it is called at the server's start."""
        if self.root.is_dir():
            for place in self.root.iterdir():
                if str(place) not in directories:
                    shutil.rmtree(place, ignore_errors=True)

    def _find_base(self) -> Base:
        info = self._engine.info
        if self._base is None or self._base.fingerprint != info.fingerprint:
            knows = None if self._tokenizer is None else self._tokenizer.knows
            self._base = Base(read_architecture(Path(info.directory)), info.fingerprint, DTYPES[info.dtype], knows)
        return self._base
