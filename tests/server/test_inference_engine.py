"""Inference over HTTP with a real engine on a tiny model: the same tokens as in-process, and nothing left behind."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from coserve.config.settings import SamplingConfig
from coserve.runtime.loaded import load_model
from tests.server.conftest import RunningServer, wait_until
from tests.server.sites import TEXT_PATH, post
from tests.tiny_engine import make_engine

PROMPT = "The quick brown fox"


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def name(server: RunningServer) -> str:
    return server.model_name


def num_running(server: RunningServer) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=30).text
    return sum(
        float(value) for value in re.findall(r"^coserve_num_requests_(?:running|waiting)\{[^}]*\} (\S+)$", text, re.MULTILINE)
    )


def test_greedy_text_is_the_engines(client: openai.OpenAI, name: str, tiny_model: Path) -> None:
    model = load_model(str(tiny_model), device="cpu", dtype="float32")
    engine = make_engine(model)
    ids = model.tokenizer.encode(PROMPT)
    expected = engine.generate([ids], SamplingConfig(max_tokens=40, temperature=0, ignore_eos=True))[0]
    chat_ids = model.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    expected_chat = engine.generate([chat_ids], SamplingConfig(max_tokens=20, temperature=0))[0]
    engine.close()
    for prompt in (PROMPT, ids):
        reply = client.completions.create(
            model=name, prompt=prompt, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}  # type: ignore[arg-type]
        )
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected.text, "length")
    chat = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=20, temperature=0
    )
    assert chat.choices[0].message.content == expected_chat.text
    assert chat.choices[0].finish_reason == expected_chat.finish_reason
    assert chat.usage is not None
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (len(chat_ids), len(expected_chat.token_ids))


def test_the_parts_of_a_latency_make_the_whole(client: openai.OpenAI, name: str, server: RunningServer) -> None:
    client.completions.create(model=name, prompt=[PROMPT, "Hello"], max_tokens=4, n=2)
    text = httpx.get(f"{server.url}/metrics", timeout=30).text

    def measured(what: str) -> float:
        found = re.search(rf"^coserve_{what}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        assert found, what
        return float(found[1])

    parts = [f"request_{part}_time_seconds" for part in ("queue", "prefill")]
    count = measured("time_to_first_token_seconds_count")
    assert count >= 2 and [measured(f"{part}_count") for part in parts] == [count, count]
    sums = [measured(f"{part}_sum") for part in parts]
    assert min(sums) > 0 and sum(sums) == pytest.approx(measured("time_to_first_token_seconds_sum"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_says_the_same(client: openai.OpenAI, name: str, temperature: float) -> None:
    settings = {"model": name, "prompt": ["Hello", PROMPT], "max_tokens": 32, "temperature": temperature, "seed": 5, "n": 2}
    whole = client.completions.create(**settings)  # type: ignore[call-overload]
    texts = [""] * 4
    for chunk in client.completions.create(**settings, stream=True):  # type: ignore[call-overload]
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert (texts[0] == texts[1]) == (temperature == 0)


def test_seeds(client: openai.OpenAI, name: str) -> None:
    def say(seed: int | None) -> str:
        return client.completions.create(model=name, prompt=PROMPT, max_tokens=24, seed=seed).choices[0].text

    assert say(3) == say(3)
    assert say(3) != say(4)
    assert len({say(None) for _ in range(3)}) == 3


def test_logprobs_agree_with_the_prompts(client: openai.OpenAI, name: str) -> None:
    ids = client.post("/../tokenize", body={"prompt": PROMPT}, cast_to=object)["tokens"]  # type: ignore[index]
    said = client.completions.create(
        model=name, prompt=ids, max_tokens=12, temperature=0, logprobs=20, extra_body={"ignore_eos": True}
    ).choices[0].logprobs
    assert said is not None
    assert said.token_logprobs is not None
    for value, top in zip(said.token_logprobs, said.top_logprobs or [], strict=True):
        assert value == max(top.values())
        assert sum(math.exp(number) for number in top.values()) < 1 + 1e-4
    scored = client.completions.create(model=name, prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True).choices[0]
    assert scored.logprobs is not None
    assert scored.logprobs.token_logprobs is not None
    assert len(scored.logprobs.token_logprobs) == len(ids) + 1
    first = client.completions.create(model=name, prompt=ids[:-1], max_tokens=1, temperature=0, logprobs=20).choices[0].logprobs
    assert first is not None
    last_text = (scored.logprobs.tokens or [])[len(ids) - 1]
    likely = (first.top_logprobs or [{}])[0]
    expected = scored.logprobs.token_logprobs[len(ids) - 1]
    assert expected <= min(likely.values()) + 1e-4 or likely[last_text] == pytest.approx(expected, abs=1e-3)
    assert scored.logprobs.token_logprobs[-1] == pytest.approx(said.token_logprobs[0], abs=1e-3)


def test_stop_strings(client: openai.OpenAI, name: str) -> None:
    settings = {"model": name, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    text = client.completions.create(**settings).choices[0].text  # type: ignore[call-overload]
    stop = text[10:13]
    choice = client.completions.create(**settings, stop=[stop, "never said"]).choices[0]  # type: ignore[call-overload]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = client.completions.create(**settings, stop=stop, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_a_known_prefix_is_told(client: openai.OpenAI, name: str) -> None:
    prompt = "hello hello world, 1 + 1 = 2, and then some more words " * 3
    for _ in range(2):
        usage = client.completions.create(model=name, prompt=prompt, max_tokens=2).usage
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert 0 < cached < usage.prompt_tokens


def test_many_outputs(client: openai.OpenAI, name: str) -> None:
    reply = client.completions.create(model=name, prompt=PROMPT, max_tokens=3, n=128, extra_body={"ignore_eos": True})
    assert len(reply.choices) == 128
    assert len({choice.text for choice in reply.choices}) > 32
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3 * 128


EXTREMES: tuple[dict[str, Any], ...] = (
    {"slo_tpot_ms": 1e-3, "slo_ttft_ms": 1e-3}, {"slo_tpot_ms": 1e7, "slo_ttft_ms": 1e7}, {"top_p": 5e-324}, {"min_p": 5e-324},
    {"min_p": 1}, {"temperature": 100, "min_tokens": 8}, {"temperature": 5e-324}, {"repetition_penalty": 0.01},
    {"repetition_penalty": 100}, {"logit_bias": {str(token): -100 for token in range(390)}}, {"logit_bias": {"5": 100}},
    {"seed": 2**63 - 1, "n": 3}, {"seed": -(2**63)}, {"top_k": 2**31 - 1}, {"top_k": 1}, {"stop": ["x" * 1024]},
    {"stop_token_ids": [5] * 1024}, {"presence_penalty": 2, "frequency_penalty": -2}, {"logprobs": 20, "prompt_logprobs": 20},
    {"stop_token_ids": list(range(390)), "min_tokens": 8}, {"temperature": 1, "top_k": 1, "top_p": 1e-9, "min_p": 1},
)


@pytest.mark.parametrize("settings", EXTREMES, ids="-".join)
def test_extreme_settings_hurt_nobody(server: RunningServer, name: str, settings: dict[str, Any]) -> None:
    pid = server.engine_pids
    for prompt in (PROMPT, [5], [5] * 500):
        body = {"model": name, "prompt": prompt, "max_tokens": 8, **settings}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] >= 1
    assert server.engine_pids == pid
    assert server.is_ready


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_frees_the_engine(server: RunningServer, client: openai.OpenAI, name: str, stream: bool) -> None:
    body = {"model": name, "prompt": [PROMPT] * 16, "max_tokens": 400, "n": 64, "stream": stream, "ignore_eos": True}
    wait_until(lambda: num_running(server) == 0, 30)
    connection = post(httpx.URL(server.url).port or 0, TEXT_PATH, body)
    if stream:
        assert connection.recv(100)
    wait_until(lambda: num_running(server) > 0, 10)
    connection.close()
    assert wait_until(lambda: num_running(server) == 0, 30) < 3
    assert client.completions.create(model=name, prompt=PROMPT, max_tokens=2).choices[0].text is not None


def test_unknown_models_and_too_long_prompts(client: openai.OpenAI, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=name, messages=[{"role": "user", "content": "word " * 3000}])
    assert refused.value.param == "messages"
    whole = client.chat.completions.create(model=name, messages=[{"role": "user", "content": "Hi"}])
    assert whole.choices[0].finish_reason in ("stop", "length")
