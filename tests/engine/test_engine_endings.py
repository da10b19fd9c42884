"""How outputs of a real engine end: without a token, by stop strings with special tokens, not before min_tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coserve.config.settings import SamplingConfig
from coserve.core import ContextExceeded
from coserve.runtime.loaded import LoadedModel
from coserve.text.detokenizer import IncrementalDetokenizer
from tests.tiny_engine import MakeEngine, prompt

GREEDY = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True)
IDS = prompt(20)


@pytest.mark.parametrize("n", [1, 2])
def test_a_prompt_is_scored_without_a_token(engines: MakeEngine, n: int) -> None:
    engine = engines()
    whole = engine.generate([IDS], replace(GREEDY, max_tokens=1, prompt_logprobs=3, n=n))[0]
    scored = engine.generate([IDS], replace(GREEDY, max_tokens=0, prompt_logprobs=3, logprobs=3, n=n))[0]
    assert scored.prompt_logprobs == whole.prompt_logprobs
    assert len(scored.prompt_logprobs) == len(IDS) - 1
    for output in scored.outputs:
        assert (output.token_ids, output.logprobs, output.text, output.finish_reason) == ([], [], "", "length")
    chunks = list(engine.stream(IDS, replace(GREEDY, max_tokens=0)))
    assert [(chunk.text, chunk.token_ids, chunk.finish_reason) for chunk in chunks] == [("", (), "length")]
    engine.blocks.check_integrity()


def test_a_scored_prompt_may_fill_the_context(engines: MakeEngine, model: LoadedModel) -> None:
    engine, limit = engines(), model.architecture.max_position_embeddings
    full = prompt(limit)
    with pytest.raises(ContextExceeded):
        engine.submit(full, replace(GREEDY, max_tokens=1))
    with pytest.raises(ContextExceeded):
        engine.submit(prompt(limit + 1), replace(GREEDY, max_tokens=0))
    scored = engine.generate([full], replace(GREEDY, max_tokens=0, prompt_logprobs=0))[0]
    assert len(scored.prompt_logprobs) == limit - 1


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_a_stop_string_that_is_a_special_token(engines: MakeEngine, ignore_eos: bool) -> None:
    engine = engines()
    tokenizer = engine.model.tokenizer
    (start,) = tokenizer.encode("<|im_start|>")
    assert start not in engine.model.architecture.eos_token_ids
    forced = replace(GREEDY, logit_bias={start: 100.0}, ignore_eos=ignore_eos, stop=("<|im_start|>",))
    handle = engine.generate([IDS], forced)[0]
    assert (handle.token_ids, handle.text, handle.finish_reason) == ([start], "", "stop")
    twice = engine.generate([IDS], replace(forced, stop=("<|im_start|>" * 3,)))[0]
    assert (twice.token_ids, twice.finish_reason) == ([start] * 3, "stop")
    patient = engine.generate([IDS], replace(forced, min_tokens=5))[0]
    assert (patient.token_ids, patient.finish_reason) == ([start] * 6, "stop")
    other = engine.generate([IDS], replace(forced, stop=("<|im_end|>",), max_tokens=4))[0]
    assert (other.token_ids, other.finish_reason) == ([start] * 4, "length")


def test_the_eos_may_complete_a_stop_string(engines: MakeEngine) -> None:
    engine = engines()
    eos = engine.model.architecture.eos_token_ids[0]
    text = engine.model.tokenizer.token_bytes[eos].decode()
    forced = replace(GREEDY, logit_bias={eos: 100.0}, ignore_eos=False, stop=(text,))
    handle = engine.generate([IDS], forced)[0]
    assert (handle.token_ids, handle.text, handle.finish_reason) == ([eos], "", "stop")


def test_min_tokens_holds_a_stop_string_back(engines: MakeEngine) -> None:
    engine = engines()
    only = replace(GREEDY, logit_bias={engine.model.tokenizer.encode("a")[0]: 100.0}, stop=("a",))
    assert engine.generate([IDS], only)[0].text == ""
    for min_tokens in (1, 5, 23):
        handle = engine.generate([IDS], replace(only, min_tokens=min_tokens))[0]
        assert (handle.text, handle.finish_reason) == ("a" * min_tokens, "stop")
        assert len(handle.token_ids) == min_tokens + 1
    whole = engine.generate([IDS], replace(only, min_tokens=24))[0]
    assert (whole.text, whole.finish_reason) == ("a" * 24, "length")


def test_text_goes_on_from_the_prompt(engines: MakeEngine) -> None:
    """A prompt that ends inside a character: the output has the whole of it."""
    engine = engines()
    ids = engine.model.tokenizer.encode("ab🦄")
    config = replace(GREEDY, max_tokens=1, logit_bias={ids[-1]: 100.0})
    handle = engine.generate([ids[:-1]], config)[0]
    assert handle.token_ids == [ids[-1]]
    assert handle.text == "🦄"
    stream = IncrementalDetokenizer(engine.model.tokenizer, context=ids[:-1])
    assert stream.push(ids[-1]) == "🦄"
