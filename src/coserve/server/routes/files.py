"""/v1/files: upload, list, look at, download and delete files.

Owns: reading the multipart body within its limits, OpenAI's file object. Does not own: where files are kept (index/files.py).
"""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from coserve.core import InvalidRequest
from coserve.server.errors import TooLarge
from coserve.server.index.disk import storage_errors
from coserve.server.index.files import FINE_TUNE
from coserve.server.inference.pieces import PiecesResponse, encode_large
from coserve.server.middleware import announced_bytes
from coserve.server.records import FileRecord
from coserve.server.routes.paging import After, FileLimit, Order, cursor_page
from coserve.server.services import Served, Tenant

router = APIRouter(prefix="/v1/files", tags=["files"])

_FORM_BYTES = 64 << 10
"""What a form may have beside the file."""
_MAX_FIELDS = 10
_MAX_PARSERS = 64
"""Uploads that are read at once; more wait."""
_EXPIRY = ("expires_after", "expires_after[anchor]", "expires_after[seconds]")
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {
                "file": {"type": "string", "format": "binary", "description": "JSON Lines, UTF-8"},
                "purpose": {"type": "string", "enum": [FINE_TUNE]},
            },
        }}},
    },
}


@router.post("", openapi_extra=_BODY)
async def upload_file(request: Request, services: Served, tenant: Tenant) -> dict[str, Any]:
    """Keeps a file for fine-tuning."""
    with services.shares.uploads.hold(tenant):
        await services.files.check_room(tenant, max(0, announced_bytes(request.headers) - _FORM_BYTES))
        try:
            form = await _read_form(request, services.config.max_file_bytes)
        except ClientDisconnect as error:
            raise InvalidRequest("the connection broke off during the upload") from error
        try:
            file, purpose = _read_fields(form)
            return file_object(await services.files.save_upload(tenant, file, purpose))
        finally:
            await form.close()


@router.get("", response_model=dict[str, Any])
def list_files(
    services: Served, tenant: Tenant, purpose: str | None = None, after: After = None, limit: FileLimit = 10_000,
    order: Order = "desc",
) -> Response:
    """The tenant's files."""
    records, has_more = services.store.list_files(tenant, purpose=purpose, after=after, limit=limit, order=order)
    return PiecesResponse(encode_large(cursor_page([file_object(record) for record in records], has_more)))


@router.get("/{file_id}")
def get_file(file_id: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """A file's description."""
    return file_object(services.store.get_file(tenant, file_id))


@router.get("/{file_id}/content", response_class=FileResponse)
def get_content(file_id: str, services: Served, tenant: Tenant) -> FileResponse:
    """A file's bytes."""
    record, path = services.files.find(tenant, file_id)
    # Never shown by a browser as a page of this server.
    return FileResponse(
        path, media_type="application/octet-stream", filename=record.filename, headers={"X-Content-Type-Options": "nosniff"},
    )


@router.delete("/{file_id}")
def delete_file(file_id: str, services: Served, tenant: Tenant) -> dict[str, Any]:
    """Deletes a file that no unfinished job uses."""
    services.files.delete(tenant, file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_object(record: FileRecord) -> dict[str, Any]:
    """A file as OpenAI's clients expect it."""
    return {
        "id": record.id, "object": "file", "bytes": record.bytes, "created_at": record.created_at, "expires_at": None,
        "filename": record.filename, "purpose": record.purpose, "status": "processed", "status_details": None,
    }


async def _read_form(request: Request, max_file_bytes: int) -> FormData:
    """The body, read to its end or to its limit. Raises InvalidRequest, TooLarge, CapacityError, ClientDisconnect."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data":
        raise InvalidRequest("content-type: a file is sent as multipart/form-data", param="file")
    if options.get(b"charset", b"utf-8").lower() != b"utf-8":
        raise InvalidRequest("a form is sent in UTF-8")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise InvalidRequest("an upload with a content-encoding isn't supported; send it uncompressed", param="file")
    limit = max_file_bytes + _FORM_BYTES
    too_large = TooLarge(f"file: more than {max_file_bytes} bytes, the most that a file may have", param="file")
    if announced_bytes(request.headers) > limit:
        raise too_large
    received, loop = 0, asyncio.get_running_loop()

    async def receive() -> Message:  # on the thread's loop
        nonlocal received
        message = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(_next(request), loop))
        received += len(message.get("body", b""))
        if received > limit:
            raise too_large
        return message

    async def parse() -> FormData:
        return await Request(request.scope, receive).form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_FORM_BYTES)

    try:
        with storage_errors():  # the parser keeps large parts in temporary files
            return await loop.run_in_executor(_threads(), lambda: asyncio.run(parse()))
    except HTTPException as error:
        raise InvalidRequest(f"the multipart body can't be read: {error.detail}") from error


async def _next(request: Request) -> Message:
    return await request.receive()


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Where forms are parsed, byte by byte in Python: one for each upload, as it waits for its client."""
    return ThreadPoolExecutor(_MAX_PARSERS, "coserve-upload")


def _read_fields(form: FormData) -> tuple[UploadFile, str]:
    """File and purpose. Raises InvalidRequest for a field that is missing, unknown, given twice or of no effect."""
    given = [name for name, _ in form.multi_items()]
    for name, value in form.multi_items():
        if name in _EXPIRY:
            if value not in ("", "null"):
                raise InvalidRequest(f"{name}: isn't supported; files are kept until they are deleted", param="expires_after")
        elif name not in ("file", "purpose"):
            raise InvalidRequest(f"{name[:64]}: unknown field; known: file, purpose", param=name[:64])
        elif given.count(name) > 1:
            raise InvalidRequest(f"{name}: is given more than once", param=name)
    for name in ("file", "purpose"):
        if name not in given:
            raise InvalidRequest(f"{name}: is missing", param=name)
    file, purpose = form["file"], form["purpose"]
    if not isinstance(file, UploadFile):
        raise InvalidRequest("file: must be a file, with a file name", param="file")
    if not isinstance(purpose, str):
        raise InvalidRequest("purpose: must be a text", param="purpose")
    return file, purpose
