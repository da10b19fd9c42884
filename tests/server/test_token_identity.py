"""What responses say of single tokens agrees with the text: bytes, names, offsets, ids.

Also prompts that are only scored, and error codes. Over a real socket, with a scripted engine and tokenizers of two kinds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import normalizers

from coserve.server.inference.walk import prompt_offsets
from coserve.server.link.messages import LogprobEntry
from coserve.text.detokenizer import shown_text
from coserve.text.tokenizer import ChatTokenizer
from tests.server import fakes
from tests.server.fakes import MAX_MODEL_LEN, MODEL, Script, send
from tests.server.sites import CHAT_PATH, HI, TEXT_PATH, Site, open_site
from tests.tiny_tokenizer import CHATML, build_sentencepiece_tokenizer, build_tiny_tokenizer

UNICORN = "a 🦄🙂 é b"


@pytest.fixture(scope="module")
def spm_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With a tokenizer that leaves out a text's first space."""
    directory = build_sentencepiece_tokenizer(Path(tmp_path_factory.mktemp("spm")), chat_template=CHATML)
    with open_site(ChatTokenizer.load(directory)) as found:
        yield found


@pytest.fixture(params=["bpe", "spm"])
def any_site(request: pytest.FixtureRequest) -> Site:
    """A server with a tokenizer of either kind."""
    found: Site = request.getfixturevalue("site" if request.param == "bpe" else "spm_site")
    found.reset()
    return found


def end_of(site: Site) -> str:
    """The token that ends a text."""
    return "</s>" if "</s>" in site.tokenizer.special_tokens else "<|im_end|>"


def ask(site: Site, **body: Any) -> dict[str, Any]:
    """The only choice of a completion."""
    reply = send(site.port, TEXT_PATH, {"max_tokens": 64, **body})
    assert reply.status == 200, reply.text
    choice: dict[str, Any] = reply.json["choices"][0]
    return choice


def slices(choice: dict[str, Any]) -> list[str]:
    """The text between offsets."""
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    return [text[start:end] for start, end in pairwise([*offsets, len(text)])]


