"""Errors as OpenAI's clients expect them: the one place where an error gets an HTTP status."""

from __future__ import annotations

from typing import Any, NamedTuple

from coserve.core import CapacityError, ConfigError, ContextExceeded, CoserveError, InvalidRequest, JobFailed, NotFound
from coserve.server.link.messages import Problem


class Unauthorized(CoserveError):
    """No key, or one that isn't known."""


class Forbidden(CoserveError):
    """The server's settings don't allow it, or the thing isn't the tenant's own."""


class Conflict(CoserveError):
    """The present state of the thing doesn't allow it."""


class UnsupportedType(InvalidRequest):
    """A body of another content type than the route takes."""


class TooLarge(InvalidRequest):
    """A body or file over its limit."""


class EngineUnavailable(CoserveError, RuntimeError):
    """The engine's process is starting, has died, or is ending."""


class StorageRefused(CapacityError):
    """The disk, or the index's database, refuses for now."""


class _Kind(NamedTuple):
    error: type[CoserveError]
    status: int
    type: str
    code: str | None


_KINDS = (
    _Kind(Unauthorized, 401, "invalid_request_error", "invalid_api_key"),
    _Kind(Forbidden, 403, "invalid_request_error", "forbidden"),
    _Kind(NotFound, 404, "invalid_request_error", "not_found"),
    _Kind(Conflict, 409, "invalid_request_error", "conflict"),
    _Kind(TooLarge, 413, "invalid_request_error", "too_large"),
    _Kind(StorageRefused, 429, "rate_limit_error", "rate_limit_exceeded"),
    _Kind(UnsupportedType, 415, "invalid_request_error", "unsupported_media_type"),
    _Kind(CapacityError, 429, "rate_limit_error", "rate_limit_exceeded"),
    _Kind(EngineUnavailable, 503, "server_error", "engine_unavailable"),
    _Kind(ContextExceeded, 400, "invalid_request_error", "context_length_exceeded"),
    _Kind(InvalidRequest, 400, "invalid_request_error", None),
    _Kind(ConfigError, 400, "invalid_request_error", None),
    _Kind(JobFailed, 500, "server_error", "job_failed"),
)
RETRY_AFTER_S = 1
"""Seconds in the Retry-After header of every 429 and 503."""


def _kind(error: CoserveError) -> _Kind:
    return next((kind for kind in _KINDS if isinstance(error, kind.error)), _Kind(CoserveError, 500, "server_error", None))


def status_of(error: CoserveError) -> int:
    """The HTTP status."""
    return _kind(error).status


def error_body(error: CoserveError) -> dict[str, Any]:
    """{"error": {message, type, param, code}}, for a response or for the last event of a stream."""
    kind = _kind(error)
    is_model = isinstance(error, NotFound) and error.param in ("model", "adapter")  # the engine calls a model an adapter
    code = "model_not_found" if is_model else kind.code
    return {"error": {"message": str(error), "type": kind.type, "param": error.param, "code": code}}


def error_name(error: CoserveError) -> str:
    """The name of its class, to send to the other process, where `make_error` reads it."""
    return _kind(error).error.__name__


def make_error(problem: Problem) -> CoserveError:
    """The error that travelled; a CoserveError if the name of its class isn't known."""
    kinds = {kind.error.__name__: kind.error for kind in _KINDS}
    return kinds.get(problem.name, CoserveError)(problem.message, param=problem.param)
