"""Reading files that somebody else wrote: bounded in size, never blocking, never executed, errors in one line.

A path is opened once and must be a regular file, so that a pipe or a device can't hang the reader and a file that is exchanged
meanwhile is not seen. Nothing is mapped into memory: a file that is cut while it is read is an error, not the process's end.
Owns: bytes, JSON, the layout of safetensors files. Does not own: what they must say (fields.py, gate.py). Errors give files'
names without directories: they are shown to clients that may not know the server's paths.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch
from torch import Tensor

from coserve.config.values import is_nested_deeper, is_whole, shown
from coserve.core import InvalidRequest, one_line

_MAX_JSON_BYTES = 1 << 20
_MAX_HEADER_BYTES = 8 << 20
"""Of a safetensors file: a hundred times what an adapter of a large model takes."""
_MAX_DEPTH = 64
_MAX_DIGITS = 4000
_ELEMENT_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8,
    "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}
_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}
FLOATS = tuple(_DTYPES)
"""Element types that adapters may have."""


def refuse(message: str) -> InvalidRequest:
    """The error of an adapter that can't be used."""
    return InvalidRequest(f"adapter: {message}", param="adapter")


@contextmanager
def open_regular(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file and its size in bytes. Raises InvalidRequest for what isn't one, FileNotFoundError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise refuse(f"{shown_name(path.name)} can't be read ({getattr(error, 'strerror', error)})") from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise refuse(f"{shown_name(path.name)} can't be read (it is no regular file)")
    with os.fdopen(descriptor, "rb") as file:
        yield file, found.st_size


def shown_name(name: str) -> str:
    """A name from a foreign file as messages show it: as it is where it is a plain one."""
    return name if name.isascii() and name.isprintable() and len(name) <= 200 else shown(name, 200)


def _read(file: BinaryIO, count: int, name: str) -> bytearray:
    data = bytearray(count)
    try:
        complete = file.readinto(data) == count  # type: ignore[attr-defined]
    except OSError as error:
        raise refuse(f"{name} can't be read ({error.strerror})") from error
    if not complete:
        raise refuse(f"{name} can't be read (it ends too early)")
    return data


# --- JSON ---


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object with finite numbers and without doubled keys. Raises InvalidRequest, FileNotFoundError."""
    name = path.name
    with open_regular(path) as (file, size):
        if size > _MAX_JSON_BYTES:
            raise refuse(f"{name} can't be read as JSON (it has {size} bytes; at most {_MAX_JSON_BYTES} are read)")
        data = _read(file, size, name)
    found = _parse(data, name)
    if not isinstance(found, dict):
        raise refuse(f"{name} must hold a JSON object")
    return found


def _parse(data: bytes | bytearray, name: str) -> Any:
    try:
        found = json.loads(
            data.decode(), parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole,
            object_pairs_hook=_without_doubles,
        )
        if is_nested_deeper(found, _MAX_DEPTH - 1):
            raise RecursionError
    except RecursionError as error:
        raise refuse(f"{name} can't be read as JSON (it is nested too deeply)") from error
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ones
        raise refuse(f"{name} can't be read as JSON ({one_line(error, 200)})") from error
    return found


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"{text[:40]}... is too large a number")
    return int(text)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands there twice")
            seen.add(key)
    return found


# --- tensors ---


class TensorEntry(NamedTuple):
    """Where a tensor lies in a file. dtype: safetensors' name; start: from the file's beginning, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class TensorFile:
    """An open safetensors file whose header has been checked against its length; no tensor has been read."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        """Raises InvalidRequest for a header that can't be right."""
        self.name, self._file = name, file
        self.entries = self._read_entries(size)

    def read(self, name: str) -> Tensor:
        """One tensor in the file's own element type, which must be one of FLOATS. Raises InvalidRequest."""
        entry = self.entries[name]
        self._file.seek(entry.start)
        return torch.frombuffer(_read(self._file, entry.num_bytes, self.name), dtype=_DTYPES[entry.dtype]).reshape(entry.shape)

    def _damaged(self, why: str) -> InvalidRequest:
        return refuse(f"{self.name} can't be read ({why})")

    def _read_entries(self, size: int) -> dict[str, TensorEntry]:
        if size < 8:
            raise self._damaged("it is too short for a safetensors file")
        length = int.from_bytes(_read(self._file, 8, self.name), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
            raise self._damaged("its header's length is wrong")
        header = _parse(_read(self._file, length, self.name), self.name)
        if not isinstance(header, dict):
            raise self._damaged("its header is no object")
        header.pop("__metadata__", None)
        begin = 8 + length
        entries = {name: self._entry(name, data, begin) for name, data in header.items()}
        end = begin
        for entry in sorted(entries.values(), key=lambda e: (e.start, e.num_bytes)):
            if entry.start != end:
                raise self._damaged("its tensors overlap, or there are gaps")
            end += entry.num_bytes
        if end != size:
            raise self._damaged(f"its header promises {end} bytes and there are {size}")
        return entries

    def _entry(self, name: str, data: Any, begin: int) -> TensorEntry:
        stated: dict[str, Any] = data if isinstance(data, dict) else {}
        dtype, shape, offsets = (stated.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and _is_counts(shape, most=8) and _is_counts(offsets, most=2) and len(offsets) == 2):
            raise self._damaged(f"the header's entry of {shown_name(name)} is wrong")
        if dtype not in _ELEMENT_BYTES:
            raise refuse(f"{self.name} stores {shown_name(name)} as {shown_name(dtype)}; supported are {', '.join(FLOATS)}")
        num_bytes = math.prod(shape) * _ELEMENT_BYTES[dtype]
        if offsets[1] - offsets[0] != num_bytes:
            raise self._damaged(f"the size of {shown_name(name)} does not follow from its shape")
        return TensorEntry(dtype, tuple(shape), begin + offsets[0], num_bytes)


def _is_counts(value: Any, most: int) -> TypeGuard[list[int]]:
    """Whether a value is a list of at most so many whole numbers from 0 on."""
    return isinstance(value, list) and len(value) <= most and all(is_whole(n) and n >= 0 for n in value)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Raises InvalidRequest, FileNotFoundError."""
    with open_regular(path) as (file, size):
        yield TensorFile(file, size, path.name)
