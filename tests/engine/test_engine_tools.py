"""Calls that the engine enforces on a model of random weights, which would never write one by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coserve.chat.toolformats.events import ArgumentsEvent, CallEvent, TextEvent
from coserve.chat.toolformats.formats import FORMATS
from coserve.chat.toolformats.grammar import call_grammar, enforced
from coserve.config.settings import SamplingConfig
from coserve.runtime.loaded import LoadedModel
from tests.tiny_engine import assert_nothing_left, build_model, make_engine

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "required": ["city", "exact"], "additionalProperties": False,
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "exact": {"type": "boolean"}},
    }}},
    {"type": "function", "function": {"name": "get_time"}},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_calls_of_the_tools(model: LoadedModel, name: str) -> None:
    grammar = call_grammar(name, [enforced(tool, schema=True) for tool in TOOLS], {}, required=True, parallel=False)
    engine = make_engine(model)
    settings = [SamplingConfig(max_tokens=300, temperature=1.0, seed=seed, grammar=grammar) for seed in range(4)]
    outputs = [engine.generate([[5, 6, 7]], one)[0] for one in settings]
    called = set()
    for output in outputs:
        assert output.finish_reason == "stop", output.text
        reader = FORMATS[name].new_strict_reader(TOOLS)
        events = [*reader.push(output.text), *reader.finish()]
        assert not any(isinstance(event, TextEvent) for event in events), output.text
        [call] = [event.name for event in events if isinstance(event, CallEvent)]
        arguments = json.loads("".join(event.text for event in events if isinstance(event, ArgumentsEvent)))
        if call == "get_weather":
            assert arguments["city"] in ("Oslo", "Rome")
            assert isinstance(arguments["exact"], bool)
        else:
            assert (call, arguments) == ("get_time", {})
        called.add(call)
    assert called <= {"get_weather", "get_time"}
    assert_nothing_left(engine)
    engine.close()


def test_a_special_token_that_is_shown(model: LoadedModel) -> None:
    """Its name is in the text, and a stop string may still name it."""
    tokenizer = model.tokenizer
    start = tokenizer.special_tokens["<|im_start|>"]
    engine = make_engine(model)
    grammar = f'start: "a" <[{start}]> "b"\n'
    settings = [SamplingConfig(max_tokens=8, grammar=grammar, shown_special_ids=ids) for ids in ((), (start,))]
    hidden, shown = (engine.generate([[5]], one)[0] for one in settings)
    assert (hidden.text, shown.text) == ("ab", "a<|im_start|>b")
    for ids in ((), (start,)):
        stopped = engine.generate(
            [[5]], SamplingConfig(max_tokens=8, grammar=grammar, shown_special_ids=ids, stop=("a<|im_start|>",))
        )[0]
        assert (stopped.text, stopped.finish_reason) == ("", "stop")
    engine.close()


def test_the_files_of_a_model_may_name_markers_as_special_tokens(tmp_path: Path) -> None:
    """As Mistral's do: then a grammar names them by their ids."""
    model = build_model(tmp_path)
    special = {"[TOOL_CALLS]": model.tokenizer.special_tokens["<|im_start|>"]}
    grammar = call_grammar("mistral", [enforced(TOOLS[1], schema=True)], special, required=True, parallel=False)
    engine = make_engine(model)
    sampling = SamplingConfig(max_tokens=99, grammar=grammar, shown_special_ids=tuple(special.values()))
    output = engine.generate([[5]], sampling)[0]
    assert output.text.replace("[ [", "[[").replace("> [", ">[") == '<|im_start|>[{"name": "get_time", "arguments": {}}]'
    engine.close()
