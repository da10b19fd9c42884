"""Around every route: limits of bodies, request ids, and what happens to an exception that nobody expected.

Plain ASGI, so that streams pass unchanged. Does not own: errors that are expected (handlers.py), limits of uploads
(index/files.py).
"""

from __future__ import annotations

import logging
import re
import time
import uuid

from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coserve.core import CoserveError
from coserve.server.handlers import error_response, plain_body
from coserve.server.logs import about_request

UPLOADS = ("/v1/files", "/v1/files/")
"""A POST to these paths may be larger, and has limits of its own."""
REQUEST_ID = "x-request-id"
_GIVEN_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
_log = logging.getLogger(__name__)


def announced_bytes(headers: Headers) -> int:
    """The length of a body by its Content-Length header, at most 10^18; 0 where there is none, as of a body in chunks."""
    length = headers.get("content-length", "")
    return min(int(length[:19]), 10**18) if length.isdecimal() else 0


class BodyLimits:
    """Refuses bodies of more than `max_bytes` (413), counted as they come, and compressed ones (415), which nothing unpacks."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes
        self._too_large = f"the body exceeds max_body_bytes={max_bytes}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            encoding = headers.get("content-encoding", "").strip().lower()
            is_upload = scope["method"] == "POST" and scope["path"] in UPLOADS
            if encoding not in ("", "identity"):
                app = _refuse(415, f"content-encoding: {encoding[:40]!r} isn't taken; send the body as it is")
            elif not is_upload and announced_bytes(headers) > self._max_bytes:
                app = _refuse(413, self._too_large)
            elif not is_upload:
                receive = self._counted(receive)
        await app(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise HTTPException(413, self._too_large, headers={"connection": "close"})
            return message

        return counted


def _refuse(status: int, message: str) -> JSONResponse:
    """An answer that ends the connection, since the request's body is never read."""
    return JSONResponse(plain_body(status, message), status, headers={"connection": "close"})


class LastResort:
    """Gives every request an id, its own x-request-id if it has one. An unexpected exception is logged with the id, and the
    answer is a 500 that names only the id. log_requests: whether every request gets a line in the log."""

    def __init__(self, app: ASGIApp, log_requests: bool = False) -> None:
        self._app, self._log_requests = app, log_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request = given if _GIVEN_ID.fullmatch(given) else uuid.uuid4().hex
        status, began = 0, time.monotonic()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault(REQUEST_ID, request)
            await send(message)

        with about_request(request):
            try:
                await self._app(scope, receive, named)
            except LocalProtocolError:
                return  # the client broke HTTP's rules while it was answered: the connection has ended
            except CoserveError as error:  # of what stands around the routes, which no handler sees
                if not status:
                    await error_response(error)(scope, receive, named)
            except Exception:
                _log.exception("request %s: %s %s failed", request, scope["method"], scope["path"])
                if not status:  # else the connection is cut, which tells the client
                    message = f"the server has failed; its log says how, under request {request}"
                    await JSONResponse(plain_body(500, message), 500)(scope, receive, named)
            finally:
                if self._log_requests:
                    _log_request(scope, status, time.monotonic() - began)


def _log_request(scope: Scope, status: int, seconds: float) -> None:
    """Writes the line of --enable-log-requests. status: 0 where the client left before there was one."""
    shown = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(seconds, 4)}
    client = scope.get("client")
    if client is not None:
        shown["client"] = client[0]
    extra = {"fields": shown, "fold": False}
    _log.info("%s %s: %s in %.3f s", scope["method"], scope["path"], status or "left", seconds, extra=extra)
