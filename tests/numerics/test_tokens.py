"""Logits and greedy tokens equal transformers'; adapters mean the same on both sides. bfloat16 is as exact as theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from coserve.config.settings import LoraConfig, SamplingConfig, SchedulerConfig
from coserve.config.values import BEST_EFFORT
from coserve.engine.generation import Generator
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import load_weights
from coserve.peft.lora import LoraAdapter
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.runtime.spans import NO_ADAPTER, RowSpan
from coserve.text.tokenizer import ChatTokenizer
from tests import oracle
from tests.default_model import default_model, gsm8k_problems, needs_bfloat16, needs_default_model, needs_gsm8k
from tests.tiny_engine import drive, make_engine
from tests.tiny_models import FAMILIES, build_tiny_model
from tests.tiny_tokenizer import build_tiny_tokenizer

ROPES = {
    "plain": None,
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


def tiny_model(directory: Path, family: str, **settings: object) -> LoadedModel:
    build_tiny_model(family, directory, **settings)
    build_tiny_tokenizer(directory)
    weights = load_weights(Checkpoint(directory), dtype=torch.float32, device=torch.device("cpu"))
    return LoadedModel("tiny", directory, "tiny", ChatTokenizer.load(directory), weights, Executor(weights))


def random_adapter(model: LoadedModel, scale: float) -> LoraAdapter:
    adapter = LoraAdapter.create(
        model.architecture, LoraConfig(r=4, alpha=8), dtype=torch.float32, device=torch.device("cpu"), seed=0
    )
    adapter.flat.copy_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(1)) * scale)
    return adapter


def prompt(length: int) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("family", "sliding_window"), [*((f, None) for f in FAMILIES), ("mistral", 9), ("qwen3", 12)])
def test_logits_equal_transformers(tmp_path: Path, family: str, sliding_window: int | None, rope: str) -> None:
    model = tiny_model(tmp_path / "m", family, sliding_window=sliding_window, rope=ROPES[rope])
    reference = oracle.load_oracle(model.directory, torch.float32)
    ids = prompt(150)
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    assert float((Generator(model).logits(ids) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_with_an_adapter_equal_peft(tmp_path: Path, family: str) -> None:
    model = tiny_model(tmp_path / "m", family)
    adapter = random_adapter(model, 0.3)
    reference = oracle.with_adapter(oracle.load_oracle(model.directory, torch.float32), adapter)
    ids = prompt(60)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).logits[0]
    error = float((Generator(model, adapter).logits(ids) - expected).abs().max())
    assert error <= 1e-5 * float(expected.abs().max()), "as the packed layout of a real model"


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_in_a_batch_equals_generate(tmp_path: Path, family: str) -> None:
    """Prompts of different lengths, half of them with the adapter, in one batch; each as if alone."""
    model = tiny_model(tmp_path / "m", family)
    adapter = random_adapter(model, 0.2)
    prompts = [prompt(n) for n in (1, 17, 33, 64)]
    scheduler = SchedulerConfig(policy="inference-only", tpot_ms=BEST_EFFORT, ttft_ms=BEST_EFFORT)
    engine = make_engine(model, scheduler=scheduler)
    engine.add_adapter("tuned", adapter)
    sampling, names = SamplingConfig(max_tokens=24, temperature=0, ignore_eos=True), ["tuned", None, "tuned", None]
    handles = [engine.submit(ids, sampling, adapter=name) for ids, name in zip(prompts, names, strict=True)]
    drive(engine)
    base = oracle.load_oracle(model.directory, torch.float32)
    for ids, handle, name in zip(prompts, handles, names, strict=True):
        reference = oracle.with_adapter(base, adapter) if name else base
        output = reference.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        if name:
            reference.unload()
        assert handle.token_ids == output[0, len(ids) :].tolist()


def test_sampling_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "m", "llama")
    sampling = SamplingConfig(max_tokens=12, temperature=0.8, top_p=0.9, seed=5, ignore_eos=True)
    together = Generator(model).generate([prompt(9), prompt(20)], sampling)
    assert Generator(model).generate([prompt(9)], sampling) == together[:1]


@pytest.mark.full
@needs_default_model
@needs_gsm8k
def test_default_model_equals_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2: logits, and greedy tokens of 32 real prompts x 64; a first difference only at a near tie.

    Logits go up to 40. The plain layout agrees to 1e-4; the packed one adds in another order and is held to 1e-5 of the
    largest logit, and to twice transformers' own distance from float64: the root mean square, as the largest is one token's
    in the beginning that all conversations share.
    """
    model = default_model()
    reference = oracle.load_oracle(model.directory, torch.float32)
    prompts = [
        model.tokenizer.encode_chat([{"role": "user", "content": problem["question"]}]) for problem in gsm8k_problems(32)
    ]
    generator = Generator(model)
    found = generator.generate(prompts, SamplingConfig(max_tokens=64, temperature=0))
    near_ties = 0
    expected, logits = greedy_together(reference, prompts, 64)
    for row, (tokens, theirs) in enumerate(zip(found, expected, strict=True)):
        if tokens == theirs[: len(tokens)]:
            continue
        first = next(i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b)
        top = logits[first][row].topk(2).values
        assert float(top[0] - top[1]) < 1e-3, f"token {first} differs without a near tie"
        near_ties += 1
    checkpoint, cpu = Checkpoint(model.directory), torch.device("cpu")
    plain_weights = load_weights(checkpoint, dtype=torch.float32, device=cpu, packed=False)
    plain = Generator(dataclasses.replace(model, weights=plain_weights, executor=Executor(plain_weights)))
    exact = oracle.load_oracle(model.directory)
    distance: dict[str, float] = {}
    squares: dict[str, list[torch.Tensor]] = {"packed": [], "transformers": []}
    for ids in prompts[:4]:
        row = torch.tensor([ids])
        with torch.no_grad():
            theirs, true = reference(row).logits[0], exact(row).logits[0]
        packed = generator.logits(ids)
        for name, a, b in (
            ("plain", plain.logits(ids), theirs), ("packed", packed, theirs),
            ("largest logit", true, torch.zeros_like(true)),
        ):
            distance[name] = max(distance.get(name, 0.0), float((a.double() - b.double()).abs().max()))
        squares["packed"].append((packed.double() - true).square().mean())
        squares["transformers"].append((theirs.double() - true).square().mean())
    from_float64 = {name: float(torch.stack(found).mean().sqrt()) for name, found in squares.items()}
    with capsys.disabled():
        print(f"\nSmolLM2: logit differences {distance}, from float64 {from_float64}; {near_ties} of 32 prompts differ, each "
              "first at a near tie")
    assert distance["plain"] <= 1e-4
    assert distance["packed"] <= 1e-5 * distance["largest logit"]
    assert from_float64["packed"] <= 2 * from_float64["transformers"]
    assert near_ties <= 2


