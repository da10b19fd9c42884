"""Prompts that are scored, as evaluation harnesses ask for it, over HTTP with a real engine: the engine's own numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from coserve.config.settings import SamplingConfig
from coserve.runtime.loaded import load_model
from tests.server.conftest import RunningServer
from tests.tiny_engine import make_engine

TEXTS = ("The quick brown fox 🦄", "hello hello world", "grün 中文")


def test_a_batch_of_ids_is_scored(server: RunningServer, tiny_model: Path) -> None:
    model = load_model(str(tiny_model), device="cpu", dtype="float32")
    prompts = [model.tokenizer.encode(text) for text in TEXTS]
    engine = make_engine(model)
    config = SamplingConfig(max_tokens=1, temperature=0, prompt_logprobs=1, logprobs=1)
    expected = engine.generate(prompts, config)
    bare = engine.generate(prompts, replace(config, max_tokens=0))
    engine.close()
    names = model.tokenizer.token_bytes.name
    for max_tokens, handles in ((1, expected), (0, bare)):
        body = {"prompt": prompts, "max_tokens": max_tokens, "logprobs": 1, "echo": True, "temperature": 0, "seed": 1234}
        reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == max_tokens * len(prompts)
        for ids, text, handle, choice in zip(prompts, TEXTS, handles, reply.json()["choices"], strict=True):
            found = choice["logprobs"]
            entries = [*handle.prompt_logprobs, *handle.outputs[0].logprobs]
            assert found["tokens"] == [names(token) for token in [*ids, *handle.token_ids]]
            assert found["token_logprobs"] == [None, *(pytest.approx(entry.logprob, abs=1e-5) for entry in entries)]
            for entry, top in zip(entries, found["top_logprobs"][1:], strict=True):
                best, value = entry.top[0]
                assert top[names(best)] == pytest.approx(value, abs=1e-5)
                assert (max(top, key=top.__getitem__) == names(entry.token)) == (best == entry.token)
            assert choice["text"] == text + handle.text
            ends = [*found["text_offset"][1:], len(choice["text"])]
            cut = [choice["text"][start:end] for start, end in zip(found["text_offset"], ends, strict=True)]
            assert "".join(cut) == choice["text"]
            for piece, name in zip(cut, found["tokens"], strict=True):
                assert piece == name or name.startswith(("bytes:", "<|"))
