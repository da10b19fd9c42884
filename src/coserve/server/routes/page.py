"""The web page at /: static files of the package, which need no build step and no other host.

Owns: their types, caching and the rules that a browser enforces on them. Does not own: data; the page asks the API for it.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from coserve.core import NotFound

router = APIRouter(include_in_schema=False)

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}


class Asset(NamedTuple):
    """A file of the page. etag: of its content."""

    content: bytes
    media_type: str
    etag: str


def _walk(folder: Traversable, prefix: str) -> dict[str, Asset]:
    found: dict[str, Asset] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            found |= _walk(entry, f"{prefix}{entry.name}/")
            continue
        content, suffix = entry.read_bytes(), f".{entry.name.rpartition('.')[2]}"
        kind = _TYPES.get(suffix, "text/plain")
        found[prefix + entry.name] = Asset(content, kind, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return found


@functools.cache
def assets() -> dict[str, Asset]:
    """All files of the page by path, read once. A path that isn't here doesn't exist, whatever is on disk."""
    return _walk(files("coserve.server") / "page", "")


def _serve(path: str, request: Request) -> Response:
    asset = assets().get(path)
    if asset is None:
        raise NotFound(f"there is no page {path[:64]!r}")
    headers = {**SECURITY_HEADERS, "Cache-Control": "no-cache", "ETag": asset.etag}  # kept, but asked about each time
    if asset.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The page."""
    return _serve("index.html", request)


@router.api_route("/page/{path:path}", methods=["GET", "HEAD"])
async def asset(path: str, request: Request) -> Response:
    """Its scripts, styles and icons."""
    return _serve(path, request)
