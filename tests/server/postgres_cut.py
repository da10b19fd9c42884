"""A way to PostgreSQL that a test can cut: connections through it are refused and closed, or just not answered any more."""

from __future__ import annotations

import contextlib
import selectors
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import make_url

_SOCKET = ".s.PGSQL.5432"


class CutWay:
    """A Unix socket before another one. Bytes pass in both directions, on a thread, unless the way is cut or silent."""

    def __init__(self, url: str, directory: Path) -> None:
        """url: of the database, whose query names the directory of its socket."""
        parsed = make_url(url)
        self._target = str(Path(str(parsed.query["host"])) / _SOCKET)
        self.url = str(parsed.update_query_dict({"host": str(directory)}).render_as_string(hide_password=False))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(directory / _SOCKET))
        self._listener.listen(64)
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._lock, self._ended = threading.Lock(), False
        self._cut = self._silent = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        """Ends all connections and takes no more."""
        with self._lock:
            self._cut = True
            for end in list(self._pairs):
                self._close(end)

    def silence(self) -> None:
        """Nothing passes any more, and nothing is refused."""
        self._silent = True

    def mend(self) -> None:
        """Takes connections again, and lets pass what has waited."""
        self._cut = self._silent = False

    def close(self) -> None:
        self._ended = True
        self._thread.join(5)
        self.cut()
        self._listener.close()

    def _run(self) -> None:
        while not self._ended:
            with self._lock:
                ends = list(self._pairs)
            with selectors.DefaultSelector() as selector:
                selector.register(self._listener, selectors.EVENT_READ)
                for end in [] if self._silent else ends:
                    with contextlib.suppress(ValueError):  # it was closed meanwhile
                        selector.register(end, selectors.EVENT_READ)
                ready = [key.fileobj for key, _ in selector.select(0.01)]
            with self._lock:
                for found in ready:
                    if found is self._listener:
                        self._accept()
                    elif isinstance(found, socket.socket) and found in self._pairs and not self._silent:
                        self._pass(found)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if self._cut:
            near.close()
            return
        far = socket.socket(socket.AF_UNIX)
        far.connect(self._target)
        self._pairs[near], self._pairs[far] = far, near

    def _pass(self, end: socket.socket) -> None:
        try:
            data = end.recv(1 << 16)
            if data:
                self._pairs[end].sendall(data)
                return
        except OSError:
            pass
        self._close(end)

    def _close(self, end: socket.socket) -> None:
        other = self._pairs.pop(end, None)
        if other is not None:
            self._pairs.pop(other, None)
            other.close()
            end.close()


@contextmanager
def way_to(url: str) -> Iterator[CutWay]:
    """A way to a database, in a directory of its own: the paths of sockets have to be short."""
    directory = Path(tempfile.mkdtemp(prefix="coserve-way-"))
    way = CutWay(url, directory)
    try:
        yield way
    finally:
        way.close()
        shutil.rmtree(directory, ignore_errors=True)
