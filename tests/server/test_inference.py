"""Chat and completions through the unmodified openai client, over a real socket, with a scripted engine."""

from __future__ import annotations

import asyncio
import json
import time

import openai

from tests.server.fakes import ADAPTER, ANSWER, MAX_MODEL_LEN, MODEL, Script, send
from tests.server.sites import CHAT_PATH, HI, Site

# --- chat ---


def test_chat(site: Site) -> None:
    reply = site.client.chat.completions.create(model=MODEL, messages=HI)
    assert reply.id.startswith("chatcmpl-")
    assert (reply.object, reply.model, reply.system_fingerprint) == ("chat.completion", MODEL, "fp-tiny")
    assert abs(reply.created - time.time()) < 60
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert reply.usage is not None
    asked = site.engine.asked[0]
    assert asked.prompt_ids == site.tokenizer.encode_chat(HI)
    assert asked.sampling.max_tokens == MAX_MODEL_LEN - len(asked.prompt_ids)
    assert asked.sampling.temperature == 1.0
    assert reply.usage.prompt_tokens == len(asked.prompt_ids)
    assert reply.usage.completion_tokens == site.num_answer_tokens
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 3
    site.assert_counted("stop")
    assert site.metrics.meters[0].num_tokens == site.num_answer_tokens


def test_chat_stream(site: Site) -> None:
    chunks = list(site.client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
    ))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *pieces, usage = chunks
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == site.num_answer_tokens
    assert all(chunk.usage is None for chunk in pieces)
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert len(pieces) > 5
    site.assert_counted("stop")


def test_chat_stream_as_bytes(site: Site) -> None:
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.events[-1] == "[DONE]"
    assert all("usage" not in json.loads(event) for event in reply.events[:-1])


def test_continuous_usage_counts_up(site: Site) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    reply = send(site.port, CHAT_PATH, {"messages": HI, "stream": True, "stream_options": options})
    counts = [json.loads(event)["usage"]["completion_tokens"] for event in reply.events[:-1]]
    assert counts == sorted(counts)
    assert counts[-1] == site.num_answer_tokens


def test_async_client(site: Site) -> None:
    async def talk() -> tuple[str | None, str, str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{site.port}/v1", api_key="k", max_retries=0) as client:
            whole = client.chat.completions.create(model=MODEL, messages=HI)
            stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
            text = client.completions.create(model=MODEL, prompt="Hi", max_tokens=64)
            first, chunks, completion = await asyncio.gather(whole, stream, text)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in chunks]
            return first.choices[0].message.content, "".join(pieces), completion.choices[0].text

    assert asyncio.run(talk()) == (ANSWER, ANSWER, ANSWER)


def test_several_outputs(site: Site) -> None:
    reply = site.client.chat.completions.create(model=MODEL, messages=HI, n=3)
    assert [(choice.index, choice.message.content) for choice in reply.choices] == [(0, ANSWER), (1, ANSWER), (2, ANSWER)]
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3 * site.num_answer_tokens
    texts, roles, ends = {}, {}, {}
    for chunk in site.client.chat.completions.create(model=MODEL, messages=HI, n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        roles[choice.index] = roles.get(choice.index, 0) + (choice.delta.role is not None)
        ends[choice.index] = choice.finish_reason
    assert texts == dict.fromkeys(range(3), ANSWER)
    assert roles == dict.fromkeys(range(3), 1)
    assert ends == dict.fromkeys(range(3), "stop")
    site.assert_counted("stop", "stop")


def test_settings_arrive(site: Site) -> None:
    site.client.chat.completions.create(
        model=ADAPTER, messages=HI, max_tokens=5, max_completion_tokens=6, temperature=0.5, top_p=0.5, n=2, seed=11, stop="END",
        presence_penalty=0.25, frequency_penalty=0.75, logit_bias={"7": -1.5}, logprobs=True, top_logprobs=3,
        extra_body={"top_k": 4, "min_p": 0.125, "repetition_penalty": 1.25, "ignore_eos": True, "min_tokens": 2,
                    "stop_token_ids": [9], "slo_tpot_ms": 50, "slo_ttft_ms": 700.5},
    )
    asked = site.engine.asked[0]
    sampling = asked.sampling
    assert (sampling.max_tokens, sampling.min_tokens, sampling.n, sampling.seed, sampling.stop) == (6, 2, 2, 11, ("END",))
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.5, 4, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.25, 0.75, 1.25)
    assert (dict(sampling.logit_bias), sampling.stop_token_ids, sampling.ignore_eos) == ({7: -1.5}, (9,), True)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (3, None)
    assert (asked.tpot_ms, asked.ttft_ms, asked.adapter, asked.tenant) == (50, 700.5, f"default/{ADAPTER}", "default")
    assert site.models.prepared == [ADAPTER]


def test_best_effort_arrives(site: Site) -> None:
    for given in ("none", None):
        site.client.completions.create(model=MODEL, prompt="Hi", max_tokens=2, extra_body={"slo_tpot_ms": given})
    assert [(asked.tpot_ms, asked.ttft_ms) for asked in site.engine.asked] == [("none", None), (None, None)]


def test_requests_without_a_seed_draw_differently(site: Site) -> None:
    for _ in range(3):
        site.client.chat.completions.create(model=MODEL, messages=HI)
    assert len({asked.sampling.seed for asked in site.engine.asked}) == 3


def test_a_limit_ends_by_length(site: Site) -> None:
    reply = site.client.chat.completions.create(model=MODEL, messages=HI, max_completion_tokens=4)
    assert reply.choices[0].finish_reason == "length"
    assert ANSWER.startswith(reply.choices[0].message.content or "?")
    site.assert_counted("length")


