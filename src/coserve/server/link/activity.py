"""What the engine process is doing, on a page of memory that both processes share, so that it can be read even during a hang.

    engine process: ActivityRow.begin / end --> | row 0 | row 1 | ... | --> API process: ActivityPage.read (watchdog.py)

A thread that hangs may hold the interpreter's lock, and then no other thread of its process can say anything. So each thread
writes down what it is about to do beforehand. Only one thread writes to a row. The row's number is odd while it is written.
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from coserve.engine.watching import Watcher

PLACES = 8
"""Threads that can be watched: the engine's, the socket's, the pulse, and the pool's."""
PLACE_BYTES = 8192
_HEAD = struct.Struct("<QddI")
"""A row's number, when its work began (seconds of the monotonic clock, 0: idle), predicted seconds, bytes of the text."""
_NUMBER = struct.Struct("<Q")
_MAX_TEXT_BYTES = PLACE_BYTES - _HEAD.size
_MAX_NAMES = 64
_READS = 5
"""Tries of reading a row that is being written."""
ENGINE, SOCKET, PULSE, FIRST_CALL = 0, 1, 2, 3
PULSE_S = 0.5


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """What a thread is doing. jobs, requests: for whom, at most the first 64. num_requests: how many requests in all."""

    what: str
    jobs: list[str] = []
    requests: list[str] = []
    num_requests: int = 0

    def __str__(self) -> str:
        whom = ""
        if self.jobs:
            whom += f"; jobs {', '.join(self.jobs)}"
        if self.requests:
            more = self.num_requests - len(self.requests)
            whom += f"; requests {', '.join(self.requests)}" + (f" and {more} more" if more > 0 else "")
        return self.what + whom


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A place that is busy. number: changes with every new activity. predicted_s: how long the activity should take."""

    place: int
    number: int
    begun_s: float
    predicted_s: float
    activity: Activity


_decoder = msgspec.json.Decoder(Activity)
_encoder = msgspec.json.Encoder()


class ActivityRow(Watcher):
    """One thread's part of the page, for writing."""

    def __init__(self, memory: mmap.mmap, place: int) -> None:
        self._memory, self._start = memory, place * PLACE_BYTES
        self._number = 0

    def begin(
        self, what: str, seconds: float = 0.0, *, jobs: Iterable[str] = (), requests: Iterable[str] = ()
    ) -> None:
        """The thread is about to do something that should take so many seconds."""
        asked = list(requests)
        text = _encoder.encode(Activity(
            what=what[:512], jobs=list(jobs)[:_MAX_NAMES], requests=asked[:_MAX_NAMES], num_requests=len(asked)))
        if len(text) > _MAX_TEXT_BYTES:  # names as long as nobody gives them
            text = _encoder.encode(Activity(what=what[:512], num_requests=len(asked)))
        self._write(time.monotonic(), seconds, text)

    def end(self) -> None:
        """The thread has nothing to do."""
        self._write(0.0, 0.0, b"")

    def _write(self, begun_s: float, seconds: float, text: bytes) -> None:
        memory, start = self._memory, self._start
        _NUMBER.pack_into(memory, start, self._number + 1)
        memory[start + _HEAD.size : start + _HEAD.size + len(text)] = text
        self._number += 2
        _HEAD.pack_into(memory, start, self._number - 1, begun_s, seconds, len(text))
        _NUMBER.pack_into(memory, start, self._number)


class ActivityPage:
    """The page, in a file that both processes map. The file may be deleted once they have. Without a path no other process sees
    the page."""

    def __init__(self, path: Path | None, *, create: bool = False) -> None:
        """Raises OSError."""
        if path is None:
            self._memory = mmap.mmap(-1, PLACES * PLACE_BYTES)
            return
        with path.open("w+b" if create else "r+b") as file:
            if create:
                file.write(bytes(PLACES * PLACE_BYTES))  # takes room on the disk now: on a full one, writing to the map kills
                file.flush()
            self._memory = mmap.mmap(file.fileno(), PLACES * PLACE_BYTES)

    def place(self, number: int) -> ActivityRow:
        """The row of one thread."""
        return ActivityRow(self._memory, number)

    def read(self) -> list[Reading]:
        """All busy places. One that is being written again and again is left out, since its thread doesn't hang."""
        return [reading for place in range(PLACES) if (reading := self._read(place)) is not None]

    def _read(self, place: int) -> Reading | None:
        start = place * PLACE_BYTES
        for _ in range(_READS):
            number, begun_s, predicted_s, size = _HEAD.unpack_from(self._memory, start)
            text = self._memory[start + _HEAD.size : start + _HEAD.size + min(size, _MAX_TEXT_BYTES)]
            if number % 2 == 0 and _NUMBER.unpack_from(self._memory, start)[0] == number:
                if begun_s == 0.0:
                    return None
                return Reading(
                    place=place, number=number, begun_s=begun_s, predicted_s=predicted_s, activity=_decoder.decode(text)
                )
        return None

    def close(self) -> None:
        """Unmaps the page."""
        self._memory.close()


class CallPlaces:
    """Lends places to the threads of a pool while they work."""

    def __init__(self, page: ActivityPage) -> None:
        self._free = [page.place(number) for number in range(FIRST_CALL, PLACES)]
        self._lock = threading.Lock()

    @contextmanager
    def doing(self, what: str, seconds: float, *, jobs: Iterable[str] = ()) -> Iterator[None]:
        """Says what the thread does inside the context, if a place is free."""
        with self._lock:
            place = self._free.pop() if self._free else None
        try:
            if place is not None:
                place.begin(what, seconds, jobs=jobs)
            yield
        finally:
            if place is not None:
                place.end()
                with self._lock:
                    self._free.append(place)


def start_pulse(page: ActivityPage) -> None:
    """Starts a thread that only says that it runs. It falls silent when the process is stopped, or something holds the
    interpreter's lock."""
    place = page.place(PULSE)

    def beat() -> None:
        while True:
            place.begin("the engine process as a whole: its threads don't get to run")
            time.sleep(PULSE_S)

    threading.Thread(target=beat, name="coserve-pulse", daemon=True).start()
