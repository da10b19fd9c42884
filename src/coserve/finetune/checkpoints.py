"""Checkpoint directories: the adapter, the optimizer, the cursor. A checkpoint counts only if its manifest is valid.

    checkpoints/step-00000040/   adapter_config.json, adapter_model.safetensors, coserve.json   (PEFT's format)
                                 optimizer.safetensors                                         (masters and moments)
                                 manifest.json                  (written last: cursor, settings, size and digest of each file)

A checkpoint is on the disk whole or not at all (durable.py). Nothing is loaded with pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coserve.core import InvalidRequest
from coserve.durable import write_directory
from coserve.hostcopy import to_host

MANIFEST_FILE, OPTIMIZER_FILE = "manifest.json", "optimizer.safetensors"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far a job is. step: optimizer steps done. trained_tokens: tokens of the examples in those steps."""

    step: int
    trained_tokens: int


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path, cursor: Cursor, *, save_adapter: Callable[[Path], None], optimizer: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Writes a checkpoint below `root`. save_adapter: writes the adapter's files. facts: what a resumed job must agree with."""
    directory = root / checkpoint_name(cursor.step)

    def fill(temporary: Path) -> None:
        save_adapter(temporary)
        state = {name: tensor.contiguous() for name, tensor in to_host(optimizer).items()}
        save_file(state, temporary / OPTIMIZER_FILE)
        manifest = {
            "schema_version": SCHEMA_VERSION, "step": cursor.step, "trained_tokens": cursor.trained_tokens, **facts,
            "files": {path.name: _digest(path) for path in sorted(temporary.iterdir())},
        }
        (temporary / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")

    write_directory(directory, fill)
    return directory


def read_manifest(directory: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises InvalidRequest if it or a file that it lists is missing or damaged."""
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text())
        if manifest["schema_version"] != SCHEMA_VERSION:
            version = manifest["schema_version"]
            raise InvalidRequest(f"checkpoint: {directory} has schema version {version}, not {SCHEMA_VERSION}")
        for name, expected in manifest["files"].items():
            if _digest(directory / name) != expected:
                raise InvalidRequest(f"checkpoint: {directory / name} is damaged")
        cursor = Cursor(step=manifest["step"], trained_tokens=manifest["trained_tokens"])
        if OPTIMIZER_FILE not in manifest["files"] or checkpoint_name(cursor.step) != directory.name:
            raise InvalidRequest(f"checkpoint: {directory / MANIFEST_FILE} is damaged")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"checkpoint: {directory} is damaged ({error})") from error
    return dict(manifest)


def latest_checkpoint(root: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest undamaged checkpoint and its manifest, or None. warn: called for each damaged one that is skipped."""
    for directory in sorted(root.glob("step-*"), reverse=True):
        try:
            return directory, read_manifest(directory)
        except InvalidRequest as error:
            warn(f"{error}; using the one before")
    return None


def load_optimizer(directory: Path) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint, by name. Raises InvalidRequest if they can't be read."""
    try:
        return load_file(directory / OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise InvalidRequest(f"checkpoint: {directory / OPTIMIZER_FILE} can't be read ({error})") from error


def remove_old(root: Path, keep: int, *, newest: int) -> None:
    """Keeps the last `keep` checkpoints up to step `newest`. Deletes older ones, later ones (a resume skipped them as damaged)
    and leftovers of interrupted writes."""
    found = sorted(root.glob("step-*"))
    kept = [directory for directory in found if directory.name <= checkpoint_name(newest)][-keep:]
    for directory in found:
        if directory not in kept:
            with contextlib.suppress(FileNotFoundError):  # another process may delete it at the same time
                shutil.rmtree(directory)
    for leftover in root.glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