def test_chat_logprobs(site: Site) -> None:
    ids = site.tokenizer.encode(ANSWER)
    reply = site.client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2)
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    assert [entry.logprob for entry in content] == [-token / 1000 for token in ids]
    assert [bytes(entry.bytes or []) for entry in content] == [site.tokenizer.token_bytes[token] for token in ids]
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == ANSWER
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[1].logprob == -9999.0
        assert entry.token.startswith("bytes:") or bytes(entry.bytes or []).decode() == entry.token
    assert any(entry.token.startswith("bytes:") for entry in content)
    streamed = []
    for chunk in site.client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert [entry.model_dump() for entry in streamed] == [entry.model_dump() for entry in content]


def test_prompt_logprobs(site: Site) -> None:
    reply = send(site.port, CHAT_PATH, {"messages": HI, "prompt_logprobs": 1})
    ids = site.engine.asked[0].prompt_ids
    found = reply.json["prompt_logprobs"]
    assert found[0] is None
    assert [next(iter(entry)) for entry in found[1:]] == [str(token) for token in ids[1:]]
    assert found[1][str(ids[1])] == {"logprob": -ids[1] / 1000, "rank": 1, "decoded_token": site.tokenizer.decode([ids[1]])}


def test_roles_and_parts(site: Site) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "cache_control": {"type": "ephemeral"}}]
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    send(site.port, CHAT_PATH, {"messages": messages})
    expected = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "one\ntwo"}]
    assert site.engine.asked[0].prompt_ids == site.tokenizer.encode_chat(expected)


def test_without_generation_prompt(site: Site) -> None:
    send(site.port, CHAT_PATH, {"messages": HI, "add_generation_prompt": False})
    expected = site.tokenizer.encode(site.tokenizer.render_chat(HI, add_generation_prompt=False))
    assert site.engine.asked[0].prompt_ids == expected


# --- completions ---


def test_completions_of_several_prompts(site: Site) -> None:
    prompts = ["Hello", "The quick brown fox", "a"]
    reply = site.client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=64)
    assert reply.id.startswith("cmpl-")
    assert reply.object == "text_completion"
    assert [choice.index for choice in reply.choices] == list(range(6))
    assert {(choice.text, choice.finish_reason) for choice in reply.choices} == {(ANSWER, "stop")}
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == sum(len(site.tokenizer.encode(prompt)) for prompt in prompts)
    assert reply.usage.completion_tokens == 6 * site.num_answer_tokens
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 9
    texts: dict[int, str] = {}
    for chunk in site.client.completions.create(model=MODEL, prompt=prompts, n=2, max_tokens=64, stream=True):
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == dict.fromkeys(range(6), ANSWER)
    site.assert_counted(*["stop"] * 6)


def test_prompts_as_token_ids(site: Site) -> None:
    site.client.completions.create(model=MODEL, prompt=[5, 6, 7])
    site.client.completions.create(model=MODEL, prompt=[[5, 6], [7]])
    assert [asked.prompt_ids for asked in site.engine.asked] == [[5, 6, 7], [5, 6], [7]]
    assert site.engine.asked[0].sampling.max_tokens == 16


def test_the_default_limit_shrinks_to_what_is_left(site: Site) -> None:
    site.client.completions.create(model=MODEL, prompt=[5] * (MAX_MODEL_LEN - 3))
    assert site.engine.asked[0].sampling.max_tokens == 3


def test_echo(site: Site) -> None:
    reply = site.client.completions.create(model=MODEL, prompt="Once ", echo=True, max_tokens=64)
    assert reply.choices[0].text == "Once " + ANSWER
    chunks = list(site.client.completions.create(model=MODEL, prompt=["Once ", "Two "], echo=True, max_tokens=64, stream=True))
    for index, prompt in enumerate(("Once ", "Two ")):
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) == prompt + ANSWER


def test_completion_logprobs(site: Site) -> None:
    ids = site.tokenizer.encode("abc Hello")
    site.engine.script = Script(text="abc Hello")
    reply = site.client.completions.create(model=MODEL, prompt="x", logprobs=1, max_tokens=64)
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.tokens == [site.tokenizer.decode([token]) for token in ids]
    assert found.token_logprobs == [-token / 1000 for token in ids]
    assert found.text_offset is not None
    for offset, token in zip(found.text_offset, found.tokens or [], strict=True):
        assert reply.choices[0].text[offset:].startswith(token)
    assert (found.top_logprobs or [])[0] == {site.tokenizer.decode([ids[0]]): -ids[0] / 1000}
    offsets: list[int] = []
    for chunk in site.client.completions.create(model=MODEL, prompt="x", logprobs=1, max_tokens=64, stream=True):
        if chunk.choices[0].logprobs is not None:
            offsets += chunk.choices[0].logprobs.text_offset or []
    assert offsets == found.text_offset


def test_echo_with_logprobs_scores_the_prompt(site: Site) -> None:
    prompt = site.tokenizer.encode("What is it?")
    reply = site.client.completions.create(model=MODEL, prompt="What is it?", logprobs=1, echo=True, max_tokens=1)
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert len(found.tokens) == len(prompt) + 1
    assert found.token_logprobs is not None
    assert found.token_logprobs[0] is None
    assert found.token_logprobs[1:-1] == [-token / 1000 for token in prompt[1:]]
    assert "".join(found.tokens[: len(prompt)]) == "What is it?"
