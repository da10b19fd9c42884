"""The held-out questions: what base and tuned model say, and whether it is right."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from importlib.resources import files

from coserve.demo.client import Connection

ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One held-out question and what both models say; right: the answer holds one of the keywords."""

    question: str
    keywords: tuple[str, ...]
    base: str
    tuned: str

    @property
    def base_right(self) -> bool:
        return is_right(self.base, self.keywords)

    @property
    def tuned_right(self) -> bool:
        return is_right(self.tuned, self.keywords)


def is_right(answer: str, keywords: tuple[str, ...]) -> bool:
    """Whether a keyword stands in the answer as a whole word."""
    return any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in keywords)


def questions() -> list[tuple[str, tuple[str, ...]]]:
    """The held-out questions with their keywords."""
    lines = files("coserve.demo").joinpath("questions.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines if line.strip()]
    return [(record["question"], tuple(record["keywords"])) for record in records]


async def ask_both(connection: Connection, base: str, tuned: str) -> tuple[Answer, ...]:
    """Greedy answers of both models to every question, all asked at once. Raises the client's errors."""
    asked = questions()

    async def ask(model: str, question: str) -> str:
        reply = await connection.client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": question}], max_tokens=ANSWER_TOKENS, temperature=0,
        )
        return (reply.choices[0].message.content or "").strip()

    replies = await asyncio.gather(*(ask(model, question) for model in (base, tuned) for question, _ in asked))
    return tuple(
        Answer(question=question, keywords=keywords, base=by_base, tuned=by_tuned)
        for (question, keywords), by_base, by_tuned in zip(asked, replies[: len(asked)], replies[len(asked) :], strict=True)
    )
