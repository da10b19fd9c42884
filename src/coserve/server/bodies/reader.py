"""The body of a request as FastAPI's dependency: its content type, its bytes as they arrive, and the turn in which it is read.

    content type   application/json, before anything is read
    who asks       before anything is read
    bytes          counted against what the tenant may hold at once
    the form       at once for a small body; for a large one on a thread, in the tenants' turn (work.py)

Owns: these steps. Does not own: the limit of one body's bytes (middleware.py), what is in a body (parse.py, forms.py).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import Request
from starlette.requests import ClientDisconnect

from coserve.core import InvalidRequest
from coserve.server.bodies.forms import Form, Model
from coserve.server.errors import UnsupportedType
from coserve.server.services import Served, Tenant

_LARGE_BYTES = 1 << 14


def body_reader(form: Form[Model]) -> Callable[[Request, Served, Tenant], Awaitable[Model]]:
    """A dependency that gives the request's body as the form's model. Raises InvalidRequest."""

    async def read(request: Request, services: Served, tenant: Tenant) -> Model:
        _check_type(request)
        parts, held, allowance = list[bytes](), 0, services.shares.body_bytes
        try:
            async for part in request.stream():
                if part:
                    allowance.take(tenant, len(part))
                    held += len(part)
                    parts.append(part)
            data = b"".join(parts)
            parts.clear()
            if len(data) < _LARGE_BYTES:
                return form.parse(data)
            return await services.work.run(tenant, lambda: form.parse(data))
        except ClientDisconnect as error:
            raise InvalidRequest("the body breaks off") from error
        finally:
            if held:
                allowance.give_back(tenant, held)

    return read


def _check_type(request: Request) -> None:
    """Raises UnsupportedType for a body that doesn't call itself JSON: what a website's form or simple script would send."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        said = f"says {given[:60]!r}" if given.isprintable() and given else "says none"
        raise UnsupportedType(
            f"content-type: send application/json (this request {said}); with curl: -H 'content-type: application/json'"
        )
