"""An answer ends where its model was taught to end: the base's own tokens, and those that training taught an adapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig
from coserve.core import Example, Group, InvalidRequest
from coserve.engine.generation import Generator
from coserve.finetune.datasets import load_training
from coserve.finetune.taught import taught_end_tokens
from coserve.peft.remarks import GENERATION_FILE, end_tokens
from coserve.runtime.loaded import LoadedModel, load_model
from coserve.text.tokenizer import ChatTokenizer
from coserve.training.finetuning import finetune
from tests.tiny_directory import build_tiny_directory, chat_lines, preference_lines, write_lines
from tests.tiny_engine import MakeEngine, drive, make_engine, prompt
from tests.tiny_tokenizer import CHATML, END_OF_TEXT, IM_END, IM_START, build_sentencepiece_tokenizer, build_tiny_tokenizer

TEXT_END, TURN_START, TURN_END = 0, 1, 2
"""Ids of the tiny tokenizer's special tokens."""
CONFIG = FinetuneConfig(
    lora=LoraConfig(r=2), max_steps=2, batch_size=2, checkpoint_steps=1, optimizer=OptimizerConfig(learning_rate=1e-3)
)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that ends at <|endoftext|> by all its files, with a ChatML template; and data."""
    root = tmp_path_factory.mktemp("ends")
    build_tiny_directory(root / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root / "model")
    tokenizer.eos_token = END_OF_TEXT
    tokenizer.save_pretrained(root / "model")
    for name in ("config.json", "generation_config.json"):
        edit(root / "model" / name, eos_token_id=TEXT_END)
    write_lines(root / "sft.jsonl", chat_lines(6))
    write_lines(root / "dpo.jsonl", preference_lines(6))
    write_lines(root / "text.jsonl", [{"text": f"{i} apples"} for i in range(6)])
    return root


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(str(directory / "model"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tuned(directory: Path, model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetune(directory / "sft.jsonl", tmp_path_factory.mktemp("tuned") / "out", model=model, config=CONFIG).directory


# --- the base ---


def test_a_base_ends_at_every_token_that_one_of_its_files_names(directory: Path, tmp_path: Path) -> None:
    path = build_tiny_directory(tmp_path / "model")  # its tokenizer says 2
    edit(path / "generation_config.json", eos_token_id=[7, 5, 7])
    edit(path / "config.json", eos_token_id=9)
    model = load_model(str(path), device="cpu", dtype="float32")
    assert model.end_token_ids == {7, 5, 9, TURN_END}
    edit(path / "config.json", eos_token_id=[-1, 10**6])
    assert load_model(str(path), device="cpu", dtype="float32").end_token_ids == {7, 5, TURN_END}, "none that can't be"


def test_a_request_on_the_base_ends_at_each(engines: MakeEngine, tmp_path: Path) -> None:
    path = build_tiny_directory(tmp_path / "model")
    edit(path / "generation_config.json", eos_token_id=7)
    edit(path / "config.json", eos_token_id=9)
    engine = make_engine(load_model(str(path), device="cpu", dtype="float32"))
    for token in (7, 9, TURN_END):
        assert outcome(engine, None, token) == ("stop", 1), token
    assert outcome(engine, None, 11) == ("length", 6)
    engine.close()


# --- what training taught ---


def outcome(engine: Any, adapter: str | None, token: int, **options: Any) -> tuple[str | None, int]:
    """How a request ends that wants nothing but `token`, and after how many tokens."""
    sampling = SamplingConfig(max_tokens=6, temperature=0, logit_bias={token: 100}, **options)
    handle = engine.submit(prompt(12), sampling, adapter=adapter)
    drive(engine)
    return handle.finish_reason, len(handle.token_ids)


def test_an_adapter_taught_with_chats_ends_at_the_turn(engines: MakeEngine, model: LoadedModel, tuned: Path) -> None:
    engine = engines()
    engine.load_adapter("tuned", tuned)
    assert outcome(engine, "tuned", TURN_END) == ("stop", 1)
    assert outcome(engine, "tuned", TEXT_END) == ("stop", 1), "the base's own end stays one"
    assert outcome(engine, None, TURN_END) == ("length", 6), "requests on the base are as before"
    assert outcome(engine, "tuned", TURN_START) == ("length", 6), "other special tokens end nothing"
    assert outcome(engine, "tuned", TURN_END, ignore_eos=True) == ("length", 6)
    assert outcome(engine, "tuned", TURN_END, min_tokens=3) == ("stop", 4)
    assert outcome(engine, "tuned", 11, stop_token_ids=(11,)) == ("stop", 1)


def test_an_adapter_that_an_engine_trains_ends_there_too(engines: MakeEngine, directory: Path, tmp_path: Path) -> None:
    engine = engines()
    job = engine.finetune(directory / "sft.jsonl", tmp_path / "job", CONFIG, name="mine")
    drive(engine)
    assert job.status == "succeeded"
    assert outcome(engine, "mine", TURN_END) == ("stop", 1)
    for path in (tmp_path / "job", *(tmp_path / "job" / "checkpoints").iterdir()):
        assert json.loads((path / GENERATION_FILE).read_text()) == {"eos_token_id": [TEXT_END, TURN_END]}


def test_a_generator_ends_there(model: LoadedModel, tuned: Path) -> None:
    sampling = SamplingConfig(max_tokens=6, temperature=0, logit_bias={TURN_END: 100})
    for adapter, expected in ((model.load_adapter(tuned), [TURN_END]), (None, [TURN_END] * 6)):
        assert Generator(model, adapter).generate([prompt(12)], sampling) == [expected]


def test_it_is_stored_in_a_form_that_peft_ignores(directory: Path, tuned: Path) -> None:
    assert json.loads((tuned / GENERATION_FILE).read_text()) == {"eos_token_id": [TEXT_END, TURN_END]}
    base = AutoModelForCausalLM.from_pretrained(directory / "model")
    assert peft.PeftModel.from_pretrained(base, str(tuned)).generation_config.eos_token_id == TEXT_END


def test_a_continued_adapter_keeps_what_it_was_taught(
    model: LoadedModel, directory: Path, tuned: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, lora=None)
    again = finetune(directory / "text.jsonl", tmp_path / "out", model=model, config=config, start=tuned).directory
    assert model.load_adapter(again).end_token_ids == (TEXT_END, TURN_END)


def test_nothing_is_written_where_the_base_ends_there_anyway(model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    out = finetune(directory / "text.jsonl", tmp_path / "out", model=model, config=CONFIG).directory
    assert not (out / GENERATION_FILE).exists()
    assert model.load_adapter(out).end_token_ids == ()


def test_pairs_teach_the_end_of_the_chosen_answer(model: LoadedModel, directory: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, objective="dpo")
    out = finetune(directory / "dpo.jsonl", tmp_path / "out", model=model, config=config).directory
    assert model.load_adapter(out).end_token_ids == (TEXT_END, TURN_END)


# --- which tokens are ends ---


def taught(
    path: Path, tokenizer: ChatTokenizer, lines: list[dict[str, Any]], *, max_length: int = 200, **options: Any
) -> tuple[int, ...]:
    config = FinetuneConfig(**{"too_long": "truncate", **options})
    data = load_training(write_lines(path / "data.jsonl", lines), tokenizer, config, max_length=max_length)
    return taught_end_tokens(data.groups, tokenizer, max_length=max_length)


def test_a_marker_that_is_no_special_token_counts_behind_its_line_break(tmp_path: Path) -> None:
    """As some ChatML bases have it: <|im_end|> is an added token, yet not declared special, so the break behind is trained."""
    build_sentencepiece_tokenizer(tmp_path, chat_template=CHATML)
    hf = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    hf.add_tokens([AddedToken(text, special=False, normalized=False) for text in (IM_START, IM_END)])
    hf.save_pretrained(tmp_path)
    tokenizer = ChatTokenizer.load(tmp_path)
    end = hf.convert_tokens_to_ids(IM_END)
    assert end not in tokenizer.special_ids
    assert taught(tmp_path, tokenizer, chat_lines(4)) == (end,)


def test_a_cut_example_teaches_no_end(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path))
    lines = [{"text": f"{IM_START}user {IM_START}" * 30}]
    for length in range(20, 30):
        assert taught(tmp_path, tokenizer, lines, max_length=length) == ()


def test_an_answer_of_weight_0_teaches_no_end(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer.load(build_tiny_tokenizer(tmp_path))

    def group(ids: list[int], weights: list[float]) -> Group:
        example = Example(index=0, token_ids=np.array(ids), weights=np.array(weights, np.float32))
        return Group(index=0, examples=(example,))

    assert taught_end_tokens([group([5, 6, TURN_END, 7, TURN_START], [0, 1, 1, 0, 0])], tokenizer, max_length=9) == (TURN_END,)
    assert taught_end_tokens([group([5, 6, TURN_END, 7, 8], [0, 1, 0, 0, 1])], tokenizer, max_length=9) == ()


@pytest.mark.parametrize(("text", "expected"), [
    ('{"eos_token_id": 2}', (2,)), ('{"eos_token_id": [5, 2, 5]}', (2, 5)), ('{"eos_token_id": [2, 400, -1]}', (2,)),
    ('{"eos_token_id": null}', ()), ('{"max_length": 20}', ()), ('{"eos_token_id": []}', ()),
])
def test_files_of_others_are_read(tmp_path: Path, text: str, expected: tuple[int, ...]) -> None:
    assert end_tokens(tmp_path, 400) == ()
    (tmp_path / GENERATION_FILE).write_text(text)
    assert end_tokens(tmp_path, 400) == expected


@pytest.mark.parametrize("text", [
    "", "[", "[2]", "3", '{"eos_token_id": "2"}', '{"eos_token_id": [true]}', '{"eos_token_id": 1.5}', '{"eos_token_id": {}}',
    "[" * 100_000, '{"eos_token_id": [[2]]}', "\xff",
])
def test_damaged_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / GENERATION_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidRequest, match=rf"^adapter: .*{GENERATION_FILE}") as caught:
        end_tokens(tmp_path, 400)
    assert "\n" not in str(caught.value) and str(tmp_path) not in str(caught.value)


