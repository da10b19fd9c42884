"""What an answer must match: from a body's fields to a grammar that has been tried.

    response_format                  OpenAI's
    structured_outputs, guided_...   vLLM's
    json_schema, regex, ebnf         SGLang's

A request has at most one of them. Owns: what they mean. Does not own: their types (protocol.py), how a grammar is written and
tried (grammar/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from coserve.config.values import shown
from coserve.core import invalid_field
from coserve.grammar import choice, ebnf, json_object, json_schema, regex
from coserve.grammar.table import read_token_table
from coserve.server.inference.prompts import ThreadRunner
from coserve.server.inference.protocol import GenerationRequest, ResponseFormat, StructuredOutputs
from coserve.server.services import Services

_FIELDS = (
    "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "guided_whitespace_pattern", "json_schema", "regex", "ebnf",
)
_UNSUPPORTED = ("structural_tag", "disable_additional_properties")
"""Of structured_outputs."""


class AskedGrammar(NamedTuple):
    """field: which asks for it. make: writes the grammar, and raises InvalidRequest that names the field."""

    field: str
    make: Callable[[], str]


def response_grammar(body: GenerationRequest) -> str | None:
    """The grammar that a body's fields ask for; None if they ask for none. For large schemas it takes milliseconds. Raises
    InvalidRequest."""
    asked = _asked(body)
    return None if asked is None else asked.make()


def asked_field(body: GenerationRequest) -> str:
    """The field that asks for a grammar; `grammar` if none does."""
    asked = _asked(body)
    return "grammar" if asked is None else asked.field


async def tried_grammar(
    services: Services, run: ThreadRunner, body: GenerationRequest,
    compose: Callable[[str | None], str | None] | None = None, *, field: str = "grammar",
) -> str | None:
    """The grammar for a body, tried for the server's tokenizer; None if the answer may be anything.

    run: runs it in a thread. compose: makes the whole grammar of `response_grammar`'s, such as `grammar.after` does; in the
    thread too. field: is named in errors if no field of the body asks for a grammar. Raises InvalidRequest.
    """
    if compose is None and not asks_grammar(body):
        return None

    def make() -> str | None:
        asked = _asked(body)
        grammar = None if asked is None else asked.make()
        if compose is not None:
            grammar = compose(grammar)
        if grammar is not None:
            check_grammar(services, grammar, field if asked is None else asked.field)
        return grammar

    return await run(make)


def asks_grammar(body: GenerationRequest) -> bool:
    """Whether a field of the body may ask for a grammar."""
    return any(getattr(body, name) is not None for name in _FIELDS)


def check_grammar(services: Services, grammar: str, field: str) -> None:
    """Tries a grammar for the server's tokenizer, which takes some milliseconds. field: is named in errors. Raises
    InvalidRequest."""
    services.grammars.check(
        grammar, lambda: read_token_table(services.tokenizer, services.engine.info.vocab_size), field=field
    )


def _asked(body: GenerationRequest) -> AskedGrammar | None:
    """Raises InvalidRequest if there are two."""
    pattern = body.guided_whitespace_pattern
    if pattern is not None and body.guided_json is None:
        raise invalid_field("guided_whitespace_pattern", "is for guided_json only; leave it out")
    found = [asked for asked in _all_asked(body) if asked is not None]
    if len(found) > 1:
        raise invalid_field(found[1].field, f"can't be combined with {found[0].field}; leave one of them out")
    return found[0] if found else None


def _all_asked(body: GenerationRequest) -> Iterator[AskedGrammar | None]:
    if body.response_format is not None:
        yield _of_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_structured(body.structured_outputs)
    yield _of_schema("guided_json", body.guided_json, whitespace_pattern=body.guided_whitespace_pattern)
    yield _of_text("guided_regex", body.guided_regex, regex)
    yield _of_choice("guided_choice", body.guided_choice)
    yield _of_text("guided_grammar", body.guided_grammar, ebnf)
    yield _of_schema("json_schema", body.json_schema)
    yield _of_text("regex", body.regex, regex)
    yield _of_text("ebnf", body.ebnf, ebnf)


def _of_format(asked: ResponseFormat) -> AskedGrammar | None:
    given = asked.json_schema
    if given is not None and asked.type != "json_schema":
        raise invalid_field("response_format.json_schema", f"is for type json_schema only, and the type is {asked.type}")
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        return AskedGrammar("response_format", lambda: json_object(field="response_format"))
    field = "response_format.json_schema"
    if given is None:
        raise invalid_field(field, "is missing")
    if given.schema_ is None:
        raise invalid_field(f"{field}.schema", "is missing")
    return _of_schema(f"{field}.schema", given.schema_)


def _of_structured(asked: StructuredOutputs) -> Iterator[AskedGrammar | None]:
    for name in _UNSUPPORTED:
        if getattr(asked, name):
            raise invalid_field(f"structured_outputs.{name}", "is not supported; leave it out")
    pattern, compact = asked.whitespace_pattern, bool(asked.disable_any_whitespace)
    is_json = asked.json_ is not None or bool(asked.json_object)
    if pattern is not None and (compact or not is_json):
        field = "structured_outputs.whitespace_pattern"
        raise invalid_field(field, "is for json and json_object only, and not beside disable_any_whitespace")
    found = [
        _of_schema("structured_outputs.json", asked.json_, compact=compact, whitespace_pattern=pattern),
        _of_text("structured_outputs.regex", asked.regex, regex),
        _of_choice("structured_outputs.choice", asked.choice),
        _of_text("structured_outputs.grammar", asked.grammar, ebnf),
    ]
    if asked.json_object:
        field = "structured_outputs.json_object"
        found.append(AskedGrammar(field, lambda: json_object(field=field, compact=compact, whitespace_pattern=pattern)))
    if not any(found):
        raise invalid_field("structured_outputs", "asks for nothing; give json, regex, choice, grammar or json_object")
    yield from found


def _of_schema(field: str, schema: Any, *, compact: bool = False, whitespace_pattern: str | None = None) -> AskedGrammar | None:
    """A schema as an object or as JSON text. Those of response formats and guided decoding are never mere true or false."""
    if schema is None:
        return None
    if not isinstance(schema, dict | str):
        raise invalid_field(field, f"must be a JSON schema as an object, or its text, got {shown(schema)}")
    return AskedGrammar(
        field, lambda: json_schema(
            schema, field=field, compact=compact, whitespace_pattern=whitespace_pattern, listed_only=True
        )
    )


def _of_text(field: str, text: str | None, write: Callable[..., str]) -> AskedGrammar | None:
    return None if text is None else AskedGrammar(field, lambda: write(text, field=field))


def _of_choice(field: str, options: list[str] | None) -> AskedGrammar | None:
    return None if options is None else AskedGrammar(field, lambda: choice(options, field=field))
