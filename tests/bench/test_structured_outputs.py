"""bench/structured_outputs.py: random schemas through the engine, and the command itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import jsonschema
import pytest
from random_schemas import REFUSED, SchemaMaker, large_schema
from structured_outputs import mistake, reason_of

from coserve.config.settings import SamplingConfig
from coserve.core import InvalidRequest
from coserve.engine.requests import RequestHandle
from coserve.grammar import json_schema
from coserve.grammar.matcher import Grammars
from coserve.runtime.loaded import LoadedModel
from coserve.text.tokenizer import ChatTokenizer
from tests.default_model import needs_default_model
from tests.tiny_engine import MakeEngine, drive, prompt

COMMAND = Path(__file__).parents[2] / "bench" / "structured_outputs.py"


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_that_cannot_be_enforced_is_refused_by_name(tokenizer: ChatTokenizer, keyword: str) -> None:
    """Nested too. minContains and maxContains only say how contains counts."""
    grammars = Grammars(tokenizer, tokenizer.vocab_size)
    for schema in (REFUSED[keyword], {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, REFUSED[keyword]]}}}):
        with pytest.raises(InvalidRequest, match="can't be enforced") as refused:
            grammars.new_matchers(json_schema(schema), 1)
        assert keyword in str(refused.value)


def test_answers_to_random_schemas_match(engines: MakeEngine, model: LoadedModel) -> None:
    """As in the command, on the tests' model and in its batches."""
    engine, maker = engines(), SchemaMaker(Random(5))
    closing = {token: 4.0 for text in '"}]' for token in model.tokenizer.encode(text)}
    asked: list[tuple[object, RequestHandle]] = []
    refused = 0
    for number in range(60):
        schema = maker.make()
        config = SamplingConfig(max_tokens=150, temperature=1.0, seed=number, grammar=json_schema(schema), logit_bias=closing)
        try:
            asked.append((schema, engine.submit(prompt(9), config)))
        except InvalidRequest:
            refused += 1
    drive(engine, seconds=120)
    ended = [(schema, handle) for schema, handle in asked if handle.finish_reason == "stop"]
    assert len(ended) > 30 and refused < 20
    assert [mistake(handle.text, schema) for schema, handle in ended] == [None] * len(ended)
    assert all(handle.error is None for _, handle in asked)


def test_schemas_are_the_same_for_a_seed_and_valid() -> None:
    first, second = SchemaMaker(Random(3)), SchemaMaker(Random(3))
    made = [first.make() for _ in range(100)]
    assert made == [second.make() for _ in range(100)]
    for schema in [*made, large_schema(0)]:
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(made)
    for keyword in ("anyOf", "allOf", "oneOf", "$ref", "const", "enum", "pattern", "format", "prefixItems", "multipleOf",
                    "patternProperties", "exclusiveMinimum", "maxProperties", "minItems"):
        assert f'"{keyword}"' in text


def test_mistakes_are_found() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "ipv4"}}, "required": ["a"]}
    assert mistake('{"a": "1.2.3.4"}', schema) is None
    for text in ("{}", '{"a": 1}', '{"a": "1.2.3"}', "{", '{"a": "1.2.3.4"} x'):
        assert mistake(text, schema) is not None
    assert reason_of(InvalidRequest("grammar: the schema's not can't be enforced; leave it out")) == \
        "the schema's not can't be enforced"


@pytest.mark.full
@needs_default_model
@pytest.mark.timeout(900)
def test_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(COMMAND), "--quick", "--threads", "1", "--output", str(tmp_path / "found.json")],
        capture_output=True, text=True, check=False, timeout=850,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["ignored_keywords"] == [] and found["tiny"]["ends"]["stop"] > 20
    assert set(found["overhead"]["iteration_ms"]) == {"none", "schema", "any text"}
    assert set(found["beside"]["itl_ms"]) == {"none", "schemas"}
