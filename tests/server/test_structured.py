"""Fields that say what an answer must match: what they mean, what is refused, and that trying a grammar holds up nobody."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest

from coserve.core import InvalidRequest
from coserve.grammar import check, choice, ebnf, json_object, json_schema, regex
from tests.server.fakes import ANSWER, MODEL, Script, send
from tests.server.malformed import TOO_MANY_PATTERNS, wrong_fields
from tests.server.sites import CHAT_PATH, HI, TEXT_PATH, Site

SCHEMA: dict[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"}}, "required": ["city"],
}
CLOSED = {**SCHEMA, "additionalProperties": False}
"""What it is taken for."""
GBNF = 'root ::= "yes" | "no"'
LARK = 'start: "yes" | "no"'
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "description": "A city.", "schema": SCHEMA, "strict": True}}


@pytest.fixture(scope="module", autouse=True)
def _little_time() -> Iterator[None]:
    """For one grammar, so that the tests are fast."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CPU_S", 0.5)
        yield


def schema_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


@pytest.mark.parametrize(("fields", "grammar"), [
    ({}, None), ({"response_format": None, "guided_json": None, "structured_outputs": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, json_object()),
    ({"response_format": FORMAT}, json_schema(CLOSED)),
    (schema_format(schema=SCHEMA, strict=False), json_schema(CLOSED)),
    ({"structured_outputs": {"json": SCHEMA}}, json_schema(CLOSED)),
    ({"structured_outputs": {"json": json.dumps(SCHEMA), "disable_fallback": True}}, json_schema(CLOSED)),
    ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, json_schema(CLOSED, compact=True)),
    ({"structured_outputs": {"json_object": True, "whitespace_pattern": "[ ]?"}}, json_object(whitespace_pattern="[ ]?")),
    ({"structured_outputs": {"regex": "a+", "json": None}}, regex("a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, choice(["a", "b"])),
    ({"structured_outputs": {"grammar": LARK}}, LARK), ({"structured_outputs": {"grammar": GBNF}}, ebnf(GBNF)),
    ({"guided_json": SCHEMA, "guided_decoding_backend": "auto"}, json_schema(CLOSED)),
    ({"guided_json": json.dumps(SCHEMA)}, json_schema(CLOSED)),
    ({"guided_json": SCHEMA, "guided_whitespace_pattern": "[ \\n]?"}, json_schema(CLOSED, whitespace_pattern="[ \\n]?")),
    ({"guided_regex": r"\d{3}"}, regex(r"\d{3}")), ({"guided_choice": ["yes"]}, choice(["yes"])),
    ({"guided_grammar": GBNF}, ebnf(GBNF)), ({"guided_grammar": LARK, "response_format": {"type": "text"}}, LARK),
    ({"json_schema": json.dumps(SCHEMA)}, json_schema(CLOSED)), ({"regex": "a|b"}, regex("a|b")), ({"ebnf": GBNF}, ebnf(GBNF)),
], ids=str)
def test_what_fields_mean(site: Site, fields: dict[str, Any], grammar: str | None) -> None:
    for path, body in ((CHAT_PATH, {"messages": HI}), (TEXT_PATH, {"prompt": ["Hi", "Ho"]})):
        reply = send(site.port, path, {**body, **fields})
        assert reply.status == 200, reply.text
    assert [asked.sampling.grammar for asked in site.engine.asked] == [grammar] * 3
    site.assert_counted(*["stop"] * 3)


def test_the_client_parses_its_models(site: Site) -> None:
    """openai's own way from a pydantic model to a schema."""
    class City(pydantic.BaseModel):
        name: str
        people: int | None = None

    site.engine.script.text = '{"name": "Oslo", "people": 700000}'
    reply = site.client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    assert reply.choices[0].message.parsed == City(name="Oslo", people=700000)
    grammar = site.engine.asked[0].sampling.grammar
    assert grammar is not None and json.loads(grammar.removeprefix("start: %json "))["required"] == ["name", "people"]
    site.engine.script.text = ANSWER


@pytest.mark.parametrize(("fields", "param", "words"), [
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex",
     "guided_regex: can't be combined with response_format"),
    ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex",
     "can't be combined with response_format.json_schema"),
    ({"structured_outputs": {"choice": ["a"], "json_object": True}}, "structured_outputs.json_object",
     "can't be combined with structured_outputs.choice"),
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "guided_json: the schema's uniqueItems can't be"),
    (schema_format(schema={"not": {}}), "response_format.json_schema.schema", "the schema's not can't be enforced"),
    (schema_format(name="x"), "response_format.json_schema.schema", "is missing"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    ({"response_format": {"type": "grammar"}}, "response_format.type", "should be 'text', 'json_object' or 'json_schema'"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "is not supported"),
    ({"structured_outputs": {}}, "structured_outputs", "asks for nothing"),
    ({"guided_choice": ["a", ""]}, "guided_choice[1]", "is empty"), ({"guided_regex": "("}, "guided_regex", "unclosed group"),
    ({"guided_grammar": "what"}, "guided_grammar", "is neither Lark (start: ...) nor GBNF (root ::= ...)"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "is for guided_json only"),
    ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "not supported yet"),
    ({"guided_json": TOO_MANY_PATTERNS}, "guided_json", "simplify it"),
], ids=str)
def test_what_is_refused(site: Site, fields: dict[str, Any], param: str, words: str) -> None:
    for stream in (False, True):
        for path, body in ((CHAT_PATH, {"messages": HI}), (TEXT_PATH, {"prompt": "Hi"})):
            reply = send(site.port, path, {**body, **fields, "stream": stream})
            assert (reply.status, reply.error["param"]) == (400, param), reply.text
            assert words in reply.error["message"]
    assert not site.engine.asked and not site.metrics.meters


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]])
def test_what_fails_on_the_way_is_named_too(site: Site, prompt: Any) -> None:
    """The engine names its own field."""
    site.engine.script = Script(error=InvalidRequest("grammar: no text can match it", param="grammar"))
    reply = send(site.port, TEXT_PATH, {"prompt": prompt, "regex": "a"})
    assert (reply.status, reply.error["param"], reply.error["message"]) == (400, "regex", "regex: no text can match it")
    site.engine.script = Script(error=InvalidRequest("prompt: is bad", param="prompt"))
    assert send(site.port, TEXT_PATH, {"prompt": prompt, "regex": "a"}).error["message"] == "prompt: is bad"
    assert {meter.ends[0] for meter in site.metrics.meters} <= {"error", "cancelled"}


