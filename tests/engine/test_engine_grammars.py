"""Outputs that must match a grammar, in the engine: whatever else a request asks for, and whatever runs beside it.

What is allowed comes from languages that are written down, not from the library.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from coserve.config.settings import SamplingConfig, SchedulerConfig
from coserve.core import CoserveError, InvalidRequest
from coserve.engine.engine import Engine
from coserve.engine.generation import Generator
from coserve.grammar import after, choice, json_object, json_schema, regex
from coserve.grammar.matcher import GrammarMatcher
from coserve.runtime.loaded import LoadedModel
from tests.tiny_engine import MakeEngine, assert_nothing_left, drive, make_engine, prompt, random_adapter

GREEDY = SamplingConfig(max_tokens=60, temperature=0)
IDS = prompt(20)
WORDS = ["hello", "hello world", "Straße", "中国", "🙂🙂", "quick brown", "a\nb"]
LANGUAGE = [f"[{a}|{b}]" for a, b in itertools.product(WORDS, WORDS)]
ONE_OF = choice(LANGUAGE)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3}, "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags"], "additionalProperties": False,
}
DEAD_END = json_schema({
    "$defs": {"x": {"$ref": "#/$defs/x"}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"],
})
"""It compiles, and goes nowhere behind `{"a":`."""


def greedy_oracle(model: LoadedModel, ids: Sequence[int], texts: Sequence[str]) -> list[int]:
    """The likeliest token of those that go on with some text, until one text is there that no other goes on from."""
    generator, spelled = Generator(model), model.tokenizer.token_bytes
    left, tokens = [text.encode() for text in texts], []
    while left != [b""]:
        logits = generator.logits([*ids, *tokens])[-1]
        allowed = [token for token in range(model.tokenizer.vocab_size)
                   if token not in model.tokenizer.special_ids and any(rest.startswith(spelled[token]) for rest in left)]
        tokens.append(max(allowed, key=lambda token: float(logits[token])))
        left = [rest.removeprefix(spelled[tokens[-1]]) for rest in left if rest.startswith(spelled[tokens[-1]])]
    return tokens


@pytest.fixture(scope="module")
def best(model: LoadedModel) -> list[int]:
    """The greedy output of `ONE_OF`."""
    return greedy_oracle(model, IDS, LANGUAGE)


def test_greedy_takes_the_likeliest_token_that_is_allowed(engines: MakeEngine, model: LoadedModel, best: list[int]) -> None:
    engine = engines()
    handle = engine.generate([IDS], replace(GREEDY, grammar=ONE_OF, n=2))[0]
    for output in handle.outputs:
        assert (output.token_ids, output.finish_reason) == (best, "stop")
        assert output.text == model.tokenizer.decode(best) and output.text in LANGUAGE
    chunks = list(engine.stream(IDS, replace(GREEDY, grammar=ONE_OF)))
    assert [token for chunk in chunks for token in chunk.token_ids] == best
    assert "".join(chunk.text for chunk in chunks) == handle.text
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]


@pytest.mark.parametrize("settings", [
    {}, {"top_p": 0.8, "temperature": 2.0}, {"top_k": 5}, {"min_p": 0.2}, {"frequency_penalty": 1.5, "presence_penalty": 1.0},
    {"repetition_penalty": 1.5, "logit_bias": {5: 20.0, 300: 50.0}}, {"logprobs": 3}, {"ignore_eos": True},
], ids=str)
def test_whatever_is_asked_for_an_answer_matches(engines: MakeEngine, settings: dict[str, Any]) -> None:
    engine = engines()
    grammar = json_schema(SCHEMA)
    config = SamplingConfig(**{"temperature": 1.0, "max_tokens": 200, "n": 4, "seed": 5, "grammar": grammar, **settings})
    texts = set()
    for output in engine.generate([IDS], config)[0].outputs:
        assert output.finish_reason == "stop", output.text
        jsonschema.validate(json.loads(output.text), SCHEMA)
        assert "\n" not in output.text.replace("\\n", "")
        texts.add(output.text)
    assert len(texts) > 1


def test_an_answer_is_the_same_in_any_batch(engines: MakeEngine) -> None:
    """Alone, with others that have grammars, with others that have none, and in chunks of a prompt."""
    engine = engines(scheduler=SchedulerConfig(max_num_batched_tokens=32))
    config = SamplingConfig(temperature=1.0, max_tokens=100, n=2, seed=9, grammar=json_schema(SCHEMA), logprobs=2)
    alone = [output.token_ids for output in engine.generate([prompt(70)], config)[0].outputs]
    plain = SamplingConfig(temperature=1.0, max_tokens=40, seed=3, ignore_eos=True)
    plain_alone = engine.generate([IDS], plain)[0].token_ids
    others = [engine.submit(prompt(9 + n), replace(config, grammar=grammar, seed=n)) for n, grammar in enumerate(
        [ONE_OF, json_schema(SCHEMA), regex("(ab|c){3,50}"), json_object(), after("he", ONE_OF)]
    )]
    mine, beside = engine.submit(prompt(70), config), engine.submit(IDS, plain)
    drive(engine)
    assert [output.token_ids for output in mine.outputs] == alone
    assert beside.token_ids == plain_alone
    assert all(other.error is None for other in others)


def test_logprobs_are_of_all_tokens(engines: MakeEngine, model: LoadedModel, best: list[int]) -> None:
    handle = engines().generate([IDS], replace(GREEDY, grammar=ONE_OF, logprobs=2))[0]
    want = torch.log_softmax(Generator(model).logits([*IDS, *best]).double(), -1)
    for place, entry in enumerate(handle.outputs[0].logprobs):
        row = want[len(IDS) - 1 + place]
        assert entry.token == best[place] and entry.logprob == pytest.approx(float(row[best[place]]), abs=1e-4)
        assert [token for token, _ in entry.top] == row.topk(2).indices.tolist()


def test_stop_strings_end_it_too(engines: MakeEngine, model: LoadedModel, best: list[int]) -> None:
    text = model.tokenizer.decode(best)
    stop = text[3:6]
    handle = engines().generate([IDS], replace(GREEDY, grammar=ONE_OF, stop=(stop,)))[0]
    assert (handle.text, handle.finish_reason) == (text[: text.index(stop)], "stop")
    assert handle.token_ids == best[: len(handle.token_ids)]


def test_a_limit_comes_first(engines: MakeEngine, best: list[int]) -> None:
    engine = engines()
    handle = engine.generate([IDS], replace(GREEDY, grammar=ONE_OF, max_tokens=3))[0]
    assert (handle.token_ids, handle.finish_reason) == (best[:3], "length")
    scored = engine.generate([IDS], replace(GREEDY, grammar=ONE_OF, max_tokens=0, prompt_logprobs=0))[0]
    assert (scored.token_ids, scored.finish_reason, len(scored.prompt_logprobs)) == ([], "length", len(IDS) - 1)
    exact = engine.generate([IDS], replace(GREEDY, grammar=ONE_OF, max_tokens=len(best)))[0]
    assert (exact.token_ids, exact.finish_reason) == (best, "stop")


def test_how_it_ends(engines: MakeEngine, model: LoadedModel) -> None:
    """At an end token as soon as the grammar accepts, and not before; without one where nothing can follow."""
    engine, end = engines(), model.architecture.eos_token_ids[0]
    (a,) = model.tokenizer.encode("a")
    wants_to_end = replace(GREEDY, grammar=regex("a{3,5}"), logit_bias={end: 100.0, a: 50.0})

    def tokens(**settings: Any) -> tuple[list[int], str | None]:
        handle = engine.generate([IDS], replace(wants_to_end, **settings))[0]
        return handle.token_ids, handle.finish_reason

    assert tokens() == ([a, a, a, end], "stop")
    assert tokens(min_tokens=4) == ([a, a, a, a, end], "stop")
    assert tokens(min_tokens=50) == ([a] * 5, "stop"), "nothing can follow"
    assert tokens(ignore_eos=True) == ([a] * 5, "stop"), "it is no end token then, and no part of the text"
    assert tokens(ignore_eos=True, stop_token_ids=(end,)) == ([a, a, a, end], "stop")
    assert tokens(ignore_eos=True, grammar=regex("a{3,}"), max_tokens=9) == ([a] * 9, "length")
    (other,) = model.tokenizer.encode("b")
    assert tokens(stop_token_ids=(other,), logit_bias={other: 100.0, a: 50.0}) == ([a, a, a, other], "stop")
    assert tokens(stop_token_ids=(a,)) == ([a], "stop"), "an end token that the grammar lets through"
    assert tokens(stop_token_ids=(a,), min_tokens=2) == ([a], "stop"), "nothing else is left"


def test_a_taught_end_token_counts(engines: MakeEngine, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engines()
    engine.add_adapter("tuned", random_adapter(model, 4))
    monkeypatch.setattr(engine.adapters, "end_token_ids", lambda version: (77,))
    (a,) = model.tokenizer.encode("a")
    config = replace(GREEDY, grammar=regex("a{2,}"), logit_bias={77: 100.0, a: 50.0}, max_tokens=5)
    assert engine.generate([IDS], config, adapter="tuned")[0].token_ids == [a, a, 77]
    assert engine.generate([IDS], config)[0].token_ids == [a] * 5


def test_with_an_adapter(engines: MakeEngine, model: LoadedModel, best: list[int]) -> None:
    engine = engines()
    engine.add_adapter("tuned", random_adapter(model, 4, scale=1.0))
    config = replace(GREEDY, grammar=ONE_OF)
    tuned, base = engine.submit(IDS, config, adapter="tuned"), engine.submit(IDS, config)
    drive(engine)
    assert base.token_ids == best != tuned.token_ids
    assert tuned.text in LANGUAGE


def test_preemption_and_prefix_hits_change_nothing(engines: MakeEngine, model: LoadedModel) -> None:
    config = SamplingConfig(temperature=1.0, max_tokens=90, seed=2, grammar=json_schema(SCHEMA))
    expected = engines(prefix_caching=False).generate([prompt(40)], config)[0].token_ids
    engine = engines(num_blocks=10, share=1.0)
    first = engine.submit(prompt(40), config)
    others = [engine.submit(prompt(30 + n), replace(GREEDY, ignore_eos=True, max_tokens=24), arrival_s=first.arrival_s - 1)
              for n in range(3)]
    drive(engine)
    assert engine.metrics()["preemptions"] > 0 and all(other.finished for other in others)
    assert first.token_ids == expected
    again = engine.generate([prompt(40)], config)[0]
    assert again.cached_tokens > 0 and again.token_ids == expected


def test_a_request_whose_grammar_leads_nowhere_ends_alone(engines: MakeEngine, best: list[int]) -> None:
    engine = engines()
    other, plain = engine.submit(IDS, replace(GREEDY, grammar=ONE_OF)), engine.submit(prompt(9), replace(GREEDY, max_tokens=40))
    broken = engine.submit(IDS, replace(GREEDY, grammar=DEAD_END, n=3, temperature=1.0))
    drive(engine)
    assert isinstance(broken.error, InvalidRequest) and broken.error.param == "grammar"
    assert [output.finish_reason for output in broken.outputs] == ["error"] * 3
    assert other.token_ids == best and plain.finish_reason in ("stop", "length")
    assert not engine.closed and engine.grammars.in_use is False
    with pytest.raises(InvalidRequest, match="no text can match"):
        engine.generate([IDS], replace(GREEDY, grammar=DEAD_END))


def test_a_matcher_that_breaks_ends_its_request(engines: MakeEngine, monkeypatch: pytest.MonkeyPatch, best: list[int]) -> None:
    engine = engines()
    mask, calls = GrammarMatcher._mask, itertools.count()

    def breaks(matcher: GrammarMatcher, hold: bool) -> Any:
        if next(calls) == 2:
            raise ZeroDivisionError("a bug")
        return mask(matcher, hold)

    monkeypatch.setattr(GrammarMatcher, "_mask", breaks)
    with pytest.raises(CoserveError, match="a bug"):
        engine.generate([IDS], replace(GREEDY, grammar=ONE_OF))
    assert engine.generate([IDS], replace(GREEDY, grammar=ONE_OF))[0].token_ids == best


def test_a_wrong_grammar_is_refused_at_once(engines: MakeEngine) -> None:
    engine = engines()
    for grammar in ("start: (", json_schema({"not": {}}), ""):
        with pytest.raises(InvalidRequest, match=r"^grammar: "):
            engine.submit(IDS, replace(GREEDY, grammar=grammar))
    assert engine.idle


def test_cancelling(engines: MakeEngine) -> None:
    engine = engines()
    handle = engine.submit(IDS, replace(GREEDY, grammar=regex("a+"), max_tokens=400, n=2, ignore_eos=True))
    for _ in range(5):
        engine.step()
    handle.cancel()
    drive(engine)
    assert [output.finish_reason for output in handle.outputs] == ["cancelled"] * 2
    assert not engine.grammars.in_use


def test_threads_and_asyncio(model: LoadedModel, best: list[int]) -> None:
    """Many callers at once, on an engine with a thread, which they don't hold up."""
    config = replace(GREEDY, grammar=ONE_OF)
    with make_engine(model) as engine:
        found: list[list[int]] = []
        callers = [threading.Thread(target=lambda: found.append(engine.generate([IDS], config)[0].token_ids)) for _ in range(6)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert found == [best] * 6

        async def stream(engine: Engine) -> list[int]:
            return [token async for chunk in engine.astream(IDS, config) for token in chunk.token_ids]

        async def streams() -> list[list[int]]:
            return await asyncio.gather(*(stream(engine) for _ in range(4)))

        assert asyncio.run(streams()) == [best] * 4
    assert_nothing_left(engine)


def test_asyncio_that_gives_up_while_a_grammar_is_compiled(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is cancelled once it is there."""
    begun, go_on = threading.Event(), threading.Event()
    with make_engine(model) as engine:
        new_matchers = engine.grammars.new_matchers

        def slowly(grammar: str, count: int) -> list[GrammarMatcher]:
            begun.set()
            go_on.wait(10)
            return new_matchers(grammar, count)

        monkeypatch.setattr(engine.grammars, "new_matchers", slowly)

        async def give_up() -> None:
            stream = engine.astream(IDS, replace(GREEDY, grammar=regex("a+"), max_tokens=400, ignore_eos=True))
            first = asyncio.ensure_future(anext(stream))
            await asyncio.to_thread(begun.wait, 10)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            go_on.set()
            while engine.metrics()["requests_cancelled"] == 0:
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(give_up(), 20))
    assert_nothing_left(engine)


def test_requests_without_a_grammar_begin_no_thread(engines: MakeEngine) -> None:
    engine = engines()
    engine.generate([IDS], GREEDY)
    assert engine.grammars._threads is None and engine.grammars._table is None