def test_joined_bytes_are_the_text(any_site: Site) -> None:
    any_site.engine.script = Script(text=UNICORN + end_of(any_site))
    for stream in (False, True):
        reply = send(any_site.port, CHAT_PATH, {"messages": HI, "logprobs": True, "top_logprobs": 1, "stream": stream})
        if stream:
            chunks = [json.loads(event) for event in reply.events[:-1]]
            parts = [chunk["choices"][0] for chunk in chunks]
            text = "".join(part["delta"].get("content", "") for part in parts)
            content = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
        else:
            choice = reply.json["choices"][0]
            text, content = choice["message"]["content"], choice["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == text
        assert text.endswith(UNICORN)
        assert (content[-1]["token"], content[-1]["bytes"]) == (end_of(any_site), [])
        assert any(entry["token"].startswith("bytes:") for entry in content)
        for entry in content:
            assert {"token": entry["token"], "bytes": entry["bytes"], "logprob": entry["logprob"]} in entry["top_logprobs"]


def test_every_token_asked_for_has_a_key_of_its_own(any_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = any_site.tokenizer
    confusing = [*tokenizer.encode("🦄"), *tokenizer.encode("é"), *(tokenizer.eos_token_id or 0, 68, 69)][:5]
    if end_of(any_site) == "</s>":
        confusing = [3 + ord("A"), tokenizer._hf.convert_tokens_to_ids("A"), 3 + 0xE2, 3 + 0xE3, 2]

    def entry(token: int, count: int) -> LogprobEntry:
        return LogprobEntry(token=token, logprob=-9.0, top=[(each, -0.5 * n) for n, each in enumerate(confusing)][:count])

    monkeypatch.setattr(fakes, "logprob", entry)
    any_site.engine.script = Script(text="x🦄A")
    for prompt in ("hi", [5, 70, 71]):
        choice = ask(any_site, prompt=prompt, logprobs=5, echo=True)
        found = choice["logprobs"]
        for name, top in zip(found["tokens"], found["top_logprobs"], strict=True):
            if top is not None:
                assert name in top
                assert len(top) in (5, 6)
                assert "" not in top
                assert sorted(top.values(), reverse=True)[:5] == [0, -0.5, -1, -1.5, -2] or top[name] == -9.0
    chosen = [name for name in found["tokens"] if name.startswith("bytes:")]
    assert chosen


def test_offsets_cut_the_text_into_its_tokens(any_site: Site) -> None:
    eos = end_of(any_site)
    any_site.engine.script = Script(text=f" the{eos} the 🦄 end")
    choice = ask(any_site, prompt="the the 🙂 fox", logprobs=1, echo=True)
    cut, names = slices(choice), choice["logprobs"]["tokens"]
    assert "".join(cut) == choice["text"]
    for piece, name in zip(cut, names, strict=True):
        if name.startswith("bytes:"):
            assert piece in ("", " ", "🙂", "🦄", " 🙂", " 🦄")
        else:
            assert piece == ("" if name in (eos, "<s>") else name) or (piece, name) == ("", " ")
    assert cut.count("🦄") + cut.count(" 🦄") == 1


def test_a_special_token_that_the_prompt_writes_out_has_its_place(site: Site) -> None:
    prompt = "one<|im_end|>two <|im_start|>🙂three"
    choice = ask(site, prompt=prompt, logprobs=0, echo=True, max_tokens=1)
    assert choice["text"].startswith(prompt)
    for piece, name in zip(slices(choice), choice["logprobs"]["tokens"], strict=True):
        assert piece == name or name.startswith("bytes:")


def test_offsets_where_the_tokenizer_changes_the_text(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path))
    tokenizer._hf.backend_tokenizer.normalizer = normalizers.NFC()
    text = "cafe\u0301 fox e\u0301"
    ids = tokenizer.encode(text)
    assert shown_text(tokenizer, ids) != text
    offsets = prompt_offsets(tokenizer, ids, text)
    assert offsets == sorted(offsets)
    assert [text[offset:].lstrip()[:3] for offset, token in zip(offsets, ids, strict=True)
            if tokenizer.token_bytes[token].startswith(b" f")] == ["fox"]


def test_a_completion_keeps_its_first_space(spm_site: Site) -> None:
    """`in` + ` the the`: with echo and without, whole and as a stream."""
    spm_site.reset()
    tokenizer = spm_site.tokenizer
    ids = tokenizer.encode("in the the", add_special_tokens=True)
    prompt = ids[: len(tokenizer.encode("in", add_special_tokens=True))]
    spm_site.engine.script = Script(text="the the")  # alone it begins with a space as well
    client = spm_site.client
    for echo in (False, True):
        for given in ("in", prompt):
            want = ("in" if echo else "") + " the the"
            assert client.completions.create(model=MODEL, prompt=given, echo=echo, max_tokens=9).choices[0].text == want
            chunks = client.completions.create(model=MODEL, prompt=given, echo=echo, max_tokens=9, stream=True)
            assert "".join(chunk.choices[0].text for chunk in chunks) == want


def test_a_character_that_the_prompt_begins(any_site: Site) -> None:
    ids = any_site.tokenizer.encode("x🦄")
    any_site.engine.script = Script(text="y")
    text = ask(any_site, prompt=ids[:-1], echo=True, logprobs=0)
    assert text["text"].replace(" ", "") == "x\ufffdy"
    assert "".join(slices(text)) == text["text"]


# --- without output ---


@pytest.mark.parametrize("prompt", ["What is it?", [70, 71, 72], [[70, 71, 72], [73, 74]]])
def test_a_prompt_is_scored_without_output(site: Site, prompt: Any) -> None:
    reply = send(site.port, TEXT_PATH, {"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 2})
    assert reply.status == 200, reply.text
    asked = [each.prompt_ids for each in site.engine.asked]
    for ids, choice in zip(asked, reply.json["choices"], strict=True):
        assert (choice["text"], choice["finish_reason"]) == (shown_text(site.tokenizer, ids), "length")
        assert choice["logprobs"]["token_logprobs"] == [None, *(-token / 1000 for token in ids[1:])]
        assert len(choice["logprobs"]["tokens"]) == len(choice["logprobs"]["top_logprobs"]) == len(ids)
        assert slices(choice) == choice["logprobs"]["tokens"]
    num_prompt = sum(map(len, asked))
    assert reply.json["usage"] == {
        "prompt_tokens": num_prompt, "completion_tokens": 0, "total_tokens": num_prompt,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert all(each.sampling.max_tokens == 0 for each in site.engine.asked)


def test_no_output_and_no_echo(site: Site) -> None:
    choice = ask(site, prompt="Hi", max_tokens=0)
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("", "length", None)
    choice = ask(site, prompt="Hi", max_tokens=0, logprobs=1, prompt_logprobs=0, n=2)
    assert choice["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    assert len(choice["prompt_logprobs"]) == len(site.tokenizer.encode("Hi"))
    events = send(site.port, TEXT_PATH, {"prompt": "Hi", "max_tokens": 0, "echo": True, "stream": True}).events
    assert '"text":"Hi"' in events[0] and '"finish_reason":"length"' in events[1] and events[2:] == ["[DONE]"]
    full = ask(site, prompt=[70] * MAX_MODEL_LEN, max_tokens=0)
    assert full["finish_reason"] == "length", "a prompt that fills the context leaves room for no output"
    refused = send(site.port, CHAT_PATH, {"messages": HI, "max_tokens": 0})
    assert (refused.status, refused.error["param"]) == (400, "max_tokens")


def test_echo_and_prompt_logprobs_may_ask_for_different_numbers(site: Site) -> None:
    choice = ask(site, prompt="Hi", echo=True, logprobs=2, prompt_logprobs=0, max_tokens=1)
    assert site.engine.asked[0].sampling.prompt_logprobs == 2
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2] * len(site.tokenizer.encode("Hi"))
    assert [len(entry) for entry in choice["prompt_logprobs"][1:]] == [1] * (len(site.tokenizer.encode("Hi")) - 1)


# --- ids ---


def test_token_ids_of_prompt_and_output(site: Site) -> None:
    ids = site.tokenizer.encode("abc 🦄")
    site.engine.script = Script(text="abc 🦄")
    chat = send(site.port, CHAT_PATH, {"messages": HI, "return_token_ids": True}).json
    assert chat["prompt_token_ids"] == site.engine.asked[-1].prompt_ids
    assert chat["choices"][0]["token_ids"] == ids
    choice = ask(site, prompt="Hi", return_token_ids=True)
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (site.tokenizer.encode("Hi"), ids)
    for path, body in ((CHAT_PATH, {"messages": HI}), (TEXT_PATH, {"prompt": "Hi", "max_tokens": 64})):
        chunks = [
            json.loads(event)
            for event in send(site.port, path, {**body, "return_token_ids": True, "stream": True}).events[:-1]
        ]
        assert [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])] == ids
        firsts = [chunk.get("prompt_token_ids") or chunk["choices"][0].get("prompt_token_ids") for chunk in chunks]
        assert firsts[0] == site.engine.asked[-1].prompt_ids and not any(firsts[1:])
    plain = send(site.port, CHAT_PATH, {"messages": HI}).json
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


def test_tokens_by_their_ids(site: Site) -> None:
    ids = site.tokenizer.encode("abc 🦄")
    site.engine.script = Script(text="abc 🦄")
    choice = ask(site, prompt="Hi", logprobs=1, return_tokens_as_token_ids=True)
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert [next(iter(top)) for top in choice["logprobs"]["top_logprobs"]] == choice["logprobs"]["tokens"]
    assert "".join(slices(choice)) == choice["text"]


def test_prompt_logprobs_have_the_same_names(site: Site) -> None:
    ids = site.tokenizer.encode("a🦄<|im_end|>")
    found = ask(site, prompt=ids, prompt_logprobs=0)["prompt_logprobs"]
    names = [entry[str(token)]["decoded_token"] for entry, token in zip(found[1:], ids[1:], strict=True)]
    assert names == [site.tokenizer.token_bytes.name(token) for token in ids[1:]]
    assert names[-1] == "<|im_end|>"


def test_detokenize_agrees(any_site: Site) -> None:
    ids = send(any_site.port, "/tokenize", {"prompt": "in the 🦄", "add_special_tokens": False}).json["tokens"]
    assert send(any_site.port, "/detokenize", {"tokens": ids}).json == {"prompt": "in the 🦄"}


# --- errors ---


def test_error_codes_that_clients_look_for(site: Site) -> None:
    long = [70] * (MAX_MODEL_LEN + 1)
    for path, body, param in (
        (TEXT_PATH, {"prompt": long}, "prompt"), (TEXT_PATH, {"prompt": "x " * 99_999}, "prompt"),
        (TEXT_PATH, {"prompt": "x", "max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        (CHAT_PATH, {"messages": [{"role": "user", "content": "🦄" * MAX_MODEL_LEN}]}, "messages"),
        (CHAT_PATH, {"messages": HI, "max_completion_tokens": MAX_MODEL_LEN}, "max_completion_tokens"),
    ):
        reply = send(site.port, path, body)
        assert (reply.status, reply.error["type"], reply.error["code"], reply.error["param"]) == (
            400, "invalid_request_error", "context_length_exceeded", param
        )
        assert "maximum context length" in reply.error["message"]
    with pytest.raises(openai.NotFoundError) as missing:
        site.client.completions.create(model="gpt-0", prompt="x")
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.AuthenticationError) as unknown:
        site.client.with_options(api_key="wrong").completions.create(model=MODEL, prompt="x")
    assert (unknown.value.code, unknown.value.type) == ("invalid_api_key", "invalid_request_error")
