"""JSON Lines files: the reader that uploads and training share.

Owns: encodings, lines, JSON objects. Does not own: what a line means (layouts.py). A UTF-8 byte order mark is skipped. A file
in another encoding is refused, and the error names the encoding.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from coserve.core import InvalidRequest

MAX_LINE_BYTES = 4 << 20
"""The longest line. It bounds the memory for tokenizing a line, which is up to 250 times the text's."""
_HEAD_BYTES = 1 << 20
"""How many bytes at an upload's start are searched for a JSON object."""
_SAVE = "save it as UTF-8"
_UNPACK = "write each object of a JSON array on a line of its own"
_SIGNS = (
    (codecs.BOM_UTF32_LE, f"UTF-32, not UTF-8; {_SAVE}"),  # before UTF-16's, since it begins with that
    (codecs.BOM_UTF32_BE, f"UTF-32, not UTF-8; {_SAVE}"),
    (codecs.BOM_UTF16_LE, f"UTF-16, not UTF-8; {_SAVE}"),
    (codecs.BOM_UTF16_BE, f"UTF-16, not UTF-8; {_SAVE}"),
    (b"\x1f\x8b", "compressed (gzip); give the file inside"),
    (b"PK\x03\x04", "compressed (zip); give the file inside"),
    (b"BZh", "compressed (bzip2); give the file inside"),
    (b"\xfd7zXZ\x00", "compressed (xz); give the file inside"),
    (b"\x28\xb5\x2f\xfd", "compressed (zstd); give the file inside"),
    (b"PAR1", "a Parquet file; write it as JSON Lines"),
)
_SHOWN_CHARS = 60


class LineError(Exception):
    """A line that can't be used. The message says what is wrong with `field` and what to do, without file and line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")


def foreign_format(head: bytes) -> str | None:
    """The format of a file that isn't UTF-8 text, by its first bytes, with what to do about it. None if they show no other."""
    for sign, words in _SIGNS:
        if head.startswith(sign):
            return words
    zeros = [byte == 0 for byte in head[:4]]  # JSON begins with an ASCII character
    if zeros in ([False, True, True, True], [True, True, True, False]):
        return f"UTF-32, not UTF-8; {_SAVE}"
    if zeros[:2] in ([False, True], [True, False]):
        return f"UTF-16, not UTF-8; {_SAVE}"
    return None


def numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without white space around it) of every line; blank lines are empty. Raises LineError if the first
    bytes show another format than UTF-8."""
    problem = foreign_format(data[:16])
    if problem is not None:
        raise LineError("encoding", f"the file is {problem}")
    number, start = 0, len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    while start <= len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        number += 1
        yield number, data[start:end].strip()
        start = end + 1


def read_object(line: bytes) -> dict[str, Any]:
    """The JSON object in a line. Raises LineError, also if an object has a key twice."""
    if len(line) > MAX_LINE_BYTES:
        raise LineError("line", f"{len(line)} bytes, more than {MAX_LINE_BYTES}; split the example")
    try:
        record = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise LineError("encoding", f"not UTF-8 (byte {error.start} of the line); save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        todo = _UNPACK if line.startswith(b"[") else "give one JSON object per line"
        raise LineError("JSON", f"{error.msg} at column {error.colno}; {todo}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond what Python reads
        raise LineError("JSON", f"{error}; give one plain JSON object per line") from error
    if not isinstance(record, dict):
        todo = f"; {_UNPACK}" if isinstance(record, list) else ""
        raise LineError("line", f"a JSON object is expected, got {kind(record)}{todo}")
    return record


def read_text(value: object, place: str) -> str:
    """The value as a string. Raises LineError if it is none, or can't be encoded as UTF-8."""
    if not isinstance(value, str):
        raise LineError(place, f"a string is expected, got {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LineError(place, "holds half of a surrogate pair (\\ud800-\\udfff); write whole characters") from error
    return value


def kind(value: object) -> str:
    """The name of a JSON value's type, with its article."""
    if value is None:
        return "nothing"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names[type(value)]


def shown(value: object) -> str:
    """A user's value as JSON, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise LineError(shown(key), "the key is in one object twice; keep one of them")
        found[key] = value
    return found


class UploadCheck:
    """Checks an upload while it is copied: it must be UTF-8 text with a JSON object among its first lines. The lines' contents
    are checked when a job reads them."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._head = bytearray()
        self._size = 0

    def feed(self, chunk: bytes) -> None:
        """Checks the next bytes. Raises InvalidRequest."""
        self._head += chunk[: _HEAD_BYTES - len(self._head)]
        if self._size == 0 and (problem := foreign_format(chunk[:16])) is not None:
            raise _refused(f"is {problem}")
        self._size += len(chunk)
        try:
            self._decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise _refused("isn't valid UTF-8; a file for fine-tuning is JSON Lines") from error

    def finish(self) -> None:
        """Ends the check. Raises InvalidRequest if the file is empty, ends inside a character, or has no JSON object."""
        if self._size == 0:
            raise _refused("is empty")
        try:
            self._decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _refused("isn't valid UTF-8, it ends inside a character") from error
        head = bytes(self._head).removeprefix(codecs.BOM_UTF8)
        lines = head.split(b"\n")
        cut = lines.pop() if len(self._head) < self._size else b""  # the last line goes on behind the head
        if not (cut.lstrip().startswith(b"{") or any(map(_is_object, lines))):
            todo = _UNPACK if head.lstrip().startswith(b"[") else "a file for fine-tuning is JSON Lines"
            raise _refused(f"has no line that is a JSON object; {todo}")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(f"file: {message}", param="file")
