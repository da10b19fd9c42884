"""The OpenAPI document lists every route with the fields and parameters that it takes."""

from __future__ import annotations

import inspect
from typing import Any

import fastapi.routing
import pytest

from coserve.server.app import create_app
from coserve.server.inference.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from coserve.server.jobs.body import CreateJob
from coserve.server.responses.body import CreateResponse
from coserve.server.routes.adapters import LoadAdapterBody, UnloadAdapterBody
from coserve.server.settings import ServerConfig

UNLISTED = {
    ("GET", "/openapi.json"), ("HEAD", "/openapi.json"),  # the document itself
    ("GET", "/"), ("HEAD", "/"), ("GET", "/page/{path}"), ("HEAD", "/page/{path}"),  # the page, for browsers
    ("POST", "/ping"),  # as GET; some load balancers use it
}
BODIES = {
    "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest, "/v1/fine_tuning/jobs": CreateJob, "/v1/fine_tuning/jobs/check": CreateJob,
    "/v1/load_lora_adapter": LoadAdapterBody, "/v1/unload_lora_adapter": UnloadAdapterBody,
    "/v1/responses": CreateResponse,
}
APP = create_app(ServerConfig())
DOCUMENT: dict[str, Any] = APP.openapi()
OPERATIONS = [(method.upper(), path) for path, operations in DOCUMENT["paths"].items() for method in operations]


def operation(method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["paths"][path][method.lower()]
    return found


def routes() -> dict[tuple[str, str], Any]:
    """By method and path, the path as the document writes it."""
    walk = getattr(fastapi.routing, "iter_route_contexts", list)  # older ones have all routes in one list
    return {
        (method, route.path.replace(":path}", "}")): route for route in walk(APP.routes) for method in route.methods or ()
    }


def schema_of(method: str, path: str, kind: str = "application/json") -> dict[str, Any]:
    schema = operation(method, path)["requestBody"]["content"][kind]["schema"]
    if "$ref" in schema:
        schema = DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    found: dict[str, Any] = schema
    return found


def test_every_route_is_listed_or_known_not_to_be() -> None:
    served = set(routes())
    assert len(served) > 25
    assert served - set(OPERATIONS) == UNLISTED
    assert set(OPERATIONS) <= served


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_parameters_and_answers_of_a_route(method: str, path: str) -> None:
    shown = operation(method, path)
    assert shown.get("summary") or shown.get("description")
    assert "422" not in shown["responses"], "wrong requests get 400"
    error = shown["responses"]["default"]["content"]["application/json"]["schema"]["properties"]["error"]
    assert set(error["properties"]) == {"message", "type", "param", "code"}
    route = routes()[method, path]
    taken = set(inspect.signature(route.endpoint).parameters) - {"request", "services", "tenant", "body", "response"}
    listed = {parameter["name"] for parameter in shown.get("parameters", ())}
    assert listed - {"metadata"} == taken  # metadata[KEY] is read by hand


@pytest.mark.parametrize("path", BODIES)
def test_fields_of_a_body(path: str) -> None:
    schema = schema_of("POST", path)
    fields = BODIES[path].model_fields
    assert set(schema["properties"]) == set(fields)
    assert set(schema.get("required", ())) == {name for name, field in fields.items() if field.is_required()}
    assert schema["additionalProperties"] is False


def test_every_post_says_what_it_takes() -> None:
    for method, path in OPERATIONS:
        takes = "requestBody" in operation(method, path)
        assert takes == (path in BODIES or path == "/v1/files") if method == "POST" else not takes, (method, path)
    assert set(schema_of("POST", "/v1/files", "multipart/form-data")["properties"]) == {"file", "purpose"}


def test_keys_are_asked_for_where_they_are() -> None:
    (scheme,) = DOCUMENT["components"]["securitySchemes"].items()
    assert scheme[0] == "key" and (scheme[1]["type"], scheme[1]["scheme"]) == ("http", "bearer")
    for method, path in OPERATIONS:
        asked = operation(method, path).get("security")
        assert asked == (None if path in ("/health", "/ping", "/version", "/metrics") else [{"key": []}]), (method, path)


def test_the_jobs_filter_is_listed() -> None:
    names = [parameter["name"] for parameter in operation("GET", "/v1/fine_tuning/jobs")["parameters"]]
    assert sorted(names) == ["after", "limit", "metadata"]
