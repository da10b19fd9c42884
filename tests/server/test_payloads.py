"""Bodies: what known clients send is taken; what can't be honoured is refused by name; what is broken breaks nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from coserve.core import InvalidRequest
from coserve.server.bodies.parse import parse_object
from coserve.server.inference.fields import CHAT, COMPLETIONS
from coserve.server.inference.protocol import ChatRequest, CompletionRequest
from coserve.server.routes.inference import CHAT_FORM, COMPLETION_FORM
from coserve.text.tokenizer import ChatTokenizer
from tests.server.fakes import MODEL, FakeEngineClient, make_app, make_services, send, serve
from tests.tiny_tokenizer import build_tiny_tokenizer

HI = [{"role": "user", "content": "Hi"}]
CHAT_PATH, TEXT_PATH = "/v1/chat/completions", "/v1/completions"

CHAT_PAYLOADS: dict[str, dict[str, Any]] = {
    "openai": {"model": MODEL, "messages": HI},
    "openai with much": {
        "model": MODEL, "messages": [{"role": "developer", "content": "Be short."}, *HI], "max_completion_tokens": 8,
        "temperature": 0.7, "top_p": 0.9, "n": 2, "seed": 7, "stop": ["END"], "presence_penalty": 0.1, "frequency_penalty": 0.1,
        "logit_bias": {"50": -100}, "logprobs": True, "top_logprobs": 2, "user": "u1", "metadata": {"run": "1"}, "store": False,
        "service_tier": "auto", "response_format": {"type": "text"}, "modalities": ["text"], "parallel_tool_calls": True,
        "tools": [], "safety_identifier": "s", "prompt_cache_key": "k", "verbosity": "medium", "reasoning_effort": None,
    },
    "openai echo of a response": {"model": MODEL, "messages": [
        *HI, {"role": "assistant", "content": "Hello", "refusal": None, "annotations": [], "audio": None, "function_call": None,
              "tool_calls": None}, *HI,
    ]},
    "openai echo of a parsed response": {"model": MODEL, "messages": [
        *HI, {"role": "assistant", "content": '{"a": 1}', "refusal": None, "tool_calls": None, "parsed": {"a": 1}}, *HI,
    ]},
    "litellm echo of a response": {"model": MODEL, "messages": [
        *HI, {"role": "assistant", "content": "Hello", "tool_calls": None, "function_call": None,
              "provider_specific_fields": {"refusal": None}}, *HI,
    ]},
    "litellm": {
        "model": MODEL, "messages": HI, "temperature": 0.2, "max_tokens": 8, "stream": True,
        "stream_options": {"include_usage": True}, "user": "default_user_id", "metadata": {"a": "b"},
    },
    "langchain": {"model": MODEL, "messages": HI, "stream": False, "temperature": 0.7, "n": 1, "max_completion_tokens": 8},
    "langchain stream": {
        "model": MODEL, "messages": [{"role": "system", "content": "s"}, *HI, {"role": "assistant", "content": None}, *HI],
        "stream": True, "stream_options": {"include_usage": True}, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0,
        "seed": None, "logprobs": None, "logit_bias": None,
    },
    "guidellm": {
        "model": MODEL, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_completion_tokens": 4, "stop": None, "ignore_eos": True,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "some words"}]}],
    },
    "lm-eval": {
        "model": MODEL, "messages": [{"role": "user", "content": "some words", "type": "text"}], "max_tokens": 8,
        "temperature": 0, "stop": ["Q:", "<|im_end|>"], "seed": 1234,
    },
    "vllm with thinking": {
        "model": MODEL, "messages": [*HI, {"role": "assistant", "content": "Hello", "reasoning": None}, *HI],
        "chat_template_kwargs": {"enable_thinking": False}, "include_reasoning": True, "add_generation_prompt": True,
        "continue_final_message": False, "add_special_tokens": False, "chat_template": None, "documents": None, "echo": False,
        "reasoning_effort": "none",
    },
    "sglang": {
        "model": MODEL, "messages": HI, "separate_reasoning": True, "stream_reasoning": True, "chat_template_kwargs": {},
    },
    "deepseek": {
        "model": MODEL, "messages": [*HI, {"role": "assistant", "content": "Yes", "reasoning_content": "Hm."}, *HI],
        "thinking": {"type": "disabled"},
    },
    "prefill": {
        "model": MODEL, "messages": [*HI, {"role": "assistant", "content": "The"}], "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "vllm bench": {
        "model": MODEL, "messages": [{"role": "user", "content": [{"type": "text", "text": "some words"}]}], "temperature": 0.0,
        "repetition_penalty": 1.0, "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True},
        "ignore_eos": True, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
    },
}
TEXT_PAYLOADS: dict[str, dict[str, Any]] = {
    "openai": {"model": MODEL, "prompt": "Once", "max_tokens": 4},
    "openai with much": {
        "model": MODEL, "prompt": ["Once", "Twice"], "max_tokens": 4, "echo": True, "logprobs": 2, "n": 2, "best_of": 2,
        "stop": "END", "suffix": None, "temperature": 0, "user": "u",
    },
    "langchain": {
        "model": MODEL, "prompt": ["Once"], "temperature": 0.7, "max_tokens": 8, "top_p": 1, "frequency_penalty": 0,
        "presence_penalty": 0, "n": 1, "seed": None, "logprobs": None,
    },
    "guidellm": {
        "model": MODEL, "prompt": "some words", "stream": True, "max_tokens": 4, "stop": None, "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    "vllm bench": {
        "model": MODEL, "prompt": [10, 11, 12], "temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 4,
        "logprobs": None, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
    },
    "lm-eval": {
        "model": MODEL, "prompt": [[10, 11, 12], [13, 14]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
        "echo": True,
    },
}

WRONG_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"functions": [{"name": 1}]}, "functions[0].name"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"prediction": {"type": "content"}}, "prediction"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"parallel_tool_calls": 0}, "parallel_tool_calls"),
    ({"verbosity": "low"}, "verbosity"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"guided_json": {"type": "nothing"}}, "guided_json"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"chat_template": "x"}, "chat_template"),
    ({"echo": True}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 0.5}, "length_penalty"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"temprature": 1}, "temprature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**18}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"n": 0}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": 1.5}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5000}, "max_tokens"),
    ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ({"min_tokens": 9, "max_tokens": 4}, "min_tokens"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": ""}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5000": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [4000]}, "stop_token_ids"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 3}, "logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"slo_tpot_ms": 0}, "slo_tpot_ms"),
    ({"slo_tpot_ms": "fast"}, "slo_tpot_ms"),
    ({"slo_ttft_ms": "None"}, "slo_ttft_ms"),
    ({"slo_ttft_ms": True}, "slo_ttft_ms"),
    ({"slo_ttft_ms": [60]}, "slo_ttft_ms"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [1]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "Hi"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "king", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "Hi", "colour": "red"}]}, "messages[0].colour"),
    ({"messages": [*HI, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
     "messages[1].tool_calls[0].function"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}]}]},
     "messages[0].content[1].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "long " * 4000}]}, "messages"),
    ({"model": 3}, "model"),
]
WRONG_TEXT: list[tuple[dict[str, Any], str]] = [
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 3}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [[5], [10**15]]}, "prompt[1]"),
    ({"prompt": [5] * 512}, "prompt"),
    ({"prompt": ["a"] * 2000}, "prompt"),
    ({"prompt": ["a"] * 1000, "n": 128}, "prompt"),
    ({"max_tokens": 600}, "max_tokens"),
    ({"max_completion_tokens": 4}, "max_completion_tokens"),
    ({"stream": True, "echo": True, "logprobs": 1}, "echo"),
    ({"messages": HI}, "messages"),
]

BROKEN = {
    "nothing": b"", "no JSON": b"{", "a list": b"[]", "a text": b'"x"', "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": -Infinity}', "a huge float": b'{"temperature": 1e999}',
    "a huge int": b'{"seed": ' + b"9" * 5000 + b"}",
    "a large int": b'{"temperature": ' + b"9" * 400 + b"}", "the same key twice": b'{"n": 1, "n": 2}',
    "the same odd key twice": b'{"\\ud800": 1, "\\ud800": 2}', "NUL": b'{"model": "a\\u0000b"}',
    "a raw NUL": b'{"model": "a\x00b"}',
    "half a pair": b'{"model": "\\ud800"}', "half a pair as a key": b'{"\\udfff": 1}', "not UTF-8": b'{"model": "\xff"}',
    "UTF-16": '{"model": "x"}'.encode("utf-16"), "deep lists": b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 100_000, "deep under the limit": b'{"stop": ' + b"[" * 900 + b'"\\u0041"' + b"]" * 900 + b"}",
    "gzip": b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "many wrong items": b'{"messages": [' + b"0," * 100_000 + b"0]}",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.load(build_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def server(tokenizer: ChatTokenizer) -> Iterator[tuple[int, FakeEngineClient]]:
    services = make_services(tokenizer)
    with serve(make_app(services)) as port:
        engine: Any = services.engine
        yield port, engine


@pytest.mark.parametrize(
    ("path", "payload"),
    [(CHAT_PATH, payload) for payload in CHAT_PAYLOADS.values()] + [(TEXT_PATH, payload) for payload in TEXT_PAYLOADS.values()],
    ids=[f"chat {name}" for name in CHAT_PAYLOADS] + [f"completions {name}" for name in TEXT_PAYLOADS],
)
def test_what_known_clients_send_is_taken(server: tuple[int, FakeEngineClient], path: str, payload: dict[str, Any]) -> None:
    reply = send(server[0], path, payload)
    assert reply.status == 200, reply.text
    if payload.get("stream"):
        assert reply.events[-1] == "[DONE]"
        assert json.loads(reply.events[-2])["usage"]["completion_tokens"] > 0
    else:
        prompts = payload["prompt"] if isinstance(payload.get("prompt"), list) else [0]
        assert len(reply.json["choices"]) == len(prompts) * payload.get("n", 1)


@pytest.mark.parametrize(("fields", "param"), WRONG_CHAT, ids=[f"{param}-{i}" for i, (_, param) in enumerate(WRONG_CHAT)])
def test_chat_refuses_by_name(server: tuple[int, FakeEngineClient], fields: dict[str, Any], param: str) -> None:
    before = len(server[1].asked)
    reply = send(server[0], CHAT_PATH, {"model": MODEL, "messages": HI, **fields})
    assert (reply.status, reply.error["param"]) == (400, param), reply.text
    assert reply.error["type"] == "invalid_request_error"
    assert len(server[1].asked) == before


@pytest.mark.parametrize(("fields", "param"), WRONG_TEXT, ids=[f"{param}-{i}" for i, (_, param) in enumerate(WRONG_TEXT)])
def test_completions_refuse_by_name(server: tuple[int, FakeEngineClient], fields: dict[str, Any], param: str) -> None:
    before = len(server[1].asked)
    reply = send(server[0], TEXT_PATH, {"model": MODEL, "prompt": "Hi", **fields})
    assert (reply.status, reply.error["param"]) == (400, param), reply.text
    assert len(server[1].asked) == before


@pytest.mark.parametrize("path", [CHAT_PATH, TEXT_PATH, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_broken_bodies_are_refused(server: tuple[int, FakeEngineClient], path: str, body: bytes) -> None:
    reply = send(server[0], path, body)
    assert reply.status == 400, reply.text
    assert reply.error["message"]


def test_a_misspelt_field_is_answered_with_the_nearest_one(server: tuple[int, FakeEngineClient]) -> None:
    reply = send(server[0], CHAT_PATH, {"model": MODEL, "messages": HI, "max_completion_token": 3})
    assert "did you mean max_completion_tokens?" in reply.error["message"]
    reply = send(server[0], CHAT_PATH, {"model": MODEL, "messages": HI, "zzzzzzzz": None})
    assert reply.error["param"] == "zzzzzzzz"
    assert "mean" not in reply.error["message"]


def test_lengths_are_told_with_both_numbers(server: tuple[int, FakeEngineClient]) -> None:
    reply = send(server[0], TEXT_PATH, {"model": MODEL, "prompt": [5] * 600})
    assert "context length is 512" in reply.error["message"]
    assert "600" in reply.error["message"]
    reply = send(server[0], TEXT_PATH, {"model": MODEL, "prompt": [5] * 500, "max_tokens": 13})
    assert "ask for at most 12" in reply.error["message"]


def test_every_neutral_value_is_taken() -> None:
    for policy, model in ((CHAT, ChatRequest), (COMPLETIONS, CompletionRequest)):
        for name, values in policy.neutral.items():
            if name in model.model_fields:
                continue
            for value in (None, *values):
                assert policy.apply({name: value}) == {}
            with pytest.raises(InvalidRequest, match=f"{name}: is not supported yet; leave it out"):
                policy.apply({name: {"some": "thing"}})


@pytest.mark.parametrize(("value", "shown"), [
    (0, "0"), (-5, "-5"), (1e8, "100000000.0"), (1e-9, "1e-09"), (True, "True"), ("60", "'60'"), ("best", "'best'"),
    ({"a": "{b}"}, "{'a': '{b}'}"), ("x" * 500, "'xxx.*"),
])
def test_a_wrong_objective_is_told_in_one_sentence(value: Any, shown: str) -> None:
    for name in ("slo_tpot_ms", "slo_ttft_ms"):
        said = f'{name}: must be a positive number of milliseconds (0.001 to 10000000) or "none" (best effort), got '
        with pytest.raises(InvalidRequest, match=re.escape(said) + (shown if ".*" in shown else re.escape(shown))) as caught:
            CHAT_FORM.parse(json.dumps({"messages": HI, name: value}).encode())
        assert caught.value.param == name


@pytest.mark.parametrize("value", [None, "none", 60, 0.001, 1e7])
def test_an_objective_is_a_number_or_none(value: Any) -> None:
    request = CHAT_FORM.parse(json.dumps({"messages": HI, "slo_tpot_ms": value}).encode())
    assert request.slo_tpot_ms == value and request.slo_ttft_ms is None


def test_nulls_of_implemented_fields_count_as_not_given() -> None:
    body = dict.fromkeys(ChatRequest.model_fields) | {"messages": HI}
    request = CHAT_FORM.parse(json.dumps(body).encode())
    assert request == ChatRequest.model_validate({"messages": HI})


def test_escaped_text_comes_through() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude42 \\u00fc"}') == {"a": "\U0001f642 ü"}


def test_the_openapi_schema_has_no_references() -> None:
    text = json.dumps([CHAT_FORM.openapi, COMPLETION_FORM.openapi])
    assert "$ref" not in text
    assert "slo_tpot_ms" in text
