"""Finetune the default model on the demo's 99 examples, then ask base and tuned the held-out questions, side by side."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path

from coserve.config import FinetuneConfig, LoraConfig, OptimizerConfig, SamplingConfig
from coserve.engine.finetuning import FinetuneResult, finetune
from coserve.engine.generation import Generator
from coserve.engine.model import LoadedModel
from coserve.finetune.job import JobEvent

DEMO_CONFIG = FinetuneConfig(
    lora=LoraConfig(r=16, alpha=32),
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine", warmup_steps=4),
    epochs=4, batch_size=9, max_microbatch_tokens=1024, seed=7,
)
ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One held-out question and what both models say; right: the answer holds one of the keywords."""

    question: str
    keywords: tuple[str, ...]
    base: str
    tuned: str
    base_right: bool
    tuned_right: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Seconds are wall-clock."""

    answers: tuple[Answer, ...]
    finetune_seconds: float
    answer_seconds: float
    trained_tokens: int
    first_loss: float
    last_loss: float

    @property
    def num_base_right(self) -> int:
        return sum(answer.base_right for answer in self.answers)

    @property
    def num_tuned_right(self) -> int:
        return sum(answer.tuned_right for answer in self.answers)

    def to_json(self) -> str:
        counts = {"questions": len(self.answers), "base_right": self.num_base_right, "tuned_right": self.num_tuned_right}
        return json.dumps({**counts, **asdict(self)}, indent=2) + "\n"


def is_right(answer: str, keywords: tuple[str, ...]) -> bool:
    """Whether a keyword stands in the answer as a whole word."""
    return any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in keywords)


def questions() -> list[tuple[str, tuple[str, ...]]]:
    """The held-out questions with their keywords."""
    lines = files("coserve.demo").joinpath("questions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return [(record["question"], tuple(record["keywords"])) for record in records]


def train(output: Path, *, model: LoadedModel | None, listen: Callable[[JobEvent], None]) -> FinetuneResult:
    """Runs the demo's job into `output`."""
    with as_file(files("coserve.demo").joinpath("train.jsonl")) as data:
        return finetune(data, output, model=model, config=DEMO_CONFIG, listen=listen)


def ask(result: FinetuneResult, progress: Callable[[int], None]) -> tuple[Answer, ...]:
    """Greedy answers of base and tuned in one batch: rows with and without the adapter run together."""
    asked = questions()
    tokenizer = result.model.tokenizer
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question}]) for question, _ in asked]
    generator = Generator(result.model, result.adapter)
    replies = generator.generate(
        [*prompts, *prompts], SamplingConfig(max_tokens=ANSWER_TOKENS, temperature=0),
        on_token=lambda index, token: progress(1), use_adapter=[False] * len(prompts) + [True] * len(prompts),
    )
    texts = [tokenizer.decode(ids).strip() for ids in replies]
    return tuple(
        Answer(question=question, keywords=keywords, base=base, tuned=tuned,
               base_right=is_right(base, keywords), tuned_right=is_right(tuned, keywords))
        for (question, keywords), base, tuned in zip(asked, texts[: len(asked)], texts[len(asked) :], strict=True)
    )


def run_demo(
    output: Path, *, model: LoadedModel | None, listen: Callable[[JobEvent], None], progress: Callable[[int], None]
) -> tuple[FinetuneResult, DemoReport]:
    """Trains, asks, and reports. progress(tokens): called as answers grow."""
    started = time.perf_counter()
    result = train(output, model=model, listen=listen)
    trained = time.perf_counter()
    answers = ask(result, progress)
    return result, DemoReport(
        answers=answers, finetune_seconds=trained - started, answer_seconds=time.perf_counter() - trained,
        trained_tokens=sum(row.tokens for row in result.rows), first_loss=result.rows[0].train_loss,
        last_loss=result.rows[-1].train_loss,
    )
