"""Every error as OpenAI's body: {"error": {message, type, param, code}}. Statuses of our own errors are in errors.py."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from coserve.core import CoserveError
from coserve.server.bodies.forms import explain
from coserve.server.errors import RETRY_AFTER_S, Unauthorized, error_body, status_of

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"default": {
    "description": (
        "An error. 400: the request is wrong, in the field `param`; 401: no known key; 403: not with these settings; 404: no "
        "such thing of yours; 409: not in its present state; 413, 415: the body; 429, 503: try again later"
    ),
    "content": {"application/json": {"schema": {
        "type": "object", "required": ["error"], "properties": {"error": {
            "type": "object", "required": ["message", "type", "param", "code"], "properties": {
                "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }},
    }}},
}}
"""What every route may answer, for the OpenAPI document."""
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


def plain_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The body of an error that has no class of its own."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": _CODES.get(status)}}


async def on_coserve_error(request: Request, error: Exception) -> Response:
    """The response to one of our own errors."""
    assert isinstance(error, CoserveError)
    return error_response(error)


def error_response(error: CoserveError) -> Response:
    """The same, where there is no request to speak of."""
    status, headers = status_of(error), {}
    if status in (429, 503):
        headers["retry-after"] = str(RETRY_AFTER_S)
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers=headers)


async def on_invalid_request(request: Request, error: Exception) -> Response:
    """A query parameter that FastAPI refuses. Bodies are not read by FastAPI (bodies/reader.py)."""
    assert isinstance(error, RequestValidationError)
    errors = [{**item, "loc": item["loc"][1:]} for item in error.errors()]  # without "query"
    return await on_coserve_error(request, explain(errors, dict(request.query_params), lambda path, item: str(item["msg"])))


async def on_http_error(request: Request, error: Exception) -> Response:
    """The response where there is no such route, or not with this method, or where a body breaks off."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:300]}"
    known = {404: f"there is no {where}", 405: f"{where}: this route takes other methods"}
    message = known.get(error.status_code, error.detail)
    return JSONResponse(plain_body(error.status_code, message), error.status_code, headers=error.headers)


def install_handlers(app: FastAPI) -> None:
    """Adds these handlers to an application."""
    app.add_exception_handler(CoserveError, on_coserve_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_exception_handler(HTTPException, on_http_error)
