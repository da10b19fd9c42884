"""The list of models, tenants, and the token routes, over a real socket, with a scripted engine."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from coserve.server.inference.limits import COUNTED_TOKENS
from coserve.text.tokenizer import ChatTokenizer
from tests.server.fakes import ADAPTER, MAX_MODEL_LEN, MODEL, send
from tests.server.sites import CHAT_PATH, HI, TEXT_PATH, Site


def test_models(site: Site) -> None:
    listed = site.client.models.list().data
    assert [model.id for model in listed] == [MODEL, "tiny-alias", ADAPTER]
    assert [(model.root, model.parent) for model in listed] == [(MODEL, None), (MODEL, None), (MODEL, MODEL)]
    found = site.client.models.retrieve(ADAPTER)
    assert found.model_dump(exclude_unset=True) == {
        "id": ADAPTER, "object": "model", "created": 2, "owned_by": "coserve", "root": MODEL, "parent": MODEL,
        "max_model_len": MAX_MODEL_LEN,
    }
    with pytest.raises(openai.NotFoundError) as caught:
        site.client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_models_of_other_tenants_are_not_there(site: Site) -> None:
    other = site.client.with_options(api_key="key-other")
    assert [model.id for model in other.models.list().data] == [MODEL, "tiny-alias"]
    for ask in (
        lambda: other.chat.completions.create(model=ADAPTER, messages=HI), lambda: other.models.retrieve(ADAPTER),
        lambda: other.completions.create(model=ADAPTER, prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert site.engine.asked == []
    assert send(site.port, "/tokenize", {"model": ADAPTER, "prompt": "a"}, key="key-other").status == 404
    other.chat.completions.create(model=MODEL, messages=HI)
    assert site.engine.asked[0].tenant == "other"


def test_wrong_keys_are_refused_before_the_body_is_read(site: Site) -> None:
    for path in (CHAT_PATH, TEXT_PATH, "/tokenize", "/detokenize"):
        assert send(site.port, path, b"no JSON", key="wrong").status == 401
    assert send(site.port, "/v1/models", key="wrong").error["code"] == "invalid_api_key"


def test_a_request_without_model_gets_the_base(site: Site) -> None:
    assert send(site.port, CHAT_PATH, {"messages": HI}).json["model"] == MODEL
    assert send(site.port, CHAT_PATH, {"messages": HI, "model": "tiny-alias"}).json["model"] == "tiny-alias"


def test_tokenize_and_back(site: Site) -> None:
    text = "Hello grün <|im_end|> 🙂"
    reply = send(site.port, "/tokenize", {"model": MODEL, "prompt": text, "add_special_tokens": False}).json
    ids = site.tokenizer.encode(text)
    assert reply == {"tokens": ids, "count": len(ids), "max_model_len": MAX_MODEL_LEN}
    assert send(site.port, "/detokenize", {"model": MODEL, "tokens": reply["tokens"]}).json == {"prompt": text}
    chat = send(site.port, "/tokenize", {"messages": HI}).json
    assert chat["tokens"] == site.tokenizer.encode_chat(HI)
    shorter = send(site.port, "/tokenize", {"messages": HI, "add_generation_prompt": False}).json
    assert shorter["count"] < chat["count"]
    assert send(site.port, "/tokenize", {"prompt": ""}).json["tokens"] == []
    assert send(site.port, "/detokenize", {"tokens": []}).json == {"prompt": ""}
    long = "The quick brown fox. " * 2000
    assert send(site.port, "/tokenize", {"prompt": long}).json["tokens"] == site.tokenizer.encode(long)


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "a", "messages": HI}, "prompt"),
    ("/tokenize", {"prompt": 3}, "prompt"), ("/tokenize", {"prompt": "a", "return_token_strs": True}, "return_token_strs"),
    ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens[0]"), ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
    ("/detokenize", {"tokens": [5000]}, "tokens"), ("/detokenize", {"tokens": "abc"}, "tokens"),
])
def test_token_routes_refuse_by_name(site: Site, path: str, body: dict[str, Any], param: str) -> None:
    reply = send(site.port, path, body)
    assert (reply.status, reply.error["param"]) == (400, param), reply.text


def test_texts_of_too_many_tokens_are_refused_after_the_first(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = "e" + "\u0301" * COUNTED_TOKENS  # few characters, two tokens each
    for body, param in (({"prompt": marks}, "prompt"), ({"messages": [{"role": "user", "content": marks}]}, "messages")):
        refused = send(site.port, "/tokenize", body)
        assert (refused.status, refused.error["param"], refused.error["code"]) == (400, param, "context_length_exceeded")
    read: list[str] = []
    encode = ChatTokenizer.encode
    monkeypatch.setattr(ChatTokenizer, "encode", lambda self, text, *rest: read.append(text) or encode(self, text, *rest))
    assert send(site.port, TEXT_PATH, {"model": MODEL, "prompt": ["\u0301" * MAX_MODEL_LEN] * 9}).status == 400
    assert len(read) == 1