def decoded_logits(model: LoadedModel, ids: list[int], first: int) -> torch.Tensor:
    """[T - first, V] logits of positions first .. T - 1, each from a pass that decodes that token alone."""
    generator = Generator(model)
    engine = generator._engine([len(ids)])
    engine.blocks.allocate(0, len(ids))
    table, device = engine.blocks.table(0), model.weights.device
    rows = []
    with torch.no_grad():
        engine.device.passes.run(torch.tensor(ids[:first], device=device), [], [RowSpan(0, first, table, NO_ADAPTER)], None)
        for position in range(first, len(ids)):
            span = RowSpan(position, position + 1, table, NO_ADAPTER)
            hidden = engine.device.passes.run(torch.tensor(ids[position : position + 1], device=device), [span], [], None)
            rows.append(engine.device.passes.logits(hidden)[0].clone())
    engine.close()
    return torch.stack(rows)


def greedy_together(
    reference: torch.nn.Module, prompts: list[list[int]], count: int
) -> tuple[list[list[int]], Sequence[torch.Tensor]]:
    """transformers' greedy tokens of all prompts in one batch, which float32 bears; those behind an end are its padding. With
    the logits [prompts, vocabulary] of each step."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(each)) + list(each) for each in prompts])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in prompts])
    output = reference.generate(
        ids, attention_mask=mask, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    return output.sequences[:, longest:].tolist(), output.logits


def label_errors(logits: torch.Tensor, exact: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """|log p - exact log p| of each next token. logits, exact: rows of the last positions but one."""
    following = torch.tensor(ids[-logits.shape[0] :])[:, None]
    own, true = (torch.log_softmax(each.double(), -1).gather(1, following)[:, 0] for each in (logits, exact))
    return (own - true).abs()


def test_decoded_logits_in_bfloat16_are_as_exact_as_transformers(tmp_path: Path) -> None:
    directory = build_tiny_model("llama", tmp_path / "m", dtype=torch.bfloat16)
    weights = load_weights(Checkpoint(directory), dtype=torch.bfloat16, device=torch.device("cpu"))
    model = LoadedModel("tiny", directory, "tiny", None, weights, Executor(weights))  # type: ignore[arg-type]  # no text here
    ids = prompt(150)
    theirs, exact = (oracle.load_oracle(directory, dtype) for dtype in (torch.bfloat16, torch.float64))
    with torch.no_grad():
        expected, want = (each(torch.tensor([ids])).logits[0, :-1] for each in (theirs, exact))
    allowed = 1.5 * label_errors(expected, want, ids).mean()
    assert label_errors(Generator(model).logits(ids)[:-1], want, ids).mean() <= allowed
    assert label_errors(decoded_logits(model, ids[:-1], 70), want[70:], ids).mean() <= allowed


@pytest.mark.full
@needs_default_model
@needs_gsm8k
@needs_bfloat16
def test_default_model_in_bfloat16(capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2 against transformers in bfloat16: greedy tokens of 24 real prompts x 32, and log-probabilities of a text against
    float64 with the same weights. Outputs first differ only where float64 has the two tokens almost equal: bfloat16's numbers
    beside 16 lie 0.125 apart."""
    model = default_model("bfloat16")
    reference, single, exact = (
        oracle.load_oracle(model.directory, dtype, rounded_to=torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    problems = gsm8k_problems(40)
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": problem["question"]}]) for problem in problems[:24]]
    found = Generator(model).generate(prompts, SamplingConfig(max_tokens=32, temperature=0))
    expected = [
        reference.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0, len(ids) :].tolist() for ids in prompts
    ]
    wide, _ = greedy_together(single, prompts, 32)
    differences, gaps = [], []
    for ids, tokens, theirs in zip(prompts, found, expected, strict=True):
        if tokens == theirs:
            continue
        first = next(i for i, (a, b) in enumerate(zip(tokens, theirs, strict=False)) if a != b)
        with torch.no_grad():
            logits = exact(torch.tensor([[*ids, *theirs[:first]]])).logits[0, -1]
        differences.append(first)
        gaps.append(abs(float(logits[tokens[first]] - logits[theirs[first]])))
    equal = {
        name: sum(a == b[: len(a)] for a, b in zip(outputs, wide, strict=True))
        for name, outputs in (("transformers", expected), ("coserve", found))
    }
    text = model.tokenizer.encode("\n".join(f"{problem['question']}\n{problem['answer']}" for problem in problems[24:30]))
    with torch.no_grad():
        theirs, want = (each(torch.tensor([text])).logits[0, :-1] for each in (reference, exact))
    start = len(text) - 64
    errors = {
        "transformers": label_errors(theirs, want, text),
        "coserve": label_errors(Generator(model).logits(text)[:-1], want, text),
        "transformers, last 63": label_errors(theirs[start:], want[start:], text),
        "coserve, last 63 decoded": label_errors(decoded_logits(model, text[:-1], start), want[start:], text),
    }
    mean = {name: round(float(each.mean()), 4) for name, each in errors.items()}
    largest = {name: round(float(each.max()), 3) for name, each in errors.items()}
    with capsys.disabled():
        print(f"\nSmolLM2 in bfloat16: {24 - len(differences)} of 24 outputs equal transformers'; the others first differ at")
        print(f"tokens {sorted(differences)}, where float64's logits are {sorted(round(gap, 3) for gap in gaps)} apart")
        print(f"outputs equal to those in float32 with the same weights: {equal}")
        print(f"errors of log-probabilities of {len(text)} tokens: mean {mean}, largest {largest}")
    assert max(gaps, default=0) < 0.5
    assert equal["coserve"] >= equal["transformers"] - 4, "neither is nearer to float32 than by chance"
    assert mean["coserve"] <= 1.5 * mean["transformers"]
    assert mean["coserve, last 63 decoded"] <= 1.5 * mean["transformers, last 63"]
