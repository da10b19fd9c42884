"""Adapters from outside as the server keeps them: each is checked once, in this process, and written below the data directory
in the form that the gate gives (peft/gate.py). The engine's process and jobs read nothing but these copies, which never change.

    DATA_DIR/adapters/ID/    one version of one adapter

Owns: that directory. Does not own: which name an adapter has (models.py). Thread-safe; one adapter is checked at a time, so
that many at once don't add up in memory.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from coserve.config import MAX_RANK
from coserve.engine.model import DTYPES
from coserve.finetune.checkpoints import write_atomically
from coserve.model.architecture import read_architecture
from coserve.peft.format import admit_adapter
from coserve.peft.gate import Base
from coserve.server.index.disk import storage_errors
from coserve.server.link.engineclient import EngineClient
from coserve.tokenizer import ChatTokenizer


class Admitted(NamedTuple):
    """directory: the copy; warnings: what the adapter's maker should know."""

    directory: str
    warnings: tuple[str, ...]


class AdapterShelf:
    """The copies below `root`. tokenizer: the base's, to know an adapter's new tokens by."""

    def __init__(self, root: Path, engine: EngineClient, max_rank: int, tokenizer: ChatTokenizer | None) -> None:
        self.root, self._engine, self._max_rank, self._tokenizer = root.absolute(), engine, min(max_rank, MAX_RANK), tokenizer
        self._base: Base | None = None
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, "coserve-gate")
        self._retired: set[str] = set()

    def holds(self, directory: str) -> bool:
        """Whether a directory is one of these copies."""
        return Path(directory).parent == self.root

    def admit(self, source: Path) -> Admitted:
        """Checks a foreign adapter and copies what passed. Raises NotFound, InvalidRequest, CapacityError."""
        with self._lock, storage_errors():
            target, base = self.root / uuid.uuid4().hex, self._find_base()
            warnings: list[str] = []
            write_atomically(
                target,
                lambda place: warnings.extend(admit_adapter(source, place, base, max_rank=self._max_rank).warnings),
            )
            return Admitted(str(target), tuple(warnings))

    async def admit_soon(self, source: Path) -> Admitted:
        """`admit` in a thread of its own, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self.admit, source)

    def retire(self, directory: str) -> None:
        """No name stands for a copy any more."""
        if self.holds(directory):
            self._retired.add(directory)

    def sweep(self, held: Collection[str]) -> None:
        """Deletes retired copies but those that requests in the engine may still need."""
        for directory in [directory for directory in self._retired if directory not in held]:
            shutil.rmtree(directory, ignore_errors=True)
            self._retired.discard(directory)

    def keep_only(self, directories: Collection[str]) -> None:
        """At the server's start: deletes all other copies."""
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
