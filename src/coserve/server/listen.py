"""The listening socket and uvicorn: what takes connections, for a server of one engine and for the ingress of several.

Owns: the address, the HTTP server, what a process that serves asks of the system. Does not own: signals and the end
(cli/serve.py, replicas/ingress.py), the application (app.py).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import resource
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from coserve.core import ConfigError
from coserve.server.settings import ServerConfig

_LAST_ANSWERS_S = 2.0
"""Seconds that connections get at the end to tell their clients that their requests were ended."""
_SWITCH_S = 1e-3
"""Seconds after which a thread that computes is asked to give Python's lock to another one."""
_log = logging.getLogger(__name__)


class HttpServer(uvicorn.Server):
    """Leaves signals to its caller, since uvicorn would raise them once more at its end. lines: are logged once it listens."""

    lines: Sequence[str] = ()

    @classmethod
    def of(cls, app: FastAPI, config: ServerConfig) -> HttpServer:
        """A server of the application, with the settings' time for what runs at its end."""
        return cls(uvicorn.Config(
            app, lifespan="off", access_log=False, log_level="warning", log_config=None, server_header=False,
            timeout_graceful_shutdown=int(config.shutdown_timeout + _LAST_ANSWERS_S),
        ))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for line in self.lines:
            _log.info("%s", line)


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address; it takes connections only when the server listens. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(f"port: can't listen at {host}:{port} ({error.strerror or error})", param="port") from error
    return listener


def keep_loop_free() -> None:
    """Has threads give Python's lock to the event loop sooner, and takes all objects made so far out of garbage collection.
    They are hundreds of thousands, most of imported packages, and each full collection would look through them again."""
    sys.setswitchinterval(_SWITCH_S)
    gc.collect()
    gc.freeze()


def allow_many_files() -> None:
    """Raises the limit of open files to what is allowed, since each connection is one and the usual limit is low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