def test_every_wrong_value_is_named(site: Site) -> None:
    """Those of malformed.py, which a real server gets too."""
    names = {"response_format", "structured_outputs", "json_schema", "regex", "ebnf"}
    count = 0
    for wrong in wrong_fields(MODEL):
        if wrong.path in (CHAT_PATH, TEXT_PATH) and (wrong.field in names or wrong.field.startswith("guided_")):
            reply = send(site.port, wrong.path, wrong.body)
            shown = (wrong.field, str(wrong.body.get(wrong.field))[:200], reply.text[:300])
            assert reply.status == wrong.status, shown
            assert (reply.error["param"] or "").startswith(wrong.field), shown
            count += 1
    assert count > 200


def test_trying_a_grammar_holds_up_nobody(site: Site) -> None:
    """While one that takes seconds is tried, other requests, with grammars and without, are answered."""
    slow = {"messages": HI, "guided_json": {**TOO_MANY_PATTERNS, "title": "slow"}}
    send(site.port, CHAT_PATH, {"messages": HI, "guided_regex": "warm"})
    replies: list[int] = []
    asking = threading.Thread(target=lambda: replies.append(send(site.port, CHAT_PATH, slow).status))
    began = time.monotonic()
    asking.start()
    quick = 0
    while asking.is_alive():
        assert send(site.port, CHAT_PATH, {"messages": HI, "guided_regex": f"quick{quick}"}).status == 200
        assert send(site.port, CHAT_PATH, {"messages": HI}).status == 200
        quick += asking.is_alive()
    asking.join()
    assert replies == [400]
    assert quick > 3, f"{quick} in {time.monotonic() - began:.1f} s"
    began = time.monotonic()
    assert send(site.port, CHAT_PATH, slow).status == 400
    assert time.monotonic() - began < 1, "it is remembered"
