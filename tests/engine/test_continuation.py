"""Outputs that go on behind ids which another engine has given: they equal the uninterrupted ones, wherever those are cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from coserve.config.settings import SamplingConfig, SchedulerConfig
from coserve.core import InvalidRequest, Slo
from coserve.engine.engine import Engine
from coserve.engine.requests import Chunk, RequestHandle
from coserve.grammar import choice, json_schema
from coserve.runtime.loaded import LoadedModel
from coserve.scheduler.prefix import PrefixKey
from coserve.scheduler.requests import RequestState
from coserve.server.link.enginehost import EngineHost
from coserve.server.link.messages import Failed, FromEngine, Generate, Tokens
from tests.tiny_engine import MakeEngine, drive, make_engine, prompt, random_adapter

GREEDY = SamplingConfig(max_tokens=20, temperature=0, ignore_eos=True)
DRAWN = replace(GREEDY, temperature=1.3, seed=11)
END = 2
IDS = prompt(21)
CASES: dict[str, SamplingConfig] = {
    "greedy": GREEDY,
    "drawn": replace(DRAWN, top_p=0.9, top_k=50, min_p=0.01, logprobs=2),
    "penalized": replace(
        DRAWN, presence_penalty=0.5, frequency_penalty=1.0, repetition_penalty=1.4, logit_bias={50: 4.0, 60: 4.0}),
    "ends at its least length": replace(DRAWN, ignore_eos=False, min_tokens=9, logit_bias={END: 100.0}),
    "several": replace(DRAWN, n=3, ignore_eos=False, logit_bias={END: 3.0}, logprobs=0),
    "prompt logprobs": replace(DRAWN, n=2, prompt_logprobs=1, ignore_eos=False, logit_bias={END: 3.0}),
    "choice": replace(DRAWN, ignore_eos=False, grammar=choice(["Straße 🙂🙂|hello world", "Straße 🙂中|quick brown"])),
    "schema": replace(DRAWN, ignore_eos=False, max_tokens=40, min_tokens=5, n=2, grammar=json_schema({
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"], "additionalProperties": False,
    })),
}


@pytest.fixture(scope="module")
def engine(model: LoadedModel) -> Iterator[Engine]:
    """It keeps no prefixes, so that what goes on is computed anew."""
    made = make_engine(model, prefix_caching=False)
    yield made
    made.close()


@pytest.fixture(scope="module")
def letters(model: LoadedModel) -> SamplingConfig:
    """Outputs of letters only."""
    spelled = ((i, model.tokenizer.decode([i])) for i in range(model.tokenizer.vocab_size))
    return replace(DRAWN, logit_bias={i: 100.0 for i, text in spelled if text.isascii() and text.isalpha()})


class Told:
    """What a listener is told of a request, chunk by chunk."""

    def __init__(self, handle: RequestHandle) -> None:
        self.handle, self.chunks = handle, list[Chunk]()
        handle.listen(self.chunks.append)


def run(engine: Engine, asks: Sequence[dict[str, Any]]) -> list[Told]:
    """Requests that run together."""
    told = [Told(engine.submit(**ask)) for ask in asks]
    drive(engine)
    return told


def given_by(chunks: Sequence[Chunk], n: int) -> list[list[int]]:
    return [[token for chunk in chunks if chunk.index == index for token in chunk.token_ids] for index in range(n)]


def assert_goes_on(whole: Sequence[Chunk], cut: int, rest: Sequence[Chunk], n: int) -> None:
    """The chunks of each output are those behind the cut; one that had ended only ends again."""
    for index in range(n):
        past, expected, found = (
            [chunk for chunk in chunks if chunk.index == index] for chunks in (whole[:cut], whole[cut:], rest))
        if past and past[-1].finish_reason:
            assert found == [Chunk(index, "", finish_reason=past[-1].finish_reason)]
            continue
        assert [chunk._replace(logprobs=()) for chunk in found] == [chunk._replace(logprobs=()) for chunk in expected]
        for one, other in zip(found, expected, strict=True):
            assert [entry.token for entry in one.logprobs] == [entry.token for entry in other.logprobs]
            for entry, same in zip(one.logprobs, other.logprobs, strict=True):
                assert entry.logprob == pytest.approx(same.logprob, abs=1e-4)
                assert [token for token, _ in entry.top] == [token for token, _ in same.top]


def check(
    engine: Engine, sampling: SamplingConfig, *, step: int = 1, other: Engine | None = None, **options: Any
) -> list[Chunk]:
    """Cuts a request's stream at every `step`-th chunk, and has `other` go on from there. Returns the uninterrupted chunks."""
    whole = run(engine, [{"prompt": IDS, "sampling": sampling, **options}])[0]
    assert whole.handle.error is None
    cuts = range(0, len(whole.chunks) + 1, step)
    asks = [
        {"prompt": IDS, "sampling": sampling, "emitted": given_by(whole.chunks[:cut], sampling.n), **options} for cut in cuts
    ]
    for cut, told in zip(cuts, run(other or engine, asks), strict=True):
        assert told.handle.error is None
        assert_goes_on(whole.chunks, cut, told.chunks, sampling.n)
        had_ended = any(chunk.finish_reason for chunk in whole.chunks[:cut])
        expected = [] if had_ended else whole.handle.prompt_logprobs
        assert [entry.token for entry in told.handle.prompt_logprobs] == [entry.token for entry in expected]
        for entry, same in zip(told.handle.prompt_logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(same.logprob, abs=1e-4)
    return whole.chunks


@pytest.mark.parametrize("name", ["drawn", "penalized", "several", "choice"])
def test_some_cuts(engine: Engine, name: str) -> None:
    check(engine, CASES[name], step=7)


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_every_cut(engine: Engine, name: str, temperature: float) -> None:
    check(engine, replace(CASES[name], temperature=temperature))


@pytest.mark.full
def test_every_cut_with_chunks_and_little_memory(model: LoadedModel, engine: Engine) -> None:
    """The engine that goes on has little memory, and 7 rows to an iteration."""
    other = make_engine(model, num_blocks=6, share=0.99, scheduler=SchedulerConfig(max_num_batched_tokens=7))
    chunks = check(engine, CASES["several"], other=other)
    assert len(chunks) > 20
    check(engine, CASES["prompt logprobs"], other=other)
    other.close()


@pytest.mark.parametrize("start", [pytest.param(0, marks=pytest.mark.full), 3, pytest.param(9, marks=pytest.mark.full)])
def test_a_stop_string_across_the_cut(engine: Engine, letters: SamplingConfig, start: int) -> None:
    text = "".join(chunk.text for chunk in check(engine, letters, step=21))
    stop = text[start : start + 6]
    chunks = check(engine, replace(letters, stop=("?!", stop)))
    assert "".join(chunk.text for chunk in chunks) == text[: text.index(stop)] and chunks[-1].finish_reason == "stop"


def test_text_that_was_held_back_comes_behind_the_cut(engine: Engine, letters: SamplingConfig) -> None:
    text = "".join(chunk.text for chunk in check(engine, letters, step=21))
    chunks = check(engine, replace(letters, stop=(text[4:] + "?",)), step=4)
    assert "".join(chunk.text for chunk in chunks) == text and chunks[-1].text


def test_a_stop_token_and_an_end_before_the_least_length(engine: Engine) -> None:
    plain = check(engine, DRAWN, step=21)
    token = plain[7].token_ids[0]
    assert check(engine, replace(DRAWN, stop_token_ids=(token,)))[-1].finish_reason == "stop"
    patient = check(engine, CASES["ends at its least length"], step=3)
    assert len(given_by(patient, 1)[0]) == 10 and patient[-1].finish_reason == "stop"


def test_an_adapter_and_the_prefix_cache(engines: MakeEngine, model: LoadedModel) -> None:
    """The cache may have more than the prompt; cached_tokens counts the prompt's."""
    engine = engines()
    engine.add_adapter("a", random_adapter(model, 4))
    with_adapter = check(engine, DRAWN, step=9, adapter="a")
    assert given_by(with_adapter, 1) != given_by(check(engine, DRAWN, step=20), 1)
    long = replace(DRAWN, max_tokens=60)
    ids = given_by(check(engine, long, step=61), 1)
    again = run(engine, [{"prompt": IDS, "sampling": long, "emitted": [ids[0][:50]]}])[0].handle
    assert again.token_ids == ids[0][50:] and again.cached_tokens == len(IDS) and again.begun_s is not None


def test_what_cannot_be_gone_on_with(engine: Engine) -> None:
    grammar = CASES["choice"]
    for sampling, emitted in (
        (GREEDY, [[5], [6]]), (GREEDY, [[-1]]), (GREEDY, [[engine.model.architecture.vocab_size]]), (GREEDY, [[5] * 21]),
    ):
        with pytest.raises(InvalidRequest, match="emitted"):
            engine.submit(IDS, sampling, emitted=emitted)
    for ids in ([5], [5, 6, 7]):
        handle = engine.submit(IDS, grammar, emitted=[ids])
        drive(engine)
        assert isinstance(handle.error, InvalidRequest) and handle.finish_reason == "error"


def test_deadlines_go_on_from_the_first_new_token() -> None:
    """As if the tokens before had been in time: neither late at once, nor with the slack of all of them."""
    never = math.inf
    for objectives, due_s in ((Slo(tpot_s=0.5, ttft_s=2.0), 10.5), (Slo(never, 2.0), never), (Slo(never, never), never)):
        state = RequestState(
            id=1, tenant="", prompt=IDS, max_tokens=20, key=PrefixKey("", None, 0), arrival_s=3.0, tpot_s=objectives.tpot_s,
            ttft_s=objectives.ttft_s, given=4, output=[5, 6, 7, 8],
        )
        assert state.deadline_s == 3.0 + objectives.ttft_s
        state.output.append(9)
        state.begin_tokens(10.0)
        assert state.deadline_s == due_s


def test_an_engine_process_goes_on(engine: Engine) -> None:
    """Through its messages: new ids and text only; outputs that had ended end once more; no request stays behind."""
    sampling = CASES["several"]
    whole = run(engine, [{"prompt": IDS, "sampling": sampling}])[0].chunks
    cut = next(place for place, chunk in enumerate(whole) if chunk.finish_reason) + 1
    posts: list[FromEngine] = []
    host = EngineHost(engine, posts.append, lambda: None)
    for name, emitted in (("part", given_by(whole[:cut], 3)), ("all", given_by(whole, 3)), ("wrong", [[1]])):
        host.on_message(Generate(id=name, prompt_ids=IDS, sampling=sampling, arrival_s=engine.now(), emitted=emitted))
    drive(engine)
    host.close()
    tokens = {name: [post for post in posts if isinstance(post, Tokens) and post.id == name] for name in ("part", "all")}
    chunks = [Chunk(post.index, post.text, tuple(post.token_ids), (), post.finish_reason) for post in tokens["part"]]
    assert_goes_on([chunk._replace(logprobs=()) for chunk in whole], cut, chunks, 3)
    assert [post.begun_s is not None for post in tokens["part"]].count(True) == 1, "the first with a token"
    assert [(post.index, post.text, post.token_ids) for post in tokens["all"]] == [(index, "", []) for index in range(3)]
    assert all(post.finish_reason for post in tokens["all"])
    assert [post.id for post in posts if isinstance(post, Failed)] == ["wrong"]
    assert not host._requests
