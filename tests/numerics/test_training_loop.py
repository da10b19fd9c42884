"""20 optimizer steps follow a plain peft loop; the real model's gradients are as exact as peft's, in either dtype."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from coserve.config.settings import FinetuneConfig, LoraConfig, OptimizerConfig
from coserve.core import Example, Group
from coserve.finetune.optimizer import learning_rate
from coserve.kernels.attention import QUERY_BLOCK
from coserve.model.checkpoint import Checkpoint
from coserve.model.weights import load_weights
from coserve.peft.lora import LoraAdapter
from coserve.runtime.executor import Executor
from coserve.runtime.loaded import LoadedModel
from coserve.text.examples import ExampleEncoder
from coserve.text.tokenizer import ChatTokenizer
from coserve.training.trainer import AdapterTrainer
from tests import oracle
from tests.default_model import default_model, gsm8k_problems, needs_bfloat16, needs_default_model, needs_gsm8k
from tests.tiny_models import FAMILIES, build_tiny_model


def tiny_model(family: str, directory: Path) -> LoadedModel:
    build_tiny_model(family, directory)
    weights = load_weights(Checkpoint(directory), dtype=torch.float32, device=torch.device("cpu"))
    return LoadedModel("tiny", directory, "tiny", None, weights, Executor(weights))  # type: ignore[arg-type]  # no text here


def random_groups(rng: np.random.Generator, count: int) -> list[Group]:
    groups = []
    for index in range(count):
        length = int(rng.integers(4, 40))
        weights = (rng.random(length) < 0.8).astype(np.float32)
        weights[-1] = 1
        example = Example(index=index, token_ids=rng.integers(0, 97, length), weights=weights)
        groups.append(Group(index=index, examples=(example,)))
    return groups


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_20_steps_follow_a_plain_peft_loop(tmp_path: Path, family: str, schedule: str) -> None:
    steps, batch = 20, 4
    model = tiny_model(family, tmp_path / "model")
    config = FinetuneConfig(
        lora=LoraConfig(r=4, alpha=8), max_microbatch_tokens=64, window_tokens=24, batch_size=batch, max_steps=steps,
        optimizer=OptimizerConfig(
            learning_rate=1e-2, schedule=schedule, warmup_steps=4, weight_decay=0.01, max_grad_norm=0.5, slice_elements=1000
        ),
    )
    trainer = AdapterTrainer(model, config)
    start = LoraAdapter(config.lora, trainer.adapter.sites, trainer.adapter.flat.clone(), num_layers=3)
    groups = random_groups(np.random.default_rng(3), steps * batch)

    reference = oracle.with_adapter(oracle.load_oracle(model.directory, torch.float32), start)
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=4, num_training_steps=steps)
    clipped = 0
    for step in range(steps):
        chosen = groups[step * batch : (step + 1) * batch]
        own = trainer.forward_backward(chosen, step)
        norm = trainer.optim_step(learning_rate(config.optimizer, step, steps))
        examples = [group.examples[0] for group in chosen]
        total = sum(e.label_weight for e in examples)
        loss = 0.0
        for example in examples:  # accumulation, an example at a time
            part = -(oracle.label_weights(example) * oracle.label_logprobs(reference, example)).sum() / total
            part.backward()
            loss += float(part)
        expected_norm = float(torch.nn.utils.clip_grad_norm_(parameters, 0.5))
        clipped += expected_norm > 0.5
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert own.loss == pytest.approx(loss, rel=1e-4)
        assert norm == pytest.approx(expected_norm, rel=1e-3)
    assert clipped > 5, "clipping has to take part in the comparison"


def test_a_trained_adapter_lowers_the_loss(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    trainer = AdapterTrainer(model, FinetuneConfig(lora=LoraConfig(r=8), max_microbatch_tokens=128))
    groups = random_groups(np.random.default_rng(0), 4)
    before = trainer.score(groups).loss
    for step in range(30):
        trainer.forward_backward(groups, step)
        trainer.optim_step(2e-2)
    assert trainer.score(groups).loss < 0.5 * before


def test_out_of_memory_shrinks_the_window_and_restarts_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", tmp_path / "model")
    groups = random_groups(np.random.default_rng(0), 4)
    config = FinetuneConfig(lora=LoraConfig(r=2), max_microbatch_tokens=128, window_tokens=128)
    calm = AdapterTrainer(model, config)
    expected = calm.forward_backward(groups, 0)
    warnings: list[str] = []
    trainer = AdapterTrainer(model, config, warn=warnings.append)
    run = trainer.executor.run

    def scarce(state, unit, adapter):  # noqa: ANN001, ANN202 mirrors the method
        run(state, unit, adapter)
        if unit.end - unit.start > 64 and unit.layer_start == 1:
            raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(trainer.executor, "run", scarce)
    found = trainer.forward_backward(groups, 0)
    assert trainer.window == 64
    assert "64" in warnings[0]
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    torch.testing.assert_close(trainer.adapter.grad, calm.adapter.grad, rtol=1e-4, atol=1e-6)


def gsm8k_conversations(tokenizer: ChatTokenizer) -> list[Example]:
    """Two problems, and a conversation of three: its attention goes over two blocks of queries."""
    turns = [
        [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": problem["answer"]}]
        for problem in gsm8k_problems(5)
    ]
    conversations = [*turns[:2], [message for pair in turns[2:] for message in pair]]
    examples = []
    for index, messages in enumerate(conversations):
        ids, weights = ExampleEncoder(tokenizer).encode_training(messages)
        examples.append(Example(index=index, token_ids=ids, weights=weights))
    assert max(example.num_tokens for example in examples) > QUERY_BLOCK
    return examples


@pytest.mark.full
@needs_default_model
@needs_gsm8k
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
def test_gradients_are_as_exact_as_pefts(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2 on GSM8K text: error against float64 autograd at most twice that of transformers + peft in the same dtype."""
    model = default_model(dtype)
    kind = model.weights.dtype
    examples = gsm8k_conversations(model.tokenizer)
    config = FinetuneConfig(lora=LoraConfig(r=16, alpha=32), max_microbatch_tokens=4096, window_tokens=200)
    trainer = AdapterTrainer(model, config)
    generator = torch.Generator().manual_seed(0)
    trainer.adapter.flat.copy_(torch.randn(trainer.adapter.flat.shape, generator=generator) * 0.02)
    trainer.forward_backward([Group(index=e.index, examples=(e,)) for e in examples], 0)
    own = oracle.own_gradients(trainer.adapter)
    found = {}
    for name, wide in (("peft", kind), ("exact", torch.float64)):
        flat = trainer.adapter.flat.to(wide)
        adapter = LoraAdapter(config.lora, trainer.adapter.sites, flat, num_layers=model.architecture.num_layers)
        reference = oracle.with_adapter(oracle.load_oracle(model.directory, wide, rounded_to=kind), adapter)
        oracle.sft_loss(reference, examples).backward()
        found[name] = {key: value.double() for key, value in oracle.gradients(reference, adapter).items()}
        del reference
    exact = found["exact"]
    errors = {
        name: [oracle.relative_error(gradients[key].double(), exact[key]) for key in exact]
        for name, gradients in (("coserve", own), ("peft", found["peft"]))
    }
    mean = {name: float(np.mean(values)) for name, values in errors.items()}
    worst = {name: max(values) for name, values in errors.items()}
    with capsys.disabled():
        print(f"\n{dtype} gradient error against float64: mean {mean}, worst tensor {worst}")
    assert mean["coserve"] <= 2 * mean["peft"]
    assert worst["coserve"] <= 2 * worst["peft"]
